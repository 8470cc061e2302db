"""evaluate.py - tabulate quality against the number of steps; means over seeds, and a plot.

    python -m experiments.evaluate                               # teacher, student, causal in out/
    python -m experiments.evaluate --sweep --json out/eval.json  # at seven temperatures: long
    python -m experiments.evaluate --table out/eval.json --plot out/frontier.png

Real texts come first: held-out ones, then the same number of training ones, which is what a perfect
model would get. Measures are those of data/quality.py, and judge_ppl, the perplexity per token
under the causal model or a GPT-2. A model can look better merely by being less diverse, so quality
is also compared at equal entropy: each model at the temperature that gives its texts the entropy of
held-out data.
"""
import functools
import math
import os

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import corpus, quality
from experiments import common
from experiments.common import means, print_head, print_row
from model import NATURAL, add_device_flags, make_parser, run, setup
from train_teacher import causal_nll

STEPS = {"teacher": (4, 8, 16, 32, 64, 256, 1024), "student": (4, 8, 16, 32)}
TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6)  # with --sweep, and for the teacher in 8 steps
PENALISED = ((0.1, 0.8), (0.3, 0.6))  # frequency penalty and temperature, in 8 steps
BEGINS = 0.6  # the temperature of the teacher that distill.py's student starts as
DIGITS = {
    "nfe": 1, "disc_calls": 1, "valid": 3, "post": 3,
    "judge_ppl": 2, "tv": 3, "js3": 3, "ks": 3,
    "entropy": 3, "length": 1, "length_sd": 1,
    "distinct": 3, "novel": 3, "rare": 3,
    "returns": 3, "hints": 3, "methods": 3,
    "js1": 4, "js2": 4, "low": 3, "bigram": 3, "rep4": 3}
GOALS = {"post": 1, "judge_ppl": -1, "tv": -1, "js3": -1}  # to compare steps; 1: more is better
LINES = (  # of the plot: label, model, steps, style
    ("default", "teacher", 8, "C0.:"),
    ("default", "teacher", 32, "C0.--"),
    ("default", "teacher", 256, "C0.-"),
    ("default", "student", 4, "C3.:"),
    ("default", "student", 8, "C3.-"),
    ("sdtt", "student", 8, "C1.-"),
    ("default", "autoregressive", None, "k.-"),
    ("default", "held-out data", None, "g*"))


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument_group("models").add_argument
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py or experiments.sdtt")
    add("--causal", default="out/causal.pt", help="of train_teacher.py --causal, if it exists")
    add("--judge", help="a GPT-2 of the package transformers instead of --causal: name or folder")
    add("--data", help="corpus folder; None: the model's own")

    add = p.add_argument_group("rows").add_argument
    add("--rows", choices=("all", "teacher", "student"), default="all", help="models to measure")
    add("--steps", type=NATURAL, nargs="+", help="sampling steps; None: 4 to 1,024")
    add("--sweep", action="store_true", help="all steps up to 256 at seven temperatures")
    add("--samples", type=NATURAL, default=1000, help="texts per row; fewer are mostly noise")
    add("--batch", type=NATURAL, default=256, help="texts per batch")
    add("--json", help="add the rows to this file, under --label and the training's seed")
    add("--label", default="default", help="name of the run in --json")

    add = p.add_argument_group("results").add_argument
    add("--table", help="measure nothing: print the tables of this file, made with --json")
    add("--plot", help="with --table: draw quality against entropy, for runs with --sweep, as PNG")
    add_device_flags(p)
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------- the judge
@torch.no_grad()
def perplexity(net, x, counted, first, batch):
    """Return the perplexity per token of x (N, L), where `counted` (N, L), under a causal network
    z -> logits that reads the token `first` before each text."""
    nats = 0.0
    for part, counts in zip(x.split(batch), counted.split(batch)):
        nll = causal_nll(net, part, first)  # (b, L)
        nats += nll[counts].sum().item()
    tokens = counted.sum().item()
    return math.exp(nats / tokens)


def causal_judge(x, model, batch):
    """Return the perplexity of texts x (N, L), their ends included, under a causal Model."""
    net = model.net
    x = x.to(net.lengths.device)
    counted = corpus.until_end(x, net.config.pad_id)
    return perplexity(net, x, counted, net.config.mask_id, batch)


def gpt2_tokens(x, data):
    """Return texts x (N, L) in GPT-2's tokens (N, L'), and which of them count (N, L') bool.

    Passages in GPT-2's tokens stay as they are; in framed ones no end counts, as in MDLM's metric,
    and the first is dropped, as the judge reads one anyway. Other texts are decoded and encoded.
    """
    encoding = corpus.make_tokenizer("gpt2")
    eot = encoding.eot_token
    if data.packed and data.tokenizer == "gpt2":
        if data.framed:
            return x[:, 1:], x[:, 1:] != eot
        return x, torch.ones_like(x, dtype=torch.bool)

    rows = []
    for text in data.decode(x):
        ids = encoding.encode_ordinary(text)
        if not data.packed:
            ids.append(eot)
        rows.append(torch.tensor(ids, dtype=torch.long))
    lengths = torch.tensor([len(row) for row in rows])
    x = pad_sequence(rows, batch_first=True, padding_value=eot)
    return x, torch.arange(x.shape[1]) < lengths[:, None]


def make_judge(args, models, data, device):
    """Return judge(x (N, L)) -> perplexity, or None without a judge."""
    if args.judge is None:
        if "autoregressive" not in models:
            print(f"no judge: {args.causal} is missing; make it with train_teacher.py --causal")
            return None
        return functools.partial(causal_judge, model=models["autoregressive"], batch=args.batch)

    from transformers import GPT2LMHeadModel  # optional: pip install transformers
    net = GPT2LMHeadModel.from_pretrained(args.judge).to(device).eval()
    eot = corpus.make_tokenizer("gpt2").eot_token

    def judge(x):
        x, counted = gpt2_tokens(x, data)
        x = x.to(device)
        return perplexity(lambda z: net(z).logits, x, counted.to(device), eot, args.batch)
    return judge


# ---------------------------------------------------------------------------------------- the rows
def load(args, device, bf16):
    """Return the models to compare and judge by, {name: Model}, and their Corpus."""
    paths = {"teacher": args.teacher, "student": args.student}
    if args.rows != "all":
        paths = {args.rows: paths[args.rows]}
    first, *_ = paths
    if args.judge is None and os.path.isfile(args.causal):
        paths["autoregressive"] = args.causal
    models = common.load_models(paths, device, bf16)

    model = models[first]
    if args.data is None:
        args.data = model.flags["data"]
    data = corpus.load(args.data)
    config = model.net.config
    length = config.length if config.pads else 0
    data.check_fits(paths[first], model.tokenizer, length, config.framed)
    return models, data


def steps_of(name, args, L):
    """Return the numbers of steps to sample a model in, a list."""
    if name == "autoregressive":
        return [None]
    if args.steps is not None:
        return args.steps
    return [steps for steps in STEPS[name] if steps <= max(256, L)]


def plan(args, models):
    """Return what to write, triples (row name, Model, arguments of common.write)."""
    rows = []
    for name, model in models.items():
        if args.rows not in ("all", name):
            continue
        for steps in steps_of(name, args, model.net.config.length):
            temperatures = (1.0,)
            if (args.sweep and steps != 1024) or (name, steps) == ("teacher", 8):
                temperatures = TEMPERATURES
            for T in temperatures:
                rows.append((name, model, {"steps": steps, "temperature": T}))
            if model.disc is not None:
                how = {"steps": steps, "temperature": 1.0, "guided": True}
                rows.append((f"{name}, guided", model, how))

        if name != "autoregressive":
            for penalty, T in PENALISED:
                how = {"steps": 8, "temperature": T, "penalty": penalty}
                rows.append((f"{name}, penalty {penalty}", model, how))
    return rows


def measure(about, x, data, judge):
    """Return a table row: `about`, a dict that describes texts x (N, L), and all their measures."""
    row = about | quality.quality(x, data)
    row["samples"] = len(x)
    if "valid" in row:
        valid = row["valid"]
        row["valid_se"] = math.sqrt(valid * (1 - valid) / len(x))
    if judge is not None:
        row["judge_ppl"] = judge(x)
    if about.get("T", 1) == 1:
        row["examples"] = data.decode(x[:4])
    return row


def measure_all(args, models, data, judge):
    """Print each row as it is measured; return them all, a list of dicts."""
    model, *_ = models.values()
    L = model.net.config.length
    torch.manual_seed(args.seed)
    held_out = data.held_out(args.samples, L)
    training = data.batch(args.samples, L)
    rows = [
        measure({"row": "held-out data"}, held_out, data, judge),
        measure({"row": "training data"}, training, data, judge)]

    columns = measured(rows) | {"nfe": 1, "disc_calls": 1, "seq_per_s": 1}
    print_head("row", "steps", "T", *columns)
    for row in rows:
        print_row(*key(row), *means([row], columns))

    for name, model, how in plan(args, models):
        x, cost = common.write(model, args.samples, seed=args.seed, batch=args.batch, **how)
        cost |= {"row": name, "steps": how["steps"], "T": how["temperature"]}
        row = measure(cost, x, data, judge)
        rows.append(row)
        print_row(*key(row), *means([row], columns))
    return rows


# -------------------------------------------------------------------- comparing the rows of a run
def key(row):
    """Return what identifies a row: (name, steps, temperature), None where it has none."""
    return row["row"], row.get("steps"), row.get("T")


def measured(rows, names=DIGITS):
    """Return {name: digits} for the names that were measured in any of the rows."""
    found = set().union(*rows)
    return {name: DIGITS[name] for name in names if name in found}


def at_one(rows, name, steps, column, T=1):
    """Return `column` of a model in `steps` steps at temperature T; NaN if not measured."""
    for row in rows:
        if key(row) == (name, steps, T):
            return row.get(column, math.nan)
    return math.nan


def by_entropy(rows, name, steps, column):
    """Return sorted pairs (entropy, `column`), one per temperature, of a model in `steps` steps."""
    pairs = [(row["entropy"], row[column]) for row in rows
             if key(row)[:2] == (name, steps) and column in row]
    return sorted(pairs)


def at_data(rows, name, steps, column):
    """Return `column` of a model in `steps` steps at the entropy of held-out data: linear between
    the measured temperatures, NaN outside them."""
    pairs = by_entropy(rows, name, steps, column)
    if not pairs:
        return math.nan
    entropy = at_one(rows, "held-out data", None, "entropy", None)
    return float(np.interp(entropy, *zip(*pairs), left=math.nan, right=math.nan))


def untrained(rows, name, steps, column):
    """Return `at_one`, but for the teacher at BEGINS instead of the student: a control."""
    if name == "student":
        return at_one(rows, "teacher", steps, column, BEGINS)
    return at_one(rows, name, steps, column)


def steps_to_match(rows, column, student_steps, value=at_one):
    """Return how many steps the teacher needs for the student's `column` in `student_steps`.

    value(rows, name, steps, column) is `at_one`, `at_data` or `untrained`. Linear in log steps. The
    fewest steps measured mean those or fewer; inf: more than the most; NaN: unknown.
    """
    sign = GOALS[column]  # so that more is better
    goal = sign * value(rows, "student", student_steps, column)
    steps = sorted({row["steps"] for row in rows if row["row"] == "teacher"})
    values = [sign * value(rows, "teacher", n, column) for n in steps]

    for k, reached in enumerate(values):
        if reached >= goal:
            if k == 0:
                return steps[0]
            below = values[k - 1]
            way = (goal - below) / (reached - below)
            return steps[k - 1] * (steps[k] / steps[k - 1]) ** way
    if not values or math.isnan(goal + values[-1]):
        return math.nan
    return math.inf


# --------------------------------------------------------------------------------------- the tables
def all_rows(results):
    """Return the rows of all runs in {label: {seed: run}}, a list."""
    rows = []
    for runs in results.values():
        for run in runs.values():
            rows += run.get("rows", [])
    return rows


def print_means(results):
    """Print mean +- standard deviation over seeds of each row; of a sweep, T 1 and the controls."""
    columns = measured(all_rows(results))
    print_head("run", "seeds", "row", "steps", "T", *columns)
    for label, runs in results.items():
        groups = {}  # rows of different seeds belong together if their keys are the same
        for run in runs.values():
            for row in run["rows"]:
                groups.setdefault(key(row), []).append(row)

        for (name, steps, T), rows in groups.items():
            control = "penalty" in name or (name, steps) == ("teacher", 8)
            if control or T in (None, 1):
                print_row(label, len(rows), name, steps, T, *means(rows, columns))


def print_worth(results):
    """Print how many teacher steps match the student's, by each measure."""
    print("\nTeacher steps that match the student's, both at temperature 1 (by seed; inf: more "
          "than were measured),\nor both at the entropy of held-out data; untrained: "
          f"that match the teacher's own at temperature {BEGINS}:\n")
    pairs = [(name, steps) for steps in (4, 8, 16) for name in GOALS]
    print_head("run", *[f"{name} @{steps}" for name, steps in pairs])

    ways = {"": at_one, ", equal entropy": at_data, ", untrained": untrained}
    for label, runs in results.items():
        for way, value in ways.items():
            cells = []
            for name, steps in pairs:
                worth = [steps_to_match(run["rows"], name, steps, value) for run in runs.values()]
                cells.append(" ".join(f"{n:.0f}" for n in worth))
            if set(" ".join(cells).split()) != {"nan"}:
                print_row(label + way, *cells)


def print_equal_entropy(results):
    """Print each model whose temperatures reach the entropy of held-out data, at that entropy."""
    print("\nAt the entropy of held-out data (seeds: those that reach it):\n")
    columns = measured(all_rows(results), GOALS)
    print_head("run", "seeds", "model", "steps", *columns)

    for label, runs in results.items():
        models = dict.fromkeys(key(row)[:2] for row in all_rows({label: runs}))
        for name, steps in models:
            rows = []
            for run in runs.values():
                row = {column: at_data(run["rows"], name, steps, column) for column in columns}
                if any(map(math.isfinite, row.values())):
                    rows.append(row)
            if rows:
                print_row(label, len(rows), name, steps, *means(rows, columns))


# ----------------------------------------------------------------------------------------- the plot
def plot(results, path):
    """Draw quality against entropy, each of LINES through its temperatures, to a file."""
    from matplotlib.figure import Figure  # optional: pip install matplotlib

    columns = measured(all_rows(results), GOALS)
    figure = Figure(figsize=(5 * len(columns), 4.5), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, column in zip(axes, columns):
        for label, name, steps, style in LINES:
            for run in results.get(label, {}).values():
                pairs = by_entropy(run["rows"], name, steps, column)
                if pairs:
                    text = f"{label}: {name}, {steps}".removesuffix(", None")
                    ax.plot(*zip(*pairs), style, label=text)
        ax.set(xlabel="unigram entropy within a text, nats", ylabel=column)
    axes[-1].legend(title="run: model, steps", fontsize=8)
    figure.savefig(path, dpi=110)


def print_tables(path, plot_path):
    """Print all tables of a results file; draw the plot if plot_path is given."""
    results = common.read_results(path)
    if not all_rows(results):
        raise ValueError(f"{path} has no rows of an evaluation: make it with --json")
    print_means(results)
    print_worth(results)
    print_equal_entropy(results)
    if plot_path is not None:
        plot(results, plot_path)


def main(argv=None):
    args = parse_flags(argv)
    if args.table is not None:
        print_tables(args.table, args.plot)
        return 0

    if args.json is not None:
        common.read_results(args.json)  # fails now, not after minutes, if it is another file
    device, bf16 = setup(args)
    models, data = load(args, device, bf16)
    judge = make_judge(args, models, data, device)
    rows = measure_all(args, models, data, judge)

    flags = {name: model.flags for name, model in models.items()}
    trained = "student"
    if args.rows == "teacher":
        trained = "teacher"
    seed = flags[trained]["seed"]
    result = {"rows": rows, "training": flags, "hardware": common.hardware(device, bf16),
              "flags": vars(args)}
    if args.json is not None:
        common.add_run(args.json, args.label, seed, result)
    print_worth({args.label: {seed: result}})
    print_equal_entropy({args.label: {seed: result}})
    return 0


if __name__ == "__main__":
    run(main)

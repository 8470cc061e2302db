"""evaluate.py - tabulate quality against network calls; means over seeds, and a plot.

    python -m experiments.evaluate --json out/eval.json     # teacher, student, causal in out/
    python -m experiments.evaluate --table out/eval.json --plot out/frontier.png

Real texts come first: held-out ones, then the same number of training ones, which is what a perfect
model would get. The teacher writes in both orders of revealing, other models in their own. Measures
are those of data/quality.py; judge_ppl, the perplexity per token under the causal model or a GPT-2;
and nll, the few-step likelihood of held-out texts, nats per token. A model can look better merely
by being less diverse, so models are compared at equal diversity, too: each at the temperature that
gives it the student's rare characters, or the entropy of held-out text.
"""
import functools
import itertools
import math
import os

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import didi
from data import corpus, quality
from experiments import common
from experiments.common import means, print_head, print_row
from model import NATURAL, add_device_flags, make_parser, run, setup
from train_teacher import causal_nll

STEPS = (2, 4, 8, 16)
MORE_STEPS = (32, 256)  # of the teacher in random order
TEMPERATURES = (1.3, 1.15, 1.0, 0.9, 0.8)  # in 4 and in 8 steps, and of the causal model
DIGITS = {
    "calls": 1, "disc_calls": 1, "valid": 3, "post": 3,
    "judge_ppl": 2, "tv": 3, "js3": 3, "nll": 3, "ks": 3,
    "entropy": 3, "length": 1,
    "distinct": 3, "novel": 3, "rare": 3,
    "returns": 3, "hints": 3, "methods": 3,
    "js1": 4, "js2": 4, "low": 3, "bigram": 3, "rep4": 3}
GOALS = ("post", "judge_ppl", "tv", "js3")  # what is compared ..
EQUAL = {  # .. where this measure is that row's
    "rare": "student", "entropy": "held-out data", "bigram": "held-out data"}
LINES = (  # of the plot: run, model, order, colour
    ("default", "teacher", "random", "C7"),
    ("default", "teacher", "interlaced", "C0"),
    ("default", "student", "interlaced", "C3"),
    ("sdtt", "student", "interlaced", "C1"),
    ("paper", "student", "random", "C2"),
    ("paper, interlaced", "student", "interlaced", "C4"))


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
    add("--steps", type=NATURAL, nargs="+", help="sampling steps; None: 2 to 16 or 256")
    add("--samples", type=NATURAL, default=1000, help="texts per row; fewer are mostly noise")
    add("--batch", type=NATURAL, default=64, help="texts per batch; more are slower on a CPU")
    add("--json", help="add the rows to this file, under --label and the training's seed")
    add("--label", default="default", help="name of the run in --json")

    add = p.add_argument_group("results").add_argument
    add("--table", help="measure nothing: print the tables of this file, made with --json")
    add("--plot", help="with --table: draw quality against diversity, as PNG")
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


def plan(args, models):
    """Return what to write, triples (row name, Model, arguments of common.write)."""
    rows = []
    for name, model in models.items():
        if args.rows not in ("all", name):
            continue
        orders = {"teacher": ("random", "interlaced"), "student": (model.net.config.order,),
                  "autoregressive": (None,)}
        for order in orders[name]:
            steps_of_rows = args.steps or STEPS
            if order is None:
                steps_of_rows = (None,)
            elif (name, order, args.steps) == ("teacher", "random", None):
                steps_of_rows = STEPS + MORE_STEPS
            for steps in steps_of_rows:
                temperatures = (1.0,)
                if steps in (4, 8, None):
                    temperatures = TEMPERATURES
                how = {"steps": steps, "order": order}
                rows += [(name, model, how | {"temperature": T}) for T in temperatures]
                if model.disc is not None and steps in (4, 8):
                    rows.append((f"{name}, guided", model, how | {"guided": True}))
    return rows


@torch.no_grad()
def nll_per_token(model, x, batch, steps, order=None, temperature=1.0):
    """Return the few-step likelihood of x (N, L) in `steps` steps, nats per text token."""
    net = model.net

    def denoiser(z, where):
        return net(z, where) / temperature

    how = net.config.sampling(order) | {"pad_id": net.config.pad_id}
    torch.manual_seed(0)
    nats = 0.0
    for part in x.split(batch):
        part = part.to(net.lengths.device)
        nats += didi.few_step_nll(denoiser, part, steps, net.config.mask_id, **how).sum().item()
    return nats / (x != net.config.pad_id).sum().item()


def measure(about, x, data, judge):
    """Return a table row: `about`, a dict that describes texts x (N, L), and all their measures."""
    row = about | quality.quality(x, data)
    if judge is not None:
        row["judge_ppl"] = judge(x)
    if about.get("T") == 1:  # of a model: real texts stay where they are
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

    columns = measured(rows) | {"nll": 3, "calls": 1, "disc_calls": 1, "seq_per_s": 1}
    print_head("row", "order", "steps", "T", *columns)
    for row in rows:
        print_row(*key(row), *means([row], columns))

    for name, model, how in plan(args, models):
        x, about = common.write(model, args.samples, seed=args.seed, batch=args.batch, **how)
        if how["steps"] is not None and "guided" not in name:
            about["nll"] = nll_per_token(model, held_out[:400], args.batch, **how)
        about |= {"row": name, "order": how["order"], "steps": how["steps"]}
        about["T"] = how.get("temperature", 1.0)
        row = measure(about, x, data, judge)
        rows.append(row)
        print_row(*key(row), *means([row], columns))
    return rows


# -------------------------------------------------------------------- comparing the rows of a run
def key(row):
    """Return what identifies a row: (name, order, steps, temperature), None where it has none."""
    return row["row"], row.get("order"), row.get("steps"), row.get("T")


def measured(rows, names=DIGITS):
    """Return {name: digits} for the names that were measured in any of the rows."""
    found = set().union(*rows)
    return {name: DIGITS[name] for name in names if name in found}


def curve(rows, name, order, steps, x, column):
    """Return pairs (x, column), names of measures, by falling temperature of a model."""
    found = [row for row in rows
             if key(row)[:3] == (name, order, steps) and x in row and column in row]
    found.sort(key=lambda row: -row["T"])
    return [(row[x], row[column]) for row in found]


def at_equal(rows, name, order, steps, x, goal, column):
    """Return `column` of a model at the temperature where its measure x is `goal`: linear between
    those measured, NaN outside them."""
    pairs = sorted(curve(rows, name, order, steps, x, column))
    if not pairs:
        return math.nan
    return float(np.interp(goal, *zip(*pairs), left=math.nan, right=math.nan))


# --------------------------------------------------------------------------------------- the tables
def all_rows(results):
    """Return the rows of all runs in {label: {seed: run}}, a list."""
    rows = []
    for runs in results.values():
        for run in runs.values():
            rows += run.get("rows", [])
    return rows


def print_means(results):
    """Print mean +- standard deviation over seeds of each row."""
    columns = measured(all_rows(results))
    print_head("run", "seeds", "row", "order", "steps", "T", *columns)
    for label, runs in results.items():
        groups = {}  # rows of different seeds belong together if their keys are the same
        for run in runs.values():
            for row in run["rows"]:
                groups.setdefault(key(row), []).append(row)
        for about, rows in groups.items():
            print_row(label, len(rows), *about, *means(rows, columns))


def goal_of(rows, steps, x):
    """Return the measure x at which models are compared, see EQUAL; NaN if its row is missing."""
    for row in rows:
        if (row["row"], row.get("steps", steps), row.get("T", 1)) == (EQUAL[x], steps, 1):
            return row.get(x, math.nan)
    return math.nan


def print_equal(results):
    """Print teacher and student at the temperatures that make them equally diverse, see EQUAL."""
    columns = measured(all_rows(results), GOALS)
    print("\nWhere a measure equals the student's (rare) or held-out text's (else); seeds: those"
          " that reach it:\n")
    print_head("run", "steps", "equal", "model", "order", "seeds", *columns)
    for label, *about in itertools.product(
            results, (4, 8), EQUAL, ("student", "teacher"), ("random", "interlaced")):
        steps, x, name, order = about
        found = []
        for run in results[label].values():
            rows = run["rows"]
            goal = goal_of(rows, steps, x)
            row = {column: at_equal(rows, name, order, steps, x, goal, column)
                   for column in columns}
            if any(map(math.isfinite, row.values())):
                found.append(row)
        if found:
            print_row(label, *about, len(found), *means(found, columns))


# ----------------------------------------------------------------------------------------- the plot
def plot(results, path):
    """Draw quality against diversity, each of LINES through its temperatures, to a file."""
    from matplotlib.figure import Figure  # optional: pip install matplotlib

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, column in zip(axes, ("post", "judge_ppl")):
        for ax, x in zip(row, ("rare", "nll")):
            for label, name, order, colour in LINES:
                for steps, style in ((4, ":"), (8, "-")):
                    text = f"{label}: {name}, {order}, {steps}"
                    for run in results.get(label, {}).values():
                        pairs = curve(run["rows"], name, order, steps, x, column)
                        if pairs:
                            ax.plot(*zip(*pairs), style, marker=".", color=colour, label=text)
                            text = None  # once, not for each seed
            ax.set(xlabel=x, ylabel=column)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)


def print_tables(path, plot_path):
    """Print all tables of a results file; draw the plot if plot_path is given."""
    results = common.read_results(path)
    if not all_rows(results):
        raise ValueError(f"{path} has no rows of an evaluation: make it with --json")
    print_means(results)
    print_equal(results)
    if plot_path is not None:
        plot(results, plot_path)


def main(argv=None):
    args = parse_flags(argv)
    if args.table is not None:
        print_tables(args.table, args.plot)
        return 0

    if args.plot is not None:
        raise ValueError("--plot draws a --table: measure first, with --json")
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
    print_equal({args.label: {seed: result}})
    return 0


if __name__ == "__main__":
    run(main)

"""evaluate.py - quality against the number of steps: one table, row by row.

    python -m experiments.evaluate                           # teacher, student, causal in out/
    python -m experiments.evaluate --sweep --json out/eval.json    # at 7 temperatures: long
    python -m experiments.evaluate --rows student --student out/sdtt.pt --label sdtt ..
    python -m experiments.table out/eval.json                # mean and spread over seeds

Measures of quality are the corpus' own (data/), and judge_ppl, the perplexity under a judge: the
autoregressive model if there is one, or a GPT-2. Real texts come first: held-out ones, and as many
random ones of the training split, which is what a perfect model would get. Entropy is in nats.
"""
import functools
import math
import os

import torch
from torch.nn.utils.rnn import pad_sequence

from data import corpus, memory
from data.command import (FROM_1, SHARE, SIZE, WEIGHT, add_device_flags, make_parser, run_script,
                          setup)
from experiments import common
from experiments.table import GOALS, at_entropy, steps_to_match
from train_teacher import causal_nll

STEPS = {"teacher": (4, 8, 16, 32, 64, 256, 1024), "student": (4, 8, 16, 32),
         "autoregressive": (None,)}
TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6)  # with --sweep, and of the teacher in 8 steps
PENALISED = ((0.1, 0.8), (0.3, 0.6))  # frequency penalty and temperature, both models in 8 steps
CAUSAL = "out/causal.pt"
HEAD = ["row", "steps", "T", "nfe", "disc_calls"]


def parse_flags(argv=None):
    p, add = make_parser("Quality against the number of steps.")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py or experiments.sdtt")
    add("--causal", help="of train_teacher.py --causal [out/causal.pt if there and no --judge]")
    add("--data", help="corpus folder [the one that the model was trained on]")
    add("--rows", choices=("all", "teacher", "student"), default="all", help="whose rows")
    add("--steps", type=SIZE, nargs="+", help="of teacher, student, guided student [4 to 1,024]")
    add("--sweep", action="store_true", help="steps up to 256 at all temperatures, .6 to 1.2")
    add("--samples", type=SIZE, default=1000, help="in a row; of fewer, mostly noise")
    add("--batch", type=FROM_1, default=256, help="B, sequences at once, at most")
    add("--judge", help="a GPT-2 of the package transformers instead of --causal: name or folder")
    add("--guidance", type=WEIGHT, default=1.0, help="h, weight of the reward's gradient in rgas")
    add("--candidates", type=SIZE, default=4, help="M, next states to choose from in rgas")
    add("--switch", type=SHARE, default=0.5, help="share of guided steps that use the gradient")
    add("--json", help="add the rows to this file, under --label and the training seed")
    add("--label", default="default", help="what to call the run in --json")
    add_device_flags(add)
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------- the judge
@torch.no_grad()
def perplexity(model, parts, first):
    """Per token, under a causal model, of parts: pairs (tokens (b, L), which count (b, L) bool).

    first: the token that stands before each sequence.
    """
    nll = tokens = 0
    for x, counts in parts:
        nll += (causal_nll(model, x, first) * counts).sum().item()
        tokens += counts.sum().item()
    return math.exp(nll / tokens)


def parts_of(x, batch, V):
    """x (N, L) in parts of `batch` sequences, fewer if their logits over V were more than 1 GB."""
    return x.split(max(1, min(batch, 2 ** 28 // (x.shape[1] * V))))


def causal_judge(x, judge, batch):
    """Perplexity of texts x (N, L), their ends included, under the autoregressive model `judge`."""
    net = judge["denoiser"]
    parts = [part.to(net.lengths.device) for part in parts_of(x, batch, net.config.vocab_size)]
    counted = ((part, corpus.until_end(part, net.config.pad_id)) for part in parts)
    return perplexity(net, counted, net.config.mask_id)


def gpt2_tokens(x, data, encoding):
    """Texts x (b, L) in GPT-2's tokens (b, L'), padded, and which of them count (b, L') bool.

    Passages of its own tokens stay as they are; other texts are decoded, and end where they end.
    Of framed passages no end counts, as in MDLM's metric, and the first stands before them anyway.
    """
    if data.packed and data.tokenizer == "gpt2":
        if data.framed:
            return x[:, 1:], x[:, 1:] != encoding.eot_token
        return x, torch.ones_like(x, dtype=torch.bool)
    end = [] if data.packed else [encoding.eot_token]
    rows = [torch.tensor(encoding.encode_ordinary(text) + end) for text in data.decode(x)]
    counts = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    x = pad_sequence(rows, batch_first=True, padding_value=encoding.eot_token)
    return x, pad_sequence(counts, batch_first=True)


def gpt2_judge(x, lm, data, batch, device):
    """Perplexity of texts x (N, L) under a GPT-2 of transformers, per token of its own."""
    encoding = corpus.make_tokenizer("gpt2")
    parts = [gpt2_tokens(part, data, encoding) for part in parts_of(x, batch, encoding.n_vocab)]
    counted = ((ids.to(device), counts.to(device)) for ids, counts in parts)
    return perplexity(lambda z: lm(z).logits, counted, encoding.eot_token)


def make_judge(args, models, data, device):
    """A function of texts (N, L), their perplexity; or None. ValueError if it can't be loaded."""
    if args.judge is None:
        if "autoregressive" not in models:
            return None
        return functools.partial(causal_judge, judge=models["autoregressive"], batch=args.batch)
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ValueError("--judge needs the package transformers, which is optional: "
                         "pip install transformers") from None
    try:
        lm = GPT2LMHeadModel.from_pretrained(args.judge).to(device).eval()
    except Exception as e:  # no such folder, no network, a damaged file: each has its own
        raise ValueError(f"--judge {args.judge!r} cannot be loaded ({type(e).__name__}): name a "
                         "folder with a GPT-2 in it") from None
    corpus.make_tokenizer("gpt2")  # or say at once that it cannot be had
    return functools.partial(gpt2_judge, lm=lm, data=data, batch=args.batch, device=device)


# ---------------------------------------------------------------------------------------- the table
def plan(models, sweep, L, given=None):
    """[(row, model, steps, temperature, sampler)] for the models there are, of the steps given, or
    at most 4 L of STEPS: the longest text has no more calls in more."""
    rows = []
    for name in [name for name in STEPS if name in models]:
        sampler = "autoregressive" if name == "autoregressive" else "ancestral"
        of_name = [steps for steps in STEPS[name] if steps is None or steps <= max(256, 4 * L)]
        if given and name != "autoregressive":
            of_name = given
        for steps in of_name:
            several = sweep and (steps or 0) <= 256 or (name, steps) == ("teacher", 8)
            for T in TEMPERATURES if several else (1.0,):
                rows.append((name, name, steps, T, sampler))
    for name in [name for name in ("teacher", "student") if name in models]:
        for strength, T in PENALISED:
            rows.append((f"{name}, penalty {strength}", name, 8, T, strength))
    if "discriminator" in models.get("student", ()):
        for steps in given or (STEPS["student"] if sweep else (8,)):
            rows.append(("student, guided", "student", steps, 1.0, "rgas"))
    return rows


def measure(about, x, data, judge):
    """The dict `about` texts x (N, L), with all that is measured of them: a row of the table."""
    row = about | data.quality(x) | {"samples": len(x)}
    if "valid" in row:
        row["valid_se"] = math.sqrt(row["valid"] * (1 - row["valid"]) / len(x))
    if judge:
        row["judge_ppl"] = judge(x)
    if row.get("T", 1) == 1:
        row["examples"] = data.decode(x[:4])
    return row


def line(row, columns):
    """One row of the table as aligned text, "-" where it has no such column."""
    cells = []
    for name in columns[1:]:
        value = row.get(name)
        if value is None:
            value = "-"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        cells.append(f"{value:>{max(len(name), 6)}}")
    return f"{row['row']:<16} " + " ".join(cells)


def measure_all(args, models, data, judge):
    """Print the table as it comes; returns its rows, [{"row", "steps", "T", ..}]."""
    L, rows = next(iter(models.values()))["config"].length, []
    torch.manual_seed(args.seed)
    real = {"held-out data": data.held_out(args.samples, L),
            "training data": data.batch(args.samples, L)}
    for name, x in real.items():
        rows.append(measure({"row": name}, x, data, judge))
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    columns = [*HEAD, *names, "seq_per_s"]
    for row in ({name: name for name in columns}, *rows):
        print(line(row, columns), flush=True)
    shown = {name: model for name, model in models.items() if args.rows in ("all", name)}
    for row, name, steps, T, sampler in plan(shown, args.sweep, L, args.steps):
        model = models[name]
        if isinstance(sampler, float):
            model, sampler = model | {"penalty": sampler}, "ancestral"
        x, cost = common.write(model, args.samples, steps, sampler, T, args.seed, args.batch,
                               (args.guidance, args.candidates, args.switch), name=row)
        about = {"row": row, "steps": steps, "T": T, **cost}
        rows.append(measure(about, x, data, judge))
        print(line(rows[-1], columns), flush=True)
    return rows


def print_comparison(rows):
    """What 8 steps of the student are worth, and the teacher's 8 at equal entropy."""
    student, = [r for r in rows if (r["row"], r.get("steps"), r.get("T")) == ("student", 8, 1.0)]
    print("8 steps of the student; 8 of the teacher at the student's entropy (nan: outside the "
          "temperatures measured); for how many steps of the teacher the student's 8 stand:")
    for column in [column for column in GOALS if column in rows[0]]:
        teacher = at_entropy(rows, "teacher", 8, column, student["entropy"])
        print(f"{column:>10} {student[column]:8.3f} {teacher:8.3f} "
              f"{steps_to_match(rows, column):6.0f}")


def load(args, device, bf16):
    """The models to compare and judge by, {name: model}, and the Corpus. ValueError if unfit."""
    names = ["teacher", "student"] if args.rows == "all" else [args.rows]
    paths = {name: getattr(args, name) for name in names}
    if args.causal is None and args.judge is None and os.path.isfile(CAUSAL):
        args.causal = CAUSAL
    if args.causal is not None:
        paths["autoregressive"] = args.causal
    models = common.load_models(paths, device, bf16)
    model = models[names[0]]
    folder = model["flags"]["data"] if args.data is None else args.data
    data = corpus.load(folder)
    data.check_fits(paths[names[0]], model["tokenizer"], model["config"])
    return models, data


def main(argv=None):
    args = parse_flags(argv)
    if args.json:
        common.add_run(args.json, "sweep")  # unwritable: must not show after minutes of work
    device, bf16 = setup(args)
    models, data = load(args, device, bf16)
    config = next(iter(models.values()))["config"]
    memory.check(config, device, 0, args.samples, 16, "--samples")
    judge = make_judge(args, models, data, device)
    if judge is None:
        print("no judge: make one with `python train_teacher.py --causal`")
    rows = measure_all(args, models, data, judge)
    if args.rows == "all" and 8 in (args.steps or (8,)):
        print_comparison(rows)
    if args.json:
        flags = {name: model["flags"] for name, model in models.items()}
        trained = flags["teacher" if args.rows == "teacher" else "student"]
        run = {"rows": rows, "training": flags, "hardware": common.hardware(device, bf16),
               "flags": vars(args)}
        common.add_run(args.json, "sweep", args.label, trained["seed"], run)


if __name__ == "__main__":
    run_script(main)

"""sample.py - write text with the student or the teacher, fill gaps, watch it happen; measure quality against speed.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --prompt "def load(" --watch            # go on from a beginning; the text unmasks live
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character
    python sample.py --num 100 --length 90 --out p.fasta     # of a protein model: 100 sequences of 90 amino acids
    python sample.py --eval --json out/eval.json             # the table: held-out data, teacher, student, autoregressive model
    python sample.py --eval --sweep --json out/eval.json     # every step count at six temperatures: quality against entropy
    python sample.py --table assets/nano.json                # mean and spread over the seeds in such a file, and at equal entropy
    python sample.py --bench                                 # tokens/s, latency, network calls, peak memory

A masked-diffusion model is conditioned by not masking what is given, wherever it stands: didi.sample never changes a visible
token. Left out on purpose: top-k and top-p (they too lower the entropy; one such knob, --temperature, is enough to compare at).
"""
import argparse
import itertools
import math
import os
import platform
import re
import shutil
import string
import sys
import time

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import didi
from model import (add_machine_flags, build_denoiser, build_discriminator, load_checkpoint, memory_meter, pick_device, read_results,
                   run_script, spread, write_json)
from train_teacher import (AMINO_ACIDS, autoregress, causal_nll, decode, end_token, held_out, load_data, make_tokenizer, quality,
                           until_end)

RANGES = {"steps": (1, 10_000), "num": (1, 1_000_000), "temperature": (0.01, 100), "guidance": (0, 100), "candidates": (1, 256),
          "switch": (0, 1), "batch": (1, 1_000_000), "delay": (0, 60), "eval_samples": (1, 1_000_000), "seed": (0, 2**63 - 1)}
SWEEP = {"teacher": (4, 8, 16, 32, 64, 256, 1024), "student": (4, 8, 16, 32), "autoregressive": (None,)}  # steps, each at these ..
TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7)


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Sample from the student or the teacher, or measure both (--eval).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", choices=("student", "teacher"), default="student", help="who writes")
    g.add_argument("--student", default="out/student.pt", help="checkpoint of distill.py")
    g.add_argument("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add_machine_flags(g)
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=int, default=8, help="N, the most denoiser calls that a sequence takes")
    g.add_argument("--num", type=int, default=16, help="samples to print, one a line")
    g.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 1 = the model's own distribution")
    g.add_argument("--batch", type=int, default=256, help="B, sequences per forward: as memory allows")
    g.add_argument("--out", metavar="FILE", help="write the samples there, too; as FASTA if it ends in .fasta or .fa")
    g = p.add_argument_group("reward-guided ancestral sampler (RGAS), for the student")
    g.add_argument("--sampler", choices=("ancestral", "rgas"), default="ancestral", help="rgas asks the discriminator too")
    g.add_argument("--guidance", type=float, default=1.0, help="h, weight of the reward's gradient; 1 = first-order p * exp(r)")
    g.add_argument("--candidates", type=int, default=4, help="M, next states to choose from in a re-ranking step")
    g.add_argument("--switch", type=float, default=0.5, help="share of the guided steps that follow the gradient; the others re-rank")
    g = p.add_argument_group("given text, and watching")
    g.add_argument("--prompt", help="a fixed beginning; the rest is written")
    g.add_argument("--infill", help="fixed text with gaps: each gap character is one unknown character; what follows is free")
    g.add_argument("--gap", choices=tuple("?#@~^_*"), default="?", help="the gap character; ? is rare in Python, unlike _ and *")
    g.add_argument("--exact", action="store_true", help="nothing follows the --infill text")
    g.add_argument("--length", type=int, metavar="N", help="texts of exactly N characters")
    g.add_argument("--watch", action="store_true", help="show every step; best with --num 1 to 10. Without a terminal: a line a step")
    g.add_argument("--delay", type=float, default=0.3, help="seconds between two steps on the terminal")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval", action="store_true", help="one table with steps, samplers and temperatures of its own")
    g.add_argument("--sweep", action="store_true", help="with --eval: every number of steps at every temperature, 0.7 to 1.2")
    g.add_argument("--eval_samples", type=int, default=1000, help="samples per row; differences between fewer are mostly noise")
    g.add_argument("--rows", choices=("all", "teacher", "student"), default="all", help="with --eval: whose rows")
    g.add_argument("--causal", default="out/causal.pt", help="checkpoint of train_teacher.py --causal: baseline and judge, if it is there")
    g.add_argument("--judge", help="perplexity under a GPT-2 of the package transformers instead: its name or folder")
    g.add_argument("--json", help="with --eval, --bench: add rows, hardware, flags to this file, under --label and the training seed")
    g.add_argument("--label", default="default", help="with --json: what to call this run")
    g.add_argument("--bench", action="store_true", help="speed and memory of each model, one sequence at a time and --batch at a time")
    g.add_argument("--table", metavar="FILE", help="print mean +- standard deviation over the seeds in FILE, as Markdown, and stop")
    g.add_argument("--plot", metavar="PNG", help="with --table: draw quality against entropy, of the labels default and sdtt (needs matplotlib)")
    g.add_argument("--animate", metavar="GIF", help="three models writing side by side, in their real times (needs matplotlib)")
    args = p.parse_args(argv)
    check_flags(args, {name for name, value in vars(args).items() if value != p.get_default(name)})
    return args, pick_device(args)


def check_flags(args, given):
    """ValueError with one line for what argparse can't see; `given` names the flags that differ from their defaults."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) <= high:  # NaN is in no range
            raise ValueError(f"--{name} is {getattr(args, name)}: choose from {low} to {high}")
    rgas, whole_table = args.sampler == "rgas", {"steps", "num", "temperature", "sampler", "prompt", "infill", "watch", "length",
                                                 "out"}
    measure = args.eval or args.bench
    for names, wrong, advice in [
            (whole_table, measure or args.animate, "--eval, --bench and --animate choose this themselves: leave it out"),
            ({"eval_samples", "rows", "sweep", "judge"}, not args.eval, "only --eval measures quality: add --eval"),
            ({"json"}, not measure, "only --eval and --bench measure: add one of them"), ({"plot"}, not args.table, "add --table FILE"),
            ({"model"}, args.eval, "--eval has --rows for that"), ({"label"}, args.json is None, "belongs to --json FILE: add that"),
            ({"guidance", "candidates", "switch"}, not (rgas or measure), "only the guided sampler uses it: add --sampler rgas"),
            ({"gap", "exact"}, args.infill is None, "belongs to --infill TEXT: add that"),
            ({"length"}, args.exact, "--exact ends the text already: leave one of them out"),
            ({"prompt"}, args.infill is not None, "--infill is given too: put the beginning into its text"),
            ({"watch"}, rgas, "shows the ancestral sampler alone: leave out --sampler rgas"),
            ({"sampler"}, rgas and args.model == "teacher", "rgas needs the student's discriminator: use --model student")]:
        if wrong and names & given:
            raise ValueError(f"--{min(names & given)}: {advice}")
    if args.json is not None:  # an unwritable path must not show after minutes of work
        write_json(args.json, read_results(args.json, "rows") if os.path.exists(args.json) else {})
    if args.out is not None and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        raise ValueError(f"--out {args.out!r}: there is no such folder")


def load_net(kind, args, device):
    """{"device", "config", "flags", "data", "tokenizer", "eos", "denoiser"} of a checkpoint, of a DiDi student "discriminator" too.

    ValueError if it is odd.
    """
    ckpt, config = load_checkpoint(getattr(args, kind), kind, device)
    tokenizer = make_tokenizer(ckpt["tokenizer"])
    net = {"device": device, "config": config, "flags": ckpt["flags"], "data": ckpt["data"], "tokenizer": tokenizer,
           "eos": end_token(tokenizer), "denoiser": build_denoiser(config, ckpt["ema"], device, args.bf16).requires_grad_(False)}
    if kind == "student" and ckpt["flags"].get("objective") != "sdtt":
        net["discriminator"] = build_discriminator(net["denoiser"], ckpt)
    return net


# ---------------------------------------------------------------------------------------------------------------- sampling
def given_tokens(args, config, tokenizer):
    """What is fixed before sampling: z (L,), masks elsewhere, and inside (L,), True where the text must not end."""
    name, text = ("prompt", args.prompt or "") if args.infill is None else ("infill", args.infill)
    text, gap = text.upper() if tokenizer.name == "protein" else text, args.gap if name == "infill" else None
    known = {"bytes": string.printable[:95], "protein": AMINO_ACIDS}.get(tokenizer.name)
    odd = next((c for c in text if c != gap and known and c not in known), None)
    if odd:
        raise ValueError(f"--{name} holds {odd!a}: the model knows {'amino acids' if known == AMINO_ACIDS else 'printable ASCII characters'} only")
    if known is None and (args.exact or args.length is not None):
        raise ValueError("--exact and --length are for models whose texts end: this one writes passages of a fixed number of tokens")
    ids = [i for part in (re.split(f"({re.escape(gap)})", text) if gap else [text])
           for i in ([config.mask_id] if part == gap else tokenizer.encode_ordinary(part))]
    end = config.length if args.length is None else args.length
    if not max(len(ids), 1) <= end <= config.length:
        raise ValueError(f"--{name} has {len(ids)} tokens, but the model writes texts of at most {config.length}"
                         f"{': shorten it' if args.length is None else f' and --length asks for {end}'}")
    free = 0 if args.exact else end - len(ids)
    z = torch.tensor(ids + [config.mask_id] * free + [tokenizer.eot_token] * (config.length - len(ids) - free))
    place = torch.arange(config.length)
    return z, place < end if args.length is not None else (z == config.mask_id) & (place < len(ids))


def never_end_at(inside, denoiser, eos):
    """The same denoiser, unable to end the text at inside (L,): given text behind a gap would be cut off, or --length missed."""
    def constrained(z, where):
        logits = denoiser(z, where)  # (n, V)
        logits[inside.to(z.device).expand_as(where)[where], eos] = -math.inf
        return logits
    return constrained


def write(net, z, args, on_step=None, name=None):
    """Fill the masks of z (N, L) as args say: x (N, L) on the CPU, and {"nfe", "disc_calls": means per sequence, "seq_per_s"}.

    args.sampler is ancestral, rgas, or autoregressive, which takes nothing from z but N.
    """
    mask_id, parts, T = net["config"].mask_id, [], args.temperature

    def run(z, steps):
        if args.sampler == "rgas":
            disc = net["discriminator"]
            return didi.guided_sample(net["denoiser"], disc, z, steps, mask_id, disc.positions, args.guidance, args.candidates,
                                      args.switch, T, disc.noise_max)
        x, nfe = (autoregress(net["denoiser"], len(z), net["eos"], T, on_step) if args.sampler == "autoregressive" else
                  didi.sample(net["denoiser"], z, steps, mask_id, T, on_step))
        return x, nfe, torch.zeros_like(nfe)
    if not on_step:  # warm-up, not timed: the first calls set up threads, kernels and memory
        run(z[:args.batch].to(net["device"]), 2)
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    for part in tqdm(z.split(args.batch), desc=name, unit="batch", leave=False, delay=1, disable=bool(on_step)):
        parts.append([out.cpu() for out in run(part.to(net["device"]), args.steps)])
    x, nfe, calls = map(torch.cat, zip(*parts))
    return x, {"nfe": nfe.double().mean().item(), "disc_calls": calls.double().mean().item(),
               "seq_per_s": len(z) / (time.perf_counter() - begin)}


def printable(text):
    """A young model writes any byte; none may break the line or steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_text(ids, mask_id, tokenizer, block):
    """The tokens of one sequence up to its end as text, each mask a block."""
    ids = itertools.takewhile(lambda i: i != end_token(tokenizer), ids)
    return "".join(block if i == mask_id else printable(tokenizer.decode([i])) for i in ids)


def watcher(args, mask_id, tokenizer):
    """on_step(z) that redraws the sequences in place on a terminal, or else prints the first one, a line per step."""
    live, frames, (columns, rows) = sys.stdout.isatty(), itertools.count(), shutil.get_terminal_size()
    block, room = ("\x1b[2m█\x1b[0m", columns - 1) if live else ("░", None)  # a wrapped line would spoil the redrawing

    def on_step(z):
        lines = [f"step {next(frames) % args.steps + 1}/{args.steps}",
                 *(as_text(ids[:room], mask_id, tokenizer, block) for ids in z[:max(rows - 2, 1) if live else 1].tolist())]
        if live:
            print("\x1b[J" + "\n".join(lines) + f"\n\x1b[{len(lines)}A", end="", flush=True)  # back up: the next frame overwrites
            time.sleep(args.delay)
        else:
            print(": ".join(lines), flush=True)
    return on_step


def print_samples(args, device):
    """Load one model, write --num texts and print them below a line that says how."""
    net = load_net(args.model, args, device)
    tokenizer = net["tokenizer"]
    if args.sampler == "rgas" and "discriminator" not in net:
        raise ValueError(f"{args.student} was made by --objective sdtt and has no discriminator: use --sampler ancestral")
    z, inside = given_tokens(args, net["config"], tokenizer)
    if net["eos"] >= 0:
        net["denoiser"] = never_end_at(inside, net["denoiser"], net["eos"])
    x, cost = write(net, z.repeat(args.num, 1), args, watcher(args, net["config"].mask_id, tokenizer) if args.watch else None)
    how = f"rgas (h {args.guidance:g}, M {args.candidates}, switch {args.switch:g})" if args.sampler == "rgas" else args.sampler
    clear = "\x1b[J" if args.watch and sys.stdout.isatty() else ""
    print(f"{clear}{args.model}, {args.steps} steps, {how}, temperature {args.temperature:g}, seed {args.seed}: per sequence "
          f"{cost['nfe']:.2f} denoiser and {cost['disc_calls']:.2f} discriminator calls; {cost['seq_per_s']:.1f} sequences/s"
          f"{', slowed down to be watched' if args.watch else ''}")
    texts = decode(x, tokenizer)
    if tokenizer.name == "gpt2":  # passages have lines of their own
        texts = [f"--- {i + 1} ---\n" + "\n".join(map(printable, text.split("\n"))) for i, text in enumerate(texts)]
    else:
        texts = list(map(printable, texts))
    print("\n".join(texts))
    if args.out is not None:
        head = f"model={args.model} steps={args.steps} sampler={args.sampler} temperature={args.temperature:g} seed={args.seed}"
        fasta = args.out.endswith((".fasta", ".fa"))
        with open(f"{args.out}.partial", "w") as f:
            f.writelines(f">didi_{i + 1} {head}\n{text}\n" if fasta else f"{text}\n" for i, text in enumerate(texts))
        os.replace(f"{args.out}.partial", args.out)


# -------------------------------------------------------------------------------------------------------------- evaluation
def make_judge(args, nets, tokenizer, device):
    """Generative perplexity as a function of texts x (B, L), per token up to and including the first end-of-sequence; or None.

    The judge is the causal model or, with --judge, a GPT-2 of the package transformers, which reads the decoded texts.
    """
    if args.judge is None:
        if "autoregressive" not in nets:
            return None
        net = nets["autoregressive"]
        model, first, eos, vocabulary = net["denoiser"], net["config"].mask_id, net["eos"], tokenizer.n_vocab
    else:
        try:
            from transformers import GPT2LMHeadModel
            gpt2, lm = tiktoken.get_encoding("gpt2"), GPT2LMHeadModel.from_pretrained(args.judge).to(device)
        except ImportError:
            raise ValueError("--judge needs the package transformers, which is optional: pip install transformers") from None
        except Exception as e:  # no such folder, no network, a damaged file: each library raises its own
            raise ValueError(f"--judge {args.judge!r} cannot be loaded ({type(e).__name__}): name a folder with a GPT-2 in it") from None
        first, vocabulary = gpt2.eot_token, 50257
        model, eos = lambda z: lm(z).logits, -1 if tokenizer.name == "gpt2" else first

    @torch.no_grad()
    def perplexity(x):
        total, count = 0.0, 0
        for part in x.split(max(1, min(args.batch, 2 ** 28 // (x.shape[1] * vocabulary)))):  # at most 1 GB of logits
            if args.judge and tokenizer.name != "gpt2":
                texts = [torch.tensor([*gpt2.encode_ordinary(text), first]) for text in decode(part, tokenizer)]
                part = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=first)
            part = part.to(device)
            counts = until_end(part, eos)
            total, count = total + (causal_nll(model, part, first) * counts).sum().item(), count + counts.sum().item()
        return math.exp(total / count)
    return perplexity


def table_line(row, columns):
    """One row of the table as aligned text, "-" where row has no such column."""
    cells = {k: v if isinstance(v, str) else f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items() if v is not None}
    return f"{cells['row']:<16}" + "".join(f" {cells.get(k, '-'):>{max(len(k), 6)}}" for k in columns[1:])


def at_entropy(rows, name, steps, entropy, column="valid"):
    """`column` of model `name` at the temperature that gives this unigram entropy: linear between temperatures, NaN outside them.

    At unequal entropy the lower one looks too good: a model need only become less diverse.
    """
    points = sorted((r["entropy"], r[column]) for r in rows if (r["row"], r.get("steps")) == (name, steps) and column in r)
    return float(np.interp(entropy, *zip(*points), left=math.nan, right=math.nan)) if points else math.nan


def steps_to_match(rows, entropy, column="valid"):
    """Steps that the teacher needs for the student's quality in 8, both at this entropy, linear in log steps.

    The fewest steps measured mean at most those, inf more than the most, NaN that the temperatures measured don't tell.
    """
    sign, goal = {"valid": 1, "judge_ppl": -1}[column], at_entropy(rows, "student", 8, entropy, column)
    measured = sorted({r["steps"] for r in rows if r["row"] == "teacher"})
    steps, values = [math.log2(n) for n in measured], [at_entropy(rows, "teacher", n, entropy, column) for n in measured]
    k = next((k for k, value in enumerate(values) if sign * value >= sign * goal), None)
    if k is None:
        return math.inf if values and not math.isnan(values[-1] + goal) else math.nan
    if k == 0:
        return 2 ** steps[0]
    return 2 ** (steps[k - 1] + (steps[k] - steps[k - 1]) * (goal - values[k - 1]) / (values[k] - values[k - 1]))


def table_plan(args, nets, length):
    """(model, steps, T, sampler) of each row of the table, for the models there are; steps as many as make a difference at L."""
    many = [n for n in SWEEP["teacher"] if n <= max(256, 4 * length)]
    plan = [(name, n, T, "autoregressive" if n is None else "ancestral") for name, steps in (SWEEP | {"teacher": many}).items()
            for n in steps for T in TEMPERATURES if args.sweep or T == 1 or (name, n) == ("teacher", 8)]
    if "discriminator" in nets.get("student", ()):
        plan += [("student, guided", n, 1.0, "rgas") for n in ((4, 8, 16, 32) if args.sweep else (8,))]
    return [row for row in plan if row[0].split(",")[0] in nets]


def load_all(args, device, kinds):
    """{kind: net} for a comparison; "autoregressive" among them if its checkpoint exists. ValueError if they don't fit together."""
    nets = {kind: load_net(kind, args, device) for kind in kinds}
    if os.path.isfile(args.causal):
        nets["autoregressive"] = load_net("causal", args, device)
    if len({(net["tokenizer"].name, net["config"].length) for net in nets.values()}) > 1:
        raise ValueError("the checkpoints differ in tokens or length: make them all from the same data and flags, or give another --causal")
    return nets


def evaluate(args, device):
    """Measure and print the table row by row, then the comparison at equal entropy; with --json write it all to a file."""
    nets, rows = load_all(args, device, ("teacher", "student") if args.rows == "all" else (args.rows,)), []
    config = nets[next(iter(nets))]["config"]
    data = load_data(nets[next(iter(nets))]["data"], config.length)
    judge = make_judge(args, nets, data["tokenizer"], device)
    if args.rows != "all":
        nets.pop("autoregressive", None)
    columns = ["row", "steps", "T", "nfe", "disc_calls"]

    def add(x, **row):
        row |= quality(x, data) | {"samples": len(x)} | ({"judge_ppl": judge(x)} if judge else {})
        row |= {"examples": decode(x[:4], data["tokenizer"])} if row.get("T", 1) == 1 else {}
        rows.append(row | ({"valid_se": math.sqrt(row["valid"] * (1 - row["valid"]) / len(x))} if "valid" in row else {}))
        if len(rows) == 1:  # held-out data has every measure of quality there is
            columns.extend([k for k, v in rows[0].items() if isinstance(v, float)] + ["seq_per_s"])
            print(table_line({k: k for k in columns}, columns))
        print(table_line(rows[-1], columns), flush=True)
    print("nfe, disc_calls: network calls per sequence; judge_ppl: perplexity under "
          f"{args.judge or 'the causal model'}{'' if judge else ' (there is none: python train_teacher.py --causal)'}; valid_se: standard "
          "error; entropy in nats; ks, js1, js2, low: see train_teacher.protein_quality")
    torch.manual_seed(args.seed)
    add(held_out(data["val"], args.eval_samples, config.length), row="held-out data")
    z, plan = torch.full((args.eval_samples, config.length), config.mask_id), table_plan(args, nets, config.length)
    for k, (name, steps, T, sampler) in enumerate(plan):
        how = {"steps": steps, "temperature": T, "sampler": sampler}
        net = nets[name.split(",")[0]]
        x, cost = write(net, z, argparse.Namespace(**vars(args) | how), name=f"row {k + 1} of {len(plan)}: {name}")
        add(x, row=name, T=T, **how, **cost)
    if args.rows == "all":
        print_comparison(rows)
    save_run(args, {"rows": rows, "training": {kind: net["flags"] for kind, net in nets.items()}}, device,
             nets.get("student", nets.get("teacher"))["flags"]["seed"])


def print_comparison(rows):
    """Student and teacher at equal entropy, in the first measure of quality there is."""
    column = next((c for c in ("valid", "judge_ppl") if c in rows[0]), None)
    if column:
        student, held = next(r for r in rows if (r["row"], r.get("steps"), r.get("T")) == ("student", 8, 1.0)), rows[0]["entropy"]
        print(f"8 steps: student {column} {student[column]:.3f}, entropy {student['entropy']:.3f}; teacher at that entropy: {column} "
              f"{at_entropy(rows, 'teacher', 8, student['entropy'], column):.3f} (nan: outside the temperatures measured)")
        if any((r["row"], r.get("T")) == ("student", 0.7) for r in rows):
            print(f"at held-out entropy {held:.3f} the teacher needs {steps_to_match(rows, held, column):.0f} steps for the student's "
                  f"{column} in 8")


def save_run(args, run, device, seed):
    """With --json: add a run to the file, under --label and seed, with the hardware and flags it came from."""
    if args.json is not None:
        hardware = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "cpu": platform.machine(),
                    "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "bf16": args.bf16, "torch": torch.__version__}
        results = read_results(args.json, "rows")
        results.setdefault(args.label, {})[str(seed)] = run | {"hardware": hardware, "flags": vars(args)}
        write_json(args.json, results)


def print_table(path):
    """Mean +- standard deviation over seeds of the rows of a results file; then, where a sweep was made, at held-out entropy."""
    results = read_results(path, "rows")
    shown = {"nfe": 1, "disc_calls": 1, "valid": 3, "judge_ppl": 2, "distinct": 3, "novel": 3, "length": 1, "entropy": 3,
             "ks": 3, "js1": 4, "js2": 4, "low": 3}
    shown = {k: digits for k, digits in shown.items()
             if any(k in row for seeds in results.values() for run in seeds.values() for row in run["rows"])}
    print("| run | row | steps | T | " + " | ".join(shown) + " |\n|" + "---|" * (len(shown) + 4))
    for label, seeds in results.items():
        sweep = any(run["flags"].get("sweep") for run in seeds.values())
        for rows in zip(*(run["rows"] for run in seeds.values())):
            first = rows[0]
            if not sweep or first.get("T", 1) == 1 or (first["row"], first["steps"]) == ("teacher", 8):
                cells = [first["row"], str(first.get("steps") or ""), str(first.get("T", ""))]
                cells += [spread([row.get(name) for row in rows], digits) for name, digits in shown.items()]
                print(f"| {label} ({len(seeds)} seeds) | {' | '.join(cells)} |")
    swept = {label: [run["rows"] for run in seeds.values()] for label, seeds in results.items()
             if all(run["flags"].get("sweep") for run in seeds.values())}
    if swept:
        best = [c for c in ("valid", "judge_ppl", "length", "ks", "js2") if c in shown]
        print("\nAt the entropy of held-out data:\n\n| run | model | steps | " + " | ".join(best) + " |\n|" + "---|" * (len(best) + 3))
    for label, seeds in swept.items():
        for name, n in dict.fromkeys((r["row"], r["steps"]) for r in seeds[0][1:] if "guided" not in r["row"]):
            values = [[at_entropy(rows, name, n, rows[0]["entropy"], c) for rows in seeds] for c in best]
            inside = sum(v == v for v in values[0])  # seeds whose temperatures reach that entropy
            print(f"| {label} | {name}{'' if inside == len(seeds) else f' ({inside} of {len(seeds)} seeds reach it)'} | {n or ''} | "
                  f"{' | '.join(spread(v, shown[c]) for c, v in zip(best, values))} |")
        for column in [c for c in ("valid", "judge_ppl") if c in shown]:
            need = [steps_to_match(rows, rows[0]["entropy"], column) for rows in seeds]
            if any(n == n for n in need):
                print(f"\n{label}: for the student's {column} in 8 steps the teacher needs, by seed, "
                      f"{', '.join(f'{n:.0f}' for n in need)} steps (inf: more than were measured)")
    return swept


def bench(args, device):
    """Time each model writing one sequence at a time and --batch at a time; tokens count up to and including end-of-sequence."""
    nets, rows = load_all(args, device, ("teacher", "student")), []
    plan = [("teacher", 256), ("teacher", 1024), ("student", 8), ("student", 16), ("student, guided", 8), ("autoregressive", None)]
    print("latency: seconds until a batch is written; peak_mib: memory on top of what was in use before, MiB (nan: cannot be told here)")
    print("".join(f"{name:>16}" for name in ("row", "steps", "batch", "nfe", "disc_calls", "tokens_per_s", "latency", "peak_mib")))
    for (name, steps), batch in itertools.product(plan, (1, args.batch)):
        net = nets.get(name.split(",")[0])
        if not net or ("guided" in name and "discriminator" not in net):
            continue
        sampler = "autoregressive" if steps is None else "rgas" if "guided" in name else "ancestral"
        how = argparse.Namespace(**vars(args) | {"steps": steps, "sampler": sampler, "batch": batch, "temperature": 1.0})
        z = torch.full((max(batch, 20), net["config"].length), net["config"].mask_id)
        peak_memory = memory_meter(device)
        x, cost = write(net, z, how, name=name)
        rows.append({"row": name, "steps": steps, "batch": batch, "nfe": cost["nfe"], "disc_calls": cost["disc_calls"],
                     "tokens_per_s": cost["seq_per_s"] * until_end(x, net["eos"]).float().sum(1).mean().item(),
                     "latency": batch / cost["seq_per_s"], "peak_mib": peak_memory()})
        print("".join(f"{v if isinstance(v, str) else '-' if v is None else format(v, '.4g'):>16}" for v in rows[-1].values()), flush=True)
    save_run(args, {"rows": rows}, device, nets["student"]["flags"]["seed"])


# ---------------------------------------------------------------------------------------------------------------- pictures
def pyplot():
    """matplotlib without a screen. ValueError if it isn't installed: nothing else needs it."""
    try:
        import matplotlib.animation
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return matplotlib, plt
    except ImportError:
        raise ValueError("pictures need the package matplotlib, which is optional: pip install matplotlib") from None


def plot(swept, path):
    """Validity and judge perplexity against entropy, each line one model and number of steps at several temperatures; mean of seeds."""
    _, plt = pyplot()
    if not swept:
        raise ValueError("--plot: no run in that file was made with --sweep")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lines = [("default", "teacher", n, "C0", style) for n, style in ((8, ":"), (32, "--"), (256, "-"))]
    lines += [("default", "student", 4, "C3", ":"), ("default", "student", 8, "C3", "-"), ("sdtt", "student", 8, "C1", "-"),
              ("default", "autoregressive", None, "k", "-")]
    shown = {"valid": "valid, share of samples", "judge_ppl": "perplexity under the causal model, per token", "ks": "KS statistic of the lengths"}
    first = next(iter(swept.values()))[0][0]
    for ax, (column, label) in zip(axes, [(c, text) for c, text in shown.items() if c in first]):
        for run, name, steps, color, style in lines:
            rows = [[r for r in rows if (r["row"], r.get("steps")) == (name, steps) and column in r] for rows in swept.get(run, [])]
            if rows and rows[0]:
                points = np.mean([[(r["entropy"], r[column]) for r in seed] for seed in rows], 0)  # (temperatures, 2)
                text = f"{'SDTT student' if run == 'sdtt' else name}{f', {steps} steps' if steps else ''}"
                ax.plot(*points.T, style, color=color, marker=".", label=text)
        held = [rows[0] for rows in swept.get("default", []) if column in rows[0]]
        if held:
            ax.plot(np.mean([r["entropy"] for r in held]), np.mean([r[column] for r in held]), "g*", markersize=12, label="held-out data")
        ax.set(xlabel="unigram entropy within a sample, nats", ylabel=label, yscale="log" if column == "judge_ppl" else "linear")
        ax.grid(alpha=0.3)
    axes[-1].legend(fontsize=8, loc="center left")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def animate(args, device, lines=10, seconds=12, fps=10):
    """A GIF of three models writing the same number of lines, each batch in its real time, all slowed down by one factor."""
    matplotlib, plt = pyplot()
    nets, panels = load_all(args, device, ("teacher", "student")), []
    tokenizer, mask_id = nets["teacher"]["tokenizer"], nets["teacher"]["config"].mask_id
    for name, steps, sampler in (("autoregressive", None, "autoregressive"), ("teacher", 256, "ancestral"), ("student", 8, "ancestral")):
        if name not in nets:
            raise ValueError(f"no checkpoint at {args.causal}: make it with `python train_teacher.py --causal`")
        how = argparse.Namespace(**vars(args) | {"steps": steps, "sampler": sampler, "temperature": 1.0})
        z, frames = torch.full((lines, nets[name]["config"].length), nets[name]["config"].mask_id), []
        write(nets[name], z, how)  # warm-up
        begin = time.perf_counter()
        _, cost = write(nets[name], z, how, on_step=lambda z: frames.append((time.perf_counter() - begin, z.tolist())))
        panels.append((f"{name}{f', {steps} steps' if steps else ''}", cost["nfe"], frames))
    slow = seconds / max(frames[-1][0] for _, _, frames in panels)
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.6), layout="constrained")

    def draw(k):
        for ax, (title, nfe, frames) in zip(axes, panels):
            now = min(k / fps / slow, frames[-1][0])
            seen = [z for when, z in frames if when <= now]
            ax.clear()
            ax.set_axis_off()
            ax.set_title(f"{title}: {1e3 * now:.0f} ms" + (f", {nfe:.0f} network calls" if now == frames[-1][0] else ""), fontsize=9)
            for i, ids in enumerate(seen[-1] if seen else ()):
                ax.text(0, 1 - (i + 1) / lines, as_text(ids, mask_id, tokenizer, "\u00b7"), family="monospace", fontsize=6, parse_math=False)
        figure.suptitle(f"{lines} lines at once, slowed down {slow:.0f} times", fontsize=9)
    matplotlib.animation.FuncAnimation(figure, draw, frames=(seconds + 2) * fps).save(args.animate, writer="pillow", fps=fps, dpi=80)
    print(f"wrote {args.animate}")


def main(argv=None):
    args, device = parse_flags(argv)
    if args.table:
        swept = print_table(args.table)
        if args.plot:
            plot(swept, args.plot)
    else:
        (evaluate if args.eval else bench if args.bench else animate if args.animate else print_samples)(args, device)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that isn't UTF-8 shows ? and goes on
    run_script(main)

"""sample.py - write text with the student or the teacher, fill gaps, watch it happen; measure quality against speed.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --prompt "def load(" --watch            # go on from a beginning; the text unmasks live
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character
    python sample.py --eval --json out/eval.json             # the table: held-out data, teacher, student
    python sample.py --table assets/nano.json                # mean and spread over the seeds in such a file

A masked-diffusion model is conditioned by not masking what is given, wherever it stands: didi.sample never changes a visible
token. Left out on purpose: top-k and top-p (they too lower the entropy; one such knob, --temperature, is enough to compare at).
"""
import argparse
import itertools
import json
import math
import os
import platform
import shutil
import sys
import time

import torch
from tqdm import tqdm

import didi
from model import Discriminator, build_denoiser, load_checkpoint, pick_device, run_script
from train_teacher import decode, encode, load_data, make_tokenizer, quality

RANGES = {"steps": (1, 10_000), "num": (1, 1_000_000), "temperature": (0.01, 100), "guidance": (0, 100), "candidates": (1, 256),
          "switch": (0, 1), "batch": (1, 1_000_000), "delay": (0, 60), "eval_samples": (1, 1_000_000), "seed": (0, 2**63 - 1)}
COLUMNS = ("row", "steps", "nfe", "disc_calls", "valid", "valid_se", "distinct", "novel", "length", "entropy", "seq_per_s")


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Sample from the student or the teacher, or measure both (--eval).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", choices=("student", "teacher"), default="student", help="who writes")
    g.add_argument("--student", default="out/student.pt", help="checkpoint of distill.py")
    g.add_argument("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=int, default=8, help="N, the most denoiser calls that a sequence takes")
    g.add_argument("--num", type=int, default=16, help="samples to print, one a line")
    g.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 1 = the model's own distribution")
    g.add_argument("--seed", type=int, default=0, help="equal flags and equal seed give equal samples")
    g.add_argument("--batch", type=int, default=256, help="B, sequences per forward: as memory allows")
    g = p.add_argument_group("reward-guided ancestral sampler (RGAS), for the student")
    g.add_argument("--sampler", choices=("ancestral", "rgas"), default="ancestral", help="rgas asks the discriminator too")
    g.add_argument("--guidance", type=float, default=1.0, help="h, weight of the reward's gradient; 1 = first-order p * exp(r)")
    g.add_argument("--candidates", type=int, default=4, help="M, next states to choose from in a re-ranking step")
    g.add_argument("--switch", type=float, default=0.5, help="share of the steps that follow the gradient; the others re-rank")
    g = p.add_argument_group("given text, and watching")
    g.add_argument("--prompt", help="a fixed beginning; the rest is written")
    g.add_argument("--infill", help="fixed text with gaps: each gap character is one unknown character; what follows is free")
    g.add_argument("--gap", choices=tuple("?#@~^_*"), default="?", help="the gap character; ? is rare in Python, unlike _ and *")
    g.add_argument("--exact", action="store_true", help="nothing follows the --infill text")
    g.add_argument("--watch", action="store_true", help="show every step; best with --num 1 to 10. Without a terminal: a line a step")
    g.add_argument("--delay", type=float, default=0.3, help="seconds between two steps on the terminal")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval", action="store_true", help="one table with steps, samplers and temperatures of its own")
    g.add_argument("--eval_samples", type=int, default=1000, help="samples per row; differences between fewer are mostly noise")
    g.add_argument("--rows", choices=("all", "teacher", "student"), default="all", help="with --eval: whose rows")
    g.add_argument("--json", help="with --eval: add the rows, hardware and flags to this file, under --label and the checkpoint's seed")
    g.add_argument("--label", default="default", help="with --json: what to call this run")
    g.add_argument("--table", metavar="FILE", help="print mean +- standard deviation over the seeds in FILE, as Markdown, and stop")
    args = p.parse_args(argv)
    check_flags(args, {name for name, value in vars(args).items() if value != p.get_default(name)})
    return args, pick_device(args.device)


def check_flags(args, given):
    """ValueError with one line for what argparse can't see; `given` names the flags that differ from their defaults."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) <= high:  # NaN is in no range
            raise ValueError(f"--{name} is {getattr(args, name)}: choose from {low} to {high}")
    rgas, whole_table = args.sampler == "rgas", {"steps", "num", "temperature", "sampler", "prompt", "infill", "watch"}
    for names, wrong, advice in [
            (whole_table, args.eval, "--eval chooses this itself: leave it out"),
            ({"json", "eval_samples", "rows"}, not args.eval, "only --eval measures: add --eval"),
            ({"model"}, args.eval, "--eval has --rows for that"), ({"label"}, args.json is None, "belongs to --json FILE: add that"),
            ({"guidance", "candidates", "switch"}, not (rgas or args.eval), "only the guided sampler uses it: add --sampler rgas"),
            ({"gap", "exact"}, args.infill is None, "belongs to --infill TEXT: add that"),
            ({"prompt"}, args.infill is not None, "--infill is given too: put the beginning into its text"),
            ({"watch"}, rgas, "shows the ancestral sampler alone: leave out --sampler rgas"),
            ({"sampler"}, rgas and args.model == "teacher", "rgas needs the student's discriminator: use --model student")]:
        if wrong and names & given:
            raise ValueError(f"--{min(names & given)}: {advice}")
    if args.json is not None:  # an unwritable path must not show after minutes of work
        write_json(args.json, read_json(args.json) if os.path.exists(args.json) else {})


def read_json(path):
    """A results file: {label: {seed: run}}. ValueError if it is none."""
    try:
        with open(path) as f:
            content = json.load(f)
        assert all("rows" in run for seeds in content.values() for run in seeds.values())
        return content
    except (OSError, ValueError, AttributeError, TypeError, AssertionError):
        raise ValueError(f"{path!r} is no results file of --eval --json: name another") from None


def write_json(path, content):
    """Write a JSON file by way of a temporary one. ValueError if that cannot be done."""
    try:
        with open(f"{path}.partial", "w") as f:
            json.dump(content, f, indent=1)
        os.replace(f"{path}.partial", path)
    except OSError as e:
        raise ValueError(f"--json {path!r} cannot be written ({e.strerror}): name a file in an existing folder") from None


def load_net(kind, args, tokenizer, device):
    """{"device", "config", "denoiser"} of a checkpoint; a student has "discriminator" and "positions" too. ValueError if odd."""
    path = getattr(args, kind)
    ckpt, config = load_checkpoint(path, kind, device)
    missing = {"ema", *(("disc", "disc_blocks", "positions") if kind == "student" else ())} - ckpt.keys() - ckpt.get("flags", {}).keys()
    if missing or config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing)) or 'the byte tokenizer'}: another version wrote it, make it again")
    net = {"device": device, "config": config, "flags": ckpt["flags"],
           "denoiser": build_denoiser(config, ckpt["ema"], device).requires_grad_(False)}
    if kind == "student":
        disc = Discriminator(net["denoiser"], ckpt["flags"]["disc_blocks"]).to(device)
        try:
            disc.load_state_dict(ckpt["disc"])
        except RuntimeError:
            raise ValueError(f"{path} holds a discriminator that does not fit its denoiser: run distill.py again") from None
        net["discriminator"] = disc.eval().requires_grad_(False)  # eval: spectral norm must not go on iterating
        net["positions"] = ckpt["flags"]["positions"]
    return net


# ---------------------------------------------------------------------------------------------------------------- sampling
def given_tokens(args, config, tokenizer):
    """What is fixed before sampling: z (L,), masks elsewhere, and gap (L,), True where the --infill text has a gap."""
    name, text = ("prompt", args.prompt or "") if args.infill is None else ("infill", args.infill)
    odd = next((c for c in text if not (c.isascii() and c.isprintable())), None)
    if odd:
        raise ValueError(f"--{name} holds {odd!a}: the model knows printable ASCII characters only")
    if len(text) > config.length:
        raise ValueError(f"--{name} has {len(text)} characters, but the model writes lines of at most {config.length}: shorten it")
    z, after = encode([text], tokenizer, config.length)[0], torch.arange(config.length) >= len(text)  # (L,)
    gap = (z == ord(args.gap)) & (name == "infill")
    return z.masked_fill(gap if args.exact else gap | after, config.mask_id), gap


def never_end_at(gap, denoiser, eos):
    """The same denoiser, unable to end the text at gap (L,): the given text behind a gap would be cut off."""
    def constrained(z, where):
        logits = denoiser(z, where)  # (n, V)
        logits[gap.to(z.device).expand_as(where)[where], eos] = -math.inf
        return logits
    return constrained


def write(net, z, args, on_step=None, name=None):
    """Fill the masks of z (N, L) as args say: x (N, L) on the CPU, and {"nfe", "disc_calls": means per sequence, "seq_per_s"}."""
    mask_id, parts = net["config"].mask_id, []

    def run(z, steps):
        if args.sampler == "rgas":
            return didi.guided_sample(net["denoiser"], net["discriminator"], z, steps, mask_id, net["positions"],
                                      args.guidance, args.candidates, args.switch, args.temperature)
        x, nfe = didi.sample(net["denoiser"], z, steps, mask_id, args.temperature, on_step)
        return x, nfe, torch.zeros_like(nfe)
    if not on_step:  # warm-up, not timed: the first calls set up threads and kernels
        run(z[:2].to(net["device"]), 4)
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


def watcher(args, mask_id, tokenizer):
    """on_step(z) that redraws the sequences in place on a terminal, or else prints the first one, a line per step."""
    live, frames, (columns, rows) = sys.stdout.isatty(), itertools.count(), shutil.get_terminal_size()
    block, room = ("\x1b[2m█\x1b[0m", columns - 1) if live else ("░", None)  # a wrapped line would spoil the redrawing

    def show(ids):
        ids = itertools.islice(itertools.takewhile(lambda i: i != tokenizer.eot_token, ids), room)
        return "".join(block if i == mask_id else printable(tokenizer.decode([i])) for i in ids)

    def on_step(z):
        lines = [f"step {next(frames) % args.steps + 1}/{args.steps}", *map(show, z[:max(rows - 2, 1) if live else 1].tolist())]
        if live:
            print("\x1b[J" + "\n".join(lines) + f"\n\x1b[{len(lines)}A", end="", flush=True)  # back up: the next frame overwrites
            time.sleep(args.delay)
        else:
            print(": ".join(lines), flush=True)
    return on_step


def print_samples(args, device, tokenizer):
    """Load one model, write --num texts and print them below a line that says how."""
    net = load_net(args.model, args, tokenizer, device)
    z, gap = given_tokens(args, net["config"], tokenizer)
    net["denoiser"] = never_end_at(gap, net["denoiser"], tokenizer.eot_token)
    x, cost = write(net, z.repeat(args.num, 1), args, watcher(args, net["config"].mask_id, tokenizer) if args.watch else None)
    how = f"rgas (h {args.guidance:g}, M {args.candidates}, switch {args.switch:g})" if args.sampler == "rgas" else args.sampler
    clear = "\x1b[J" if args.watch and sys.stdout.isatty() else ""
    print(f"{clear}{args.model}, {args.steps} steps, {how}, temperature {args.temperature:g}, seed {args.seed}: per sequence "
          f"{cost['nfe']:.2f} denoiser and {cost['disc_calls']:.2f} discriminator calls; {cost['seq_per_s']:.1f} sequences/s"
          f"{', slowed down to be watched' if args.watch else ''}")
    print("\n".join(map(printable, decode(x, tokenizer))))


# -------------------------------------------------------------------------------------------------------------- evaluation
def table_line(row):
    """One row of the table as aligned text, "-" where row has no such column."""
    cells = {k: v if isinstance(v, str) else f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()}
    return f"{cells['row']:<16}" + "".join(f" {cells.get(k, '-'):>{max(len(k), 6)}}" for k in COLUMNS[1:])


def equal_entropy(rows):
    """The teacher at the temperature that gives the student's entropy, both at 8 steps: (dict, a line that says it).

    Linear between neighbouring temperatures; outside the sweep, the nearest. At unequal entropy the lower one looks too good.
    """
    student = next(r for r in rows if r["row"] == "student" and r["steps"] == 8)
    sweep = [r for r in rows if r["row"].startswith("teacher") and r["steps"] == 8]  # T = 1, .9, .8, .7: falling entropy
    e = student["entropy"]
    pair = next((p for p in zip(sweep, sweep[1:]) if p[1]["entropy"] <= e <= p[0]["entropy"]), None)
    a, b = pair or [min(sweep, key=lambda r: abs(r["entropy"] - e))] * 2
    share = (a["entropy"] - e) / ((a["entropy"] - b["entropy"]) or 1)
    at = {k: a[k] + share * (b[k] - a[k]) for k in ("valid", "entropy", "temperature")}
    how = "at equal entropy, by linear interpolation" if pair else "student entropy outside the swept range: compared with the nearest"
    return at | {"interpolated": bool(pair)}, (
        f"8 steps: student valid {student['valid']:.3f} +- {student['valid_se']:.3f}, entropy {e:.3f}; teacher valid {at['valid']:.3f}, "
        f"entropy {at['entropy']:.3f} at T = {at['temperature']:.2f} ({how})")


def evaluate(args, device, tokenizer):
    """Measure and print the table row by row, then the comparison at equal entropy; with --json write it all to a file."""
    if args.rows != "teacher" and not os.path.isfile(args.student):
        raise ValueError(f"no student at {args.student}: make it with `python distill.py`, or add --rows teacher")
    kinds = ("teacher", "student") if args.rows == "all" else (args.rows,)
    nets, rows = {kind: load_net(kind, args, tokenizer, device) for kind in kinds}, []
    config = nets[kinds[0]]["config"]
    if config != nets[kinds[-1]]["config"]:
        raise ValueError(f"{args.student} and {args.teacher} differ in shape: distil the student from this teacher")
    data = load_data(config.length, tokenizer)

    def add(x, **row):
        row |= quality(x, tokenizer, data["known"]) | {"samples": len(x)}
        rows.append(row | {"valid_se": math.sqrt(row["valid"] * (1 - row["valid"]) / len(x))})
        print(table_line(rows[-1]), flush=True)
    print("nfe, disc_calls: denoiser and discriminator calls per sequence; valid_se: standard error of valid; entropy in nats")
    print(table_line({k: k for k in COLUMNS}))
    torch.manual_seed(args.seed)
    add(data["val"][torch.randperm(len(data["val"]))[:args.eval_samples]], row="held-out data")
    plan = [("teacher", n, 1.0, "ancestral") for n in (4, 8, 16, 64, 256)]
    plan += [(f"teacher, T = {T}", 8, T, "ancestral") for T in (0.9, 0.8, 0.7)]
    plan += [("student", n, 1.0, "ancestral") for n in (4, 8, 16)] + [("student, guided", 8, 1.0, "rgas")]
    plan = [row for row in plan if row[0][:7] in nets]
    z = torch.full((args.eval_samples, config.length), config.mask_id)
    for k, (name, steps, T, sampler) in enumerate(plan):
        how = {"steps": steps, "temperature": T, "sampler": sampler}
        x, cost = write(nets[name[:7]], z, argparse.Namespace(**vars(args) | how), name=f"row {k + 1} of {len(plan)}: {name}")
        add(x, row=name, **how, **cost)
    matched, line = equal_entropy(rows) if args.rows == "all" else (None, f"--rows {args.rows}: nothing to compare with.")
    print(line)
    if args.json is not None:
        hardware = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "cpu": platform.machine(),
                    "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        results = read_json(args.json)
        results.setdefault(args.label, {})[str(nets[kinds[-1]]["flags"]["seed"])] = {
            "rows": rows, "equal_entropy": matched, "hardware": hardware, "flags": vars(args),
            "training": {kind: net["flags"] for kind, net in nets.items()}}
        write_json(args.json, results)


def print_table(path):
    """Mean +- standard deviation over seeds of every row of a results file, as Markdown."""
    shown = ("nfe", "disc_calls", "valid", "distinct", "novel", "length", "entropy")
    print("| run | row | steps | " + " | ".join(shown) + " |\n|" + "---|" * (len(shown) + 3))
    for label, seeds in read_json(path).items():
        for rows in zip(*(run["rows"] for run in seeds.values())):
            cells = []
            for name in shown:
                values = torch.tensor([row[name] for row in rows if name in row], dtype=torch.double)
                digits = {"length": 1, "nfe": 1, "disc_calls": 1}.get(name, 3)
                spread = f" +- {values.std():.{digits}f}" if len(values) > 1 and name in ("valid", "length", "entropy") else ""
                cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "")
            print(f"| {label} ({len(seeds)} seeds) | {rows[0]['row']} | {rows[0].get('steps', '')} | " + " | ".join(cells) + " |")


def main(argv=None):
    args, device = parse_flags(argv)
    if args.table:
        return print_table(args.table)
    (evaluate if args.eval else print_samples)(args, device, make_tokenizer())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that isn't UTF-8 shows ? and goes on
    run_script(main)

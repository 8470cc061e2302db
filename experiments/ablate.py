"""ablate.py - what each component of the method does: `distill.py` with and without it, over seeds.

    python -m experiments.ablate experiments/results/ablation.json
    python -m experiments.ablate out/ablation.json --seeds 0 --flags="--minutes 2"

Runs go one after the other, each in its own process; rows that the file has are not made again, so
after Ctrl-C the same command continues. Each student writes texts in 4 and in 8 steps, for the
measures of its corpus and, if --causal exists, the perplexity under that judge.
"""
import itertools
import os
import subprocess
import sys

import distill
from data import corpus, quality
from experiments import common
from experiments.evaluate import DIGITS, causal_judge, nll_per_token
from model import COUNT, NATURAL, add_device_flags, make_parser, run, setup

# flags of distill.py; adjacent rows that differ only in how the student writes share a run
ROWS = {
    # as in the paper's table and setting: each row adds one component to the row before
    "none": "--paper --K 1 --no-coupled --no-w --kl 0 --entropy 0 --no-group_norm",
    "+ intermediate-state matching":
        "--paper --no-coupled --no-w --kl 0 --entropy 0 --no-group_norm",
    "+ coupled time": "--paper --no-w --kl 0 --entropy 0 --no-group_norm",
    "+ weight w(t)": "--paper --kl 0 --entropy 0 --no-group_norm",
    "+ KL and entropy": "--paper --no-group_norm",
    "+ grouped normalisation": "--paper",
    "+ guided sampler": "--paper",
    "+ interlaced order": "--paper --order interlaced",
    # one change of the default
    "default": "",
    "default at temperature .95": "",
    "random order": "--order random",
    "even time grid": "--exponent 1",
    "no intermediate-state matching": "--K 1",
    "rollouts of two steps": "--K 2",
    "rollouts of random levels": "--no-grid",
    "levels without the weight w(t)": "--no-w",
    "no grouped normalisation": "--no-group_norm",
    "teacher samples as the reference": "--reference teacher",
    "KL and entropy": "--kl .1 --entropy .01",
    "begins at temperature 1": "--temperature 1"}
WRITES = {"+ guided sampler": {"guided": True}, "default at temperature .95": {"temperature": 0.95}}
STEPS = (4, 8)
KEPT = ("post", "judge_ppl", "tv", "js3", "nll", "entropy", "ks", "rare", "returns", "hints",
        "js2", "rep4")


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("file", help="results, JSON {label: {seed: row}}; an existing file is continued")
    add("--teacher", default="out/{seed}/teacher.pt", help="checkpoints; {seed} is the run's seed")
    add("--seeds", type=COUNT, nargs="+", default=(0, 1, 2), help="one run of each row per seed")
    add("--flags", default="", help="flags of distill.py for every run")
    add("--causal", default="out/causal.pt", help="the judge, of train_teacher.py --causal")
    add("--num", type=NATURAL, default=1000, help="texts to measure: standard error .015 at 1,000")
    add("--out", default="out/ablation.pt", help="checkpoint, overwritten by each run")
    add_device_flags(p)
    p.set_defaults(seed=4321)  # for the measured texts, the same for every student
    return p.parse_args(argv)


def distil(args, seed, flags):
    """Run distill.py with these flags. Raises ValueError if it fails; it has printed why."""
    command = [sys.executable, distill.__file__, *args.flags.split(), *flags.split()]
    command += [*common.machine_flags(args), "--seed", str(seed), "--eval_every", "1000000"]
    command += ["--teacher", args.teacher.replace("{seed}", str(seed)), "--out", args.out]
    if subprocess.run(command).returncode:
        raise ValueError(f"this run failed, see above: {' '.join(command[1:])}")


def measure(args, how, judge, device, bf16):
    """Return the measures of the student in --out, {"post@4": .., ..}, and its flags; `how` is
    one of WRITES, or {}."""
    model = common.load_model(args.out, "student", device, bf16)
    data = corpus.load(model.flags["data"])
    held_out = data.held_out(args.num, model.net.config.length)
    row = {"flags": model.flags, "hardware": common.hardware(device, bf16)}
    for steps in STEPS:
        x, _ = common.write(model, args.num, steps, args.seed, **how)
        measures = quality.quality(x, data)
        temperature = how.get("temperature", 1.0)
        measures["nll"] = nll_per_token(model, held_out, 64, steps, temperature=temperature)
        if judge is not None:
            measures["judge_ppl"] = causal_judge(x, judge, 64)
        row |= {f"{name}@{steps}": measures[name] for name in KEPT if name in measures}
    return row


def print_table(results):
    """Print mean +- standard deviation over seeds, in 4 and in 8 steps."""
    rows = {label: list(runs.values()) for label, runs in results.items()}
    measured = next(iter(rows.values()))[0]
    columns = {f"{name}@{steps}": DIGITS[name] for steps in STEPS for name in KEPT}
    columns = {name: digits for name, digits in columns.items() if name in measured}

    common.print_head("", "seeds", *columns)
    for label, seeds in rows.items():
        common.print_row(label, len(seeds), *common.means(seeds, columns))


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    judge = None
    if os.path.isfile(args.causal):
        judge = common.load_model(args.causal, "causal", device, bf16)

    results = common.read_results(args.file)
    done = None
    for seed, label in itertools.product(args.seeds, ROWS):
        if str(seed) in results.get(label, {}):
            continue
        print(f"{label}, seed {seed}", flush=True)
        if done != (seed, ROWS[label]):
            distil(args, seed, ROWS[label])
            done = seed, ROWS[label]
        row = measure(args, WRITES.get(label, {}), judge, device, bf16)
        common.add_run(args.file, label, seed, row)
    print_table(common.read_results(args.file))
    return 0


if __name__ == "__main__":
    run(main)

"""ablate.py - what each component of the method does: `distill.py` with and without it, over seeds.

    python -m experiments.ablate experiments/results/ablation.json
    python -m experiments.ablate out/ablation.json --seeds 0 -- --minutes 2    # for every run

One run after the other, each a process of its own; what the file has is not made again, so after
Ctrl-C the same command goes on. Each student writes 1,000 samples in 4, 8, 16 and 32 steps, for the
measures of its corpus and the perplexity under the judge --causal, if it is there.
"""
import functools
import itertools
import os
import subprocess
import sys

import distill
from data import corpus, files
from data.command import FROM_0, FROM_1, add_device_flags, make_parser, run_script, setup
from experiments import common
from experiments.evaluate import causal_judge
from experiments.table import SHOWN

# As in the paper's table, in its setting (--paper): each row with all those before it. Rows that
# differ in the sampler alone share a run.
CUMULATIVE = {
    "none": "--paper --K 1 --no-coupled --no-w --no-pi --kl 0 --entropy 0 --no-group_norm",
    "+ intermediate-state matching": "--K 2", "+ coupled time": "--coupled", "+ w(t)": "--w",
    "+ pi(t)": "--pi",
    "+ KL and entropy": f"--kl {distill.PAPER['kl']} --entropy {distill.PAPER['entropy']}",
    "+ grouped normalisation": "--group_norm", "+ guided sampler": ""}
LEFT_OUT = {  # one thing less than all, in the paper's setting, where pi(t) is 1
    "all but intermediate-state matching": "--paper --K 1",
    "all but coupled time": "--paper --no-coupled",
    "all but w(t)": "--paper --no-w", "all but pi(t)": "--paper --no-pi",
    "all but KL and entropy": "--paper --kl 0 --entropy 0"}  # for the last one see CUMULATIVE
ONE_CHANGE = {
    "default": "", "default, guided sampler": "", "no intermediate-state matching": "--K 1",
    "rollouts of two steps": "--K 2", "the log of the ratio": "--power 0",
    "no grouped normalisation": "--no-group_norm", "200 updates": "--updates 200",
    "teacher samples as the reference": "--reference teacher",
    "a slower discriminator": "--disc_lr 3.2e-4", "KL and entropy": "--kl .09 --entropy .01",
    "w(t) and pi(t)": "--w --pi", "begins at temperature .8": "--temperature .8",
    "begins at temperature 1": "--temperature 1", "32 groups of 4": "--groups 32 --G 4",
    "no coupled time": "--no-coupled", "smoothing": "--smoothing .1"}
STEPS = (4, 8, 16, 32)
KEPT = ("post", "judge_ppl", "tv", "js3", "entropy", "ks", "rare", "returns", "js2", "rep4")


def parse_flags(argv=None):
    p, add = make_parser("What each component does.", allow_abbrev=False)
    add("file", help="results, {label: {seed: row}}, JSON; an existing file is continued")
    add("--teacher", default="out/{seed}/teacher.pt", help="checkpoints; {seed} is the run's seed")
    add("--seeds", type=FROM_0, nargs="+", default=(0, 1, 2), help="one run of each row for each")
    add("--causal", default="out/causal.pt", help="the judge, of train_teacher.py --causal")
    add("--num", type=FROM_1, default=1000, help="samples to measure: standard error .015 at 1,000")
    add("--out", default="out/ablation.pt", help="where each student lies until the next run")
    add_device_flags(add)
    p.set_defaults(seed=4321)  # of the samples to measure, the same for every student
    args, more = p.parse_known_args(argv)
    return args, [flag for flag in more if flag != "--"]


def distil(args, seed, flags):
    """Run distill.py with these flags. Raises ValueError if it fails; its own words are shown."""
    command = [sys.executable, distill.__file__, "--device", args.device, *flags]
    command += ["--teacher", args.teacher.replace("{seed}", str(seed)), "--seed", str(seed)]
    command += ["--out", args.out, "--eval_every", "1000000"]
    command += {None: [], True: ["--bf16"], False: ["--no-bf16"]}[args.bf16]
    if subprocess.run(command).returncode:
        raise ValueError(f"this run failed: {' '.join(command[1:])}")


def measure(args, guided, judge, device, bf16):
    """{"valid@4": .., "judge_ppl@4": .., ..} of the student in args.out, and its flags."""
    model = common.load_model(args.out, device, bf16)
    data, row, sampler = corpus.load(model["flags"]["data"]), {}, "ancestral"
    if guided:
        sampler = "rgas"
    for steps in STEPS:
        x, _ = common.write(model, args.num, steps, sampler, seed=args.seed)
        measures = data.quality(x)
        if judge:
            measures["judge_ppl"] = judge(x)
        row |= {f"{name}@{steps}": value for name, value in measures.items() if name in KEPT}
    return row | {"flags": model["flags"], "hardware": common.hardware(device, bf16)}


def print_table(results, labels):
    """Mean +- standard deviation over the seeds: quality at all numbers of steps, others at 8."""
    rows = {label: list(results[label].values()) for label in labels if results.get(label)}
    columns = {f"{name}@{steps}": SHOWN[name] for name in KEPT
               for steps in (STEPS if name in ("post", "judge_ppl") else (8,))}
    first = next(iter(rows.values()))[0]
    columns = {column: digits for column, digits in columns.items() if column in first}
    print("| | seeds | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for label, seeds in rows.items():
        cells = [common.spread([row.get(column) for row in seeds], digits)
                 for column, digits in columns.items()]
        print(f"| {label} | {len(seeds)} | " + " | ".join(cells) + " |")


def main(argv=None):
    args, more = parse_flags(argv)
    device, bf16 = setup(args)
    judge = None
    if os.path.isfile(args.causal):
        model = common.load_model(args.causal, device, bf16, ("causal",))
        judge = functools.partial(causal_judge, judge=model, batch=256)
    files.check_output(args.out, args.file)
    common.add_run(args.file, "groups")  # an unwritable path must not show after minutes of work
    results = common.read_results(args.file, "groups")
    so_far = itertools.accumulate(CUMULATIVE.values(), "{} {}".format)
    plan = {**dict(zip(CUMULATIVE, so_far)), **LEFT_OUT, **ONE_CHANGE}
    runs = list(itertools.product(args.seeds, plan))
    runs = [(seed, label) for seed, label in runs if str(seed) not in results.get(label, {})]
    done = None
    for number, (seed, label) in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {label}, seed {seed}", flush=True)
        flags = [*more, *plan[label].split()]
        if done != (seed, flags):
            distil(args, seed, flags)
        done = seed, flags
        row = measure(args, "guided" in label, judge, device, bf16)
        common.add_run(args.file, "groups", label, seed, row)
    print_table(common.read_results(args.file, "groups"), plan)


if __name__ == "__main__":
    run_script(main)

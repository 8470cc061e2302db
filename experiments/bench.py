"""bench.py - measure speed.

    python -m experiments.bench models                     # writing: teacher, student, causal
    python -m experiments.bench training                   # a training step of the teacher
    python -m experiments.bench distillation --flags="--accumulate 4"    # a student's update
    python -m experiments.bench sampler                    # ours against the usual sampler

`training` and `distillation` run the script itself for --times updates and read its log; --flags go
to that script; --profile tells where the time goes.
"""
import os
import tempfile
import time

import torch

import didi
import distill
import train_teacher
from data import corpus
from experiments import common
from model import NATURAL, Config, Denoiser, add_device_flags, load, make_parser, run, setup

MODELS = (("teacher", 256), ("teacher", 8), ("student", 4), ("student", 8),
          ("student, guided", 8), ("autoregressive", None))


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument
    add("what", choices=BENCHES, help="see above")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py")
    add("--causal", default="out/causal.pt", help="checkpoint of train_teacher.py --causal")
    add("--at_once", type=NATURAL, default=256, help="texts per batch, besides one at a time")
    add("--times", type=NATURAL, default=20, help="updates to time")
    add("--flags", default="", help="flags for the timed script")
    add("--profile", help="write torch.profiler's table of the timed script to this file")
    add("--json", help="add the rows to this file")
    add("--label", default="default", help="with --json: their name")
    add_device_flags(p)
    return p.parse_args(argv)


def training_flops(config, texts):
    """Return the floating-point operations of the matrix products in a training step on `texts`
    sequences: a backward pass costs two forward ones, and half of the positions are masks."""
    D = config["n_embd"]
    L = config["length"]
    block = 24 * D * D + 4 * L * D  # a token's: 12 D^2 weights, and attention
    head = D * config["vocab_size"]  # half of a token's
    return 3 * texts * L * (config["n_layer"] * block + head)


def run_profiled(main, argv, path):
    """Call main(argv); write a table of its operations, the slowest first, to a file."""
    with torch.profiler.profile() as profiler:
        main(argv)
    clock = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with open(path, "w") as f:
        f.write(profiler.key_averages().table(sort_by=clock, row_limit=30))


def bench_training(args, device, bf16):
    """Run a training script for a few updates; return a row, the mean time of the last --times.

    A training step has its TFLOP/s, too, a GPU the most memory that was used, in GiB.
    """
    script = train_teacher
    flags = [*args.flags.split(), *common.machine_flags(args)]
    flags += ["--updates", str(args.times + 5)]  # the first are slower
    if args.what == "distillation":
        script = distill
        flags += ["--teacher", args.teacher, "--disc_warmup", "1"]

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.pt")
        argv = [*flags, "--out", path]
        if args.profile is None:
            script.main(argv)
        else:
            run_profiled(script.main, argv, args.profile)
        ckpt, _ = load(path)

    ends = [row["seconds"] for row in ckpt["log"] if "seconds" in row]
    seconds = (ends[-1] - ends[-1 - args.times]) / args.times
    flags = ckpt["flags"]
    if args.what == "distillation":
        texts = flags["groups"] * flags["G"]
    else:
        texts = flags["batch"]
    tokens = texts * ckpt["config"]["length"]
    row = {"row": args.what, "ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
    if args.what == "training":
        row["tflop_per_s"] = training_flops(ckpt["config"], texts) / seconds / 1e12
    if device.type == "cuda":
        row["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return [row]


def bench_models(args, device, bf16):
    """Time each model writing one text at a time and --at_once; return the rows.

    tokens_per_s counts tokens up to and including the end; latency is in seconds per batch.
    """
    paths = {"teacher": args.teacher, "student": args.student, "autoregressive": args.causal}
    models = common.load_models(paths, device, bf16)

    rows = []
    for name, steps in MODELS:
        model = models[name.split(",")[0]]
        guided = "guided" in name
        for batch in (1, args.at_once):
            x, cost = common.write(model, max(batch, 20), steps, args.seed, batch, guided=guided)
            speed = cost.pop("seq_per_s")
            tokens = corpus.until_end(x, model.net.config.pad_id).sum().item() / len(x)
            row = {"row": name, "steps": steps, "batch": batch, **cost}
            row["latency"] = batch / speed
            row["tokens_per_s"] = speed * tokens
            rows.append(row)
    return rows


def usual_sample(denoiser, z, steps, mask_id):
    """Fill the masks of z (B, L) by the usual sampler, which runs the head on all positions.

    Each step draws from one float64 categorical over V + 1 outcomes; one last call fills what is
    still masked.
    """
    for k in range(steps):
        t = 1 - k / steps
        s = 1 - (k + 1) / steps
        p_x = denoiser(z).double().softmax(-1)  # (B, L, V)
        stay = torch.full_like(p_x[..., :1], s / t)
        p = torch.cat((p_x * (1 - s / t), stay), -1)  # (B, L, V + 1)
        noise = torch.empty_like(p).exponential_()
        drawn = (p / noise).argmax(-1)
        z = torch.where(z == mask_id, drawn, z)  # V, the last outcome, is the mask
    return torch.where(z == mask_id, denoiser(z).argmax(-1), z)


def seconds_of(sampler, net, steps, B=2):
    """Return the seconds that sampler(net, z, steps, mask_id) takes for B texts."""
    z = net.start(torch.full((B,), net.config.length, device=net.lengths.device))
    begin = time.perf_counter()
    sampler(net, z, steps, net.config.mask_id)
    if z.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bench_sampler(args, device, bf16, config=Config(50257, 256, 6, 6, 384)):
    """Time didi.sample against the usual sampler on a random network; return the rows."""
    net = Denoiser(config).to(device).requires_grad_(False)
    net.bf16 = bf16
    rows = []
    for steps in (1, 8, 64):  # the first is a warm-up
        usual = seconds_of(usual_sample, net, steps)
        ours = seconds_of(didi.sample, net, steps)
        rows.append({"row": "sampler", "steps": steps, "usual_s": usual, "reveal_first_s": ours,
                     "ratio": usual / ours})
    return rows[1:]


BENCHES = {"models": bench_models, "sampler": bench_sampler,
           "training": bench_training, "distillation": bench_training}


def shown(value):
    """Return a table cell: a float has four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    rows = BENCHES[args.what](args, device, bf16)

    common.print_head(*rows[0])
    for row in rows:
        common.print_row(*map(shown, row.values()))
    if args.json is not None:
        results = {"rows": rows, "flags": vars(args), "hardware": common.hardware(device, bf16)}
        common.add_run(args.json, args.label, args.seed, results)
    return 0


if __name__ == "__main__":
    run(main)

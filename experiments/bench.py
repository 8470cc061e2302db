"""bench.py - speed and memory.

    python -m experiments.bench models                         # writing: teacher, student, causal
    python -m experiments.bench training --size small          # a training step of the teacher
    python -m experiments.bench distillation --accumulate 4    # an update of the student
    python -m experiments.bench sampler                        # against the usual sampler
    python -m experiments.bench memory --paper_scale           # bytes of an update, counted

`training` takes the flags of train_teacher.py, `distillation` and `memory` those of distill.py.
With --json the rows go into that file under --label, beside what is in it.
"""
import copy
import itertools
import os
import time
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import didi
import distill
import train_teacher
from data import corpus, memory
from experiments import common
from data.command import SIZE, add_device_flags, make_parser, run_script, setup, share_out
from experiments.mdlm import PUBLISHED
from model import Config, Denoiser, compile_trunk, update_ema

# bfloat16, dense, FLOP/s, by the makers (SXM where there is one)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
MODELS = (("teacher", 256), ("teacher", 1024), ("student", 8), ("student", 16),
          ("student, guided", 8), ("autoregressive", None))
TAUS = (0.02, 0.5, 0.98)  # a level over the one before: the lowest, the middle, the highest
SAMPLERS = {"student, guided": "rgas", "autoregressive": "autoregressive"}  # else "ancestral"


def parse_flags(argv=None):
    p, add = make_parser("Speed and memory.", allow_abbrev=False)
    add("what", choices=("models", "training", "distillation", "sampler", "memory"))
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--student", default="out/student.pt", help="checkpoint of distill.py")
    add("--causal", default="out/causal.pt", help="of train_teacher.py --causal, if it is there")
    add("--at_once", type=SIZE, default=256, help="texts at once, besides one at a time")
    add("--times", type=SIZE, default=20, help="training steps to time")
    add("--json", help="add the rows to this file")
    add("--label", default="default", help="with --json: what to call them")
    add_device_flags(add)
    args, more = p.parse_known_args(argv)
    if more and args.what in ("models", "sampler"):
        p.error(f"{args.what} knows no {' '.join(more)}")
    return args, more


# ----------------------------------------------------------------------------------------- training
def wait_for(device):
    """Until the GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step, tokens, device, times):
    """Time step(), which trains on so many tokens. Returns a row; memory is beyond what is in use.

    FLOP/s count matrix products, and attention where it is one kernel (CUDA).
    """
    peak_memory = common.memory_meter(device)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    for _ in range(3):
        step()
    if device.type == "cuda":  # without the uncompiled step; on a CPU what it freed is still held
        peak_memory = common.memory_meter(device)
    wait_for(device)
    begin = time.perf_counter()
    for _ in tqdm(range(times), desc="bench", leave=False):
        step()
    wait_for(device)
    seconds = (time.perf_counter() - begin) / times
    return {"ms": 1e3 * seconds, "tokens_per_s": tokens / seconds, "peak_mib": peak_memory(),
            "flops": counter.get_total_flops() / seconds}


def share_of_peak(flops, device):
    """Of what this GPU can do at most, or None if that isn't known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    known = [peak for gpu, peak in PEAK.items() if gpu in words]
    if not known:
        return None
    return flops / known[0]


def random_text():
    """A Corpus of random GPT-2 tokens: the speed of text needs no text."""
    ids = np.random.default_rng(0).integers(50257, size=2 ** 20, dtype=np.uint16)
    return corpus.Corpus("", "text", "gpt2", 0, {}, [ids], [ids])


def teacher_step(args, device, bf16):
    """A training step as in train_teacher.py, as a function; and its tokens."""
    data, V = random_text(), 50257
    if args.size == "nano" or args.data != corpus.DEFAULT:
        data = corpus.load(args.data)
        V = corpus.make_tokenizer(data.tokenizer).n_vocab
    train_teacher.settle(args, data)
    L, B = args.length, args.batch // args.accumulate
    config = Config(V, L, args.n_layer, args.n_head, args.n_embd, args.causal, not data.packed,
                    data.framed)
    nets = train_teacher.networks(args, config, data, device, bf16)
    model = nets["model"]
    compile_trunk(model, args.compile)

    def step():
        for _ in range(args.accumulate):
            x = data.batch(B, L, device)
            (train_teacher.bound_and_loss(model, x)[1] / args.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (nets["muon"], nets["adamw"]):
            optimizer.step()
            optimizer.zero_grad()
        update_ema(nets["ema"], model, args.ema)
    return step, args.batch * L


def distillation_update(args, device, bf16):
    """An update as in distill.py, as a function; and its tokens."""
    teacher, data = distill.load_teacher(args, device, bf16)
    memory.fit_update(args, teacher.config, device, bf16)
    reference = distill.make_reference(args, data, teacher)
    nets, groups = distill.networks(args, teacher), share_out("groups", args)

    def step():
        distill.update(args, nets, teacher, reference, groups, True)
        update_ema(nets["ema"], nets["model"], args.ema)
    return step, args.groups * args.G * teacher.config.length


def bench_training(args, more, device, bf16):
    """Time a training step of the teacher or of the student; prints and returns [row]."""
    script, make = train_teacher, teacher_step
    if args.what == "distillation":
        script, make = distill, distillation_update
    flags, _ = script.parse_flags(more)
    flags.device, flags.bf16, flags.seed = args.device, bf16, args.seed
    if args.what == "distillation":
        flags.teacher = args.teacher
    step, tokens = make(flags, device, bf16)
    row = {"row": args.what, "flags": vars(flags)} | measure(step, tokens, device, args.times)
    row["share_of_peak"] = share_of_peak(row["flops"], device)
    known = "an unknown share"
    if row["share_of_peak"] is not None:
        known = f"{row['share_of_peak']:.1%}"
    print(f"{device.type}: {row['ms']:.1f} ms/step, {row['tokens_per_s']:.0f} tokens/s, "
          f"{row['flops'] / 1e12:.3g} TFLOP/s, {known} of its peak, {row['peak_mib']:.0f} MiB on "
          f"top of the networks")
    return [row]


# ------------------------------------------------------------------------------------------ writing
def bench_models(args, device, bf16):
    """Time each model writing one text at a time and --at_once; prints and returns the rows.

    tokens_per_s counts tokens up to and including the end; latency: seconds until all are written.
    """
    paths = {"teacher": args.teacher, "student": args.student, "autoregressive": args.causal}
    paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
    models, rows = common.load_models(paths, device, bf16), []
    for model in models.values():
        memory.check(model["config"], device, 0, args.at_once, 16, "--at_once")
    names = ("row", "steps", "batch", "nfe", "disc_calls", "tokens_per_s", "latency", "peak_mib")
    print("".join(f"{name:>16}" for name in names))
    for (name, steps), batch in itertools.product(MODELS, (1, args.at_once)):
        model = models.get(name.split(",")[0])
        if model is None or ("guided" in name and "discriminator" not in model):
            continue
        peak_memory, num = common.memory_meter(device), max(batch, 20)
        x, cost = common.write(model, num, steps, SAMPLERS.get(name, "ancestral"), seed=args.seed,
                               batch=batch)
        tokens = corpus.until_end(x, model["config"].pad_id).float().sum(1).mean().item()
        row = {"row": name, "steps": steps, "batch": batch, "nfe": cost["nfe"],
               "disc_calls": cost["disc_calls"], "latency": batch / cost["seq_per_s"],
               "tokens_per_s": cost["seq_per_s"] * tokens, "peak_mib": peak_memory()}
        print("".join(f"{shown(row[name]):>16}" for name in names), flush=True)
        rows.append(row)
    return rows


def shown(value):
    """A cell of the table: numbers with four digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    return value


# -------------------------------------------------------------------------------------- the sampler
def usual_sample(denoiser, z, steps, mask_id, until=None):
    """The usual sampler, an independent reference: z (B, L), all positions through the head.

    In each step one float64 categorical over V + 1 outcomes; at the end one more call for what is
    still masked. `until` stops after so many steps, for timing.
    """
    for k in range(steps)[:until]:
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        p_x = denoiser(z).double().softmax(-1)  # (B, L, V)
        stay = torch.full_like(p_x[..., :1], s / t)
        p = torch.cat((p_x * ((t - s) / t), stay), -1)  # (B, L, V + 1)
        drawn = (p / torch.empty_like(p).exponential_()).argmax(-1)
        z = torch.where(z == mask_id, drawn, z)  # with drawn = V: masked still, mask_id being V
    return torch.where(z == mask_id, denoiser(z).argmax(-1), z)


def timed(run, device):
    """Seconds and MiB of run()."""
    peak_memory = common.memory_meter(device)
    wait_for(device)
    begin = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begin, peak_memory()


def bench_sampler(device, bf16, config=Config(50257, 256, 6, 6, 384), B=2, first=8):
    """Time and memory of didi.sample against the usual sampler, on a random network.

    Its steps all cost the same: beyond the `first` of them its time is extrapolated.
    """
    net, mask_id = Denoiser(config).to(device).requires_grad_(False), config.mask_id
    net.bf16, rows = bf16, []
    z = torch.full((B, config.length), mask_id, device=device)
    print(f"V = {config.vocab_size}, L = {config.length}, batch {B}, {device.type}, bf16: {bf16}")
    for steps in (8, 64, 1024):
        until = min(steps, first)
        runs = [lambda: usual_sample(net, z, steps, mask_id, until),
                lambda: didi.sample(net, z, steps, mask_id)]
        if steps == 8:  # warm-up
            runs[0]()
            runs[1]()
        usual, ours = [timed(run, device) for run in runs]
        usual = usual[0] * (steps + 1) / (until + 1), usual[1]
        print(f"{steps} steps: usual {usual[0]:.2f} s, {usual[1]:.0f} MiB; reveal-first "
              f"{ours[0]:.2f} s, {ours[1]:.0f} MiB; ratio of times {usual[0] / ours[0]:.1f}",
              flush=True)
        rows.append({"row": "sampler", "steps": steps, "usual_s": usual[0], "usual_mib": usual[1],
                     "reveal_first_s": ours[0], "reveal_first_mib": ours[1]})
    return rows


# ------------------------------------------------------------------------------------------ memory
class TensorBytes(TorchDispatchMode):
    """Counts within it the bytes of tensors that are made there: .live now, .peak at most.

    A storage counts once, whatever views it has and whoever writes into it, until nobody holds it
    any more. What a kernel takes within itself, and an allocator beside it, is not seen.
    """
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}  # {storage: its bytes, 0 if it was there}

    def see(self, tensors, made):
        """Note the storages that are not known yet; made: 0 for those that were there, or 1."""
        for x in tree_leaves(tensors):
            if not torch.is_tensor(x) or x.untyped_storage()._cdata in self.sizes:
                continue
            storage = x.untyped_storage()
            self.sizes[storage._cdata] = made * storage.nbytes()
            self.live += made * storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        self.see((args, kwargs), 0)
        result = function(*args, **kwargs)
        self.see(result, 1)
        return result


def update_peak(flags, config, bf16, device, tau=0.5):
    """Bytes at the peak of an update in which each level is tau times the one before, beyond the
    networks' weights, gradients and moments, which are there from the start."""
    torch.manual_seed(0)
    flags = copy.copy(flags)
    flags.beta = 1e6 * tau, 1e6 * (1 - tau)
    teacher = Denoiser(config).to(device).requires_grad_(False)
    teacher.bf16 = bf16
    nets = distill.networks(flags, teacher)
    for net, optimizer in (("model", "opt"), ("disc", "disc_opt")):
        for p in [p for p in nets[net].parameters() if p.requires_grad]:
            p.grad = torch.zeros_like(p)
        nets[optimizer].step()  # makes the moments; the weights stay

    def reference(n):
        return torch.randint(config.vocab_size, (n, config.length), device=device)
    with TensorBytes() as count:
        distill.update(flags, nets, teacher, reference, flags.groups, True)
    return count.peak


def sampling_peak(config, bf16, device):
    """Bytes at the peak of a step in which as many sequences are written as go at once."""
    net = Denoiser(config).to(device).requires_grad_(False)
    net.bf16, z = bf16, net.start(torch.full((config.at_once,), config.length, device=device))
    with TensorBytes() as count:
        didi.sample(net, z, 1, config.mask_id)
    return count.peak


def count_blocks(flags, bf16, device):
    """Bytes of a token that four blocks more keep in an update: counted, and as estimated."""
    short, long = (Config(31, 128, n_layer, 2, 64) for n_layer in (8, 12))
    tokens = flags.groups * flags.G * short.length
    more = [update_peak(flags, config, bf16, device) for config in (short, long)]
    estimates = [memory.token_bytes(flags, config, bf16) for config in (short, long)]
    return (more[1] - more[0]) / tokens, estimates[1] - estimates[0]


def fixed_bytes(flags, config):
    """Of the weights of teacher, student, average and discriminator, and of the gradients and both
    moments of what trains."""
    flags = copy.copy(flags)
    flags.lr = 1.0  # there are no weights to take it from
    with torch.device("meta"):
        teacher = Denoiser(config).requires_grad_(False)
        nets = distill.networks(flags, teacher)
    each = torch.nn.ModuleList((teacher, nets["model"], nets["ema"], nets["disc"]))
    trains = [p for p in each.parameters() if p.requires_grad]
    return sum(p.nbytes for p in each.parameters()) + 3 * sum(p.nbytes for p in trains)


def bench_memory(more, device, bf16, config=Config(50257, 1024, 1, 1, 8), wide=PUBLISHED):
    """Count an update's bytes, all rows in one part, on a random network with hardly a trunk; what
    blocks keep; from both what a GPU holds of a network as `wide`. Prints and returns the rows.

    Beyond weights, gradients and moments; in units of a float32 table (n, V) of all n tokens.
    """
    flags, _ = distill.parse_flags(more)
    flags.accumulate, B = 1, flags.groups * flags.G
    unit, rows = 4 * config.vocab_size * B * config.length, []
    print(f"V {config.vocab_size:,}, {B} sequences of {config.length:,} in one part, in units of "
          f"4V bytes per token, {unit / 1e9:.3g} GB:")
    for tau in TAUS:
        peak = update_peak(flags, config, bf16, device, tau)
        rows.append({"row": "update", "tau": tau, "bytes": peak, "units": peak / unit})
        print(f"update, levels {tau} of the one before: {peak / unit:.3f}, {peak / 1e9:.3g} GB",
              flush=True)
    peak = sampling_peak(config, bf16, device)
    rows.append({"row": "sampling", "sequences": config.at_once, "bytes": peak})
    print(f"sampling {config.at_once} sequences at once: {peak / 1e9:.3g} GB")
    for name, half in (("float32", False), ("bfloat16", True)):
        counted, estimate = count_blocks(flags, half, device)
        rows.append({"row": f"blocks, {name}", "bytes": counted, "estimate": estimate})
        print(f"what blocks keep in {name}, on {device.type}: {counted / estimate:.2f} times the "
              "estimate")
    return rows + largest_batches(flags, wide, max(row["bytes"] for row in rows[:len(TAUS)]))


def largest_batches(flags, config, tables):
    """Prints and returns rows: how many sequences an update holds at once, weights included.

    What the tables take was counted, blocks are estimated; with bfloat16, on a GPU.
    """
    fixed, rows = fixed_bytes(flags, config), []
    sequence, B = config.length * memory.token_bytes(flags, config, True), flags.groups * flags.G
    total = fixed + tables + B * sequence
    estimate = memory.weight_bytes(config, 7) + memory.update_bytes(flags, config, True, B)
    print(f"{config.n_layer} x {config.n_embd}: weights, gradients, moments {fixed / 1e9:.3g} GB, "
          f"a sequence {sequence / 1e9:.3g} GB, so {B} take {total / 1e9:.3g} GB; distill.py's own "
          f"estimate is {estimate / 1e9:.3g}")
    rows.append({"row": "total", "sequences": B, "bytes": total, "estimate": estimate,
                 "fixed": fixed, "sequence": sequence, "flags": vars(flags)})
    for size in (24, 80):
        most = int((size * 1e9 - fixed - tables) // sequence)
        rows.append({"row": f"{size} GB", "sequences": most})
        print(f"{size} GB hold {most} sequences in one part")
    return rows


def main(argv=None):
    args, more = parse_flags(argv)
    device, bf16 = setup(args)
    if args.json is not None:
        common.add_run(args.json, "what")  # an unwritable path must not show after minutes of work
    if args.what == "models":
        rows = bench_models(args, device, bf16)
    elif args.what == "sampler":
        rows = bench_sampler(device, bf16)
    elif args.what == "memory":
        rows = bench_memory(more, device, bf16)
    else:
        rows = bench_training(args, more, device, bf16)
    if args.json is not None:
        run = {"rows": rows, "flags": vars(args), "hardware": common.hardware(device, bf16)}
        common.add_run(args.json, "what", args.label, args.seed, run)


if __name__ == "__main__":
    run_script(main)

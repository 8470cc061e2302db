"""model.py - the networks: a bidirectional transformer denoiser, and the discriminator made from a copy of it.

The denoiser maps partly masked tokens z (B, L) to logits (B, L, V). It takes no time input: how many tokens are masked
already tells the noise level (arXiv 2409.02908), so there is no timestep embedding and no adaLN. `trunk` and `head` are
separate calls, so that the head, the widest matrix of all, runs only at the positions somebody asks for.
You don't have to read this file to follow the method: didi.py takes any callable z -> logits.
"""
import argparse
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


@dataclass
class Config:
    """The network's shape; stored in every checkpoint."""
    vocab_size: int = 257  # V: the tokenizer's tokens; the mask is one more, id V, known to the embedding alone
    length: int = 48       # L, tokens per sequence
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128      # D
    causal: bool = False   # the autoregressive baseline: position i sees 0..i only, and the mask token stands for "begin"

    @property
    def mask_id(self):
        return self.vocab_size


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864) of x (B, H, L, D/H)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: every position sees every other or, if causal, those up to its own."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.n_head, self.causal = config.n_head, config.causal
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, h, cos, sin, cache=None):
        B, L, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, L, D/H)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # (2, B, H, positions so far, D/H), its last column still to be filled by the one token of h
            cache[0, :, :, -1:], cache[1, :, :, -1:] = k, v
            k, v = cache
        dtype = v.dtype if v.is_cuda else torch.float32  # a CPU is 4 times slower with attention in bfloat16
        with torch.autocast(h.device.type, enabled=False):
            a = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=self.causal and cache is None)
        h = h + self.proj(a.transpose(1, 2).reshape(B, L, D))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Denoiser(nn.Module):
    """Transformer denoiser: z (B, L) with values 0..V (V = mask) -> logits (B, L, V). Never predicts a mask: no column for it."""
    bf16 = False  # matrix products in bfloat16 (autocast); weights, residual stream, softmax and losses stay float32

    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head {config.n_head}")
        self.config = config
        D, L = config.n_embd, config.length
        self.embed = nn.Embedding(config.vocab_size + 1, D)  # V + 1 rows: the last is the mask
        padding = -config.vocab_size % 64 if config.vocab_size > 1024 else 0  # columns that make a wide product fast, and are cut off
        self.position = nn.Parameter(torch.empty(L, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D, config.vocab_size + padding, bias=False)  # V columns
        head_dim = D // config.n_head
        angle = torch.outer(torch.arange(L), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (L, D/H/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        std = 0.57 / D ** 0.5  # .05 at D = 128 leaves the unigram plateau sooner than .02; at D = 768 it is GPT-2's .02
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std / (2 * config.n_layer) ** 0.5 if name.endswith(("proj.weight", "down.weight")) else std)

    def trunk(self, z):
        """z (B, L) -> hidden states (B, L, D)."""
        return self.trunk_from_embeddings(self.embed(z))

    def trunk_from_embeddings(self, e):
        """Token embeddings e (B, L, D) -> hidden states (B, L, D): the entry for soft tokens."""
        L = e.shape[1]
        h = e + self.position[:L]
        with self.precision():
            for block in self.blocks:
                h = block(h, self.cos[:L], self.sin[:L])
            return self.norm(h)

    def precision(self):
        """The autocast context of this network's own calls."""
        return torch.autocast(self.position.device.type, torch.bfloat16, enabled=self.bf16)

    def new_cache(self, B):
        """Keys and values for `trunk_next`: (n_layer, 2, B, H, L, D/H), one per block, nothing in it yet."""
        c, like = self.config, self.position
        dtype = torch.bfloat16 if self.bf16 and like.is_cuda else like.dtype
        return like.new_empty(c.n_layer, 2, B, c.n_head, c.length, c.n_embd // c.n_head, dtype=dtype)

    def trunk_next(self, token, i, cache):
        """Causal models: token (B,) at position i, earlier keys and values from `cache` -> hidden state (B, D) there."""
        h = self.embed(token[:, None]) + self.position[i]
        with self.precision():
            for block, kv in zip(self.blocks, cache):
                h = block(h, self.cos[i:i + 1], self.sin[i:i + 1], kv[..., :i + 1, :])
            return self.norm(h)[:, 0]

    def head(self, h):
        """Hidden states (..., D) -> logits (..., V), raw: SUBS is didi.predict."""
        with self.precision():
            return self.out(h)[..., :self.config.vocab_size]

    def forward(self, z, where=None):
        """Logits (B, L, V), or (n, V) at the n True positions of `where` (B, L), or at the flat indices `where` (n,), alone."""
        h = self.trunk(z)  # (B, L, D)
        return self.head(h if where is None else h[where] if where.dtype == torch.bool else h.flatten(0, 1)[where])


class Discriminator(nn.Module):
    """A copy of the *loaded* teacher's trunk, frozen but for its last blocks, and a two-layer spectral-norm head.

    One logit per position: log q_reference(z_t) - log q_student(z_t) if trained to optimality with label 1 on the reference.
    """

    def __init__(self, teacher, trainable_blocks):
        super().__init__()
        D = teacher.config.n_embd
        if not 0 <= trainable_blocks <= len(teacher.blocks):
            raise ValueError(f"{trainable_blocks} trainable blocks, but the teacher has {len(teacher.blocks)} blocks: lower --disc_blocks")
        self.body = copy.deepcopy(teacher)
        self.body.out = nn.Identity()
        self.body.requires_grad_(False)
        for part in [*self.body.blocks[len(self.body.blocks) - trainable_blocks:], self.body.norm]:
            part.requires_grad_(True)
        self.score = nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.GELU(), spectral_norm(nn.Linear(D, 1)))

    def forward(self, z):
        """z (B, L) -> logits (B, L)."""
        return self.score(self.body.trunk(z)).squeeze(-1)

    def soft(self, z, where, probs):
        """The same, but the n True positions of `where` hold soft tokens, probs (n, V). One-hot = forward (in eval mode)."""
        e = self.body.embed(z)  # (B, L, D)
        e[where] = (probs @ self.body.embed.weight[:-1]).to(e.dtype)
        return self.score(self.body.trunk_from_embeddings(e)).squeeze(-1)


# --------------------------------------------------------------------------------------------------------- checkpoints
MAKER = {"teacher": "train_teacher.py", "causal": "train_teacher.py --causal", "student": "distill.py"}


def save_checkpoint(path, config, **parts):
    """Write one dict of tensors and plain containers, by way of a temporary file: a kill never leaves half a checkpoint."""
    partial = f"{path}.partial"
    torch.save({"config": asdict(config), **parts}, partial)
    os.replace(partial, path)


def load_checkpoint(path, kind, device="cpu"):
    """Read a checkpoint of kind "teacher", "causal" or "student" without executing code from it; returns (dict, Config).

    Raises FileNotFoundError or ValueError with one line that says what to do.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: make it with `python {MAKER[kind]}`")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
        found, config = ckpt["kind"], Config(**ckpt["config"])
    except Exception as e:  # a foreign file can fail in any way: OSError, EOFError, struct.error, UnpicklingError, KeyError ..
        raise ValueError(f"{path} is truncated, of another version, or no checkpoint of this project ({type(e).__name__}): make it again") from None
    if found != kind:
        raise ValueError(f"{path} holds a {found}, but a {kind} is needed here")
    return ckpt, config


def build_denoiser(config, state, device="cpu", bf16=False):
    """A Denoiser with the given weights, in eval mode (it has no dropout: eval and train are the same function)."""
    model = Denoiser(config).to(device)
    model.bf16 = bf16
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"the checkpoint's weights do not fit its own shape {config}: {str(e).splitlines()[-1].strip()[:100]}") from None
    return model.eval()


def build_discriminator(denoiser, ckpt):
    """The Discriminator in a student's checkpoint, frozen, in eval mode: spectral norm must not go on iterating.

    With what guided sampling has to know of its training: `positions`, and `noise_max`, the highest level it has seen.
    """
    flags = ckpt["flags"]
    try:
        disc = Discriminator(denoiser, flags["disc_blocks"]).to(denoiser.position.device)
        disc.positions, disc.noise_max = flags["positions"], 1.0 if flags["coupled"] else flags["noise_max"]
        disc.load_state_dict(ckpt["disc"])
    except (KeyError, RuntimeError):
        raise ValueError("the checkpoint's discriminator does not fit its denoiser: run distill.py again") from None
    return disc.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------- what the scripts share
def write_json(path, content):
    """Write a JSON file by way of a temporary one. ValueError if that cannot be done."""
    try:
        with open(f"{path}.partial", "w") as f:
            json.dump(content, f, indent=1)
        os.replace(f"{path}.partial", path)
    except OSError as e:
        raise ValueError(f"{path!r} cannot be written ({e.strerror}): name a file in an existing folder") from None


def read_results(path, holds):
    """A results file, {label: {seed: run}}, each run a dict that `holds` this key. ValueError if it is none."""
    try:
        with open(path) as f:
            content = json.load(f)
        if all(holds in run for seeds in content.values() for run in seeds.values()):
            return content
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{path!r} is no results file of this flag: name another")


def spread(values, digits=3):
    """"mean +- standard deviation" of the values that are numbers, or "" if there are none."""
    values = [v for v in values if v is not None and v == v]
    deviation = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}" if values else ""


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def add_machine_flags(group):
    """The flags that every script has."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="matrix products in bfloat16 [where the processor has it]")
    group.add_argument("--seed", type=int, default=0, help="equal flags and equal seed repeat a run exactly on a CPU")


def pick_device(args):
    """torch.device for args.device: "auto", "cpu", "cuda" or "mps"; ValueError if it isn't there. Settles args.bf16 and args.compile if they are None."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(d for d in ("cuda", "mps", "cpu") if found[d]) if args.device == "auto" else args.device
    if not found.get(name):
        raise ValueError(f"device {name} is not available here: use --device auto or one of {[d for d in found if found[d]]}")
    if getattr(args, "compile", False) is None:
        args.compile = name == "cuda"
    # oneDNN keeps 1,024 kernels, one for each number of masked tokens: some 6 MB more in every update of distillation
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if args.bf16 is None:  # without such instructions a CPU is slower in bfloat16
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        args.bf16 = name == "cuda" or (name == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16")))
    return torch.device(name)


def memory_meter(device):
    """A function that tells the MiB used at most from now on, beyond what is in use now: on CUDA the GPU's, on Linux the process's, else NaN."""
    def status(name):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        peak, before = torch.cuda.max_memory_allocated, torch.cuda.memory_allocated()
    elif sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # VmHWM := VmRSS (man 5 proc)
        peak, before = lambda: status("VmHWM"), status("VmRSS")
    else:
        return lambda: math.nan
    return lambda: (peak() - before) / 2 ** 20


def join_processes(device):
    """Under torchrun join the group of processes, on NCCL (CUDA) or gloo; returns the device, of several GPUs this process's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    hours = datetime.timedelta(hours=12)  # the first process may have a corpus to prepare
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=hours)
    return device


def place():
    """(rank, world): which process this is, of how many."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if torch.distributed.is_initialized() else (0, 1)


def average(rows):
    """The mean of each number in dicts of the same keys."""
    return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}


def over_processes(row, device):
    """The mean over all processes of each number in a dict, in one collective call; the dict itself if there is one process."""
    world = place()[1]
    if world == 1:
        return row
    x = torch.tensor([float(v) for v in row.values()], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(x)
    return dict(zip(row, (x / world).tolist()))


def parts(net, args, step):
    """Of a batch's --accumulate parts those that fall to this process: yields (k, n), its part k of n, to run and differentiate.

    Each has random numbers of its own, so any number of processes does the same. In DDP the gradients are averaged at the last one.
    """
    rank, world = place()
    mine = range(rank, args.accumulate, world)
    for k, part in enumerate(mine):
        if args.accumulate > 1:
            torch.manual_seed(hash((args.seed, step, part)) % 2 ** 63)
        with net.no_sync() if world > 1 and k < len(mine) - 1 else contextlib.nullcontext():
            yield k, len(mine)


def parallel(net):
    """The network to train through: itself, or in DistributedDataParallel, which averages the gradients of all processes."""
    if place()[1] == 1:
        return net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13's new name for this flag, which 2.11 does not know
        return torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}  # bfloat16, dense, FLOP/s, by the makers (SXM)


def bench(step, tokens, device, times=20):
    """Print milliseconds, tokens/s, FLOP/s (matrix products; attention on CUDA only), share of the GPU's peak, and memory of step()."""
    (rank, world), peak_memory = place(), memory_meter(device)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    for _ in range(3):
        step()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":  # without the uncompiled step above; on a CPU what it freed counts as the process's, so that counts
        peak_memory = memory_meter(device)
    wait()
    begin = time.perf_counter()
    for _ in tqdm(range(times), desc="bench", leave=False, disable=rank > 0):
        step()
    wait()
    seconds = (time.perf_counter() - begin) / times
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((world * p for gpu, p in PEAK.items() if gpu in name.replace("-", " ").split()), None)
    speed = world * counter.get_total_flops() / seconds
    rank or print(f"{world} x {name}: {1e3 * seconds:.1f} ms/step, {tokens / seconds:.0f} tokens/s, {speed / 1e12:.3g} TFLOP/s, "
          f"{f'{speed / peak:.1%}' if peak else 'an unknown share'} of its peak, {peak_memory():.0f} MiB on top of the networks")


def add_training_flags(group, eval_every, unit):
    """The flags that both training scripts have."""
    on_off = argparse.BooleanOptionalAction
    group.add_argument("--minutes", type=float, help="stop after so many minutes, with the schedule fitted to them, whatever --steps says")
    group.add_argument("--accumulate", type=int, default=1,
                       help="parts of a batch, one after the other: less memory; a multiple of torchrun's processes, which share them")
    group.add_argument("--compile", action=on_off, help="torch.compile: one graph of network and loss; or trunks [no; yes on CUDA]")
    add_machine_flags(group)
    group.add_argument("--eval_every", type=int, default=eval_every, help=f"{unit} between tables, each of which saves a checkpoint")
    group.add_argument("--eval_samples", type=int, default=128, help="samples per row of these tables (standard error .04 at 128)")
    group.add_argument("--save_minutes", type=float, default=10, help="minutes between checkpoints, where tables are rarer")
    group.add_argument("--bench", action="store_true", help="train nothing: time a step, and tell FLOP/s, share of the GPU's peak, memory")
    group.add_argument("--resume", action="store_true", help="go on from --out; flags not given again are those of the checkpoint")


def check_training_flags(args):
    """ValueError with one line for what argparse can't see of them."""
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes} must be more than 0")
    if min(args.steps, args.accumulate, args.eval_every, args.eval_samples) < 1:
        raise ValueError("--steps, --accumulate, --eval_every and --eval_samples must all be at least 1")


def share_out(args, *names):
    """Settle --accumulate for as many processes as there are; ValueError if it doesn't divide the flags of these names."""
    world = place()[1]
    args.accumulate = world if args.accumulate == 1 else args.accumulate
    for name in names:
        if args.accumulate % world or getattr(args, name) % args.accumulate:
            raise ValueError(f"--accumulate {args.accumulate} must divide --{name} {getattr(args, name)} and be a multiple of the {world} processes")


def restore(nets, ckpt, device):
    """Go on where a checkpoint stopped: weights, optimisers, random numbers. ValueError if it is of another shape."""
    try:
        for name, net in nets.items():
            net.load_state_dict(ckpt[name])
    except (KeyError, RuntimeError, ValueError):
        raise ValueError("the checkpoint was made with another --objective, --muon or shape of network: resume it as it was begun") from None
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in ckpt["rng"]:
        torch.cuda.set_rng_state(ckpt["rng"]["cuda"])


def catch_interrupt():
    """From now on Ctrl-C only sets a flag: returns a function that tells whether it was pressed. A second one stops at once."""
    pressed = []

    def handler(signum, frame):
        pressed.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, handler)
    return lambda: bool(pressed)


def finish_row(row, step, unit, args, log, bar, table):
    """A row of the log: stop if something in it is not finite; print and add what `table` gives, if it is asked for."""
    if not math.isfinite(sum(row.values())):
        rates = " or ".join(f"--{name} (now {getattr(args, name)})" for name in ("lr", "disc_lr") if name in args)
        raise FloatingPointError(f"a loss is not finite at {unit} {step}; the last good checkpoint is kept: lower {rates} "
                                 "and start again, or --resume")
    bar.set_postfix({k: f"{row[k]:.5g}" for k in ("loss", "disc_acc", "r_ref", "r_student", "kl", "tokens_per_s") if k in row})
    shown = table() if table else {}
    if shown:
        tqdm.write(f"{unit} {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items()))
    log.write(json.dumps({"step": step} | row | shown | {"time": time.time()}) + "\n")
    log.flush()


def train(args, nets, one_step, table, ckpt, device, unit, tokens, warmup=0, every=1, **told):
    """The loop of both scripts: row = one_step(step, share) until --steps, and `warmup` before them, or --minutes are over.

    share: of the training that is done, 0 to 1. Every so many steps a row goes into the log; after each --eval_every with table(), and a
    checkpoint of nets and `told` is written. tokens: in one step. Returns the exit code.
    """
    first, before = (ckpt["step"], ckpt["seconds"]) if ckpt else (0, 0.0)
    total, interrupted, begin = None if args.minutes else warmup + args.steps, catch_interrupt(), time.perf_counter()
    (rank, world), now, saved, stop = place(), before, before, False
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(os.devnull if rank else os.path.splitext(args.out)[0] + ".jsonl", "a" if args.resume else "w") as log, \
            tqdm(itertools.count(first), initial=first, total=total, desc=told["kind"], unit=unit, mininterval=1, disable=rank > 0) as bar:
        for step in bar:
            if step >= total if total else now >= 60 * args.minutes:
                break
            row = one_step(step, max(step - warmup, 0) / args.steps if total else min(now / (60 * args.minutes), 1.0))
            done = step + 1 - warmup
            check = step + 1 == total or (done > 0 and done % args.eval_every == 0)
            look = check or (step + 1) % every == 0  # several processes agree now and then: each time they wait
            if look or world == 1:
                now, stop = over_processes({"seconds": before + time.perf_counter() - begin, "stop": interrupted()}, device).values()
            check = check or (not total and now >= 60 * args.minutes)
            if look or check:
                row = over_processes({k: float(v) for k, v in row.items()}, device)
                row["tokens_per_s"] = (step + 1 - first) * tokens / (now - before)
                finish_row(row, step + 1, unit, args, log, bar, table if check and rank == 0 else None)
            if check or stop or now - saved > 60 * args.save_minutes:
                saved = now
                if rank == 0:
                    rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})
                    save_checkpoint(args.out, step=step + 1, seconds=now, rng=rng, flags=vars(args), **told,
                                    **{name: net.state_dict() for name, net in nets.items()})
            if stop:
                break
    if rank == 0:
        again = "the same command" if getattr(args, "ablate", None) is not None else f"`python {MAKER[told['kind']]} --resume --out {args.out}`"
        print(f"\ninterrupted: step {step + 1} is saved in {args.out}; go on with {again}" if stop else f"wrote {args.out}")
    return 130 if stop else None


def parse_resumable(parser, kind, argv=None):
    """Parse flags; with --resume, those not given again come from the checkpoint --out. Returns (flags, checkpoint or None)."""
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    ckpt, _ = load_checkpoint(args.out, kind)
    parser.set_defaults(**ckpt["flags"] | {"out": args.out})
    return parser.parse_args(argv), ckpt


def run_script(main):
    """Run main(); what the user can mend becomes one line on stderr and exit code 2."""
    try:
        code = main()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first process may still be writing
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)  # at once: an interpreter that is torn down may be aborted by gloo's threads (seen in 1 of 24 runs)
        sys.exit(code)
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FileNotFoundError, FloatingPointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)

"""model.py - the networks, and what the scripts share: checkpoints, device, processes, stopping.

The denoiser is a bidirectional transformer. It takes no time input: how many tokens are masked
tells the noise level (arXiv 2409.02908). The method does not need this file: didi.py.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
SAVE_EVERY = 600  # seconds between checkpoints where tables are rarer


@dataclass(frozen=True)
class Config:
    """The network's shape; stored in every checkpoint."""
    vocab_size: int = 257  # V: the tokenizer's tokens; the mask is one more, id V
    length: int = 48       # L, tokens per sequence
    n_layer: int = 3
    n_head: int = 4        # H
    n_embd: int = 128      # D
    causal: bool = False   # the autoregressive baseline: position i sees 0..i only

    mask_id = property(lambda self: self.vocab_size)


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864) of x (B, H, L, D/H)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.n_head, self.causal = config.n_head, config.causal
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, h, cos, sin):
        B, L, D = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dtype = v.dtype if v.is_cuda else torch.float32  # bfloat16 attention is slow on a CPU
        with torch.autocast(h.device.type, enabled=False):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.proj(a.transpose(1, 2).reshape(B, L, D))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Denoiser(nn.Module):
    """z (B, L), values 0..V (V = mask) -> logits over the V tokens; the mask has no column."""
    bf16 = False  # autocast of matrix products; weights, residuals, softmax and losses: float32

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, L, V = config.n_embd, config.length, config.vocab_size
        self.embed = nn.Embedding(V + 1, D)  # the last row is the mask
        self.position = nn.Parameter(torch.empty(L, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(D)
        padding = -V % 64 if V > 1024 else 0  # columns that make a wide product fast, and are cut
        self.out = nn.Linear(D, V + padding, bias=False)
        half = D // config.n_head // 2
        angle = torch.outer(torch.arange(L), 1e4 ** (-torch.arange(0, 2 * half, 2) / (2 * half)))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (L, D/H/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        std = 0.57 / D ** 0.5  # .05 at D = 128: sooner off the unigram plateau; .02 at D = 768
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=std / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)

    def trunk(self, e):
        """Embedded, perhaps soft, tokens e (B, L, D) -> hidden states (B, L, D)."""
        L = e.shape[1]
        h = e + self.position[:L]
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                h = block(h, self.cos[:L], self.sin[:L])
            return self.norm(h)

    def forward(self, z, where=None):
        """Logits (B, L, V), or (n, V) at the n True positions of `where` (B, L), raw."""
        h = self.trunk(self.embed(z))
        if where is not None:
            h = h[where]  # the head, the widest matrix, runs only there
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            return self.out(h)[..., :self.config.vocab_size]


class Discriminator(nn.Module):
    """A copy of the *loaded* teacher, frozen but for its last blocks, with a spectral-norm head.

    One logit per position: log q_reference(z_t) - log q_student(z_t) at its optimum.
    """

    def __init__(self, teacher, trainable_blocks, positions="all", noise_max=1.0):
        super().__init__()
        D, first = teacher.config.n_embd, len(teacher.blocks) - trainable_blocks
        if not 0 <= first <= len(teacher.blocks):
            raise ValueError(f"--disc_blocks is at most the teacher's {len(teacher.blocks)} blocks")
        self.positions, self.noise_max = positions, noise_max  # whose logits count; trained up to
        self.body = copy.deepcopy(teacher).requires_grad_(False)
        self.body.out = nn.Identity()
        self.body.blocks[first:].requires_grad_(True)
        self.body.norm.requires_grad_(True)
        self.score = nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.GELU(),
                                   spectral_norm(nn.Linear(D, 1)))

    def forward(self, z):
        """z (B, L) -> logits (B, L)."""
        return self.score(self.body.trunk(self.body.embed(z))).squeeze(-1)

    def soft(self, z, where, probs):
        """The same with soft tokens, probs (n, V), at the n True positions of `where`."""
        e = self.body.embed(z)  # (B, L, D)
        e[where] = (probs @ self.body.embed.weight[:-1]).to(e.dtype)
        return self.score(self.body.trunk(e)).squeeze(-1)

    def enters(self, z):
        """(B, L) bool: the positions of z whose logits enter the loss and the reward."""
        return (z == self.body.config.mask_id) | (self.positions == "all")

    def knows(self, s):
        """Was it trained on states at level s? With masked positions alone it is blind at 0."""
        return s <= self.noise_max and (self.positions == "all" or s > 0)


# ------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(path, nets, **parts):
    """Write nets, {name: module or optimiser}, and parts; a kill never leaves half a checkpoint.

    Raises FloatingPointError, and keeps the old file, if a weight is not finite.
    """
    for net in nets.values() if RANK == 0 else ():
        weights = list(net.parameters()) if isinstance(net, nn.Module) else []
        if not all(bool(p.isfinite().all()) for p in weights):
            raise FloatingPointError(f"a weight is not finite: {path} stays as it was, lower --lr")
    if RANK == 0:
        states = {name: net.state_dict() for name, net in nets.items()}
        torch.save({"rng": torch.get_rng_state(), **states, **parts}, f"{path}.partial")
        os.replace(f"{path}.partial", path)


def load_checkpoint(path, kinds, device="cpu", bf16=False):
    """(checkpoint, its averaged Denoiser, frozen); executes no code from the file.

    kinds: of "teacher", "causal", "student". Raises ValueError that says what to do.
    """
    maker = "distill.py" if "student" in kinds else "train_teacher.py"
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: make it with `python {maker}`")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
        found, net = ckpt["kind"], Denoiser(Config(**ckpt["config"])).to(device)
        net.load_state_dict(ckpt["ema"])
    except Exception as e:  # a foreign file can fail in any way: OSError, EOFError, KeyError ..
        raise ValueError(f"{path} is truncated, of another version, or no checkpoint of this "
                         f"project ({type(e).__name__}): make it again") from None
    if found not in kinds:
        raise ValueError(f"{path} holds a {found}, but a {kinds[0]} is needed here")
    net.bf16 = bf16
    return ckpt, net.eval().requires_grad_(False)


def restore(nets, ckpt):
    """Load nets, {name: module or optimiser}, and the random numbers. ValueError if unfit."""
    try:
        for name, net in nets.items():
            net.load_state_dict(ckpt[name])
    except (KeyError, RuntimeError, ValueError):
        raise ValueError(f"the checkpoint's {name!r} does not fit: resume with its flags") from None
    if RANK == 0:  # other processes and GPUs begin new ones
        torch.set_rng_state(ckpt["rng"].cpu())


# -------------------------------------------------------------------------- device and processes
def setup(args):
    """(device, bf16) for --device and --bf16; joins torchrun's processes; seeds. ValueError."""
    # oneDNN keeps 1,024 kernels, one for each number of masks: 6 MB more in every update
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    cpu, fast = torch.cpu.get_capabilities(), {}  # {device: is bfloat16 fast there?}, best first
    if torch.cuda.is_available():
        fast["cuda"] = torch.cuda.get_device_capability() >= (8, 0)
    if torch.backends.mps.is_available():
        fast["mps"] = False
    fast["cpu"] = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    name = next(iter(fast)) if args.device == "auto" else args.device
    if name not in fast:
        raise ValueError(f"--device {name} is not available here: use auto or one of {[*fast]}")
    if WORLD > 1:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    return torch.device(name), fast[name] if args.bf16 is None else args.bf16


def average_gradients(net):
    """Each gradient becomes the mean of all processes' own."""
    for p in net.parameters() if WORLD > 1 else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= WORLD


def agree(*numbers):
    """The largest of each over all processes, so that they all do the same."""
    x = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------ running a script
def between(low, high, kind=float):
    """A type for argparse: numbers from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    return number


FROM_0, FROM_1 = between(0, 10 ** 9, int), between(1, 10 ** 9, int)
WEIGHT, RATE, SHARE, FRACTION = (between(*at) for at in ((0, 1e6), (1e-9, 1e6), (0, 1), (1e-6, 1)))


def share_out(name, args):
    """--NAME of one part of a batch in one process. ValueError if it isn't a whole number."""
    parts = args.accumulate * WORLD
    if getattr(args, name) % parts:
        raise ValueError(f"--{name} must be a multiple of --accumulate times processes, {parts}")
    return getattr(args, name) // parts


def share_done(args, updates, seconds):
    """How much of the training is done, 0 to 1: of --minutes if they are given, or of --updates."""
    if args.minutes is not None:
        return min(seconds / (60 * args.minutes), 1.0)
    return min(max(updates, 0) / args.updates, 1.0)


def open_log(args):
    """The log beside --out, made new or, with --resume, continued. ValueError for a folder."""
    if os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} is a folder: name a file in it, such as student.pt")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    path = os.devnull if RANK > 0 else args.out.removesuffix(".pt") + ".jsonl"
    return open(path, "a" if args.resume else "w", encoding="utf-8")


def log_row(log, bar, row, show=False):
    """Log a dict of numbers; show it. Raises FloatingPointError if one is not finite."""
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"a number is not finite at step {row['step']}: lower --lr")
    log.write(json.dumps(row) + "\n")
    log.flush()
    few = [name for name in row if show or name in ("loss", "nelbo", "disc_acc", "spread", "kl")]
    text = ", ".join(f"{name} {row[name]:.4g}" for name in few)
    (bar.write if show else bar.set_postfix_str)(text)


def stop_requested():
    """From now on Ctrl-C and SIGTERM let the step end: a function, 0 until then, 130 or 143."""
    seen = [0]

    def handler(number, frame):
        seen.append(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: seen[-1]


def run_script(main):
    """Run main() and exit with its code; what the user can mend is one line on stderr and 2."""
    try:
        code = main()
        if code and RANK == 0:
            print(f"\nstopped, all is saved: go on with python {' '.join(sys.argv)} --resume")
        if WORLD > 1:
            dist.barrier()  # the first process may still be writing
            os._exit(code or 0)  # an interpreter torn down may be aborted by gloo's threads
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    except KeyboardInterrupt:
        code = 130
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook goes on
    sys.exit(code)

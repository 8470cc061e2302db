"""model.py - the networks; below the double rule, what all scripts share.

The denoiser is a bidirectional transformer. It takes no time input: the number of masks tells it
the noise level (arXiv 2409.02908). The method in didi.py does not need this file.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Config:
    """Describe the network's shape and how it writes; every checkpoint stores it.

    One made before it had an order is read as of random order, in even steps.
    """
    vocab_size: int = 257  # the tokenizer's tokens, without the mask
    length: int = 48       # L, tokens per sequence
    n_layer: int = 3
    n_head: int = 4        # H
    n_embd: int = 128      # D
    causal: bool = False   # the autoregressive baseline: position i sees 0..i only
    pads: bool = False     # sequences are short texts, padded with the tokenizer's last token
    framed: bool = False   # packed text; every sequence begins and ends with that token
    order: str = "random"  # of revealing, see didi.reveal_times
    exponent: float = 1.0  # of the time grid, see didi.time_grid

    @property
    def mask_id(self):
        return self.vocab_size

    @property
    def pad_id(self):
        """Return the token that pads short texts, or -1 if text is packed."""
        return self.vocab_size - 1 if self.pads else -1

    def sampling(self, order=None):
        """Return {"order", "exponent"} for the functions of didi.py: the model's own if order is
        None or its own, else that order on the even time grid."""
        if order in (None, self.order):
            return {"order": self.order, "exponent": self.exponent}
        return {"order": order, "exponent": 1.0}


def rotate(x, cos, sin):
    """Return x (B, H, L, D/H) with rotary position embedding (arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.causal = config.causal
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)

    def forward(self, h, cos, sin):
        B, L, D = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, L, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        dtype = v.dtype if v.is_cuda else torch.float32  # bfloat16 attention is slow on a CPU
        with torch.autocast(h.device.type, enabled=False):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

        h = h + self.proj(a.transpose(1, 2).reshape(B, L, D))
        return h + self.down(F.gelu(self.up(self.norm2(h)), approximate="tanh"))


class Denoiser(nn.Module):
    """Map z (B, L) to logits over the V tokens, all except the mask and the pad.

    A causal model also predicts the pad: the first one ends the text. The buffer `lengths` (L + 1,)
    is the distribution of text lengths: a text's length is drawn first.
    """
    bf16 = False  # autocast matrix products; weights, residuals, softmax and losses stay float32

    def __init__(self, config):
        super().__init__()
        D, L = config.n_embd, config.length
        V = config.vocab_size
        if config.pads and not config.causal:
            V = config.pad_id
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + 1, D)  # the last row is the mask
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D, V)

        half = D // config.n_head // 2
        angle = torch.outer(torch.arange(L), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (L, D/H/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        # every length is L, until train_teacher.py fills it
        self.register_buffer("lengths", F.one_hot(torch.tensor(L), L + 1).float())

        std = 0.57 / D ** 0.5  # .05 at D = 128 leaves the unigram plateau sooner; .02 at D = 768
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # these add to the residual stream
                nn.init.normal_(p, std=std / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)

    def trunk(self, h):
        """Return hidden states (B, L, D) for embedded, perhaps soft, tokens h (B, L, D)."""
        L = h.shape[1]
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                h = block(h, self.cos[:L], self.sin[:L])
            return self.norm(h)

    def forward(self, z, where=...):  # ...: everywhere
        """Return logits (n, V) at the n True positions of `where` (B, L), or all (B, L, V)."""
        h = self.trunk(self.embed(z))[where]
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            return self.out(h)

    def draw_lengths(self, n):
        """Draw n lengths (n,) from those of the training texts."""
        return torch.multinomial(self.lengths, n, replacement=True)

    def start(self, lengths):
        """Return the states (n, L) that texts of `lengths` (n,) start from: masks, then pads."""
        after = torch.arange(self.config.length, device=lengths.device) >= lengths[:, None]
        return torch.where(after, self.config.pad_id, self.config.mask_id)


class Discriminator(nn.Module):
    """Score each position: a copy of the trained teacher with a new, spectrally normalised head.

    Only its last blocks, its norm and the head train. Without label smoothing the optimal logit is
    log q_reference(z_t) - log q_student(z_t).
    """

    def __init__(self, teacher, trainable_blocks=0):
        super().__init__()
        D = teacher.config.n_embd
        first = max(len(teacher.blocks) - trainable_blocks, 0)
        self.body = copy.deepcopy(teacher).requires_grad_(False)
        self.body.out = nn.Identity()
        self.body.blocks[first:].requires_grad_(True)
        self.body.norm.requires_grad_(True)
        self.score = nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.GELU(),
                                   spectral_norm(nn.Linear(D, 1)))

    def forward(self, z, where=None, probs=None):
        """Return logits (B, L) for z (B, L); probs (n, V), if given, are soft tokens that replace
        those at the n True positions of `where`."""
        e = self.body.embed(z)  # (B, L, D)
        if where is not None:
            e[where] = probs @ self.body.embed.weight[:probs.shape[1]]
        return self.score(self.body.trunk(e)).squeeze(-1)


# ===================================================== what all scripts share, whatever the method
def make_parser(doc):
    """Return a parser whose help shows every default and whose errors are one line."""
    return argparse.ArgumentParser(
        description=doc, usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def between(low, high, kind=float):
    """Return an argparse type that accepts numbers from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return kind(text)

    return number


COUNT = between(0, 10 ** 9, int)
NATURAL = between(1, 10 ** 9, int)
POSITIVE = between(1e-9, 1e6)
FRACTION = between(0, 1)


def add_device_flags(p):
    """Add the flags of every command that runs a network."""
    add = p.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="use bfloat16 for matrix products; None: if the hardware is fast at it")
    add("--seed", type=COUNT, default=0, help="random seed; on a CPU it repeats a run exactly")


def add_run_flags(p, out, eval_every):
    """Add the flags that both training scripts share."""
    add = p.add_argument_group("run").add_argument
    add("--minutes", type=POSITIVE,
        help="train for this long, not for --updates; the schedule is fitted to it")
    add("--accumulate", type=NATURAL, default=1,
        help="split each batch into this many parts to save memory")
    add("--eval_every", type=NATURAL, default=eval_every, help="updates between tables")
    add("--out", default=out, help="checkpoint, written with each table; its log is the .jsonl")
    add("--resume", action="store_true", help="continue --out with its flags; new flags win")
    add_device_flags(p)


def parse_run(p, argv, preset):
    """Return the flags and the checkpoint to start from: an empty one, or with --resume that of
    --out, whose flags are then the defaults. `preset`, what --paper or --size sets, wins over them.
    """
    p.set_defaults(**preset)
    args = p.parse_args(argv)
    if not args.resume:
        return args, {"step": 0, "seconds": 0.0, "log": []}

    ckpt, _ = load(args.out)
    flags = ckpt["flags"] | {"out": args.out}
    p.set_defaults(updates=None)
    if p.parse_args(argv).updates is not None:
        flags["minutes"] = None  # a new limit wins
    p.set_defaults(**flags | preset)
    return p.parse_args(argv), ckpt


# ------------------------------------------------------------------------ device and processes
def setup(args):
    """Join the processes of torchrun; return (device, bf16) for --device and --bf16.

    Raises ValueError for --device cuda without a GPU.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # else 6 MB more in each update
    cpu = torch.cpu.get_capabilities()
    fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))  # at bfloat16
    name = "cpu"
    if args.device != "cpu" and torch.cuda.is_available():
        name = "cuda"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        fast = torch.cuda.get_device_capability() >= (8, 0)
    elif args.device == "cuda":
        raise ValueError("--device cuda: torch finds no GPU; use --device cpu")

    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    bf16 = fast if args.bf16 is None else args.bf16
    return torch.device(name), bf16


def per_part(name, args):
    """Return --NAME per part and process. Raises ValueError if it cannot be divided evenly."""
    parts = args.accumulate * WORLD
    if getattr(args, name) % parts:
        raise ValueError(f"--{name} must be a multiple of {parts}, --accumulate times processes")
    return getattr(args, name) // parts


def fraction_done(args, updates, seconds):
    """Return the fraction of training done, by --minutes if given, else by --updates."""
    if args.minutes is not None:
        return seconds / (60 * args.minutes)
    return updates / args.updates


def agree(*numbers):
    """Return the maximum of each number over all processes, so that they all do the same."""
    x = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


def descend(net, lr, *optimizers):
    """Take an optimiser step with gradients averaged over all processes and clipped to norm 1.

    Sets the learning rate, returns the norm before clipping and clears the gradients.
    """
    if WORLD > 1:
        for p in net.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= WORLD
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return norm.item()


# -------------------------------------------------------------------------- log and checkpoints
def make_bar(args, total, step):
    """Return a progress bar from step to total, or without an end if --minutes ends the run."""
    if args.minutes is not None:
        total = None
    return tqdm(desc=args.out, total=total, initial=step, disable=RANK > 0)


def log(rows, bar, row, table=False):
    """Append a row, a dict of numbers, to the log and show it; a table is printed above the bar.

    Raises FloatingPointError if a number is not finite.
    """
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"the run has diverged at step {row['step']}: lower --lr")
    rows.append(row)
    text = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    if table:
        bar.write(text)
    else:
        bar.set_postfix_str(text, refresh=False)
        bar.update()


def save(path, rows, nets, **about):
    """Write a checkpoint, whole or not at all, and its log, the rows, next to it as .jsonl.

    `nets` maps names to modules and optimisers. Raises FloatingPointError if a weight of the
    network or of its average is not finite; the old file then stays.
    """
    if RANK > 0:
        return
    states = {name: net.state_dict() for name, net in nets.items()}
    for x in (*states["model"].values(), *states["ema"].values()):
        if not x.isfinite().all():
            raise FloatingPointError(f"a weight is not finite: lower --lr; {path} stays as it was")

    ckpt = about | states | {"log": rows, "rng": torch.get_rng_state()}
    torch.save(ckpt, f"{path}.partial")
    os.replace(f"{path}.partial", path)
    with open(path.removesuffix(".pt") + ".jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def load(path, *kinds, device="cpu", bf16=False):
    """Return (checkpoint, its averaged Denoiser, frozen); run no code from the file.

    Raises ValueError unless its weights have the shapes that its config implies and, if `kinds`
    are given ("teacher", "causal", "student"), it is one of them.
    """
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
        net = Denoiser(Config(**ckpt["config"])).to(device)
        net.load_state_dict(ckpt["ema"])
        kind = ckpt["kind"]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: make it first, see README.md") from None
    except Exception as e:  # a foreign file can fail in any way
        raise ValueError(f"{path} is not a checkpoint of this version ({type(e).__name__}): "
                         "delete it and make it again") from None

    if kinds and kind not in kinds:
        raise ValueError(f"{path} holds a {kind}, but a {kinds[0]} is needed here")
    net.bf16 = bf16
    return ckpt, net.eval().requires_grad_(False)


def restore(ckpt, path, nets):
    """Load modules and optimisers, by name, and the state of the random numbers.

    Raises ValueError if one does not fit, such as a moment whose shape is not its weight's.
    """
    try:
        for name, net in nets.items():
            net.load_state_dict(ckpt[name])
            if isinstance(net, torch.optim.Optimizer):
                for p, moments in net.state.items():
                    if any(x.dim() and x.shape != p.shape for x in moments.values()):
                        raise ValueError
        torch.set_rng_state(ckpt["rng"].cpu())
        torch.cuda.manual_seed(ckpt["step"])  # a GPU must not draw the first numbers again
    except Exception:
        raise ValueError(f"{path} does not fit these flags: resume with its own flags") from None


def check_output(path, kind, data):
    """Make the folder of `path`, and refuse to write over a checkpoint of another kind or corpus.

    Raises ValueError if `path` exists, but is no checkpoint of this kind and corpus folder `data`.
    """
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    if os.path.exists(path):
        ckpt, _ = load(path, kind)
        if ckpt["flags"]["data"] != data:
            raise ValueError(f"{path} was trained on {ckpt['flags']['data']}: delete it, or name "
                             "another --out")


# -------------------------------------------------------------------------------- how a run ends
def catch_signals():
    """Return a list, [0] at first, to which SIGINT, SIGTERM and SIGHUP append their numbers.

    So the step under way can end. The same signal again ends the process; ignored ones stay so.
    """
    signals = [0]

    def handler(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
    return signals


def run(main):
    """Call main(), which returns the signal that stopped it or 0, and exit; print a user's mistake
    in one line and exit with code 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ?
    code = 0
    try:
        stop = main()
        if stop:
            print("stopped and saved: continue with the same command and --resume")
            code = 128 + stop
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

"""model.py - the networks, and what the training scripts share: checkpoints, processes.

The denoiser is a bidirectional transformer. It takes no time input: how many tokens are masked
tells the noise level (arXiv 2409.02908). The method does not need this file: didi.py.
"""
import copy
import importlib.util
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from data import files

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


@dataclass(frozen=True)
class Config:
    """The network's shape; stored in every checkpoint."""
    vocab_size: int = 257  # the tokenizer's tokens; the mask is one more
    length: int = 48       # L, tokens per sequence
    n_layer: int = 3
    n_head: int = 4        # H
    n_embd: int = 128      # D
    causal: bool = False   # the autoregressive baseline: position i sees 0..i only
    pads: bool = False     # rows of short texts, each filled up with the tokenizer's last token
    framed: bool = False   # packed text whose every sequence begins and ends with that token
    mask_id = property(lambda self: self.vocab_size)
    pad_id = property(lambda self: self.vocab_size - 1 if self.pads else -1)  # -1: there is none
    at_once = property(lambda self: max(1, 2 ** 29 // (self.length * self.vocab_size)))  # in 8 GB
    part = property(lambda self: max(1, 2 ** 25 // self.vocab_size))  # rows of V numbers in 128 MiB
    row_length = property(lambda self: self.length if self.pads else 0)  # as of a data.corpus


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
    """z (B, L) -> logits over V tokens: all but the mask, and, unless it is causal, the pad.

    The buffer `lengths` (L + 1,) is the distribution of the texts' lengths: the length comes first.
    """
    bf16 = False  # autocast of matrix products; weights, residuals, softmax and losses float32
    def __init__(self, config):
        super().__init__()
        self.config, D, L = config, config.n_embd, config.length
        V = config.pad_id if config.pads and not config.causal else config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + 1, D)  # the last row is the mask
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, V)
        half = D // config.n_head // 2
        angle = torch.outer(torch.arange(L), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (L, D/H/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("lengths", F.one_hot(torch.tensor(L), L + 1).float())
        std = 0.57 / D ** 0.5  # .05 at D = 128: sooner off the unigram plateau; .02 at D = 768
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # what is added to the residual
                nn.init.normal_(p, std=std / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)

    def trunk(self, h):
        """Embedded, perhaps soft, tokens h (B, L, D) -> hidden states (B, L, D)."""
        L = h.shape[1]
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                h = block(h, self.cos[:L], self.sin[:L])
            return self.norm(h)

    def hidden(self, z, where=...):
        """Hidden states (B, L, D) of z (B, L), or (n, D) at the n True positions of `where`."""
        return self.trunk(self.embed(z))[where]

    def head(self, h):
        """Hidden states (.., D) -> raw logits (.., V): the widest matrix."""
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.bf16):
            return self.out(h)

    def in_parts(self, function, *rows):
        """function(*rows), tensors (n, ..) of tensors (n, ..), that makes tables (n, V): large ones
        part by part, and again in backward instead of kept."""
        if len(rows[0]) <= self.config.part:
            return function(*rows)
        parts = zip(*(of.split(self.config.part) for of in rows))
        results = [checkpoint(function, *part, use_reentrant=False) for part in parts]
        return [torch.cat(of) for of in zip(*results)]

    def forward(self, z, where=...):
        """Logits (B, L, V), or (n, V) at the n True positions of `where` (B, L), raw."""
        return self.head(self.hidden(z, where))

    def draw_lengths(self, n):
        """(n,) random lengths, distributed as the training texts'."""
        return torch.multinomial(self.lengths, n, replacement=True)

    def start(self, lengths):
        """States (n, L) to sample texts of these lengths (n,) from: masks, after them pads."""
        after = torch.arange(self.config.length, device=lengths.device) >= lengths[:, None]
        return torch.where(after, self.config.pad_id, self.config.mask_id)


class Discriminator(nn.Module):
    """A copy of the *loaded* teacher, frozen but for its last blocks, with a spectral-norm head:
    one logit per position, log q_reference(z_t) - log q_student(z_t) at its optimum."""
    def __init__(self, teacher, trainable_blocks=0):
        super().__init__()
        D, first = teacher.config.n_embd, max(len(teacher.blocks) - trainable_blocks, 0)
        self.body = copy.deepcopy(teacher).requires_grad_(False)
        self.body.out = nn.Identity()
        self.body.blocks[first:].requires_grad_(True)
        self.body.norm.requires_grad_(True)
        self.score = nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.GELU(),
                                   spectral_norm(nn.Linear(D, 1)))

    def forward(self, z, where=None, probs=None):
        """z (B, L) -> logits (B, L); tokens at n True positions of `where` soft: probs (n, V)."""
        e = self.body.embed(z)  # (B, L, D)
        if where is not None:
            e[where] = (probs @ self.body.embed.weight[:probs.shape[1]]).to(e.dtype)
        return self.score(self.body.trunk(e)).squeeze(-1)

    def enters(self, z):
        """(B, L) bool: the positions of z whose logits enter the loss and the reward: no pads."""
        return z != self.body.config.pad_id


# ------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(path, nets, **parts):
    """Write nets, {name: module or optimiser}, and parts, whole or not at all. Raises OSError, and
    FloatingPointError if a weight is not finite; then the old file stays."""
    if RANK > 0:
        return
    for net in nets.values():
        if isinstance(net, nn.Module) and not all(p.isfinite().all() for p in net.parameters()):
            raise FloatingPointError(f"a weight is not finite: {path} stays as it was, lower --lr")
    states = {name: net.state_dict() for name, net in nets.items()}
    with files.whole_file(path, "wb") as f:
        torch.save({"rng": torch.get_rng_state(), **states, **parts}, f)


def load_checkpoint(path, kinds, device="cpu", bf16=False):
    """(checkpoint, its averaged Denoiser, frozen); executes no code from the file. It is one of the
    kinds: "teacher", "causal", "student". Raises ValueError that says what to do."""
    maker = "distill.py" if "student" in kinds else "train_teacher.py"
    ckpt = files.read_checkpoint(path, device, lambda c: Denoiser(Config(**c)), maker)
    if ckpt["kind"] not in kinds:
        raise ValueError(f"{path} holds a {ckpt['kind']:.20}, but a {kinds[0]} is needed here")
    net = Denoiser(Config(**ckpt["config"])).to(device)
    net.load_state_dict(ckpt["ema"])
    net.bf16 = bf16
    return ckpt, net.eval().requires_grad_(False)


def restore(nets, ckpt, path):
    """Load nets, {name: module or optimiser}, and the random numbers. Returns (step, seconds).

    Without a checkpoint nothing, and (0, 0.0). Raises ValueError if they are of another shape.
    """
    if ckpt is None:
        return 0, 0.0
    files.fill(nets, ckpt, path)
    torch.cuda.manual_seed(ckpt["step"])  # GPUs begin new random numbers, and so do ..
    if RANK == 0:  # .. other processes
        torch.set_rng_state(ckpt["rng"].cpu())
    return ckpt["step"], ckpt["seconds"]


def compile_trunk(net, asked):
    """Let torch compile the net's trunk if that was asked for, and on CUDA where Triton is."""
    if asked or net.lengths.is_cuda and importlib.util.find_spec("triton") is not None:
        net.trunk = torch.compile(net.trunk)


def average_gradients(net):
    """Each gradient becomes the mean of all processes' own."""
    for p in net.parameters() if WORLD > 1 else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= WORLD


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, parameter by parameter, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

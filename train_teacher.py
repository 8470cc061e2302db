"""train_teacher.py - the data, and the teacher: a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                 # 4-6 minutes on two CPU cores, downloads nothing
    python train_teacher.py --resume        # go on after Ctrl-C or a crash
    python train_teacher.py --causal        # the autoregressive baseline: same network, data, tokens and budget

The embedded default corpus is Python function signatures found on this very machine, in the sources of the standard library,
torch and numpy: about 30,000 unique lines such as `def sample(self, n=1) -> Tensor:`. It costs no download, and the quality of
samples can be checked without a second model: does the Python parser accept them? Lines are bytes, padded to a fixed length L
with an end-of-sequence token, so the model also learns to stop.

Left out on purpose: dropout and weight decay (runs this short underfit), time conditioning (see model.py).
"""
import argparse
import ast
import copy
import importlib.util
import json
import math
import os
import re
import sysconfig
import time
import warnings
import zlib

import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from model import (Config, Denoiser, add_machine_flags, catch_interrupt, interrupted_at, parse_resumable, pick_device, rng_state,
                   run_script, save_checkpoint, set_rng_state, update_ema)


# -------------------------------------------------------------------------------------------------- data and tokenizer
def make_tokenizer():
    """Bytes as a tiktoken.Encoding: 256 byte ranks and <|endoftext|> = 256, which also pads."""
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 256})


def is_signature(text):
    """Does Python's parser accept this line, given a body, as one function definition?"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text + " pass").body
        return len(body) == 1 and isinstance(body[0], ast.FunctionDef)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def find_signatures(length):
    """Sorted unique lines `def NAME(...)...:` of < length ASCII bytes in the sources of the standard library, torch and numpy.

    Tests' functions and the few lines that are no Python (templates in strings) are left out. Reads about 5,000 files in 3 s.
    """
    pattern = re.compile(r"^[ \t]*(def [A-Za-z_]\w*\(.*\).*:)(?:[ \t]*\.\.\.)?[ \t]*$", re.MULTILINE | re.ASCII)
    roots = [sysconfig.get_paths()["stdlib"]]
    roots += [os.path.dirname(importlib.util.find_spec(name).origin) for name in ("torch", "numpy")]
    lines = set()
    for root in roots:
        for folder, inner, files in os.walk(root):
            inner[:] = [d for d in inner if d not in ("site-packages", "dist-packages", "__pycache__")]
            for name in files:
                if name.endswith((".py", ".pyi")):
                    with open(os.path.join(folder, name), encoding="utf-8", errors="ignore") as f:
                        lines.update(m[1] for m in pattern.finditer(f.read()))
    return sorted(s for s in lines if len(s) < length and s.isascii() and not s.startswith("def test") and is_signature(s))


def encode(texts, tokenizer, length):
    """Texts -> (N, L) token ids on the CPU, padded with end-of-sequence. All must be shorter than L tokens or exactly L."""
    eos = tokenizer.eot_token
    ids = [tokenizer.encode(s) for s in texts]
    return torch.tensor([i + [eos] * (length - len(i)) for i in ids])


def decode(x, tokenizer):
    """Token ids (B, L) -> B texts, each up to its first end-of-sequence."""
    eos = tokenizer.eot_token
    return [tokenizer.decode(row[:row.index(eos)] if eos in row else row) for row in x.tolist()]


def load_data(length, tokenizer):
    """{"train": (N, L), "val": (M, L), "known": set of training texts}; one line in 20 validates, chosen by a hash of the line."""
    lines = find_signatures(length)
    split = {"train": [], "val": []}
    for s in lines:
        split["val" if zlib.crc32(s.encode()) % 20 == 0 else "train"].append(s)
    if min(map(len, split.values())) == 0:
        raise ValueError(f"no corpus: {len(lines)} function signatures of less than {length} bytes found on this machine; "
                         "raise --length, or install Python with its sources")
    return {"train": encode(split["train"], tokenizer, length), "val": encode(split["val"], tokenizer, length),
            "known": set(split["train"])}


def quality(x, tokenizer, known):
    """What can be said of samples x (B, L) without another model: a dict of averages over the B samples.

    valid: share the Python parser accepts; distinct: unique texts / B; novel: share not in the training set `known`;
    length: mean characters up to end-of-sequence; entropy: unigram entropy within a text, nats, averaged.
    """
    texts = decode(x, tokenizer)

    def unigram_entropy(s):
        return -sum(s.count(c) / len(s) * math.log(s.count(c) / len(s)) for c in set(s))
    return {"valid": sum(map(is_signature, texts)) / len(texts), "distinct": len(set(texts)) / len(texts),
            "novel": sum(s not in known for s in texts) / len(texts), "length": sum(map(len, texts)) / len(texts),
            "entropy": sum(map(unigram_entropy, texts)) / len(texts)}


# -------------------------------------------------------------------------------------- the autoregressive baseline and judge
def causal_nll(model, x):
    """-log p(x_i | x_1 .. x_{i-1}) (B, L), nats, of x (B, L) under a causal model; the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=model.config.mask_id)
    return F.cross_entropy(model(z).float().transpose(1, 2), x, reduction="none")


def until_end(x, eos):
    """True at the tokens of x (B, L) that count: up to and including the first end-of-sequence. (B, L)"""
    return ((x == eos).cumsum(1) - (x == eos).long()) == 0


@torch.no_grad()
def autoregress(model, B, eos, temperature=1.0, on_step=None):
    """Write B sequences token by token with a KV cache: x (B, L), padded with eos, and nfe (B,), network calls until each ended."""
    x = torch.full((B, model.config.length), eos, device=model.position.device)
    token, cache, nfe = torch.full_like(x[:, 0], model.config.mask_id), model.new_cache(B), torch.zeros_like(x[:, 0])
    going = torch.ones_like(token, dtype=torch.bool)
    for i in range(x.shape[1]):
        log_p = F.log_softmax(model.head(model.trunk_next(token, i, cache)).float() / temperature, -1)  # (B, V)
        token = torch.where(going, didi.draw(log_p)[:, 0], eos)
        x[:, i] = token
        nfe += going
        going &= token != eos
        if on_step:
            on_step(x[:, :i + 1])
        if not going.any():
            break
    return x, nfe


# ---------------------------------------------------------------------------------------------------------------- training
def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Train the teacher, a masked-diffusion language model.")
    g = p.add_argument_group("model (defaults by device: CPU, then CUDA or MPS)")
    g.add_argument("--causal", action="store_true", help="train the autoregressive baseline, which is the judge too, instead of a teacher")
    g.add_argument("--length", type=int, default=48, help="L, tokens per sequence")
    g.add_argument("--n_layer", type=int, help="transformer blocks [3; 6]")
    g.add_argument("--n_head", type=int, help="attention heads [4; 8]")
    g.add_argument("--n_embd", type=int, help="D, width [128; 256]")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help="optimiser steps [1700; 6000]")
    g.add_argument("--batch", type=int, help="B, sequences per step [64; 256]")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW: warm-up, then cosine to a tenth of it")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--ema", type=float, default=0.995, help="decay of the weight average that is sampled and distilled")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the trunk [no; yes on CUDA]")
    g = p.add_argument_group("run")
    add_machine_flags(g)
    g.add_argument("--out", help="checkpoint; the log lies beside it as .jsonl [out/teacher.pt, with --causal out/causal.pt]")
    g.add_argument("--eval_every", type=int, default=425, help="steps between validations, each of which saves a checkpoint")
    g.add_argument("--eval_samples", type=int, default=128, help="samples per validity estimate (standard error .04 at 128)")
    g.add_argument("--resume", action="store_true", help="go on from --out; flags not given again are those of the checkpoint")
    kind = "causal" if p.parse_known_args(argv)[0].causal else "teacher"
    p.set_defaults(out=f"out/{kind}.pt")
    args, ckpt = parse_resumable(p, kind, argv)
    device = pick_device(args)
    small, large = {"n_layer": 3, "n_head": 4, "n_embd": 128, "steps": 1700, "batch": 64, "compile": False}, \
                   {"n_layer": 6, "n_head": 8, "n_embd": 256, "steps": 6000, "batch": 256, "compile": device.type == "cuda"}
    for name, value in (small if device.type == "cpu" else large).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.steps, args.batch, args.length, args.n_layer, args.n_head, args.n_embd, args.eval_every, args.eval_samples) < 1:
        raise ValueError("--steps, --batch, --length, --n_layer, --n_head, --n_embd and --eval_* must all be at least 1")
    return args, device, kind, ckpt


def learning_rate(step, args):
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    ramp = min((step + 1) / args.warmup, 1) if args.warmup else 1
    return args.lr * ramp * (0.55 + 0.45 * math.cos(math.pi * min(step / args.steps, 1)))


@torch.no_grad()
def validate(model, data, tokenizer, args, device):
    """NELBO (of a causal model the likelihood itself) and perplexity on the validation split, and validity of samples; always with
    the same random numbers."""
    mask_id = model.config.mask_id
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        x = data["val"][:1024].to(device)
        nelbo = sum(losses(model, part)[0].item() * len(part) for part in x.split(args.batch)) / len(x)
        row = {"val_nelbo": nelbo, "val_ppl": math.exp(nelbo)}
        for steps in (args.length,) if args.causal else (8, 64):
            z = torch.full((args.eval_samples, args.length), mask_id, device=device)
            x = autoregress(model, len(z), tokenizer.eot_token)[0] if args.causal else didi.sample(model, z, steps, mask_id)[0]
            row[f"valid@{steps}"] = quality(x, tokenizer, data["known"])["valid"]
    return row


def losses(model, x):
    """Of x (B, L): the bound to report, nats per token, and the loss to train on, which is less noisy in a short run."""
    if model.config.causal:
        return (causal_nll(model, x).mean(),) * 2
    return didi.nelbo(model, x, model.config.mask_id)


def main(argv=None):
    args, device, kind, ckpt = parse_flags(argv)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    data = load_data(args.length, tokenizer)
    train = data["train"].to(device)
    config = Config(tokenizer.n_vocab, args.length, args.n_layer, args.n_head, args.n_embd, args.causal)
    model = Denoiser(config).to(device)
    model.bf16 = args.bf16
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type != "mps")
    first = 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        set_rng_state(ckpt["rng"], device)
        first = ckpt["step"]
    if args.compile:
        model.trunk = torch.compile(model.trunk)
    n = sum(p.numel() for p in model.parameters())
    print(f"{len(train)} training lines, {len(data['val'])} validation lines, L = {args.length}; {n / 1e6:.2f} M parameters on {device}, "
          f"{'bfloat16' if args.bf16 else 'float32'}")

    def save(step):
        save_checkpoint(args.out, config, kind=kind, model=model.state_dict(), ema=ema.state_dict(), step=step,
                        optimizer=optimizer.state_dict(), rng=rng_state(device), flags=vars(args), tokenizer="bytes")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    interrupted, begin = catch_interrupt(), time.perf_counter()
    with open(os.path.splitext(args.out)[0] + ".jsonl", "a" if ckpt else "w") as log, \
            tqdm(range(first, args.steps), initial=first, total=args.steps, desc=kind, unit="step", mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            x = train[torch.randint(len(train), (args.batch,)).to(device)]  # (B, L)
            nelbo, loss = losses(model, x)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, model, min(args.ema, (step + 1) / (step + 10)))
            check = (step + 1) % args.eval_every == 0 or step + 1 == args.steps
            if step % 10 == 9 or check:
                row = {"step": step + 1, "loss": loss.item(), "nelbo": nelbo.item(), "grad_norm": norm.item(),
                       "tokens_per_s": (step + 1 - first) * x.numel() / (time.perf_counter() - begin)}
                if not math.isfinite(row["loss"] + row["grad_norm"]):
                    raise FloatingPointError(f"the loss is not finite at step {step + 1}; the last good checkpoint is kept: "
                                             f"lower --lr (now {args.lr}) and start again, or --resume")
                bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_s']:.0f}")
                if check:
                    row.update(validate(ema, data, tokenizer, args, device))
                    tqdm.write(f"step {step + 1}: " + ", ".join(f"{k} {row[k]:.3f}" for k in row if k.startswith("val")))
                    save(step + 1)
                log.write(json.dumps(row) + "\n")
                log.flush()
            if interrupted():
                save(step + 1)
                return print(interrupted_at("train_teacher.py" + " --causal" * args.causal, step + 1, args.out)) or 130
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)

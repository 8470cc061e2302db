"""train_teacher.py - the data, and the teacher: a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                 # 4-6 minutes on two CPU cores, downloads nothing
    python train_teacher.py --resume        # go on after Ctrl-C or a crash
    python train_teacher.py --causal        # the autoregressive baseline: same network, data, tokens and budget
    python train_teacher.py --data F.fasta  # proteins instead; also .fasta.gz, .fasta.xz, .fa ..

The embedded default corpus is Python function signatures found on this very machine, in the sources of the standard library,
torch and numpy: about 30,000 unique lines such as `def sample(self, n=1) -> Tensor:`. It costs no download, and the quality of
samples can be checked without a second model: does the Python parser accept them? Lines are bytes, padded to a fixed length L
with an end-of-sequence token, so the model also learns to stop.

Left out on purpose: dropout and weight decay (runs this short underfit), time conditioning (see model.py).
"""
import argparse
import ast
import collections
import copy
import gzip
import importlib.util
import json
import lzma
import math
import os
import re
import sysconfig
import time
import warnings
import zlib

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from model import (Config, Denoiser, add_machine_flags, catch_interrupt, interrupted_at, parse_resumable, pick_device, rng_state,
                   run_script, save_checkpoint, set_rng_state, update_ema)


# -------------------------------------------------------------------------------------------------- data and tokenizer
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # the 20, and X for anything else


def make_tokenizer(kind):
    """A tiktoken.Encoding of single "bytes", or of amino acids for "protein", and <|endoftext|>, which also pads."""
    tokens = {"bytes": [bytes([i]) for i in range(256)], "protein": [c.encode() for c in AMINO_ACIDS]}[kind]
    return tiktoken.Encoding(kind, pat_str=r"[\s\S]", mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": len(tokens)})


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


def read_fasta(path):
    """The unique amino-acid sequences of a FASTA file, sorted; compressed ones (.gz, .xz) too.

    Lines may be wrapped, lower case, comments (;) or end with the stop *; letters beyond the 20 amino acids become X. ValueError
    names the line that is no FASTA.
    """
    opener, sequences = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], open), []
    try:
        with opener(path, "rt", encoding="ascii") as f:
            for number, line in enumerate(f, 1):
                line = line.strip()
                letters = line.upper().removesuffix("*")
                if line.startswith(">"):
                    sequences.append([])
                elif letters and not line.startswith(";"):
                    if not sequences or not letters.isalpha():
                        raise ValueError(f"{path}, line {number} is no FASTA: {line[:40]!r}: give sequences of letters, each below a "
                                         "line that begins with >")
                    sequences[-1].append("".join(c if c in AMINO_ACIDS else "X" for c in letters))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as e:
        raise ValueError(f"--data {path!r} cannot be read as FASTA ({e}): name a FASTA file") from None
    return sorted({"".join(parts) for parts in sequences} - {""})


def load_data(source, length):
    """The corpus as a dict; source is None for function signatures or {"path": FASTA file, "long": "drop" or "crop"}.

    "kind": bytes or protein; "tokenizer"; "train" (N, L) and "val" (M, L); "known": the training texts as a set; "shown": the
    metrics of `quality` that training logs. One text in 20 validates, chosen by a hash of the text. ValueError if there is no corpus.
    """
    if source:
        texts = read_fasta(source["path"])
        fit = sorted({s[:length] for s in texts} if source["long"] == "crop" else {s for s in texts if len(s) <= length})
        print(f"{source['path']}: {len(texts)} unique sequences, {sum(len(s) > length for s in texts)} of them longer than {length}: "
              f"{source['long']}ped, {len(fit)} left")
        kind, shown, texts = "protein", ("entropy", "length", "ks", "js2"), fit
    else:
        kind, shown, texts = "bytes", ("valid", "entropy", "length"), find_signatures(length)
    split = {"train": [], "val": []}
    for s in texts:
        split["val" if zlib.crc32(s.encode()) % 20 == 0 else "train"].append(s)
    if min(map(len, split.values())) == 0:
        raise ValueError(f"no corpus: {len(texts)} texts of at most {length} characters found "
                         f"{'in ' + source['path'] if source else 'on this machine'}: raise --length, or "
                         f"{'name another file' if source else 'install Python with its sources'}")
    tokenizer = make_tokenizer(kind)
    return {"kind": kind, "tokenizer": tokenizer, "known": set(split["train"]), "shown": shown,
            **{name: encode(texts, tokenizer, length) for name, texts in split.items()}}


# ----------------------------------------------------------------------------------------------------------------- metrics
def unigram_entropy(s):
    """Entropy of the characters within one text, nats."""
    return -sum(s.count(c) / len(s) * math.log(s.count(c) / len(s)) for c in set(s))


def quality(x, data):
    """What can be said of samples x (B, L) without another model: a dict of averages over the B samples.

    distinct: unique texts / B; novel: share not in the training set; length: mean characters up to end-of-sequence; entropy:
    unigram entropy within a text, nats. Signatures: valid: share the Python parser accepts. Proteins: see `protein_quality`.
    """
    texts = decode(x, data["tokenizer"])
    more = protein_quality(texts, data) if data["kind"] == "protein" else \
        {"valid": sum(map(is_signature, texts)) / len(texts), "novel": sum(s not in data["known"] for s in texts) / len(texts)}
    return more | {"distinct": len(set(texts)) / len(texts), "length": sum(map(len, texts)) / len(texts),
                   "entropy": sum(map(unigram_entropy, texts)) / len(texts)}


def kmers(s, k):
    """The overlapping k-mers of a text."""
    return [s[i:i + k] for i in range(len(s) - k + 1)]


def divergence(a, b):
    """Jensen-Shannon divergence, nats, between two collections.Counter taken as distributions."""
    def kl(p, q):
        return sum(n / p.total() * math.log(n / p.total() / q[c]) for c, n in p.items())
    mean = {c: (a[c] / a.total() + b[c] / b.total()) / 2 for c in a.keys() | b.keys()}
    return (kl(a, mean) + kl(b, mean)) / 2


def protein_quality(texts, data, k=5, same=0.5, window=12, low=2.2):
    """Of B sequences against the validation split: a dict.

    ks: two-sample Kolmogorov-Smirnov statistic of the lengths; js1, js2: Jensen-Shannon divergence of amino-acid and 2-mer
    composition, nats; novel: share of sequences that have fewer than half of their 5-mers in common with every one training
    sequence; low: share with a window of 12 residues of less than 2.2 bits of entropy (the trigger of SEG, Wootton 1993).
    """
    if "val_texts" not in data:  # made once: the validation texts, and which training sequences have a k-mer
        data["val_texts"], data["index"] = decode(data["val"], data["tokenizer"]), collections.defaultdict(set)
        for i, s in enumerate(data["known"]):
            for word in kmers(s, k):
                data["index"][word].add(i)

    def best_match(s):
        words = set(kmers(s, k))
        hits = collections.Counter(i for word in words for i in data["index"].get(word, ()))
        return max(hits.values(), default=0) / max(len(words), 1)

    def composition(texts, k):
        return collections.Counter(word for s in texts for word in kmers(s, k))
    ours, theirs = (np.sort([len(s) for s in t]) for t in (texts, data["val_texts"]))
    at = np.arange(max(ours[-1], theirs[-1]) + 1)
    ks = np.abs(np.searchsorted(ours, at, "right") / len(ours) - np.searchsorted(theirs, at, "right") / len(theirs)).max()
    return {"ks": float(ks), "novel": sum(best_match(s) < same for s in texts) / len(texts),
            **{f"js{n}": divergence(composition(texts, n) or collections.Counter("-"), composition(data["val_texts"], n)) for n in (1, 2)},
            "low": sum(any(unigram_entropy(w) < low * math.log(2) for w in kmers(s, window)) for s in texts) / len(texts)}


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
    g = p.add_argument_group("data")
    g.add_argument("--data", help="a FASTA file of proteins (.gz, .xz too) [Python function signatures found on this machine]")
    g.add_argument("--long", choices=("drop", "crop"), default="drop", help="FASTA: what to do with sequences longer than --length")
    g = p.add_argument_group("model (defaults by device: CPU, then CUDA or MPS)")
    g.add_argument("--causal", action="store_true", help="train the autoregressive baseline, which is the judge too, instead of a teacher")
    g.add_argument("--length", type=int, help="L, tokens per sequence [48; FASTA: 128]")
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
    args.length = args.length or (128 if args.data else 48)
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
def validate(model, data, args, device):
    """NELBO (of a causal model the likelihood itself) and perplexity on the validation split, and a metric of samples; always with
    the same random numbers."""
    mask_id = model.config.mask_id
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        x = data["val"][:1024].to(device)
        nelbo = sum(losses(model, part)[0].item() * len(part) for part in x.split(args.batch)) / len(x)
        row = {"val_nelbo": nelbo, "val_ppl": math.exp(nelbo)}
        for steps in (args.length,) if args.causal else (8, 64):
            z = torch.full((args.eval_samples, args.length), mask_id, device=device)
            x = autoregress(model, len(z), data["tokenizer"].eot_token)[0] if args.causal else didi.sample(model, z, steps, mask_id)[0]
            row[f"val_{data['shown'][0]}@{steps}"] = quality(x, data)[data["shown"][0]]
    return row


def losses(model, x):
    """Of x (B, L): the bound to report, nats per token, and the loss to train on, which is less noisy in a short run."""
    if model.config.causal:
        return (causal_nll(model, x).mean(),) * 2
    return didi.nelbo(model, x, model.config.mask_id)


def main(argv=None):
    args, device, kind, ckpt = parse_flags(argv)
    torch.manual_seed(args.seed)
    source = {"path": os.path.abspath(args.data), "long": args.long} if args.data else None
    data = load_data(source, args.length)
    train = data["train"].to(device)
    config = Config(data["tokenizer"].n_vocab, args.length, args.n_layer, args.n_head, args.n_embd, args.causal)
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
    print(f"{len(train)} training texts, {len(data['val'])} validation texts, L = {args.length}; {n / 1e6:.2f} M parameters on {device}, "
          f"{'bfloat16' if args.bf16 else 'float32'}")

    def save(step):
        save_checkpoint(args.out, config, kind=kind, model=model.state_dict(), ema=ema.state_dict(), step=step,
                        optimizer=optimizer.state_dict(), rng=rng_state(device), flags=vars(args), tokenizer=data["kind"], data=source)
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
                    row.update(validate(ema, data, args, device))
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

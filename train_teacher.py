"""train_teacher.py - the data, and the teacher: a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                 # 1.5 to 3 minutes on two CPU cores, downloads nothing
    python train_teacher.py --resume        # go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=8 train_teacher.py --size small --data openwebtext     # several GPUs
    python train_teacher.py --causal        # the autoregressive baseline: same network, data, tokens and budget
    python train_teacher.py --data F.fasta  # proteins instead; also .fasta.gz, .fasta.xz, .fa ..
    python train_teacher.py --data PATH     # text: a file or a folder of .txt, .txt.gz, .txt.xz, or of token shards *.bin
    python train_teacher.py --data openwebtext --shards 1   # the paper's corpus, or the first of its 21 files

The embedded default corpus is Python function signatures found on this very machine, in the sources of the standard library,
torch and numpy: about 30,000 unique lines such as `def sample(self, n=1) -> Tensor:`. It costs no download, and the quality of
samples can be checked without a second model: does the Python parser accept them? Lines are bytes, padded to a fixed length L
with an end-of-sequence token, so the model also learns to stop.

Left out on purpose: dropout and weight decay (runs this short underfit), time conditioning (see model.py).
"""
import argparse
import array
import ast
import collections
import contextlib
import copy
import glob
import gzip
import http.client
import importlib.util
import itertools
import json
import lzma
import math
import os
import re
import sys
import sysconfig
import tarfile
import urllib.request
import warnings
import zlib

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from model import (Config, Denoiser, add_training_flags, average, bench, check_training_flags, join_processes, parallel, parse_resumable, parts,
                   pick_device, place, restore, run_script, share_out, train, update_ema, write_json)


# -------------------------------------------------------------------------------------------------- data and tokenizer
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # the 20, and X for anything else


def make_tokenizer(kind):
    """A tiktoken.Encoding: single "bytes", or amino acids for "protein", with <|endoftext|>, which also pads; or "gpt2".

    ValueError if GPT-2's files are neither on this machine nor to be had.
    """
    if kind == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests' errors
            raise ValueError(f"GPT-2's tokens cannot be loaded ({type(e).__name__}): run once with a network, or set TIKTOKEN_CACHE_DIR to "
                             "a folder that has tiktoken's files") from None
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
    """Token ids (B, L) -> B texts, each up to its first end-of-sequence; of "gpt2", whose documents are packed, all of it."""
    eos = end_token(tokenizer)
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
    """The corpus as a dict; source is None for function signatures, or {"kind", "path", ..}, see `data_source`.

    "kind": bytes, protein or gpt2; "tokenizer"; "train" and "val" for `draw_rows`; "shown": the metrics of `quality` that training
    logs. Of short texts one in 20 validates, chosen by a hash; "known": the training texts as a set. ValueError if there is no corpus.
    """
    if source and source["kind"] == "random":
        tokens = [np.random.default_rng(0).integers(50257, size=1 << 20).astype("<u2")]
        return {"kind": "gpt2", "tokenizer": argparse.Namespace(name="gpt2", n_vocab=50257), "train": tokens, "val": tokens}
    if source and source["kind"] == "gpt2":
        tokenizer = make_tokenizer("gpt2")
        return {"kind": "gpt2", "tokenizer": tokenizer, "shown": ("entropy", "distinct"), **load_shards(source, tokenizer, length)}
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


def data_source(args):
    """What --data means, for the checkpoint: None (signatures), a FASTA file, or text with the folder of its token shards.

    Random tokens of GPT-2's vocabulary, where nothing but the speed of a network for text is asked for.
    """
    if args.data is None:
        return {"kind": "random"} if args.bench and args.size in ("mini", "small") else None
    if re.search(r"\.(fasta|fa|faa)(\.gz|\.xz)?$", args.data):
        return {"kind": "protein", "path": os.path.abspath(args.data), "long": args.long}
    path = args.data if args.data == "openwebtext" else os.path.abspath(args.data)
    if path != "openwebtext" and not os.path.exists(path):
        raise ValueError(f"--data {args.data!r}: no such file or folder")
    return {"kind": "gpt2", "path": path, "cache": os.path.abspath(args.cache), "shards": args.shards}


def draw_rows(tokens, n, length, device):
    """n random training sequences (n, L): rows of a tensor (N, L), or windows of a list of memory-mapped shards."""
    if torch.is_tensor(tokens):
        return tokens[torch.randint(len(tokens), (n,)).to(tokens.device)]
    windows = torch.tensor([max(len(shard) - length + 1, 0) for shard in tokens])
    which = torch.multinomial(windows.double(), n, replacement=True)
    start = (torch.rand(n, dtype=torch.float64) * windows[which]).long()
    rows = torch.from_numpy(np.stack([tokens[k][i:i + length] for k, i in zip(which, start)]).astype(np.int64))
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def held_out(tokens, n, length):
    """n validation sequences (n, L), or as many as there are: random rows of a tensor, or windows of shards side by side."""
    if torch.is_tensor(tokens):
        return tokens[torch.randperm(len(tokens))[:n]]
    rows = (shard[i:i + length] for shard in tokens for i in range(0, len(shard) - length + 1, length))
    return torch.from_numpy(np.stack(list(itertools.islice(rows, n))).astype(np.int64))


# ------------------------------------------------------------------------------ text: documents -> token shards on the disk
MAGIC, VERSION = 20240520, 1  # of the format that llm.c and modded-nanogpt use
OPENWEBTEXT = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/b3166bc19fbae165867d7f4965dc52279d1e9f40/"
               "urlsf_subset{:02d}.tar", 21)


def read_shard(path):
    """Token ids of a shard, a memory-mapped uint16 array: 256 little-endian int32 (magic, version, number of tokens) come first."""
    head = np.fromfile(path, "<i4", 256)
    if len(head) < 256 or tuple(head[:2]) != (MAGIC, VERSION) or os.path.getsize(path) != 1024 + 2 * int(head[2]):
        raise ValueError(f"{path} is no whole token shard: make it again, or take it out of the folder")
    return np.memmap(path, "<u2", "r", offset=1024) if head[2] else np.empty(0, "<u2")


def write_shard(path, tokens):
    """Write token ids as a shard, by way of a temporary file."""
    with open(f"{path}.partial", "wb") as f:
        np.array([MAGIC, VERSION, len(tokens)] + [0] * 253, "<i4").tofile(f)
        tokens.astype("<u2").tofile(f)
    os.replace(f"{path}.partial", path)


def text_files(path):
    """The text files that a path means: itself, or those in the folder. ValueError if there are none."""
    names = [path] if os.path.isfile(path) else sorted(glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True))
    names = [n for n in names if os.path.isfile(n) and (n == path or re.search(r"\.txt(\.gz|\.xz)?$", n))]
    if not names:
        raise ValueError(f"--data {path!r}: no such file, or no *.txt, *.txt.gz, *.txt.xz or *.bin in that folder")
    return names


def documents(names):
    """(text, whole) of UTF-8 files, a document after each line <|endoftext|> and at the end of a file; long ones come in pieces,
    of which only the last is `whole`. ValueError if a file is not UTF-8 or damaged."""
    for name in names:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(name)[1], open)
        try:
            with opener(name, "rt", encoding="utf-8") as f:
                text, end = "", True
                for line in iter(lambda: f.readline(1 << 16), ""):
                    end = line.strip() == "<|endoftext|>"
                    text += line * (not end)
                    if end or len(text) > 1 << 16:
                        yield text, end
                        text = ""
                if not end:
                    yield text, True
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as e:
            raise ValueError(f"--data: {name} cannot be read as UTF-8 text ({e})") from None


def download(url, path):
    """Fetch url to path, going on where an earlier try stopped. ValueError that says what to put where, if that fails."""
    if os.path.exists(path):
        return
    done = os.path.getsize(f"{path}.partial") if os.path.exists(f"{path}.partial") else 0
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=60) as r, \
                open(f"{path}.partial", "ab" if r.status == 206 else "wb") as f, \
                tqdm(desc=os.path.basename(path), initial=f.tell(), total=f.tell() + int(r.headers["Content-Length"]), unit="B", unit_scale=True) as bar:
            while block := r.read(1 << 20):
                f.write(block)
                bar.update(len(block))
        if bar.n != bar.total:
            raise OSError(f"{bar.n} of {bar.total} bytes came")
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", None) != 416 or e.headers["Content-Range"] != f"bytes */{done}":  # else nothing was left to fetch
            raise ValueError(f"{url} cannot be fetched ({e}): run again to go on, or put the file at {path}") from None
    os.replace(f"{path}.partial", path)


def openwebtext(folder, shards):
    """(text, True) of the documents of OpenWebText: tars of xz-compressed tars of texts, streamed, nothing is unpacked to the disk."""
    url, count = OPENWEBTEXT
    for k in range(min(shards or count, count)):
        path = os.path.join(folder, os.path.basename(url.format(k)))
        download(url.format(k), path)
        try:
            with tarfile.open(path) as outer:
                for member in outer:
                    if member.isfile() and member.name.endswith(".xz"):
                        with tarfile.open(fileobj=outer.extractfile(member), mode="r:xz") as inner:
                            for text in inner:
                                if text.isfile():
                                    yield inner.extractfile(text).read().decode("utf-8", errors="replace"), True
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            raise ValueError(f"{path} is damaged ({e}): delete it and run again") from None


def prepare(source, tokenizer, shard_size=10 ** 8, batch=128):
    """Tokenize the documents of `source` into shards under its cache folder, unless they are there; returns that folder.

    One piece of text in 200 validates. Holds one shard in memory. What the shards were made from is written last, so that a
    half-made folder is never taken for a whole one.
    """
    name = re.sub(r"\W+", "_", os.path.basename(source["path"]))
    folder = os.path.join(source["cache"], f"{name}_{zlib.crc32(source['path'].encode()):08x}")
    os.makedirs(folder, exist_ok=True)
    owt = source["path"] == "openwebtext"
    files = [] if owt else text_files(source["path"])
    origin = {"path": source["path"], "shards": source["shards"] if owt else None, "tokens": "gpt2",
              "files": [[n, os.path.getsize(n), os.stat(n).st_mtime_ns] for n in files]}
    note = os.path.join(folder, "source.json")
    if os.path.exists(note) and json.load(open(note)) == origin:
        return folder
    for old in glob.glob(os.path.join(glob.escape(folder), "*.bin")) + [note] * os.path.exists(note):
        os.remove(old)
    tokens, made = {"train": array.array("H"), "val": array.array("H")}, {"train": 0, "val": 0}

    def flush(split):
        write_shard(os.path.join(folder, f"{split}_{made[split]:06d}.bin"), np.array(tokens[split]))
        made[split], tokens[split] = made[split] + 1, array.array("H")
    pieces = enumerate(openwebtext(folder, source["shards"]) if owt else documents(files))
    with tqdm(desc=f"tokenizing {source['path']}", unit="token", unit_scale=True) as bar:
        while group := list(itertools.islice(pieces, batch)):
            for (i, (_, whole)), ids in zip(group, tokenizer.encode_ordinary_batch([text for _, (text, _) in group], num_threads=os.cpu_count())):
                split = "val" if i % 200 == 0 else "train"
                tokens[split].extend(ids + [tokenizer.eot_token] * whole)
                bar.update(len(ids) + whole)
                if len(tokens[split]) >= shard_size:
                    flush(split)
    for split in tokens:
        if tokens[split]:
            flush(split)
    write_json(note, origin)
    return folder


def load_shards(source, tokenizer, length):
    """{"train": [arrays], "val": [arrays]} of token shards, ready-made ones (names with val validate) or those of `prepare`."""
    ready = glob.glob(os.path.join(glob.escape(source["path"]), "*.bin"))
    names = sorted(ready or glob.glob(os.path.join(glob.escape(prepare(source, tokenizer)), "*.bin")))
    split = {part: [read_shard(n) for n in names if ("val" in os.path.basename(n)) == (part == "val")] for part in ("train", "val")}
    for part, shards in split.items():
        if not any(len(shard) >= length for shard in shards):
            raise ValueError(f"--data {source['path']!r} has {sum(map(len, shards))} tokens for {part}, fewer than a sequence of {length}: "
                             "give more text, or lower --length")
    return split


# ----------------------------------------------------------------------------------------------------------------- metrics
def end_token(tokenizer):
    """The token that ends a text, or -1 where documents are packed and nothing ends."""
    return -1 if tokenizer.name == "gpt2" else tokenizer.eot_token


def unigram_entropy(s):
    """Entropy of the characters (or tokens) within one text, nats."""
    return -sum(n / len(s) * math.log(n / len(s)) for n in collections.Counter(s).values())


def quality(x, data):
    """What can be said of samples x (B, L) without another model: a dict of averages over the B samples.

    distinct: unique texts / B; novel: share not in the training set; length: mean characters up to end-of-sequence; entropy:
    unigram entropy within a text, nats (of text: of its tokens). Signatures: valid: share the Python parser accepts. Proteins: see
    `protein_quality`.
    """
    texts = decode(x, data["tokenizer"])
    if data["kind"] == "gpt2":
        return {"distinct": len(set(texts)) / len(texts), "entropy": sum(map(unigram_entropy, x.tolist())) / len(texts)}
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
def causal_nll(model, x, mask_id):
    """-log p(x_i | x_1 .. x_{i-1}) (B, L), nats, of x (B, L) under a causal model; the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=mask_id)
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
# --size: the embedded default in minutes on two CPU cores; a good model in 10-20 minutes of a modern GPU; the paper's network.
SIZES = {"nano": {"n_layer": 3, "n_head": 4, "n_embd": 128, "batch": 64, "steps": 1700, "lr": 2e-3, "warmup": 100, "text_length": 128},
         "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch": 256, "steps": 10000, "lr": 1e-3, "warmup": 300, "text_length": 256},
         "small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "batch": 512, "steps": 100000, "lr": 3e-4, "warmup": 2000,
                   "text_length": 1024}}


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Train the teacher, a masked-diffusion language model.")
    g = p.add_argument_group("data")
    g.add_argument("--data", help="FASTA file; text file or folder (.gz, .xz too); folder of *.bin; openwebtext [Python signatures]")
    g.add_argument("--shards", type=int, help="openwebtext: how many of its 21 files [all]")
    g.add_argument("--cache", default="out/data", help="text: folder for its tokens")
    g.add_argument("--long", choices=("drop", "crop"), default="drop", help="FASTA: what to do with sequences longer than --length")
    g = p.add_argument_group("model")
    g.add_argument("--causal", action="store_true", help="train the autoregressive baseline, which is the judge too, instead of a teacher")
    g.add_argument("--size", choices=SIZES, help="defaults for all that is in [] below [nano on a CPU, else mini]")
    g.add_argument("--length", type=int, help="L, tokens per sequence [signatures: 48; FASTA: 128; text: 128; 256; 1024]")
    g.add_argument("--n_layer", type=int, help="transformer blocks [3; 6; 12]")
    g.add_argument("--n_head", type=int, help="attention heads [4; 6; 12]")
    g.add_argument("--n_embd", type=int, help="D, width [128; 384; 768]")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help="optimiser steps [1700; 10000; 100000]")
    g.add_argument("--batch", type=int, help="B, sequences per step [64; 256; 512]")
    g.add_argument("--lr", type=float, help="peak learning rate of AdamW: warm-up, then cosine to a tenth of it [2e-3; 1e-3; 3e-4]")
    g.add_argument("--muon", action=argparse.BooleanOptionalAction, default=False,
                   help="Muon for the blocks' matrices, AdamW for the rest; wants --lr four times as high")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up [100; 300; 2000]")
    g.add_argument("--ema", type=float, default=0.995, help="decay of the weight average that is sampled and distilled")
    g = p.add_argument_group("run")
    g.add_argument("--out", help="checkpoint; the log lies beside it as .jsonl [out/teacher.pt, with --causal out/causal.pt]")
    add_training_flags(g, 425, "steps")
    kind = "causal" if p.parse_known_args(argv)[0].causal else "teacher"
    p.set_defaults(out=f"out/{kind}.pt")
    args, ckpt = parse_resumable(p, kind, argv)
    device = pick_device(args)
    size, source = SIZES[args.size or ("nano" if device.type == "cpu" else "mini")], data_source(args)
    length = {None: 48, "protein": 128}.get(source and source["kind"], size["text_length"])
    for name, value in (size | {"length": length}).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    check_training_flags(args)
    if min(args.batch, args.length, args.n_layer, args.n_head, args.n_embd, args.warmup + 1) < 1:
        raise ValueError("--batch, --length, --n_layer, --n_head and --n_embd must all be at least 1, --warmup at least 0")
    return args, device, kind, source, ckpt


@torch.no_grad()
def validate(model, data, args, device):
    """NELBO (of a causal model the likelihood itself) and perplexity on the validation split, and a metric of samples; always with
    the same random numbers."""
    mask_id = model.config.mask_id
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        x = (data["val"][:1024] if data["kind"] != "gpt2" else held_out(data["val"], 64, args.length)).to(device)
        nelbo = sum(losses(model, model.config, part)[0].item() * len(part) for part in x.split(args.batch // args.accumulate)) / len(x)
        row = {"val_nelbo": nelbo, "val_ppl": math.exp(nelbo)}
        for steps in (args.length,) if args.causal else (8, 64):
            z = torch.full((args.eval_samples, args.length), mask_id, device=device)
            x = autoregress(model, len(z), end_token(data["tokenizer"]))[0] if args.causal else didi.sample(model, z, steps, mask_id)[0]
            row[f"val_{data['shown'][0]}@{steps}"] = quality(x, data)[data["shown"][0]]
    return row


def losses(net, config, x, size=None):
    """Of x (B, L): the bound to report, nats per token, and the loss to train on, which is less noisy in a short run."""
    if config.causal:
        return (causal_nll(net, x, config.mask_id).mean(),) * 2
    return didi.nelbo(net, x, config.mask_id, size=size)


def train_step(nets, net, loss_of, train, step, share, args):
    """One optimiser step of loss_of(net, ..); share: of the whole training that is done. Returns what to log, as tensors."""
    model, optimizers, rows = nets["model"], [nets[name] for name in ("optimizer", "muon") if name in nets], []
    warm = min((step + 1) / max(args.warmup, 1), 1)  # linear warm-up, then cosine decay to a tenth of the peak
    for group in [group for o in optimizers for group in o.param_groups]:
        group["lr"] = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * share))
    for _, n in parts(net, args, step):
        x = draw_rows(train, args.batch // args.accumulate, args.length, model.position.device)  # (B, L)
        bound, loss = loss_of(net, model.config, x, didi.most_masks(*x.shape) if args.compile else None)
        (loss / n).backward()
        rows.append({"loss": loss.detach(), "nelbo": bound.detach()})
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for o in optimizers:
        o.step()
        o.zero_grad()
    update_ema(nets["ema"], model, min(args.ema, (step + 1) / (step + 10)))
    return average(rows) | {"grad_norm": norm}


def networks(args, config, device, ckpt):
    """{"model", "ema", "optimizer", with --muon "muon"}, new or as the checkpoint left them."""
    model = Denoiser(config).to(device)
    model.bf16 = args.bf16
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if args.muon and p.dim() == 2 and name.startswith("blocks") else rest).append(p)
    nets = {"model": model, "ema": copy.deepcopy(model),
            "optimizer": torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type != "mps")}
    if args.muon:  # its steps are scaled to be as long as AdamW's: one learning rate serves both
        nets["muon"] = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    if ckpt:
        restore(nets, ckpt, device)
    return nets


def load_once(source, length, device):
    """load_data in every process, in the first one before the others: what has to be downloaded or tokenized is made once.

    Training texts go to the device; a corpus of packed tokens stays on the disk.
    """
    rank, world = place()
    if rank > 0:
        torch.distributed.barrier()
    with contextlib.redirect_stdout(None if rank else sys.stdout):
        data = load_data(source, length)
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    return data if data["kind"] == "gpt2" else data | {"train": data["train"].to(device)}


def main(argv=None):
    args, device, kind, source, ckpt = parse_flags(argv)
    device = join_processes(device)
    share_out(args, "batch")
    torch.manual_seed(args.seed)
    data = load_once(source, args.length, device)
    config = Config(data["tokenizer"].n_vocab, args.length, args.n_layer, args.n_head, args.n_embd, args.causal)
    nets = networks(args, config, device, ckpt)
    net = parallel(nets["model"])
    # one graph of network, head and loss, in which every shape is fixed
    loss_of = torch.compile(losses, fullgraph=place()[1] == 1, dynamic=False) if args.compile else losses
    if place()[0] == 0:
        size = [f"{sum(map(len, d)) / 1e6:.1f} M tokens" if data["kind"] == "gpt2" else f"{len(d)} texts" for d in (data["train"], data["val"])]
        print(f"{size[0]} to train, {size[1]} to validate, L = {args.length}; {sum(p.numel() for p in nets['model'].parameters()) / 1e6:.2f} M "
              f"parameters on {device}, {'bfloat16' if args.bf16 else 'float32'}")

    def one_step(step, share):
        return train_step(nets, net, loss_of, data["train"], step, share, args)
    if args.bench:
        return bench(lambda: one_step(0, 0.0), args.batch * args.length, device)

    def table():
        return validate(nets["ema"], data, args, device)
    return train(args, nets, one_step, table, ckpt, device, "step", args.batch * args.length, every=10,
                 kind=kind, config=config, tokenizer=data["kind"], data=source)


if __name__ == "__main__":
    run_script(main)

"""corpus.py - a corpus is a folder of files, made by `python -m data.MAKER`, then only read.

    train.bin, val.bin  token ids in llm.c's format: 256 little-endian int32 (magic, version, number
                        of tokens), then uint16; a large corpus goes on in train_001.bin, ..
    meta.json           {"maker", "tokenizer", "length", "framed", "made_from"}

length is that of every row, where rows are short texts padded with the end token, or 0 where the
texts are packed: one after the other, a training sequence being any window; if framed is true, with
an end token first and last, as the published MDLM was trained. The folder appears whole or not at
all, so several processes may make it at once: the first one's stays.
"""
import collections
import contextlib
import functools
import gzip
import importlib
import itertools
import json
import lzma
import math
import os
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

DEFAULT = "out/signatures"  # makes itself where it is missing
MAKERS = ("signatures", "text", "fasta")  # modules whose `quality` a corpus may name
META = {"maker": str, "tokenizer": str, "length": int, "framed": bool, "made_from": dict}
MAGIC, VERSION, SHARD = 20240520, 1, 10 ** 9  # of llm.c's format; tokens in a file, about
GPT2_FILES = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",  # as tiktoken calls them
              "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}
TOKENS = {"bytes": 257, "protein": 22, "gpt2": 50257}  # of each tokenizer, its end included
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # the 20, and X for anything else


# ------------------------------------------------------------------------------------- tokenizers
@functools.lru_cache
def make_tokenizer(name):
    """A tiktoken.Encoding: single "bytes", "protein" (amino acids), each with an end; or "gpt2".

    Raises ValueError if GPT-2's files are neither on this machine nor to be had.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever the network's library raises
            names = " and ".join(f"{file} named {sha1}" for file, sha1 in GPT2_FILES.items())
            raise ValueError(f"GPT-2's tokens cannot be loaded ({type(e).__name__}): run once with "
                             f"a network, or set TIKTOKEN_CACHE_DIR to a folder with {names}, see "
                             "data/README.md") from None
    letters = {"bytes": [bytes([i]) for i in range(256)],
               "protein": [letter.encode() for letter in AMINO_ACIDS]}
    if name not in letters:
        raise ValueError(f"there is no tokenizer {name!r}: choose bytes, protein or gpt2")
    ranks = {token: i for i, token in enumerate(letters[name])}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def decode(x, tokenizer, packed):
    """Token ids x (B, L) -> B texts: each up to its first end, or of packed text all of it."""
    encoding, texts = make_tokenizer(tokenizer), []
    for row in x.tolist():
        if not packed and encoding.eot_token in row:
            row = row[:row.index(encoding.eot_token)]
        texts.append(encoding.decode(row))
    return texts


def until_end(x, eos):
    """(B, L) bool: the tokens of x (B, L) that count, up to and including the first eos."""
    ends = x == eos
    return ends.cumsum(1) - ends.long() == 0


# ---------------------------------------------------------------------------------------- reading
@dataclass(frozen=True, eq=False)
class Corpus:
    """What `load` returns; train and val are lists of memory-mapped uint16 arrays."""
    folder: str
    maker: str
    tokenizer: str
    length: int  # of a row, or 0: packed
    made_from: dict
    train: list
    val: list
    framed: bool = False  # packed text: do sequences begin and end with an end token?

    @property
    def packed(self):
        """Are sequences windows of packed text, rather than rows?"""
        return self.length == 0

    @functools.cached_property
    def known(self):
        """The training texts of a corpus of rows, a set."""
        return set(self.rows(self.train))

    @property
    def pad_id(self):
        """The token that fills rows up to their length, or -1 where texts are packed."""
        return -1 if self.packed else make_tokenizer(self.tokenizer).eot_token

    def length_shares(self, L):
        """(L + 1,): the share of training sequences that have so many tokens of text."""
        if self.packed:
            return torch.nn.functional.one_hot(torch.tensor(L), L + 1).float()
        counts = np.zeros(L + 1)
        for tokens in self.train:
            lengths = (tokens.reshape(-1, L) != self.pad_id).sum(1)
            counts += np.bincount(lengths, minlength=L + 1)
        return torch.from_numpy(counts / counts.sum()).float()

    @functools.cached_property
    def val_texts(self):
        """The validation texts of a corpus of rows."""
        return self.rows(self.val)

    @functools.cached_property
    def val_lengths(self):
        """The lengths of the validation texts of a corpus of rows, characters."""
        return [len(text) for text in self.val_texts]

    def rows(self, files):
        """All texts of a split of a corpus of rows."""
        count = self.count(files, self.length, self.length)
        return self.decode(self.sequences(files, np.arange(count), self.length, self.length))

    def count(self, files, stride, L):
        """How many sequences of L tokens a split has. ValueError if it has none."""
        total = int(window_counts(files, stride, L).sum())
        if total == 0:
            raise ValueError(f"{self.folder} has {sum(map(len, files))} tokens to train or to "
                             f"validate, too few for a sequence of {L}: make it from more text, "
                             "or lower --length")
        return total

    def batch(self, n, L, device="cpu"):
        """n random training sequences (n, L), int64: rows, or windows of packed text."""
        stride = 1 if self.packed else self.length
        index = torch.randint(self.count(self.train, stride, L), (n,))
        x = self.frame(self.sequences(self.train, index.numpy(), stride, L))
        if torch.device(device).type == "cuda":
            x = x.pin_memory()
        return x.to(device, non_blocking=True)

    def held_out(self, n, L):
        """n validation sequences (n, L), or as many as there are: always the same, at random."""
        stride = L if self.packed else self.length
        total = self.count(self.val, stride, L)
        index = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]
        return self.frame(self.sequences(self.val, index.numpy(), stride, L))

    def sequences(self, files, index, stride, L):
        """`windows`, all of known tokens: no file was looked at as a whole before. ValueError."""
        x, most = windows(files, index, stride, L), TOKENS[self.tokenizer]
        if x.numel() and x.max() >= most:
            raise ValueError(f"{self.folder} has token {x.max()}, but {self.tokenizer} has {most} "
                             "tokens: make the corpus again")
        return x

    def frame(self, x):
        """Sequences x (n, L) with their first and last token made ends, if framed; in place."""
        if self.framed:
            x[:, 0] = x[:, -1] = make_tokenizer(self.tokenizer).eot_token
        return x

    def check_fits(self, path, tokenizer, length, framed):
        """Is the network in a file one for such sequences? ValueError that says what is not."""
        fault = None
        if tokenizer != self.tokenizer:
            fault = f"{self.tokenizer} tokens for its {tokenizer}: make it again"
        elif length != self.length:
            fault = "rows of another length: make it again"
        elif framed and not self.framed:
            fault = "no ends: make it with --framed"
        elif self.framed and not framed:
            fault = "ends: make it without --framed"
        if fault:
            raise ValueError(f"{self.folder} does not fit {path}: it has {fault}, or name another "
                             "corpus with --data")

    def decode(self, x):
        """Token ids (B, L) -> B texts."""
        return decode(x, self.tokenizer, self.packed)

    def quality(self, x):
        """What the maker can say of samples x (B, L) without another model: {name: value}."""
        return importlib.import_module(f"data.{self.maker}").quality(x, self)

    def shown(self, x):
        """The few of these measures that training tables show."""
        names = importlib.import_module(f"data.{self.maker}").SHOWN
        return {name: value for name, value in self.quality(x).items() if name in names}

    @torch.no_grad()
    def measures(self, model, sample, each, num=128):
        """{"NAME@STEPS": value} to show of `num` samples for each number of steps.

        sample(model, z, steps, mask_id) -> x and more; always the same random numbers.
        """
        row, device = {}, model.lengths.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(4321)
            z = model.start(model.draw_lengths(num))
            for steps in each:
                parts = z.split(model.config.at_once)
                x = [sample(model, part, steps, model.config.mask_id)[0] for part in parts]
                shown = self.shown(torch.cat(x))
                row |= {f"{name}@{steps}": value for name, value in shown.items()}
        return row


def window_counts(files, stride, L):
    """How many sequences of L tokens, `stride` apart, each file has."""
    return np.array([max(0, (len(tokens) - L) // stride + 1) for tokens in files])


def windows(files, index, stride, L):
    """The sequences of these numbers, (n,) counted over all files, as a tensor (n, L)."""
    counts = window_counts(files, stride, L)
    last = np.cumsum(counts)
    which = np.searchsorted(last, index, side="right")  # (n,): the file of each
    start = (index - (last - counts)[which]) * stride
    rows = [files[k][i:i + L] for k, i in zip(which, start)]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, L))


def load(folder):
    """The Corpus in a folder. The default one is made first where it is missing (3 s).

    Raises ValueError with the command to run where there is none, or part of it is damaged, and as
    make_tokenizer does.
    """
    if folder == DEFAULT and not os.path.exists(folder):
        importlib.import_module("data.signatures").prepare(folder)
    if os.path.isfile(folder):
        maker = "fasta" if is_fasta(folder) else "text"
        raise ValueError(f"--data {folder!r} is a file, but a corpus is a folder: run `python -m "
                         f"data.{maker} {folder}` first, which says what to give to --data")
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = {"framed": False} | json.load(f)
        corpus = Corpus(folder, **meta, train=read_split(folder, "train"),
                        val=read_split(folder, "val"))
    except FileNotFoundError:
        raise ValueError(f"no corpus at {folder!r}: make one with `python -m data.text FILE`, "
                         "data.fasta or data.openwebtext, or name another with --data") from None
    except (OSError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{folder!r} is no corpus of this project ({e}): make it again") from None
    good = {name: type(meta[name]) for name in META} == META and meta["maker"] in MAKERS
    if not good or meta["length"] < 0 or meta["tokenizer"] not in TOKENS:
        raise ValueError(f"{folder}/meta.json names an unknown maker, length, frame or tokenizer: "
                         "make it again, or add the maker to MAKERS in data/corpus.py")
    if any(len(tokens) % max(meta["length"], 1) for tokens in corpus.train + corpus.val):
        raise ValueError(f"{folder} has not all rows of the length {meta['length']} that its "
                         "meta.json names: make it again")
    make_tokenizer(corpus.tokenizer)  # or say now, not at the first table, that it cannot be had
    return corpus


def read_split(folder, split):
    """The token files of a split as memory-mapped arrays, at least one of them."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".bin"))
    names = [name for name in names if name.startswith(split)]
    if not names:
        raise FileNotFoundError
    return [read_shard(os.path.join(folder, name)) for name in names]


def read_shard(path):
    """The token ids in a file, a memory-mapped uint16 array. ValueError if it isn't whole."""
    head = np.fromfile(path, "<i4", 256)
    if len(head) < 256 or tuple(head[:2]) != (MAGIC, VERSION) or head[2] < 1:
        raise ValueError(f"{path} holds no tokens in llm.c's format: make the corpus again")
    if os.path.getsize(path) != 1024 + 2 * int(head[2]):
        raise ValueError(f"{path} is not as long as its header says: make the corpus again")
    return np.memmap(path, "<u2", "r", offset=1024)


def open_bytes(path):
    """A binary file to read; what gzip or xz has compressed, told by its first bytes, unpacked."""
    with open(path, "rb") as f:
        head = f.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head == b"\xfd7zXZ\0":
        return lzma.open(path)
    return open(path, "rb")


def is_fasta(path):
    """Does this file, perhaps compressed, begin with a > (after a byte order mark, if any)?"""
    try:
        with open_bytes(path) as f:
            return f.read(4).removeprefix(b"\xef\xbb\xbf").startswith(b">")
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile):
        return False  # whoever reads it on will say what is wrong


# ---------------------------------------------------------------------------------------- writing
def write(folder, pieces, maker, tokenizer, length, made_from, framed=False):
    """Make the corpus in `folder` from pieces, an iterable of ("train" or "val", token ids).

    Written under a temporary name and renamed: a kill, or a second process, never leaves a part
    that is taken for the whole. Returns {"train": tokens, "val": tokens}. Raises ValueError if a
    split is empty or the folder cannot be written.
    """
    counts, (parent, name) = {}, os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f"{name}.", suffix=".partial", dir=parent)
    try:
        counts = write_shards(partial, pieces)
        if not counts["train"] or not counts["val"]:
            source = made_from.get("path", folder)
            raise ValueError(f"{source!r} gives {counts['train']} tokens to train and "
                             f"{counts['val']} to validate, and both are needed: give more text")
        meta = {"maker": maker, "tokenizer": tokenizer, "length": length, "framed": framed,
                "made_from": made_from}
        with open(os.path.join(partial, "meta.json"), "w", encoding="utf-8") as f:
            json.dump(meta, f, indent=1)
        os.chmod(partial, 0o755)
        os.rename(partial, folder)  # an error if there is something
    except OSError as e:
        if not os.path.exists(os.path.join(folder, "meta.json")):  # else another process was faster
            raise ValueError(f"{folder!r} cannot be written ({e})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def write_shards(folder, pieces):
    """Stream pieces into train.bin, train_001.bin, .., val.bin, ..; returns how many tokens."""
    counts, files = collections.Counter(), {}
    with contextlib.ExitStack() as stack:
        for split, ids in pieces:
            number = counts[split] // SHARD
            name = f"{split}_{number:03d}.bin" if number else f"{split}.bin"
            if name not in files:
                files[name] = stack.enter_context(open(os.path.join(folder, name), "wb"))
                files[name].write(bytes(1024))
            files[name].write(np.asarray(ids, "<u2").tobytes())
            counts[split] += len(ids)
        for f in files.values():
            tokens = f.tell() // 2 - 512
            f.seek(0)
            f.write(np.array([MAGIC, VERSION, tokens], "<i4").tobytes())
    return counts


def write_rows(folder, texts, maker, tokenizer, length, made_from):
    """`write` of texts of at most `length` tokens; one in 20, chosen by a hash, validates."""
    split = {"train": [], "val": []}
    for text in texts:
        name = "train" if zlib.crc32(text.encode()) % 20 else "val"
        split[name].append(text)
    pieces = ((name, encode(some, tokenizer, length)) for name, some in split.items())
    return write(folder, pieces, maker, tokenizer, length, made_from)


def encode(texts, tokenizer, length):
    """N texts -> (N * length,) uint16 tokens: a row for each, padded with the end token."""
    encoding = make_tokenizer(tokenizer)
    rows = np.full((len(texts), length), encoding.eot_token, np.uint16)
    for row, text in zip(rows, texts):
        ids = encoding.encode_ordinary(text)
        row[:len(ids)] = ids
    return rows.reshape(-1)


def out_folder(path):
    """Where the corpus made from a file or folder goes if --out says nothing: out/<its stem>."""
    name = re.sub(r"\.(gz|xz)$", "", os.path.basename(os.path.abspath(path)))
    return os.path.join("out", os.path.splitext(name)[0])


def refuse_existing(folder):
    """Raises ValueError if there is something at `folder`: a maker never writes over a corpus."""
    if os.path.exists(folder):
        raise ValueError(f"{folder!r} is there already: delete it, or name another with --out")


# ----------------------------------------------------------------- measures that the makers share
def entropy(counts):
    """Entropy, nats, of a Counter as a distribution; 0 if it is empty."""
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def unigram_entropy(s):
    """Entropy of the characters (or tokens) within one text, nats."""
    return entropy(collections.Counter(s))


def ngrams(texts, n):
    """Counter of the overlapping n-grams in all texts, strings or lists of tokens, pooled."""
    return collections.Counter(itertools.chain.from_iterable(
        (tuple(text[i:i + n]) for i in range(len(text) - n + 1)) for text in texts))


def divergence(a, b):
    """Jensen-Shannon divergence, nats, of two Counters as distributions; ln 2 if one is empty."""
    if not a or not b:
        return math.log(2)
    total, n, m = 0.0, a.total(), b.total()
    for item in a | b:  # in the order of the texts, not of a set: the same sum in every process
        p, q = a[item] / n, b[item] / m
        for share in (p, q):
            if share:
                total += share / 2 * math.log(2 * share / (p + q))
    return total


def total_variation(ours, theirs):
    """Half of the summed differences of the shares in two Counters, 0 to 1."""
    n, m = ours.total(), theirs.total()
    return sum(abs(ours[key] / n - theirs[key] / m) for key in ours | theirs) / 2


def post_stratified(good, cells, theirs):
    """What the mean of `good`, a bool a text, would be if texts fell in cells as theirs (Counter).

    A cell in which there is no text counts as bad: what is avoided is not done well.
    """
    count, right = collections.Counter(cells), collections.Counter(itertools.compress(cells, good))
    return sum(theirs[c] * right[c] / count[c] for c in count) / theirs.total()


def ks(ours, theirs):
    """Kolmogorov-Smirnov statistic of two samples: the largest gap of their cumulative shares."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    at = np.concatenate((ours, theirs))
    gap = (np.searchsorted(ours, at, "right") / len(ours)
           - np.searchsorted(theirs, at, "right") / len(theirs))
    return float(np.abs(gap).max())

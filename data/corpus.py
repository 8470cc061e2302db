"""corpus.py - a corpus is a folder of files, made by `python -m data.MAKER`, then only read.

    train.bin, val.bin  token ids in llm.c's format: 256 little-endian int32 (magic, version, number
                        of tokens), then uint16; a large corpus continues in train_001.bin, ..
    meta.json           {"maker", "tokenizer", "length", "framed", "made_from"}

length is that of every row, where rows are short texts padded with the end token, or 0 where texts
are packed: one after the other, any window being a training sequence; if framed is true, its first
and last token become an end token, as in the published MDLM's training. The folder appears whole or
not at all, so several processes may make it at once: the first to finish wins.
"""
import collections
import contextlib
import functools
import glob
import gzip
import json
import lzma
import os
import sys
import tempfile
import zlib
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

DEFAULT = "out/signatures"  # made when it is missing
MAGIC, VERSION = 20240520, 1  # of llm.c's format
SHARD = 10 ** 9  # tokens in a file, about
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # the 20, and X for anything else


# ------------------------------------------------------------------------------------- tokenizers
@functools.lru_cache
def make_tokenizer(name):
    """Return the tiktoken.Encoding of "bytes", "protein" (amino acids) or "gpt2".

    Raises ValueError if GPT-2's files cannot be loaded.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever the HTTP library raises
            raise ValueError(f"GPT-2's files are missing or damaged ({type(e).__name__}): run once "
                             "online, or set TIKTOKEN_CACHE_DIR, see data/README.md") from e

    letters = {"bytes": [bytes([i]) for i in range(256)],
               "protein": [letter.encode() for letter in AMINO_ACIDS]}
    ranks = {letter: i for i, letter in enumerate(letters[name])}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def decode(x, tokenizer, packed):
    """Return the B texts of token ids x (B, L): up to the first end token, or all if packed."""
    encoding = make_tokenizer(tokenizer)
    texts = []
    for ids in x.tolist():
        if not packed and encoding.eot_token in ids:
            ids = ids[:ids.index(encoding.eot_token)]
        texts.append(encoding.decode(ids))
    return texts


def until_end(x, eos):
    """Return (B, L) bool, True for the tokens of x (B, L) up to and including the first eos."""
    ends = x == eos
    return ends.cumsum(1) - ends.long() == 0


# ---------------------------------------------------------------------------------------- reading
@dataclass(frozen=True, eq=False)
class Corpus:
    """Read a corpus: `load` returns it; train and val are lists of memory-mapped uint16 arrays."""
    folder: str
    maker: str
    tokenizer: str
    length: int  # tokens per row, or 0: packed
    made_from: dict
    train: list
    val: list
    framed: bool = False  # packed text: sequences begin and end with an end token

    @property
    def packed(self):
        """Return whether sequences are windows of packed text, not rows."""
        return self.length == 0

    @property
    def pad_id(self):
        """Return the token that pads rows, or -1 where texts are packed."""
        if self.packed:
            return -1
        return make_tokenizer(self.tokenizer).eot_token

    def decode(self, x):
        """Return the B texts of token ids x (B, L)."""
        return decode(x, self.tokenizer, self.packed)

    @functools.lru_cache
    def texts(self, split):
        """Return all texts of a split, "train" or "val", of a corpus of rows."""
        tokens = np.concatenate(getattr(self, split))
        return self.decode(tokens.reshape(-1, self.length))

    def length_shares(self, L):
        """Return the shares (L + 1,) of training sequences with 0, 1, .., L tokens of text."""
        lengths = np.array([L])  # packed text fills every sequence
        if not self.packed:
            rows = np.concatenate(self.train).reshape(-1, L)
            lengths = (rows != self.pad_id).sum(1)

        counts = np.bincount(lengths, minlength=L + 1)
        return torch.from_numpy(counts / len(lengths)).float()

    def batch(self, n, L, device="cpu"):
        """Draw n training sequences (n, L), int64: rows, or windows of packed text."""
        stride = 1 if self.packed else self.length
        index = torch.randint(self.count(self.train, stride, L), (n,))
        x = self.frame(read_sequences(self.train, index, stride, L))

        if torch.device(device).type == "cuda":
            x = x.pin_memory()
        return x.to(device, non_blocking=True)

    def held_out(self, n, L):
        """Return n validation sequences (n, L), int64, always the same; all if there are fewer."""
        stride = L if self.packed else self.length
        total = self.count(self.val, stride, L)
        index = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]
        return self.frame(read_sequences(self.val, index, stride, L))

    def count(self, files, stride, L):
        """Return the number of sequences of L tokens in a split. Raises ValueError if it is 0."""
        total = sum(count_sequences(files, stride, L))
        if total == 0:
            raise ValueError(f"{self.folder} has a split of {sum(map(len, files))} tokens and no "
                             f"sequence of {L}: make it from more text, or use shorter sequences")
        return total

    def frame(self, x):
        """Return x (n, L); if framed, set the first and last token of each sequence to the end."""
        if self.framed:
            x[:, [0, -1]] = make_tokenizer(self.tokenizer).eot_token
        return x

    def check_fits(self, path, tokenizer, length, framed):
        """Raise ValueError if the network in the file `path` was made for other sequences.

        `length` is that of a row, or 0 for packed text.
        """
        ours = (self.tokenizer, self.length, self.framed)
        theirs = (tokenizer, length, framed)
        if ours != theirs:
            raise ValueError(f"{self.folder} does not fit {path}: its tokenizer, row length and "
                             f"framing are {ours}, but the network needs {theirs}: name "
                             "another corpus, or make it again")


def count_sequences(files, stride, L):
    """Return the number of sequences of L tokens, `stride` apart, in each file, a list."""
    return [max(0, (len(tokens) - L) // stride + 1) for tokens in files]


def read_sequences(files, index, stride, L):
    """Return the sequences (n, L), int64, numbered `index` (n,), counted over all files."""
    counts = count_sequences(files, stride, L)
    rows = []
    for number in index.tolist():
        for tokens, count in zip(files, counts):
            if number < count:
                rows.append(tokens[number * stride:number * stride + L])
                break
            number -= count
    return torch.from_numpy(np.array(rows, np.int64))


def load(folder):
    """Return the Corpus in a folder; make the default one first if it is missing (3 s).

    Raises ValueError if there is none, it is not whole, or its tokenizer cannot be loaded.
    """
    if folder == DEFAULT and not os.path.exists(folder):
        from data import signatures  # here, as it imports this file
        signatures.prepare(folder)

    path = os.path.join(folder, "meta.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder!r} is not a corpus folder: make one with `python -m "
                         "data.text FILE`, data.fasta or data.openwebtext")
    with open(path, encoding="utf-8") as f:
        meta = json.load(f)

    make_tokenizer(meta["tokenizer"])  # fails now, not at the first table, if it cannot be loaded
    return Corpus(folder, **meta, train=read_split(folder, "train"), val=read_split(folder, "val"))


def read_split(folder, split):
    """Return the files of a split, memory-mapped, in order."""
    names = sorted(glob.glob(f"{glob.escape(folder)}/{split}*.bin"))
    return [read_shard(name) for name in names]


def read_shard(path):
    """Return the token ids in a file, memory-mapped uint16. Raises ValueError if not whole."""
    head = np.fromfile(path, "<i4", 3)
    tokens = (os.path.getsize(path) - 1024) // 2
    if head.tolist() != [MAGIC, VERSION, tokens]:
        raise ValueError(f"{path} is not a whole token file in llm.c's format: make it again")
    return np.memmap(path, "<u2", "r", offset=1024)


def read_lines(path, errors="strict", limit=-1):
    """Yield the lines of a UTF-8 file, also .gz or .xz, those longer than `limit` in pieces.

    Raises ValueError if it cannot be read whole, or is not a regular file, such as a pipe.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; if it is a pipe, save it first")
    _, suffix = os.path.splitext(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors=errors) as f:
            while line := f.readline(limit):
                yield line
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as e:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({e}): check the file") from None


# ---------------------------------------------------------------------------------------- writing
def write(folder, pieces, maker, tokenizer, length, made_from, framed=False):
    """Make the corpus in `folder` from pieces, an iterable of ("train" or "val", token ids).

    It is written under a temporary name, then renamed, so that neither a kill nor a second process
    leaves a partial corpus under its name. Raises ValueError if a split is empty.
    """
    meta = {"maker": maker, "tokenizer": tokenizer, "length": length, "framed": framed,
            "made_from": made_from}
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)

    with tempfile.TemporaryDirectory(".partial", f"{name}.", parent) as partial:
        counts = write_shards(partial, pieces)
        if not counts["train"] or not counts["val"]:
            raise ValueError(f"{folder} would have {counts['train']} tokens to train and "
                             f"{counts['val']} to validate, but needs both: give more text")
        with open(os.path.join(partial, "meta.json"), "w", encoding="utf-8") as f:
            json.dump(meta, f, indent=1)
        os.chmod(partial, 0o755)

        try:
            os.rename(partial, folder)
        except OSError:
            if not os.path.exists(os.path.join(folder, "meta.json")):
                raise  # otherwise another process was faster
    print(f"{folder}: {counts['train']} tokens to train, {counts['val']} to validate")


def write_shards(folder, pieces):
    """Write pieces to train.bin, train_001.bin, .., val.bin, ..; return a Counter of tokens."""
    counts = collections.Counter()
    files = {}

    with contextlib.ExitStack() as stack, tqdm(unit="token", unit_scale=True) as bar:
        for split, ids in pieces:
            number = counts[split] // SHARD
            name = f"{split}_{number:03d}.bin" if number else f"{split}.bin"
            if name not in files:
                files[name] = stack.enter_context(open(os.path.join(folder, name), "wb"))
                files[name].write(bytes(1024))
            files[name].write(np.asarray(ids, "<u2"))
            counts[split] += len(ids)
            bar.update(len(ids))

        for f in files.values():
            tokens = f.tell() // 2 - 512
            f.seek(0)
            f.write(np.array([MAGIC, VERSION, tokens], "<i4").tobytes())
    return counts


def write_rows(folder, texts, maker, tokenizer, length, made_from):
    """Write texts of at most `length` tokens as rows; one in 20, by a hash, validates.

    Raises ValueError if length < 1, or as `write` does.
    """
    if length < 1:
        raise ValueError(f"rows cannot have {length} tokens: give a length of at least 1")

    pieces = []
    for text in texts:
        split = "train" if zlib.crc32(text.encode()) % 20 else "val"
        pieces.append((split, encode([text], tokenizer, length)))
    write(folder, pieces, maker, tokenizer, length, made_from)


def encode(texts, tokenizer, length):
    """Return the tokens (N * length,), uint16, of N texts, each padded with the end token."""
    encoding = make_tokenizer(tokenizer)
    rows = np.full((len(texts), length), encoding.eot_token, np.uint16)
    for row, text in zip(rows, texts):
        ids = encoding.encode_ordinary(text)
        row[:len(ids)] = ids
    return rows.reshape(-1)


# ------------------------------------------------------------------------- command lines of makers
def new_folder(folder, path):
    """Return where a maker puts its corpus: `folder`, or out/<stem of path> if it is None.

    Raises ValueError if that exists: a maker never overwrites a corpus.
    """
    if folder is None:
        name = os.path.basename(os.path.abspath(path))
        stem, _ = os.path.splitext(name.removesuffix(".gz").removesuffix(".xz"))
        folder = os.path.join("out", stem)
    if os.path.exists(folder):
        raise ValueError(f"{folder!r} already exists: delete it, or name another with --out")
    return folder


def say_next(folder, framed=False):
    """Print the command to run next; framed text is for an imported teacher."""
    if framed:
        print(f"now run: python distill.py --data {folder}")
    else:
        print(f"now run: python train_teacher.py --data {folder} --out {folder}.pt")


def run(main):
    """Run main(); print an error that users can fix in one line and exit with code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

"""text.py - text as packed GPT-2 tokens: documents one after the other, each with its end token.

    python -m data.text news.txt.xz         # -> out/news
    python -m data.text articles/           # all .txt, .gz and .xz below a folder -> out/articles
    python -m data.text fineweb10B/         # ready-made shards *.bin of llm.c or modded-nanogpt

Files are UTF-8; a line <|endoftext|>, or the end of a file, ends a document.
"""
import argparse
import glob
import io
import itertools
import lzma
import os
import zlib

from tqdm import tqdm

from data import corpus
from model import run_script

SHOWN = ("entropy", "distinct")  # what the tables of training show
PIECE = 1 << 16  # a longer document comes in pieces of about so many characters
SMALL = 1 << 22  # bytes: below, one piece in 200 might be nothing at all, so it is one in 20
GROUP = 128  # pieces that are encoded at once


def text_files(path):
    """The text files that a path means: itself, or those below the folder. ValueError if none."""
    names = [path]
    if os.path.isdir(path):
        names = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True))
        names = [name for name in names if name.endswith((".txt", ".gz", ".xz"))]
    elif corpus.is_fasta(path):
        raise ValueError(f"{path} begins with >, as FASTA does: run `python -m data.fasta {path}`")
    if not names:
        raise ValueError(f"{path!r} has no file *.txt, *.gz, *.xz (text) or *.bin (tokens) in it")
    return names


def documents(names, limit=PIECE):
    """(text, whole) of the files; documents longer than `limit` characters come in pieces.

    whole is true of a document's last piece. ValueError names a file that is damaged or not UTF-8.
    """
    for name in names:
        try:
            with io.TextIOWrapper(corpus.open_bytes(name), "utf-8-sig") as f:
                yield from documents_of(f, limit)
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as e:
            raise ValueError(f"{name} cannot be read as UTF-8 text ({e})") from None


def documents_of(f, limit):
    """`documents` of one open file."""
    text, end = "", True
    while line := f.readline(limit):
        end = line.strip() == "<|endoftext|>"
        if not end:
            text += line
        if end or len(text) >= limit:
            yield text, end
            text = ""
    if not end:
        yield text, True


def encode(pieces):
    """(text, whole), an iterator -> lists of GPT-2 tokens, an end token after each document."""
    encoding = corpus.make_tokenizer("gpt2")
    while group := list(itertools.islice(pieces, GROUP)):
        texts, whole = zip(*group)
        tokens = encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count())
        for ids, end in zip(tokens, whole):
            if end:
                ids.append(encoding.eot_token)
            yield ids


def tokenize(pieces, every=200):
    """(text, whole), an iterator -> (split, tokens): the first of `every` pieces validates."""
    for number, ids in enumerate(encode(pieces)):
        split = "train" if number % every else "val"
        yield split, ids


def shards(names):
    """(split, tokens) of ready-made shards: those with "val" in their name validate."""
    vocabulary = corpus.make_tokenizer("gpt2").n_vocab
    for name in names:
        split = "val" if "val" in os.path.basename(name) else "train"
        tokens = corpus.read_shard(name)
        for start in range(0, len(tokens), 1 << 22):
            part = tokens[start:start + (1 << 22)]
            if part.max() >= vocabulary:
                raise ValueError(f"{name} has token {part.max()}, GPT-2 has {vocabulary} tokens")
            yield split, part


def show_progress(pieces, name):
    """Pass (split, tokens) on, with a bar that counts the tokens."""
    with tqdm(desc=f"tokenizing {name}", unit="token", unit_scale=True) as bar:
        for split, ids in pieces:
            yield split, ids
            bar.update(len(ids))


def prepare(path, folder):
    """Make the corpus from a file or folder, streamed. Returns {"train": tokens, "val": ..}."""
    path = os.path.normpath(path)
    names = sorted(glob.glob(os.path.join(glob.escape(path), "*.bin")))
    pieces = shards(names)
    if not names:
        names = text_files(path)
        size = sum(map(os.path.getsize, names))
        every = 20 if size < SMALL else 200
        limit = min(PIECE, max(64, size // 20))  # so that one small document is in both splits
        pieces = tokenize(documents(names, limit), every)
    pieces = show_progress(pieces, os.path.basename(path))
    made_from = {"path": path, "files": len(names)}
    return corpus.write(folder, pieces, "text", "gpt2", 0, made_from)


def quality(x, data):
    """Of samples x (B, L), a dict: distinct, unique texts / B; entropy, that of the tokens of one
    text, mean, nats."""
    return {"distinct": len(set(data.decode(x))) / len(x),
            "entropy": sum(map(corpus.unigram_entropy, x.tolist())) / len(x)}


def report(folder, counts):
    """Say what was made, and what to run next."""
    print(f"{folder}: {counts['train']} tokens to train, {counts['val']} to validate")
    print(f"now run: python train_teacher.py --data {folder}")


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p = argparse.ArgumentParser(description="Make a corpus of text as GPT-2 tokens.")
    p.add_argument("path", help="a UTF-8 file (.gz, .xz), a folder of them, or of shards *.bin")
    p.add_argument("--out", help="corpus folder to make [out/<stem of the path>]")
    args = p.parse_args(argv)
    if args.out is None:
        args.out = corpus.out_folder(args.path)
    corpus.refuse_existing(args.out)
    report(args.out, prepare(args.path, args.out))


if __name__ == "__main__":
    run_script(main)

"""text.py - text as packed tokens: documents one after the other, each with its end token.

    python -m data.text news.txt.xz         # -> out/news, GPT-2's tokens
    python -m data.text news.txt.xz --tokenizer bytes
    python -m data.text news.txt.xz --framed   # for a teacher of experiments.mdlm
    python -m data.text articles/           # all .txt, .gz and .xz below a folder -> out/articles
    python -m data.text fineweb10B/         # ready-made shards *.bin of llm.c or modded-nanogpt

Files are UTF-8; a line <|endoftext|>, or the end of a file, ends a document.
"""
import argparse
import glob
import itertools
import os
import re

from data import corpus

FRAMED = "begin and end each sequence with an end token, as in training the published MDLM"
SUFFIXES = (".txt", ".gz", ".xz")  # text files in a folder
PIECE = 1 << 16  # a longer document is split into pieces of about this many characters
SMALL = 1 << 22  # bytes: below this, one piece in 200 might be none, so it is one in 20
GROUP = 128  # pieces encoded at once


def find(path, pattern):
    """Return the files below a folder, sorted, each once even if links lead to it twice."""
    found = {}
    for name in sorted(glob.glob(f"{glob.escape(path)}/{pattern}", recursive=True)):
        found.setdefault(os.path.realpath(name), name)
    return list(found.values())


def documents(names, limit):
    """Yield (text, whole) from the files, documents of more than `limit` characters in pieces.

    `whole` is True for a document's last piece.
    """
    for name in names:
        text = ""
        end = True
        for line in corpus.read_lines(name, limit=limit):
            end = line.strip() == "<|endoftext|>"
            if not end:
                text += line
            if end or len(text) >= limit:
                yield text, end
                text = ""
        if not end:
            yield text, True


def tokenize(pieces, tokenizer="gpt2", every=200):
    """Yield (split, tokens) for an iterator of (text, whole), with an end after each document.

    The first of every `every` pieces validates.
    """
    encoding = corpus.make_tokenizer(tokenizer)
    number = 0
    while group := list(itertools.islice(pieces, GROUP)):
        tokens = encoding.encode_ordinary_batch([text for text, _ in group])
        for ids, (_, whole) in zip(tokens, group):
            if whole:
                ids.append(encoding.eot_token)
            split = "train" if number % every else "val"
            yield split, ids
            number += 1


def shards(names, tokenizer):
    """Yield (split, tokens) of ready-made shards: those with the word "val" in the name validate.

    Raises ValueError if a token is not in the vocabulary.
    """
    vocabulary = corpus.make_tokenizer(tokenizer).n_vocab
    for name in names:
        words = re.split("[^a-z]+", os.path.basename(name))
        split = "val" if "val" in words else "train"
        tokens = corpus.read_shard(name)
        if tokens.max() >= vocabulary:
            raise ValueError(f"{name} has token {tokens.max()}, but {tokenizer} has {vocabulary} "
                             "tokens: name another --tokenizer")
        yield split, tokens


def prepare(path, folder, tokenizer, framed):
    """Make the corpus from a file or folder, streaming it."""
    path = os.path.normpath(path)
    names = find(path, "*.bin")
    if names:
        pieces = shards(names, tokenizer)
    else:
        names = [path]
        if os.path.isdir(path):
            names = [name for name in find(path, "**/*") if name.endswith(SUFFIXES)]
        size = sum(map(os.path.getsize, names))
        every = 20 if size < SMALL else 200
        limit = min(PIECE, max(64, size // 20))  # puts one small document in both splits
        pieces = tokenize(documents(names, limit), tokenizer, every)

    made_from = {"path": path, "files": len(names)}
    corpus.write(folder, pieces, "text", tokenizer, 0, made_from, framed)


def main(argv=None):
    """Run the command with arguments argv, the shell's if None."""
    parser = argparse.ArgumentParser(
        prog="python -m data.text",
        description="Make a corpus of packed text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("path", help="a UTF-8 file, or a folder of them or of shards *.bin")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2",
                        help="what the tokens are")
    parser.add_argument("--framed", action="store_true", help=FRAMED)
    parser.add_argument("--out", help="corpus folder to make; None: out/<stem of the path>")
    args = parser.parse_args(argv)

    folder = corpus.new_folder(args.out, args.path)
    prepare(args.path, folder, args.tokenizer, args.framed)
    corpus.say_next(folder, args.framed)


if __name__ == "__main__":
    corpus.run(main)

"""text.py - text as packed tokens: documents one after the other, each with its end token.

    python -m data.text news.txt.xz         # -> out/news, GPT-2's tokens
    python -m data.text news.txt.xz --tokenizer bytes
    python -m data.text news.txt.xz --framed   # for a teacher of experiments.mdlm
    python -m data.text articles/           # all .txt, .gz and .xz below a folder -> out/articles
    python -m data.text fineweb10B/         # ready-made shards *.bin of llm.c or modded-nanogpt

Files are UTF-8; a line <|endoftext|>, or the end of a file, ends a document.
"""
import collections
import contextlib
import functools
import glob
import io
import itertools
import lzma
import os
import re
import zlib

import numpy as np
from tqdm import tqdm

from data import corpus
from data.command import make_parser, run_script

SHOWN = ("entropy", "tv", "js3", "rep4")  # what the tables of training show
TOKENIZERS = ("gpt2", "bytes")
FRAMED = "sequences begin and end with an end token, as those of MDLM's published teacher do"
HELD_OUT = 1000  # passages of the validation split that `quality` compares with
COMMON = 1000  # words, the most frequent ones; all others are rare
WORD, QUOTE = re.compile(r"[^\W\d_]+"), re.compile(r"[\"\u201c\u201d]")
SENTENCE_END = re.compile(r"[.!?][\"\u201d]?(?=\s|$)")
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


def encode_batch(texts, tokenizer):
    """A list of texts -> a list of token ids for each, without the end token."""
    if tokenizer == "bytes":
        return [list(text.encode()) for text in texts]  # tiktoken's ids, faster
    encoding = corpus.make_tokenizer(tokenizer)
    return encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())


def encode(pieces, tokenizer):
    """(text, whole), an iterator -> lists of tokens, an end token after each document."""
    end_token = corpus.make_tokenizer(tokenizer).eot_token
    while group := list(itertools.islice(pieces, GROUP)):
        texts, whole = zip(*group)
        for ids, end in zip(encode_batch(list(texts), tokenizer), whole):
            if end:
                ids.append(end_token)
            yield ids


def tokenize(pieces, every=200, tokenizer="gpt2"):
    """(text, whole), an iterator -> (split, tokens): the first of `every` pieces validates."""
    for number, ids in enumerate(encode(pieces, tokenizer)):
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


def prepare(path, folder, tokenizer="gpt2", framed=False):
    """Make the corpus from a file or folder, streamed. Returns {"train": tokens, "val": ..}."""
    path = os.path.normpath(path)
    names = sorted(glob.glob(os.path.join(glob.escape(path), "*.bin")))
    pieces = shards(names)
    if names and tokenizer != "gpt2":
        raise ValueError(f"{path!r} has shards *.bin, which are GPT-2's tokens already: leave out "
                         f"--tokenizer {tokenizer}")
    if not names:
        names = text_files(path)
        size = sum(map(os.path.getsize, names))
        every = 20 if size < SMALL else 200
        limit = min(PIECE, max(64, size // 20))  # so that one small document is in both splits
        pieces = tokenize(documents(names, limit), every, tokenizer)
    made_from = {"path": path, "files": len(names)}
    with contextlib.closing(show_progress(pieces, os.path.basename(path))) as shown:
        return corpus.write(folder, shown, "text", tokenizer, 0, made_from, framed)


@functools.lru_cache(maxsize=2)
def common_words(data, L):
    """The most frequent words, lower case, of passages spread evenly over the training split."""
    last = data.count(data.train, L, L) - 1
    index = np.linspace(0, last, HELD_OUT).astype(int)
    words = collections.Counter()
    for passage in data.decode(data.sequences(data.train, index, L, L)):
        words.update(WORD.findall(passage.lower()))
    return {word for word, _ in words.most_common(COMMON)}


def traits(passage, common):
    """(6,): sentence ends, capitals, share of rare words; and capitals again, digits, quotes."""
    words = WORD.findall(passage.lower())
    rare = [word for word in words if word not in common]
    capitals, digits = list(filter(str.isupper, passage)), list(filter(str.isdigit, passage))
    return (len(SENTENCE_END.findall(passage)), len(capitals), len(rare) / max(len(words), 1),
            len(capitals), len(digits), len(QUOTE.findall(passage)))


def cells(values, cuts):
    """Traits (N, 6), cuts (6,) -> a Counter of joint cells: which traits are above their cuts."""
    return collections.Counter(map(tuple, (values > cuts).tolist()))


@functools.lru_cache(maxsize=2)
def real(data, L):
    """Of validation passages the cuts of traits, and Counters of the cells and of the 3-grams.

    The first three traits are cut at their medians, the others at 0: there or not. More classes,
    such as thirds, would see less: of 1,000 passages in more cells tv counts mostly chance.
    """
    x, common = data.held_out(HELD_OUT, L), common_words(data, L)
    values = np.array([traits(passage, common) for passage in data.decode(x)])
    cuts = np.median(values, axis=0)
    cuts[3:] = 0
    return cuts, cells(values, cuts), corpus.ngrams(x.tolist(), 3)


def repeated(ids, n=4):
    """The share of a text's n-grams that occurred earlier in it; 0 if it has none."""
    grams = corpus.ngrams([ids], n)
    return (grams.total() - len(grams)) / max(grams.total(), 1)


def quality(x, data):
    """Measures of samples x (B, L) as a dict; js3 and tv compare with 1,000 validation passages.

    entropy: that of the tokens within a text, mean, nats; distinct: unique texts / B; bigram:
    entropy of all texts' pairs of tokens, pooled, nats; rep4: share of a text's 4-grams of tokens
    that occurred in it before, mean; js3: Jensen-Shannon divergence of pooled 3-grams of tokens,
    nats; tv: total variation of the joint cells of six yes/no traits: more sentence ends, more
    capitals, a larger share of words not among the 1,000 most frequent than the median validation
    passage has; any capital, any digit, any double quote. distinct, bigram, js3 and tv depend on B
    (bigram and js3 also on L): compare with as many real passages. With GPT-2's tokens js3 is near
    its most, ln 2 = 0.693, even of real ones, as most 3-grams of so few passages are unique.
    """
    passages, ids, common = data.decode(x), x.tolist(), common_words(data, x.shape[1])
    cuts, their_cells, their_ngrams = real(data, x.shape[1])
    values = np.array([traits(passage, common) for passage in passages])
    return {"entropy": float(np.mean(list(map(corpus.unigram_entropy, ids)))),
            "distinct": len(set(passages)) / len(passages),
            "bigram": corpus.entropy(corpus.ngrams(ids, 2)),
            "rep4": float(np.mean(list(map(repeated, ids)))),
            "js3": corpus.divergence(corpus.ngrams(ids, 3), their_ngrams),
            "tv": corpus.total_variation(cells(values, cuts), their_cells)}


def report(folder, counts):
    """Say what was made, and what to run next."""
    print(f"{folder}: {counts['train']} tokens to train, {counts['val']} to validate")
    print(f"now run: python train_teacher.py --data {folder}")


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p, add = make_parser("Make a corpus of text, packed.")
    add("path", help="a UTF-8 file (.gz, .xz), a folder of them, or of shards *.bin")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2", help="what a token is")
    add("--framed", action="store_true", help=FRAMED)
    add("--out", help="corpus folder to make [out/<stem of the path>]")
    args = p.parse_args(argv)
    if args.out is None:
        args.out = corpus.out_folder(args.path)
    corpus.refuse_existing(args.out)
    report(args.out, prepare(args.path, args.out, args.tokenizer, args.framed))


if __name__ == "__main__":
    run_script(main)

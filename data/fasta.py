"""fasta.py - proteins from a FASTA file, one sequence a row, padded with the end token.

    python -m data.fasta swissprot.fasta.gz --length 128        # -> out/swissprot

Any FASTA file, whatever its name, perhaps compressed by gzip or xz.
"""
import collections
import functools
import io
import itertools
import lzma
import math
import sys
import zlib

import torch

from data import corpus, memory
from data.command import SIZE, make_parser, run_script

SHOWN = ("entropy", "length", "ks", "js2")  # what the tables of training show
LONGEST = 1 << 24  # characters of a line
K, SAME = 5, 0.5  # a sequence is novel if no training sequence has half of its 5-mers
WINDOW, LOW = 12, 2.2  # low complexity: 12 residues of less than 2.2 bits, the trigger of SEG


def read_fasta(path):
    """The unique sequences of a FASTA file, sorted, and the set of letters found in the file.

    Lines may be wrapped, lower case, comments (;) or end with the stop *; letters that are none of
    the 20 amino acids become X. Headers are free text. ValueError names the line that is no FASTA.
    """
    try:
        with io.TextIOWrapper(corpus.open_bytes(path), "utf-8-sig", errors="replace") as f:
            sequences = parse(f, path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        raise ValueError(f"{path} cannot be read as FASTA ({e})") from None
    alphabet = set().union(*itertools.chain.from_iterable(sequences))
    other = {ord(c): "X" for c in alphabet.difference(corpus.AMINO_ACIDS)}
    texts = {"".join(parts).translate(other) for parts in sequences}
    return sorted(texts - {""}), alphabet


def parse(f, path):
    """The letters below each header of an open file, in upper case: a list of lines for each."""
    sequences, room = [], memory.free(torch.device("cpu")) / 4
    for number, line in enumerate(iter(lambda: f.readline(LONGEST), ""), 1):
        room -= len(line) + 64  # bytes
        if len(line) == LONGEST or room < 0:
            raise ValueError(f"{path}, line {number} is too long, or the file, for the memory: "
                             "give a part of it")
        letters = line.strip().removesuffix("*")
        if line.startswith(">"):
            sequences.append([])
        if line.startswith((">", ";")) or not line.strip():
            continue
        if not sequences or not letters.isascii() or not (letters + "A").isalpha():
            raise ValueError(f"{path}, line {number} is no FASTA: {line.strip()[:40]!r}: give "
                             "sequences of letters, each below a line that begins with >")
        sequences[-1].append(letters.upper())
    return sequences


def prepare(path, folder, length=128, long="drop"):
    """Make the corpus; long sequences are dropped or cropped. Returns {"train": tokens, "val": ..}.

    Says on the way how many there are, and warns on stderr if they look like DNA or RNA.
    """
    texts, alphabet = read_fasta(path)
    if alphabet and alphabet <= set("ACGTUN"):
        print(f"warning: {path} has no other letters than {''.join(sorted(alphabet))}: it looks "
              "like DNA or RNA, but is read as amino acids", file=sys.stderr)
    fit = {s for s in texts if len(s) <= length}
    too_long = len(texts) - len(fit)
    if long == "crop":
        fit = {s[:length] for s in texts}
    print(f"{path}: {len(texts)} unique sequences, {too_long} of them longer than {length}: "
          f"{long}ped, {len(fit)} left")
    made_from = {"path": path, "long": long}
    return corpus.write_rows(folder, sorted(fit), "fasta", "protein", length, made_from)


@functools.lru_cache(maxsize=1)
def kmer_index(data):
    """{5-mer: numbers of the training sequences that have it}."""
    index = collections.defaultdict(set)
    for number, text in enumerate(data.known):
        for word in corpus.ngrams([text], K):
            index[word].add(number)
    return index


@functools.lru_cache(maxsize=2)
def val_composition(data, n):
    """Counter of the n-mers of the validation sequences."""
    return corpus.ngrams(data.val_texts, n)


def best_match(text, index):
    """The largest share of a sequence's 5-mers that one training sequence has, too."""
    words, hits = corpus.ngrams([text], K).keys(), collections.Counter()
    for word in words:
        hits.update(index.get(word, ()))
    return max(hits.values(), default=0) / max(len(words), 1)


def is_low(text):
    """Has it a window of low complexity (Wootton and Federhen 1993)?"""
    spans = [text[i:i + WINDOW] for i in range(len(text) - WINDOW + 1)]
    return any(corpus.unigram_entropy(s) < LOW * math.log(2) for s in spans)


def quality(x, data):
    """Measures of samples x (B, L) as a dict; ks and js compare with the validation split.

    ks: Kolmogorov-Smirnov statistic of the lengths; js1, js2: Jensen-Shannon divergence of the
    amino acids and of their pairs, nats; novel: share that have fewer than half of their 5-mers in
    common with every single training sequence; low: share with a stretch of low complexity;
    distinct: unique sequences / B; length: mean residues; entropy: within a sequence, nats.
    """
    texts = data.decode(x)
    lengths, index = [len(s) for s in texts], kmer_index(data)
    return {"ks": corpus.ks(lengths, data.val_lengths),
            "js1": corpus.divergence(corpus.ngrams(texts, 1), val_composition(data, 1)),
            "js2": corpus.divergence(corpus.ngrams(texts, 2), val_composition(data, 2)),
            "novel": sum(best_match(s, index) < SAME for s in texts) / len(texts),
            "low": sum(map(is_low, texts)) / len(texts),
            "distinct": len(set(texts)) / len(texts),
            "length": sum(lengths) / len(texts),
            "entropy": sum(map(corpus.unigram_entropy, texts)) / len(texts)}


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p, add = make_parser("Make a corpus of the proteins in a FASTA file.")
    add("file", help="FASTA, perhaps compressed by gzip or xz")
    add("--length", type=SIZE, default=128, help="residues in a row")
    add("--long", choices=("drop", "crop"), default="drop", help="longer ones")
    add("--out", help="corpus folder to make [out/<stem of the file>]")
    args = p.parse_args(argv)
    if args.out is None:
        args.out = corpus.out_folder(args.file)
    corpus.refuse_existing(args.out)
    counts = prepare(args.file, args.out, args.length, args.long)
    train, val = counts["train"] // args.length, counts["val"] // args.length
    print(f"{args.out}: {train} sequences to train, {val} to validate")
    print(f"now run: python train_teacher.py --data {args.out}")


if __name__ == "__main__":
    run_script(main)

"""signatures.py - the embedded default corpus: Python function signatures found on this machine.

    python -m data.signatures                      # -> out/signatures, 3 s, downloads nothing

Some 30,000 unique lines such as `def sample(self, n=1) -> Tensor:` from the sources of the standard
library, torch and numpy. The quality of samples can be checked without a second model: does
Python's parser accept them?
"""
import ast
import collections
import functools
import importlib.util
import os
import platform
import re
import sysconfig
import warnings

import numpy as np
import torch

from data import corpus
from data.command import SIZE, make_parser, run_script

SHOWN = ("valid", "post", "tv", "js3")  # what the tables of training show
SIGNATURE = re.compile(r"^[ \t]*(def [A-Za-z_]\w*\(.*\).*:)(?:[ \t]*\.\.\.)?[ \t]*$",
                       re.MULTILINE | re.ASCII)
ANNOTATION = re.compile(r"[(,]\s*\**\w+\s*:")  # of an argument
NOT_SOURCES = ("site-packages", "dist-packages", "__pycache__")


def is_signature(text):
    """Does Python's parser accept this line, given a body, as one function definition?"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text + " pass").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef)


def source_files():
    """The paths of all Python sources of the standard library, torch and numpy."""
    roots = [sysconfig.get_paths()["stdlib"]]
    roots += [os.path.dirname(importlib.util.find_spec(name).origin) for name in ("torch", "numpy")]
    for root in roots:
        for folder, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in NOT_SOURCES]
            yield from (os.path.join(folder, f) for f in files if f.endswith((".py", ".pyi")))


def find_signatures(length):
    """Sorted unique lines `def NAME(..)..:` of fewer than `length` ASCII bytes.

    Tests' functions and the few lines that are no Python (templates in strings) are left out.
    """
    lines = set()
    for path in source_files():
        with open(path, encoding="utf-8", errors="ignore") as f:
            lines.update(SIGNATURE.findall(f.read()))
    lines = [s for s in lines if len(s) < length and s.isascii() and not s.startswith("def test")]
    return sorted(filter(is_signature, lines))


def prepare(folder=corpus.DEFAULT, length=48):
    """Make the corpus of all lines shorter than `length`. Returns {"train": tokens, "val": ..}."""
    made_from = {"python": platform.python_version(), "torch": torch.__version__,
                 "numpy": np.__version__}
    texts = find_signatures(length)
    return corpus.write_rows(folder, texts, "signatures", "bytes", length, made_from)


def kind(text):
    """What makes a line hard: (has a return type, has a default or an annotation)."""
    return "->" in text, "=" in text or bool(ANNOTATION.search(text))


def features(text):
    """A cell of those that `tv` counts texts in: six things that one sees at a glance."""
    return ("->" in text, "=" in text, bool(ANNOTATION.search(text)), "(self" in text,
            min(text.count(","), 2), text.lower() != text)


@functools.lru_cache(maxsize=1)
def real(data):
    """Counters of the validation texts' kinds, features and 3-grams; their common characters, each
    at least one in 200, and the share of all others."""
    texts = data.val_texts
    kinds, cells = collections.Counter(map(kind, texts)), collections.Counter(map(features, texts))
    characters = collections.Counter("".join(texts))
    common = {c for c, n in characters.items() if n >= characters.total() / 200}
    return kinds, cells, corpus.ngrams(texts, 3), common, rare_share(texts, common)


def rare_share(texts, common):
    """The share of characters that are not in `common`, a set; at least that of one character."""
    count = collections.Counter("".join(texts))
    return max(sum(n for c, n in count.items() if c not in common), 1) / max(count.total(), 1)


def quality(x, data):
    """Measures of samples x (B, L) as a dict; post, tv, js3 and ks compare with validation texts.

    valid: share that the parser accepts; post: the same, post-stratified: if the samples were of
    each `kind` as often as people's lines are; tv: total variation of the `features`' joint cells;
    js3: Jensen-Shannon divergence of pooled 3-grams, nats; ks: Kolmogorov-Smirnov distance of the
    lengths; rare: how often there are characters that are each less than one in 200 of the
    validation texts', such as digits and capitals, divided by how often there: a low temperature
    loses them; returns, hints, methods: shares of texts with `->`, with an annotation, with
    `(self`; novel: share not in the training set; distinct: unique texts / B; length: mean
    characters, with length_sd; entropy: unigram entropy within a text, mean, nats. tv, js3, ks and
    distinct depend on B: compare with as many real lines.
    """
    texts = data.decode(x)
    good, cells = list(map(is_signature, texts)), list(map(features, texts))
    lengths, shares = list(map(len, texts)), np.mean(cells, axis=0).tolist()
    known = [s for s in texts if s in data.known]
    kinds, their_cells, their_ngrams, common, their_share = real(data)
    return {"valid": good.count(True) / len(texts),
            "post": corpus.post_stratified(good, list(map(kind, texts)), kinds),
            "tv": corpus.total_variation(collections.Counter(cells), their_cells),
            "js3": corpus.divergence(corpus.ngrams(texts, 3), their_ngrams),
            "ks": corpus.ks(lengths, data.val_lengths),
            "rare": rare_share(texts, common) / their_share,
            "returns": shares[0], "hints": shares[2], "methods": shares[3],
            "novel": 1 - len(known) / len(texts),
            "distinct": len(set(texts)) / len(texts),
            "length": float(np.mean(lengths)), "length_sd": float(np.std(lengths)),
            "entropy": float(np.mean(list(map(corpus.unigram_entropy, texts))))}


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p, add = make_parser("Make the default corpus, Python signatures.")
    add("--out", default=corpus.DEFAULT, help="corpus folder to make")
    add("--length", type=SIZE, default=48, help="tokens in a row, the end included")
    args = p.parse_args(argv)
    corpus.refuse_existing(args.out)
    counts = prepare(args.out, args.length)
    train, val = counts["train"] // args.length, counts["val"] // args.length
    print(f"{args.out}: {train} lines to train, {val} to validate")
    print(f"now run: python train_teacher.py --data {args.out}")


if __name__ == "__main__":
    run_script(main)

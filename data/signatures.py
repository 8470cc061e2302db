"""signatures.py - the embedded default corpus: Python function signatures found on this machine.

    python -m data.signatures                      # -> out/signatures, 3 s, downloads nothing

Some 30,000 unique lines such as `def sample(self, n=1) -> Tensor:` from the sources of the standard
library, torch and numpy. The quality of samples can be checked without a second model: does
Python's parser accept them?
"""
import argparse
import ast
import importlib.util
import os
import platform
import re
import sysconfig
import warnings

import numpy as np
import torch

from data import corpus
from model import run_script

SHOWN = ("valid", "entropy", "length", "ks")  # what the tables of training show
SIGNATURE = re.compile(r"^[ \t]*(def [A-Za-z_]\w*\(.*\).*:)(?:[ \t]*\.\.\.)?[ \t]*$",
                       re.MULTILINE | re.ASCII)
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


def quality(x, data):
    """Measures of samples x (B, L), each an average over the samples, as a dict.

    valid: share that the parser accepts; novel: share not in the training set; distinct: unique
    texts / B; length: mean characters, with length_sd and ks, the Kolmogorov-Smirnov distance of
    the lengths from the validation texts'; entropy: unigram entropy within a text, nats.
    """
    texts = data.decode(x)
    lengths = [len(s) for s in texts]
    return {"valid": sum(map(is_signature, texts)) / len(texts),
            "novel": sum(s not in data.known for s in texts) / len(texts),
            "distinct": len(set(texts)) / len(texts),
            "length": float(np.mean(lengths)), "length_sd": float(np.std(lengths)),
            "ks": corpus.ks(lengths, data.val_lengths),
            "entropy": sum(map(corpus.unigram_entropy, texts)) / len(texts)}


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p = argparse.ArgumentParser(description="Make the default corpus, Python signatures.")
    p.add_argument("--out", default=corpus.DEFAULT, help="corpus folder to make")
    p.add_argument("--length", type=int, default=48, help="tokens in a row, the end included")
    args = p.parse_args(argv)
    corpus.refuse_existing(args.out)
    counts = prepare(args.out, args.length)
    train, val = counts["train"] // args.length, counts["val"] // args.length
    print(f"{args.out}: {train} lines to train, {val} to validate")
    print(f"now run: python train_teacher.py --data {args.out}")


if __name__ == "__main__":
    run_script(main)

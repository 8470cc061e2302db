"""signatures.py - the default corpus: Python function signatures found on this machine.

    python -m data.signatures                      # -> out/signatures, 3 s, downloads nothing

Some 30,000 unique lines such as `def sample(self, n=1) -> Tensor:` from the sources of the standard
library, torch and numpy. Samples can be checked without a second model: Python's parser accepts
them or not.
"""
import argparse
import ast
import pathlib
import platform
import re
import sysconfig
import warnings

import numpy as np
import torch

from data import corpus

SIGNATURE = re.compile(r"^[ \t]*(def [A-Za-z_]\w*\(.*\).*:)(?:[ \t]*\.\.\.)?[ \t]*$",
                       re.MULTILINE | re.ASCII)
NOT_SOURCES = ("site-packages", "dist-packages", "__pycache__")


def is_signature(text):
    """Return whether Python parses this line, given a body, as one function definition."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text + " pass").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef)


def source_files(folder):
    """Yield the paths of all Python sources below a folder, without other packages."""
    for path in pathlib.Path(folder).iterdir():
        if path.is_dir() and path.name not in NOT_SOURCES:
            yield from source_files(path)
        elif path.suffix in (".py", ".pyi"):
            yield path


def find_signatures(length):
    """Return the sorted unique lines `def NAME(..)..:` of fewer than `length` ASCII bytes.

    They come from the standard library, torch and numpy. Test functions and the few lines that are
    not Python (templates in strings) are left out.
    """
    lines = set()
    for root in (sysconfig.get_paths()["stdlib"], *torch.__path__, *np.__path__):
        for path in source_files(root):
            source = path.read_text(encoding="utf-8", errors="ignore")
            lines.update(SIGNATURE.findall(source))

    short = [s for s in lines if len(s) < length and s.isascii() and not s.startswith("def test")]
    return sorted(filter(is_signature, short))


def prepare(folder, length=48):
    """Make the corpus of all lines shorter than `length` bytes."""
    made_from = {"python": platform.python_version(), "torch": torch.__version__,
                 "numpy": np.__version__}
    texts = find_signatures(length)
    corpus.write_rows(folder, texts, "signatures", "bytes", length, made_from)


def main(argv=None):
    """Run the command with arguments argv, the shell's if None."""
    parser = argparse.ArgumentParser(
        prog="python -m data.signatures",
        description="Make the default corpus, Python signatures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=corpus.DEFAULT, help="corpus folder to make")
    parser.add_argument("--length", type=int, default=48, help="bytes per row, including the end")
    args = parser.parse_args(argv)

    folder = corpus.new_folder(args.out, None)
    prepare(folder, args.length)
    corpus.say_next(folder)


if __name__ == "__main__":
    corpus.run(main)

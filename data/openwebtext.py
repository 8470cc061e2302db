"""openwebtext.py - OpenWebText, the corpus of the paper: 8 million web pages in 21 tars of 0.6 GB.

    python -m data.openwebtext              # -> out/openwebtext, 9 billion tokens
    python -m data.openwebtext --shards 1   # the first tar only, 0.4 billion
    python -m data.openwebtext --framed     # for a teacher of experiments.mdlm

The tars are downloaded to --cache, resuming an earlier try, and streamed: nothing is unpacked to
disk.
"""
import argparse
import lzma
import os
import shutil
import tarfile
import urllib.request
from http.client import HTTPException

from tqdm import tqdm

from data import corpus, text

URL = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
       "b3166bc19fbae165867d7f4965dc52279d1e9f40/urlsf_subset{:02d}.tar")
SHARDS = 21


def download(url, path):
    """Fetch url to path, resuming an earlier try. Raises OSError if bytes are missing."""
    partial = f"{path}.partial"
    with open(partial, "ab") as f:
        request = urllib.request.Request(url, headers={"Range": f"bytes={f.tell()}-"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # the server sends the whole file
                f.truncate(0)
            with tqdm.wrapattr(answer, "read", answer.length) as bar:
                shutil.copyfileobj(bar, f)
            if answer.length:
                raise OSError(f"{answer.length} bytes are missing")
    os.replace(partial, path)


def members(**where):
    """Yield (name, open file) for each file in a tar, given as to tarfile.open."""
    with tarfile.open(**where) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member)


def pages(path):
    """Yield (text, True) for each page in the compressed tars in a tar."""
    for name, archive in members(name=path, mode="r:"):
        if name.endswith(".xz"):
            for _, page in members(fileobj=archive, mode="r:xz"):
                yield page.read().decode("utf-8", errors="replace"), True


def documents(cache, shards):
    """Yield (text, True) for each page; download missing tars.

    Raises ValueError, saying how to continue, if one cannot be fetched or read whole.
    """
    os.makedirs(cache, exist_ok=True)
    for number in range(shards):
        url = URL.format(number)
        path = os.path.join(cache, os.path.basename(url))
        try:
            if not os.path.exists(path):
                download(url, path)
            yield from pages(path)
        except (OSError, EOFError, HTTPException, tarfile.TarError, lzma.LZMAError) as e:
            raise ValueError(f"{url} cannot be fetched or read ({e}): run again to resume; if "
                             f"that fails, delete {path}* or put the whole file there") from None


def main(argv=None):
    """Run the command with arguments argv, the shell's if None."""
    parser = argparse.ArgumentParser(
        prog="python -m data.openwebtext",
        description="Download OpenWebText and make a corpus of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shards", type=int, choices=range(1, SHARDS + 1), metavar="N",
                        default=SHARDS, help="only the first N of 21 tars")
    parser.add_argument("--framed", action="store_true", help=text.FRAMED)
    parser.add_argument("--out", default="out/openwebtext", help="corpus folder to make")
    parser.add_argument("--cache", default="out/downloads", help="folder for the tars")
    args = parser.parse_args(argv)

    folder = corpus.new_folder(args.out, None)
    pieces = text.tokenize(documents(args.cache, args.shards))
    made_from = {"path": URL, "shards": args.shards}
    corpus.write(folder, pieces, "text", "gpt2", 0, made_from, args.framed)
    corpus.say_next(folder, args.framed)


if __name__ == "__main__":
    corpus.run(main)

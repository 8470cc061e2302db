"""openwebtext.py - OpenWebText, the corpus of the paper: 8 million web pages in 21 tars of 0.6 GB.

    python -m data.openwebtext              # -> out/openwebtext, 9 billion tokens
    python -m data.openwebtext --shards 1   # the first tar only, 0.4 billion
    python -m data.openwebtext --framed     # for a teacher of experiments.mdlm

The tars are downloaded to --cache, going on where an earlier try stopped, and streamed: nothing is
unpacked to the disk.
"""
import contextlib
import http.client
import itertools
import lzma
import os
import tarfile
import urllib.error
import urllib.request

from tqdm import tqdm

from data import corpus, text
from data.command import make_parser, run_script

URL = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
       "b3166bc19fbae165867d7f4965dc52279d1e9f40/urlsf_subset{:02d}.tar")
SHARDS = 21


def download(url, path):
    """Fetch url to path unless it is there. ValueError that says what to put where, if it fails."""
    if os.path.exists(path):
        return
    partial = f"{path}.partial"
    try:
        fetch(url, partial)
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f"{url} cannot be fetched ({e}): run again to go on, or put the file at "
                         f"{path}") from None
    os.replace(partial, path)


def fetch(url, partial):
    """Append to a file what it still lacks of url. OSError or HTTPException if not all comes."""
    done = 0
    if os.path.islink(partial):  # what it leads to stays
        os.remove(partial)
    if os.path.exists(partial):
        done = os.path.getsize(partial)
    request = urllib.request.Request(url)
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers["Content-Range"] == f"bytes */{done}":
            return  # killed between the last byte and the renaming
        raise
    with answer:
        receive(answer, partial, done)


def receive(answer, partial, done):
    """Write a server's answer to the file, after its first `done` bytes if they were left out."""
    if answer.status != 206:  # the whole file comes
        done = 0
    mode, length, total = "ab" if done else "wb", answer.headers["Content-Length"], None
    if length is not None:
        total = done + int(length)
    name = os.path.basename(partial).removesuffix(".partial")
    with open(partial, mode) as f, \
            tqdm(desc=name, initial=done, total=total, unit="B", unit_scale=True) as bar:
        while block := answer.read(1 << 20):
            f.write(block)
            bar.update(len(block))
    size = os.path.getsize(partial)
    if total is not None and size != total:
        raise OSError(f"{size} of {total} bytes came")


def archives(path):
    """The compressed tars in a tar, as open files."""
    with tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.isfile() and member.name.endswith(".xz"):
                yield outer.extractfile(member)


def texts(archive):
    """The texts in one of them."""
    with tarfile.open(fileobj=archive, mode="r:xz") as inner:
        for member in inner:
            if member.isfile():
                yield inner.extractfile(member).read().decode("utf-8", errors="replace")


def documents(cache, shards):
    """(text, True) of each document; downloads what is missing. ValueError names a damaged tar."""
    os.makedirs(cache, exist_ok=True)
    for number in range(shards):
        url = URL.format(number)
        path = os.path.join(cache, os.path.basename(url))
        download(url, path)
        try:
            for page in itertools.chain.from_iterable(map(texts, archives(path))):
                yield page, True
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            raise ValueError(f"{path} is damaged ({e}): delete it and run again") from None


def prepare(folder="out/openwebtext", shards=SHARDS, cache="out/downloads", framed=False):
    """Make the corpus of the first tars. Returns {"train": tokens, "val": ..}."""
    pieces, made_from = text.tokenize(documents(cache, shards)), {"path": URL, "shards": shards}
    with contextlib.closing(text.show_progress(pieces, "OpenWebText")) as shown:
        return corpus.write(folder, shown, "text", "gpt2", 0, made_from, framed)


def main(argv=None):
    """The command line; argv: its words, those of the shell if None."""
    p, add = make_parser("Download OpenWebText and make a corpus of it.")
    add("--shards", type=int, choices=range(1, SHARDS + 1), metavar="N", default=SHARDS,
                   help="only the first N of 21 tars")
    add("--framed", action="store_true", help=text.FRAMED)
    add("--out", default="out/openwebtext", help="corpus folder to make")
    add("--cache", default="out/downloads", help="folder for the tars")
    args = p.parse_args(argv)
    corpus.refuse_existing(args.out)
    text.report(args.out, prepare(args.out, args.shards, args.cache, args.framed))


if __name__ == "__main__":
    run_script(main)

"""fasta.py - proteins from a FASTA file, one sequence a row, padded with the end token.

    python -m data.fasta swissprot.fasta.gz --length 128        # -> out/swissprot

Any FASTA file will do, also compressed as .gz or .xz.
"""
import argparse
import re

from data import corpus

OTHER = re.compile(f"[^{corpus.AMINO_ACIDS}]")


def read_fasta(path):
    """Return the unique sequences of a FASTA file, sorted; letters other than the 20 become X.

    Lines may be wrapped, in lower case, comments (;), or end with the stop *. Headers are free
    text. Raises ValueError, naming the line, if one is not FASTA.
    """
    sequences = []
    for number, line in enumerate(corpus.read_lines(path, "replace"), 1):
        line = line.strip()
        if line.startswith(">"):
            sequences.append([])
        elif line and not line.startswith(";"):
            if not sequences or not re.fullmatch(r"[A-Za-z]*\*?", line):
                raise ValueError(f"{path}, line {number} is not FASTA: {line[:40]!r}: give "
                                 "sequences of letters, each below a line that begins with >")
            letters = line.removesuffix("*").upper()
            sequences[-1].append(OTHER.sub("X", letters))

    texts = {"".join(lines) for lines in sequences}
    return sorted(texts - {""})


def main(argv=None):
    """Run the command with arguments argv, the shell's if None."""
    parser = argparse.ArgumentParser(
        prog="python -m data.fasta",
        description="Make a corpus of the proteins in a FASTA file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", help="FASTA file, also .gz or .xz")
    parser.add_argument("--length", type=int, default=128, help="residues per row")
    parser.add_argument("--long", choices=("drop", "crop"), default="drop",
                        help="what to do with longer sequences")
    parser.add_argument("--out", help="corpus folder to make; None: out/<stem of the file>")
    args = parser.parse_args(argv)

    folder = corpus.new_folder(args.out, args.file)
    texts = read_fasta(args.file)

    fit = {s for s in texts if len(s) <= args.length}
    too_long = len(texts) - len(fit)
    if args.long == "crop":
        fit = {s[:args.length] for s in texts}
    print(f"{args.file}: {len(texts)} unique sequences, {too_long} of them longer than "
          f"{args.length}: {args.long}ped, {len(fit)} left")

    made_from = {"path": args.file, "long": args.long}
    corpus.write_rows(folder, sorted(fit), "fasta", "protein", args.length, made_from)
    corpus.say_next(folder)


if __name__ == "__main__":
    corpus.run(main)

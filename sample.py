"""sample.py - write text with the student or the teacher, go on from a beginning, fill gaps, watch.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --model out/teacher.pt --steps 64       # what the student learnt from
    python sample.py --prompt "def load(" --watch            # the text unmasks before your eyes
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character

A masked-diffusion model is conditioned by not masking what is given, wherever it stands. Left out
on purpose: top-k and top-p (they lower the entropy, as --temperature does).
"""
import os
import sys
import time

import torch
from tqdm import tqdm

import didi
from data import corpus
from model import (RATE, SIZE, Discriminator, add_device_flags, load, make_parser, restore,
                   run, setup)


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument_group("sampling").add_argument
    add("--model", default="out/student.pt", help="checkpoint of distill.py or train_teacher.py")
    add("--steps", type=SIZE, default=8, help="N, the most denoiser calls that a text takes")
    add("--num", type=SIZE, default=16, help="how many texts")
    add("--temperature", type=RATE, default=1.0, help="divides the logits; 1: the model's law")
    add("--sampler", choices=("ancestral", "rgas"), default="ancestral",
        help="rgas: guided by the discriminator")
    add("--batch", type=SIZE, default=256, help="texts at once")

    add = p.add_argument_group("text").add_argument
    add("--prompt", default="", help="a fixed beginning; the rest is written")
    add("--infill", help="the whole text, with a ? for each unknown token; packed text goes on")
    add("--length", type=SIZE, help="tokens per text; None: drawn as the training texts have them")
    add("--watch", action="store_true", help="show every step; best with --num 1 to 10")
    add("--out", help="write the texts to this file, too; as FASTA if it ends in .fasta")
    add_device_flags(p)
    return p.parse_args(argv)


def given_tokens(args, encoding, mask_id):
    """Return the tokens that --prompt or --infill fix, a list, with the mask's id at the gaps."""
    pieces = [args.prompt]
    if args.infill is not None:
        pieces = args.infill.split("?")

    ids = []
    for piece in pieces:
        piece = os.fsencode(piece).decode()  # UTF-8, whatever the locale
        if encoding.name == "protein":
            piece = piece.upper()
            if set(piece) - set(corpus.AMINO_ACIDS):
                raise ValueError(f"{piece!r} is no protein: its letters are {corpus.AMINO_ACIDS}")
        ids += [*encoding.encode_ordinary(piece), mask_id]
    return ids[:-1]


def start_states(args, net, ids):
    """Return z (num, L): the tokens given, masks up to each text's length, pads behind it.

    The length comes first: it is --length, or that of the --infill template, or drawn from those
    of the training texts that leave room for the prompt. Packed text fills its passage.
    """
    L = net.config.length
    least = max(len(ids), 1)
    length = args.length
    if args.infill is not None and net.config.pads:
        length = least
    if length is None:
        shares = net.lengths.cpu()  # (L + 1,)
    else:
        shares = (torch.arange(L + 1) == length).float()
    if not shares[least:].any():
        raise ValueError(f"{len(ids)} tokens are given, and this model's texts have at most {L}, "
                         "or --length: shorten what is given, or change --length")

    lengths = least + torch.multinomial(shares[least:], args.num, replacement=True)
    z = net.start(lengths)
    z[:, :len(ids)] = torch.tensor(ids, dtype=torch.long)
    return z


def printable(text, keep=""):
    """Return the text with characters that could steer a terminal replaced, but those to keep."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def show(z, config, encoding):
    """Print the states z (B, L), a line each, with a block for each mask."""
    for ids in z.tolist():
        line = ""
        for token in ids:
            if token == config.mask_id:
                line += "\u2591"
            elif token != config.pad_id:
                line += encoding.decode([token])
        print(printable(line))
    print(flush=True)
    if sys.stdout.isatty():  # the next frame goes over this one
        time.sleep(0.3)
        print(f"\x1b[{len(z) + 1}A", end="")


def main(argv=None):
    args = parse_flags(argv)
    if args.out is not None and os.path.realpath(args.out) == os.path.realpath(args.model):
        raise ValueError(f"--out {args.out} is the model: name another file")
    device, bf16 = setup(args)
    ckpt, net = load(args.model, "student", "teacher", device=device, bf16=bf16)
    config, encoding = net.config, corpus.make_tokenizer(ckpt["tokenizer"])

    how = {"mask_id": config.mask_id, "steps": args.steps, "temperature": args.temperature}
    if args.watch:
        how["on_step"] = lambda z: show(z, config, encoding)
    if args.sampler == "rgas":
        if "disc" not in ckpt:
            raise ValueError(f"{args.model} has no discriminator, which --sampler rgas needs")
        disc = Discriminator(net).to(device)
        restore(ckpt, args.model, {"disc": disc})
        how["discriminator"] = disc.eval()  # spectral norm must not go on iterating
        how["pad_id"] = config.pad_id

    torch.manual_seed(args.seed)  # making networks has drawn numbers
    z = start_states(args, net, given_tokens(args, encoding, config.mask_id))
    parts = []
    for part in tqdm(z.split(args.batch), unit="batch", delay=2, disable=args.watch):
        part = part.to(device)
        if args.sampler == "rgas":
            x, nfe, disc_calls = didi.guided_sample(net, z=part, **how)
        else:
            x, nfe = didi.sample(net, part, **how)
            disc_calls = torch.zeros_like(nfe)
        parts.append((x, nfe, disc_calls))
    x, nfe, disc_calls = map(torch.cat, zip(*parts))

    keep, between = "", "\n"
    if not config.pads:  # packed text has lines of its own
        keep, between = "\n", "\n---\n"
    texts = corpus.decode(x, ckpt["tokenizer"], packed=not config.pads)
    texts = [printable(text, keep) for text in texts]
    print(f"{args.model}: {args.steps} steps, {args.sampler}, T {args.temperature:g}; per text "
          f"{nfe.float().mean():.2f} denoiser, {disc_calls.float().mean():.2f} discriminator calls")
    print(between.join(texts))
    if args.out is not None:
        if args.out.endswith(".fasta"):
            texts = [f">didi_{i + 1} {args.model}\n{text}" for i, text in enumerate(texts)]
        with open(args.out, "w", encoding="utf-8") as f:
            f.write("\n".join(texts) + "\n")


if __name__ == "__main__":
    run(main)

"""sample.py - write text with the student or the teacher, continue a prompt, fill gaps, watch.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --model out/teacher.pt --steps 64       # 16 of the teacher
    python sample.py --prompt "def load(" --watch            # the text unmasks before your eyes
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character

A masked-diffusion model is conditioned by not masking the given tokens, wherever they are. Left out
on purpose: top-k and top-p (they lower the entropy, as --temperature does).
"""
import functools
import os
import sys
import time

import torch
from tqdm import tqdm

import didi
from data import corpus
from model import (NATURAL, POSITIVE, Discriminator, add_device_flags, load, make_parser, restore,
                   run, setup)


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument_group("sampling").add_argument
    add("--model", default="out/student.pt", help="checkpoint of distill.py or train_teacher.py")
    add("--steps", type=NATURAL, default=8, help="sampling steps: the most denoiser calls per text")
    add("--order", choices=("interlaced", "random"), help="of revealing; None: the model's own")
    add("--num", type=NATURAL, default=16, help="number of texts")
    add("--temperature", type=POSITIVE, default=1.0, help="divides the logits")
    add("--sampler", choices=("ancestral", "rgas"), default="ancestral",
        help="rgas: guided by the discriminator")
    add("--batch", type=NATURAL, default=64, help="texts per batch; more are slower on a CPU")

    group = p.add_argument_group("text")
    given = group.add_mutually_exclusive_group().add_argument
    given("--prompt", default="", help="fixed beginning of each text")
    given("--infill", help="the text, with a ? for each unknown token; packed text continues")
    add = group.add_argument
    add("--length", type=NATURAL, help="tokens per text; None: drawn from the training lengths")
    add("--watch", action="store_true", help="show every step; best with --num 1 to 10")
    add("--out", help="also write the texts to this file")
    add_device_flags(p)
    return p.parse_args(argv)


def given_tokens(args, encoding, mask_id):
    """Return the token ids, a list, that --prompt or --infill fixes, with mask_id at the gaps.

    Raises ValueError if a protein has other letters than amino acids.
    """
    pieces = [args.prompt]
    if args.infill is not None:
        pieces = args.infill.split("?")

    ids = []
    for piece in pieces:
        piece = os.fsencode(piece).decode()  # UTF-8, whatever the locale
        if encoding.name == "protein":
            piece = piece.upper()
            if set(piece) - set(corpus.AMINO_ACIDS):
                raise ValueError(f"{piece!r} is not a protein: use only {corpus.AMINO_ACIDS}")
        ids += [*encoding.encode_ordinary(piece), mask_id]
    return ids[:-1]  # a mask stands between two pieces


def start_states(args, net, ids):
    """Return z (num, L): the given tokens, masks up to each text's length, then pads.

    The length is that of the --infill template, or --length, or drawn from those of the training
    texts that leave room for the prompt; packed text fills L. Raises ValueError if none fits.
    """
    L = net.config.length
    least = max(len(ids), 1)
    length = args.length
    if not net.config.pads and length is not None:
        raise ValueError("--length: packed text always fills its passage")
    if net.config.pads and args.infill is not None and length is None:
        length = least
    if length is None:
        shares = net.lengths.cpu()  # (L + 1,)
    else:
        shares = (torch.arange(L + 1) == length).float()
    if not shares[least:].any():
        raise ValueError(f"{len(ids)} tokens are given, but texts have at most {L} tokens, and "
                         "exactly --length if it is set: give fewer tokens or change --length")

    lengths = least + torch.multinomial(shares[least:], args.num, replacement=True)
    z = net.start(lengths)
    z[:, :len(ids)] = torch.tensor(ids, dtype=torch.long)
    return z


def printable(text, keep=""):
    """Return the text with U+FFFD for all characters that could control a terminal, but `keep`."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def show(z, config, encoding):
    """Print the states z (B, L), one line each, with a block for each mask."""
    for ids in z.tolist():
        line = ""
        for token in ids:
            if token == config.mask_id:
                line += "\u2591"
            elif token != config.pad_id:
                line += encoding.decode([token])
        print(printable(line))
    print(flush=True)
    if sys.stdout.isatty():
        time.sleep(0.3)
        print("\x1b[H\x1b[J", end="")  # clear the screen for the next frame, or for the result


def load_discriminator(ckpt, path, net):
    """Return a student's discriminator, in eval mode.

    Raises ValueError if the checkpoint has none.
    """
    if "disc" not in ckpt:
        raise ValueError(f"{path} has no discriminator, which --sampler rgas needs")
    disc = Discriminator(net).to(net.lengths.device)  # net gives the shape, restore the weights
    restore(ckpt, path, {"disc": disc})
    return disc.eval()  # stops spectral norm's power iteration


def fill(net, disc, z, steps, temperature=1.0, order=None, on_step=None):
    """Fill the masks of z (B, L), guided by disc unless it is None.

    Returns x (B, L), and the calls of the denoiser and of the discriminator (B,) each.
    """
    config = net.config
    how = {"steps": steps, "mask_id": config.mask_id, "temperature": temperature,
           "on_step": on_step, **config.sampling(order)}
    if disc is not None:
        return didi.guided_sample(net, disc, z, pad_id=config.pad_id, **how)
    x, nfe = didi.sample(net, z, **how)
    return x, nfe, torch.zeros_like(nfe)


def write(args, net, disc, z, on_step):
    """Return what `fill` does for z (num, L), --batch texts at once."""
    parts = []
    for part in tqdm(z.split(args.batch), unit="batch", delay=2, disable=args.watch):
        part = part.to(net.lengths.device)
        parts.append(fill(net, disc, part, args.steps, args.temperature, args.order, on_step))
    return map(torch.cat, zip(*parts))


def main(argv=None):
    args = parse_flags(argv)
    if args.out is not None and os.path.realpath(args.out) == os.path.realpath(args.model):
        raise ValueError(f"--out {args.out} is the model: name another file")
    device, bf16 = setup(args)
    ckpt, net = load(args.model, "student", "teacher", device=device, bf16=bf16)
    encoding = corpus.make_tokenizer(ckpt["tokenizer"])
    if args.order is None:
        args.order = net.config.order
    disc = on_step = None
    if args.sampler == "rgas":
        disc = load_discriminator(ckpt, args.model, net)
    if args.watch:
        on_step = functools.partial(show, config=net.config, encoding=encoding)

    torch.manual_seed(args.seed)  # after restore, which sets the random numbers
    z = start_states(args, net, given_tokens(args, encoding, net.config.mask_id))
    x, nfe, disc_calls = write(args, net, disc, z, on_step)

    packed = not net.config.pads
    keep = "\n" if packed else ""  # packed text contains line ends
    texts = [printable(text, keep) for text in corpus.decode(x, ckpt["tokenizer"], packed)]
    print(f"{args.model}: {args.steps} steps, {args.order}, {args.sampler}, "
          f"T {args.temperature:g}; per text {nfe.float().mean():.2f} denoiser, "
          f"{disc_calls.float().mean():.2f} discriminator calls")
    separator = "\n---\n" if packed else "\n"
    print(separator.join(texts))
    if args.out is not None:
        with open(args.out, "w", encoding="utf-8") as f:
            f.write(separator.join(texts) + "\n")


if __name__ == "__main__":
    run(main)

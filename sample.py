"""sample.py - write text with the student or the teacher, go on from a beginning, fill gaps, watch.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --model out/teacher.pt --steps 64       # what the student learnt from
    python sample.py --prompt "def load(" --watch            # the text unmasks before your eyes
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character

A masked-diffusion model is conditioned by not masking what is given, wherever it stands. Left out
on purpose: top-k and top-p (they lower the entropy, as --temperature does).
"""
import argparse
import math
import os
import shutil
import sys
import time

import torch
from tqdm import tqdm

import didi
from data import corpus
from model import (FROM_0, FROM_1, RATE, SHARE, WEIGHT, Discriminator, load_checkpoint, restore,
                   run_script, setup)


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Sample from the student or the teacher.")
    add = p.add_argument
    add("--model", default="out/student.pt", help="checkpoint of distill.py or train_teacher.py")
    add("--steps", type=FROM_1, default=8, help="N, the most denoiser calls that a sequence takes")
    add("--num", type=FROM_1, default=16, help="samples")
    add("--temperature", type=RATE, default=1.0, help="divides the logits; 1 = the model's law")
    add("--prompt", default="", help="a fixed beginning; the rest is written")
    add("--infill", help="fixed text with gaps; what follows it is free")
    add("--gap", default="?", help="the character of --infill that stands for one unknown")
    add("--length", type=FROM_1, help="texts of exactly so many characters")
    add("--watch", action="store_true", help="show every step; best with --num 1 to 10")
    add("--sampler", choices=("ancestral", "rgas"), default="ancestral", help="rgas: guided")
    add("--guidance", type=WEIGHT, default=1.0, help="h, weight of the reward's gradient in rgas")
    add("--candidates", type=FROM_1, default=4, help="M, next states to choose from in rgas")
    add("--switch", type=SHARE, default=0.5, help="share of guided steps that use the gradient")
    add("--batch", type=FROM_1, default=256, help="B, sequences at once: as memory allows")
    add("--out", help="write the samples there, too; as FASTA if it ends in .fasta or .fa")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 products [where fast]")
    add("--seed", type=FROM_0, default=0, help="repeats the samples exactly on a CPU")
    args = p.parse_args(argv)
    if args.watch and args.sampler == "rgas":
        raise ValueError("--watch shows the ancestral sampler only: leave out --sampler rgas")
    return args


def given_tokens(args, L, mask_id, encoding, packed):
    """z (L,): what is given, masks elsewhere; and (L,) bool: where the text must not end."""
    text, gap = args.prompt, None
    if args.infill is not None:
        text, gap = args.infill, args.gap
    if encoding.name == "protein":
        text = text.upper()
        odd = set(text) - set(corpus.AMINO_ACIDS) - {gap}
        if odd:
            raise ValueError(f"{min(odd)!a} is no amino acid: give some of {corpus.AMINO_ACIDS}")
    first, *others = text.split(gap) if gap else [text]
    ids = encoding.encode_ordinary(first)
    for piece in others:
        ids += [mask_id, *encoding.encode_ordinary(piece)]
    end = L if args.length is None else args.length
    if packed and end != L:
        raise ValueError("--length is for texts that end: this model writes whole passages")
    if not max(len(ids), 1) <= end <= L:
        raise ValueError(f"{len(ids)} tokens are given for a text of {end}, and the model writes "
                         f"at most {L}: shorten --prompt or --infill, or change --length")
    z = torch.full((L,), mask_id)
    z[:len(ids)] = torch.tensor(ids, dtype=torch.long)
    z[end:] = encoding.eot_token
    never_end = torch.arange(L) < (len(ids) if args.length is None else end)
    return z, never_end & (not packed)


def forbid_end(denoiser, never_end, eot):
    """The same denoiser, unable to end the text at the True positions of never_end (L,)."""
    def constrained(z, where):
        logits = denoiser(z, where)  # (n, V)
        logits[never_end.to(z.device).expand_as(where)[where], eot] = -math.inf
        return logits
    return constrained


def printable(text):
    """A young model writes any byte; none may steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def watcher(steps, mask_id, encoding, packed):
    """on_step(z) that redraws the texts on a terminal; elsewhere it prints the first, a line."""
    live, (columns, rows), frames = sys.stdout.isatty(), shutil.get_terminal_size(), []

    def as_line(ids):
        if not packed and encoding.eot_token in ids:
            ids = ids[:ids.index(encoding.eot_token)]
        texts = ["\u2591" if i == mask_id else printable(encoding.decode([i])) for i in ids]
        return "".join(texts)

    def on_step(z):
        frames.append(z)
        lines = [f"step {len(frames)}/{steps}", *map(as_line, z[:rows - 2].tolist())]
        if live:  # over the frame before; a wrapped line would spoil that
            up = f"\x1b[{len(lines)}A\x1b[J" if len(frames) > 1 else ""
            print(up + "\n".join(line[:columns - 1] for line in lines), flush=True)
            time.sleep(0.3)
        else:
            print(": ".join(lines[:2]), flush=True)
    return on_step


def write(args, net, disc, denoiser, z, on_step):
    """Fill the masks of z (N, L): x (N, L), denoiser calls (N,), discriminator calls (N,)."""
    mask_id, T, parts = net.config.mask_id, args.temperature, []
    for part in tqdm(z.split(args.batch), unit="batch", delay=2, disable=args.watch):
        part = part.to(net.position.device)
        if disc is None:
            x, nfe = didi.sample(denoiser, part, args.steps, mask_id, T, on_step)
            parts.append((x, nfe, torch.zeros_like(nfe)))
        else:
            parts.append(didi.guided_sample(denoiser, disc, part, args.steps, mask_id,
                                            args.guidance, args.candidates, args.switch, T))
    return [torch.cat(column).cpu() for column in zip(*parts)]


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    ckpt, net = load_checkpoint(args.model, ("student", "teacher"), device, bf16)
    made_of = name, packed = ckpt["tokenizer"], ckpt["packed"]
    encoding, disc = corpus.make_tokenizer(name), None
    if args.sampler == "rgas":
        if "disc" not in ckpt:
            raise ValueError(f"{args.model} has no discriminator, which --sampler rgas needs")
        disc = Discriminator(net, **ckpt["discriminator"]).to(device)
        restore({"disc": disc}, ckpt)
        disc.eval().requires_grad_(False)  # at rest: spectral norm must not go on iterating
        torch.manual_seed(args.seed)
    L, mask_id = net.config.length, net.config.mask_id
    z, never_end = given_tokens(args, L, mask_id, encoding, packed)
    denoiser = forbid_end(net, never_end, encoding.eot_token)
    on_step = watcher(args.steps, mask_id, encoding, packed) if args.watch else None
    x, nfe, calls = write(args, net, disc, denoiser, z.repeat(args.num, 1), on_step)
    print(f"{args.model}: {args.steps} steps, {args.sampler}, temperature {args.temperature:g}, "
          f"seed {args.seed}; per text {nfe.float().mean():.2f} denoiser and "
          f"{calls.float().mean():.2f} discriminator calls")
    texts = [text.split("\n") if packed else [text] for text in corpus.decode(x, *made_of)]
    texts = ["\n".join(map(printable, lines)) for lines in texts]
    print(("\n---\n" if packed else "\n").join(texts))
    if args.out is not None:
        if args.out.endswith((".fasta", ".fa")):
            texts = [f">didi_{i + 1} {args.model}\n{text}" for i, text in enumerate(texts)]
        with open(f"{args.out}.partial", "w", encoding="utf-8") as f:
            f.write("\n".join(texts) + "\n")
        os.replace(f"{args.out}.partial", args.out)


if __name__ == "__main__":
    run_script(main)

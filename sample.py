"""sample.py - write text with the student or the teacher, go on from a beginning, fill gaps, watch.

    python sample.py --steps 8                               # 16 samples of out/student.pt
    python sample.py --model out/teacher.pt --steps 64       # what the student learnt from
    python sample.py --prompt "def load(" --watch            # the text unmasks before your eyes
    python sample.py --infill "def get_????(self, ????):"    # each ? is one unknown character

A masked-diffusion model is conditioned by not masking what is given, wherever it stands. Left out
on purpose: top-k and top-p (they lower the entropy, as --temperature does).
"""
import shutil
import sys
import time

from data import corpus, files, memory  # before torch: Ctrl-C meanwhile is one word
import torch
from tqdm import tqdm

import didi
from data.command import (FROM_1, RATE, SHARE, SIZE, WEIGHT, add_device_flags, make_parser,
                          printable, run_script, setup)
from model import Discriminator, load_checkpoint, restore


def parse_flags(argv=None):
    p, add = make_parser("Sample from the student or the teacher.")
    add("--model", default="out/student.pt", help="checkpoint of distill.py or train_teacher.py")
    add("--steps", type=SIZE, default=8, help="N, the most denoiser calls that a sequence takes")
    add("--num", type=SIZE, default=16, help="samples")
    add("--temperature", type=RATE, default=1.0, help="divides the logits; 1 = the model's law")
    add("--prompt", type=str, default="", help="a fixed beginning; the rest is written")
    add("--infill", type=str, help="fixed text with gaps, all of it; packed text goes on after it")
    add("--gap", type=str, default="?", help="what stands in --infill for one unknown token")
    add("--length", type=FROM_1, help="texts of so many tokens [as long as training texts are]")
    add("--watch", action="store_true", help="show every step; best with --num 1 to 10")
    add("--sampler", choices=("ancestral", "rgas"), default="ancestral", help="rgas: guided")
    add("--guidance", type=WEIGHT, default=1.0, help="h, weight of the reward's gradient in rgas")
    add("--candidates", type=SIZE, default=4, help="M, next states to choose from in rgas")
    add("--switch", type=SHARE, default=0.5, help="share of guided steps that use the gradient")
    add("--batch", type=FROM_1, default=256, help="B, sequences at once, at most")
    add("--out", help="write the samples there, too; as FASTA if it ends in .fasta or .fa")
    add_device_flags(add)
    args = p.parse_args(argv)
    if args.watch and args.sampler == "rgas":
        raise ValueError("--watch shows the ancestral sampler only: leave out --sampler rgas")
    return args


def given_tokens(args, encoding, mask_id):
    """The tokens that --prompt or --infill fix, a list, with the mask's id at the gaps."""
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
    return ids


def start_states(args, net, ids):
    """z (num, L): the tokens given, masks up to each text's length, pads behind it.

    The length comes first: --length, or that of the --infill template, or at random one of the
    training texts' that leaves room for the prompt. Packed text always fills the passage.
    """
    given, length, L, pads = max(len(ids), 1), args.length, net.config.length, net.config.pads
    if length is not None and (args.infill is not None or not pads):
        raise ValueError("--length: leave it out, for a template of --infill is as long as it is, "
                         "and packed text fills its passage")
    if args.infill is not None and pads:
        length = given
    shares = net.lengths.cpu()  # (L + 1,)
    if length is not None:
        shares = (torch.arange(L + 1) == length).float()
    if not shares[given:].any():
        raise ValueError(f"{len(ids)} tokens are given, and texts have at most --length, {L}, or "
                         "what training texts had: shorten what is given, or change --length")
    z = net.start(given + torch.multinomial(shares[given:], args.num, replacement=True))
    z[:, :len(ids)] = torch.tensor(ids, dtype=torch.long)
    return z


def watcher(steps, config, encoding):
    """on_step(z) that redraws the texts on a terminal; elsewhere it prints the first, a line."""
    live, (columns, rows), count = sys.stdout.isatty(), shutil.get_terminal_size(), [0]

    def as_line(ids):
        shown = {i: printable(encoding.decode([i])) for i in ids if 0 <= i < config.mask_id}
        return "".join(map((shown | {config.mask_id: "\u2591", config.pad_id: ""}).get, ids))

    def on_step(z):
        count[0] = count[0] % steps + 1
        lines = [f"step {count[0]}/{steps}", *map(as_line, z[:rows - 2].tolist())]
        if live:  # over the frame before; a wrapped line would spoil that
            up = f"\x1b[{len(lines)}A\x1b[J" if count[0] > 1 else ""
            print(up + "\n".join(line[:columns - 1] for line in lines), flush=True)
            time.sleep(0.3)
        else:
            print(": ".join(lines[:2]), flush=True)
    return on_step


def write(args, net, disc, z, on_step):
    """Fill the masks of z (N, L): x (N, L), denoiser calls (N,), discriminator calls (N,)."""
    mask_id, T, parts = net.config.mask_id, args.temperature, []
    batches = z.split(min(args.batch, net.config.at_once))
    for part in tqdm(batches, unit="batch", delay=2, disable=args.watch):
        part = part.to(net.lengths.device)
        if disc is None:
            x, nfe = didi.sample(net, part, args.steps, mask_id, T, on_step)
            parts.append((x, nfe, torch.zeros_like(nfe)))
        else:
            parts.append(didi.guided_sample(net, disc, part, args.steps, mask_id, args.guidance,
                                            args.candidates, args.switch, T))
    return [torch.cat(column).cpu() for column in zip(*parts)]


def main(argv=None):
    args = parse_flags(argv)
    if args.out is not None:
        files.check_output(args.out, args.model, new_folder=False)
    device, bf16 = setup(args)
    ckpt, net = load_checkpoint(args.model, ("student", "teacher"), device, bf16)
    encoding, packed, disc = corpus.make_tokenizer(ckpt["tokenizer"]), not net.config.pads, None
    if args.sampler == "rgas":
        if "disc" not in ckpt:
            raise ValueError(f"{args.model} has no discriminator, which --sampler rgas needs")
        disc = Discriminator(net).to(device)
        restore({"disc": disc}, ckpt, args.model)
        disc.eval().requires_grad_(False)  # at rest: spectral norm must not go on iterating
        torch.manual_seed(args.seed)
    memory.check(net.config, device, 0, args.num, 16, "--num")
    z = start_states(args, net, given_tokens(args, encoding, net.config.mask_id))
    on_step = watcher(args.steps, net.config, encoding) if args.watch else None
    x, nfe, calls = write(args, net, disc, z, on_step)
    print(f"{args.model}: {args.steps} steps, {args.sampler}, T {args.temperature:g}; per text "
          f"{nfe.float().mean():.2f} denoiser, {calls.float().mean():.2f} discriminator calls")
    between, keep = ("\n---\n", "\n") if packed else ("\n", "")
    texts = [printable(text, keep) for text in corpus.decode(x, ckpt["tokenizer"], packed)]
    print(between.join(texts))
    if args.out is not None:
        if args.out.endswith((".fasta", ".fa")):
            texts = [f">didi_{i + 1} {args.model}\n{text}" for i, text in enumerate(texts)]
        with files.whole_file(args.out) as f:
            f.write("\n".join(texts) + "\n")


if __name__ == "__main__":
    run_script(main)

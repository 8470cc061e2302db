"""train_teacher.py - train the teacher, a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                        # minutes on two CPU cores, no download
    python train_teacher.py --causal               # the autoregressive baseline, same budget
    python train_teacher.py --data out/news        # a corpus of your own: data/README.md
    torchrun --standalone --nproc_per_node=8 train_teacher.py --data out/openwebtext --size small

Left out on purpose: dropout, weight decay (runs this short underfit) and time conditioning.
"""
import copy
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from data import corpus, quality
from model import (COUNT, NATURAL, POSITIVE, RANK, Config, Denoiser, add_run_flags, agree,
                   catch_signals, check_output, descend, fraction_done, log, make_parser, parse_run,
                   per_part, restore, run, save, setup)

SIZES = {
    "nano": {  # minutes on two CPU cores
        "n_layer": 3, "n_head": 4, "n_embd": 128, "length": 128,
        "batch": 64, "updates": 1700, "lr": 8e-3, "warmup": 100,
    },
    "mini": {  # 10 minutes on a GPU
        "n_layer": 6, "n_head": 6, "n_embd": 384, "length": 256,
        "batch": 256, "updates": 10_000, "lr": 4e-3, "warmup": 300,
    },
    "small": {  # the paper's network
        "n_layer": 12, "n_head": 12, "n_embd": 768, "length": 1024,
        "batch": 512, "updates": 100_000, "lr": 1e-3, "warmup": 2000,
    },
}


def parse_flags(argv=None):
    """Return the flags and, with --resume, the checkpoint to continue from, else None."""
    p = make_parser(__doc__)
    add = p.add_argument_group("data and network").add_argument
    add("--data", default=corpus.DEFAULT, help="corpus folder, see data/README.md")
    add("--causal", action="store_true", help="train the autoregressive baseline and judge instead")
    add("--size", choices=SIZES, default="nano", help="sets the defaults of the flags below")
    add("--n_layer", type=NATURAL, help="transformer blocks")
    add("--n_head", type=NATURAL, help="H, attention heads")
    add("--n_embd", type=NATURAL, help="D, width, a multiple of 2 H")
    add("--length", type=NATURAL, help="L, tokens per sequence of packed text; rows set their own")

    add = p.add_argument_group("training").add_argument
    add("--batch", type=NATURAL, help="sequences per update")
    add("--updates", type=NATURAL, help="optimiser steps")
    add("--lr", type=POSITIVE, help="peak learning rate; falls to a tenth along a cosine")
    add("--warmup", type=COUNT, help="updates of linear warm-up")
    add("--compile", action="store_true", help="torch.compile the trunk: needs a C++ compiler")
    add_run_flags(p, out="out/teacher.pt", eval_every=425)

    p.set_defaults(**SIZES["nano"])  # for --help
    given = p.parse_args(argv)  # to see --size; parsed again below, so that given flags win
    p.set_defaults(**SIZES[given.size])
    if given.causal:
        p.set_defaults(out="out/causal.pt")
    return parse_run(p, argv)


def causal_nll(model, x, mask_id):
    """Return -log p(x_i | x_1 .. x_{i-1}) (B, L), nats; the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=mask_id)
    logits = model(z).float()  # (B, L, V)
    return F.cross_entropy(logits.transpose(1, 2), x, reduction="none")


def bound_and_loss(model, x):
    """Return (bound, loss) of x (B, L); the bound, nats per text token, includes the lengths."""
    mask_id = model.config.mask_id
    pad_id = model.config.pad_id
    text = x != pad_id  # (B, L)
    if model.config.causal:  # it predicts the first end, so that counts
        counted = corpus.until_end(x, pad_id)  # (B, L)
        nll = (causal_nll(model, x, mask_id) * counted).sum()
        return nll / text.sum(), nll / counted.sum()

    bound, loss = didi.nelbo(model, x, mask_id, pad_id)
    p_length = model.lengths[text.sum(1)].clamp(min=1e-6)  # (B,)
    return bound - p_length.log().sum() / text.sum(), loss


@torch.no_grad()
def validate(model, data, device):
    """Return the bound of held-out text and measures of samples, with fixed random numbers."""
    L = model.config.length
    row = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        nats = tokens = 0
        num = max(1, 2 ** 16 // L)
        for x in data.held_out(num, L).split(64):
            x = x.to(device)
            bound, _ = bound_and_loss(model, x)
            n = (x != model.config.pad_id).sum()
            nats += bound * n
            tokens += n
        row["val_nelbo"] = (nats / tokens).item()

        for steps in (8, 64):
            if model.config.causal:
                continue  # its sampling loop is in experiments/autoregressive.py
            z = model.start(model.draw_lengths(128))
            x, _ = didi.sample(model, z, steps, model.config.mask_id)
            for name, value in quality.shown(x, data).items():
                row[f"{name}@{steps}"] = value
    return row


def main(argv=None):
    args, ckpt = parse_flags(argv)
    kind = "causal" if args.causal else "teacher"
    data = corpus.load(args.data)
    check_output(args.out, kind, args.data)
    if args.n_embd % (2 * args.n_head):
        raise ValueError(f"--n_embd {args.n_embd} is not a multiple of 2 --n_head")
    device, bf16 = setup(args)

    # the network and its average
    L = args.length if data.packed else data.length
    vocab_size = corpus.make_tokenizer(data.tokenizer).n_vocab
    config = Config(
        vocab_size, L, args.n_layer, args.n_head, args.n_embd, args.causal,
        pads=not data.packed,
        framed=data.framed,
    )
    torch.manual_seed(args.seed)
    model = Denoiser(config).to(device)
    model.bf16 = bf16
    model.lengths.copy_(data.length_shares(L))
    average = copy.deepcopy(model)

    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    # "is", since tensors compare with == element by element
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    # Muon's steps are scaled to be as long as AdamW's: one learning rate serves both
    muon = torch.optim.Muon(matrices, args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, args.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    nets = {"model": model, "ema": average, "muon": muon, "adamw": adamw}
    step, seconds, rows = 0, 0.0, []
    if ckpt is not None:
        restore(ckpt, args.out, nets)
        step, seconds, rows = ckpt["step"], ckpt["seconds"], ckpt["log"]
    if args.compile:
        model.trunk = torch.compile(model.trunk)
    if RANK > 0:  # only now: the same numbers above made the networks of all processes alike
        torch.manual_seed(args.seed + 1000 * RANK + step)

    B = per_part("batch", args)  # of one process and part
    signals, stop = catch_signals(), 0
    begin = time.perf_counter() - seconds
    progress = fraction_done(args, step, seconds)
    if progress == 1:
        print(f"{args.out} is already trained: give more --updates or --minutes")
    bar = tqdm(desc=args.out, total=args.updates, initial=step, disable=RANK > 0)
    while progress < 1 and not stop:
        # gradient of the mean over a batch
        for _ in range(args.accumulate):
            x = data.batch(B, L, device)  # (B, L)
            bound, loss = bound_and_loss(model, x)
            (loss / args.accumulate).backward()

        # step; the learning rate warms up, then falls to a tenth along a cosine
        warm = min((step + 1) / max(args.warmup, 1), 1)
        lr = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * progress))
        norm = descend(model, lr, muon, adamw)
        decay = min(0.995, (step + 1) / (step + 10))
        didi.update_ema(average, model, decay)
        step += 1

        # log, table, checkpoint
        seconds, stop = agree(time.perf_counter() - begin, signals[-1])
        progress = fraction_done(args, step, seconds)
        row = {"step": step, "seconds": seconds, "loss": loss.item(), "nelbo": bound.item()}
        log(rows, bar, row | {"norm": norm, "lr": lr})
        table = progress == 1 or step % args.eval_every == 0
        if table and RANK == 0:
            row = {"step": step} | validate(average, data, device)
            log(rows, bar, row, table=True)
        if table or stop:
            save(args.out, rows, nets, kind=kind, config=vars(config), tokenizer=data.tokenizer,
                 flags=vars(args), step=step, seconds=seconds)
    bar.close()
    return int(stop)


if __name__ == "__main__":
    run(main)

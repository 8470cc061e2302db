"""train_teacher.py - train the teacher, a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                        # 2 minutes on two CPU cores, downloads nothing
    python train_teacher.py --causal               # the autoregressive baseline, the same budget
    python train_teacher.py --data out/news        # a corpus of your own: data/README.md
    torchrun --standalone --nproc_per_node=8 train_teacher.py --data out/openwebtext --size small

Left out on purpose: dropout, weight decay (runs this short underfit) and time conditioning.
"""
import copy
import math
import time

from data import corpus, files, memory  # before torch: Ctrl-C meanwhile is one word
import torch
import torch.nn.functional as F

import didi
from data.command import (FROM_0, FROM_1, RATE, SHARE, SIZE, add_run_flags, agree, make_parser,
                          parse_run, progress, run_script, setup, share_done, share_out,
                          stop_requested)
from model import (RANK, Config, Denoiser, average_gradients, compile_trunk, load_checkpoint,
                   restore, save_checkpoint, update_ema)

SIZED = ("n_layer", "n_head", "n_embd", "length", "batch", "updates", "lr", "warmup")
SIZES = {"nano": (3, 4, 128, 128, 64, 1700, 8e-3, 100),            # minutes on two CPU cores
         "mini": (6, 6, 384, 256, 256, 10_000, 4e-3, 300),         # 10 minutes of a GPU
         "small": (12, 12, 768, 1024, 512, 100_000, 1e-3, 2000)}   # the paper's network


def parse_flags(argv=None):
    p, add = make_parser("Train the teacher, a masked-diffusion model.")
    add("--data", default=corpus.DEFAULT, help="corpus folder, see data/README.md [signatures]")
    add("--causal", action="store_true", help="train the autoregressive baseline and judge instead")
    add("--size", choices=SIZES, default="nano", help="what all that is in [] below is by default")
    add("--n_layer", type=SIZE, help="transformer blocks [3; 6; 12]")
    add("--n_head", type=SIZE, help="H, attention heads [4; 6; 12]")
    add("--n_embd", type=SIZE, help="D, width, a multiple of 2 H [128; 384; 768]")
    add("--length", type=SIZE, help="L, tokens per sequence of packed text [128; 256; 1024]")
    add("--batch", type=SIZE, help="B, sequences per update [64; 256; 512]")
    add("--updates", type=FROM_1, help="optimiser steps [1700; 10000; 100000]")
    add("--lr", type=RATE, help="peak: after warm-up a cosine to a tenth [8e-3; 4e-3; 1e-3]")
    add("--warmup", type=FROM_0, help="updates of linear warm-up [100; 300; 2000]")
    add("--ema", type=SHARE, default=0.995, help="decay of the weight average that is distilled")
    add("--compile", action="store_true", help="torch.compile of the trunk [on CUDA with Triton]")
    add_run_flags(add, eval_every=425, out="out/teacher.pt")
    if p.parse_args(argv).causal:
        p.set_defaults(out="out/causal.pt")
    return parse_run(p, argv, lambda path: load_checkpoint(path, ("teacher", "causal"))[0])


def settle(args, data):
    """Fill in what the corpus and --size decide. ValueError if --length is not the corpus' own."""
    if not data.packed and args.length in (None, data.length):
        args.length = data.length
    elif not data.packed:
        raise ValueError(f"--length {args.length}, but {args.data} has rows of {data.length}")
    for name, value in zip(SIZED, SIZES[args.size]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.n_embd % (2 * args.n_head):
        raise ValueError(f"--n_embd {args.n_embd} must be a multiple of 2 --n_head {args.n_head}")
    data.held_out(1, args.length)  # too little of it is said now, not at the first table


def networks(args, config, data, device, bf16):
    """{"model", "ema", and two optimisers: "muon" of the blocks' matrices, "adamw" of the rest}."""
    model = Denoiser(config).to(device)
    model.bf16 = bf16
    model.lengths.copy_(data.length_shares(config.length))
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    # Muon's steps are scaled to be as long as AdamW's: one learning rate serves both
    return {"model": model, "ema": copy.deepcopy(model),
            "muon": torch.optim.Muon(matrices, args.lr, 0.0, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(rest, args.lr, (0.9, 0.98), weight_decay=0.0, fused=True)}


def causal_nll(model, x, mask_id):
    """-log p(x_i | x_1 .. x_{i-1}) (B, L), nats, of x (B, L); the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=mask_id)
    return F.cross_entropy(model(z).float().flatten(0, 1), x.flatten(), reduction="none").view_as(x)


def bound_and_loss(model, x):
    """Of x (B, L): nats per text token, those of the length included (at most 13.8); the loss."""
    mask_id, pad_id = model.config.mask_id, model.config.pad_id
    text = x != pad_id  # (B, L)
    if model.config.causal:  # which says itself where a text ends
        counted = corpus.until_end(x, pad_id)  # (B, L)
        nll = (causal_nll(model, x, mask_id) * counted).sum()
        return nll / text.sum(), nll / counted.sum()
    bound, loss = didi.nelbo(model, x, mask_id, pad_id)
    p_length = model.lengths[text.sum(1)].clamp(min=1e-6)  # (B,)
    return bound - p_length.log().sum() / text.sum(), loss


@torch.no_grad()
def validate(model, data, device):
    """{"val_nelbo": .., "val_ppl": .., measures of samples}; always the same random numbers."""
    L, pad_id = model.config.length, model.config.pad_id
    steps = () if model.config.causal else (8, 64)  # causal samples need a loop of their own
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        x = data.held_out(max(1, 2 ** 16 // L), L).to(device)
        parts = x.split(min(64, model.config.at_once))
        nats = [bound_and_loss(model, part)[0] * (part != pad_id).sum() for part in parts]
    nelbo = sum(nats).item() / (x != pad_id).sum().item()
    return {"val_nelbo": nelbo, "val_ppl": math.exp(min(nelbo, 700)),
            **data.measures(model, didi.sample, steps)}


def train(args, nets, data, device, about, step, seconds):
    """The loop, until --updates or --minutes are over or a signal comes; returns the exit code."""
    model, L, B = nets["model"], nets["model"].config.length, share_out("batch", args)
    if RANK > 0:  # every process its own random numbers; the first one's go on
        torch.manual_seed(args.seed + 1000 * RANK + step)
    begin, code, stop = time.perf_counter() - seconds, 0, stop_requested()
    share = share_done(args, step, seconds)
    with progress(args, step, args.updates) as log:
        while share < 1 and not code:
            warm = min((step + 1) / max(args.warmup, 1), 1)
            lr = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * share))
            for _ in range(args.accumulate):
                x = data.batch(B, L, device)  # (B, L)
                bound, loss = bound_and_loss(model, x)
                (loss / args.accumulate).backward()
            average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (nets["muon"], nets["adamw"]):
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            update_ema(nets["ema"], model, min(args.ema, (step + 1) / (step + 10)))
            step += 1
            seconds, code = agree(time.perf_counter() - begin, stop())
            share = share_done(args, step, seconds)
            table = step % args.eval_every == 0 or share == 1
            log({"step": step, "seconds": seconds, "loss": loss.item(), "nelbo": bound.item(),
                 "norm": norm.item(), "lr": lr})
            if table or code:
                save_checkpoint(args.out, nets, step=step, seconds=seconds, **about)
            if table and RANK == 0:
                log({"step": step, **validate(nets["ema"], data, device)}, table)
    return int(code)


def main(argv=None):
    args, ckpt = parse_flags(argv)
    data = corpus.load(args.data)
    files.check_output(args.out, args.data)
    settle(args, data)
    device, bf16 = setup(args)
    config = Config(corpus.make_tokenizer(data.tokenizer).n_vocab, args.length, args.n_layer,
                    args.n_head, args.n_embd, args.causal, not data.packed, data.framed)
    token = 20 * args.n_embd * args.n_layer + 3 * config.vocab_size  # bytes
    memory.check(config, device, 4, share_out("batch", args), token, "--batch")
    nets = networks(args, config, data, device, bf16)
    step, seconds = restore(nets, ckpt, args.out)
    compile_trunk(nets["model"], args.compile)
    about = {"kind": "causal" if args.causal else "teacher", "config": vars(config),
             "tokenizer": data.tokenizer, "flags": vars(args)}
    return train(args, nets, data, device, about, step, seconds)


if __name__ == "__main__":
    run_script(main, resumes=True)

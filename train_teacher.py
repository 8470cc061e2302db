"""train_teacher.py - train the teacher, a masked-diffusion language model (MDLM, arXiv 2406.07524).

    python train_teacher.py                        # 2 minutes on two CPU cores, downloads nothing
    python train_teacher.py --resume               # go on after Ctrl-C, SIGTERM or a crash
    python train_teacher.py --causal               # the autoregressive baseline, the same budget
    python -m data.text news.txt                   # make a corpus of your own (data/README.md) ..
    python train_teacher.py --data out/news        # .. and train on it
    torchrun --standalone --nproc_per_node=8 train_teacher.py --data out/openwebtext --size small

Left out on purpose: dropout and weight decay (runs this short underfit), time conditioning.
"""
import argparse
import copy
import importlib.util
import math
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from data import corpus
from model import (FROM_0, FROM_1, RANK, RATE, SAVE_EVERY, SHARE, Config, Denoiser, agree,
                   average_gradients, load_checkpoint, log_row, open_log, restore, run_script,
                   save_checkpoint, setup, share_done, share_out, stop_requested, update_ema)

# The default in minutes on two CPU cores; a good model in 10 minutes of a GPU; the paper's network.
SIZES = {
    "nano": {"n_layer": 3, "n_head": 4, "n_embd": 128, "length": 128, "batch": 64,
             "updates": 1700, "lr": 2e-3, "warmup": 100},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "length": 256, "batch": 256,
             "updates": 10000, "lr": 1e-3, "warmup": 300},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "length": 1024, "batch": 512,
              "updates": 100000, "lr": 3e-4, "warmup": 2000},
}


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Train the teacher, a masked-diffusion model.")
    add = p.add_argument
    add("--data", default=corpus.DEFAULT, help="corpus folder, see data/README.md [signatures]")
    add("--causal", action="store_true", help="train the autoregressive baseline and judge instead")
    add("--size", choices=SIZES, default="nano", help="what all that is in [] below is by default")
    add("--length", type=FROM_1, help="L, tokens per sequence of packed text [128; 256; 1024]")
    add("--n_layer", type=FROM_1, help="transformer blocks [3; 6; 12]")
    add("--n_head", type=FROM_1, help="H, attention heads [4; 6; 12]")
    add("--n_embd", type=FROM_1, help="D, width, a multiple of 2 H [128; 384; 768]")
    add("--updates", type=FROM_1, help="optimiser steps [1700; 10000; 100000]")
    add("--batch", type=FROM_1, help="B, sequences per update [64; 256; 512]")
    add("--lr", type=RATE, help="peak: after warm-up a cosine to a tenth [2e-3; 1e-3; 3e-4]")
    add("--warmup", type=FROM_0, help="updates of linear warm-up [100; 300; 2000]")
    add("--muon", action="store_true", help="Muon for the blocks' matrices; wants 4 times the --lr")
    add("--ema", type=SHARE, default=0.995, help="decay of the weight average that is distilled")
    add("--compile", action="store_true", help="torch.compile of the trunk [on CUDA with Triton]")
    add("--minutes", type=RATE, help="stop then, the schedule fitted to it, whatever --updates is")
    add("--accumulate", type=FROM_1, default=1, help="parts of a batch, one by one: less memory")
    add("--eval_every", type=FROM_1, default=425, help="updates between tables and checkpoints")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 products [where fast]")
    add("--seed", type=FROM_0, default=0, help="repeats a run exactly on a CPU")
    add("--out", help="checkpoint, the log beside it as .jsonl [out/teacher.pt, out/causal.pt]")
    add("--resume", action="store_true", help="go on from --out; its flags if not given again")
    kind = "causal" if p.parse_args(argv).causal else "teacher"
    p.set_defaults(out=f"out/{kind}.pt")
    args, ckpt = p.parse_args(argv), None
    if args.resume:
        ckpt, _ = load_checkpoint(args.out, (kind,))
        p.set_defaults(**ckpt["flags"] | {"out": args.out})
        args = p.parse_args(argv)
    return args, ckpt


def settle(args, data):
    """Fill in what the corpus and --size decide. ValueError if --length is not the corpus' own."""
    if args.length is None and not data.packed:
        args.length = data.length
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if data.length not in (0, args.length):
        raise ValueError(f"--length {args.length}, but {args.data} has rows of {data.length}: "
                         "leave it out, or make the corpus again with another --length")
    if args.n_embd % (2 * args.n_head):
        raise ValueError(f"--n_embd {args.n_embd} must be a multiple of 2 --n_head {args.n_head}")
    data.held_out(1, args.length)  # too little of it is said now, not at the first table


def networks(args, config, device, bf16):
    """{"model", "ema", "optimizer", with --muon "muon"}, new."""
    model = Denoiser(config).to(device)
    model.bf16 = bf16
    nets, matrices = {"model": model, "ema": copy.deepcopy(model)}, []
    if args.muon:  # its steps are scaled to be as long as AdamW's: one learning rate serves both
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        nets["muon"] = torch.optim.Muon(matrices, args.lr, 0.0, adjust_lr_fn="match_rms_adamw")
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    nets["optimizer"] = torch.optim.AdamW(rest, args.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    return nets


def causal_nll(model, x, mask_id):
    """-log p(x_i | x_1 .. x_{i-1}) (B, L), nats, of x (B, L); the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=mask_id)
    return F.cross_entropy(model(z).float().transpose(1, 2), x, reduction="none")


def bound_and_loss(model, x):
    """Of x (B, L): nats per token to report, and the loss to train on, less noisy in short runs."""
    if model.config.causal:
        return (causal_nll(model, x, model.config.mask_id).mean(),) * 2
    return didi.nelbo(model, x, model.config.mask_id)


@torch.no_grad()
def validate(model, data, device):
    """{"val_nelbo": .., "val_ppl": .., measures of 128 samples}; always the same random numbers."""
    L = model.config.length
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        x = data.held_out(max(1, 2 ** 16 // L), L).to(device)
        bounds = [bound_and_loss(model, part)[0] * len(part) for part in x.split(64)]
    nelbo = sum(bounds).item() / len(x)
    steps = () if model.config.causal else (8, 64)
    return {"val_nelbo": nelbo, "val_ppl": math.exp(nelbo),
            **data.measures(model, didi.sample, steps)}


def train(args, nets, data, device, about, step, seconds):
    """The loop, until --updates or --minutes are over or a signal comes; returns the exit code."""
    model, L, B = nets["model"], nets["model"].config.length, share_out("batch", args)
    optimizers = [nets[name] for name in ("optimizer", "muon") if name in nets]
    if RANK > 0:  # every process its own random numbers; the first one's go on
        torch.manual_seed(args.seed + 1000 * RANK + step)
    begin, saved, code, stop = time.perf_counter() - seconds, seconds, 0, stop_requested()
    share = share_done(args, step, seconds)
    total = None if args.minutes else args.updates
    with open_log(args) as log, tqdm(None, args.out, total, initial=step, disable=RANK > 0) as bar:
        while share < 1 and not code:
            warm = min((step + 1) / max(args.warmup, 1), 1)
            lr = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * share))
            for _ in range(args.accumulate):
                x = data.batch(B, L, device)  # (B, L)
                bound, loss = bound_and_loss(model, x)
                (loss / args.accumulate).backward()
            average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            update_ema(nets["ema"], model, min(args.ema, (step + 1) / (step + 10)))

            step += 1
            seconds, code = agree(time.perf_counter() - begin, stop())
            share = share_done(args, step, seconds)
            table = step % args.eval_every == 0 or share == 1
            if table or step % 10 == 0:
                log_row(log, bar, {"step": step, "seconds": seconds, "loss": loss.item(),
                                   "nelbo": bound.item(), "norm": norm.item(), "lr": lr,
                                   "tokens_per_s": step * args.batch * L / seconds})
            if table or code or seconds - saved > SAVE_EVERY:
                save_checkpoint(args.out, nets, step=step, seconds=seconds, **about)
                saved = seconds
            if table and RANK == 0:
                log_row(log, bar, {"step": step, **validate(nets["ema"], data, device)}, show=True)
            bar.update()
    return int(code)


def main(argv=None):
    args, ckpt = parse_flags(argv)
    data = corpus.load(args.data)
    settle(args, data)
    device, bf16 = setup(args)
    config = Config(corpus.make_tokenizer(data.tokenizer).n_vocab, args.length, args.n_layer,
                    args.n_head, args.n_embd, args.causal)
    nets, step, seconds = networks(args, config, device, bf16), 0, 0.0
    if ckpt:
        restore(nets, ckpt)
        step, seconds = ckpt["step"], ckpt["seconds"]
    triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if args.compile or triton:
        nets["model"].trunk = torch.compile(nets["model"].trunk)
    if RANK == 0:
        tokens, size = sum(map(len, data.train)), sum(p.numel() for p in nets["model"].parameters())
        print(f"{tokens / 1e6:.1f} M tokens to train, L = {config.length}; {size / 1e6:.2f} M "
              f"parameters on {device}, {'bfloat16' if bf16 else 'float32'}")
    about = {"kind": "causal" if args.causal else "teacher", "config": asdict(config),
             "tokenizer": data.tokenizer, "packed": data.packed, "flags": vars(args)}
    return train(args, nets, data, device, about, step, seconds)


if __name__ == "__main__":
    run_script(main)

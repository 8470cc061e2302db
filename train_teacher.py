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

import didi
from data import corpus, quality
from model import (COUNT, NATURAL, POSITIVE, RANK, Config, Denoiser, add_run_flags, agree,
                   catch_signals, check_output, descend, fraction_done, log, make_bar, make_parser,
                   parse_run, per_part, restore, run, save, setup)

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
    """Return the flags and the checkpoint to start from, see model.parse_run."""
    p = make_parser(__doc__)
    add = p.add_argument_group("data and network").add_argument
    add("--data", default=corpus.DEFAULT, help="corpus folder, see data/README.md")
    add("--causal", action="store_true",
        help="train the autoregressive baseline, which is also the judge")
    add("--size", choices=SIZES, help="sets the defaults of the flags below; None: nano")
    add("--n_layer", type=NATURAL, help="transformer blocks")
    add("--n_head", type=NATURAL, help="H, attention heads")
    add("--n_embd", type=NATURAL, help="D, width, a multiple of 2 H")
    add("--length", type=NATURAL,
        help="L, tokens per sequence of packed text; short texts set their own")

    add = p.add_argument_group("training").add_argument
    add("--order", choices=("interlaced", "random"), default="interlaced",
        help="order of revealing, from which every other batch of masks comes; the rest is random")
    add("--batch", type=NATURAL, help="sequences per update")
    add("--updates", type=NATURAL, help="optimiser steps")
    add("--lr", type=POSITIVE, help="peak learning rate; falls to a tenth along a cosine")
    add("--warmup", type=COUNT, help="updates of linear warm-up")
    add("--compile", action="store_true", help="torch.compile the trunk: needs a C++ compiler")
    add_run_flags(p, out="out/teacher.pt", eval_every=425)

    p.set_defaults(**SIZES["nano"])
    given = p.parse_args(argv)  # to see --size and --causal; given flags win below
    if given.causal:
        p.set_defaults(out="out/causal.pt")
    return parse_run(p, argv, SIZES.get(given.size, {}))


def orthogonalise(X):
    """Return the matrix X with its singular values moved to about .5 to 1.5, but for tiny ones: 5
    Newton-Schulz iterations."""
    if X.shape[0] > X.shape[1]:
        return orthogonalise(X.T).T
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        X = torch.addmm(X, polynomial, X, beta=3.4445)
    return X


class Muon(torch.optim.Optimizer):
    """Descend along orthogonalised Nesterov momentum, for matrices (arXiv 2502.16982).

    torch.optim.Muon does the same in bfloat16, at which most CPUs are slow. Steps are as long as
    AdamW's, so that one learning rate serves both.
    """

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 0.05)
            direction = orthogonalise(p.grad.lerp(momentum, 0.95))
            scale = 0.2 * max(p.shape) ** 0.5  # makes the direction's root mean square 0.2
            p.sub_(direction, alpha=group["lr"] * scale)


def causal_nll(model, x, mask_id):
    """Return -log p(x_i | x_1 .. x_{i-1}) (B, L), nats; the mask token stands before x_1."""
    z = F.pad(x[:, :-1], (1, 0), value=mask_id)
    logits = model(z).float()  # (B, L, V)
    nll = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none")
    return nll.view_as(x)


def bound_and_loss(model, x, order="random"):
    """Return (bound, loss) of x (B, L); the bound, nats of all texts, includes their lengths."""
    mask_id = model.config.mask_id
    pad_id = model.config.pad_id
    if model.config.causal:  # it predicts the first end, so that counts
        counted = corpus.until_end(x, pad_id)  # (B, L)
        nll = (causal_nll(model, x, mask_id) * counted).sum()
        return nll, nll / counted.sum()

    bound, loss = didi.nelbo(model, x, mask_id, pad_id, order=order)
    length = (x != pad_id).sum(1)  # (B,)
    p_length = model.lengths[length].clamp(min=1e-6)  # (B,)
    return bound - p_length.log().sum(), loss


@torch.no_grad()
def validate(net, data, device, passes):
    """Return measures of held-out text and of samples, with fixed random numbers.

    The bound includes the text's length, nll@N does not.

    passes is the number of sequences that passed the network since the last table. If they are few,
    fewer are measured, so that a table takes about a tenth of the time, or less.
    """
    config = net.config
    num = min(max(passes // 100, 4), 256)
    x = data.held_out(num, config.length)
    row = {"held_out": len(x)}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1234)
        text_tokens = (x != config.pad_id).sum().item()
        parts = x.to(device).split(32)  # bounds the memory
        nats = [bound_and_loss(net, part)[0] for part in parts]
        row["val_nelbo"] = sum(nats).item() / text_tokens
        if config.causal:
            return row  # its sampling loop is in experiments/autoregressive.py

        row["samples"] = num // 2
        z = net.start(net.draw_lengths(num // 2))
        for steps in (4, 8):
            how = {"steps": steps, "mask_id": config.mask_id, **config.sampling()}
            nats = [didi.few_step_nll(net, part, pad_id=config.pad_id, **how) for part in parts]
            row[f"nll@{steps}"] = torch.cat(nats).sum().item() / text_tokens
            texts = [didi.sample(net, part, **how)[0] for part in z.split(32)]
            for name, value in quality.shown(torch.cat(texts), data).items():
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

    exponent = 1.0  # of the time grid
    if args.order == "interlaced" and not data.packed:
        exponent = 1.5  # short texts gain, long ones lose

    # the network and its average
    L = args.length if data.packed else data.length
    vocab_size = corpus.make_tokenizer(data.tokenizer).n_vocab
    config = Config(
        vocab_size, L, args.n_layer, args.n_head, args.n_embd, args.causal,
        pads=not data.packed,
        framed=data.framed,
        order=args.order,
        exponent=exponent,
    )
    torch.manual_seed(args.seed)
    model = Denoiser(config).to(device)
    model.bf16 = bf16
    model.lengths.copy_(data.length_shares(L))
    average = copy.deepcopy(model)

    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    in_matrices = set(matrices)
    rest = [p for p in model.parameters() if p not in in_matrices]
    muon = Muon(matrices, {"lr": args.lr})
    adamw = torch.optim.AdamW(rest, args.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    nets = {"model": model, "ema": average, "muon": muon, "adamw": adamw}
    if args.resume:
        restore(ckpt, args.out, nets)
    step = ckpt["step"]
    seconds = ckpt["seconds"]
    rows = ckpt["log"]
    if args.compile:
        model.trunk = torch.compile(model.trunk)
    if RANK > 0:  # only now: the same numbers above made the networks of all processes alike
        torch.manual_seed(args.seed + 1000 * RANK + step)

    B = per_part("batch", args)  # of one process and part
    signals = catch_signals()
    stop = 0
    begin = time.perf_counter() - seconds
    progress = fraction_done(args, step, seconds)
    if progress >= 1:
        print(f"{args.out} is already trained: give more --updates or --minutes")
    bar = make_bar(args, args.updates, step)
    while progress < 1 and not stop:
        # gradient of the loss, a mean over parts; every other batch prepares for random order,
        # which prompts and gaps need, too
        order = ("random", args.order)[step % 2]
        for _ in range(args.accumulate):
            x = data.batch(B, L, device)  # (B, L)
            _, loss = bound_and_loss(model, x, order)
            (loss / args.accumulate).backward()

        # step; the learning rate warms up, then falls to a tenth along a cosine
        warm = min((step + 1) / max(args.warmup, 1), 1)
        lr = args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * progress))
        norm = descend(model, lr, muon, adamw)
        decay = min(0.995, (step + 1) / (step + 10))  # at first it forgets faster
        didi.update_ema(average, model, decay)
        step += 1

        # log, table, checkpoint
        seconds, stop = agree(time.perf_counter() - begin, signals[-1])
        progress = fraction_done(args, step, seconds)
        log(rows, bar, {"step": step, "seconds": seconds, "loss": loss.item(), "norm": norm,
                        "lr": lr})
        table = progress >= 1 or step % args.eval_every == 0
        if table and RANK == 0:
            since_table = (step - 1) % args.eval_every + 1
            row = {"step": step} | validate(average, data, device, since_table * args.batch)
            log(rows, bar, row, table=True)
        if table or stop:
            save(args.out, rows, nets, kind=kind, config=vars(config), tokenizer=data.tokenizer,
                 flags=vars(args), step=step, seconds=seconds)
    bar.close()
    return int(stop)


if __name__ == "__main__":
    run(main)

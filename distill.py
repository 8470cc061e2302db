"""distill.py - DiDi-Instruct (arXiv 2509.25035): distil the teacher into a few-step student.

    python distill.py                       # out/teacher.pt -> out/student.pt, minutes on a CPU
    python distill.py --paper               # the paper's objective, at our size
    torchrun --standalone --nproc_per_node=8 distill.py

The loop in `main` is the algorithm, numbered as in the README. Left out on purpose: replay of old
samples and clipped (PPO) updates: each sample is used once, on policy.
"""
import argparse
import copy
import dataclasses
import time

import torch
from tqdm import tqdm

import didi
from data import corpus
from model import (COUNT, FRACTION, NATURAL, POSITIVE, RANK, Discriminator, add_run_flags, agree,
                   between, catch_signals, check_output, descend, fraction_done, load, log,
                   make_bar, make_parser, parse_run, per_part, restore, run, save, setup)
from train_teacher import validate

PAPER = {  # what --paper sets: the README's table of differences
    "order": "random", "grid": False, "K": 2, "coupled": True, "reference": "teacher",
    "temperature": 1.0, "kl": 0.1, "entropy": 0.01,
}


def parse_flags(argv=None):
    """Return the flags and the checkpoint to start from, see model.parse_run."""
    p = make_parser(__doc__)
    on_off = argparse.BooleanOptionalAction

    add = p.add_argument_group("input").add_argument
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--data", help="corpus folder; None: the teacher's")
    add("--paper", action="store_true",
        help="the paper's objective: sets the defaults of the flags below")

    add = p.add_argument_group("1. rollout").add_argument
    add("--groups", type=NATURAL, default=16, help="groups per update")
    add("--G", type=between(2, 2 ** 20, int), default=4, help="samples per group")
    add("--order", choices=("interlaced", "random"), default="interlaced", help="of revealing")
    add("--exponent", type=between(0.1, 10),
        help="of the time grid; None: the teacher's, or 1 if --order is not the teacher's")
    add("--grid", action=on_off, default=True,
        help="levels of a rollout: the time grid; --no-grid: each is uniform below the one before")
    add("--K", type=NATURAL, default=4,
        help="steps of a rollout; 1: no intermediate-state matching")

    add = p.add_argument_group("2. noise and 3. discriminator").add_argument
    add("--reference", choices=("data", "teacher"), default="data", help="what gets label 1")
    add("--coupled", action=on_off, default=False,
        help="mask x at tau, the last of random levels; --no-coupled: at a level of its own")
    add("--smoothing", type=between(0, 0.49), default=0.1, help="e: labels are 1 - e and e")
    add("--disc_blocks", type=COUNT, default=3,
        help="how many of the discriminator's last blocks train")
    add("--disc_lr", type=POSITIVE,
        help="the discriminator's learning rate, constant; None: 10 times --lr")
    add("--disc_warmup", type=COUNT, default=100, help="updates of the discriminator alone")

    add = p.add_argument_group("4. advantage and 5. student").add_argument
    add("--group_norm", action=on_off, default=True,
        help="(reward - the group's mean)/std is the advantage; --no-group_norm: the reward")
    add("--temperature", type=POSITIVE, default=0.8,
        help="the student starts as the teacher at this temperature")
    add("--w", action=on_off, default=True,
        help="w(t) = min(1/t, 10): if coupled, a factor; if not, the density of t")
    add("--kl", type=FRACTION, default=0.0,
        help="weight of KL(teacher at temperature 1 || student), per mask")
    add("--entropy", type=FRACTION, default=0.0, help="weight of the entropy bonus, per mask")
    add("--lr", type=POSITIVE, help="falls to a tenth; None: 6e-4 times the teacher's RMS weight")
    add("--ema", type=FRACTION, default=0.99, help="decay of the weight average that is sampled")
    add("--updates", type=NATURAL, default=200, help="updates of the student")
    add_run_flags(p, out="out/student.pt", eval_every=100)

    preset = {}
    if p.parse_args(argv).paper:
        preset = PAPER
    return parse_run(p, argv, preset)


def load_teacher(args, device, bf16):
    """Return the teacher and the Corpus of --data; set args.data, if None, to the teacher's own.

    Raises ValueError if they do not fit.
    """
    ckpt, teacher = load(args.teacher, "teacher", device=device, bf16=bf16)
    if args.data is None:
        args.data = ckpt["flags"]["data"]
    data = corpus.load(args.data)
    config = teacher.config
    length = config.length if config.pads else 0  # of a padded text; 0: packed
    data.check_fits(args.teacher, ckpt["tokenizer"], length, config.framed)
    return teacher, data


def rms_of_matrices(net):
    """Return the root mean square of the weights in the blocks' matrices.

    AdamW moves each weight by about the learning rate, so the default rate is a share of this.
    """
    weights = torch.cat([p.flatten() for p in net.blocks.parameters() if p.dim() == 2])
    return weights.square().mean().sqrt().item()


def draw_pool(teacher, args):
    """Return 2,048 texts (2048, L) that the teacher writes in 64 steps."""
    z = teacher.start(teacher.draw_lengths(2048))
    texts = []
    for part in tqdm(z.split(64), desc="teacher samples", disable=RANK > 0):
        x, _ = didi.sample(teacher, part, 64, teacher.config.mask_id, order=args.order,
                           exponent=args.exponent)
        texts.append(x)
    return torch.cat(texts)


def main(argv=None):
    args, ckpt = parse_flags(argv)
    if args.grid and args.coupled:
        raise ValueError("--coupled needs random levels: add --no-grid")
    device, bf16 = setup(args)
    teacher, data = load_teacher(args, device, bf16)
    check_output(args.out, "student", args.data)
    mask_id = teacher.config.mask_id
    pad_id = teacher.config.pad_id
    groups = per_part("groups", args)
    G = args.G
    B = groups * G  # of one process and part of --accumulate
    half = B // 2  # texts that train the discriminator: with all of them it learns too fast
    regularised = args.kl > 0 or args.entropy > 0

    if args.exponent is None:
        args.exponent = teacher.config.sampling(args.order)["exponent"]
    torch.manual_seed(args.seed)
    pool = None
    if args.reference == "teacher":
        pool = draw_pool(teacher, args)

    # the student and its average start as the teacher at --temperature
    if args.lr is None:
        args.lr = 6e-4 * rms_of_matrices(teacher)
    if args.disc_lr is None:
        args.disc_lr = 10 * args.lr
    average = copy.deepcopy(teacher)
    average.config = dataclasses.replace(
        teacher.config, order=args.order, exponent=args.exponent)
    for p in average.out.parameters():
        p.div_(args.temperature)
    student = copy.deepcopy(average).requires_grad_(True)
    disc = Discriminator(teacher, args.disc_blocks).to(device)
    opt = torch.optim.AdamW(student.parameters(), args.lr, (0.9, 0.99), weight_decay=0.0)
    disc_opt = torch.optim.AdamW(disc.parameters(), args.disc_lr, (0.9, 0.99), weight_decay=0.0)

    nets = {"model": student, "ema": average, "disc": disc, "opt": opt, "disc_opt": disc_opt}
    if args.resume:
        restore(ckpt, args.out, nets)
    step = ckpt["step"]
    seconds = ckpt["seconds"]
    rows = ckpt["log"]
    if RANK > 0:  # only now: the networks made above must be alike in all processes
        torch.manual_seed(args.seed + 1000 * RANK + step)

    signals = catch_signals()
    stop = 0
    begin = time.perf_counter() - seconds
    progress = fraction_done(args, step - args.disc_warmup, seconds)
    if progress >= 1:
        print(f"{args.out} is already trained: give more --updates or --minutes")
    bar = make_bar(args, args.disc_warmup + args.updates, step)
    while progress < 1 and not stop:
        moving = step >= args.disc_warmup  # until then only the discriminator learns

        for _ in range(args.accumulate):
            # 1. Rollout with intermediate-state matching: z_1 -> .. -> x, in groups of G
            lengths = teacher.draw_lengths(groups)
            z_1 = teacher.start(lengths.repeat_interleave(G))  # (B, L)
            if args.grid:
                levels = didi.time_grid(args.K, args.exponent)
            else:
                levels, tau = didi.draw_levels(groups, args.K, device)  # tau (groups,): --coupled
                levels = levels.repeat_interleave(G, dim=1)  # (K + 1, B)
            with torch.set_grad_enabled(moving):
                x, log_prob, states = didi.rollout(
                    student, z_1, levels, mask_id, args.order, keep_states=regularised)

            # 2. Mask x and the reference at one level t: tau, or one drawn here
            if args.coupled:
                t = tau
            elif args.w:  # its density is proportional to w, so that it needs no weight
                t = didi.draw_weighted_levels(groups, device)
            else:
                t = torch.rand(groups, device=device)
            t = t.repeat_interleave(G)  # (B,)
            w = torch.ones_like(t)
            if args.coupled and args.w:
                w = didi.weight(t)
            if pool is None:
                x_ref = data.batch(half, teacher.config.length, device)  # (half, L)
            else:
                x_ref = pool[torch.randint(len(pool), (half,), device=device)]
            z = didi.forward_mask(x, t, mask_id, pad_id, "random")
            z_ref = didi.forward_mask(x_ref, t[:half], mask_id, pad_id, "random")

            # 3. Discriminator: label 1 on the reference
            is_text = x != pad_id  # (B, L)
            is_text_ref = x_ref != pad_id  # (half, L)
            logits_first, logits_ref = disc(torch.cat((z[:half], z_ref))).split(half)  # (half, L)
            disc_loss = didi.discriminator_loss(
                logits_ref, is_text_ref, logits_first, is_text[:half], args.smoothing)
            (disc_loss / args.accumulate).backward()
            with torch.no_grad():
                logits_rest = disc(z[half:])  # for their reward alone
            logits = torch.cat((logits_first, logits_rest))  # (B, L)

            # 4. Reward, from the discriminator before its step; advantage within groups
            r = didi.reward(logits, is_text)  # (B,)
            advantage = r
            if args.group_norm:
                advantage = didi.grouped_advantage(r, G)

            # 5. Student: policy gradient, KL to the teacher, entropy bonus
            if moving:
                mean_length = is_text.sum() / B
                loss = didi.policy_loss(log_prob, advantage, w, mean_length)
                if regularised:
                    kl, entropy = didi.regularisers(states, teacher, mask_id)
                    loss = loss + args.kl * kl - args.entropy * entropy
                (loss / args.accumulate).backward()

        # optimise, with gradients clipped to norm 1
        disc_norm = descend(disc, args.disc_lr, disc_opt)
        if moving:
            norm = descend(student, args.lr * (1 - 0.9 * progress), opt)
            didi.update_ema(average, student, args.ema)
        step += 1

        # log (of this process's last part), table, checkpoint
        seconds, stop = agree(time.perf_counter() - begin, signals[-1])
        updates = step - args.disc_warmup
        progress = fraction_done(args, updates, seconds)
        r_ref = didi.reward(logits_ref, is_text_ref)
        correct = torch.cat((r_ref > 0, r[:half] < 0)).float()
        spread = r.view(-1, G).std(1, correction=0)
        row = {"step": step, "seconds": seconds, "disc_loss": disc_loss.item(),
               "disc_acc": correct.mean().item(), "disc_norm": disc_norm,
               "r": r.mean().item(), "spread": spread.mean().item()}
        if moving:
            row |= {"loss": loss.item(), "norm": norm}
        if moving and regularised:
            row |= {"kl": kl.item(), "entropy": entropy.item()}
        log(rows, bar, row)

        table = progress >= 1 or (moving and updates % args.eval_every == 0)
        if table and RANK == 0:
            since_table = (updates - 1) % args.eval_every + 1
            passes = since_table * args.groups * G * (args.K + 1)  # K steps, the discriminator
            row = {"step": step} | validate(average, data, device, passes)
            log(rows, bar, row, table=True)
        if table or stop:
            save(args.out, rows, nets, kind="student", config=vars(average.config),
                 tokenizer=data.tokenizer, flags=vars(args), step=step, seconds=seconds)
    bar.close()
    if step <= args.disc_warmup and not stop:
        print("only the discriminator has learnt: give more --minutes or less --disc_warmup")
    return int(stop)


if __name__ == "__main__":
    run(main)

"""distill.py - DiDi-Instruct (arXiv 2509.25035): distil the teacher into a few-step student.

    python distill.py                       # out/teacher.pt -> out/student.pt, some 2 minutes
    python distill.py --paper               # the paper's own objective, at our size
    python distill.py --paper_scale         # its whole experiment: a teacher of experiments.mdlm
    torchrun --standalone --nproc_per_node=8 distill.py

`update` is the algorithm, numbered as in the README. Left out on purpose: replay of old samples and
clipped (PPO) updates: each sample is used once, on policy.
"""
import argparse
import copy
import time

from data import corpus, files, memory  # before torch: Ctrl-C meanwhile is one word
import torch
from tqdm import tqdm

import didi
from data.command import (FROM_0, FROM_1, RATE, SHARE, SIZE, WEIGHT, add_run_flags, agree, between,
                          make_parser, parse_run, progress, run_script, setup, share_done,
                          share_out, stop_requested)
from model import (RANK, Discriminator, average_gradients, load_checkpoint, restore,
                   save_checkpoint, update_ema)

PAPER = {"groups": 32, "G": 4, "K": 2, "w": True, "pi": True, "smoothing": 0.1, "eps": 1e-4,
         "kl_kind": "forward", "kl": 0.1, "entropy": 0.01, "power": 0.0, "temperature": 1.0,
         "reference": "teacher"}  # but for the rate: theirs, of 169 M weights, is 1e-6
SCALE = PAPER | {"groups": 4, "disc_blocks": 4, "disc_warmup": 0, "lr": 1e-6, "disc_lr": 1e-5,
                 "ema": 0.999, "updates": 10_000, "reference": "data", "eval_every": 500,
                 "accumulate": 0}


def parse_flags(argv=None):
    p, add = make_parser("Distil the teacher into a few-step student.")
    on_off = argparse.BooleanOptionalAction
    add("--paper", action="store_true", help="the paper's objective; flags given still win over it")
    add("--paper_scale", action="store_true", help="that, with its settings for 169 M parameters")
    # 1. rollout
    add("--groups", type=SIZE, default=16, help="groups per update")
    add("--G", type=between(2, 2 ** 20, int), default=8, help="samples per group")
    add("--K", type=SIZE, default=3, help="steps of a rollout; 1: no intermediate-state matching")
    add("--beta", type=RATE, nargs=2, default=(1.0, 1.0), help="a, b of next/last level ~ Beta")
    # 2. and 3. noising and discriminator
    add("--reference", choices=("data", "teacher"), default="data", help="what has label 1")
    add("--coupled", action=on_off, default=True, help="noise x at the rollout's tau; off: U(0, 1)")
    add("--smoothing", type=between(0, 0.49), default=0.0, help="label e bounds the logit")
    add("--disc_blocks", type=FROM_0, default=3, help="last trunk blocks that train, at most all")
    add("--disc_lr", type=RATE, help="its learning rate [10 times the student's]")
    add("--disc_warmup", type=FROM_0, default=100, help="updates of the discriminator alone")
    # 4. reward and 5. student
    add("--temperature", type=RATE, default=0.6, help="the student begins as the teacher at this")
    add("--power", type=between(0, 4), default=2.0, help="reward R = (ratio**this - 1)/this; 0: r")
    add("--group_norm", action=on_off, default=True, help="advantages; off: the bare reward")
    add("--eps", type=RATE, default=0.1, help="A = (R - mean)/(std + eps): even groups count less")
    add("--w", action=on_off, default=False, help="weight 1/t at the level t of the reward")
    add("--pi", action=on_off, default=False, help="if coupled: divide by tau's density")
    add("--kl", type=WEIGHT, default=0.0, help="weight of the KL to the teacher, per masked token")
    add("--kl_kind", choices=didi.KL_KINDS, default="reverse", help="forward: teacher || student")
    add("--entropy", type=WEIGHT, default=0.0, help="weight of the entropy bonus, per masked token")
    add("--lr", type=RATE, help="student's; falls to a tenth [6e-4 of the teacher's RMS weight]")
    add("--ema", type=SHARE, default=0.99, help="decay of the weight average that is sampled")
    add("--updates", type=FROM_1, default=300, help="updates of the student")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--data", help="corpus folder [the teacher's]")
    add_run_flags(add, 60, "out/student.pt", least=0, fit="; 0: as few as fit")
    given = p.parse_args(argv)
    p.set_defaults(**SCALE if given.paper_scale else PAPER if given.paper else {})
    return parse_run(p, argv, lambda path: load_checkpoint(path, ("student",))[0])


def load_teacher(args, device, bf16):
    """The teacher of --teacher and the Corpus of --data, or its own. ValueError if they differ."""
    made, teacher = load_checkpoint(args.teacher, ("teacher",), device, bf16)
    if args.data is None:
        args.data = made["flags"]["data"]
    data = corpus.load(args.data)
    data.check_fits(args.teacher, made["tokenizer"], teacher.config)
    return teacher, data


def networks(args, teacher):
    """Student "model", its average "ema" and "disc", copies of the teacher, and both optimisers.

    The student's logits are at first the teacher's over --temperature. Rates not given are set, in
    args, by the RMS of the teacher's matrices: AdamW moves each weight by about its rate."""
    matrices = torch.cat([p.flatten() for p in teacher.blocks.parameters() if p.dim() == 2])
    args.lr = args.lr or 6e-4 * matrices.square().mean().sqrt().item()
    args.disc_lr = args.disc_lr or 10 * args.lr
    average = copy.deepcopy(teacher)
    for p in average.out.parameters():
        p.div_(args.temperature)
    student = copy.deepcopy(average).requires_grad_(True)
    disc = Discriminator(teacher, args.disc_blocks).to(teacher.lengths.device)
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    return {"model": student, "ema": average, "disc": disc,
            "opt": torch.optim.AdamW(student.parameters(), args.lr, **how),
            "disc_opt": torch.optim.AdamW(disc.parameters(), args.disc_lr, **how)}


def make_reference(args, data, teacher):
    """A function n -> x (n, L), reference texts: of 2,048 teacher samples, or of the corpus."""
    L, mask_id, device = teacher.config.length, teacher.config.mask_id, teacher.lengths.device
    if args.reference == "data":
        return lambda n: data.batch(n, L, device)
    count = min(2048, args.groups * args.G * (args.disc_warmup + args.updates))
    B = min(256, count, teacher.config.at_once)
    bar = tqdm(range(-(-count // B)), desc="teacher samples", unit="batch", disable=RANK > 0)
    starts = (teacher.start(teacher.draw_lengths(B)) for _ in bar)
    samples = torch.cat([didi.sample(teacher, z, 64, mask_id)[0] for z in starts])
    return lambda n: samples[torch.randint(len(samples), (n,)).to(device)]


def reward_levels(args, tau, pi):
    """(groups,) each: the level t at which rewards are read, and their weight w(t)/pi(t)."""
    w = torch.ones_like(tau)
    if not args.coupled:
        tau, pi = torch.rand_like(tau), w
    if args.w:
        w = didi.weight(tau)
    if args.pi:
        w = w / pi
    return tau, w


def descend(net, optimizer):
    """One optimiser step with gradients clipped to norm 1; returns the norm before clipping."""
    average_gradients(net)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def update(args, nets, teacher, reference, groups, moving):
    """One iteration of DiDi-Instruct, B = groups * G; the student learns once it is `moving`."""
    student, disc = nets["model"], nets["disc"]
    mask_id, pad_id, G = teacher.config.mask_id, teacher.config.pad_id, args.G
    for _ in range(args.accumulate):
        # 1. rollout with intermediate-state matching: z_1 -> z_tau -> x, G completions of each z_1
        z_1 = teacher.start(teacher.draw_lengths(groups))  # (groups, L): the length comes first
        t = torch.ones(groups, device=z_1.device)
        levels, tau, pi = didi.draw_levels(t, args.K, *args.beta)  # (K + 1, groups), (groups,)
        with torch.set_grad_enabled(moving):
            compared = teacher if moving and args.kl > 0 else None  # and then kl is 0
            x, log_prob, (kl, entropy) = didi.rollout(student, z_1, levels, mask_id, G, compared,
                                                      args.kl_kind)  # (B, L), (B,), (2,)
        # 2. mask x again at tau (coupled time), or at a level of its own, and a reference alike
        level, w = (of.repeat_interleave(G) for of in reward_levels(args, tau, pi))  # (B,) each
        z_student = didi.forward_mask(x, level, mask_id, pad_id)
        n = (groups + 1) // 2 * G  # half of the groups are enough to train the discriminator
        z_ref = didi.forward_mask(reference(n), level[:n], mask_id, pad_id)
        # 3. discriminator: label 1 on the reference
        enter, enter_ref = disc.enters(z_student), disc.enters(z_ref)  # (B, L), (n, L)
        logits_ref, logits = disc(torch.cat((z_ref, z_student[:n]))).split(n)
        loss = didi.discriminator_loss(logits_ref, enter_ref, logits, enter[:n], args.smoothing)
        (loss / args.accumulate).backward()
        # 4. reward, from the same logits and those of the other half, compared within groups
        with torch.no_grad():
            logits = torch.cat((logits, disc(z_student[n:])))
        r_ref, r = didi.reward(logits_ref, enter_ref), didi.reward(logits, enter)  # (n,), (B,)
        shaped = didi.ratio_power(r, args.power)
        advantage = didi.grouped_advantage(shaped, G, eps=args.eps) if args.group_norm else shaped
        row = {"disc_loss": loss.item(), "r_ref": r_ref.mean().item(), "r_student": r.mean().item(),
               "disc_acc": ((r_ref > 0).float().mean() + (r < 0).float().mean()).item() / 2,
               "spread": r.view(-1, G).std(1, correction=0).mean().item()}
        # 5. student step: policy gradient, KL to the teacher, entropy bonus
        if moving:
            policy = didi.policy_loss(log_prob, advantage, w, (x != pad_id).sum() / len(x))
            ((policy + args.kl * kl - args.entropy * entropy) / args.accumulate).backward()
            row |= {"policy": policy.item(), "kl": kl.item(), "entropy": entropy.item()}
    row["disc_norm"] = descend(disc, nets["disc_opt"])
    row["norm"] = descend(student, nets["opt"]) if moving else 0.0
    return row


def train(args, nets, teacher, reference, data, about, step, seconds):
    """Update until --updates or --minutes are over or a signal comes; returns the exit code."""
    groups = share_out("groups", args)
    if RANK > 0:  # every process its own random numbers; the first one's go on
        torch.manual_seed(args.seed + 1000 * RANK + step)
    begin, code, stop = time.perf_counter() - seconds, 0, stop_requested()
    share = share_done(args, step - args.disc_warmup, seconds)
    with progress(args, step, args.disc_warmup + args.updates) as log:
        while share < 1 and not code:
            moving = step >= args.disc_warmup
            lr = nets["opt"].param_groups[0]["lr"] = args.lr * (1 - 0.9 * share)
            nets["disc_opt"].param_groups[0]["lr"] = args.disc_lr
            row = update(args, nets, teacher, reference, groups, moving)
            if moving:
                update_ema(nets["ema"], nets["model"], args.ema)
            step += 1
            seconds, code = agree(time.perf_counter() - begin, stop())
            share = share_done(args, step - args.disc_warmup, seconds)
            table = share == 1 or (moving and (step - args.disc_warmup) % args.eval_every == 0)
            log({"step": step, "seconds": seconds, **row, "lr": lr})
            if table or code:
                save_checkpoint(args.out, nets, step=step, seconds=seconds, **about)
            if table and RANK == 0:
                log({"step": step, **data.measures(nets["ema"], didi.sample, (4, 8, 16))}, True)
    return int(code)


def main(argv=None):
    args, ckpt = parse_flags(argv)
    device, bf16 = setup(args)
    teacher, data = load_teacher(args, device, bf16)
    files.check_output(args.out, args.data, args.teacher)
    about = {"kind": "student", "config": vars(teacher.config), "tokenizer": data.tokenizer,
             "flags": dict(vars(args))}  # before this device settles --accumulate
    memory.fit_update(args, teacher.config, device, bf16)
    reference = make_reference(args, data, teacher)
    nets = networks(args, teacher)
    step, seconds = restore(nets, ckpt, args.out)
    return train(args, nets, teacher, reference, data, about, step, seconds)


if __name__ == "__main__":
    run_script(main, resumes=True)

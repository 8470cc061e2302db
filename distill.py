"""distill.py - DiDi-Instruct (arXiv 2509.25035): distil the teacher into a few-step student.

    python distill.py                       # out/teacher.pt -> out/student.pt, some 3 minutes
    python distill.py --paper               # the paper's own setting
    python distill.py --resume              # go on after Ctrl-C, SIGTERM or a crash
    torchrun --standalone --nproc_per_node=8 distill.py

`update` is the algorithm, numbered as in the README. Left out on purpose: replay of old samples and
clipped (PPO) updates: each sample is used once, on policy.
"""
import argparse
import copy
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import didi
from data import corpus
from model import (FRACTION, FROM_0, FROM_1, RANK, RATE, SAVE_EVERY, SHARE, WEIGHT, Discriminator,
                   agree, average_gradients, load_checkpoint, log_row, open_log, restore,
                   run_script, save_checkpoint, setup, share_done, share_out, stop_requested,
                   update_ema)

# What the paper does, at our size: rollouts from all masks, groups of 4, coupled time, 1/t weights,
# both regularisers. Its learning rate is 1e-6 for 169 M parameters; 6e-4, the default's, made the
# student worse than its teacher here, and 1e-4 better.
PAPER = {"mask_share": 1.0, "groups": 32, "G": 4, "coupled": True, "w": True, "pi": True,
         "positions": "masked", "smoothing": 0.1, "kl_kind": "forward", "kl": 0.1, "entropy": 0.01,
         "reference": "teacher", "eps": 1e-4, "lr": 1e-4}


def add_method_flags(add, on_off=argparse.BooleanOptionalAction):
    add("--paper", action="store_true", help="the paper's setting; flags given still win over it")
    # 1. rollout
    add("--groups", type=FROM_1, default=16, help="groups per update")
    add("--G", type=FROM_1, default=8, help="samples per group")
    add("--K", type=FROM_1, default=2, help="steps of a rollout; 1: no intermediate-state matching")
    add("--beta", type=RATE, nargs=2, default=(1.0, 1.0), help="a, b of tau/t ~ Beta(a, b)")
    add("--mask_share", type=SHARE, default=0.5, help="share of groups that begin all masked ..")
    add("--t_range", type=FRACTION, nargs=2, default=(0.2, 1.0), help=".. or as data at U(..)")
    # 2. and 3. noising and discriminator
    add("--reference", choices=("data", "teacher"), default="data", help="what has label 1")
    add("--coupled", action=on_off, default=False, help="noise x at the rollout's tau, or else ..")
    add("--noise_max", type=FRACTION, default=0.35, help=".. at a level uniform in [0, this]")
    add("--positions", choices=("masked", "all"), default="all", help="whose logits count")
    add("--smoothing", type=SHARE, default=0.0, help="label e: the logit's bound is log((1 - e)/e)")
    add("--disc_blocks", type=FROM_0, default=3, help="last trunk blocks that train")
    add("--disc_lr", type=RATE, default=3e-4, help="its learning rate (1e-3 ruins the trunk)")
    add("--disc_warmup", type=FROM_0, default=100, help="updates of the discriminator alone")
    # 4. reward and 5. student
    add("--group_norm", action=on_off, default=True, help="advantages; off: the bare reward")
    add("--eps", type=RATE, default=0.1, help="A = (r - mean)/(std + eps): even groups count less")
    add("--w", action=on_off, default=False, help="weight 1/t at the level t of the reward")
    add("--pi", action=on_off, default=False, help="divide by pi(t), the density t was drawn from")
    add("--kl", type=WEIGHT, default=0.09, help="weight of the KL to the teacher, per masked token")
    add("--kl_kind", choices=("forward", "reverse", "jeffreys"), default="reverse",
        help="forward = KL(teacher || student)")
    add("--entropy", type=WEIGHT, default=0.0, help="weight of the entropy bonus, per masked token")
    add("--lr", type=RATE, default=6e-4, help="student's learning rate; falls to a tenth")
    add("--ema", type=SHARE, default=0.97, help="decay of the weight average that is sampled")


def parse_flags(argv=None):
    p = argparse.ArgumentParser(description="Distil the teacher into a few-step student.")
    add = p.add_argument
    add_method_flags(add)
    add("--updates", type=FROM_1, default=480, help="updates of the student")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--data", help="corpus folder [the teacher's]")
    add("--minutes", type=RATE, help="stop then, the schedule fitted to it, whatever --updates is")
    add("--accumulate", type=FROM_1, default=1, help="parts of the groups, one by one: less memory")
    add("--eval_every", type=FROM_1, default=40, help="updates between tables and checkpoints")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 products [where fast]")
    add("--seed", type=FROM_0, default=0, help="repeats a run exactly on a CPU")
    add("--out", default="out/student.pt", help="checkpoint, the log beside it as .jsonl")
    add("--resume", action="store_true", help="go on from --out; its flags if not given again")
    args, ckpt = p.parse_args(argv), None
    if args.resume:
        ckpt, _ = load_checkpoint(args.out, ("student",))
        p.set_defaults(**ckpt["flags"] | {"out": args.out})
    elif args.paper:
        p.set_defaults(**PAPER)
    args = p.parse_args(argv)
    if args.G == 1 and args.group_norm:
        raise ValueError("--G 1: a group of one has nothing to compare: add --no-group_norm")
    return args, ckpt


def networks(args, teacher):
    """Student "model", its average "ema" and "disc", copies of the teacher, and both optimisers."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    noise_max = 1.0 if args.coupled else args.noise_max
    disc = Discriminator(teacher, args.disc_blocks, args.positions, noise_max)
    disc = disc.to(teacher.position.device)
    learns = [p for p in disc.parameters() if p.requires_grad]
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    return {"model": student, "ema": copy.deepcopy(teacher), "disc": disc,
            "opt": torch.optim.AdamW(student.parameters(), args.lr, **how),
            "disc_opt": torch.optim.AdamW(learns, args.disc_lr, **how)}


def make_reference(args, data, teacher):
    """A function n -> x (n, L), reference texts: of the corpus, or of 2,048 teacher samples."""
    L, mask_id, device = teacher.config.length, teacher.config.mask_id, teacher.position.device
    if args.reference == "data":
        return lambda n: data.batch(n, L, device)
    z = torch.full((256, L), mask_id, device=device)
    bar = tqdm(range(8), desc="teacher samples", unit="batch", disable=RANK > 0)
    samples = torch.cat([didi.sample(teacher, z, 64, mask_id)[0] for _ in bar])
    return lambda n: samples[torch.randint(len(samples), (n,)).to(device)]


def start_levels(args, groups, device):
    """(groups,): the level t that each group's first state is noised at; 1 is all masks."""
    t = torch.empty(groups, device=device).uniform_(*args.t_range)
    return t.masked_fill(torch.rand_like(t) < args.mask_share, 1.0)


def reward_levels(args, tau, pi):
    """(groups,) each: the level at which rewards are read, and their weight w(t)/pi(t)."""
    level, w = tau, torch.ones_like(tau)
    if not args.coupled:
        level, pi = torch.rand_like(tau) * args.noise_max, torch.full_like(pi, 1 / args.noise_max)
    if args.w:
        w = w * didi.weight(level)
    if args.pi:
        w = w / pi
    return level, w


def regularisers(teacher, steps, kind):
    """KL to the teacher, and entropy, at the masks of the rollout's states; nats per position."""
    kl = entropy = 0.0
    for z, where, log_p_x in steps:
        n = max(len(log_p_x), 1) * len(steps)
        with torch.no_grad():
            log_p_teacher = didi.predict(teacher, z, where)
        kl = kl + didi.kl_to_teacher(log_p_x, log_p_teacher, kind).sum() / n
        entropy = entropy + didi.entropy(log_p_x).sum() / n
    return kl, entropy


def descend(net, optimizer):
    """One optimiser step with gradients clipped to norm 1; returns the norm before clipping."""
    average_gradients(net)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def update(args, nets, teacher, reference, groups, moving):
    """One iteration of DiDi-Instruct, B = groups * G; the student learns once it is `moving`."""
    student, disc, mask_id = nets["model"], nets["disc"], teacher.config.mask_id
    for _ in range(args.accumulate):
        # 1. rollout with intermediate-state matching: z_t -> z_tau -> x, G completions of each z_t
        x_ref = reference(groups)  # (groups, L)
        t = start_levels(args, groups, x_ref.device)  # (groups,)
        levels, tau, pi = didi.draw_levels(t, args.K, *args.beta)
        with torch.set_grad_enabled(moving):
            z_t = didi.forward_mask(x_ref, t, mask_id)
            x, log_prob, steps = didi.rollout(student, z_t, levels, mask_id, args.G)  # (B, L), (B,)
        # 2. coupled time: mask x again at the same tau, and the reference at the same positions
        level, w = (of.repeat_interleave(args.G) for of in reward_levels(args, tau, pi))  # (B,)
        z_student = didi.forward_mask(x, level, mask_id)
        z_ref = x_ref.repeat_interleave(args.G, 0).masked_fill(z_student == mask_id, mask_id)
        # 3. discriminator: label 1 on the reference; half of the groups are enough to train it
        n = (groups + 1) // 2 * args.G
        enter = disc.enters(z_student)  # (B, L)
        logits_ref, logits = disc(torch.cat((z_ref[:n], z_student[:n]))).chunk(2)
        some = enter[:n]
        disc_loss = didi.discriminator_loss(logits_ref, some, logits, some, args.smoothing)
        (disc_loss / args.accumulate).backward()
        # 4. reward, from the same logits and those of the other half, compared within groups
        with torch.no_grad():
            logits = torch.cat((logits, disc(z_student[n:])))
        r_ref, r = didi.reward(logits_ref, some), didi.reward(logits, enter)  # (n,), (B,)
        advantage = didi.grouped_advantage(r, args.G, eps=args.eps) if args.group_norm else r
        right = (r_ref > 0).float().mean() + (r < 0).float().mean()
        row = {"disc_loss": disc_loss.item(), "disc_acc": right.item() / 2,
               "r_ref": r_ref.mean().item(), "r_student": r.mean().item(),
               "spread": r.view(-1, args.G).std(1, correction=0).mean().item()}
        # 5. student step: policy gradient, KL to the teacher, entropy bonus
        if moving:
            kl, entropy = regularisers(teacher, steps, args.kl_kind)
            policy = didi.policy_loss(log_prob, advantage, w, x.shape[1])
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
    begin, saved, code, stop = time.perf_counter() - seconds, seconds, 0, stop_requested()
    share = share_done(args, step - args.disc_warmup, seconds)
    total = None if args.minutes else args.disc_warmup + args.updates
    with open_log(args) as log, tqdm(None, args.out, total, initial=step, disable=RANK > 0) as bar:
        while share < 1 and not code:
            moving = step >= args.disc_warmup
            nets["opt"].param_groups[0]["lr"] = args.lr * (1 - 0.9 * share)
            row = update(args, nets, teacher, reference, groups, moving)
            if moving:
                update_ema(nets["ema"], nets["model"], args.ema)

            step += 1
            seconds, code = agree(time.perf_counter() - begin, stop())
            share = share_done(args, step - args.disc_warmup, seconds)
            table = share == 1 or (moving and (step - args.disc_warmup) % args.eval_every == 0)
            log_row(log, bar, {"step": step, "seconds": seconds, **row})
            if table or code or seconds - saved > SAVE_EVERY:
                save_checkpoint(args.out, nets, step=step, seconds=seconds, **about)
                saved = seconds
            if table and RANK == 0:
                measures = data.measures(nets["ema"], didi.sample, (4, 8, 16))
                log_row(log, bar, {"step": step, **measures}, show=True)
            bar.update()
    return int(code)


def main(argv=None):
    args, ckpt = parse_flags(argv)
    device, bf16 = setup(args)
    made, teacher = load_checkpoint(args.teacher, ("teacher",), device, bf16)
    if args.data is None:
        args.data = made["flags"]["data"]
    data = corpus.load(args.data)
    if (data.tokenizer, data.packed) != (made["tokenizer"], made["packed"]):
        raise ValueError(f"{args.teacher} was trained on {made['flags']['data']}, and {args.data} "
                         "has other tokens: give the same corpus with --data")
    reference = make_reference(args, data, teacher)
    nets, step, seconds = networks(args, teacher), 0, 0.0
    if ckpt:
        restore(nets, ckpt)
        step, seconds = ckpt["step"], ckpt["seconds"]
    about = {"kind": "student", "config": asdict(teacher.config), "tokenizer": data.tokenizer,
             "packed": data.packed, "flags": vars(args),
             "discriminator": {"trainable_blocks": args.disc_blocks, "positions": args.positions,
                               "noise_max": nets["disc"].noise_max}}
    return train(args, nets, teacher, reference, data, about, step, seconds)


if __name__ == "__main__":
    run_script(main)

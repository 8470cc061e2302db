"""distill.py - DiDi-Instruct (arXiv 2509.25035): distil the teacher into a student that writes in few steps.

    python distill.py                       # out/teacher.pt -> out/student.pt, at most 5 minutes on two CPU cores
    python distill.py --paper               # the paper's own setting
    python distill.py --resume              # go on after Ctrl-C or a crash

The loop in `main` is the algorithm, numbered as in the README. Left out on purpose: learning-rate schedules, replay of old
samples, importance-clipped (PPO) updates: each sample is used once, on policy.
"""
import argparse
import copy
import json
import math
import os
import time

import torch
from tqdm import tqdm

import didi
from model import (Discriminator, build_denoiser, catch_interrupt, interrupted_at, load_checkpoint, parse_resumable, pick_device,
                   rng_state, run_script, save_checkpoint, set_rng_state, update_ema)
from train_teacher import load_data, make_tokenizer, quality

# What the paper does, at our size: all-mask starts, groups of 4 that share levels, coupled time, 1/t weights, both regularisers.
PAPER = {"start": "mask", "share": "level", "groups": 32, "G": 4, "coupled": True, "w": True, "pi": True, "positions": "masked",
         "smoothing": 0.1, "reward_clip": 8.0, "kl_kind": "forward", "kl": 0.1, "entropy": 0.01, "reference": "teacher", "eps": 1e-4}


def parse_flags(argv=None):
    on_off = argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description="Distil the teacher into a few-step student.")
    g = p.add_argument_group("rollout")
    g.add_argument("--paper", action="store_true", help="the paper's setting; other flags still win over it")
    g.add_argument("--start", choices=("data", "mask"), default="data", help="rollouts start from z_t = noised data, or from all masks")
    g.add_argument("--t_range", type=float, nargs=2, default=(0.2, 1.0), help="with --start data: t is uniform between these, or ..")
    g.add_argument("--mask_share", type=float, default=0.3, help=".. is 1 (all masks) for this share of the groups")
    g.add_argument("--share", choices=("state", "level"), default="state", help="what a group has in common: z_t, or only t and tau")
    g.add_argument("--groups", type=int, default=16, help="groups per update")
    g.add_argument("--G", type=int, default=8, help="samples per group")
    g.add_argument("--K", type=int, default=2, help="steps of a rollout; the paper's is 2")
    g.add_argument("--ism", action=on_off, default=True, help="intermediate-state matching; off: rollouts of one step")
    g.add_argument("--beta", type=float, nargs=2, default=(1.0, 1.0), help="a, b of tau/t ~ Beta(a, b)")
    g = p.add_argument_group("discriminator and reward")
    g.add_argument("--reference", choices=("data", "teacher"), default="data", help="what has label 1: data, or 64-step teacher samples")
    g.add_argument("--coupled", action=on_off, default=False, help="noise x again at the rollout's tau; off: at --noise_max * U(0, 1)")
    g.add_argument("--noise_max", type=float, default=0.3, help="the highest level of noise without --coupled")
    g.add_argument("--positions", choices=("masked", "all"), default="all", help="whose logits enter loss, reward and guidance")
    g.add_argument("--smoothing", type=float, default=0.0, help="label smoothing e: bounds the logit at log((1 - e)/e)")
    g.add_argument("--reward_clip", type=float, default=8.0, help="bound on |r|, nats")
    g.add_argument("--disc_blocks", type=int, default=3, help="last trunk blocks that train")
    g.add_argument("--disc_lr", type=float, default=3e-4, help="discriminator's learning rate (1e-3 ruins the trunk)")
    g.add_argument("--disc_batch", type=int, default=64, help="reference sequences, and as many of the student's, per update")
    g.add_argument("--disc_warmup", type=int, default=100, help="updates of the discriminator alone, before the first of the student")
    g = p.add_argument_group("student")
    g.add_argument("--group_norm", action=on_off, default=True, help="grouped reward normalisation; off: the bare reward")
    g.add_argument("--eps", type=float, default=0.1, help="A = (r - mean)/(std + eps): groups with less spread count less")
    g.add_argument("--advantage_clip", type=float, default=3.0, help="bound on |A|")
    g.add_argument("--w", action=on_off, default=False, help="weight w(tau) = 1/tau, clipped to [.1, 10]")
    g.add_argument("--pi", action=on_off, default=False, help="divide by pi(tau), the density tau was drawn from")
    g.add_argument("--kl", type=float, default=0.09, help="weight of the KL to the teacher, per masked token; 0 = off")
    g.add_argument("--kl_kind", choices=("forward", "reverse", "jeffreys"), default="reverse", help="forward = KL(teacher || student)")
    g.add_argument("--entropy", type=float, default=0.0, help="weight of the entropy bonus, per masked token; 0 = off")
    g.add_argument("--lr", type=float, default=6e-4, help="student's learning rate")
    g.add_argument("--ema", type=float, default=0.97, help="decay of the weight average that is saved and sampled")
    g.add_argument("--steps", type=int, default=160, help="updates of the student")
    g = p.add_argument_group("run")
    g.add_argument("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    g.add_argument("--out", default="out/student.pt", help="checkpoint; the log lies beside it as .jsonl")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--eval_every", type=int, default=40, help="updates between tables, each of which saves a checkpoint")
    g.add_argument("--eval_samples", type=int, default=128, help="samples per row of these tables (standard error .04 at 128)")
    g.add_argument("--resume", action="store_true", help="go on from --out; flags not given again are those of the checkpoint")
    args, ckpt = parse_resumable(p, "student", argv)
    if args.paper and not ckpt:
        p.set_defaults(**PAPER)
        args = p.parse_args(argv)
    if min(args.groups, args.G, args.K, args.steps, args.disc_batch, args.eval_every, args.eval_samples) < 1:
        raise ValueError("--groups, --G, --K, --steps, --disc_batch and --eval_* must all be at least 1")
    if not 0 < args.t_range[0] <= args.t_range[1] <= 1:
        raise ValueError(f"--t_range {args.t_range[0]} {args.t_range[1]}: give two levels, 0 < low <= high <= 1")
    if args.disc_batch > args.groups * args.G:
        raise ValueError(f"--disc_batch {args.disc_batch} is more than the {args.groups * args.G} samples of an update (groups * G)")
    return args, pick_device(args.device), ckpt


def start_states(train, groups, args, mask_id):
    """The rollouts' first states z_t (B, L), the levels t (groups,), and how many completions each state gets.

    --share state: one z_t per group, which all G samples complete. --share level: G states of their own, at one level.
    """
    t = torch.ones(groups, device=train.device)
    if args.start == "data":
        t = torch.where(torch.rand_like(t) < args.mask_share, t, torch.empty_like(t).uniform_(*args.t_range))
    copies = args.G if args.share == "state" else 1
    rows = groups * args.G // copies
    z_t = didi.forward_mask(train[torch.randint(len(train), (rows,)).to(train.device)], t.repeat_interleave(rows // groups), mask_id)
    return z_t, t, copies


def teacher_samples(teacher, num=2048, steps=64, batch=256):
    """(num, L) samples of the teacher: the reference of the paper, where it would be the data otherwise."""
    z = torch.full((num, teacher.config.length), teacher.config.mask_id, device=next(teacher.parameters()).device)
    return torch.cat([didi.sample(teacher, part, steps, teacher.config.mask_id)[0]
                      for part in tqdm(z.split(batch), desc="teacher samples", unit="batch")])


def regularisers(teacher, steps, kind):
    """KL to the teacher and entropy at the masked positions of the rollout's states, nats per position, averaged over its steps."""
    kl = entropy = torch.zeros((), device=steps[0][0].device)
    for z, where, log_p_x, _ in steps:
        if where.any():
            with torch.no_grad():
                log_p_teacher = didi.predict(teacher, z, where)
            kl = kl + didi.kl_to_teacher(log_p_x, log_p_teacher, kind).mean() / len(steps)
            entropy = entropy + didi.entropy(log_p_x).mean() / len(steps)
    return kl, entropy


def diverged(step, args):
    """What to raise when something is not finite."""
    return FloatingPointError(f"a loss is not finite at update {step + 1}; the last good checkpoint is kept: lower --lr (now {args.lr}) "
                              f"or --disc_lr (now {args.disc_lr}) and start again, or --resume")


def update(loss, net, optimizer):
    """One optimiser step with gradients clipped to norm 1; returns the norm before clipping."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


@torch.no_grad()
def evaluate(model, args, tokenizer, known, device):
    """{"valid@4": .., "entropy@4": .., "length@4": .., ..} of samples in 4, 8 and 16 steps, always with the same random numbers."""
    row, mask_id = {}, model.config.mask_id
    with torch.random.fork_rng():
        torch.manual_seed(4321)
        for n in (4, 8, 16):
            z = torch.full((args.eval_samples, model.config.length), mask_id, device=device)
            q = quality(didi.sample(model, z, n, mask_id)[0], tokenizer, known)
            row.update({f"{k}@{n}": q[k] for k in ("valid", "entropy", "length")})
    return row


def networks(args, config, teacher, device, ckpt):
    """{"model": student, "ema", "disc", "opt", "disc_opt"}, copies of the teacher or as the checkpoint left them; and the update
    to begin with."""
    student, ema = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    disc = Discriminator(teacher, args.disc_blocks).to(device)
    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    nets = {"model": student, "ema": ema, "disc": disc, "opt": torch.optim.AdamW(student.parameters(), lr=args.lr, **adam),
            "disc_opt": torch.optim.AdamW([p for p in disc.parameters() if p.requires_grad], lr=args.disc_lr, **adam)}
    if not ckpt:
        return nets, 0
    for name, net in nets.items():
        net.load_state_dict(ckpt[name])
    set_rng_state(ckpt["rng"], device)
    return nets, ckpt["step"]


def finish_row(row, step, args, log, bar, report, save):
    """After an update: stop if something is not finite; at intervals a table and a checkpoint; then the log."""
    if not math.isfinite(sum(row.values())):
        raise diverged(step, args)
    done = step + 1 - args.disc_warmup
    if (done > 0 and done % args.eval_every == 0) or done == args.steps:
        row |= report()
        tqdm.write(f"update {step + 1}: " + ", ".join(f"{k} {row[k]:.3f}" for k in row if "@" in k))
        save(step + 1)
    log.write(json.dumps(row | {"time": time.time()}) + "\n")
    log.flush()
    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("disc_acc", "r_ref", "r_student", "kl") if k in row})


def main(argv=None):
    args, device, ckpt = parse_flags(argv)
    torch.manual_seed(args.seed)
    loaded, config = load_checkpoint(args.teacher, "teacher", device)
    L, mask_id, tokenizer = config.length, config.mask_id, make_tokenizer()
    teacher = build_denoiser(config, loaded["ema"], device).requires_grad_(False)
    data = load_data(L, tokenizer)
    train = data["train"].to(device)
    reference = teacher_samples(teacher) if args.reference == "teacher" else train
    nets, first = networks(args, config, teacher, device, ckpt)
    student, ema, disc, opt, disc_opt = nets.values()

    def save(step):
        save_checkpoint(args.out, config, kind="student", step=step, rng=rng_state(device), flags=vars(args), tokenizer="bytes",
                        **{name: net.state_dict() for name, net in nets.items()})
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    total, interrupted = args.disc_warmup + args.steps, catch_interrupt()
    with open(os.path.splitext(args.out)[0] + ".jsonl", "a" if ckpt else "w") as log, \
            tqdm(range(first, total), initial=first, total=total, desc="distill", unit="update", mininterval=1) as bar:
        for step in bar:
            moving = step >= args.disc_warmup  # before that, only the discriminator learns
            # 1. rollout with intermediate-state matching: z_t -> z_tau -> x, and the log-probabilities of both steps
            groups = args.groups if moving else -(-args.disc_batch // args.G)
            z_t, t, copies = start_states(train, groups, args, mask_id)
            levels, tau, pi = didi.draw_levels(t, args.K if args.ism else 1, *args.beta)
            levels = levels.repeat_interleave(len(z_t) // groups, 1)  # (K + 1, rows of z_t)
            try:
                with torch.set_grad_enabled(moving):
                    x, steps = didi.rollout(student, z_t, levels, mask_id, copies)  # (groups * G, L)
            except FloatingPointError:
                raise diverged(step, args) from None
            # 2. coupled time: noise x and the reference to the rollout's own tau; or both to a low level of its own
            level = tau if args.coupled else torch.rand_like(tau) * args.noise_max
            level, tau, pi = (v.repeat_interleave(args.G) for v in (level, tau, pi))  # (groups * G,)
            z_fake = didi.forward_mask(x, level, mask_id)
            pick = torch.randperm(len(x), device=device)[:args.disc_batch]
            z_ref = didi.forward_mask(reference[torch.randint(len(reference), (len(pick),)).to(device)], level[pick], mask_id)
            # 3. discriminator step: label 1 on the reference
            logits_ref, logits_fake = disc(torch.cat((z_ref, z_fake[pick]))).chunk(2)
            disc_loss = didi.discriminator_loss(logits_ref, z_ref, logits_fake, z_fake[pick], mask_id, args.positions, args.smoothing)
            r_ref = didi.reward(logits_ref, z_ref, mask_id, args.positions, args.reward_clip)
            r_pick = didi.reward(logits_fake, z_fake[pick], mask_id, args.positions, args.reward_clip)
            row = {"step": step + 1, "disc_loss": disc_loss.item(), "disc_norm": update(disc_loss, disc, disc_opt),
                   "disc_acc": ((r_ref > 0).float().mean() + (r_pick < 0).float().mean()).item() / 2,
                   "r_ref": r_ref.mean().item(), "r_student": r_pick.mean().item()}
            if moving:
                # 4. reward and grouped reward normalisation
                with torch.no_grad():
                    r = didi.reward(disc(z_fake), z_fake, mask_id, args.positions, args.reward_clip)  # (groups * G,)
                advantage = didi.grouped_advantage(r, args.G, args.advantage_clip, args.eps) if args.group_norm else r
                # 5. student step: policy gradient, KL to the teacher, entropy bonus; then the weight average
                w = (didi.weight(tau) if args.w else torch.ones_like(tau)) / (pi if args.pi else 1)
                kl, entropy = regularisers(teacher, steps, args.kl_kind)
                policy = didi.policy_loss(sum(s[3] for s in steps), advantage, w, L)
                row |= {"spread": r.view(-1, args.G).std(1, correction=0).mean().item(), "policy": policy.item(), "kl": kl.item(),
                        "entropy": entropy.item(), "norm": update(policy + args.kl * kl - args.entropy * entropy, student, opt)}
                update_ema(ema, student, args.ema)
            finish_row(row, step, args, log, bar, lambda: evaluate(ema, args, tokenizer, data["known"], device), save)
            if interrupted():
                save(step + 1)
                return print(interrupted_at("distill", step + 1, args.out)) or 130
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)

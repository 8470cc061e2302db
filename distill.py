"""distill.py - DiDi-Instruct (arXiv 2509.25035): distil the teacher into a student that writes in few steps.

    python distill.py                       # out/teacher.pt -> out/student.pt, at most 5 minutes on two CPU cores
    python distill.py --paper               # the paper's own setting
    python distill.py --resume              # go on after Ctrl-C or a crash
    python distill.py --objective sdtt      # another method for the same end, as a yardstick
    python distill.py --ablate FILE         # what each component does, over three seeds

`didi_update` is the algorithm, numbered as in the README. Left out on purpose: replay of old samples, importance-clipped
(PPO) updates: each sample is used once, on policy.
"""
import argparse
import copy
import itertools
import os
import sys

import torch
from tqdm import tqdm

import didi
from model import (Discriminator, add_training_flags, average, bench, build_denoiser, build_discriminator, check_training_flags,
                   join_processes, load_checkpoint, parallel, parse_resumable, parts, pick_device, place, read_results, restore,
                   run_script, share_out, spread, train, update_ema, write_json)
from train_teacher import draw_rows, load_data, load_once, quality

# What the paper does, at our size: all-mask starts, groups of 4, coupled time, 1/t weights, both regularisers.
# Its learning rate is 1e-6 for 169 M parameters; here 6e-4, the default's, made the student worse than its teacher, and 1e-4 better.
PAPER = {"start": "mask", "groups": 32, "G": 4, "coupled": True, "noise_max": 1.0, "w": True, "pi": True,
         "positions": "masked", "smoothing": 0.1, "reward_clip": 8.0, "kl_kind": "forward", "kl": 0.1, "entropy": 0.01,
         "reference": "teacher", "eps": 1e-4, "lr": 1e-4}
# Self-distillation through time: as many updates as take the time of the default, supervised and so at a higher learning rate.
# Reverse KL: averaged over the teacher's paths, its targets are its one-step prediction again, and forward KL would learn just that.
SDTT = {"steps": 960, "disc_warmup": 0, "lr": 1e-3, "kl_kind": "reverse"}
# The runs of --ablate: as in the paper's table, in its setting, each with all before it; then the default with one thing changed.
CUMULATIVE = {
    "none": "--paper --no-ism --no-coupled --no-w --no-pi --kl 0 --entropy 0 --no-group_norm",
    "+ intermediate-state matching": "--ism", "+ coupled time": "--coupled", "+ w(t)": "--w", "+ pi(t)": "--pi",
    "+ KL and entropy": f"--kl {PAPER['kl']} --entropy {PAPER['entropy']}", "+ grouped normalisation": "--group_norm",
    "+ guided sampler": ""}
ONE_CHANGE = {
    "default": "", "default, guided sampler": "",
    "no intermediate-state matching": "--no-ism", "no grouped normalisation": "--no-group_norm", "no KL": "--kl 0",
    "coupled time": "--coupled", "w(t) and pi(t)": "--w --pi", "all rollouts from all masks": "--start mask",
    "groups share levels only": "--share level", "masked positions only": "--positions masked", "teacher samples": "--reference teacher"}


def parse_flags(argv=None):
    on_off = argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description="Distil the teacher into a few-step student.")
    g = p.add_argument_group("method")
    g.add_argument("--paper", action="store_true", help="the paper's setting; other flags still win over it")
    g.add_argument("--objective", choices=("didi", "sdtt"), default="didi", help="DiDi-Instruct, or self-distillation through time")
    g.add_argument("--rounds", type=int, nargs="+", default=(32, 16, 8, 4), help="sdtt: steps of the student, halved in each round")
    g = p.add_argument_group("rollout")
    g.add_argument("--start", choices=("data", "mask"), default="data", help="rollouts start from z_t = noised data, or from all masks")
    g.add_argument("--t_range", type=float, nargs=2, default=(0.2, 1.0), help="with --start data: t is uniform between these, or ..")
    g.add_argument("--mask_share", type=float, default=0.5, help=".. is 1 (all masks) for this share of the groups")
    g.add_argument("--share", choices=("state", "level"), default="state", help="what a group has in common: z_t, or only t and tau")
    g.add_argument("--groups", type=int, default=16, help="groups per update")
    g.add_argument("--G", type=int, default=8, help="samples per group")
    g.add_argument("--K", type=int, default=2, help="steps of a rollout; the paper's is 2")
    g.add_argument("--ism", action=on_off, default=True, help="intermediate-state matching; off: rollouts of one step")
    g.add_argument("--beta", type=float, nargs=2, default=(1.0, 1.0), help="a, b of tau/t ~ Beta(a, b)")
    g = p.add_argument_group("discriminator and reward")
    g.add_argument("--reference", choices=("data", "teacher"), default="data",
                   help="label 1, and what first states are made of: data, or 64-step teacher samples")
    g.add_argument("--coupled", action=on_off, default=False, help="noise x again at the rollout's tau; off: at --noise_max * U(0, 1)")
    g.add_argument("--noise_max", type=float, default=0.35, help="the highest level of noise without --coupled")
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
    g.add_argument("--w", action=on_off, default=False, help="weight w(t) = 1/t, clipped to [.1, 10], at the level t where the reward is read")
    g.add_argument("--pi", action=on_off, default=False, help="divide by pi(t), the density that this level was drawn from")
    g.add_argument("--kl", type=float, default=0.09, help="weight of the KL to the teacher, per masked token; 0 = off")
    g.add_argument("--kl_kind", choices=("forward", "reverse", "jeffreys"), default="reverse", help="forward = KL(teacher || student)")
    g.add_argument("--entropy", type=float, default=0.0, help="weight of the entropy bonus, per masked token; 0 = off")
    g.add_argument("--lr", type=float, default=6e-4, help="student's learning rate; falls linearly to a tenth")
    g.add_argument("--ema", type=float, default=0.97, help="decay of the weight average that is saved and sampled")
    g.add_argument("--steps", type=int, default=480, help="updates of the student")
    g = p.add_argument_group("run")
    g.add_argument("--ablate", metavar="FILE", help="instead: each component's worth over seeds 0, 1, 2, into this JSON file; resumes")
    g.add_argument("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py; with --ablate, {seed} stands for the seed")
    g.add_argument("--out", default="out/student.pt", help="checkpoint; the log lies beside it as .jsonl")
    add_training_flags(g, 40, "updates")
    args, ckpt = parse_resumable(p, "student", argv)
    if not ckpt:
        p.set_defaults(**(PAPER if args.paper else {}) | (SDTT if args.objective == "sdtt" else {}))
        args = p.parse_args(argv)
    check_flags(args)
    return args, pick_device(args), ckpt


def check_flags(args):
    """ValueError with one line for what argparse can't see."""
    check_training_flags(args)
    if min(args.groups, args.G, args.K, args.disc_batch) < 1:
        raise ValueError("--groups, --G, --K and --disc_batch must all be at least 1")
    if args.objective == "sdtt" and (args.disc_warmup or args.steps < len(args.rounds) or min(args.rounds) < 1):
        raise ValueError("--objective sdtt has no discriminator to warm up, and needs at least one update for each of its --rounds")
    if min(args.beta) <= 0:
        raise ValueError(f"--beta {args.beta[0]} {args.beta[1]}: both must be more than 0")
    if not 0 < args.t_range[0] <= args.t_range[1] <= 1:
        raise ValueError(f"--t_range {args.t_range[0]} {args.t_range[1]}: give two levels, 0 < low <= high <= 1")
    if not 0 < args.noise_max <= 1:
        raise ValueError(f"--noise_max {args.noise_max} must be more than 0 and at most 1")
    if args.objective == "sdtt":
        return
    if args.G == 1 and args.group_norm:
        raise ValueError("--G 1: there is nothing to compare in a group of one: raise it, or add --no-group_norm")
    if args.disc_batch > args.groups * args.G:
        raise ValueError(f"--disc_batch {args.disc_batch} is more than the {args.groups * args.G} samples of an update (groups * G)")


def teacher_samples(teacher, num=2048, steps=64, batch=256):
    """(num, L) samples of the teacher: the reference of the paper, where it would be the data otherwise."""
    z = torch.full((num, teacher.config.length), teacher.config.mask_id, device=next(teacher.parameters()).device)
    return torch.cat([didi.sample(teacher, part, steps, teacher.config.mask_id)[0]
                      for part in tqdm(z.split(batch), desc="teacher samples", unit="batch", disable=place()[0] > 0)])


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


def descend(net, optimizer):
    """One optimiser step with gradients clipped to norm 1; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


@torch.no_grad()
def evaluate(model, num, data, device, steps=(4, 8, 16), disc=None, batch=256):
    """{"valid@4": .., "entropy@4": .., "length@4": .., ..} of `num` samples in 4, 8 and 16 steps, guided if there is a discriminator.

    Always with the same random numbers.
    """
    def write(z, n):
        if disc:
            return didi.guided_sample(model, disc, z, n, mask_id, disc.positions, noise_max=disc.noise_max)[0]
        return didi.sample(model, z, n, mask_id)[0]
    row, mask_id = {}, model.config.mask_id
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(4321)
        for n in steps:
            z = torch.full((num, model.config.length), mask_id, device=device)
            q = quality(torch.cat([write(part, n) for part in z.split(batch)]), data)
            row.update({f"{k}@{n}": q[k] for k in data["shown"]})
    return row


def networks(args, config, teacher, device, ckpt):
    """{"model": student, "ema", "opt", and "disc", "disc_opt" or (sdtt) "target": the round's teacher}, copies of the teacher or as
    the checkpoint left them."""
    student, adam = copy.deepcopy(teacher).requires_grad_(True), {"betas": (0.9, 0.99), "weight_decay": 0.0}
    nets = {"model": student, "ema": copy.deepcopy(teacher), "opt": torch.optim.AdamW(student.parameters(), lr=args.lr, **adam)}
    if args.objective == "sdtt":
        nets["target"] = copy.deepcopy(teacher)
    else:
        disc = nets["disc"] = Discriminator(teacher, args.disc_blocks).to(device)
        nets["disc_opt"] = torch.optim.AdamW([p for p in disc.parameters() if p.requires_grad], lr=args.disc_lr, **adam)
    if ckpt:
        restore(nets, ckpt, device)
        if "disc_opt" in nets:
            nets["disc_opt"].param_groups[0]["lr"] = args.disc_lr
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # the trunks of all networks, at all numbers of sequences, count together
        for net in [teacher, *(nets[name] for name in ("model", "target", "disc") if name in nets)]:
            net = getattr(net, "body", net)
            net.trunk = torch.compile(net.trunk, dynamic=False)
    return nets


def states(student, teacher, reference, args, moving, graph):
    """1 and 2 of an update: (steps of didi.rollout, or None without a `graph`; its samples, noised (groups*G, L); disc_batch of these; as many
    reference texts with the same masks (disc_batch, L); the noise's level, and its density (groups*G,)).

    Until the student is `moving`, of as many groups as the discriminator needs. The same random numbers give the same states.
    """
    L, mask_id, device = teacher.config.length, teacher.config.mask_id, teacher.position.device
    # 1. rollout with intermediate-state matching: z_t -> z_tau -> x, and the log-probabilities of both steps. z_t is text noised at t, or all
    # masks: with --share state one for each group, completed G times, else `own` = G of them
    groups = args.groups if moving else -(-args.disc_batch // args.G)
    own, copies = (1, args.G) if args.share == "state" else (args.G, 1)
    t = torch.ones(groups, device=device)
    if args.start == "data":
        t = torch.where(torch.rand_like(t) < args.mask_share, t, torch.empty_like(t).uniform_(*args.t_range))
    x_ref = draw_rows(reference, groups * own, L, device)
    z_t = didi.forward_mask(x_ref, t.repeat_interleave(own), mask_id)
    levels, tau, pi = didi.draw_levels(t, args.K if args.ism else 1, *args.beta)
    with torch.set_grad_enabled(graph):
        x, steps = didi.rollout(student, z_t, levels.repeat_interleave(own, 1), mask_id, copies)  # (groups * G, L)
    # 2. coupled time: noise x to the rollout's own tau (or to a low level of its own), and the reference at the same positions
    level = tau if args.coupled else torch.rand_like(tau) * args.noise_max
    pi = pi if args.coupled else torch.full_like(pi, 1 / args.noise_max)
    level, pi = level.repeat_interleave(args.G), pi.repeat_interleave(args.G)  # (groups * G,): where the reward is read, and its density
    z_fake = didi.forward_mask(x, level, mask_id)
    pick = torch.randperm(len(x), device=x.device)[:args.disc_batch]
    z_ref = x_ref.repeat_interleave(copies, 0)[pick].masked_fill(z_fake[pick] == mask_id, mask_id)
    return steps if graph else None, z_fake, z_fake[pick], z_ref, level, pi


def didi_update(step, share, nets, student, disc, teacher, reference, args):
    """One iteration of DiDi-Instruct, read downwards; the numbers are the README's. Returns what to log.

    Until step = --disc_warmup only the discriminator learns. student and disc are nets["model"] and nets["disc"], or in DDP. The batch
    may come in parts: then only one part's rollout is in memory with its graph, made again from the same random numbers.
    """
    moving, mask_id, clip, rows = step >= args.disc_warmup, teacher.config.mask_id, args.reward_clip, []
    for k, n in parts(disc, args, step):
        batch = steps, z_fake, z_pick, z_ref, level, pi = states(student, teacher, reference, args, moving, graph=moving and n == 1)
        # 3. discriminator step: label 1 on the reference
        disc.train(k == 0)  # its spectral norms iterate once in either loop, however many parts
        logits_ref, logits_fake = disc(torch.cat((z_ref, z_pick))).chunk(2)
        disc_loss = didi.discriminator_loss(logits_ref, z_ref, logits_fake, z_pick, mask_id, args.positions, args.smoothing)
        (disc_loss / n).backward()
        r_ref, r_pick = (didi.reward(*pair, mask_id, args.positions, clip) for pair in ((logits_ref, z_ref), (logits_fake, z_pick)))
        rows.append({"disc_loss": disc_loss.item(), "disc_acc": ((r_ref > 0).float().mean() + (r_pick < 0).float().mean()).item() / 2,
                     "r_ref": r_ref.mean().item(), "r_student": r_pick.mean().item()})
    row = average(rows) | {"disc_norm": descend(nets["disc"], nets["disc_opt"])}
    if not moving:
        return row
    rows = []
    for k, n in parts(student, args, step):
        steps, z_fake, _, _, level, pi = batch if n == 1 else states(student, teacher, reference, args, moving, graph=True)
        # 4. reward and grouped reward normalisation
        disc.train(k == 0)
        with torch.no_grad():
            r = didi.reward(disc(z_fake), z_fake, mask_id, args.positions, clip)  # (groups * G,)
        advantage = didi.grouped_advantage(r, args.G, args.advantage_clip, args.eps) if args.group_norm else r
        # 5. student step: policy gradient, KL to the teacher, entropy bonus
        w = (didi.weight(level) if args.w else torch.ones_like(level)) / (pi if args.pi else 1)
        kl, entropy = regularisers(teacher, steps, args.kl_kind)
        policy = didi.policy_loss(sum(s[3] for s in steps), advantage, w, teacher.config.length)
        ((policy + args.kl * kl - args.entropy * entropy) / n).backward()
        del steps  # before the next part makes its own
        rows.append({"spread": r.view(-1, args.G).std(1, correction=0).mean().item(), "policy": policy.item(), "kl": kl.item(),
                     "entropy": entropy.item()})
    return row | average(rows) | {"norm": descend(nets["model"], nets["opt"])}


def sdtt_update(step, share, nets, student, disc, teacher, reference, args):
    """One iteration of self-distillation through time (arXiv 2410.21035): match in one step what two steps of `target` predict.

    The training is shared out among the rounds; in each, student and target begin as the student so far. share: of the training that is
    done, 0 to 1. Returns what to log.
    """
    mask_id, rows, group = teacher.config.mask_id, [], nets["opt"].param_groups[0]  # which a checkpoint keeps, and in it the round
    now = min(int(share * len(args.rounds) + 1e-9), len(args.rounds) - 1)
    if now > group.get("round", -1):
        for name in ("target", "model"):
            nets[name].load_state_dict(nets["ema"].state_dict())
        nets["opt"].state.clear()
        group["round"] = now
    for _, n in parts(student, args, step):
        x = draw_rows(reference, args.groups * args.G, teacher.config.length, teacher.position.device)
        t = didi.low_discrepancy_times(len(x), x.device)
        z_t = didi.forward_mask(x, t, mask_id)
        target = didi.sdtt_target(nets["target"], z_t, t, t.clamp(max=1 / args.rounds[now]), mask_id)
        kl = didi.kl_to_teacher(didi.predict(student, z_t, z_t == mask_id), target, args.kl_kind)
        kl = kl.sum() / max(len(kl), 1)
        (kl / n).backward()
        rows.append({"kl": kl.item()})
    return average(rows) | {"round": args.rounds[now], "norm": descend(nets["model"], nets["opt"])}


def ablate(path, argv, device, num=1000):
    """Run CUMULATIVE and ONE_CHANGE with three seeds each, {label: {seed: row}} into the file `path`, and print the table.

    Runs that the file has are not made again, so after Ctrl-C the same command goes on. The other flags in argv hold for every run.
    """
    results = read_results(path, "flags") if os.path.exists(path) else {}
    write_json(path, results)  # an unwritable path must not show after minutes of work
    so_far = list(itertools.accumulate(CUMULATIVE.values(), lambda a, b: f"{a} {b}"))
    runs = [*zip(CUMULATIVE, so_far), *ONE_CHANGE.items()]
    runs = [(label, flags.split(), seed) for seed in ("0", "1", "2") for label, flags in runs]
    out, done, data, stop = os.path.join("out", "ablation.pt"), None, None, None
    for label, flags, seed in tqdm([run for run in runs if run[2] not in results.get(run[0], {})], desc="ablation", unit="run"):
        if done != (flags, seed):
            stop = main([*argv, *flags, "--ablate", "", "--seed", seed, "--out", out, "--eval_every", "1000000"])
        if stop:
            break
        done = flags, seed
        ckpt, config = load_checkpoint(out, "student", device)
        model = build_denoiser(config, ckpt["ema"], device, ckpt["flags"]["bf16"]).requires_grad_(False)
        disc = build_discriminator(model, ckpt) if "guided" in label else None
        data = data or load_data(ckpt["data"], config.length)
        row = evaluate(model, num, data, device, (4, 8, 16, 32), disc)
        results.setdefault(label, {})[seed] = row | {"flags": ckpt["flags"]}
        write_json(path, results)
    rows = {label: list(results[label].values()) for label in [*CUMULATIVE, *ONE_CHANGE] if label in results}
    shown = list(dict.fromkeys(k.split("@")[0] for seeds in rows.values() for k in seeds[0] if "@" in k))
    columns = [f"{shown[0]}@{n}" for n in (4, 8, 16, 32)] + [f"{name}@8" for name in shown[1:]] if shown else []
    print("| | seeds | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for label, seeds in rows.items():
        print(f"| {label} | {len(seeds)} | " + " | ".join(spread([r[c] for r in seeds], 1 if "length" in c else 3) for c in columns) + " |")
    return stop


def main(argv=None):
    args, device, ckpt = parse_flags(argv)
    if args.ablate:
        if "WORLD_SIZE" in os.environ:
            raise ValueError("--ablate is for one process: start it without torchrun")
        return ablate(args.ablate, sys.argv[1:] if argv is None else argv, device)
    device = join_processes(device)
    share_out(args, "groups", *["disc_batch"] * (args.objective == "didi"))
    part = argparse.Namespace(**vars(args) | {"groups": args.groups // args.accumulate, "disc_batch": args.disc_batch // args.accumulate})
    torch.manual_seed(args.seed)
    loaded, config = load_checkpoint(args.teacher.replace("{seed}", str(args.seed)), "teacher", device)
    teacher = build_denoiser(config, loaded["ema"], device, args.bf16).requires_grad_(False)
    data = load_once(loaded["data"], config.length, device)
    reference = data["train"] if args.reference == "data" else teacher_samples(teacher)
    nets = networks(args, config, teacher, device, ckpt)
    student, disc = parallel(nets["model"]), parallel(nets["disc"]) if "disc" in nets else None

    def one_step(step, share):
        nets["opt"].param_groups[0]["lr"] = args.lr * (1 - 0.9 * share)
        row = (didi_update if args.objective == "didi" else sdtt_update)(step, share, nets, student, disc, teacher, reference, part)
        if step >= args.disc_warmup:
            update_ema(nets["ema"], nets["model"], args.ema)
        return row

    def table():
        return evaluate(nets["ema"], args.eval_samples, data, device)
    if args.bench:
        return bench(lambda: one_step(args.disc_warmup + 1, 0.0), args.groups * args.G * config.length, device)
    return train(args, nets, one_step, table, ckpt, device, "update", args.groups * args.G * config.length, args.disc_warmup,
                 kind="student", config=config, tokenizer=data["kind"], data=loaded["data"])


if __name__ == "__main__":
    run_script(main)

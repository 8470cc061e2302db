"""sdtt.py - self-distillation through time (SDTT, arXiv 2410.21035): another way to few steps.

    python -m experiments.sdtt                     # out/teacher.pt -> out/sdtt.pt, some 5 minutes
    python sample.py --model out/sdtt.pt --steps 8

A yardstick for DiDi-Instruct: no discriminator, no policy gradient. In each of a few rounds the
student learns to predict in one step what its teacher predicts in two; then it becomes the teacher
of the next round, in which the steps are twice as long. 960 updates take about as long as the
default of distill.py. Left out on purpose: --resume; Ctrl-C keeps what there is.
"""
import copy
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import didi
import distill
from data import files, memory
from data.command import (FROM_1, RATE, SHARE, SIZE, add_device_flags, make_parser, progress,
                          run_script, setup, stop_requested)
from model import save_checkpoint, update_ema


def parse_flags(argv=None):
    p, add = make_parser("Self-distillation through time.")
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--data", help="corpus folder [the teacher's]")
    add("--out", default="out/sdtt.pt", help="checkpoint, the log beside it as .jsonl")
    add("--rounds", type=SIZE, nargs="+", default=(32, 16, 8, 4), help="sampling steps of each")
    add("--updates", type=FROM_1, default=960, help="in all, shared out evenly among the rounds")
    add("--batch", type=SIZE, default=128, help="sequences per update")
    add("--lr", type=RATE, default=1e-3, help="falls linearly to a tenth; supervised, so high")
    add("--kl_kind", choices=didi.KL_KINDS, default="reverse",
        help="forward would learn the teacher's one-step prediction again, see sdtt_target")
    add("--ema", type=SHARE, default=0.97, help="decay of the weight average that is sampled")
    add_device_flags(add)
    p.set_defaults(resume=False, minutes=None)  # for progress
    args = p.parse_args(argv)
    if args.updates < len(args.rounds):
        raise ValueError("--updates must be at least one for each of --rounds")
    return args


@torch.no_grad()
def sdtt_target(teacher, z_t, t, dt, mask_id):
    """What two teacher steps t -> t - dt/2 -> t - dt predict, for a student to match in one.

    z_t (B, L), t and dt <= t (B,). Returns log_p_x (n, V) at the n masks of z_t: that of the first
    step where it reveals the token, else that of the second. The mean over paths is a consistent
    teacher's one-step prediction, so only a KL that prefers modes ("reverse") gains anything.
    """
    where = z_t == mask_id
    target = didi.predict(teacher, z_t, where)  # (n, V)
    reveal = didi.reveal_positions(z_t, t, t - dt / 2, mask_id)
    z = z_t.masked_scatter(reveal, didi.draw(target[reveal[where]]))
    masked = z == mask_id
    target[masked[where]] = didi.predict(teacher, z, masked)
    return target


def update(args, student, teacher, optimizer, x, steps):
    """One iteration on the texts x (B, L), towards a student of so many steps. What to log."""
    mask_id, pad_id = teacher.config.mask_id, teacher.config.pad_id
    t = didi.low_discrepancy_times(len(x), x.device)  # (B,)
    z_t = didi.forward_mask(x, t, mask_id, pad_id)
    target = sdtt_target(teacher, z_t, t, t.clamp(max=1 / steps), mask_id)
    log_p_x = didi.predict(student, z_t, z_t == mask_id)  # (n, V)
    kl = didi.kl_to_teacher(log_p_x, target, args.kl_kind).sum() / max(len(target), 1)
    kl.backward()
    return {"kl": kl.item(), "norm": distill.descend(student, optimizer)}


def train(args, teacher, data):
    """All rounds. Returns {"model", "ema"}, the updates made, seconds, and the exit code."""
    teacher, ema = copy.deepcopy(teacher), copy.deepcopy(teacher)
    student = copy.deepcopy(teacher).requires_grad_(True)
    L, device, rounds, now = teacher.config.length, teacher.lengths.device, args.rounds, -1
    begin, stop, step, seconds = time.perf_counter(), stop_requested(), 0, 0.0
    with progress(args, 0, args.updates) as log:
        while step < args.updates and not stop():
            lr = args.lr * (1 - 0.9 * step / args.updates)
            if step * len(rounds) // args.updates > now:  # a new round: the student so far teaches
                now += 1
                teacher.load_state_dict(ema.state_dict())
                student.load_state_dict(ema.state_dict())
                optimizer = torch.optim.AdamW(student.parameters(), lr, (0.9, 0.99),
                                              weight_decay=0.0)
            optimizer.param_groups[0]["lr"] = lr
            x = data.batch(args.batch, L, device)  # (B, L)
            row = update(args, student, teacher, optimizer, x, rounds[now])
            update_ema(ema, student, args.ema)
            step += 1
            seconds = time.perf_counter() - begin
            log({"step": step, "seconds": seconds, "steps": rounds[now], **row})
    return {"model": student, "ema": ema}, {"step": step, "seconds": seconds}, int(stop())


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    teacher, data = distill.load_teacher(args, device, bf16)
    files.check_output(args.out, args.data, args.teacher)
    width = teacher.config.n_embd + teacher.config.vocab_size  # of hidden states and two tables
    memory.check(teacher.config, device, 6, args.batch, 8 * width, "--batch")
    nets, done, code = train(args, teacher, data)
    save_checkpoint(args.out, nets, kind="student", config=asdict(teacher.config),
                    tokenizer=data.tokenizer, flags=vars(args), **done)
    tqdm.write(f"wrote {args.out} after {done['step']} of {args.updates} updates")
    return code


if __name__ == "__main__":
    run_script(main)

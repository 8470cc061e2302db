"""sdtt.py - self-distillation through time (SDTT, arXiv 2410.21035): another method for few steps.

    python -m experiments.sdtt                     # out/teacher.pt -> out/sdtt.pt, some 5 minutes
    python sample.py --model out/sdtt.pt --steps 8

A baseline for DiDi-Instruct: no discriminator, no policy gradient. In each of a few rounds the
student learns to predict in one step what its teacher predicts in two; then it becomes the teacher
of the next round, whose steps are twice as long. The default takes about as long as distill.py's.
Left out on purpose: --resume.
"""
import copy
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import didi
from distill import load_teacher
from model import (FRACTION, NATURAL, POSITIVE, add_device_flags, check_output, descend, log,
                   make_parser, run, save, setup)


def parse_flags(argv=None):
    p = make_parser(__doc__)
    add = p.add_argument_group("SDTT").add_argument
    add("--teacher", default="out/teacher.pt", help="checkpoint of train_teacher.py")
    add("--data", help="corpus folder; None: the teacher's")
    add("--rounds", type=NATURAL, nargs="+", default=(32, 16, 8, 4), help="sampling steps by round")
    add("--updates", type=NATURAL, default=120, help="updates per round")
    add("--batch", type=NATURAL, default=64, help="B, sequences per update")
    add("--lr", type=POSITIVE, default=1e-3, help="falls to a tenth; high, since supervised")
    add("--ema", type=FRACTION, default=0.97, help="decay of the weight average that is sampled")
    add("--out", default="out/sdtt.pt", help="checkpoint, written at the end; its log is a .jsonl")
    add_device_flags(p)
    return p.parse_args(argv)


@torch.no_grad()
def sdtt_target(teacher, z_t, a, s, mask_id):
    """Return what two teacher steps predict, from t to s and on from s, to be matched in one step.

    z_t and its reveal times a are (B, L), s is (B, 1). The result is log_p_x (n, V) at the n masks
    of z_t: from the first step where it reveals the token, else from the second. The mean over
    paths is a consistent teacher's one-step prediction, so only a mode-seeking KL, the reverse
    one, gains anything.
    """
    where = z_t == mask_id
    target = didi.predict(teacher, z_t, where)  # (n, V)
    reveal = where & (a >= s)
    token = didi.draw(target[reveal[where]])
    z = z_t.masked_scatter(reveal, token)

    masked = z == mask_id
    target[masked[where]] = didi.predict(teacher, z, masked)
    return target


def sdtt_loss(student, teacher, z_t, a, s, mask_id):
    """Return the reverse KL to `sdtt_target`, nats, the mean over the masks of z_t (B, L)."""
    target = sdtt_target(teacher, z_t, a, s, mask_id)
    log_p_x = didi.predict(student, z_t, z_t == mask_id)  # (n, V)
    return F.kl_div(target, log_p_x, reduction="batchmean", log_target=True)


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    teacher, data = load_teacher(args, device, bf16)
    check_output(args.out, "student", args.data)
    config = teacher.config
    average = copy.deepcopy(teacher)
    total = len(args.rounds) * args.updates
    torch.manual_seed(args.seed)

    rows = []
    begin = time.perf_counter()
    bar = tqdm(desc=args.out, total=total)
    for step in range(total):
        if step % args.updates == 0:  # a new round: the student becomes the teacher
            steps = args.rounds[step // args.updates]
            teacher.load_state_dict(average.state_dict())
            student = copy.deepcopy(teacher).requires_grad_(True)
            opt = torch.optim.AdamW(student.parameters(), args.lr, (0.9, 0.99), weight_decay=0.0)

        x = data.batch(args.batch, config.length, device)  # (B, L)
        # a step along the sampler's time grid begins at the fraction u of it
        u = 1 - didi.low_discrepancy_times(args.batch, device)  # (B,)
        u = didi.column(u, x)  # (B, 1)
        middle = u + (1 - u).clamp(max=1 / steps) / 2
        t = 1 - u ** config.exponent
        s = 1 - middle ** config.exponent
        a = didi.reveal_times(x, config.order)  # (B, L)
        z_t = x.masked_fill((a < t) & (x != config.pad_id), config.mask_id)
        kl = sdtt_loss(student, teacher, z_t, a, s, config.mask_id)

        kl.backward()
        lr = args.lr * (1 - 0.9 * step / total)
        norm = descend(student, lr, opt)
        didi.update_ema(average, student, args.ema)
        seconds = time.perf_counter() - begin
        row = {"step": step + 1, "seconds": seconds, "steps": steps}
        log(rows, bar, row | {"kl": kl.item(), "norm": norm})
    bar.close()

    nets = {"model": student, "ema": average}
    save(args.out, rows, nets, kind="student", config=vars(config),
         tokenizer=data.tokenizer, flags=vars(args), step=total, seconds=seconds)


if __name__ == "__main__":
    run(main)

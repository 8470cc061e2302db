"""command.py - what all commands share: flags, the device, a log, stopping, errors in one line.

Nothing here is about the method, or about data: makers of corpora and training scripts both run so.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
SHOWN = ("loss", "nelbo", "disc_acc", "spread", "kl")  # by the bar


def between(low, high, kind=float):
    """A type for argparse: numbers from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    return number


FROM_0, FROM_1 = between(0, 10 ** 9, int), between(1, 10 ** 9, int)
WEIGHT, RATE, SHARE = between(0, 1e6), between(1e-9, 1e6), between(0, 1)


def add_device_flags(add):
    """Flags of all commands that run a network."""
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 products [where fast]")
    add("--seed", type=FROM_0, default=0, help="repeats a run exactly on a CPU")


def add_run_flags(add, eval_every, out):
    """Flags of both training scripts."""
    add("--minutes", type=RATE, help="stop then, schedule fitted to it, whatever --updates is")
    add("--accumulate", type=FROM_1, default=1, help="parts of a batch, each a mean: less memory")
    add("--eval_every", type=FROM_1, default=eval_every, help="updates from table to table")
    add_device_flags(add)
    add("--out", default=out, help="checkpoint, written at tables; the log beside it as .jsonl")
    add("--resume", action="store_true", help="go on from --out, with its flags and those given")


def parse_run(p, argv, load):
    """The flags, and with --resume the checkpoint of --out, load(path), else None."""
    args, ckpt = p.parse_args(argv), None
    if args.resume:
        ckpt = load(args.out)
        p.set_defaults(**ckpt["flags"] | {"out": args.out})
    return p.parse_args(argv), ckpt


def setup(args):
    """(device, bf16) for --device and --bf16; joins torchrun's processes; seeds. ValueError."""
    # oneDNN keeps 1,024 kernels, one for each number of masks: 6 MB more in every update
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    cpu, fast = torch.cpu.get_capabilities(), {}  # {device: is bfloat16 fast there?}, best first
    if torch.cuda.is_available():
        fast["cuda"] = torch.cuda.get_device_capability() >= (8, 0)
    fast["cpu"] = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    name = next(iter(fast)) if args.device == "auto" else args.device
    if name not in fast:
        raise ValueError(f"--device {name} is not available here: use auto or one of {[*fast]}")
    if WORLD > 1:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    return torch.device(name), fast[name] if args.bf16 is None else args.bf16


# ------------------------------------------------------------------------------- a training's run
def share_out(name, args):
    """--NAME of one part of a batch in one process. ValueError if it isn't a whole number."""
    parts = args.accumulate * WORLD
    if getattr(args, name) % parts:
        raise ValueError(f"--{name} must be a multiple of --accumulate times processes, {parts}")
    return getattr(args, name) // parts


def share_done(args, updates, seconds):
    """How much of the training is done, 0 to 1: of --minutes if they are given, or of --updates."""
    if args.minutes is not None:
        return min(seconds / (60 * args.minutes), 1.0)
    return min(max(updates, 0) / args.updates, 1.0)


def agree(*numbers):
    """The largest of each over all processes, so that they all do the same."""
    x = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


@contextlib.contextmanager
def progress(args, step, total):
    """A bar and the log beside --out, made new or, with --resume, continued: log(row, table=False).

    A row is a dict of numbers; a table is printed above the bar. Raises ValueError if --out is a
    folder; log raises FloatingPointError for a number that is not finite.
    """
    if os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} is a folder: name a file in it, such as student.pt")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    path = os.devnull if RANK > 0 else args.out.removesuffix(".pt") + ".jsonl"
    if args.minutes:
        total = None
    elif step >= total and RANK == 0:
        print(f"{args.out} has all its {total} updates: give more with --resume and --updates")
    kept = []  # of a run that is resumed: a killed one's log is ahead of its checkpoint
    if args.resume and os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            whole = [line for line in f if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
    with open(path, "w", encoding="utf-8") as f, tqdm(None, args.out, total, initial=step,
                                                      disable=RANK > 0) as bar:
        f.writelines(kept)

        def log(row, table=False):
            if not all(map(math.isfinite, row.values())):
                raise FloatingPointError(f"a number is not finite: lower --lr (step {row['step']})")
            f.write(json.dumps(row) + "\n")
            f.flush()
            few = [name for name in row if table or name in SHOWN]
            text = ", ".join(f"{name} {round(row[name], 4)}" for name in few)
            if table:
                return bar.write(text)
            bar.set_postfix_str(text)
            bar.update()
        yield log


def stop_requested():
    """From now on Ctrl-C and SIGTERM let the step end: a function, 0 until then, 130 or 143."""
    seen = [0]

    def handler(number, frame):
        seen.append(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: seen[-1]


def run_script(main, resumes=False):
    """Run main() and exit with its code; what the user can mend is one line on stderr and 2.

    resumes: can a run that was stopped go on with --resume?
    """
    try:
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows ?
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        code = main()
        if code and RANK == 0:
            how = ": go on with the same command and --resume" if resumes else ""
            print(f"\nstopped, all is saved{how}", flush=True)
        if dist.is_initialized():
            dist.barrier()  # the first process may still be writing
            os._exit(code or 0)  # an interpreter torn down may be aborted by gloo's threads
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    except KeyboardInterrupt:
        code = 130
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook goes on
    sys.exit(code)

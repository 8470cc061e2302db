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

from data import files

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
SHOWN = ("loss", "nelbo", "disc_acc", "spread", "kl")  # by the bar


# ------------------------------------------------------------------------------------------ flags
def between(low, high, kind=float):
    """A type for argparse: numbers from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return kind(text)
    return number


FROM_0, FROM_1 = between(0, 10 ** 9, int), between(1, 10 ** 9, int)
SIZE = between(1, 2 ** 20, int)  # of a tensor, or of a list that is made beforehand
WEIGHT, RATE, SHARE = between(0, 1e6), between(1e-9, 1e6), between(0, 1)


def word(text):
    """A type for argparse: a name, a path. It is shown again, so no line break, and no escape."""
    odd = [c for c in text if not (c.isprintable() or "\udc80" <= c <= "\udcff")]
    if odd or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is empty or has a character that nobody sees")
    return text


def make_parser(description, **how):
    """(argparse parser, its add_argument): its flags are `word`s if nothing else is said, and what
    it refuses is a ValueError."""
    def fail(message):
        raise ValueError(f"{message}: see --help")
    p = argparse.ArgumentParser(description=description, **how)
    p.register("type", None, word)
    p.error = fail
    return p, p.add_argument


def add_device_flags(add):
    """Flags of all commands that run a network."""
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 products [where fast]")
    add("--seed", type=FROM_0, default=0, help="repeats a run exactly on a CPU")


def add_run_flags(add, eval_every, out, least=1, fit=""):
    """Flags of both training scripts; the least parts of a batch, and what 0 means."""
    add("--minutes", type=RATE, help="stop then, schedule fitted to it, whatever --updates is")
    add("--accumulate", type=between(least, 10 ** 9, int), default=1,
        help=f"parts of a batch, each a mean: less memory{fit}")
    add("--eval_every", type=FROM_1, default=eval_every, help="updates from table to table")
    add_device_flags(add)
    add("--out", default=out, help="checkpoint, written at tables; the log beside it as .jsonl")
    add("--resume", action="store_true", help="go on from --out, with its flags and those given")


def parse_run(p, argv, load):
    """The flags, and with --resume the checkpoint of --out, load(path), else None."""
    if argv is None:
        argv = sys.argv[1:]
    args, ckpt = p.parse_args(argv), None
    if args.resume:
        ckpt = load(args.out)
        argv = [*stored_words(p, ckpt["flags"], args.out), *argv, f"--out={args.out}"]
    return p.parse_args(argv), ckpt


def stored_words(p, flags, path):
    """The command line that gives these flags, a dict from the checkpoint at `path`. ValueError if
    there is none: the checkpoint is of another version, or damaged."""
    words, why = [], "of another command or version"
    try:
        for action in p._actions:
            value, names = flags.get(action.dest), action.option_strings
            if isinstance(value, bool):
                words += names[:1] if value else names[1:]
            elif isinstance(value, (list, tuple)):
                words += [names[0], *map(str, value)]
            elif value is not None:
                words.append(f"{names[0]}={value}")
        said, stored = (json.dumps(of, sort_keys=True) for of in (vars(p.parse_args(words)), flags))
        if said == stored:
            return words
    except (ValueError, TypeError, RecursionError) as e:
        why = e
    raise ValueError(f"{path} has flags that cannot be given here ({why}): make it again, or begin "
                     "anew with another --out")


def setup(args):
    """(device, bf16) for --device and --bf16; joins torchrun's processes; seeds. ValueError."""
    # oneDNN keeps 1,024 kernels, one for each number of masks: 6 MB more in every update
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    cpu, fast = torch.cpu.get_capabilities(), {}  # {device: is bfloat16 fast there?}, best first
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        fast["cuda"] = capability >= (8, 0)
    fast["cpu"] = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    name = next(iter(fast)) if args.device == "auto" else args.device
    if name not in fast:
        raise ValueError(f"--device {name} is not available here: use auto or one of {[*fast]}")
    if name == "cuda" and not fast[name] and args.bf16 is None and RANK == 0:
        print("float32: a GPU of compute capability {}.{} has no fast bfloat16".format(*capability))
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


def check_finite(row):
    """Raises FloatingPointError for a number in a row, a dict, that is not finite."""
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"a number is not finite: lower --lr (step {row['step']})")


def rows_up_to(path, step):
    """The lines of a log, none if it is not there, that are whole rows of updates up to `step`."""
    def good(line):
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as f:
        return [line for line in f if good(line)]


@contextlib.contextmanager
def progress(args, step, total):
    """A bar and the log beside --out, made new or, with --resume, continued: log(row, table=False).

    A row is a dict of numbers; a table is printed above the bar, and the checkpoint is on the disk
    by then: a run that fails before leaves the log of the run before. Raises ValueError if another
    run has this --out; log raises FloatingPointError for a number that is not finite.
    """
    if args.minutes:
        total = None
    elif step >= total and RANK == 0:
        print(f"{args.out} has all its {total} updates: give more with --resume and --updates")
    if RANK > 0:
        yield lambda row, table=False: check_finite(row)
        return
    path, kept = args.out.removesuffix(".pt") + ".jsonl", []
    with files.locked(path):
        if args.resume:  # a killed one's log is ahead of its checkpoint, or not yet called so
            kept = max(rows_up_to(path, step), rows_up_to(f"{path}.partial", step), key=len)
        with files.growing_file(path, kept) as (write, keep), \
                tqdm(None, args.out, total, initial=step) as bar:
            def log(row, table=False):
                check_finite(row)
                write(json.dumps(row) + "\n")
                few = [name for name in row if table or name in SHOWN]
                text = ", ".join(f"{name} {round(row[name], 4)}" for name in few)
                if table:
                    keep()
                    return bar.write(text)
                bar.set_postfix_str(text)
                bar.update()
            yield log


# ------------------------------------------------------------------------------------ how it ends
def stop_requested():
    """From now on Ctrl-C and SIGTERM let the step end: a function, 0 until then, 130 or 143."""
    seen = [0]

    def handler(number, frame):
        seen.append(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: seen[-1]


def printable(text, keep=""):
    """A young model, or a file, has any character; none but these may steer the terminal."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def out_of_memory(e):
    """Is this what torch or numpy raises where there is no memory left?"""
    words = ("allocate memory", "out of memory", "Unable to allocate")
    return isinstance(e, MemoryError) or any(some in str(e) for some in words)


def stop_within(e):
    """The exit code if e came of a signal, such as one while a bar took its lock; None if not."""
    if isinstance(e.__context__, (SystemExit, KeyboardInterrupt)):
        return getattr(e.__context__, "code", 130)


def say(text):
    """One line on stderr, whatever is in it."""
    print(printable(" ".join(str(text).split())), file=sys.stderr, flush=True)


def stop_at_once(number, frame):
    """SIGTERM while nothing can be saved: what is half made is taken away."""
    sys.exit(128 + number)


def run_script(main, resumes=False):
    """Run main() and exit with its code; what the user can mend is one line on stderr and 2.

    resumes: can a run that was stopped go on with --resume?
    """
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows ?
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        code = main()
        if code and RANK == 0:
            how = ": go on with the same command and --resume" if resumes else ""
            print(f"\nstopped, all is saved{how}", flush=True)
        sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # the first process may still be writing
            os._exit(code or 0)  # an interpreter torn down may be aborted by gloo's threads
    except BrokenPipeError:  # `| head` has seen enough
        if not resumes:
            os._exit(0)
        say("error: nobody reads what this prints any more: go on with --resume, and no such pipe")
        os._exit(141)
    except KeyboardInterrupt:
        say("stopped")
        code = 130
    except (ValueError, FloatingPointError, OSError) as e:
        say(f"error: {e}")
        code = 2
    except (RuntimeError, MemoryError) as e:
        code = stop_within(e)
        if not code and not out_of_memory(e):
            raise
        memory = "error: no memory is left: lower --batch or --groups, or raise --accumulate"
        say("stopped" if code else memory)
        code = code or 2
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook goes on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)

"""kill.py - SIGKILL at random moments: what goes on after it must end as if it had been left alone.

    python -m experiments.kill                                 # 150 kills, some 10 minutes
    python -m experiments.kill teacher distil --kills 30 --seed 7

Kinds: teacher, causal, distil and paper (distil --paper) are tiny runs in processes of their own.
Each is killed once to four times, a third of these times while a *.partial is being written,
then goes on with --resume (or anew, if there was no checkpoint yet) and ends: its checkpoint must
be bit for bit that of a run left alone, its log must have each step once, and at no time may there
be a checkpoint that is not whole. corpus: a corpus must be whole or absent. experiments.sdtt is
left out, for it has no --resume. Moments depend on the machine, so a seed repeats them only nearly.
"""
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile
import threading
import time

import torch
from tqdm import tqdm

from data.command import FROM_1, RATE, make_parser, run_script
from experiments.fuzz import (COMMANDS, as_a_program, make_toys, parse_kinds, snapshot, value,
                              whole)

LONG = ["--updates", "8", "--eval_every", "2"]
RUNS = {"teacher": ("train_teacher", [*COMMANDS["train_teacher"], *LONG]),
        "causal": ("train_teacher", [*COMMANDS["train_teacher"], *LONG, "--causal"]),
        "distil": ("distill", [*COMMANDS["distill"], *LONG]),
        "paper": ("distill", [*COMMANDS["distill"], *LONG, "--paper"]),
        "corpus": ("data.text", ["long.txt", "--tokenizer", "bytes", "--out", "new/text"])}
PATIENCE = 120  # seconds that a run may take


def start(kind, folder, more=()):
    """Start a run in a folder, in a process of its own: its number."""
    module, argv = RUNS[kind]
    says = folder.parent / "says"
    says.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            as_a_program(module, [*argv, *more], folder, says)
        finally:
            os._exit(99)
    return child


def is_written(folder):
    """Is a .partial of a checkpoint or of a corpus there?"""
    return any(".partial" in name for name in os.listdir(folder))


def wait(child, folder, seconds=PATIENCE, writing=False):
    """Kill a run after some seconds (if `writing`, as soon as it writes then). Its exit code."""
    begin, done = time.monotonic(), 0
    while not done:
        late = time.monotonic() - begin - seconds
        if late > 0 and (not writing or is_written(folder) or late > PATIENCE):
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.0001)
    return os.waitstatus_to_exitcode(status)


def entries(path):
    """{name: tensor or value} of a checkpoint, but for its clock and whether it was resumed."""
    ckpt = torch.load(path, weights_only=True)
    ckpt["flags"].pop("resume")
    found, _ = torch.utils._pytree.tree_flatten_with_path(ckpt | {"seconds": 0})
    return {str(name): entry for name, entry in found}


def same(a, b):
    """Are two entries of a checkpoint equal, bit for bit?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def timed_steps(log):
    """The steps in a log that have a time, as it stands: each should be there once."""
    rows = map(json.loads, log.read_text().splitlines())
    return [row["step"] for row in rows if "seconds" in row]


def differences(kind, folder, alone):
    """What of a run that has ended is not as in the one left alone, a list of texts."""
    if kind == "corpus":
        ours, theirs = (snapshot(of / "new/text") for of in (folder, alone))
        return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    name = value(RUNS[kind][1], "--out")
    ours, theirs = entries(folder / name), entries(alone / name)
    odd = [key for key in ours.keys() | theirs.keys()
           if key not in ours or key not in theirs or not same(ours[key], theirs[key])]
    logs = [(of / name).with_suffix(".jsonl") for of in (folder, alone)]
    if timed_steps(logs[0]) != timed_steps(logs[1]):
        odd.append("steps of the log")
    return odd


def broken(folder, alone):
    """What a kill has left that is neither whole nor absent."""
    found = [str(path) for path in folder.glob("new/*.pt")
             if not whole(str(path), path.read_bytes())]
    made = folder / "new/text"
    if made.exists() and snapshot(made) != snapshot(alone / "new/text"):
        found.append(str(made))
    return found


def clean(kind, folder):
    """Take away a corpus, whole or not; the flags to go on with."""
    if kind == "corpus":
        for path in folder.glob("new/text*"):
            shutil.rmtree(path, ignore_errors=True)
    if any(folder.glob("new/*.pt")):
        return ["--resume"]
    return []


def torment(kind, rng, toys, alone, seconds):
    """Kill a run, go on, and so on, to its end. Kills, those in the middle of writing, faults."""
    kills, cut, more = 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "work")
        shutil.copytree(toys, folder)
        (folder / "new").mkdir()
        for _ in range(rng.randint(1, 4)):
            moment, writing = rng.uniform(0, seconds), rng.random() < 1 / 3
            code = wait(start(kind, folder, more), folder / "new", moment, writing)
            faults = broken(folder, alone)
            if code == -signal.SIGKILL:
                kills += 1
                cut += int(is_written(folder / "new"))
            elif code != 0:
                faults.append(f"exit code {code}")
            if faults:
                return kills, cut, faults
            more = clean(kind, folder)
        code = wait(start(kind, folder, more), folder / "new")
        if code != 0:
            return kills, cut, [f"exit code {code} of the last run"]
        return kills, cut, differences(kind, folder, alone)


def left_alone(kind, toys, folder):
    """Make the run that nobody kills, twice, for the second is quicker; seconds that it takes."""
    for name in ("first", "work"):
        shutil.copytree(toys, folder / name)
        begin = time.monotonic()
        if wait(start(kind, folder / name), folder) != 0:
            raise ValueError(f"{kind} fails even if it is left alone: run the tests")
    if differences(kind, folder / "work", folder / "first"):
        raise ValueError(f"{kind} is not the same twice: nothing can be said of it")
    return time.monotonic() - begin


def parse_flags(argv=None):
    p, add = make_parser("SIGKILL at random moments.")
    add("--kills", type=FROM_1, default=150, help="how many, of all kinds together")
    add("--minutes", type=RATE, default=60.0, help="stop then")
    return parse_kinds(p, add, RUNS, argv)


def main(argv=None):
    args = parse_flags(argv)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its usual one is shared with a child that is killed with it
    tqdm.monitor_interval = 0
    rng, alone, counts = random.Random(args.seed), {}, {kind: [0, 0, 0] for kind in args.kinds}
    failing, done, bar = 0, 0, tqdm(total=args.kills, unit="kill", disable=None)
    with make_toys() as toys, tempfile.TemporaryDirectory() as scratch:
        text = "".join(f"Text {i} says {i * i}.\n<|endoftext|>\n" for i in range(40_000))
        pathlib.Path(toys, "long.txt").write_text(text)
        for kind in args.kinds:
            folder = pathlib.Path(scratch, kind)
            alone[kind] = folder / "work", left_alone(kind, toys, folder)
        end = time.monotonic() + 60 * args.minutes
        while done < args.kills and time.monotonic() < end:
            kind = min(counts, key=lambda kind: counts[kind][1])
            kills, cut, faults = torment(kind, rng, toys, *alone[kind])
            counts[kind] = [n + more for n, more in zip(counts[kind], (1, kills, cut))]
            done += kills  # a bar that is not shown does not count
            bar.update(kills)
            if faults:
                failing += 1
                tqdm.write(f"{kind}, run {counts[kind][0]}: {', '.join(faults)}")
    bar.close()
    for kind, (runs, kills, cut) in counts.items():
        print(f"{kind}: {runs} runs, {kills} kills, {cut} of them in the middle of writing")
    if failing:
        raise ValueError(f"{failing} runs did not end as if they had been left alone")


if __name__ == "__main__":
    run_script(main)

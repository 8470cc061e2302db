"""memory.py - does a run fit in the memory that is free? Said before anything is built.

All is counted low, so that what would fit is never refused; `python -m experiments.bench memory`
counts what an update of distill.py takes, and tests keep the estimates below that, and not far.
"""
import contextlib
import math

import torch

from data.command import RANK, WORLD, agree, share_out

NETWORK = "--n_embd or --n_layer"  # what makes a network smaller


def free(device):
    """Bytes that can still be had on a device; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    most = math.inf
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open("/proc/meminfo", encoding="ascii") as f:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in f}
        most = 1024 * (kib["MemAvailable"] + kib["SwapFree"])
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            most = min(most, int(f.read()))  # ValueError: "max"
    return most


def weight_bytes(config, copies):
    """Of so many copies of a network's weights (model.Config), gradients and moments among them."""
    V, D = config.vocab_size, config.n_embd
    return 4 * copies * (2 * V * D + 12 * config.n_layer * D ** 2)


def token_bytes(args, config, bf16):
    """Of each token, kept for backward in an update of distill.py: by the student's blocks in every
    step, the first of which has one state for G samples, and by the discriminator's that train.

    A block keeps 76 bytes of each of D numbers, with bfloat16 40 on a GPU (on a CPU 46).
    """
    blocks = config.n_layer * (args.K - 1 + 1 / args.G) + min(args.disc_blocks, config.n_layer)
    kept = 40 if bf16 else 76
    return kept * config.n_embd * blocks


def update_bytes(args, config, bf16, rows):
    """Of an update of distill.py with so many rows in a part, beyond weights and what is theirs.

    Of (n, V) log-probabilities, in parts, three float32 tables are there at once at least. All is
    counted by `python -m experiments.bench memory`.
    """
    tables = 12 * config.vocab_size * min(rows // args.G * config.length, config.part)
    return rows * config.length * token_bytes(args, config, bf16) + tables


def refuse_more(needs, device):
    """Raises ValueError if a device has not so many bytes; needs: {what to lower: bytes}."""
    need, room = sum(needs.values()), free(device)
    if need > room:
        raise ValueError(f"at least {need / 2 ** 30:.3g} GiB of memory would be needed, and "
                         f"{room / 2 ** 30:.3g} are free: lower {max(needs, key=needs.get)}")


def check(config, device, copies, rows, token, flag):
    """Raises ValueError if a network (model.Config) surely does not fit, or so many rows at once.

    copies: of its weights, with gradients and moments, in memory; token: bytes for each of a row;
    flag: what makes rows fewer. All are counted low: a run that would fit is never refused.
    """
    refuse_more({NETWORK: weight_bytes(config, copies), flag: rows * config.length * token}, device)


def fit_update(args, config, device, bf16):
    """The same for an update of distill.py, whose teacher is there already; and --accumulate, where
    it is 0, is settled and told: the fewest parts of which one leaves a third of the free memory,
    for what is not counted: on an H100 that was a tenth of what is."""
    most, room = max(args.groups // WORLD, 1), free(device)

    def needs(parts):
        of_rows = update_bytes(args, config, bf16, most // parts * args.G)
        return {"the size of the teacher": weight_bytes(config, 6),
                "--groups, or raise --accumulate": of_rows}
    if not args.accumulate:
        whole = [parts for parts in range(1, most + 1) if most % parts == 0]
        fit = [parts for parts in whole if 1.5 * sum(needs(parts).values()) <= room]
        args.accumulate = int(agree(min([*fit, most]))[0])
        if RANK == 0:
            need = sum(needs(args.accumulate).values()) / 2 ** 30
            print(f"--accumulate {args.accumulate}: some {need:.3g} GiB of memory for a part, and "
                  f"{room / 2 ** 30:.3g} are free")
    share_out("groups", args)  # raises for what is no whole part
    refuse_more(needs(args.accumulate), device)

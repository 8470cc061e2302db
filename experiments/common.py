"""common.py - what the experiments share: models to compare, timed writing, results files."""
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import sample
from experiments.autoregressive import autoregress
from model import Denoiser, Discriminator, load

KINDS = {"teacher": "teacher", "student": "student", "autoregressive": "causal"}  # of checkpoints


def machine_flags(args):
    """Return the flags, a list, that give a script of the top folder our --device and --bf16."""
    flags = ["--device", args.device]
    if args.bf16:
        flags.append("--bf16")
    elif args.bf16 is not None:
        flags.append("--no-bf16")
    return flags


# ----------------------------------------------------------------------------------------- models
@dataclass
class Model:
    """Hold a frozen model to compare. Only a student of distill.py has a discriminator."""
    net: Denoiser
    tokenizer: str
    flags: dict  # of its training
    disc: Discriminator | None = None


def load_model(path, kind, device, bf16):
    """Return the Model in a checkpoint. Raises ValueError if it is of another kind or damaged."""
    ckpt, net = load(path, kind, device=device, bf16=bf16)
    model = Model(net, ckpt["tokenizer"], ckpt["flags"])
    if "disc" in ckpt:
        model.disc = sample.load_discriminator(ckpt, path, net)
    return model


def load_models(paths, device, bf16):
    """Return {name: Model} for {name: path}; the names are those of KINDS.

    Raises ValueError if their texts differ in tokens or length, and so cannot be compared.
    """
    models = {}
    texts = set()
    for name, path in paths.items():
        model = load_model(path, KINDS[name], device, bf16)
        models[name] = model
        texts.add((model.tokenizer, model.net.config.length, model.net.config.pads))

    if len(texts) > 1:
        raise ValueError(f"{', '.join(paths.values())} differ in tokens or length: name models of "
                         "one corpus and one --length")
    return models


# ---------------------------------------------------------------------------------- timed writing
def fill(model, z, steps, temperature=1.0, order=None, guided=False):
    """Fill the masks of z (B, L) in `steps` steps, or token by token if the model is causal.

    Returns x (B, L), nfe (B,) and disc_calls (B,), the calls of both networks.
    """
    config = model.net.config
    if config.causal:
        x, nfe = autoregress(model.net, len(z), config.pad_id, temperature)
        return x, nfe, torch.zeros_like(nfe)

    disc = model.disc if guided else None
    return sample.fill(model.net, disc, z, steps, temperature, order)


def write(model, num, steps, seed=0, batch=64, **how):
    """Write num texts, `batch` at a time; `how` goes to `fill`.

    Returns x (num, L), on the CPU, and {"calls", "disc_calls", "seq_per_s"}; the first two are
    means.
    """
    net = model.net
    z = net.start(net.draw_lengths(min(num, batch)))
    fill(model, z, 2, **how)  # not timed: the first calls set up threads, kernels and memory

    torch.manual_seed(seed)
    z = net.start(net.draw_lengths(num))
    parts = []
    begin = time.perf_counter()
    for part in tqdm(z.split(batch), unit="batch", leave=False, delay=2):
        outputs = fill(model, part, steps, **how)
        parts.append([output.cpu() for output in outputs])
    seconds = time.perf_counter() - begin

    x, nfe, disc_calls = map(torch.cat, zip(*parts))
    cost = {"calls": nfe.double().mean().item(), "disc_calls": disc_calls.double().mean().item(),
            "seq_per_s": num / seconds}
    return x, cost


# ---------------------------------------------------------------------------------------- results
def read_results(path):
    """Return the results in a file, {label: {seed: run}}; {} if there is none yet.

    Raises ValueError if the file holds something else.
    """
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
        for runs in results.values():
            for run in runs.values():
                run["flags"]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is not an experiment's results file: name another") from None
    return results


def add_run(path, label, seed, run):
    """Add a run, a dict with "flags", to a results file; replace one with that label and seed.

    The file is written under a temporary name, then renamed, so that it is whole at any moment.
    """
    results = read_results(path)
    results.setdefault(label, {})[str(seed)] = run

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
    os.replace(partial, path)


def spread(values, digits):
    """Return "mean +- standard deviation" of the finite values, or "" if there are none."""
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return ""
    text = f"{statistics.fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" +- {statistics.stdev(numbers):.{digits}f}"
    return text


def means(rows, columns):
    """Return the `spread` of each of `columns`, {name: digits}, over rows that belong together."""
    cells = []
    for name, digits in columns.items():
        values = [row.get(name) for row in rows]
        cells.append(spread(values, digits))
    return cells


def print_row(*cells):
    """Print a line of a Markdown table, with an empty cell for None."""
    shown = ["" if cell is None else str(cell) for cell in cells]
    print("| " + " | ".join(shown) + " |", flush=True)


def print_head(*names):
    """Print the first two lines of a Markdown table."""
    print_row(*names)
    print("|---" * len(names) + "|")


def hardware(device, bf16):
    """Return a dict that describes the hardware and how it is used."""
    name = device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "cpu": platform.machine(), "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(), "bf16": bf16, "torch": torch.__version__}

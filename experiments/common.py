"""common.py - what the experiments share: models to compare, timed sampling, results, memory.

A model here is a dict {"denoiser", "config", "tokenizer" (its name), "flags"}, and of a student of
distill.py "discriminator".
"""
import json
import math
import os
import platform
import statistics
import sys
import time

import torch
from tqdm import tqdm

import didi
from data import files
from experiments.autoregressive import autoregress
from model import Discriminator, load_checkpoint, restore


# ----------------------------------------------------------------------------------------- models
def load_model(path, device, bf16, kinds=("student", "teacher", "causal")):
    """The model in a checkpoint, frozen. ValueError if it isn't of these kinds, or damaged."""
    ckpt, denoiser = load_checkpoint(path, kinds, device, bf16)
    model = {"denoiser": denoiser, "config": denoiser.config, "tokenizer": ckpt["tokenizer"],
             "flags": ckpt["flags"]}
    if "disc" in ckpt:
        discriminator = Discriminator(denoiser).to(device)
        restore({"disc": discriminator}, ckpt, path)
        # in eval mode, or spectral norm would go on iterating
        model["discriminator"] = discriminator.eval().requires_grad_(False)
    return model


def load_models(paths, device, bf16):
    """{name: model} of {name: path}, names "teacher", "student", "autoregressive".

    Raises ValueError if they differ in their tokens or length, and so can't be compared.
    """
    kinds = {"teacher": "teacher", "student": "student", "autoregressive": "causal"}
    models = {name: load_model(path, device, bf16, (kinds[name],)) for name, path in paths.items()}
    texts = {(m["tokenizer"], m["config"].pads, m["config"].length) for m in models.values()}
    if len(texts) > 1:
        names = ", ".join(paths.values())
        raise ValueError(f"{names} differ in tokens or length: make them all from one corpus and "
                         "with the same --length, or name others")
    return models


# --------------------------------------------------------------------------------- timed sampling
def penalised(denoiser, mask_id, strength):
    """The denoiser with a frequency penalty: less `strength` for each time that a token is visible.

    A control that needs no training: a claim of few steps should be better than it.
    """
    def constrained(z, where):
        counts = torch.zeros(len(z), mask_id + 1, device=z.device)
        counts.scatter_add_(1, z, torch.ones_like(z, dtype=torch.float32))  # (B, V + 1)
        logits = denoiser(z, where)  # (n, V)
        return logits - strength * counts[where.nonzero()[:, 0], :logits.shape[1]]
    return constrained


def run(model, z, steps, sampler, temperature, rgas, on_step):
    """Fill z (B, L), from `start`: x (B, L), nfe (B,), the discriminator's calls (B,)."""
    denoiser, mask_id = model["denoiser"], model["config"].mask_id
    if "penalty" in model:
        denoiser = penalised(denoiser, mask_id, model["penalty"])
    if sampler == "rgas":
        discriminator = model["discriminator"]
        return didi.guided_sample(denoiser, discriminator, z, steps, mask_id, *rgas, temperature)
    if sampler == "autoregressive":
        x, nfe = autoregress(denoiser, len(z), model["config"].pad_id, temperature, on_step)
    else:
        x, nfe = didi.sample(denoiser, z, steps, mask_id, temperature, on_step)
    return x, nfe, torch.zeros_like(nfe)


def write(model, num, steps, sampler="ancestral", temperature=1.0, seed=0, batch=256,
          rgas=(1.0, 4, 0.5), on_step=None, name=None):
    """Write num texts: x (num, L) on the CPU, and {"nfe", "disc_calls", "seq_per_s"}.

    sampler: "ancestral"; "rgas" with (h, M, switch) of didi.guided_sample; "autoregressive", which
    has no steps. nfe and disc_calls are the means of the network calls that a sequence took.
    """
    net, parts = model["denoiser"], []
    batch = min(batch, net.config.at_once)
    if not on_step:  # warm-up, not timed: the first calls set up threads, kernels and memory
        z = net.start(net.draw_lengths(min(num, batch)))
        run(model, z, 2, sampler, temperature, rgas, None)[0].cpu()
    torch.manual_seed(seed)
    z = net.start(net.draw_lengths(num))  # the length comes first
    begin = time.perf_counter()
    for part in tqdm(z.split(batch), desc=name, leave=False, delay=1, disable=bool(on_step)):
        outputs = run(model, part, steps, sampler, temperature, rgas, on_step)
        parts.append([output.cpu() for output in outputs])
    seconds = time.perf_counter() - begin
    x, nfe, calls = map(torch.cat, zip(*parts))
    return x, {"nfe": nfe.double().mean().item(), "disc_calls": calls.double().mean().item(),
               "seq_per_s": num / seconds}


def process_bytes(name):
    """What Linux says of this process under a name of /proc/self/status, such as VmSize."""
    with open("/proc/self/status") as f:
        lines = [line.split() for line in f if line.startswith(name)]
    return int(lines[0][1]) * 1024


def memory_meter(device):
    """A function: the most memory used from now on, MiB, beyond what is in use now.

    On CUDA the GPU's, on Linux the process's, elsewhere NaN.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if sys.platform != "linux":
        return lambda: math.nan
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # VmHWM := VmRSS (man 5 proc)
    before = process_bytes("VmRSS")
    return lambda: (process_bytes("VmHWM") - before) / 2 ** 20


# ---------------------------------------------------------------------------------------- results
def write_json(path, content):
    """Write a JSON file, whole or not at all. OSError if that cannot be done."""
    with files.whole_file(path) as f:
        json.dump(content, f, indent=1)


def read_results(path, holds):
    """A results file {label: {seed: run}}, of runs of a command that has this flag, each a dict
    with "flags" and perhaps "rows", a list of dicts. ValueError if it is none."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        runs = [run for seeds in content.values() for run in seeds.values()]
        good = all(holds in run["flags"] for run in runs)
        good = good and all(is_row(row) for run in runs for row in run.get("rows", []))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path!r} has no results of a command with --{holds}: name another")
    return content


def is_row(row):
    """Is this a line of a table: a name and numbers, none beyond all bounds, of a step or more?"""
    shown = {"row", "sampler", "examples", "flags"}  # of these only the first is looked at
    numbers = [row[name] for name in row.keys() - shown if row[name] is not None]
    good = all(type(x) in (int, float) and not 1e300 < abs(x) < math.inf for x in numbers)
    return good and type(row["row"]) is str and (row.get("steps") is None or row["steps"] >= 1)


def add_run(path, holds, label=None, seed=None, run=None):
    """Add a run to a results file, made if missing. Without one only see that this can be done.
    It takes the place of one of the same label and seed, but never of another command's.

    The file is read again each time: another process may have added to it.
    """
    files.check_output(path, new_folder=False)
    with files.locked(path, wait=True):
        results = {}
        if os.path.exists(path):
            results = read_results(path, holds)
        if run is not None:
            results.setdefault(label, {})[str(seed)] = run
        write_json(path, results)


def spread(values, digits=3):
    """"mean +- standard deviation" of the values that are numbers, or "" if there are none."""
    values = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.{digits}f}"
    return text


def hardware(device, bf16):
    """What a result was measured on, a dict."""
    name = device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "cpu": platform.machine(), "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(), "bf16": bf16, "torch": torch.__version__}


def pyplot():
    """matplotlib without a screen, and its pyplot. ValueError if it isn't installed."""
    try:
        import matplotlib.animation
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("pictures need the package matplotlib, which is optional: "
                         "pip install matplotlib") from None
    return matplotlib, plt

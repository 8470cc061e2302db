"""files.py - files are written whole or not at all, and a checkpoint is checked before it is used.

Nothing here is about the method. A checkpoint comes from anywhere: its sizes, types and numbers are
compared with what its own config implies before any network is built from them.
"""
import contextlib
import os
import tempfile
import zipfile

import torch

from data.corpus import TOKENS

try:
    import fcntl
except ImportError:  # Windows: two runs with one --out are not noticed there
    fcntl = None

SWITCHES = {"causal", "pads", "framed"}  # of a config; its other entries are sizes
SIZES = {"vocab_size", "length", "n_layer", "n_head", "n_embd"}
TYPES = {"kind": str, "config": dict, "tokenizer": str, "flags": dict, "step": int,
         "seconds": float, "rng": torch.Tensor, "model": dict, "ema": dict}
STATES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
          torch.optim.Muon: {"momentum_buffer"}}


# ---------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def whole_file(path, mode="w"):
    """An open file, text as UTF-8, that is called `path` once all of it is on the disk.

    Until then path.partial. Raises OSError in one line; then the old file is as it was.
    """
    partial, encoding = f"{path}.partial", None
    if "b" not in mode:
        encoding = "utf-8"
    try:
        remove(partial)  # of a process that was killed; if it is a link, what it leads to stays
        with open(partial, mode.replace("w", "x"), encoding=encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # the second of torch's writer, where a disk is full
        raise OSError(f"{path} stays as it was, it cannot be written: {e}") from None
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


@contextlib.contextmanager
def growing_file(path, lines):
    """write(text) and keep(), of a file that begins with these lines, a list: each text is on the
    disk at once. It is called path.partial until keep(), or the end; an error before leaves the
    file that was there."""
    names = [f"{path}.partial", path]

    def write(text):
        try:
            with open(names[0], "a", encoding="utf-8") as f:
                f.write(text)
        except OSError as e:
            raise OSError(f"{path} cannot be written: {e}") from None

    def keep():
        if len(names) > 1:
            os.replace(*names)
            names.pop(0)
    remove(names[0])
    write("".join(lines))
    try:
        yield write, keep
        keep()
    finally:
        if not os.path.exists(path):  # no run before has one
            keep()
        remove(f"{path}.partial")


def remove(path):
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold path.lock, which no other process has meanwhile; it is let go when this one dies.

    wait: until the other one has done. Else ValueError that names the file.
    """
    if fcntl is None:
        yield
        return
    lock, how = f"{path}.lock", fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
    while True:  # until the file that is locked is still the one of that name
        f = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(f, how)
            if os.path.samestat(os.fstat(f), os.stat(lock)):
                break
        except FileNotFoundError:  # the other one has just taken it away
            pass
        except BlockingIOError:
            os.close(f)
            raise ValueError(f"{path} is being written by another run: wait for it, or name "
                             "another with --out") from None
        os.close(f)
    try:
        yield
    finally:
        remove(lock)
        os.close(f)


def check_output(path, *inputs, new_folder=True):
    """Raises ValueError unless a file can be written at `path`, which is none of the inputs, files
    or folders, and in none of them, nor in a corpus. Makes its folder if it may be new."""
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{path!r} is a folder: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path!r} is no file: name another")
    if path.endswith((".partial", ".lock", ".jsonl")):
        raise ValueError(f"{path!r} is the name of a log, or one for a moment: name another")
    real = os.path.realpath(path)
    if os.path.exists(os.path.join(os.path.dirname(real), "meta.json")):
        raise ValueError(f"{path!r} is in a corpus: name a file in another folder")
    for other in map(os.path.realpath, inputs):
        linked = os.path.isfile(path) and os.path.exists(other) and os.path.samefile(path, other)
        log = os.path.isfile(other) and other.removesuffix(".pt") == real.removesuffix(".pt")
        if linked or log or other in (real, os.path.dirname(real)):
            raise ValueError(f"{path!r} would be written over what is read, or its log over that "
                             "one's: name another file")
    try:
        if new_folder:
            os.makedirs(os.path.dirname(real), exist_ok=True)
        with tempfile.TemporaryFile(dir=os.path.dirname(real)):
            pass
    except OSError as e:
        raise ValueError(f"{path!r} cannot be written ({e.strerror}): name a file in another "
                         "folder") from None


# ------------------------------------------------------------------------------------ checkpoints
def read_checkpoint(path, device, build, maker):
    """The dict in a checkpoint, checked as far as it says itself what it should be.

    Executes no code from the file. build(config), a dict -> the network; only its shapes are asked
    for. ValueError names the entry that is wrong, and the script that makes such a file.
    """
    try:
        check_archive(path)
        ckpt = torch.load(path, map_location=device, weights_only=True)
        check_entries(ckpt)
        check_config(ckpt["config"], ckpt["kind"], ckpt["tokenizer"], os.path.getsize(path))
        with torch.device("meta"):  # nothing is allocated for a lie
            check_tensors("ema", ckpt["ema"], build(ckpt["config"]).state_dict())
        if ckpt["ema"]["lengths"].min() < 0 or ckpt["ema"]["lengths"].sum() <= 0:
            raise ValueError("'lengths' of 'ema' are no shares")
    except Exception as e:  # a foreign file can fail in any way: OSError, EOFError, KeyError ..
        why = type(e).__name__
        if type(e) is ValueError:
            why = str(e)
        raise ValueError(f"{path} is missing, damaged, of another version or no checkpoint "
                         f"({why}): make it again with `python {maker}`") from None
    return ckpt


def check_archive(path):
    """Raises an error unless all in it is as it was written: torch looks at no checksum."""
    with zipfile.ZipFile(path) as archive:
        if any(file.compress_type != zipfile.ZIP_STORED for file in archive.infolist()):
            raise ValueError("compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} in it is damaged")


def check_entries(ckpt):
    """Raises an error unless a checkpoint's entries are of the right types, and within bounds."""
    for name, kind in TYPES.items():
        if not isinstance(ckpt.get(name), kind) or isinstance(ckpt[name], bool):
            raise ValueError(f"{name!r} is no {kind.__name__}")
    if not 0 <= ckpt["step"] <= 10 ** 12 or not 0 <= ckpt["seconds"] <= 10 ** 12:
        raise ValueError("'step' or 'seconds' is beyond all bounds")
    if type(ckpt["flags"].get("data")) is not str or type(ckpt["flags"].get("seed")) is not int:
        raise ValueError("'flags' has no data or seed")
    try:
        torch.Generator().set_state(ckpt["rng"].cpu())
    except (RuntimeError, TypeError):
        raise ValueError("'rng' is no state of random numbers") from None


def check_config(config, kind, tokenizer, size):
    """Raises ValueError unless a network of this kind and tokenizer can have this config, and a
    file of so many bytes hold it."""
    for name in config.keys() ^ SIZES ^ SWITCHES:
        raise ValueError(f"'config' should, or should not, have {name!r:.20}")
    good = {name: type(config[name]) is int and config[name] > 0 for name in SIZES}
    good |= {name: type(config[name]) is bool for name in SWITCHES}
    for name in (name for name in good if not good[name]):
        raise ValueError(f"'config' has {name} = {config[name]!r:.20}")
    if TOKENS.get(tokenizer) != config["vocab_size"]:
        raise ValueError(f"'tokenizer' is {tokenizer:.20}, of {config['vocab_size']} tokens")
    if config["causal"] != (kind == "causal"):
        raise ValueError(f"'kind' is {kind:.20}, not as 'config' has it")
    if config["n_embd"] % (2 * config["n_head"]):
        raise ValueError("'config' has n_embd that is no multiple of 2 n_head")
    weights = 12 * config["n_layer"] * config["n_embd"] ** 2 + config["length"]
    if 4 * weights > size:
        raise ValueError("'config' implies more weights than the file has")


def check_tensors(name, found, like):
    """Raises ValueError unless found, a dict, has the names, types and shapes of `like`, finite."""
    if not isinstance(found, dict) or found.keys() != like.keys():
        raise ValueError(f"{name!r} has other entries than its config implies")
    for key, t in like.items():
        x = found[key]
        dense = isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta
        if not dense or (x.shape, x.dtype) != (t.shape, t.dtype) or not x.is_contiguous():
            raise ValueError(f"{key!r} of {name!r} has not the shape that its config implies")
        if not x.isfinite().all():
            raise ValueError(f"{key!r} of {name!r} is not finite")


def check_moments(name, found, optimizer):
    """Raises ValueError unless found is a state of this optimiser, new or of all that it trains."""
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        raise ValueError(f"{name!r} is no state of an optimiser")
    params = dict(enumerate(optimizer.param_groups[0]["params"]))
    trained = {i: p for i, p in params.items() if p.requires_grad}
    if found["state"] and found["state"].keys() != trained.keys():
        raise ValueError(f"{name!r} is of other weights")
    for i, state in found["state"].items():
        like = dict.fromkeys(STATES[type(optimizer)], trained[i])
        if "step" in like:
            like["step"] = torch.zeros(())
        check_tensors(f"{name} {i}", state, like)
        if "step" in like and state["step"] < 0:
            raise ValueError(f"'step' of '{name} {i}' is below 0")


def fill(nets, ckpt, path):
    """Load nets, {name: module or optimiser}, from a checkpoint. ValueError if one does not fit.

    Of an optimiser only what it has learnt: its settings are those of the flags.
    """
    try:
        for name, net in nets.items():
            state = ckpt.get(name)
            if isinstance(net, torch.nn.Module):
                check_tensors(name, state, net.state_dict())
            else:
                check_moments(name, state, net)
                state = net.state_dict() | {"state": state["state"]}
            net.load_state_dict(state)
    except ValueError as e:
        raise ValueError(f"{path} does not fit ({e}): resume with its own flags, or make it "
                         "again") from None

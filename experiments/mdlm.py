"""mdlm.py - the published MDLM teacher (arXiv 2406.07524) in our network, and ours in its layout.

    python -m experiments.mdlm model.safetensors          # -> out/teacher.pt, then distill.py
    python -m experiments.mdlm mdlm.ckpt --raw            # Lightning's file; its bare weights
    python -m experiments.mdlm out/student.pt --unfold out/mdlm/model.safetensors

MDLM trained 169 M parameters on OpenWebText: ADDRESS below, 679 MB, Apache 2.0. Its noise level is
always 0, so what it makes of it (adaLN) are constants: folded into the weights they leave our
network, exactly. Nothing in a file is executed, and neither flash-attn nor transformers, Lightning
or omegaconf is needed. Left out on purpose: BD3LM's form of these networks
(sampling_eps_min/max), networks that are told the noise level.
"""
import collections
import contextlib
import hashlib
import json
import math
import os
import pickle
import pickletools
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import asdict

import torch
import torch.nn.functional as F

from data import files
from data.command import make_parser, run_script
from experiments.common import process_bytes, write_json
from model import Config, Denoiser, load_checkpoint, save_checkpoint

ADDRESS = "https://huggingface.co/kuleshov-group/mdlm-owt/resolve/main/model.safetensors"
SHA256 = "47149e73f7552f39ea9776dbe74d925d25237bcf2ed2e2ec03cdff9d51c82aa4"  # of mdlm-owt's file
PUBLISHED = Config(50257, 1024, n_layer=12, n_head=12, n_embd=768, framed=True)
TOKENIZERS = {50257: "gpt2", 257: "bytes"}  # by how many tokens they have
# Raw logits at the mask (50257) of the published weights, in float32: candle-mi's reference values
ANSWERS = (
    ((464, 3139, 286, 4881, 318, 50257, 13), {6342: 19.8361, 14644: 18.5939, 4881: 17.0668}),
    ((464, 6697, 286, 3024, 318, 50257, 13), {3024: 18.9832, 37546: 16.8134, 6964: 16.7932}),
    ((19184, 318, 925, 286, 17669, 290, 50257, 13),
     {11863: 20.6141, 1660: 18.6909, 367: 18.6207}))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Real files have far less. Bytes; an instruction of a pickle of one byte makes up to 216 of memory
MOST_HEADER, MOST_PICKLE, MOST_OPS, MOST_CONFIG = 10 ** 6, 2 ** 26, 2 ** 21, 2 ** 20
MOST_COPIED = 2 ** 30  # bytes beside those of the file: a call of six may copy a long list
MOST_LENGTH = 2 ** 16  # L
EMBED, INV_FREQ = "vocab_embed.embedding", "rotary_emb.inv_freq"
TIME = "sigma_map.mlp.0.weight"
# Where a file keeps the network, best first. What is under the last names is another one.
PREFIXES = ("student_ema.", "backbone.backbone.", "backbone.", "")
OTHERS = ("student_ema.", "backbone.", "discriminator.", "teacher.", "reward_baseline")


# ------------------------------------------------------------------------------------ safetensors
def unique(pairs):
    """A dict of these pairs. ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name[:80]!r} comes twice")
    return found


def naturals(x, most):
    """Is x a list of at most so many whole numbers, none below 0?"""
    return isinstance(x, list) and len(x) <= most and all(type(i) is int and i >= 0 for i in x)


def check_entry(name, entry):
    """(dtype, shape, begin, end) of a tensor in a header. ValueError names what is wrong."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} has not just a dtype, a shape and data_offsets")
    dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name[:80]!r} is of type {dtype[:20]!r}, but may be {', '.join(DTYPES)}")
    ok = naturals(shape, 8) and naturals(offsets, 2) and len(offsets) == 2
    if not ok or math.prod(max(n, 1) for n in shape) > 2 ** 48:  # which a 0 would hide
        raise ValueError(f"{name[:80]!r} has an odd shape or odd data_offsets")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name[:80]!r} has data_offsets that do not fit its shape")
    return DTYPES[dtype], shape, begin, end


def read_header(f, size):
    """[(name, dtype, shape, begin, end)] in the order of the data, which f then stands at.

    All is checked before anything is allocated: spans are contiguous up to the file's size, bytes.
    """
    head = f.read(8)
    n = int.from_bytes(head, "little")
    if len(head) < 8 or n > min(size - 8, MOST_HEADER):
        raise ValueError(f"its header cannot have {n} bytes")
    try:
        header = json.loads(f.read(n).decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a dict")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise ValueError("its '__metadata__' is not a dict of texts")
    entries = [(name, *check_entry(name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    at = 0
    for name, _, _, begin, end in entries:
        if begin != at:
            raise ValueError(f"{name[:80]!r} does not begin where the tensor before it ends")
        at = end
    if at != size - 8 - n:
        raise ValueError(f"its tensors have {at} bytes, and {size - 8 - n} are there")
    return entries


def read_tensor(f, dtype, shape, size):
    """The tensor in the next `size` bytes of f. ValueError if they are not there."""
    data = torch.empty(size, dtype=torch.uint8)
    if f.readinto(data.numpy()) != size:
        raise ValueError("it ends within its data")
    return data.view(dtype).view(shape)


def read_safetensors(path):
    """{name: tensor}; the format is a u64 length, a JSON header, little-endian data.

    Raises ValueError in one line unless the file is whole and strictly of this form.
    """
    try:
        with open(path, "rb") as f:
            entries = read_header(f, os.path.getsize(path))
            return {name: read_tensor(f, dtype, shape, end - begin)
                    for name, dtype, shape, begin, end in entries}
    except ValueError as e:
        raise ValueError(f"{path} is damaged or no .safetensors file: {e}") from None


def write_safetensors(path, tensors):
    """Write {name: float32 tensor} in that format, by way of a temporary file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data are aligned
    with files.whole_file(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(tensor.contiguous().numpy())


# --------------------------------------------------------------------------- Lightning checkpoints
class Inert:
    """Stands for a class or a function that a checkpoint names: it keeps and does nothing."""
    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def empty_dict(*args):
    """Stands for defaultdict, which torch fills only if it is a dict: hydra leaves such caches."""
    return {}


def stand_in(name):
    """What torch makes of a foreign name in a checkpoint; a class each, so that errors name it."""
    if name == "collections.defaultdict":
        return empty_dict
    return type(name[-80:], (Inert,), {})


def today(words):
    """"module name" in a pickle, perhaps by a name of Python 2 as torch.save writes it -> a.b."""
    module, _, name = words.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def harmless(name):
    """May a checkpoint use this, which torch would run? bytearray(10 ** 12) needs no such size."""
    plain = ("collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode",
             "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size",
             "torch.device")
    last = name.removeprefix("torch.")
    storage = last.isalnum() and last.endswith("Storage")
    return name in plain or storage or isinstance(getattr(torch, last, None), torch.dtype)


def foreign_names(path):
    """The globals that a checkpoint wants and torch would refuse; nothing is loaded for it.

    Raises ValueError unless the zip is as torch writes it, so that no size in it can lie.
    """
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in files):
            raise ValueError("a file in it is compressed")
        pickles = [file for file in files if file.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len({file.filename for file in files}) < len(files):
            raise ValueError("there is no data.pkl in it, or a file comes twice")
        if pickles[0].file_size > MOST_PICKLE:
            raise ValueError(f"its data.pkl has {pickles[0].file_size} bytes")
        names = set()
        for number, (op, arg, _) in enumerate(pickletools.genops(archive.read(pickles[0]))):
            if number == MOST_OPS:
                raise ValueError(f"its data.pkl has more than {MOST_OPS} instructions")
            if op.name == "GLOBAL":
                names.add(today(arg))
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    odd = sorted(name for name in names.difference(foreign) if not harmless(name))
    if odd:
        raise ValueError(f"it uses {odd[0][:80]!r}")
    return foreign


@contextlib.contextmanager
def at_most(more):
    """Raise ValueError, on Linux, before this process takes that many bytes more than it has."""
    if sys.platform != "linux":
        yield
        return
    import resource
    most = process_bytes("VmSize") + more
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    except MemoryError:
        raise ValueError(f"it would take more than {more / 2 ** 30:.1f} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_lightning(path):
    """A checkpoint, a dict, tensors mapped from the file and foreign objects as Inert.

    No code from the file runs, and what it may copy is bounded. Raises ValueError in one line,
    whatever is wrong with it.
    """
    try:
        stand_ins = [(stand_in(name), name) for name in foreign_names(path)]
        limit = at_most(os.path.getsize(path) + MOST_COPIED)  # the file is mapped
        with torch.serialization.safe_globals(stand_ins), limit:
            ckpt = torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as e:  # a foreign file can fail in any way
        if isinstance(e, pickle.UnpicklingError):
            e = e.__context__ or e  # what happened, without torch's advice to trust the file
        reason = "".join(str(e).splitlines()[:1])[:200]
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise ValueError(f"{path} is damaged or no checkpoint: {kind}{reason}") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("state_dict"), dict):
        raise ValueError(f"{path} has no state_dict, so is no Lightning checkpoint: name MDLM's, "
                         "or give --unfold to one of ours")
    return ckpt


# ------------------------------------------------------------------------------------ the network
def layout(config, cond, freq):
    """{name: shape} of MDLM's tensors, in its order; cond and freq: widths of its noise level."""
    V, D = config.vocab_size, config.n_embd
    of_block = {"norm1.weight": (D,), "attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D),
                "norm2.weight": (D,), "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,),
                "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,),
                "adaLN_modulation.weight": (6 * D, cond), "adaLN_modulation.bias": (6 * D,)}
    shapes = {EMBED: (V + 1, D), TIME: (cond, freq), "sigma_map.mlp.0.bias": (cond,),
              "sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,),
              INV_FREQ: (D // config.n_head // 2,)}
    for i in range(config.n_layer):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in of_block.items()}
    return shapes | {"output_layer.norm_final.weight": (D,),
                     "output_layer.linear.weight": (V + 1, D), "output_layer.linear.bias": (V + 1,),
                     "output_layer.adaLN_modulation.weight": (2 * D, cond),
                     "output_layer.adaLN_modulation.bias": (2 * D,)}


def select(state, shadow, raw):
    """The network's own tensors {name: tensor} from a file's, and "averaged" or "raw".

    shadow: `ema.shadow_params`, a list in the order of the parameters, or None. Raises ValueError
    that names a key which belongs to nothing.
    """
    names = {name: str(name).replace("_orig_mod.", "") for name in state}  # of torch.compile
    prefixes = [prefix for prefix in PREFIXES if not (raw and prefix == "student_ema.")]
    prefix = next((p for p in prefixes if p + EMBED in names.values()), None)
    if prefix is None:
        raise ValueError(f"there is no {EMBED!r}")
    mine = {new.removeprefix(prefix): state[old] for old, new in names.items()
            if new.startswith(prefix)}
    for name in names.values():
        if not name.startswith((prefix, *OTHERS)):
            raise ValueError(f"{name[:80]!r} is unknown")
    if len(set(names.values())) < len(names):
        raise ValueError("a name comes twice, with and without '_orig_mod.'")
    if prefix == "student_ema.":
        return mine, "averaged"
    if raw or shadow is None:
        return mine, "raw"
    parameters = [name for name in mine if name != INV_FREQ]
    if not isinstance(shadow, list) or len(shadow) != len(parameters):
        raise ValueError(f"'ema.shadow_params' is not a list of {len(parameters)} tensors")
    return mine | dict(zip(parameters, shadow)), "averaged"


def frequencies(half):
    """(half,) float64: what positions are multiplied with, 10000^(-k/half)."""
    return 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)


def check_tensors(theirs, length):
    """The Config of MDLM's network. ValueError names a key: unknown, missing, shape, NaN, base."""
    try:
        (V, D), (cond, freq), (half,) = (theirs[name].shape for name in (EMBED, TIME, INV_FREQ))
    except (AttributeError, KeyError, ValueError):
        raise ValueError(f"{EMBED!r}, {TIME!r} or {INV_FREQ!r} is missing or odd") from None
    blocks = {name.split(".")[1] for name in theirs if name.startswith("blocks.")}
    if min(V - 1, D, cond, freq, half, len(blocks)) < 1 or freq % 2 or D % (2 * half):
        raise ValueError(f"{EMBED!r}, {TIME!r} and {INV_FREQ!r} do not fit each other")
    config = Config(V - 1, length, len(blocks), D // (2 * half), D, framed=True)
    shapes = layout(config, cond, freq)
    for name in theirs:
        if name not in shapes:
            raise ValueError(f"{name[:80]!r} is unknown")
    for name, shape in shapes.items():
        t = theirs.get(name)
        if not isinstance(t, torch.Tensor) or tuple(t.shape) != shape:
            raise ValueError(f"{name!r} is missing or not of shape {shape}")
        dense = t.layout == torch.strided and t.device.type == "cpu" and t.is_contiguous()
        if t.dtype not in DTYPES.values() or not dense:
            raise ValueError(f"{name!r} is {t.dtype}, but may be {', '.join(DTYPES)}, and dense")
        if not t.isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinity")
    inv_freq = theirs[INV_FREQ]
    off = (inv_freq.double() / frequencies(half) - 1).abs().max()
    if off > max(1e-5, 2 * torch.finfo(inv_freq.dtype).eps):
        raise ValueError(f"{INV_FREQ!r} is not of base 10000: positions would mean another thing")
    return config


def condition(theirs, sigma):
    """(cond,) float64: MDLM's embedding of the noise level sigma, which each adaLN reads."""
    angle = sigma * frequencies(theirs[TIME].shape[1] // 2)
    c = torch.cat((angle.cos(), angle.sin()))
    for layer in ("sigma_map.mlp.0", "sigma_map.mlp.2"):
        weight, bias = theirs[f"{layer}.weight"].double(), theirs[f"{layer}.bias"].double()
        c = F.silu(weight @ c + bias)
    return c


@torch.no_grad()
def fold(theirs, sigma=0.0):
    """MDLM's tensors -> those of our Denoiser, {name: float64}: the same function, exactly.

    MDLM computes norm(x) * (1 + scale) + shift, and x + gate * f(x), where scale, shift and gate
    are linear in `condition`; it is called with sigma = 0 at all times.
    """
    c, parts = condition(theirs, sigma), {}

    def wide(name):
        return theirs[name].double()

    def modulation(layer, n):
        adaLN = f"{layer}.adaLN_modulation"
        return (wide(f"{adaLN}.weight") @ c + wide(f"{adaLN}.bias")).view(n, -1)

    for name in theirs:
        if name.endswith(".attn_qkv.weight"):
            at = name.removesuffix(".attn_qkv.weight")
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(at, 6)  # (D,) each
            parts |= {f"{at}.norm1.weight": wide(f"{at}.norm1.weight") * (1 + scale1),
                      f"{at}.norm1.bias": shift1,
                      f"{at}.qkv.weight": wide(name),
                      f"{at}.proj.weight": gate1[:, None] * wide(f"{at}.attn_out.weight"),
                      f"{at}.norm2.weight": wide(f"{at}.norm2.weight") * (1 + scale2),
                      f"{at}.norm2.bias": shift2,
                      f"{at}.up.weight": wide(f"{at}.mlp.0.weight"),
                      f"{at}.up.bias": wide(f"{at}.mlp.0.bias"),
                      f"{at}.down.weight": gate2[:, None] * wide(f"{at}.mlp.2.weight"),
                      f"{at}.down.bias": gate2 * wide(f"{at}.mlp.2.bias")}
    shift, scale = modulation("output_layer", 2)
    return parts | {"embed.weight": wide(EMBED),
                    "norm.weight": wide("output_layer.norm_final.weight") * (1 + scale),
                    "norm.bias": shift,
                    "out.weight": wide("output_layer.linear.weight")[:-1],  # the last: the mask
                    "out.bias": wide("output_layer.linear.bias")[:-1]}


def unfold(net):
    """Our Denoiser of packed text -> MDLM's tensors {name: float32}: the inverse of `fold`.

    adaLN becomes constant: scale 0, gate 1, shift our bias. The mask, which SUBS forbids, has a
    logit of 0. Raises ValueError for a model of short texts.
    """
    ours, config = net.state_dict(), net.config
    if config.pads:
        raise ValueError("this model writes texts of many lengths, each filled up with pads, which "
                         "MDLM does not know: unfold a model of packed text")
    theirs = {name: torch.zeros(shape) for name, shape in layout(config, 128, 256).items()}
    theirs[INV_FREQ] = frequencies(len(theirs[INV_FREQ])).float()
    names = {EMBED: "embed.weight", "output_layer.norm_final.weight": "norm.weight"}
    for i in range(config.n_layer):
        of_block = {"norm1.weight": "norm1.weight", "attn_qkv.weight": "qkv.weight",
                    "attn_out.weight": "proj.weight", "norm2.weight": "norm2.weight",
                    "mlp.0.weight": "up.weight", "mlp.0.bias": "up.bias",
                    "mlp.2.weight": "down.weight", "mlp.2.bias": "down.bias"}
        names |= {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in of_block.items()}
        zero, one = torch.zeros(config.n_embd), torch.ones(config.n_embd)
        shift1, shift2 = ours[f"blocks.{i}.norm1.bias"], ours[f"blocks.{i}.norm2.bias"]
        modulation = torch.cat((shift1, zero, one, shift2, zero, one))
        theirs[f"blocks.{i}.adaLN_modulation.bias"] = modulation
    theirs |= {a: ours[b] for a, b in names.items()}
    theirs["output_layer.linear.weight"][:-1] = ours["out.weight"]
    theirs["output_layer.linear.bias"][:-1] = ours["out.bias"]
    theirs["output_layer.adaLN_modulation.bias"][:config.n_embd] = ours["norm.bias"]
    return theirs


def denoiser(ours, config):
    """A Denoiser with these weights, {name: float64}, rounded once; ValueError if it overflows."""
    net = Denoiser(config)
    net.load_state_dict({"lengths": net.lengths} | ours)
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"{name!r} is too large for float32 once adaLN is folded into it")
    return net.eval()


# ---------------------------------------------------------------------------------------- commands
def length_beside(path):
    """L: "model_length" or "length" of a config.json beside the file, else MDLM's 1024.

    Raises ValueError if it says that the network is told the noise level, which ours is not.
    """
    beside, found = os.path.join(os.path.dirname(path), "config.json"), {}
    if not os.path.exists(beside):
        return PUBLISHED.length
    try:
        with open(beside, encoding="utf-8") as f:
            nodes = [json.loads(f.read(MOST_CONFIG))]
    except (ValueError, RecursionError):
        raise ValueError(f"{beside} is no JSON: mend it or take it away") from None
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            nodes += node.values()
            if node.get("time_conditioning", False) is not False:
                raise ValueError(f"{beside} has time_conditioning true: such a network is told the "
                                 "noise level, ours is not, so it cannot be folded")
            found = node | found
    length = found.get("model_length", found.get("length", PUBLISHED.length))
    if type(length) is not int or not 1 <= length <= MOST_LENGTH:
        raise ValueError(f"{beside} has a length that is no number from 1 to {MOST_LENGTH}")
    return length


def read(path, raw=False):
    """MDLM's tensors {name: tensor} in a file, their Config, and which weights they are, a text.

    Raises ValueError in one line that names the file, and the key that is wrong.
    """
    length = length_beside(path)
    if not os.path.exists(path):
        raise ValueError(f"{path} is not there: MDLM's is {ADDRESS}")
    with open(path, "rb") as f:
        lightning = f.read(4) == b"PK\3\4"  # a zip
    if raw and not lightning:
        raise ValueError(f"{path}: leave out --raw, a .safetensors file has one set of weights")
    shadow = None
    if lightning:
        ckpt = read_lightning(path)
        state, average = ckpt["state_dict"], ckpt.get("ema")
        if isinstance(average, dict):
            shadow = average.get("shadow_params")
    else:
        state = read_safetensors(path)
    try:
        theirs, which = select(state, shadow, raw)
        config = check_tensors(theirs, length)
        if sum(t.nbytes for t in theirs.values()) > os.path.getsize(path):
            raise ValueError("its tensors have more bytes than the file, so some are the same")
    except ValueError as e:
        raise ValueError(f"{path} is not MDLM's network: {e}") from None
    if not lightning:
        which = "the file's"
    return theirs, config, which


def fingerprint(path):
    """What the file's sha256 tells, a text."""
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found == SHA256:
        return f"sha256 {found}: the published file"
    return f"sha256 {found}: not the file kuleshov-group/mdlm-owt/model.safetensors"


@torch.no_grad()
def known_answers(net):
    """The largest difference, nats, from the logits that others have of the published weights; NaN
    if the network computes it."""
    off = []
    for ids, answers in ANSWERS:
        z = torch.tensor([ids])
        logits = net(z, z == PUBLISHED.mask_id)[0]  # (V,)
        off += [abs(logits[i].item() - value) for i, value in answers.items()]
    return torch.tensor(off).max().item()  # NaN if one is, unlike Python's max


def verdict(net):
    """In words, whether these are the weights that everybody has."""
    if net.config != PUBLISHED:
        return "known answers: none, for this is not the shape of MDLM's 169 M network"
    off = known_answers(net)
    if not off <= 1e-3:  # so neither NaN
        return f"known answers are off by {off:.2g}: these are not the published weights"
    bound = max(1e-4, 10.0 ** math.ceil(math.log10(max(off, 1e-9))))
    return f"known answers within {bound:.0e}: these are the published weights"


def import_teacher(args):
    """Read, fold, check, and write our checkpoint."""
    theirs, config, which = read(args.file, args.raw)
    if config.vocab_size not in TOKENIZERS:
        raise ValueError(f"{args.file} has {config.vocab_size} tokens, and no tokenizer here has "
                         f"so many: {TOKENIZERS}")
    net = denoiser(fold(theirs), config)
    print(f"{args.file}: {config.n_layer} blocks of {config.n_embd}, {config.n_head} heads, "
          f"V {config.vocab_size}, L {config.length}; {which} weights")
    print(fingerprint(args.file))
    print(verdict(net))
    half = theirs[TIME].shape[1] // 2
    if theirs[TIME][:, half:].abs().max() > (2 * half) ** -0.5:  # PyTorch's first values are below
        print(f"warning: {TIME!r} has learnt from sines, which are 0 at the noise level 0: this "
              "network was told the noise level, as SEDD's are, and will not work here")
    save_checkpoint(args.out, {"model": net, "ema": net}, kind="teacher", config=asdict(config),
                    tokenizer=TOKENIZERS[config.vocab_size], flags=vars(args), step=0, seconds=0.0)
    print(f"wrote {args.out}: distil it with python distill.py --teacher {args.out}, on a corpus "
          f"made with --framed, {args.data}")


def export(args):
    """Write a checkpoint of ours as MDLM's model.safetensors, and its config.json beside it."""
    if args.raw:
        raise ValueError("--raw is for a file of Lightning's: leave it out with --unfold")
    ckpt, net = load_checkpoint(args.file, ("student", "teacher"))
    theirs, config = unfold(net), net.config
    about = {"architectures": ["MDLM"],  # as published: 489 bytes with "_name_or_path"
             "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig",
                          "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
             "cond_dim": 128, "dropout": 0.1, "hidden_dim": config.n_embd,
             "model_length": config.length, "model_type": "mdlm", "n_blocks": config.n_layer,
             "n_heads": config.n_head, "return_dict": False, "time_conditioning": False,
             "torch_dtype": "float32", "transformers_version": "4.38.2",
             "vocab_size": config.vocab_size + 1}
    folder = os.path.dirname(os.path.abspath(args.unfold))
    beside = os.path.join(folder, "config.json")
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(beside):
        with open(beside, encoding="utf-8") as f:
            if f.read(MOST_CONFIG) != json.dumps(about, indent=1):
                raise ValueError(f"{beside} is there already and says another thing: name a file "
                                 "in another folder with --unfold")
    write_safetensors(args.unfold, {f"backbone.{name}": t for name, t in theirs.items()})
    write_json(beside, about)
    print(f"wrote {args.unfold} and {beside}, the averaged weights of a {ckpt['kind']}; put MDLM's "
          "configuration_mdlm.py and modeling_mdlm.py beside them for transformers")


def main(argv=None):
    p, add = make_parser("Import MDLM's weights, or write ours as MDLM's.")
    add("file", help="model.safetensors or mdlm.ckpt of MDLM; with --unfold a checkpoint of ours")
    add("--raw", action="store_true", help="of a .ckpt the bare weights, not their average (EMA)")
    add("--data", default="out/openwebtext", help="corpus to distil on, made with --framed")
    add("--out", default="out/teacher.pt", help="checkpoint to write")
    add("--unfold", metavar="FILE", help="write the model there as .safetensors of MDLM instead")
    p.set_defaults(seed=0)  # as every checkpoint has
    args = p.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.unfold is None:
        files.check_output(args.out, args.file, args.data)
        import_teacher(args)
    else:
        files.check_output(args.unfold, args.file)
        export(args)


if __name__ == "__main__":
    run_script(main)

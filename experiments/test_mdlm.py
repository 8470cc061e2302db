"""test_mdlm.py - MDLM's network by its own formulas against ours; hostile files; there and back.

The published weights (679 MB) are not here: MDLM_WEIGHTS=model.safetensors tests them, too.
"""
import _codecs
import collections
import contextlib
import copy
import hashlib
import json
import math
import os
import pickletools
import random
import sys
import tracemalloc
import types
import typing
import zipfile

import pytest
import torch
import torch.nn.functional as F

import distill
import model
from data import corpus, memory
from experiments import mdlm, sdtt
from experiments.test_runs import outcome, refused

torch.set_num_threads(1)
V, D, L, H, BLOCKS, COND, FREQ = 97, 32, 24, 2, 2, 16, 32
WEIGHTS = os.environ.get("MDLM_WEIGHTS")
TINY = ["--device", "cpu", "--groups", "2", "--G", "2", "--disc_warmup", "1", "--disc_blocks", "1",
        "--updates", "1", "--eval_every", "9"]


# -------------------------------------------------------------- MDLM, written from its description
def tensors(V=V, seed=0):
    """A random state of MDLM's form, float32: what adaLN adds is as large as the rest."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.0):
        return torch.randn(shape, generator=g) * (std or shape[-1] ** -0.5)

    state = {"vocab_embed.embedding": draw(V + 1, D, std=1.0),
             "sigma_map.mlp.0.weight": torch.rand((COND, FREQ), generator=g) * FREQ ** -0.5,
             "sigma_map.mlp.0.bias": draw(COND, std=1.0),
             "sigma_map.mlp.2.weight": draw(COND, COND),
             "sigma_map.mlp.2.bias": draw(COND, std=1.0),
             "rotary_emb.inv_freq": 1 / 10000 ** (torch.arange(0, D // H, 2) / (D // H))}
    for i in range(BLOCKS):
        block = {"norm1.weight": 1 + draw(D), "attn_qkv.weight": draw(3 * D, D, std=0.4),
                 "attn_out.weight": draw(D, D), "norm2.weight": 1 + draw(D),
                 "mlp.0.weight": draw(4 * D, D), "mlp.0.bias": draw(4 * D),
                 "mlp.2.weight": draw(D, 4 * D), "mlp.2.bias": draw(D, std=1.0),
                 "adaLN_modulation.weight": draw(6 * D, COND),
                 "adaLN_modulation.bias": draw(6 * D, std=1.0)}
        state |= {f"blocks.{i}.{name}": t for name, t in block.items()}
    head = {"norm_final.weight": 1 + draw(D), "linear.weight": draw(V + 1, D),
            "linear.bias": draw(V + 1, std=1.0), "adaLN_modulation.weight": draw(2 * D, COND),
            "adaLN_modulation.bias": draw(2 * D, std=1.0)}
    return state | {f"output_layer.{name}": t for name, t in head.items()}


def turn(x):
    """Rotary positions of x (B, H, L, d), half against half, as complex numbers."""
    d = x.shape[-1]
    f = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * f
    y = torch.complex(x[..., :d // 2], x[..., d // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((y.real, y.imag), -1)


def reference(state, z, sigma=0.0, without=""):
    """Logits (B, L, V + 1) by MDLM's formulas, in float64, or `without` one of them."""
    w = {name: t.double() for name, t in state.items()}
    k = torch.arange(FREQ // 2, dtype=torch.float64)
    angle = sigma * torch.exp(-math.log(10000) * k / (FREQ // 2))
    c = torch.cat([angle.cos(), angle.sin()])
    c = F.silu(F.linear(c, w["sigma_map.mlp.0.weight"], w["sigma_map.mlp.0.bias"]))
    c = F.silu(F.linear(c, w["sigma_map.mlp.2.weight"], w["sigma_map.mlp.2.bias"]))

    def adaLN(at, n):
        m = F.linear(c, w[f"{at}adaLN_modulation.weight"], w[f"{at}adaLN_modulation.bias"])
        m = dict(zip(("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"), m.chunk(n)))
        plain = {"shift": torch.zeros(D), "scale": torch.zeros(D), "gate": torch.ones(D)}
        return [plain[name[:-1]] if name[:-1] == without else part for name, part in m.items()]

    def norm(x, weight, shift, scale):
        return F.layer_norm(x, [D]) * w[weight] * (1 + scale) + shift

    x = w["vocab_embed.embedding"][z]
    for i in range(BLOCKS):
        at = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN(at, 6)
        h = norm(x, f"{at}norm1.weight", shift1, scale1) @ w[f"{at}attn_qkv.weight"].T
        q, k, v = h.view(*z.shape, 3, H, D // H).permute(2, 0, 3, 1, 4)
        if without != "rotary":
            q, k = turn(q), turn(k)
        h = (q @ k.mT / math.sqrt(D // H)).softmax(-1) @ v
        x = x + gate1 * (h.transpose(1, 2).flatten(2) @ w[f"{at}attn_out.weight"].T)
        h = norm(x, f"{at}norm2.weight", shift2, scale2)
        h = F.gelu(F.linear(h, w[f"{at}mlp.0.weight"], w[f"{at}mlp.0.bias"]),
                   approximate={"gelu": "none"}.get(without, "tanh"))
        x = x + gate2 * F.linear(h, w[f"{at}mlp.2.weight"], w[f"{at}mlp.2.bias"])
    h = norm(x, "output_layer.norm_final.weight", *adaLN("output_layer.", 2))
    logits = h @ w["output_layer.linear.weight"].T
    if without != "bias":
        logits = logits + w["output_layer.linear.bias"]
    return logits


def states(V=V, n=8):
    """z (n, L): random tokens, a share of them, from few to all, masked."""
    g = torch.Generator().manual_seed(1)
    z = torch.randint(V, (n, L), generator=g)
    rates = torch.linspace(0.15, 1.01, n)[:, None]
    return z.masked_fill(torch.rand((n, L), generator=g) < rates, V)


def config(V=V):
    return model.Config(V, L, BLOCKS, H, D, framed=True)


def wide(state, monkeypatch, sigma=0.0):
    """Our Denoiser in float64 throughout, its attention and cosines, too."""
    double = types.SimpleNamespace(**vars(torch) | {"float32": torch.float64})
    monkeypatch.setattr(model, "torch", double)
    net = model.Denoiser(config()).double()
    net.load_state_dict({"lengths": net.lengths} | mdlm.fold(state, sigma))
    half = D // H // 2
    angle = torch.outer(torch.arange(L), 1e4 ** (-torch.arange(half, dtype=torch.float64) / half))
    net.cos, net.sin = angle.cos(), angle.sin()
    return net.requires_grad_(False)


def difference(net, state, sigma=0.0, without=""):
    """max |d log p| at masks, MDLM's with what `without` leaves out."""
    z = states()
    logits = reference(state, z, sigma, without)[z == V]  # (n, V + 1)
    logits[:, V] -= 1e6  # SUBS: a text has no mask
    log_p = net(z, z == V).log_softmax(-1)  # (n, V)
    return (log_p - logits.log_softmax(-1)[:, :V]).abs().max().item()


def test_the_folded_network_is_mdlm_exactly_and_rounded_once(monkeypatch):
    state = tensors()
    net = mdlm.denoiser(mdlm.fold(state), mdlm.check_tensors(state, L)).requires_grad_(False)
    assert net.config == config() and net.lengths.tolist() == [0.0] * L + [1.0]
    assert difference(net, state) < 1e-4
    for name, value in mdlm.fold(state).items():
        assert torch.equal(net.state_dict()[name], value.float())
    for sigma in (0.0, 0.7, 6.9):  # one level of DiDi's own sampler is another fold
        assert difference(wide(state, monkeypatch, sigma), state, sigma) < 1e-12


@pytest.mark.parametrize("without", ["gelu", "bias", "shift", "scale", "gate", "rotary"])
def test_each_part_of_mdlm_is_seen(without):
    state = tensors()
    net = mdlm.denoiser(mdlm.fold(state), config()).requires_grad_(False)
    assert difference(net, state, without=without) > 1e-3


def test_another_noise_level_is_seen():
    state = tensors()
    net = mdlm.denoiser(mdlm.fold(state), config()).requires_grad_(False)
    assert difference(net, state, sigma=1.0) > 1e-2


def test_there_and_back_is_the_same_network():
    net = mdlm.denoiser(mdlm.fold(tensors()), config())
    back = mdlm.unfold(net)
    shapes = {name: tuple(t.shape) for name, t in back.items()}
    assert shapes == mdlm.layout(config(), 128, 256)
    ours = mdlm.fold(back)
    assert ours.keys() | {"lengths"} == net.state_dict().keys()
    for name, value in ours.items():
        assert torch.equal(value, net.state_dict()[name].double()), name


def test_the_layout_at_full_size_is_the_published_one():
    shapes = mdlm.layout(mdlm.PUBLISHED, 128, 256)
    assert len(shapes) == 131 and sum(map(math.prod, shapes.values())) == 169_627_218 + 32
    assert [*tensors()] == [*mdlm.layout(config(), COND, FREQ)]  # the order of the parameters


def test_short_texts_have_no_place_in_mdlm():
    with pytest.raises(ValueError, match="packed"):
        mdlm.unfold(model.Denoiser(model.Config(V, L, 1, 2, 8, pads=True)))


# ------------------------------------------------------------------------------------------- files
def pack(header, data=b"", n=None):
    """The bytes of a .safetensors file; header: a dict, or its text; n: its size as it says."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return (len(header) if n is None else n).to_bytes(8, "little") + header + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def hf(state, prefix="backbone."):
    return {prefix + name: t for name, t in state.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder with MDLM's config.json, of a shorter length, in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_length": L}))
    return tmp_path


A, B = entry(), entry(8, 16)
BAD = {"empty": b"", "seven bytes": b"1234567", "no header": pack({}, n=10 ** 12),
       "too long for the file": pack({"a": A}, bytes(8), n=10 ** 4),
       "2^64 - 1": b"\xff" * 8 + b"{}", "no JSON": pack(b"hello"), "a list": pack([]),
       "a number": pack(b"1" * 5000), "deep": pack(b"[" * 200_000),
       "utf-16": pack(b"\xff\xfe{\0}\0"),
       "surrogates": pack(b'{"\xed\xa0\x80": 1}'), "metadata": pack({"__metadata__": {"a": 1}}),
       "duplicate": pack(b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), bytes(8)),
       "duplicate key": pack(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
       "entry": pack({"a": 1}), "keys": pack({"a": A | {"b": 1}}, bytes(8)),
       "F64": pack({"a": entry(dtype="F64", shape=[1])}, bytes(8)),
       "I32": pack({"a": entry(dtype="I32")}, bytes(8)),
       "dtype list": pack({"a": entry(dtype=["F32"])}, bytes(8)),
       "negative": pack({"a": entry(-8, 0)}, bytes(8)),
       "true": pack({"a": entry(0, 4, [True])}, bytes(4)),
       "float": pack({"a": entry(0, 4, [1.0])}, bytes(4)),
       "NaN": pack(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
       "nine dimensions": pack({"a": entry(0, 4, [1] * 9)}, bytes(4)),
       "three offsets": pack({"a": A | {"data_offsets": [0, 4, 8]}}, bytes(8)),
       "huge shape": pack({"a": entry(0, 8, [2 ** 31] * 8)}, bytes(8)),
       "huge beside 0": pack({"a": entry(0, 0, [2 ** 63 - 1, 0])}),
       "product of them": pack({"a": entry(0, 0, [2 ** 33, 2 ** 33, 0])}),
       "huge": pack({"a": entry(0, 2 ** 60, [2 ** 58])}, bytes(8)),
       "shape": pack({"a": entry(shape=[3])}, bytes(8)), "cut": pack({"a": A}, bytes(7)),
       "tail": pack({"a": A}, bytes(9)), "hole": pack({"a": A, "b": entry(12, 20)}, bytes(20)),
       "overlap": pack({"a": A, "b": entry(4, 12)}, bytes(12)),
       "late": pack({"a": entry(4, 12)}, bytes(12)), "same": pack({"a": A, "b": A}, bytes(8))}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line_and_nothing_is_allocated(content, folder, monkeypatch):
    (folder / "bad.safetensors").write_bytes(content)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="^bad.safetensors is damaged or no .saf.*: ") as e:
            mdlm.read_safetensors("bad.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300


def test_errors_name_the_tensor_and_a_good_file_is_read():
    for header, word in (({"a\nb": A, "x": A}, "'x'"), ({"a\nb": entry(shape=[3])}, r"'a\\nb'"),
                         ({"w": entry(dtype="I64")}, "'w' is of type 'I64'")):
        open("a.safetensors", "wb").write(pack(header, bytes(8)))
        with pytest.raises(ValueError, match=word):
            mdlm.read_safetensors("a.safetensors")
    parts = {"h": torch.randn(3).half(), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5),
             "b": torch.randn(2, 3).bfloat16(), "f": torch.randn(1, 5)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in parts.items():
        raw = t.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[t.dtype]
        header[name] = entry(len(data), len(data) + len(raw), [*t.shape], dtype)
        data += raw
    for spaces in range(8):  # a header of odd length misaligns the data
        open("a.safetensors", "wb").write(pack(json.dumps(header).encode() + b" " * spaces, data))
        found = mdlm.read_safetensors("a.safetensors")
        assert found.keys() == parts.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t)
                   for name, t in parts.items())


def spoil(content, rng, ends):
    """These bytes, cut, or with some of the first or last `ends` changed."""
    content = bytearray(content)
    if rng.random() < 0.2:
        return content[:rng.randrange(len(content))]
    for _ in range(rng.choice((1, 1, 3))):
        content[rng.choice((1, -1)) * rng.randrange(1, ends)] = rng.randrange(256)
    return content


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_thousand_damaged_files_are_read_or_refused_in_one_line(kind, folder):
    rng, refusals = random.Random(0), 0
    if kind == "ckpt":
        save_lightning("good")
    else:
        mdlm.write_safetensors("good", hf(tensors()))
    content = (folder / "good").read_bytes()
    for _ in range(500):
        (folder / "bad").write_bytes(spoil(content, rng, 4000))
        try:
            assert len(mdlm.read("bad")[0]) == len(tensors())
        except ValueError as e:
            assert len(str(e).splitlines()) == 1 and "bad" in str(e) and len(str(e)) < 400
            refusals += 1
    assert refusals > 200


def changed(name, t):
    """A state of MDLM's, with this tensor or, if None, without it."""
    state = tensors() | {name: t}
    return {key: value for key, value in state.items() if value is not None}


ZERO = torch.zeros(1)
QKV = "blocks.1.attn_qkv.weight"
WRONG = [(QKV, None), (QKV, torch.zeros(3 * D, D + 1)), (QKV, torch.zeros(D, D)), (QKV, ZERO),
         (QKV, torch.full((3 * D, D), math.nan)), (QKV, torch.full((3 * D, D), math.inf)),
         ("blocks.1.attn_qkv.bias", ZERO), ("blocks.2.norm1.weight", ZERO), ("blocks", ZERO),
         ("blocks.x.norm1.weight", ZERO), ("sampling_eps_min", ZERO), ("noise.sigma_max", ZERO),
         ("vocab_embed.embedding", None), ("vocab_embed.embedding", torch.zeros(0, D)),
         ("sigma_map.mlp.0.weight", torch.zeros(COND, FREQ + 1)),
         ("sigma_map.mlp.0.weight", None), ("rotary_emb.inv_freq", None),
         ("rotary_emb.inv_freq", torch.ones(5)), ("rotary_emb.inv_freq", torch.zeros(0)),
         ("rotary_emb.inv_freq", 1 / 10001 ** (torch.arange(0, 16, 2) / 16)),
         ("rotary_emb.inv_freq", 1 / 500000 ** (torch.arange(0, 16, 2) / 16))]


@pytest.mark.parametrize("name, t", WRONG, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_another_network_is_refused_by_the_key(name, t, prefix):
    mdlm.write_safetensors("a.safetensors", hf(changed(name, t), prefix))
    with pytest.raises(ValueError, match="^a.safetensors is not MDLM's network: ") as e:
        mdlm.read("a.safetensors")
    start = ".".join(name.split(".")[:3])  # too many blocks are told by the first that lacks a part
    assert start in str(e.value) and len(str(e.value).splitlines()) == 1


def test_prefixes_of_all_publishers_and_what_is_beside():
    state = tensors()
    beside = {"discriminator.blocks.0.x_orig": ZERO, "reward_baseline": ZERO}
    for prefix in ("", "backbone.", "backbone.backbone.", "student_ema.", "backbone._orig_mod.",
                   "_orig_mod.backbone."):
        content = hf(state, prefix)
        if prefix:
            content |= beside
        mdlm.write_safetensors("a.safetensors", content)
        found, shape, _ = mdlm.read("a.safetensors")
        assert shape == config() and all(torch.equal(found[name], state[name]) for name in state)
    mdlm.write_safetensors("a.safetensors", hf(state) | {"other.weight": ZERO})
    with pytest.raises(ValueError, match="'other.weight' is unknown"):
        mdlm.read("a.safetensors")
    both = hf(state) | {"backbone._orig_mod.vocab_embed.embedding": ZERO}
    mdlm.write_safetensors("a.safetensors", both)
    with pytest.raises(ValueError, match="twice"):
        mdlm.read("a.safetensors")
    with pytest.raises(ValueError, match="--raw"):
        mdlm.read("a.safetensors", raw=True)


@pytest.mark.parametrize("text, word", [
    ('{"time_conditioning": true}', "time_conditioning"), ("[", "no JSON"), ("[" * 10 ** 5, "JSON"),
    ('{"config": {"algo": {"time_conditioning": "yes"}}}', "time_conditioning"),
    ('{"model_length": 0}', "length"), ('{"model_length": true}', "length"),
    ('{"model_length": 1e9}', "length")])
def test_a_config_beside_that_does_not_fit_is_refused(text, word, folder):
    mdlm.write_safetensors("a.safetensors", hf(tensors()))
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=word) as e:
        mdlm.read("a.safetensors")
    assert "config.json" in str(e.value) and len(str(e.value).splitlines()) == 1


def test_length_is_of_the_config_beside_or_mdlms(folder):
    nested = {"config": {"model": {"length": 48}, "algo": {"time_conditioning": False}}}
    (folder / "config.json").write_text(json.dumps(nested))
    assert mdlm.length_beside("a.safetensors") == 48
    (folder / "config.json").unlink()
    assert mdlm.length_beside("a.safetensors") == 1024


# --------------------------------------------------------------------------------------- Lightning
def save_lightning(path, **more):
    """What Lightning writes: weights of seed 0, an average without names, foreign objects."""
    foreign = types.ModuleType("foreign")
    exec("class Node:\n def __init__(self, x): self.x = x\n"
         " def __reduce__(self): return Node, (self.x,), {'y': [self.x]}", vars(foreign))
    sys.modules["foreign"] = foreign
    average = tensors(seed=2).items()
    shadow = [t for name, t in average if name != "rotary_emb.inv_freq"]
    content = {"state_dict": collections.OrderedDict(hf(tensors())), "epoch": 3,
               "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow},
               "hyper_parameters": {"config": foreign.Node(b"bytes"), "node": foreign.Node,
                                    "types": [dict, int, typing.Any, torch.float32, range(3)]},
               "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(9)}}}]} | more
    torch.save(content, path)
    del sys.modules["foreign"]


def same(found, state):
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_a_lightning_checkpoint_gives_its_average_or_with_raw_its_weights():
    save_lightning("a.ckpt")
    average, shape, which = mdlm.read("a.ckpt")
    assert same(average, tensors(seed=2)) and shape == config() and which == "averaged"
    raw, _, which = mdlm.read("a.ckpt", raw=True)
    assert same(raw, tensors()) and which == "raw"
    save_lightning("a.ckpt", ema=None)
    assert same(mdlm.read("a.ckpt")[0], tensors()) and mdlm.read("a.ckpt")[2] == "raw"
    both = hf(tensors()) | hf(tensors(seed=5), "student_ema.")
    save_lightning("a.ckpt", state_dict=both)  # DiDi-Instruct's
    assert same(mdlm.read("a.ckpt")[0], tensors(seed=5)) and mdlm.read("a.ckpt")[2] == "averaged"
    assert same(mdlm.read("a.ckpt", raw=True)[0], tensors())


def test_a_checkpoint_made_with_hydra_is_read_and_what_cannot_be_is_named():
    cache = collections.defaultdict(dict, {"now": {"%Y.%m.%d": "2024.06.01"}})  # OmegaConf keeps it
    save_lightning("a.ckpt", cache=cache)
    assert same(mdlm.read("a.ckpt", raw=True)[0], tensors())
    save_lightning("a.ckpt", queue=collections.deque([1, 2]))
    with pytest.raises(ValueError, match="^a.ckpt is damaged or no .*collections.deque"):
        mdlm.read("a.ckpt")


def test_averages_that_do_not_fit_are_refused():
    good = [t for name, t in tensors().items() if name != "rotary_emb.inv_freq"]
    for shadow in (good[1:], good[::-1], [*good, ZERO], 7, {}, [None] * len(good)):
        save_lightning("a.ckpt", ema={"shadow_params": shadow})
        with pytest.raises(ValueError, match="^a.ckpt is not MDLM's network: '") as e:
            mdlm.read("a.ckpt")
        assert len(str(e.value).splitlines()) == 1


class Evil:
    """Unpickling this calls a function."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


MAKE = "__import__('os').mkdir('executed')"


@pytest.mark.parametrize("evil", [
    Evil(eval, MAKE), Evil(exec, MAKE), Evil(os.mkdir, "executed"),
    Evil(os.system, "mkdir executed"), Evil(bytearray, 10 ** 13), Evil(torch.Tensor, 10 ** 13),
    Evil(torch.storage.UntypedStorage, 10 ** 13), Evil(__import__, "this")],
    ids=lambda evil: evil.call[0].__name__)
def test_a_hostile_pickle_is_not_executed(evil):
    save_lightning("a.ckpt", evil=evil)
    try:
        assert same(mdlm.read("a.ckpt", raw=True)[0], tensors())
    except ValueError as e:
        assert str(e).startswith("a.ckpt is damaged or no checkpoint")
        assert len(str(e).splitlines()) == 1
    assert not os.path.exists("executed") and "this" not in sys.modules


@pytest.mark.parametrize("small, word", [
    (Evil(bytearray, 10), "bytearray"), (Evil(complex, 1, 2), "complex"),
    (Evil(torch.serialization._get_layout, "torch.strided"), "_get_layout")])
def test_what_takes_memory_is_refused_by_its_name_however_small(small, word):
    save_lightning("a.ckpt", small=small)
    with pytest.raises(ValueError, match=f"it uses '.*{word}'"):
        mdlm.read("a.ckpt")


@pytest.mark.skipif(sys.platform != "linux", reason="only there memory can be bounded")
@pytest.mark.parametrize("copies, argument", [
    ((_codecs.encode,), ("a" * 10 ** 5, "latin1")), ((set, collections.Counter), ([*range(9999)],)),
    ((torch.Size,), ([*range(9999)],))])
def test_many_copies_of_one_thing_are_refused(copies, argument, monkeypatch):
    """Six bytes of a file call a function that torch trusts with a long text or list, again."""
    import resource  # Unix has it
    bound = resource.getrlimit(resource.RLIMIT_AS)
    save_lightning("a.ckpt", few=[Evil(copy, *argument) for copy in copies])
    assert same(mdlm.read("a.ckpt", raw=True)[0], tensors())
    save_lightning("a.ckpt", many=[Evil(copy, *argument) for copy in copies for _ in range(40_000)])
    assert os.path.getsize("a.ckpt") < 3e6
    monkeypatch.setattr(mdlm, "MOST_COPIED", 2 ** 26)
    with pytest.raises(ValueError, match="^a.ckpt .* would take more than 0.1 GiB of memory$"):
        mdlm.read("a.ckpt")
    assert resource.getrlimit(resource.RLIMIT_AS) == bound


@pytest.mark.parametrize("most, word", [("MOST_PICKLE", "bytes"), ("MOST_OPS", "instructions")])
def test_a_checkpoint_of_too_much_is_refused(most, word, monkeypatch):
    save_lightning("a.ckpt")
    with zipfile.ZipFile("a.ckpt") as z:
        pickled = z.read(next(name for name in z.namelist() if name.endswith("/data.pkl")))
    count = {"bytes": len(pickled), "instructions": sum(1 for _ in pickletools.genops(pickled))}
    monkeypatch.setattr(mdlm, most, count[word])
    mdlm.read("a.ckpt")
    monkeypatch.setattr(mdlm, most, count[word] - 1)
    with pytest.raises(ValueError, match=f"its data.pkl has .*{word}"):
        mdlm.read("a.ckpt")


def test_a_header_of_too_much_is_refused(monkeypatch):
    mdlm.write_safetensors("a.safetensors", {"a": torch.ones(2)})
    with open("a.safetensors", "rb") as f:
        n = int.from_bytes(f.read(8), "little")
    for most, good in ((n, True), (n - 1, False)):
        monkeypatch.setattr(mdlm, "MOST_HEADER", most)
        with contextlib.nullcontext() if good else pytest.raises(ValueError, match="cannot have"):
            assert mdlm.read_safetensors("a.safetensors").keys() == {"a"}


def test_zips_that_lie_are_refused(folder):
    save_lightning("good.ckpt")
    with zipfile.ZipFile("good.ckpt") as z:
        files = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile("deflated.ckpt", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
    with zipfile.ZipFile("empty.ckpt", "w"):
        pass
    with zipfile.ZipFile("none.ckpt", "w") as z:
        z.writestr("a/b", "")
    (folder / "hello.ckpt").write_bytes(b"PK\3\4hello")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": [1]}, "odd.ckpt")
    torch.save({"state_dict": {7: 1}}, "seven.ckpt")
    words = {"deflated": "compressed", "empty": "header cannot have",
             "none": "no data.pkl", "hello": "BadZipFile",
             "list": "no state_dict", "odd": "no state_dict", "seven": "there is no 'vocab"}
    for name, word in words.items():
        with pytest.raises(ValueError, match=f"^{name}.ckpt .*{word}") as e:
            mdlm.read(f"{name}.ckpt")
        assert len(str(e.value).splitlines()) == 1


def test_views_of_less_than_they_show_are_not_taken():
    state = hf(tensors())
    large = {"backbone.vocab_embed.embedding": torch.zeros(1).expand(10 ** 6, 10 ** 6)}
    save_lightning("a.ckpt", state_dict=state | large)
    with pytest.raises(ValueError, match="'vocab_embed.embedding' is .* dense"):
        mdlm.read("a.ckpt", raw=True)
    for name, t in tensors().items():  # one tensor under the names of many
        if name.startswith("blocks.0."):
            state |= {f"backbone.blocks.{i}.{name[9:]}": t for i in range(99)}
    save_lightning("a.ckpt", state_dict=state)
    with pytest.raises(ValueError, match="more bytes than the file"):
        mdlm.read("a.ckpt", raw=True)


# ---------------------------------------------------------------------------------------- commands
def import_teacher():
    """A folder "corpus" that is framed, and a random teacher of MDLM's form in out/teacher.pt."""
    text = [list(f"def f{i}(a, b={i}): return a\n".encode()) for i in range(400)]
    pieces = [("train", sum(text, [])), ("val", sum(text[:50], []))]
    corpus.write("corpus", pieces, "text", "bytes", 0, {}, framed=True)
    mdlm.write_safetensors("a.safetensors", hf(tensors(257)))
    mdlm.main(["a.safetensors", "--data", "corpus"])


def test_the_papers_experiment_at_toy_size(monkeypatch, capsys):
    """--paper_scale distils the imported teacher; --resume chooses the parts anew."""
    import_teacher()
    few = ["--device", "cpu", "--no-bf16", "--groups", "2", "--G", "2", "--disc_blocks", "1"]
    # a third less holds .98 MB of weights and .54 of an update of one group, not 1.08 of two
    monkeypatch.setattr(memory, "free", lambda device: 2.9e6)
    assert not distill.main([*few, "--paper_scale", "--updates", "1", "--out", "a.pt"])
    assert capsys.readouterr().out.count("--accumulate 2: ") == 1
    monkeypatch.setattr(memory, "free", lambda device: 1e12)
    assert not distill.main(["--resume", "--updates", "2", "--out", "a.pt"])
    assert capsys.readouterr().out.count("--accumulate 1: ") == 1
    ckpt, student = model.load_checkpoint("a.pt", ("student",))
    assert (ckpt["step"], ckpt["flags"]["accumulate"], ckpt["flags"]["lr"]) == (2, 0, 1e-6)
    teacher = model.load_checkpoint("out/teacher.pt", ("teacher",))[1]
    moved = (student.out.weight - teacher.out.weight).abs().max()  # an average: .001 of each step
    assert 0 < moved < 1e-8


def test_the_imported_teacher_distils_and_goes_back(capsys):
    """python -m experiments.mdlm, distill.py, sdtt.py; the students in MDLM's form are the same."""
    import_teacher()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("a.safetensors: 2 blocks of 32, 2 heads, V 257, L 24; the file's weights")
    assert "not the file" in lines[1] and "none" in lines[2] and "wrote out/teacher.pt" in lines[3]
    ckpt, net = model.load_checkpoint("out/teacher.pt", ("teacher",))
    assert (ckpt["kind"], ckpt["tokenizer"], ckpt["step"]) == ("teacher", "bytes", 0)
    assert ckpt["flags"]["data"] == "corpus" and ckpt["flags"]["seed"] == 0
    nets = distill.networks(distill.parse_flags(["--paper"])[0], net)
    assert all(torch.equal(a, b) for a, b in zip(nets["model"].parameters(), net.parameters()))
    for extra, out in (([], "a.pt"), (["--paper"], "b.pt")):
        assert not distill.main([*TINY, *extra, "--out", out])
    corpus.write("bare", iter([("train", range(90)), ("val", range(90))]), "text", "bytes", 0, {})
    with pytest.raises(ValueError, match="^bare does not fit out/teacher.pt: .* --framed"):
        distill.main([*TINY, "--data", "bare"])
    sdtt.main(["--device", "cpu", "--updates", "4", "--batch", "4", "--out", "c.pt"])
    for i, path in enumerate(("a.pt", "b.pt", "c.pt")):
        student = model.load_checkpoint(path, ("student",))[1]
        mdlm.main([path, "--unfold", f"back{i}/model.safetensors"])
        back, shape, _ = mdlm.read(f"back{i}/model.safetensors")
        again = mdlm.denoiser(mdlm.fold(back), shape)
        z = states(257)
        assert shape == student.config and torch.equal(again(z), student(z))
        assert not torch.equal(student(z), net(z))


def test_unfold_writes_the_config_as_published(folder):
    net = model.Denoiser(model.Config(257, L, 1, 2, 32))
    part = {"config": vars(net.config), "tokenizer": "bytes", "kind": "teacher", "step": 0,
            "flags": {"data": "c", "seed": 0}, "seconds": 0.0}
    model.save_checkpoint("t.pt", {"model": net, "ema": net}, **part)
    mdlm.main(["t.pt", "--unfold", "new/m.safetensors"])
    about = json.loads((folder / "new/config.json").read_text())
    assert about["vocab_size"] == 258 and about["model_length"] == L and about["n_heads"] == 2
    full = about | {"hidden_dim": 768, "n_blocks": 12, "n_heads": 12, "vocab_size": 50258,
                    "model_length": 1024, "_name_or_path": "kuleshov-group/mdlm-owt"}
    assert len(json.dumps(full, indent=2)) + 1 == 489  # as long as the file on the hub
    assert [*mdlm.read_safetensors("new/m.safetensors")][0] == "backbone.vocab_embed.embedding"
    mdlm.main(["t.pt", "--unfold", "new/m.safetensors"])  # again
    with pytest.raises(ValueError, match="config.json is there already"):
        mdlm.main(["t.pt", "--unfold", "m.safetensors"])
    assert not os.path.exists("m.safetensors")


def test_what_the_user_can_mend_is_one_line(capsys):
    mdlm.write_safetensors("a.safetensors", hf(tensors()))
    refused(mdlm.main, ["missing.safetensors"], capsys, "missing.safetensors")
    refused(mdlm.main, ["a.safetensors"], capsys, "97 tokens")
    refused(mdlm.main, ["a.safetensors", "--unfold", "b"], capsys, "no checkpoint")
    refused(mdlm.main, ["a.safetensors", "--unfold", "b", "--raw"], capsys, "leave it out")
    refused(mdlm.main, ["."], capsys, "'.'")
    large = tensors(257)
    large["blocks.0.norm1.weight"] *= 3e38
    mdlm.write_safetensors("a.safetensors", hf({k: v.clamp(-3e38, 3e38) for k, v in large.items()}))
    refused(mdlm.main, ["a.safetensors"], capsys, "too large for float32")
    assert not os.path.exists("out/teacher.pt")


def test_what_is_told_of_the_file_the_answers_and_the_noise_level(monkeypatch, capsys):
    state = tensors(257)
    mdlm.write_safetensors("a.safetensors", hf(state))
    logits = reference(state, torch.tensor([[5, 257, 7]]))[0, 1]
    monkeypatch.setattr(mdlm, "PUBLISHED", config(257))
    monkeypatch.setattr(mdlm, "ANSWERS", (((5, 257, 7), {i: logits[i].item() for i in (1, 2)}),))
    sha256 = hashlib.sha256(open("a.safetensors", "rb").read()).hexdigest()
    monkeypatch.setattr(mdlm, "SHA256", sha256)
    _, out, _ = outcome(mdlm.main, ["a.safetensors"], capsys)
    assert f"sha256 {sha256}: the published file" in out
    assert "known answers within 1e-04: these are the published" in out and "warning" not in out
    other = copy.deepcopy(state)
    other["output_layer.linear.bias"] += 0.01
    other["sigma_map.mlp.0.weight"][3, -1] = 0.2
    mdlm.write_safetensors("a.safetensors", hf(other))
    _, out, _ = outcome(mdlm.main, ["a.safetensors"], capsys)
    assert "known answers are off by 0.01: these are not the published weights" in out
    assert "not the file kuleshov-group" in out and "warning: 'sigma_map.mlp.0.weight'" in out
    state["blocks.0.attn_qkv.weight"][0, 0] = 3e38  # finite, and then the logits are NaN
    mdlm.write_safetensors("a.safetensors", hf(state))
    _, out, _ = outcome(mdlm.main, ["a.safetensors"], capsys)
    assert "known answers are off by nan: these are not the published weights" in out


@pytest.mark.skipif(WEIGHTS is None, reason="MDLM_WEIGHTS names no model.safetensors of MDLM")
def test_known_answers_of_the_published_weights():
    theirs, shape, _ = mdlm.read(WEIGHTS)
    assert shape == mdlm.PUBLISHED
    net = mdlm.denoiser(mdlm.fold(theirs), shape)
    assert mdlm.known_answers(net) < 1e-3
    if WEIGHTS.endswith(".safetensors"):
        assert "the published file" in mdlm.fingerprint(WEIGHTS)

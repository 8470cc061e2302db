"""test_mdlm.py - MDLM's network by its own formulas against ours, and the conversion both ways.

The formulas are those of arXiv 2406.07524 and its code, with adaLN, in float64.
"""
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F

import model
from experiments import mdlm

needs_package = pytest.mark.skipif(not mdlm.safetensors, reason="needs safetensors")
L = 24
D = 32
H = 4
BLOCKS = 2
CONFIG = model.Config(257, L, BLOCKS, H, D, framed=True)
QKV = "blocks.1.attn_qkv.weight"


# -------------------------------------------------------------- MDLM, written from its description
def make_state(V=257):
    """Return random tensors in MDLM's layout, {name: float64}; shifts, scales, gates of order 1."""
    layers = {
        "sigma_map.mlp.0": (128, 256),
        "sigma_map.mlp.2": (128, 128),
        "output_layer.linear": (V + 1, D),
        "output_layer.adaLN_modulation": (2 * D, 128)}
    shapes = {
        "vocab_embed.embedding": (V + 1, D),
        "output_layer.norm_final.weight": (D,)}
    for i in range(BLOCKS):
        layers |= {
            f"blocks.{i}.mlp.0": (4 * D, D),
            f"blocks.{i}.mlp.2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation": (6 * D, 128)}
        shapes |= {
            f"blocks.{i}.norm1.weight": (D,),
            f"blocks.{i}.norm2.weight": (D,),
            f"blocks.{i}.attn_qkv.weight": (3 * D, D),
            f"blocks.{i}.attn_out.weight": (D, D)}
    for name, shape in layers.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    torch.manual_seed(0)
    state = {"rotary_emb.inv_freq": frequencies()}
    for name, shape in shapes.items():
        tensor = torch.randn(shape)
        if len(shape) == 2:
            tensor *= shape[1] ** -0.5
        state[name] = tensor.double()
    return state


def frequencies():
    """Return the angles (D / H / 2,), radians, by which pairs of channels turn per position."""
    pairs = D // H // 2
    return torch.tensor([10000 ** (-k / pairs) for k in range(pairs)], dtype=torch.float64)


def rotate(x):
    """Return x (B, H, L, D / H) with its channels, as complex numbers, turned by position."""
    real, imaginary = x.chunk(2, -1)
    angles = torch.outer(torch.arange(x.shape[2]).double(), frequencies())
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def attend(x, weight):
    """Return all heads' attention (B, L, D) over x (B, L, D); `weight` stacks q, k and v."""
    q, k, v = (x @ weight.T).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
    scores = rotate(q) @ rotate(k).mT / (D // H) ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def predict(state, z):
    """Return MDLM's raw logits (B, L, V + 1) for z (B, L)."""
    def linear(x, layer):
        return F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])

    def norm(x, layer, scale, shift):
        return F.layer_norm(x, (D,)) * state[f"{layer}.weight"] * (1 + scale) + shift

    c = torch.cat((torch.ones(128), torch.zeros(128))).double()  # cosines and sines of 0
    c = F.silu(linear(c, "sigma_map.mlp.0"))
    c = F.silu(linear(c, "sigma_map.mlp.2"))

    x = state["vocab_embed.embedding"][z]
    for i in range(BLOCKS):
        adaLN = linear(c, f"blocks.{i}.adaLN_modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN.chunk(6)
        seen = norm(x, f"blocks.{i}.norm1", scale1, shift1)
        seen = attend(seen, state[f"blocks.{i}.attn_qkv.weight"])
        x = x + gate1 * (seen @ state[f"blocks.{i}.attn_out.weight"].T)
        wide = linear(norm(x, f"blocks.{i}.norm2", scale2, shift2), f"blocks.{i}.mlp.0")
        x = x + gate2 * linear(F.gelu(wide, approximate="tanh"), f"blocks.{i}.mlp.2")

    shift, scale = linear(c, "output_layer.adaLN_modulation").chunk(2)
    return linear(norm(x, "output_layer.norm_final", scale, shift), "output_layer.linear")


def compare(net, state):
    """Return the largest difference of log p at masks between our network and MDLM's."""
    rates = torch.linspace(0.25, 1, 4)[:, None]
    z = torch.randint(257, (4, L)).masked_fill(torch.rand(4, L) < rates, 257)

    logits = predict(state, z)[z == 257]
    logits[:, 257] -= 1e6  # SUBS: the mask is never predicted
    theirs = logits.log_softmax(-1)[:, :257]
    return (net(z, z == 257).log_softmax(-1) - theirs).abs().max()


@pytest.fixture
def double(monkeypatch):
    """Make all networks compute in float64, including attention on a CPU."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder with nothing but a config.json of our test network."""
    monkeypatch.chdir(tmp_path)
    describe()


def describe(**changes):
    """Write a config.json of our test network, with these changes."""
    sizes = {"vocab_size": 258, "model_length": L,
             "n_blocks": BLOCKS, "n_heads": H, "hidden_dim": D}
    pathlib.Path("config.json").write_text(json.dumps(sizes | changes))


def load(ours):
    """Return our Denoiser with these tensors."""
    net = model.Denoiser(CONFIG)
    net.load_state_dict(ours | {"lengths": net.lengths})
    return net.requires_grad_(False)


# ------------------------------------------------------------------------------- fold and unfold
def test_the_folded_network_is_mdlms(double):
    state = make_state()

    net = load(mdlm.fold(state, BLOCKS))

    assert compare(net, state) < 1e-12


def test_the_unfolded_network_is_ours(double):
    net = load(mdlm.fold(make_state(), BLOCKS))

    assert compare(net, mdlm.unfold(net)) < 1e-12


def test_the_published_layout_has_its_number_of_parameters():
    config = mdlm.read_config("elsewhere/model.safetensors")

    with torch.device("meta"):
        theirs = mdlm.unfold(model.Denoiser(config))

    assert len(theirs) == 131
    assert sum(tensor.numel() for tensor in theirs.values()) == 169_627_218 + 32


# --------------------------------------------------------------------------------------- commands
def write(state):
    tensors = {f"backbone.{name}": tensor.float() for name, tensor in state.items()}
    mdlm.safetensors.torch.save_file(tensors, "model.safetensors")


@needs_package
def test_the_import_makes_a_teacher():
    state = make_state()
    write(state)

    mdlm.main(["model.safetensors", "--data", "corpus"])

    checkpoint, net = model.load("out/teacher.pt", "teacher")
    assert compare(net, state) < 1e-4
    assert net.config == CONFIG
    assert checkpoint["tokenizer"] == "bytes"
    assert checkpoint["flags"] == {"data": "corpus", "seed": 0}


@needs_package
def test_the_import_rounds_once():
    state = make_state()
    write(state)

    net = mdlm.read("model.safetensors")

    for name, tensor in mdlm.fold(state, BLOCKS).items():
        assert torch.equal(net.state_dict()[name], tensor.float())


@needs_package
def test_a_teacher_unfolds_into_a_file_that_imports_as_the_same():
    write(make_state())
    mdlm.main(["model.safetensors"])

    mdlm.main("out/teacher.pt --unfold new/model.safetensors".split())
    mdlm.main("new/model.safetensors --out again.pt".split())

    first, _ = model.load("out/teacher.pt", "teacher")
    again, _ = model.load("again.pt", "teacher")
    assert f"backbone.{QKV}" in mdlm.safetensors.torch.load_file("new/model.safetensors")
    assert again["config"] == first["config"]
    for name, tensor in first["ema"].items():
        assert torch.equal(again["ema"][name], tensor)


@needs_package
def test_unfold_writes_over_nothing():
    write(make_state())
    mdlm.main(["model.safetensors"])

    with pytest.raises(ValueError, match="already exists"):
        mdlm.main(["out/teacher.pt", "--unfold", "mine.safetensors"])


@needs_package
def test_a_network_of_texts_of_many_lengths_is_not_unfolded(monkeypatch):
    net = model.Denoiser(model.Config(257, L, BLOCKS, H, D, pads=True))
    monkeypatch.setattr(model, "load", lambda *_: ({}, net))

    with pytest.raises(ValueError, match="^out/student.pt writes texts of many lengths"):
        mdlm.main(["out/student.pt", "--unfold", "new/model.safetensors"])


@needs_package
@pytest.mark.parametrize("error, verdict", [
    (0, "known answers within 1e-3: these are the published weights"),
    (0.01, "known answers off by 0.01: these are not the published weights"),
    (torch.nan, "known answers off by nan: these are not the published weights")])
def test_the_known_answers_are_compared(monkeypatch, capsys, error, verdict):
    describe(vocab_size=50258)
    state = make_state(50257)
    write(state)
    logits = predict(state, mdlm.PROMPT)[0, 5, mdlm.TOKENS]
    monkeypatch.setattr(mdlm, "LOGITS", logits + error)

    mdlm.main(["model.safetensors"])

    assert verdict in capsys.readouterr().out


def refuse(match):
    """Check that the import of model.safetensors raises a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as caught:
        mdlm.main(["model.safetensors"])
    assert "\n" not in str(caught.value)


@needs_package
@pytest.mark.parametrize("name, tensor, match", [
    (QKV, torch.zeros(3 * D, D + 1), rf"'{QKV}' has \[96, 33\], not \[96, 32\]"),
    ("blocks.2.norm1.weight", torch.zeros(D), "'blocks.2.norm1.weight' is unknown"),
    ("rotary_emb.inv_freq", torch.ones(D // H // 2), "not of base 10000")])
def test_other_tensors_are_refused_by_name(name, tensor, match):
    write(make_state() | {name: tensor})

    refuse(f"^model.safetensors does not fit .*{match}")


@needs_package
def test_a_vocabulary_without_a_tokenizer_is_refused():
    describe(vocab_size=98)
    write(make_state(97))

    refuse("none of our tokenizers")


@needs_package
def test_a_network_that_knows_the_noise_level_is_refused():
    describe(time_conditioning=True)
    write(make_state())

    refuse("^config.json: .* time_conditioning true")


@needs_package
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_file_is_refused_with_the_address(content):
    pathlib.Path("model.safetensors").write_bytes(content)

    refuse("^model.safetensors cannot be read .*https://huggingface.co/kuleshov-group/mdlm-owt")


@needs_package
def test_a_missing_file_is_refused_with_the_address():
    refuse("^model.safetensors cannot be read .*https://huggingface.co/kuleshov-group/mdlm-owt")


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setattr(mdlm, "safetensors", None)

    refuse("pip install safetensors")

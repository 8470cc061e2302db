"""test_files.py - what the commands are given, read and write: checked, whole, one line if wrong.

Checkpoints and command lines are those of toys, see test_didi.py.
"""
import copy
import math
import os
import zipfile

import numpy as np
import pytest
import torch

import distill
import model
import sample
import train_teacher
from data import command, files
from data.test_data import outcome
from test_didi import DISTIL, HERE, ON_CPU, TEACH, load, tiny, toys  # noqa: F401

BOTH = pytest.mark.parametrize("script, flags", [(train_teacher, TEACH), (distill, DISTIL)])


def refused(main, argv, capsys, word):
    """Exit code 2, nothing on stdout, and one line on stderr, "error: " with this word in it."""
    code, out, err = outcome(main, argv, capsys)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert word in err and err[:-1].isprintable(), err


# ---------------------------------------------------------------------------------- bounds by type
TOO_MUCH = "99999999999999999999"
OUT_OF_BOUNDS = {train_teacher: f"""--batch 1048577, --n_embd 1000000000, --lr 1e308, --lr nan
    --lr 0, --ema 2, --ema -0.1, --seed -1, --minutes inf, --minutes 0, --n_layer 0, --updates 0
    --updates 1.5, --warmup -1, --eval_every {TOO_MUCH}, --size huge, --groups 2, --out=
    --out=a\x1b[31m, --data=x\x7f""", distill: f"""--groups 1000000000, --K {TOO_MUCH}, --K 0, --G 1
    --beta nan nan, --beta 1, --beta 0 1, --ema 2, --smoothing 2, --smoothing .5, --mask_share nan
    --kl -1, --entropy -1, --kl_kind other, --eps 0, --disc_lr inf, --w=1, --teacher=""",
                 sample: """--steps 1000000000, --num 0, --temperature 0, --temperature nan
    --switch 2, --guidance -1, --candidates 0, --length 0, --device=, --out=, --model=\x07"""}


@pytest.mark.parametrize("script, case", [
    (script, case) for script in OUT_OF_BOUNDS
    for case in OUT_OF_BOUNDS[script].replace("\n   ", ",").split(", ")])
def test_what_is_out_of_bounds_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys,
                                                               script, case):
    """In an empty folder: nothing is there to be read, nothing is made."""
    monkeypatch.chdir(tmp_path)
    refused(script.main, case.split(" "), capsys, case.replace("=", " ").split(" ")[0])
    assert os.listdir() == []


def test_a_name_with_a_line_break_is_refused_in_one_line(tmp_path, capsys):
    refused(sample.main, ["--model", f"{tmp_path}/a\nb.pt"], capsys, "nobody sees")
    refused(train_teacher.main, ["--out", "a\u2028b.pt"], capsys, "nobody sees")
    assert command.word("na\xefve \u4f60 100%.pt") == "na\xefve \u4f60 100%.pt"
    assert command.word(os.fsdecode(b"latin-\xe9.pt")) == "latin-\udce9.pt"


@pytest.mark.parametrize("script, flags, word", [
    (train_teacher, [*TEACH, "--n_embd", "1048576"], "--n_embd"),
    (train_teacher, [*TEACH, "--n_layer", "1048576", "--n_embd", "1024"], "--n_embd or --n_layer"),
    (train_teacher, [*TEACH, "--batch", "1048576", "--n_embd", "1024", "--n_layer", "9"],
     "--batch"),
    (distill, [*DISTIL, "--groups", "1048576", "--G", "1048576"], "--groups"),
    (sample, [*ON_CPU, "--num", "1048576"], "--num")])
def test_what_cannot_fit_the_memory_is_refused_with_what_to_lower(tiny, capsys, monkeypatch, script,
                                                                  flags, word):
    """On a machine with 256 MB: all of them would need more."""
    monkeypatch.setattr(command, "free_memory", lambda device: 2 ** 28)
    refused(script.main, flags, capsys, f"0.25 are free: lower {word}")


@pytest.mark.parametrize("shape", [*train_teacher.SIZES.values(), (1, 2, 8, 24)])
@pytest.mark.parametrize("vocab_size, pads", [(257, True), (50257, False)])
def test_no_network_that_fits_is_refused(shape, vocab_size, pads, monkeypatch):
    """The estimate of its weights is at most what they take, and two thirds of it at least."""
    config = model.Config(vocab_size, shape[3] if len(shape) > 4 else 24, *shape[:3], pads=pads)
    with torch.device("meta"):
        real = 7 * sum(p.nbytes for p in model.Denoiser(config).parameters())
    monkeypatch.setattr(command, "free_memory", lambda device: real)
    command.check_memory(config, None, 7, 0, 1, "--batch")
    monkeypatch.setattr(command, "free_memory", lambda device: 2 * real / 3)
    with pytest.raises(ValueError, match="lower --n_embd"):
        command.check_memory(config, None, 7, 0, 1, "--batch")


def test_free_memory_is_a_number_of_bytes_that_this_process_could_have():
    free = command.free_memory(torch.device("cpu"))
    assert free == math.inf or 2 ** 26 < free < 2 ** 50


@pytest.mark.parametrize("script, words", [
    (train_teacher, "--causal --n_head 2 --lr 1e-05 --minutes .5 --no-bf16 --size mini --compile"),
    (distill, "--paper --beta 2 3 --no-coupled --w --kl_kind jeffreys --data=-x --teacher=a=b.pt"),
    (distill, ""), (train_teacher, "--seed 999999999 --device cpu --bf16")])
def test_a_run_goes_on_with_the_flags_that_it_began_with(monkeypatch, script, words):
    """All of them, and those given now win."""
    first, _ = script.parse_flags([*words.split(), "--out", "out/a.pt"])
    stored = {"flags": copy.deepcopy(vars(first))}
    monkeypatch.setattr(script, "load_checkpoint", lambda *_: (stored, None))
    again, ckpt = script.parse_flags(["--resume", "--out", "b.pt", "--updates", "77"])
    changed = {"resume": True, "out": "b.pt", "updates": 77}
    expected = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(first).items()}
    assert ckpt is stored and vars(again) == expected | changed


# ------------------------------------------------------------------------------------- checkpoints
def at(*keys, to):
    """A change of a checkpoint: the entry below these keys becomes `to`, or to(entry)."""
    def change(ckpt):
        for key in keys[:-1]:
            ckpt = ckpt[key]
        ckpt[keys[-1]] = to(ckpt[keys[-1]]) if callable(to) else to
    return change


def without(*keys):
    def change(ckpt):
        for key in keys[:-1]:
            ckpt = ckpt[key]
        del ckpt[keys[-1]]
    return change


ZEROS, WEIGHT = torch.zeros(3, 3), "blocks.0.up.weight"
LIES = [(name, without(name)) for name in files.TYPES] + [
    ("step", at("step", to=None)), ("step", at("step", to=math.nan)), ("step", at("step", to=-1)),
    ("step", at("step", to=True)), ("step", at("step", to=10 ** 30)),
    ("seconds", at("seconds", to=1e30)), ("seconds", at("seconds", to=math.nan)),
    ("seconds", at("seconds", to="1")),
    ("rng", at("rng", to=torch.zeros(5, dtype=torch.uint8))), ("rng", at("rng", to=None)),
    ("rng", at("rng", to=torch.zeros_like)), ("rng", at("rng", to=torch.Tensor.float)),
    ("flags", at("flags", to="--lr 1")), ("flags", at("flags", "lr", to="x")),
    ("flags", at("flags", "lr", to=math.nan)), ("flags", at("flags", "kl", to=10 ** 400)),
    ("flags", at("flags", "updates", to=True)), ("flags", at("flags", "beta", to=[1.0])),
    ("flags", at("flags", "w", to=None)), ("flags", at("flags", "seed", to=None)),
    ("flags", at("flags", to=lambda f: f | {"more": 1})),
    ("flags", without("flags", "ema")), ("flags", at("flags", "data", to=ZEROS)),
    ("flags", at("flags", "teacher", to="a\nb")), ("tokenizer", at("tokenizer", to=None)),
    ("tokenizer", at("tokenizer", to="gpt2")), ("tokenizer", at("tokenizer", to="x" * 10 ** 6)),
    ("kind", at("kind", to="causal")), ("kind", at("kind", to=3)), ("ema", at("ema", to=None)),
    ("config", at("config", to=[])), ("config", at("config", "vocab_size", to=-1)),
    ("tokenizer", at("config", "vocab_size", to=10 ** 9)), ("n_head", at("config", "n_head", to=0)),
    ("n_head", at("config", "n_head", to=5)), ("n_embd", at("config", "n_embd", to=16.0)),
    ("pads", at("config", "pads", to=1)), ("config", at("config", "n_embd", to=2 ** 20)),
    ("config", at("config", "length", to=10 ** 9)), ("config", at("config", "n_layer", to=10 ** 6)),
    ("ema", at("config", "n_layer", to=3)), ("ema", at("config", "pads", to=False)),
    ("config", without("config", "causal")),
    ("config", at("config", to=lambda c: c | {"x\x1b[31m": 1})),
    ("kind", at("config", "causal", to=True)), ("ema", at("ema", to={})),
    ("ema", at("ema", to=lambda e: e | {7: ZEROS})), ("ema", without("ema", WEIGHT)),
    ("lengths", at("ema", "lengths", to=torch.zeros_like)),
    ("lengths", at("ema", "lengths", to=lambda t: -t))]
for part in ("ema", "model", "disc"):
    key = "body." * (part == "disc") + WEIGHT
    LIES += [(part, at(part, key, to=to)) for to in (
        None, ZEROS, torch.Tensor.double, ZEROS.to_sparse(), torch.ones(1).expand(10 ** 9),
        lambda t: t * math.nan, lambda t: t.mT, lambda t: t[0, 0].expand(t.shape))]
for part in ("opt", "disc_opt"):
    LIES += [(part, at(part, *keys, to=to)) for keys, to in (
        ([], None), (["state"], None), (["state"], {99: {}}), (["state", 0], ZEROS),
        (["state", 0, "exp_avg"], torch.zeros(1)), (["state", 0, "exp_avg"], math.nan),
        (["state", 0, "exp_avg_sq"], lambda t: t * math.inf), (["state", 0, "step"], 3),
        (["state", 0, "step"], lambda t: -t), (["state", 0], lambda s: s | {"x": ZEROS}))
        if part == "opt" or keys[:2] != ["state", 0]]


@pytest.fixture(scope="module")
def good(toys):  # noqa: F811
    """The checkpoint of the toys' student, for a test to copy."""
    return torch.load(toys / "out/student.pt", weights_only=True)


@pytest.mark.parametrize("number", range(len(LIES)))
def test_a_checkpoint_that_lies_is_refused_by_the_name_of_the_entry(tiny, good, capsys, number):
    word, change = LIES[number]
    ckpt = copy.deepcopy(good)
    change(ckpt)
    torch.save(ckpt, "a.pt")
    argv = ["--resume", "--out", "a.pt", "--updates", "3", *ON_CPU]
    code, out, err = outcome(distill.main, argv, capsys)
    assert code == 2 and "a.pt" in err and word in err and len(err) < 700, err
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable()


def test_a_checkpoint_as_it_was_goes_on(tiny, good, capsys):
    """So that it is the lie that is refused."""
    torch.save(copy.deepcopy(good), "a.pt")
    assert not distill.main(["--resume", "--out", "a.pt", "--updates", "3", *ON_CPU])
    assert load("a.pt")[0]["step"] == good["step"] + 1


def test_nothing_is_made_for_a_lie(tiny, good, monkeypatch):
    """A network of a billion weights would be, if anything asked for one."""
    monkeypatch.setattr(model, "Denoiser", lambda config: pytest.fail("it was made"))
    for name, size in (("n_embd", 2 ** 20), ("n_layer", 10 ** 8), ("length", 10 ** 9)):
        torch.save(good | {"config": good["config"] | {name: size}}, "a.pt")
        with pytest.raises(ValueError, match="more weights than the file has"):
            model.load_checkpoint("a.pt", ("student",))


def test_every_flipped_bit_of_what_is_stored_is_found(tiny):
    """Torch's own loader looks at no checksum; 60 bits of all entries, large and small."""
    whole, numbers = bytearray((tiny / "out/student.pt").read_bytes()), torch.manual_seed(0)
    with zipfile.ZipFile("out/student.pt") as archive:
        members = [info for info in archive.infolist() if info.file_size]
    for k in range(60):
        info = members[k * len(members) // 60]
        lengths = whole[info.header_offset + 26:info.header_offset + 30]
        start = info.header_offset + 30 + sum(np.frombuffer(lengths, "<u2").tolist())
        place = start + torch.randint(info.file_size, (), generator=numbers).item()
        whole[place] ^= 1 << k % 8
        (tiny / "a.pt").write_bytes(whole)
        with pytest.raises(ValueError, match="a.pt .*make it again"):
            model.load_checkpoint("a.pt", ("student",))
        whole[place] ^= 1 << k % 8
    (tiny / "a.pt").write_bytes(whole)
    model.load_checkpoint("a.pt", ("student",))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append(os.fstat(f).st_size) or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(b) or replace(a, b))
    ckpt, net = model.load_checkpoint("out/teacher.pt", ("teacher",))
    model.save_checkpoint("a.pt", {"model": net}, step=1)
    assert done == [os.path.getsize("a.pt"), "a.pt"]

"""test_files.py - what the commands are given, read and write: checked, whole, one line if wrong.

Checkpoints and command lines are those of toys, see test_didi.py.
"""
import copy
import gzip
import io
import itertools
import json
import lzma
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import distill
import model
import sample
import train_teacher
from data import command, corpus, fasta, files, memory, text
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
    --beta nan nan, --beta 1, --beta 0 1, --ema 2, --smoothing 2, --smoothing .5, --smoothing nan
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
    monkeypatch.setattr(memory, "free", lambda device: 2 ** 28)
    refused(script.main, flags, capsys, f"0.25 are free: lower {word}")


@pytest.mark.parametrize("shape", [*train_teacher.SIZES.values(), (1, 2, 8, 24)])
@pytest.mark.parametrize("vocab_size, pads", [(257, True), (50257, False)])
def test_no_network_that_fits_is_refused(shape, vocab_size, pads, monkeypatch):
    """The estimate of its weights is at most what they take, and two thirds of it at least."""
    config = model.Config(vocab_size, shape[3] if len(shape) > 4 else 24, *shape[:3], pads=pads)
    with torch.device("meta"):
        real = 7 * sum(p.nbytes for p in model.Denoiser(config).parameters())
    monkeypatch.setattr(memory, "free", lambda device: real)
    memory.check(config, None, 7, 0, 1, "--batch")
    monkeypatch.setattr(memory, "free", lambda device: 2 * real / 3)
    with pytest.raises(ValueError, match="lower --n_embd"):
        memory.check(config, None, 7, 0, 1, "--batch")


def test_free_memory_is_a_number_of_bytes_that_this_process_could_have():
    free = memory.free(torch.device("cpu"))
    assert free == math.inf or 2 ** 26 < free < 2 ** 50


@pytest.mark.parametrize("script, words", [
    (train_teacher, "--causal --n_head 2 --lr 1e-05 --minutes .5 --no-bf16 --size mini --compile"),
    (distill, "--paper --beta 2 3 --no-coupled --w --power 1 --data=-x --teacher=a=b.pt"),
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


# -------------------------------------------------------------------- outputs, inputs and one's log
def everything(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script, flags", [
    (distill, [*DISTIL, "--out", "out/teacher.pt"]), (distill, [*DISTIL, "--out", "out/teacher"]),
    (distill, [*DISTIL, "--out", "out/signatures/a.pt"]), (distill, [*DISTIL, "--out", "link.pt"]),
    (distill, [*DISTIL, "--out", "./out/../out/teacher.pt"]), (distill, [*DISTIL, "--out", "out/"]),
    (distill, [*DISTIL, "--out", "hard.pt"]), (distill, [*DISTIL, "--out", "out/student.jsonl"]),
    (distill, [*DISTIL, "--out", "fifo"]), (distill, [*DISTIL, "--out", "a.pt.partial"]),
    (train_teacher, [*TEACH, "--out", "out/signatures/val.bin"]),
    (train_teacher, [*TEACH, "--out", "out/signatures"]),
    (train_teacher, [*TEACH, "--out", "new/"]), (train_teacher, [*TEACH, "--out", "hard.pt/a.pt"]),
    (train_teacher, [*TEACH, "--out", "/proc/a.pt"]),
    (sample, [*ON_CPU, "--out", "out/student.pt"]),
    (sample, [*ON_CPU, "--out", "out/signatures/meta.json"]),
    (sample, [*ON_CPU, "--out", "none/a.txt"])])
def test_an_output_that_would_eat_something_is_refused(tiny, capsys, script, flags):
    os.symlink("out/teacher.pt", "link.pt")
    os.link("out/teacher.pt", "hard.pt")
    os.mkfifo("fifo")
    before = everything(tiny)
    refused(script.main, flags, capsys, flags[-1])
    assert everything(tiny) == before


def test_logs_are_not_shared_and_outputs_beside_inputs_are_fine(tiny):
    for name in ("run.v1", "run.v2", "out/signatures.pt"):
        assert not distill.main([*DISTIL, "--out", name])
    assert {"run.v1", "run.v2", "run.v1.jsonl", "run.v2.jsonl"} <= set(os.listdir())
    assert (tiny / "run.v1.jsonl").read_text().count("\n") == 4  # three updates and a table
    assert not [name for name in os.listdir() if name.endswith((".partial", ".lock"))]


@BOTH
def test_a_new_run_that_fails_leaves_the_checkpoint_and_the_log(tiny, capsys, script, flags):
    """Its first updates go well; and one without a run before it leaves its own log."""
    before = everything(tiny)
    flags = [*flags, "--lr", "1e6", "--updates", "99", "--eval_every", "99", "--disc_warmup", "2"]
    flags = flags[:-2] if script is train_teacher else flags
    assert outcome(script.main, flags, capsys)[0] == 2 and everything(tiny) == before
    assert outcome(script.main, [*flags, "--out", "a.pt"], capsys)[0] == 2
    assert (tiny / "a.jsonl").read_text().startswith('{"step": 1,') and not (tiny / "a.pt").exists()


@BOTH
def test_the_checkpoint_is_there_before_the_table_of_its_step(tiny, monkeypatch, script, flags):
    """What runs out of memory in an evaluation has lost nothing."""
    def measures(*_):
        raise MemoryError
    monkeypatch.setattr(corpus.Corpus, "measures", measures)
    with pytest.raises(MemoryError):
        script.main([*flags, "--out", "a.pt", "--eval_every", "1"])
    assert load("a.pt")[0]["step"] == 1 + (script is distill)


def test_memory_that_runs_out_is_one_line(capsys):
    for e in (MemoryError(), RuntimeError("[enforce fail] alloc_cpu: can't allocate memory: 9 TB"),
              torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")):
        def main(argv, e=e):
            raise e
        refused(main, [], capsys, "no memory is left: lower --batch")
    with pytest.raises(RuntimeError, match="a fault"):  # of ours: a traceback
        command.run_script(lambda: (_ for _ in ()).throw(RuntimeError("a fault")))


@pytest.mark.parametrize("stop, code", [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_a_signal_while_a_bar_takes_its_lock_is_one_word(capsys, stop, code):
    def main(argv):
        try:
            raise stop
        finally:
            threading.RLock().release()  # RuntimeError: it has not been acquired
    assert outcome(main, [], capsys) == (code, "", "stopped\n")


@BOTH
def test_two_runs_with_one_out_exclude_each_other(tiny, capsys, monkeypatch, script, flags):
    """The second says which file, changes nothing; once the first is done its lock is gone."""
    real, tried = script.update_ema, []

    def update_ema(*args):
        if not tried:
            tried.append(everything(tiny))
            monkeypatch.setattr(script, "update_ema", real)
            code, _, err = outcome(script.main, [*flags, "--out", "a.pt"], capsys)
            assert code == 2 and "error: a.jsonl is being written by another run" in err
            assert everything(tiny) == tried[0]
        real(*args)
    monkeypatch.setattr(script, "update_ema", update_ema)
    assert not script.main([*flags, "--out", "a.pt"]) and tried
    assert not script.main([*flags, "--out", "a.pt"])


def test_a_lock_dies_with_its_process_and_is_waited_for(tiny):
    """Killed with the lock held: the file stays, the next one gets it; and two count to 200."""
    program = """
import os, signal, sys
from data import files
if sys.argv[1] == "die":
    with files.locked("n"):
        os.kill(os.getpid(), signal.SIGKILL)
for _ in range(100):
    with files.locked("n", wait=True):
        n = int(open("n").read())
        with files.whole_file("n") as f:
            f.write(str(n + 1))
"""
    (tiny / "n").write_text("0")
    how = {"env": os.environ | {"PYTHONPATH": HERE}}
    assert subprocess.run([sys.executable, "-c", program, "die"], **how).returncode == -9
    both = [subprocess.Popen([sys.executable, "-c", program, ""], **how) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0] and (tiny / "n").read_text() == "200"


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_that_is_taken_away_while_it_is_looked_at_is_made_anew(tiny, monkeypatch, look):
    """As by another process that ends: the one that is held is there, and goes in the end."""
    stat, looks = os.stat, []

    def late(path, **how):
        looks.append(path)
        if looks.count("n.lock") == look and path == "n.lock":
            os.remove(path)
        return stat(path, **how)
    monkeypatch.setattr(os, "stat", late)
    with files.locked("n"):
        assert (tiny / "n.lock").exists() and "n.lock" in looks
    assert not (tiny / "n.lock").exists()
    assert not os.path.exists("n.lock")


def test_a_partial_file_that_is_somebodys_link_is_not_followed(tiny):
    (tiny / "precious").write_text("mine")
    for name in ("a.pt", "a.jsonl", "a.txt"):
        os.symlink("precious", f"{name}.partial")
    assert not distill.main([*DISTIL, "--out", "a.pt"])
    assert not sample.main([*ON_CPU, "--num", "2", "--out", "a.txt"])
    assert (tiny / "precious").read_text() == "mine" and load("a.pt")
    os.symlink("precious", "b.jsonl.lock")
    with pytest.raises(OSError):
        distill.main([*DISTIL, "--out", "b.pt"])


# ------------------------------------------------------------------------------------------- files
def damage(path, place, token):
    """Another token at this place of a file of tokens."""
    tokens = np.memmap(path, "<u2", "r+", offset=1024)
    tokens[place] = token
    tokens.flush()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("length", [0, 24])
@pytest.mark.parametrize("token", [257, 65535])
def test_tokens_that_there_are_not_are_refused(tiny, capsys, split, length, token):
    """257 is the mask: a text with one would be learnt."""
    maker = "signatures" if length else "text"
    data = [("train", np.arange(4800) % 256), ("val", np.arange(4800) % 256)]
    corpus.write("odd", data, maker, "bytes", length, {})
    flags = [*TEACH, "--data", "odd", "--out", "a.pt", "--length", "24", "--batch", "8"]
    if split == "train":  # so that it is surely among them
        flags += ["--batch", "4800"]
    assert corpus.load("odd").batch(2, 24).max() < 256
    damage(f"odd/{split}.bin", 100, token)
    code, _, err = outcome(train_teacher.main, flags, capsys)
    assert code == 2 and f"error: odd has token {token}, but bytes has 257 tokens" in err


def test_rows_that_are_not_all_of_the_length_are_refused(tiny):
    corpus.write("odd", [("train", range(48)), ("val", range(25))], "signatures", "bytes", 24, {})
    with pytest.raises(ValueError, match="odd has not all rows of the length 24"):
        corpus.load("odd")


def test_the_table_of_vocabularies():
    assert {name: corpus.make_tokenizer(name).n_vocab for name in ("bytes", "protein")} == {
        name: number for name, number in corpus.TOKENS.items() if name != "gpt2"}
    assert corpus.TOKENS["gpt2"] == 50257  # 256 bytes, 50,000 merges and the end


class Endless(io.StringIO):
    """An open file of which this comes for ever; at most ten million times."""

    def __init__(self, *pieces):
        super().__init__()
        self.pieces = itertools.islice(itertools.cycle(pieces), 10 ** 7)

    def readline(self, limit=-1):
        return next(self.pieces)


@pytest.mark.parametrize("pieces", [(">a\n", "ACDEF\n"), (">" + "a" * 999,), (";\n",), ("\n",)])
def test_a_fasta_file_without_end_is_refused(monkeypatch, pieces):
    monkeypatch.setattr(memory, "free", lambda device: 10 ** 7)
    with pytest.raises(ValueError, match="p.fasta, line .* too long"):
        fasta.parse(Endless(*pieces), "p.fasta")


@pytest.mark.parametrize("pack", [gzip, lzma])
def test_a_bomb_takes_little_memory(tiny, monkeypatch, pack):
    """32 MB on one line in a few KB: text is read in pieces, of FASTA no more than a line."""
    (tiny / "bomb").write_bytes(pack.compress(b"A" * 2 ** 25))
    (tiny / "p").write_bytes(pack.compress(b">a\n" + b"A" * 2 ** 25))
    monkeypatch.setattr(fasta, "LONGEST", 1 << 16)
    tracemalloc.start()
    assert sum(len(piece) for piece, _ in text.documents(["bomb"])) == 2 ** 25
    with pytest.raises(ValueError, match="p, line 2 is too long"):
        fasta.read_fasta("p")
    assert tracemalloc.get_traced_memory()[1] < 12e6  # 8 of them are xz's own
    tracemalloc.stop()


def test_what_a_file_says_never_steers_the_terminal(tiny, capsys):
    """An escape sequence in a header, a JSON name, the name of a file: one line, plain."""
    (tiny / "p.fasta").write_text(">a\nAC\x1b[31mDE\n")
    refused(fasta.main, ["p.fasta"], capsys, "p.fasta, line 2")
    (tiny / "out/signatures/meta.json").write_text(json.dumps({"maker\x1b[2J\n": "x"}))
    refused(train_teacher.main, TEACH, capsys, "signatures")
    os.mkdir("t")
    (tiny / "t/a\x1b[31m\n.txt").write_bytes(b"\xff" * 99)
    code, _, err = outcome(text.main, ["t", "--tokenizer", "bytes"], capsys)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and last.isprintable() and ".txt" in last
    assert "\x1b" not in err.replace("\x1b[A", "")


# ------------------------------------------------------------------------------------- how it ends
def program(tiny, *argv, **how):
    """A script of ours in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", **how.pop("env", {})}
    return subprocess.Popen([sys.executable, f"{HERE}/{argv[0]}", *argv[1:]], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def importing(tiny, script, torch, **env):
    """A script of ours that has this text in the place of torch."""
    (tiny / "stand_in").mkdir()
    (tiny / "stand_in/torch.py").write_text(torch)
    return program(tiny, script, env={"PYTHONPATH": "stand_in", **env})


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported_is_one_word(tiny, script):
    run = importing(tiny, script, "raise KeyboardInterrupt")
    assert run.communicate(timeout=60) == ("", "stopped\n") and run.returncode == -signal.SIGINT


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py", "sample.py"])
@pytest.mark.parametrize("given, told", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_is_told_to_sleep_soon_before_torch_is_imported(
        tiny, monkeypatch, script, given, told):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    run = importing(tiny, script, "import os; exit(os.environ['GOMP_SPINCOUNT'])", **given)
    assert run.communicate(timeout=60)[1] == told + "\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", [train_teacher, distill, sample, text])
def test_a_signal_in_the_preparation_ends_it_and_leaves_nothing(
        tiny, capsys, monkeypatch, script, number, code):
    """Before there is anything to save; a corpus that is half made is taken away."""
    def stop(*_):
        os.kill(os.getpid(), number)
        time.sleep(9)
    flags = {train_teacher: TEACH, distill: DISTIL, sample: ON_CPU,
             text: ["a.txt", "--tokenizer", "bytes", "--out", "new"]}
    for module, name in ((train_teacher, "networks"), (distill, "networks"),
                         (sample, "start_states"), (text, "encode_batch")):
        monkeypatch.setattr(module, name, stop)
    (tiny / "a.txt").write_text("text " * 999)
    before = everything(tiny)
    found, _, err = outcome(script.main, flags[script], capsys)
    assert found == code and "Traceback" not in err and everything(tiny) == before


@BOTH
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["measures", "save"])
def test_a_signal_in_a_table_or_while_saving_loses_nothing(
        tiny, capsys, monkeypatch, script, flags, number, code, where):
    def stop(*_, numbers=[number]):
        if numbers:
            os.kill(os.getpid(), numbers.pop())
        return {}
    if where == "measures":
        monkeypatch.setattr(corpus.Corpus, "measures", stop)
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda *names: stop() or replace(*names))
    flags = [*flags, "--out", "a.pt", "--updates", "4", "--eval_every", "2"]
    found, out, err = outcome(script.main, flags, capsys, resumes=True)
    assert found == code and "all is saved: go on with" in out and "Traceback" not in err
    assert load("a.pt")[0]["step"] == 3 + (script is distill)  # the step after the table's


def in_a_child(main, limit):
    """Exit code and stderr of main(), run in a child that can write files of so many bytes."""
    said, says = os.pipe()
    child, code = os.fork(), 99
    if child == 0:
        sys.stdout = sys.stderr = open(says, "w")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            command.run_script(main)
        except SystemExit as e:
            code = int(e.code is not None) and e.code
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(says)
    with open(said) as f:
        err = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), err


KINDS_OF_WRITING = [(train_teacher.main, [*TEACH, "--out", "new/a.pt"]),
                    (distill.main, [*DISTIL, "--out", "new/a.pt"]),
                    (sample.main, [*ON_CPU, "--num", "999", "--out", "new/a.txt"]),
                    (text.main, ["a.txt", "--tokenizer", "bytes", "--out", "new/a"]),
                    (fasta.main, ["p.fasta", "--length", "16", "--out", "new/a"])]


@pytest.mark.parametrize("limit", [0, 500, 5000])
@pytest.mark.parametrize("main, flags", KINDS_OF_WRITING)
def test_a_full_disk_is_one_line_and_nothing_half_written(tiny, main, flags, limit):
    """At each kind of write: logs, checkpoints, samples, corpora; a limit on files is like one."""
    os.mkdir("new")
    (tiny / "a.txt").write_text("text " * 9999)
    (tiny / "p.fasta").write_text("".join(f">\n{''.join('ACDEFGHIKL'[int(c)] for c in str(i))}\n"
                                          for i in range(9999)))
    code, err = in_a_child(lambda: main(flags), limit)
    left = [name for name in os.listdir("new") if name != "a.jsonl"]
    last = err.splitlines()[-1]
    assert (code, left) == (2, []) and last.startswith("error: ") and "new/a" in last, err


@BOTH
def test_an_output_folder_that_goes_away_is_one_line(tiny, capsys, monkeypatch, script, flags):
    real = script.update_ema

    def update_ema(*args):
        shutil.rmtree("new", ignore_errors=True)
        real(*args)
    monkeypatch.setattr(script, "update_ema", update_ema)
    code, _, err = outcome(script.main, [*flags, "--out", "new/a.pt"], capsys)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "new/a" in err


def test_a_training_whose_words_nobody_reads_is_no_success(tiny):
    """`| head` ends it at its first table, and the checkpoint of that is saved."""
    run = program(tiny, "distill.py", *DISTIL, "--updates", "9", "--eval_every", "2")
    run.stdout.close()
    assert run.wait(60) == 141 and "nobody reads" in run.stderr.read()
    assert load("out/student.pt")[0]["step"] == 3
    run = program(tiny, "sample.py", *ON_CPU, "--num", "9")
    run.stdout.close()
    assert run.wait(60) == 0 and "error" not in run.stderr.read()


# ------------------------------------------------------------------- faults that were found in use
def test_a_corpus_that_was_moved_is_named_and_can_be_named_anew(tiny, capsys):
    os.rename("out/signatures", "elsewhere")
    os.mkdir("out/signatures")  # else the default corpus makes itself
    for script, flags in ((distill, DISTIL), (train_teacher, [*TEACH, "--resume"])):
        code, _, err = outcome(script.main, flags, capsys)
        assert code == 2 and "no corpus at 'out/signatures'" in err and "--data" in err
        assert not script.main([*flags, "--data", "elsewhere"])


@BOTH
def test_what_was_given_is_stored_not_what_was_settled(tiny, script, flags):
    """So a run goes on another device with that one's own precision."""
    assert not script.main([*flags[:-3], "--out", "a.pt"])  # neither --device nor --bf16
    stored = load("a.pt")[0]["flags"]
    assert stored["device"] == "auto" and stored["bf16"] is None
    assert stored.get("compile", False) is False


@pytest.mark.parametrize("capability, fast", [((7, 5), False), ((7, 0), False), ((8, 0), True)])
def test_bfloat16_is_used_where_the_gpu_has_it(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    args, _ = train_teacher.parse_flags([])
    assert command.setup(args) == (torch.device("cuda"), fast)
    args.bf16 = not fast
    assert command.setup(args) == (torch.device("cuda"), not fast)


@pytest.mark.parametrize("causal", [False, True])
def test_perplexity_does_not_depend_on_how_much_padding_there_is(causal):
    """Of a network that finds all tokens equally likely: ln V for each, and for the length."""
    found = []
    for L in (16, 64):
        net = model.Denoiser(model.Config(22, L, 1, 1, 8, causal, pads=True))
        torch.nn.init.zeros_(net.out.weight)
        torch.nn.init.zeros_(net.out.bias)
        net.lengths.copy_(torch.eye(L + 1)[12])
        x = torch.full((20000, L), 21)
        x[:, :12] = torch.randint(0, 21, (20000, 12))
        found.append(train_teacher.bound_and_loss(net, x)[0].item())
    exact = math.log(22) * 13 / 12 if causal else math.log(21)  # the causal one writes its end
    assert found == [pytest.approx(exact, rel=0.03)] * 2


def test_samples_are_written_where_the_locale_knows_ascii_only(tiny):
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = program(tiny, "sample.py", *ON_CPU, "--temperature", "5", "--out", "x.txt", env=env)
    out, err = run.communicate(timeout=60)
    text = (tiny / "x.txt").read_text("utf-8")
    assert run.returncode == 0 and not text.isascii() and out.isascii(), err
    assert out.splitlines()[1:] == text.encode("ascii", "replace").decode().splitlines()


def test_a_notebook_goes_on_after_a_script(tiny, monkeypatch):
    """A stdout without reconfigure; afterwards Ctrl-C and SIGTERM are as they were."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit):
        command.run_script(lambda: train_teacher.main([*TEACH, "--out", "a.pt"]))
    assert "val_nelbo" in sys.stdout.getvalue()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

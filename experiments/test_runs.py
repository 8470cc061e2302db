"""test_runs.py - the three scripts as a user runs them: stopped, killed, given nonsense.

What they compute is tested in test_didi.py, whose toys serve here too.
"""
import functools
import glob
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import types

import pytest
import torch

import didi
import distill
import model
import sample
import train_teacher
from data import corpus
from data.test_data import exit_code, forked, outcome
from test_didi import DISTIL, HERE, ON_CPU, TEACH, load, run, seed, tiny, toys  # noqa: F401

BOTH = pytest.mark.parametrize("script, flags", [(train_teacher, TEACH), (distill, DISTIL)])


def refused(main, argv, capsys, word):
    """Exit code 2, and one line, the last, that has "error: " and this word in it."""
    code, _, err = outcome(main, argv, capsys)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and errors == err.splitlines()[-1:] and word in errors[0], err


def assert_same(*paths):
    a, b = (load(path)[1] for path in paths)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def at_update(script, monkeypatch, number, act):
    """Call act(ema, model) at the end of this update of the weights, the first being number 1."""
    real, count = script.update_ema, itertools.count(1)

    def watched(ema, net, decay):
        real(ema, net, decay)
        if next(count) == number:
            act(ema, net)
    monkeypatch.setattr(script, "update_ema", watched)


@BOTH
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("eval_every, number", [("1", 0), ("99", signal.SIGTERM)])
def test_nothing_that_is_not_finite_is_saved(
        tiny, capsys, monkeypatch, script, flags, part, eval_every, number):
    """Neither at a table nor on a signal, in the model or its average."""
    def spoil(*ema_and_model):
        ema_and_model[part].norm.weight.data[0] = torch.nan
        os.kill(os.getpid(), number)
    at_update(script, monkeypatch, 1, spoil)
    refused(script.main, [*flags, "--eval_every", eval_every], capsys, "not finite")
    for path in glob.glob("out/*.pt"):
        load(path)


@BOTH
@pytest.mark.parametrize("number, code, every", [
    (signal.SIGINT, 130, "99"), (signal.SIGTERM, 143, "99"), (signal.SIGKILL, -9, "1")])
def test_resume_is_the_uninterrupted_run(
        tiny, capfd, monkeypatch, script, flags, number, code, every):
    """Stopped in its second update; kill -9 leaves what was saved at the table after the first."""
    flags = [*flags, "--updates", "4", "--eval_every", every]
    assert not script.main([*flags, "--out", "a.pt"])

    def stopped():
        at_update(script, monkeypatch, 2, lambda *_: os.kill(os.getpid(), number))
        found, *said = outcome(script.main, [*flags, "--out", "b.pt"], capfd, resumes=True)
        (tiny / "said").write_text("".join(said))
        return found
    assert exit_code(forked(stopped)) == code
    assert code < 0 or "--resume" in (tiny / "said").read_text()
    updates = {"99": 2, "1": 1}[every] + {train_teacher: 0, distill: 1}[script]
    assert load("b.pt")[0]["step"] == updates
    assert not script.main(["--resume", "--out", "b.pt"])  # the other flags: the checkpoint's
    assert_same("a.pt", "b.pt")
    logs = [map(json.loads, open(path)) for path in ("a.jsonl", "b.jsonl")]
    a, b = ([row["step"] for row in log if "seconds" in row] for log in logs)
    assert a == b == list(range(1, len(a) + 1))  # none twice, none lost
    capfd.readouterr()
    assert not script.main(["--resume", "--out", "b.pt"])  # again: there is nothing left to do
    assert f"b.pt has all its {len(b)} updates" in capfd.readouterr().out
    assert_same("a.pt", "b.pt")


@BOTH
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tiny, capfd, script, flags):
    """The limit is below the size of a checkpoint, as a full disk is."""
    whole = (tiny / "out/teacher.pt").read_bytes(), (tiny / "out/student.pt").read_bytes()

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        code, _, err = outcome(script.main, flags, capfd)
        return code + ("stays as it was" not in err.splitlines()[-1])
    assert exit_code(forked(full)) == 2
    assert whole == ((tiny / "out/teacher.pt").read_bytes(), (tiny / "out/student.pt").read_bytes())


def test_a_terminal_of_another_alphabet_shows_a_question_mark(tiny, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    path = os.path.join(HERE, "sample.py")
    assert len(run(path, "--num", "9", *ON_CPU, path=HERE).splitlines()) == 10


def test_distillation_refuses_rows_of_another_length(tiny, capsys):
    lines = [f"def f{i}(a, b={i}):" for i in range(80)]
    corpus.write_rows("longer", lines, "signatures", "bytes", 32, {})
    refused(distill.main, [*DISTIL, "--data", "longer"], capsys, "rows")


@BOTH
def test_minutes_fit_the_schedule_and_resume_counts_them(tiny, monkeypatch, script, flags):
    """With a clock of which every update takes 3 seconds, so that 20 make a minute."""
    clock = types.SimpleNamespace(perf_counter=functools.partial(next, itertools.count(0, 3)))
    monkeypatch.setattr(script, "time", clock)
    flags = [*flags, "--eval_every", "999", "--lr", "1e-3", "--out", "a.pt"]
    name = {train_teacher: "adamw", distill: "opt"}[script]
    for more, step in (([], 20), (["--resume"], 24), (["--resume"], 24)):  # at last nothing to do
        assert not script.main([*flags, "--minutes", str(step / 20), *more])
        ckpt = load("a.pt")[0]
        assert ckpt["step"] == step and ckpt["seconds"] == 3 * step
        assert 1e-4 <= ckpt[name]["param_groups"][0]["lr"] < 2e-4  # a tenth of the peak, nearly


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, monkeypatch):
    """Of texts of one length: the loss is a mean over the masks of a part."""
    rows = corpus.load(corpus.DEFAULT).batch(8, 24)
    rows[:, 15:] = 256
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device=None: torch.ones(B))
    for parts in (1, 2):
        chunks = itertools.cycle(rows.chunk(parts))
        monkeypatch.setattr(corpus.Corpus, "batch", lambda *_: next(chunks))
        argv = [*TEACH, "--updates", "1", "--accumulate", str(parts), "--out", f"{parts}.pt"]
        assert not train_teacher.main(argv)
    for name, slope in (("adamw", "exp_avg"), ("muon", "momentum_buffer")):
        one, two = (load(f"{parts}.pt")[0][name]["state"] for parts in (1, 2))
        assert all(torch.allclose(one[i][slope], two[i][slope], atol=1e-6) for i in one)
        assert max(state[slope].abs().max() for state in one.values()) > 1e-4


def test_muon_trains_the_matrices_and_a_compiled_run_is_the_same(tiny, monkeypatch):
    compiled, ckpt = [], load("out/teacher.pt")[0]
    weights = len(list(model.load_checkpoint("out/teacher.pt", ("teacher",))[1].parameters()))
    muon, adamw = (ckpt[name]["state"] for name in ("muon", "adamw"))
    assert len(muon) == 8 == weights - len(adamw)
    assert all(state["momentum_buffer"].dim() == 2 for state in muon.values())
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    assert not train_teacher.main([*TEACH, "--compile", "--out", "a.pt"])
    assert compiled == ["trunk"]
    assert_same("a.pt", "out/teacher.pt")


def test_foreign_files_are_one_line_and_stay(tiny, capsys):
    (tiny / "a.pt").write_bytes(b"GIF89a")
    refused(distill.main, [*DISTIL, "--teacher", "a.pt"], capsys, "a.pt")
    refused(sample.main, ["--model", "a.pt"], capsys, "a.pt")
    refused(train_teacher.main, ["--resume", "--out", "a.pt"], capsys, "a.pt")
    assert (tiny / "a.pt").read_bytes() == b"GIF89a"


DRIVER = """
import importlib, sys, torch, model
from data.command import run_script
script, real, seen = importlib.import_module(sys.argv[1]), model.average_gradients, []
def flat(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
def watched(net):
    own, weights = flat(net), torch.cat([p.detach().flatten() for p in net.parameters()])
    real(net)
    seen.append((own, flat(net), weights))
    torch.save(seen, f"seen{model.RANK}.pt")
script.average_gradients = watched
run_script(lambda: script.main(sys.argv[2:]))
"""


@BOTH
def test_two_processes_average_their_gradients(tiny, script, flags):
    """Each one's own differ, for they see other data; both go on with the mean, and stay equal."""
    (tiny / "driver.py").write_text(DRIVER)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py",
        script.__name__, *flags, "--out", "new/a.pt", path=HERE)
    assert sorted(os.listdir("new")) == ["a.jsonl", "a.pt"]
    load("new/a.pt")
    seen = torch.load("seen0.pt"), torch.load("seen1.pt")
    assert len(seen[0]) == len(seen[1]) >= 4
    for (own, mean, weights), (own_1, mean_1, weights_1) in zip(*seen):
        assert torch.equal(mean, mean_1) and torch.equal(weights, weights_1)
        assert torch.allclose(mean, (own + own_1) / 2, atol=1e-6)
        assert not torch.allclose(own, own_1, atol=1e-5)


@pytest.mark.parametrize("flags, given, length", [
    ("--prompt def", "def", None), ("--infill d__o(_) --gap _", "d??o(?)", 7),
    ("--length 24", "", 24), ("--prompt def --length 9", "def", 9),
    ("--sampler rgas --infill de?f", "de?f", 4)])
def test_given_text_stays_and_the_seed_decides(tiny, capsys, monkeypatch, flags, given, length):
    seen, real = [], corpus.decode
    monkeypatch.setattr(corpus, "decode", lambda x, *how: seen.append(x) or real(x, *how))
    for seed in ("0", "0", "1"):
        argv = ["--num", "12", "--steps", "4", "--seed", seed, *ON_CPU, *flags.split()]
        assert not sample.main(argv)
    x = seen[0]
    assert torch.equal(x, seen[1]) and not torch.equal(x, seen[2]) and x.max() <= 256
    assert all(c == "?" or x[:, i].eq(ord(c)).all() for i, c in enumerate(given))
    n = (x != 256).sum(1)  # the training texts have 15 or 17 tokens
    assert torch.equal(x != 256, torch.arange(24) < n[:, None])  # pads are behind the text alone
    assert set(n.tolist()) == ({length} if length else {15, 17})
    assert len(capsys.readouterr().out.splitlines()) == 3 * (1 + 12)


def test_samples_are_shown_step_by_step_and_written_to_text_and_fasta(tiny, capsys):
    assert not sample.main(["--num", "5", "--out", "a.fa", *ON_CPU, "--prompt", "def"])
    capsys.readouterr()
    assert not sample.main(["--num", "5", "--out", "a.txt", *ON_CPU, "--prompt", "def", "--watch"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13] for line in lines[:8]] == [f"step {k}/8: def" for k in range(1, 9)]
    assert "\u2591" in lines[0] and "\u2591" not in lines[7] and "\x1b" not in "".join(lines)
    text, fasta = ((tiny / name).read_text("utf-8").splitlines() for name in ("a.txt", "a.fa"))
    assert text == lines[9:] == fasta[1::2] and len(text) == 5
    assert all(line.startswith(">") for line in fasta[::2])


BAD = ((train_teacher, TEACH, """
    --device abacus, --length 3, --n_embd 15, --n_head 0, --updates 0, --minutes 0, --batch 0
    --lr 1e30, --accumulate 3, --accumulate 0, --eval_every 0, --data none: data.text
    --out out: folder, --data out/teacher.pt: data.text, --resume --out none.pt: train_teacher.py
    --resume --n_layer 1: fit, --resume --out out/student.pt: student"""), (distill, DISTIL, """
    --device abacus, --updates 0, --K 0, --G 1, --beta 0 1
    --lr 1e30, --groups 3 --accumulate 2, --groups 0, --eval_every 0, --minutes 0
    --data none: data.text, --teacher none.pt: train_teacher.py, --teacher out/student.pt: student
    --resume --out none.pt: distill.py"""), (sample, ON_CPU, """
    --device abacus, --steps 0, --num 0, --temperature 0, --temperature nan, --batch 0, --length 25
    --length 2 --prompt def, --prompt def_a_text_of_25_letters_: 25 tokens, --length 9 --infill d?f
    --infill ?????????????????????????: 25 tokens, --watch --sampler rgas
    --candidates 0 --sampler rgas, --model none.pt: distill.py, --out none/a.txt: none/a.txt
    --sampler rgas --model out/teacher.pt: rgas"""))  # argv: a word of the message, or its flag


@pytest.mark.parametrize("script, before, case", [
    (*bad[:2], case) for bad in BAD for case in re.findall(r"--[^,\n]*", bad[2])])
def test_bad_input_is_one_line(tiny, capsys, script, before, case):
    argv, _, word = case.partition(": ")
    if "--resume" not in argv:
        argv = " ".join([*before, argv])
    refused(script.main, argv.split(), capsys, word or case.split()[0])
    for path in glob.glob("out/*.pt"):
        load(path)


# ---------------------------------------------------------------------- in processes of their own
def test_on_a_gpu():
    """test_gpu.py, in a process that sees the GPU, if there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([*command, "experiments/test_gpu.py"], cwd=HERE, capture_output=True,
                          text=True, env=env | {"ON_A_GPU": "yes"})
    assert not done.returncode, done.stdout
    if "passed" not in done.stdout:
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize("command", ["fuzz --count 9", "kill distil corpus --kills 4"])
def test_some_nonsense_and_some_kills(command):
    """Of the two scripts that are run by hand with many more; in a process that may fork."""
    run("-m", *f"experiments.{command} --minutes .5".split(), path=HERE)  # exit code 0

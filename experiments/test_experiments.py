"""test_experiments.py - the experiments at toy size: laws by enumeration, tables by hand.

Networks are random, or the lookup tables of test_didi.py; texts have 16 tokens at most.
"""
import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import didi
import distill
import model
import train_teacher
from data import corpus
from experiments import ablate, autoregressive, bench, common, evaluate, orders, sdtt
from test_didi import (MASK, V, Z, chain, check_law, exact_table, index,  # noqa: F401
                       lookup, masks, seed, stutter)
from test_scripts import ON_CPU, call

HERE = os.path.dirname(os.path.abspath(__file__))
L = 16
LINES = [f"def f{i}(a={i}):" for i in range(80)]
FEW = f"{ON_CPU} --samples 3 --json r.json"
SMALL = "--data corpus --n_layer 1 --n_head 2 --n_embd 16 --batch 8"
STUDENT = "--groups 2 --G 2 --disc_warmup 1 --disc_blocks 1 --updates 2"


# ------------------------------------------------------------------------------------ a tiny world
def network(V, L, causal=False, pads=False):
    """Return a random Denoiser, far from uniform, whose texts have 2 tokens or more."""
    config = model.Config(V, L, 2, 2, 8, causal, pads)
    net = model.Denoiser(config).requires_grad_(False)
    if pads:
        net.lengths[:] = torch.arange(L + 1) > 1
    for p in net.parameters():
        p.mul_(2)
    return net


def save(path, kind, length=L, packed=False):
    """Save a random network as the scripts do, a student with a discriminator."""
    net = network(257, length, kind == "causal", pads=not packed)
    nets = {"model": net, "ema": net}
    if kind == "student":
        nets["disc"] = model.Discriminator(net, 1)
    flags = {"data": "corpus", "seed": 0}
    about = {"kind": kind, "tokenizer": "bytes", "flags": flags, "step": 0}
    model.save(path, [], nets, config=vars(net.config), **about)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Enter a folder with a corpus of 80 lines and three models in out/."""
    monkeypatch.chdir(tmp_path)
    corpus.write_rows("corpus", LINES, "signatures", "bytes", L, {})
    os.mkdir("out")
    for kind in ("teacher", "student", "causal"):
        save(f"out/{kind}.pt", kind)
    return tmp_path


def load(name):
    return common.load_model(f"out/{name}.pt", name, torch.device("cpu"), bf16=False)


def results(path="r.json"):
    with open(path) as f:
        return json.load(f)


# ---------------------------------------------------------------------- the autoregressive baseline
@pytest.fixture
def causal():
    return network(3, 3, causal=True)


@pytest.mark.parametrize("bf16, error", [(False, 1e-5), (True, 0.05)])
def test_the_cache_changes_nothing(causal, bf16, error):
    causal.bf16 = bf16
    z = torch.randint(0, 4, (5, 3))
    cache = autoregressive.new_cache(causal, 5)

    one_by_one = [
        autoregressive.next_logits(causal, z[:, i], i, cache)
        for i in range(3)]

    difference = torch.stack(one_by_one, 1).float() - causal(z).float()
    assert difference.abs().max() < error


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_autoregressive_sampler_draws_from_the_models_law(causal, temperature):
    end = 2
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    until = corpus.until_end(texts, end)
    padded = texts.where(until, end)
    possible = (texts == padded).all(1)  # nothing but ends after the first
    nll = train_teacher.causal_nll(lambda z: causal(z) / temperature, texts, 3)
    law = (-nll * until).sum(1).exp() * possible

    x, _ = autoregressive.autoregress(causal, 20000, end, temperature)

    drawn = x @ torch.tensor([9, 3, 1])
    check_law(drawn, law)


def test_packed_texts_do_not_end(causal):
    _, nfe = autoregressive.autoregress(causal, 50, pad_id=-1)

    assert nfe.tolist() == [3] * 50


# -------------------------------------------------------------------------------------------- SDTT
def half_way(table, stays):
    """Return the law (S,) of a step from two masks, each of which stays with this chance."""
    p = F.pad(table[-1].softmax(-1) * (1 - stays), (0, 1), value=stays)  # (2, V + 1)
    return torch.outer(p[0], p[1]).flatten()


def test_sdtt_target_comes_from_the_step_that_reveals():
    """Each possible pair of targets of two masks occurs as often as its law says."""
    table = torch.randn(16, 2, V)
    a = 0.8 * torch.rand(40000, 2)
    log_p = table.log_softmax(-1)
    masked = (Z[2] == MASK)[..., None]
    possible = torch.where(masked, log_p, log_p[-1])  # after each state of the first step
    kinds, kind = torch.unique(possible, dim=0, return_inverse=True)
    first = half_way(table, 0.55 / 0.8)  # law of that state, (S,)
    law = torch.zeros(len(kinds)).index_add(0, kind, first)

    target = sdtt.sdtt_target(lookup(table), masks(40000, 2), a, 0.55, MASK)

    target = target.view(-1, 1, 2, V)
    distance = (target - kinds).abs().amax((2, 3))  # (40000, kinds)
    assert distance.amin(1).max() < 1e-4
    check_law(distance.argmin(1), law)


def test_sdtt_is_at_rest_at_the_geometric_mean_of_the_targets():
    """The arithmetic mean is an exact teacher's own prediction: the loss is not at rest there."""
    teacher = exact_table(stutter(2), 2)
    log_p = teacher.log_softmax(-1)
    law = half_way(teacher, 0.5)
    masked = (Z[2] == MASK)[..., None]
    targets = torch.where(masked, log_p, log_p[-1])  # (S, 2, V)
    geometric = torch.einsum("s,slv->lv", law, targets)
    z = masks(50000, 2)
    a = torch.rand(50000, 2)

    def slope(logits):  # of the loss, in a student's logits (2, V)
        student = logits.repeat(16, 1, 1).requires_grad_()
        loss = sdtt.sdtt_loss(lookup(student), lookup(teacher), z, a, 0.5, MASK)
        grad, = torch.autograd.grad(loss, student)
        return grad.abs().max()

    assert slope(geometric) < 0.1 * slope(log_p[-1])


def test_each_round_of_sdtt_learns_from_the_one_before(folder, monkeypatch):
    teachers = []
    steps = []
    real = sdtt.sdtt_target

    def target(teacher, z, a, s, mask_id):
        teachers.append(teacher.out.weight.clone())
        steps.append(s.max().item())
        return real(teacher, z, a, s, mask_id)

    monkeypatch.setattr(sdtt, "sdtt_target", target)
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device: torch.ones(B))

    call(sdtt, f"{ON_CPU} --batch 8 --rounds 4 2 --updates 2")

    same = list(map(torch.equal, teachers[:-1], teachers[1:]))
    assert steps == [7 / 8, 7 / 8, 3 / 4, 3 / 4]
    assert same == [True, False, True]


# ------------------------------------------------------------------------------- the usual sampler
@pytest.mark.parametrize("steps", [1, 4])
def test_the_usual_sampler_draws_from_the_same_law_as_ours(steps):
    table = exact_table(stutter(2), 2)
    law = chain(table, didi.time_grid(steps, exponent=1))

    x = bench.usual_sample(lookup(table), masks(20000, 2), steps, MASK)

    check_law(index(x), law)


# ------------------------------------------------------------------------------ writing and results
@pytest.mark.parametrize("seed, same", [(1, True), (2, False)])
def test_the_seed_decides_what_is_written(folder, seed, same):
    student = load("student")
    x, _ = common.write(student, 5, 4, seed=1, batch=2)

    other, _ = common.write(student, 5, 4, seed=seed, batch=2)

    assert torch.equal(x, other) == same


def test_a_run_is_added_beside_others(folder):
    zero = {"flags": {"seed": 0}}
    one = {"flags": {"seed": 1}}

    for label, seed, run in [
        ("a", 0, zero),
        ("a", 1, zero),
        ("b", 0, zero),
        ("a", 1, one)  # replaces the one before
    ]:
        common.add_run("new/r.json", label, seed, run)

    expected = {"a": {"0": zero, "1": one}, "b": {"0": zero}}
    assert results("new/r.json") == expected


def test_a_run_that_cannot_be_written_leaves_the_file_whole(folder):
    common.add_run("r.json", "a", 0, {"flags": {}})

    with pytest.raises(TypeError):
        common.add_run("r.json", "a", 1, {"flags": torch})

    assert results() == {"a": {"0": {"flags": {}}}}


# ------------------------------------------------------------------------------------------ tables
def row(name, steps, rare, post, T=1.0):
    return {"row": name, "order": "random", "steps": steps, "T": T, "rare": rare, "post": post}


def write_results(*seeds):
    """Write r.json: one label with these rows of its seeds."""
    for seed, rows in enumerate(seeds):
        common.add_run("r.json", "default", seed, {"rows": rows, "flags": {}})


def table(capsys):
    """Return the lines that --table prints for r.json, as lists of cells."""
    call(evaluate, "--table r.json")
    cells = []
    for line in capsys.readouterr().out.splitlines():
        cells.append([cell.strip() for cell in line.split("|")[1:-1]])
    return cells


COOLED = [row("teacher", 8, 0.8, 0.5), row("teacher", 8, 0.6, 0.7, T=0.8)]


@pytest.mark.parametrize("goal, post", [
    (0.8, 0.5), (0.7, 0.6), (0.6, 0.7), (0.81, math.nan), (0.59, math.nan)])
def test_between_temperatures_measures_are_linear_and_outside_unknown(goal, post):
    rows = [*COOLED, row("teacher", 4, 0.7, 0.9, T=0.8)]

    found = evaluate.at_equal(rows, "teacher", "random", 8, "rare", goal, "post")

    assert found == pytest.approx(post, nan_ok=True)


def test_models_are_compared_where_they_are_equally_diverse(folder, capsys):
    """Twice: at the student's rare characters, .7, and at held-out text's entropy, .65."""
    rows = [*COOLED, row("student", 8, 0.7, 0.9)]
    rows = [r | {"entropy": r["rare"]} for r in rows]
    write_results([{"row": "held-out data", "entropy": 0.65}, *rows])

    lines = table(capsys)

    assert ["default", "8", "rare", "student", "random", "1", "0.900"] in lines
    assert ["default", "8", "rare", "teacher", "random", "1", "0.600"] in lines
    assert ["default", "8", "entropy", "teacher", "random", "1", "0.650"] in lines


def test_rows_of_seeds_are_paired_by_what_they_are(folder, capsys):
    """The second seed's rows are in another order, with one more and one fewer."""
    first = [row("teacher", 8, 2.0, 0.1), row("student", 8, 2.0, 0.2)]
    second = [row("new", None, 2.0, 0.9), row("student", 8, 2.0, 0.4)]
    write_results(first, second)

    lines = table(capsys)

    assert lines[0] == ["run", "seeds", "row", "order", "steps", "T", "post", "rare"]
    assert lines[2:5] == [
        ["default", "1", "teacher", "random", "8", "1.0", "0.100", "2.000"],
        ["default", "2", "student", "random", "8", "1.0", "0.300 +- 0.141", "2.000 +- 0.000"],
        ["default", "1", "new", "random", "", "1.0", "0.900", "2.000"]]


@pytest.mark.parametrize("name", ["nano", "protein", "text_bytes"])
def test_the_results_in_git_have_tables(name, capsys):
    evaluate.main(["--table", f"{HERE}/results/{name}.json"])

    table = capsys.readouterr().out
    assert re.search(r"\| student \| \w* \| 8 \| 1.0 \|", table)


def test_the_plot_is_a_png(folder):
    pytest.importorskip("matplotlib")
    write_results([row("teacher", 8, 2.1, 0.4)])

    call(evaluate, "--table r.json --plot p.png")

    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------- evaluation
def rows_of_run():
    return results()["default"]["0"]["rows"]


def test_an_evaluation_has_all_rows(folder):
    call(evaluate, f"{FEW} --steps 8")

    rows = [(r["row"], r.get("order")) for r in rows_of_run()]
    assert rows == [
        ("held-out data", None), ("training data", None),
        *[("teacher", "random")] * 5, *[("teacher", "interlaced")] * 5,
        *[("student", "random")] * 5, ("student, guided", "random"),
        *[("autoregressive", None)] * 5]


@pytest.mark.parametrize("T", [1.0, 0.7])
def test_the_few_step_likelihood_of_a_temperature(folder, T):
    """In one step it is a sum of log-probabilities at all masks."""
    model = load("teacher")
    x = corpus.load("corpus").held_out(3, L)

    nll = evaluate.nll_per_token(model, x, 2, steps=1, temperature=T)

    text = x != model.net.config.pad_id
    logits = model.net(model.net.start(text.sum(1))) / T
    assert nll == pytest.approx(F.cross_entropy(logits[text], x[text]).item())


def test_the_students_rows_alone(folder):
    call(evaluate, f"{FEW} --rows student --steps 4")

    names = {r["row"].split(",")[0] for r in rows_of_run()}
    assert names == {"held-out data", "training data", "student"}


def test_packed_text_is_evaluated_without_ends(folder):
    ids = torch.randint(257, (400,))
    corpus.write("packed", [("train", ids), ("val", ids)], "text", "bytes", 0, {})
    for kind in ("teacher", "student", "causal"):
        save(f"out/{kind}.pt", kind, packed=True)

    call(evaluate, f"{FEW} --data packed --steps 4")

    last = rows_of_run()[-1]
    assert last["calls"] == L
    assert last["judge_ppl"] > 1


def test_without_a_causal_model_there_is_no_judge(folder, capsys):
    os.remove("out/causal.pt")

    call(evaluate, f"{FEW} --rows student --steps 4")

    assert "no judge: out/causal.pt" in capsys.readouterr().out
    assert "judge_ppl" not in rows_of_run()[0]


MISTAKES = {
    "--student none.pt": "none.pt does not exist",
    "--student out/teacher.pt": "out/teacher.pt holds a teacher",
    "--student out/long.pt": "out/long.pt, out/causal.pt differ",
    "--data none": "none",
    "--plot p.png": "--table",
    "--data longer": "does not fit out/",
    "--json corpus/meta.json": "meta.json is not an experiment",
    "--table corpus/train.bin": "train.bin is not an experiment",
    "--table none.json": "none.json has no rows"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_named(folder, flags):
    save("out/long.pt", "student", length=20)
    corpus.write_rows("longer", LINES, "signatures", "bytes", 20, {})

    with pytest.raises(ValueError, match=MISTAKES[flags]):
        call(evaluate, f"{ON_CPU} {flags}")


# --------------------------------------------------------------------------------------- the judges
def perplexity_by_hand(texts, net, first):
    """Return the perplexity of lists of tokens under a causal network, one after the other."""
    nats = []
    for ids in texts:
        logits = net(torch.tensor([[first, *ids[:-1]]]))
        nats.append(F.cross_entropy(logits[0], torch.tensor(ids), reduction="none"))
    ppl = torch.cat(nats).mean().exp().item()
    return pytest.approx(ppl, rel=1e-4)


def test_the_causal_judge_by_hand(folder):
    """Each token counts up to and including the first end."""
    x = torch.randint(250, 257, (7, L))
    texts = []
    for ids in x.tolist():
        end = [*ids, 256].index(256)
        texts.append(ids[:end + 1])
    judge = load("causal")

    ppl = evaluate.causal_judge(x, judge, batch=3)

    assert ppl == perplexity_by_hand(texts, judge.net, 257)


@pytest.fixture
def gpt2(monkeypatch):
    """Replace GPT-2's tokens by bytes, and its network by a tiny one; return that."""
    net = network(257, 64, causal=True)
    transformers = mock.MagicMock()
    loaded = transformers.GPT2LMHeadModel.from_pretrained.return_value
    loaded.to().eval.return_value = lambda z: types.SimpleNamespace(logits=net(z))
    encoding = corpus.make_tokenizer("bytes")

    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    corpus.make_tokenizer.cache_clear()
    yield net
    corpus.make_tokenizer.cache_clear()


def test_gpt2_judges_texts_with_their_ends(folder, gpt2):
    texts = ["def f(x):", "def gogo():", ""]
    rows = corpus.encode(texts, "bytes", L).astype("int64")
    x = torch.from_numpy(rows).view(3, L)
    args = evaluate.parse_flags("--judge gpt2 --batch 2".split())

    judge = evaluate.make_judge(args, {}, corpus.load("corpus"), "cpu")

    tokens = [[*text.encode(), 256] for text in texts]
    assert judge(x) == perplexity_by_hand(tokens, gpt2, 256)


def packed(tokenizer, framed=False):
    return corpus.Corpus("", "text", tokenizer, 0, {}, [], [], framed)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_gpt2_judges_all_tokens_of_passages(gpt2, tokenizer):
    x = torch.randint(97, 110, (4, 64))

    tokens, counted = evaluate.gpt2_tokens(x, packed(tokenizer))

    assert torch.equal(tokens, x)
    assert counted.all()


def test_gpt2_counts_no_end_of_framed_passages(gpt2):
    x = torch.tensor([[256, 5, 256, 7, 256]])

    tokens, counted = evaluate.gpt2_tokens(x, packed("gpt2", framed=True))

    assert tokens.tolist() == [[5, 256, 7, 256]]
    assert counted.tolist() == [[True, False, True, False]]


# ---------------------------------------------------------------------------------------- ablation
ABLATE = f"a.json {ON_CPU} --num 4 --seeds 0 --teacher out/teacher.pt".split()
ABLATE.append(f"--flags={STUDENT}")


@pytest.fixture
def ablation(folder, monkeypatch):
    """Shorten the plan, make its runs in this process and return the list of their commands."""
    commands = []

    def run(command):
        commands.append(command)
        code = distill.main(command[2:])
        return types.SimpleNamespace(returncode=code)

    rows = {"none": "--K 1", "default": "", "default at temperature .95": ""}
    monkeypatch.setattr(ablate, "ROWS", rows)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_rows_that_differ_in_their_writing_alone_share_a_run(ablation):
    ablate.main(ABLATE)

    assert [command.count("--K") for command in ablation] == [1, 0]
    rows = results("a.json")
    assert rows["default"] != rows["default at temperature .95"]


def test_an_ablation_goes_on_where_it_was(ablation):
    for label in ("default", "default at temperature .95"):
        common.add_run("a.json", label, 0, {"flags": {}})

    ablate.main(ABLATE)

    assert [command.count("--K") for command in ablation] == [1]


@pytest.mark.parametrize("flags", ["", "--bf16", "--no-bf16"])
def test_a_run_computes_as_its_measures_do(flags):
    args = bench.parse_flags(["training", *flags.split()])

    assert common.machine_flags(args) == ["--device", "auto", *flags.split()]


def test_the_ablation_in_git_has_a_table(capsys):
    ablate.print_table(results(f"{HERE}/results/ablation.json"))

    assert "| default | " in capsys.readouterr().out


@pytest.mark.parametrize("flags", ablate.ROWS.values())
def test_the_flags_of_the_ablation_exist(flags):
    distill.parse_flags(flags.split())


# ------------------------------------------------------------------------------- the other commands
@pytest.mark.parametrize("what, flags, rows", [
    ("models", "", 4), ("training", SMALL, 1), ("distillation", STUDENT, 1)])
def test_speeds_are_measured(folder, monkeypatch, what, flags, rows):
    models = (("student, guided", 8), ("autoregressive", None))
    monkeypatch.setattr(bench, "MODELS", models)
    argv = f"{what} {ON_CPU} --at_once 3 --times 2 --json r.json".split()

    bench.main([*argv, f"--flags={flags}"])

    speeds = [r["tokens_per_s"] for r in rows_of_run()]
    assert len(speeds) == rows
    assert min(speeds) > 0


def test_a_step_takes_what_the_log_says(monkeypatch):
    """The last two of 7 updates, which end after 1, 2, 4, .. 64 seconds, took 48."""
    rows = [{"seconds": 2 ** k} for k in range(7)]
    ckpt = {"flags": {"batch": 3}, "config": vars(model.Config(length=L)), "log": rows}
    monkeypatch.setattr(train_teacher, "main", lambda argv: None)
    monkeypatch.setattr(bench, "load", lambda *_: (ckpt, None))
    args = bench.parse_flags(["training", "--times", "2"])

    row, = bench.bench_training(args, torch.device("cpu"), None)

    assert row["ms"] == 24000
    assert row["tokens_per_s"] == 3 * L / 24


def test_the_operations_of_a_step_are_those_that_torch_counts():
    config = model.Config(vocab_size=100, length=16, n_layer=2, n_head=2, n_embd=32)
    net = model.Denoiser(config)
    z = torch.zeros(4, 16, dtype=torch.long)
    half = torch.arange(16).expand(4, 16) % 2 == 0

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(z, half).sum().backward()

    assert bench.training_flops(vars(config), 4) == counter.get_total_flops()


def test_a_profile_is_written(folder):
    argv = f"training {ON_CPU} --times 1 --profile p.txt".split()

    bench.main([*argv, f"--flags={SMALL}"])

    assert "aten::addmm" in (folder / "p.txt").read_text()


def test_both_samplers_are_timed():
    config = model.Config(11, 8, 1, 2, 8)

    rows = bench.bench_sampler(None, torch.device("cpu"), False, config)

    assert [r["steps"] for r in rows] == [8, 64]
    assert min(r["ratio"] for r in rows) > 0


def test_the_orders_are_drawn(folder):
    pytest.importorskip("matplotlib")

    call(orders, "a.png")

    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------ the shell scripts
class Parsed(Exception):
    pass


def parse(script, argv, monkeypatch):
    """Return the flags of a command, and stop it once it has read them."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(p, argv=None):
        raise Parsed(real(p, argv))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        script.main(argv)
    return found.value.args[0]


@pytest.mark.parametrize("line, toy", [
    ("reproduce.sh signatures", ""), ("reproduce.sh text a.txt", ""),
    ("reproduce.sh proteins a.txt", ""), ("gpu.sh a.txt", ""), ("gpu.sh a.txt", "1")])
def test_the_shell_scripts_give_flags_that_exist(tmp_path, monkeypatch, line, toy):
    """They run with a `python` that only notes its arguments."""
    script, *words = line.split()
    monkeypatch.chdir(tmp_path)
    os.mkdir("experiments")
    shutil.copy(f"{HERE}/{script}", "experiments")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@" >> said\necho >> said\n')
    python.chmod(0o755)
    (tmp_path / "a.txt").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TOY", toy)

    command = ["bash", f"experiments/{script}", *words]
    subprocess.run(command, check=True, capture_output=True)

    said = (tmp_path / "said").read_text()
    for command in said.splitlines():
        name, *argv = command.removeprefix("-m\t").split("\t")[:-1]
        name = name.removesuffix(".py")
        if name in ("-", "pytest"):
            continue
        args = parse(importlib.import_module(name), argv, monkeypatch)
        if name == "experiments.bench" and args.flags:
            script = {"training": train_teacher, "distillation": distill}[args.what]
            parse(script, args.flags.split(), monkeypatch)

"""test_more.py - SDTT, the ablation, the benchmarks and the animation; 3 tokens, or tiny models."""
import argparse
import copy
import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import didi
import distill
import model
import train_teacher
from data import command, corpus, memory
from experiments import ablate, animate, bench, common, evaluate, mdlm, sdtt, table
from test_didi import CONFIG, check_law

torch.set_num_threads(1)
V, MASK, L = 3, 3, 2
Z = torch.cartesian_prod(torch.arange(V + 1), torch.arange(V + 1))  # every state, (S, L)
LINES = [f"def f{i}(a, b={i}):" for i in range(80)]
SMALL = ["--device", "cpu", "--data", "corpus"]
TEACHER = [*SMALL, "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--batch", "8",
           "--updates", "2", "--warmup", "1"]
STUDENT = ["--groups", "2", "--G", "2", "--disc_warmup", "1", "--disc_blocks", "1",
           "--updates", "2", *SMALL]


# -------------------------------------------------------------------------------- a world to count
def index(z):
    """The row of each state z (.., L) in Z."""
    return z[..., 0] * (V + 1) + z[..., 1]


def lookup(table):
    """A denoiser with these logits (S, L, V), its head passes them on; .seen: states asked for."""
    def denoiser(z, where=None):
        denoiser.seen.append(z)
        if where is None:
            return table[index(z)]
        return table[index(z)][where]
    denoiser.hidden, denoiser.head, denoiser.seen = denoiser, lambda logits: logits, []
    denoiser.in_parts = lambda function, *rows: function(*rows)
    return denoiser


def masks(n):
    return torch.full((n, L), MASK)


def denoising(table, t, s):
    """The exact law of z_s given z_t, (S, S): a mask stays with probability s/t."""
    same, moves = F.one_hot(Z).float(), table.softmax(-1) * (1 - s / t)
    moves = F.pad(moves, (0, 1), value=s / t)
    q = torch.where((Z == MASK)[..., None], moves, same)  # (S, L, V + 1)
    return q[:, torch.arange(L), Z].prod(-1)


def chain(table, steps):
    """Law (S,) of what `steps` steps make of two masks."""
    law = F.one_hot(index(masks(1)[0]), len(Z)).float()
    for t, s in zip(didi.time_grid(steps)[:-1], didi.time_grid(steps)[1:]):
        law = law @ denoising(table, t, s)
    return law


def exact_table():
    """Logits (S, L, V) of the exact denoiser of texts whose two tokens like to be equal."""
    p = (4.0 * (Z[:, 0] == Z[:, 1]) + 1.6 * (Z == 0).sum(-1)).exp() * (Z != MASK).all(-1)
    agrees = ((Z[:, None] == Z) | (Z[:, None] == MASK)).all(-1).float()  # (S, S)
    one_hot = F.one_hot(Z)[..., :V].float()
    return torch.einsum("zx,x,xlv->zlv", agrees, p / p.sum(), one_hot).clamp(min=1e-20).log()


# -------------------------------------------------------------------------------------------- SDTT
def test_sdtt_target_comes_from_the_step_that_reveals():
    """Each possible pair of targets of two masks, with its probability."""
    torch.manual_seed(0)
    table, n, t, dt = torch.randn(16, L, V), 40000, 0.8, 0.5
    log_p, times = table.log_softmax(-1), torch.full((n,), t)
    target = sdtt.sdtt_target(lookup(table), masks(n), times, torch.full((n,), dt), MASK)
    first = denoising(table, t, t - dt / 2)[-1]  # law of the state after the first step, (S,)
    possible = torch.where((Z == MASK)[..., None], log_p, log_p[-1]).flatten(1)
    kinds, kind = torch.unique(possible, dim=0, return_inverse=True)
    law = torch.zeros(len(kinds)).index_add(0, kind, first)
    near = torch.cdist(target.view(n, L * V), kinds,
                       compute_mode="donot_use_mm_for_euclid_dist")
    assert near.min(1).values.max() < 1e-4
    assert len(kinds) == 7  # nothing (or all) revealed by the first step, or either: 1 + 3 + 3
    check_law(near.argmin(1), law)


def test_sdtt_target_leaves_visible_tokens_out():
    table, z = torch.randn(16, L, V), torch.tensor([[MASK, 1], [0, 2]])
    target = sdtt.sdtt_target(lookup(table), z, torch.ones(2), torch.ones(2), MASK)
    assert torch.allclose(target, table.log_softmax(-1)[index(z[:1])][0, :1])


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_sdtt_is_at_rest_at_the_mean_of_the_targets(kind):
    """Forward KL: arithmetic, an exact teacher's own prediction. Reverse KL: geometric."""
    torch.manual_seed(0)
    teacher, n = exact_table(), 100000
    log_p, law = teacher.log_softmax(-1), denoising(teacher, 1.0, 0.5)[-1]
    log_target = torch.where((Z == MASK)[..., None], log_p, log_p[-1])  # (S, L, V)
    arithmetic = torch.einsum("s,slv->lv", law, log_target.exp())
    geometric = torch.einsum("s,slv->lv", law, log_target).softmax(-1)
    assert torch.allclose(arithmetic, log_p[-1].exp(), atol=1e-5)
    assert (geometric - arithmetic).abs().max() > 0.03
    z, one = masks(n), torch.ones(n)
    target = sdtt.sdtt_target(lookup(teacher), z, one, one, MASK)

    def slope(p):  # of the loss at the student p (L, V), by its logits
        student = p.log().expand(16, L, V).clone().requires_grad_()
        log_p_x = didi.predict(lookup(student), z, z == MASK)
        loss = didi.kl_to_teacher(log_p_x, target, kind).mean()
        return torch.autograd.grad(loss, student)[0].abs().max()
    slopes = {"forward": slope(arithmetic), "reverse": slope(geometric)}
    assert slopes.pop(kind) < 0.1 * sum(slopes.values())


# ------------------------------------------------------------------------------- the usual sampler
@pytest.mark.parametrize("steps", [1, 4])
def test_the_usual_sampler_draws_from_the_same_law(steps):
    torch.manual_seed(0)
    table = torch.randn(16, L, V)
    law = chain(table, steps)
    check_law(index(bench.usual_sample(lookup(table), masks(20000), steps, MASK)), law)
    check_law(index(didi.sample(lookup(table), masks(20000), steps, MASK)[0]), law)


# ------------------------------------------------------------------------------------- the scripts
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus of 80 lines, a teacher, a causal model and a student."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    splits = {"train": LINES[:60], "val": LINES[60:]}
    pieces = ((split, corpus.encode(lines, "bytes", 24)) for split, lines in splits.items())
    corpus.write("corpus", pieces, "signatures", "bytes", 24, {})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert not train_teacher.main(TEACHER) and not train_teacher.main([*TEACHER, "--causal"])
    assert not distill.main(STUDENT)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.chdir(here)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it as the working directory; Ctrl-C is as it was afterwards."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "work"
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------------- rollouts
def test_rollout_keeps_each_rows_own_levels():
    """The share of masks in each row's completions against its levels."""
    levels = torch.tensor([[1.0, 1.0], [0.8, 0.4], [0.1, 0.3], [0.0, 0.0]])
    net = lookup(torch.zeros(16, L, V))
    didi.rollout(net, masks(2), levels, MASK, 5000)
    for level, z in zip(levels[1:], net.seen[1:]):
        share = (z == MASK).float().view(2, -1).mean(1)
        assert ((share - level).abs() < 5 * (0.25 / 10000) ** 0.5).all()


@pytest.mark.parametrize("vocab_size", [2 ** 22, 2 ** 24])  # all rows at once, or two at a time
def test_in_parts_draws_once_and_has_the_gradients_of_the_whole(vocab_size):
    """Draws within: backward's second computation must meet the same tokens."""
    h = torch.randn(7, V, requires_grad=True)
    compare = functools.partial(didi.draw_and_compare, student=lookup(None), teacher=None,
                                kl_kind="reverse", num=2)
    net = types.SimpleNamespace(config=model.Config(vocab_size))
    tokens, log_p, _ = model.Denoiser.in_parts(net, compare, h)
    torch.rand(5)  # others draw in between
    ours, = torch.autograd.grad(log_p.sum(), h)
    assert torch.allclose(ours, F.one_hot(tokens, V).sum(1) - 2 * h.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_coupled_time_masks_both_sides_at_the_rollouts_tau(folder, monkeypatch, K):
    """In 200 updates of 3 groups: the levels handed on, and the law of the masks they make."""
    args, _ = distill.parse_flags([*STUDENT, "--K", str(K), "--groups", "3"])
    device, bf16 = command.setup(args)
    teacher, data = distill.load_teacher(args, device, bf16)
    nets, forward_mask = distill.networks(args, teacher), didi.forward_mask
    calls, hidden, taus = [], [], []

    def draw_levels(t, *how):
        drawn = levels(t, *how)
        taus.append(drawn[1].repeat_interleave(args.G))
        return drawn

    def mask(x, t, *ids):
        z = forward_mask(x, t, *ids)
        calls.append((t, (z == ids[0]).sum(1) / (x != ids[1]).sum(1)))
        return z
    levels = didi.draw_levels
    monkeypatch.setattr(didi, "draw_levels", draw_levels)
    monkeypatch.setattr(didi, "forward_mask", mask)
    reference = distill.make_reference(args, data, teacher)
    for _ in range(200):
        distill.update(args, nets, teacher, reference, 3, False)
        ((t, share), (t_ref, share_ref)), tau = calls[-2:], taus[-1]
        assert torch.equal(t, tau) and torch.equal(t_ref, tau[:len(t_ref)])
        hidden.append(torch.cat((share - tau, share_ref - tau[:len(t_ref)])))
    hidden = torch.cat(hidden)  # a share of masks has the mean tau
    assert hidden.mean().abs() < 4 * hidden.std() / len(hidden) ** 0.5
    args.coupled = False
    distill.update(args, nets, teacher, reference, 3, False)
    assert not (calls[-2][0] == taus[-1]).any() and torch.equal(calls[-1][0], calls[-2][0][:4])


def test_sdtt_from_teacher_to_student(folder, monkeypatch):
    flags = [*SMALL, "--batch", "8", "--rounds", "4", "2", "--updates", "5"]
    assert not sdtt.main(flags)
    ckpt, net = model.load_checkpoint("out/sdtt.pt", ("student",))
    rows = [json.loads(line) for line in open("out/sdtt.jsonl")]
    assert [row["steps"] for row in rows] == [4, 4, 4, 2, 2]  # rounds begin at updates 0 and 2.5
    assert ckpt["step"] == 5 and "discriminator" not in ckpt and ckpt["flags"]["data"] == "corpus"
    teacher = model.load_checkpoint("out/teacher.pt", ("teacher",))[1]
    changed = zip(net.parameters(), teacher.parameters())
    assert any(not torch.equal(ours, theirs) for ours, theirs in changed)
    stop = iter([0, 0, 130, 130])
    monkeypatch.setattr(sdtt, "stop_requested", lambda: lambda: next(stop))
    assert sdtt.main(flags) == 130
    assert model.load_checkpoint("out/sdtt.pt", ("student",))[0]["step"] == 2


def test_sdtt_refuses_rounds_without_updates(folder):
    with pytest.raises(ValueError, match="--rounds"):
        sdtt.main([*SMALL, "--updates", "3"])


def test_ablation_resumes_and_prints_a_table(folder, monkeypatch, capsys):
    for seed in (0, 1):
        shutil.copy("out/teacher.pt", f"{seed}.pt")
    rows = {"none": "--paper --K 1 --kl 0 --groups 2 --reference data", "+ ism": "--K 2"}
    monkeypatch.setattr(ablate, "CUMULATIVE", rows)
    monkeypatch.setattr(ablate, "LEFT_OUT", {})
    monkeypatch.setattr(ablate, "ONE_CHANGE", {"default": "", "default, guided sampler": ""})
    made = []

    def run(command):  # in this process: quicker
        made.append(command)
        assert command[:2] == [sys.executable, distill.__file__]
        return type("Done", (), {"returncode": distill.main(command[2:])})
    monkeypatch.setattr(ablate.subprocess, "run", run)
    argv = ["a.json", "--teacher", "{seed}.pt", "--seeds", "0", "1", "--num", "4",
            "--device", "cpu", "--", *STUDENT]
    assert not ablate.main(argv)
    assert len(made) == 6  # 4 rows with 2 seeds, but the guided sampler shares a run
    results = json.load(open("a.json"))
    assert list(results) == ["none", "+ ism", "default", "default, guided sampler"]
    flags = {label: results[label]["1"]["flags"] for label in results}
    assert (flags["none"]["K"], flags["+ ism"]["K"], flags["+ ism"]["kl"]) == (1, 2, 0)
    assert {"post@32", "judge_ppl@4"} <= set(results["none"]["0"]) and flags["default"]["seed"] == 1
    del results["default"]["1"]
    json.dump(results, open("a.json", "w"))
    assert not ablate.main(argv)
    assert len(made) == 7 and len(json.load(open("a.json"))["default"]) == 2
    table = capsys.readouterr().out
    assert all(f"| {label} | 2 |" in table for label in results) and "+-" in table


def test_a_run_that_fails_stops_the_ablation(folder):
    with pytest.raises(ValueError, match="failed"):
        ablate.main(["a.json", "--teacher", "no/teacher.pt", "--device", "cpu"])
    assert json.load(open("a.json")) == {}


def test_all_flags_of_the_ablation_exist():
    for rows in (ablate.CUMULATIVE, ablate.LEFT_OUT, ablate.ONE_CHANGE):
        assert all(distill.parse_flags(flags.split()) for flags in rows.values())


def test_rows_of_the_ablation_leave_out_one_component_each():
    whole = vars(distill.parse_flags(["--paper"])[0])
    rows = [vars(distill.parse_flags(flags.split())[0]) for flags in ablate.LEFT_OUT.values()]
    changes = [{name for name in whole if row[name] != whole[name]} for row in rows]
    *before, norm, guided = ablate.CUMULATIVE.values()  # all but grouped normalisation, and all
    for flags in (before, [*before, norm, guided]):
        row = vars(distill.parse_flags(" ".join(flags).split())[0])
        changes.append({name for name in whole if row[name] != whole[name]})
    assert changes == [{"K"}, {"coupled"}, {"w"}, {"pi"}, {"kl", "entropy"}, {"group_norm"}, set()]


TARGETS = ("signatures", "text a.txt", "text_speed a.txt", "proteins a.txt", "prepare a.txt")


@pytest.mark.parametrize("line, toy", [
    *((f"reproduce.sh {target}", "") for target in TARGETS), ("gpu.sh a.txt", ""),
    ("gpu.sh a.txt", "1")])
def test_the_shell_scripts_give_flags_that_exist(tmp_path, monkeypatch, line, toy):
    """Run with a `python` that only notes what it is given; all of it is parsed then."""
    for name in ("reproduce.sh", "gpu.sh"):
        (tmp_path / "experiments").mkdir(exist_ok=True)
        shutil.copy(os.path.join(os.path.dirname(__file__), name), tmp_path / "experiments")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\t" "$@" >> said\necho >> said\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "a.txt").touch()
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOY": toy}
    subprocess.run(["bash", *f"experiments/{line}".split()], check=True, cwd=tmp_path,
                   env=os.environ | more, capture_output=True)
    said = [line.split("\t")[:-1] for line in (tmp_path / "said").read_text().splitlines()]
    assert said

    def parse(p, argv=None):
        real(p, argv)
        raise InterruptedError
    real = argparse.ArgumentParser.parse_args
    for words in said:
        start = words[:2] if words[0] == "-m" else words[:1]
        name, argv = start[-1].removesuffix(".py"), words[len(start):]
        if name in ("-", "pytest"):
            continue
        script = importlib.import_module(name)
        if name in ("experiments.bench", "experiments.ablate"):  # what is over is another's
            args, argv = script.parse_flags(argv)
            script = train_teacher if getattr(args, "what", "") == "training" else distill
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            script.main(argv)


@pytest.mark.parametrize("argv", [["training", *TEACHER], ["distillation", *STUDENT]])
def test_bench_of_training(folder, capsys, argv):
    argv = [*argv, "--times", "2", "--json", "b.json"]
    assert not bench.main(argv) and not bench.main([*argv, "--label", "other"])
    out, results = capsys.readouterr().out, json.load(open("b.json"))
    assert "TFLOP/s, an unknown share of its peak" in out
    assert list(results) == ["default", "other"]
    row, = results["default"]["0"]["rows"]
    assert row["ms"] > 0 and row["tokens_per_s"] > 0 and row["flops"] > 0
    assert row["share_of_peak"] is None


def test_bench_of_text_needs_no_text():
    args, _ = train_teacher.parse_flags(["--size", "mini", "--n_layer", "1", "--batch", "2"])
    args.device = "cpu"
    _, tokens = bench.teacher_step(args, torch.device("cpu"), False)
    assert tokens == 2 * 256


def test_bench_counts_the_flops_of_a_product(monkeypatch):
    a, b, clock = torch.randn(64, 128), torch.randn(128, 256), iter([0.0, 2.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    row = bench.measure(lambda: a @ b, 64, torch.device("cpu"), times=20)
    assert row["flops"] == pytest.approx(2 * 64 * 128 * 256 / 0.1) and row["ms"] == 100
    assert row["tokens_per_s"] == pytest.approx(640)


def test_bytes_of_tensors_are_counted_as_by_hand():
    """Of 4 bytes each: views, and what is written in place, count once; what is freed no more."""
    old, weight = torch.zeros(1000), torch.ones(1000, requires_grad=True)
    with bench.TensorBytes() as count:
        a = old + 1  # 4,000 bytes
        rows = a.view(10, 100)[2:]
        rows.mul_(2)
        old.add_(1)
        del a  # but for `rows`, which hold all of it
        assert (count.live, count.peak) == (4000, 4000)
        both = torch.cat((rows.flatten(), old))  # 4 * (800 + 1000) more
        assert (count.live, count.peak) == (11200, 11200)
        del rows
        assert len(both[::2].clone()) == 900 and count.peak == 11200  # 7200 + 3600 are less
        assert count.live == 7200
        del both
        weight.exp().sum().backward()  # exp, its sum and the gradient of that, 1, and of `weight`
    assert (count.live, count.peak) == (4000, 11200)
    with bench.TensorBytes() as count:
        weight.exp().sum().backward()  # the new gradient is added in place to the old one
    assert (count.live, count.peak) == (0, 8008)


@pytest.mark.parametrize("flags", ["--paper", "", "--K 1", "--disc_blocks 0", "--kl .1 --K 2"])
@pytest.mark.parametrize("shape, part, most", [
    ((31, 128, 6, 2, 64), 999, 1.25), ((5000, 32, 1, 1, 8), 60, 3), ((5000, 32, 1, 1, 8), 999, 99)])
def test_the_estimate_of_an_updates_memory_is_low(monkeypatch, flags, shape, part, most):
    """Of blocks by a quarter at most, of (n, V) tables in parts less than threefold."""
    monkeypatch.setattr(model.Config, "part", part)
    words = [*flags.split(), "--groups", "2"]
    args, config = distill.parse_flags(words)[0], model.Config(*shape)
    counted = bench.update_peak(args, config, False, torch.device("cpu"), 0.98)
    assert 1 < counted / memory.update_bytes(args, config, False, 2 * args.G) < most


def test_the_papers_scale_is_its_objective_with_the_published_settings():
    words = ("--paper", "--paper_scale", "--paper_scale --lr 3e-6 --accumulate 2 --no-w --groups 8")
    paper, scale, given = (vars(distill.parse_flags(line.split())[0]) for line in words)
    assert {name: value for name, value in scale.items() if value != paper[name]} == {
        "paper": False, "paper_scale": True, "lr": 1e-6, "disc_lr": 1e-5, "disc_blocks": 4,
        "disc_warmup": 0, "ema": 0.999, "updates": 10_000, "reference": "data", "groups": 4,
        "eval_every": 500, "accumulate": 0}
    assert scale["G"] == 4 and scale["K"] == 2 and scale["beta"] == (1, 1)
    assert {name: value for name, value in given.items() if value != scale[name]} == {
        "lr": 3e-6, "accumulate": 2, "w": False, "groups": 8}
    both = vars(distill.parse_flags(["--paper_scale", "--paper"])[0])
    assert both == scale | {"paper": True}


@pytest.mark.parametrize("gb, bf16, parts", [
    (80, True, 1), (24, True, 1), (16, True, 2), (9, True, 4), (80, False, 1), (24, False, 2)])
def test_parts_are_chosen_by_the_memory_that_is_free(monkeypatch, capsys, gb, bf16, parts):
    """Six times .65 GB of weights, .4 of tables; 16 sequences of 1024 tokens of 19 blocks' 768 * 40
    bytes, or 76, are 9.6 GB, or 18.2: 13.9, 9.1, 6.7 GB in 1, 2, 4 parts, or 22.5, 13.4, 8.8."""
    monkeypatch.setattr(memory, "free", lambda device: gb * 1e9)
    args, _ = distill.parse_flags(["--paper_scale"])
    for _ in range(2):  # what is settled stays, and is not told again
        memory.fit_update(args, mdlm.PUBLISHED, torch.device("cpu"), bf16)
        assert args.accumulate == parts
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--accumulate {parts}: ") and f"{gb / 1.024 ** 3:.3g} are free" in line
    args.accumulate = 3
    with pytest.raises(ValueError, match="--groups must be a multiple of --accumulate"):
        memory.fit_update(args, mdlm.PUBLISHED, torch.device("cpu"), bf16)
    monkeypatch.setattr(memory, "free", lambda device: 6e9)
    args.accumulate = 0
    with pytest.raises(ValueError, match="lower (the size of the t|--groups, or raise --a)"):
        memory.fit_update(args, mdlm.PUBLISHED, torch.device("cpu"), bf16)


def test_sequences_at_once_and_parts_are_bounded_in_bytes(monkeypatch):
    """What is written at once has 4 GiB of float64 at most if all is revealed in a step, a table of
    log-probabilities 128 MiB, a judge's logits 1 GiB: at MDLM's size and at the default's."""
    for config in (mdlm.PUBLISHED, model.Config()):
        V, L = config.vocab_size, config.length
        assert 0 <= 2 ** 32 - 8 * V * L * config.at_once < 8 * V * L
        assert 0 <= 2 ** 27 - 4 * V * config.part < 4 * V
        x = torch.zeros(10 ** 5, 1).expand(-1, L)
        sizes = {len(part) for part in evaluate.parts_of(x, 10 ** 5, V)}
        assert 0 <= 2 ** 30 - 4 * V * L * max(sizes) < 4 * V * L
        assert {len(part) for part in evaluate.parts_of(x, 2, V)} == {2}
    net = model.Denoiser(model.Config(257, 6, 1, 1, 4, pads=True))
    seen = []

    def sample(denoiser, z, *more):
        seen.append(len(z))
        return z, torch.zeros(len(z))
    monkeypatch.setattr(didi, "sample", sample)
    monkeypatch.setattr(model.Config, "at_once", 3)
    common.write({"denoiser": net, "config": net.config}, 8, 2)
    assert seen == [3, 3, 3, 2]  # the first one warms up
    seen.clear()
    flags = "--reference teacher --groups 2 --G 2 --disc_warmup 1 --updates 1"
    args = distill.parse_flags(flags.split())[0]
    distill.make_reference(args, None, net)
    assert seen == [3, 3, 3]


def test_bench_of_memory(folder, monkeypatch, capsys):
    monkeypatch.setattr(model.Config, "at_once", 3)
    tiny = model.Config(50, 16, 1, 1, 8)
    monkeypatch.setattr(bench.bench_memory, "__defaults__", (tiny, tiny))
    argv = ["memory", "--groups", "1", "--G", "2", "--device", "cpu", "--json", "m.json"]
    assert not bench.main(argv)
    rows = json.load(open("m.json"))["default"]["0"]["rows"]
    assert [row["tau"] for row in rows[:3]] == [0.02, 0.5, 0.98]
    assert all(row["bytes"] == row["units"] * 4 * 50 * 2 * 16 for row in rows[:3])
    total, (few, many) = rows[-3], (row["sequences"] for row in rows[-2:])
    left = 24e9 - total["bytes"] - (few - 2) * total["sequence"]  # "bytes" are with 2 sequences
    assert 0 <= left < total["sequence"]
    assert many - few == pytest.approx(56e9 / total["sequence"], abs=1)
    out = capsys.readouterr().out
    assert f"24 GB hold {few} sequences in one part" in out and "times the estimate" in out


def test_bench_of_models(folder, capsys):
    assert not bench.main(["models", "--device", "cpu", "--at_once", "3", "--json", "b.json"])
    rows = json.load(open("b.json"))["default"]["0"]["rows"]
    found = [(row["row"], row["steps"], row["batch"]) for row in rows]
    assert found[:3] == [("teacher", 256, 1), ("teacher", 256, 3), ("teacher", 1024, 1)]
    assert len(rows) == 12 and all(row["nfe"] <= 24 for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["latency"] > 0 for row in rows)


def test_bench_of_the_sampler(capsys):
    config = model.Config(11, 8, 1, 2, 8)
    rows = bench.bench_sampler(torch.device("cpu"), False, config, first=2)
    assert [row["steps"] for row in rows] == [8, 64, 1024]
    assert all(row["usual_s"] > 0 and row["reveal_first_s"] > 0 for row in rows)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_animation(folder):
    assert not animate.main(["a.gif", "--device", "cpu", "--lines", "2", "--seconds", "1",
                             "--fps", "2"])
    assert open("a.gif", "rb").read(6) in (b"GIF89a", b"GIF87a")


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        animate.main(["a.gif"])


# ------------------------------------------------------------- tokens that are not drawn yet
def test_soft_tokens_that_are_one_hot_are_tokens():
    """Logits of one-hot soft tokens against those of the tokens; in bfloat16 nearly so."""
    D, z = model.Discriminator(model.Denoiser(CONFIG), 1).eval(), torch.randint(0, 8, (4, 5))
    where = (z != 7) & (torch.rand(4, 5) < 0.5)
    probs = F.one_hot(z[where], 7).float().requires_grad_()
    soft = D(z.masked_fill(where, 0), where, probs)
    assert where.any() and torch.allclose(soft, D(z), atol=1e-6)
    assert torch.autograd.grad(soft.sum(), probs)[0].abs().max() > 0
    D.body.bf16 = True
    assert 0 < (D(z, where, probs) - soft).abs().max() < 0.1


# ----------------------------------------------------------------- the loop of distill.py, by hand
WAYS = ["--groups 3", "--groups 5 --G 3 --K 2 --w --pi --beta 2 3 --kl_kind forward --kl 2",
        "--groups 3 --K 1 --no-group_norm --w --eps .01 --power .5",
        "--groups 4 --G 3 --no-coupled --w --pi --power 0 --eps .01",
        "--groups 4 --accumulate 2 --pi --kl 0"]
PAD, HIDDEN = 256, 257  # of bytes


def watch(monkeypatch, module, *names):
    """{name: [(arguments, result) of each call]} of these functions of a module, from now on."""
    calls = {name: [] for name in names}

    def watched(name, real, *args):
        calls[name].append((args, real(*args)))
        return calls[name][-1][1]
    for name in names:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, functools.partial(watched, name, real))
    return calls


def begin(*flags):
    """Flags, corpus, teacher, and networks whose student and discriminator have moved."""
    fixed = "--no-bf16 --smoothing .1 --entropy .3 --kl .1".split()
    args, _ = distill.parse_flags([*STUDENT, *fixed, *flags])
    teacher, data = distill.load_teacher(args, *command.setup(args))
    nets = distill.networks(args, teacher)
    with torch.no_grad():
        for p in [*nets["model"].parameters(), *nets["disc"].score.parameters()]:
            p += 0.2 * torch.randn_like(p)
    return args, data, teacher, nets


def disc_by_hand(disc, z_ref, z, e):
    """Its loss, and the rewards r_ref (n,) and r (B,), row by row, over the texts alone. The real
    one was called for both halves, then for the rest, and iterates its spectral norms each time."""
    n, loss = len(z_ref), 0
    logits = [*disc(torch.cat((z_ref, z[:n]))), *disc(z[n:]).detach()]
    texts = [logit[row != PAD] for row, logit in zip([*z_ref, *z], logits)]
    for i, logit in enumerate(texts[:2 * n]):
        label = [1 - e, e][i // n]
        p = logit.sigmoid()
        loss = loss - (label * p.log() + (1 - label) * (1 - p).log()).mean() / (2 * n)
    r = torch.stack([logit.detach().mean() for logit in texts])
    return loss, r[:n], r[n:]


def student_by_hand(args, student, teacher, states, weights):
    """Policy loss, KL and entropy, from the states (B, L) of a rollout; weights (B,)."""
    log_prob, kl, entropy, x = 0, 0, 0, states[-1]
    for before, after in zip(states[:-1], states[1:]):
        log_p, log_q = (net(before).log_softmax(-1) for net in (student, teacher))
        token = log_p.gather(2, after.clamp(max=PAD - 1)[..., None])[..., 0]
        log_prob = log_prob + (token * ((before == HIDDEN) & (after != HIDDEN))).sum(1)
        p, q = log_p[before == HIDDEN], log_q[before == HIDDEN]  # (n, V)
        forward, reverse = (q.exp() * (q - p)).sum(1).mean(), (p.exp() * (p - q)).sum(1).mean()
        kinds = {"forward": forward, "reverse": reverse}
        kl = kl + kinds[args.kl_kind] / args.K * (args.kl > 0)  # that of weight 0 is not computed
        entropy = entropy - (p.exp() * p).sum(1).mean() / args.K
    return -(weights * log_prob).mean() * len(x) / (x != PAD).sum(), kl, entropy


def weights_by_hand(args, r, level, pi):
    """A * w (B,): the advantages of rewards r (B,) at these levels."""
    A = r
    if args.power:
        A = ((args.power * r).exp() - 1) / args.power
    if args.group_norm:
        groups = [(g - g.mean()) / (g.var(correction=0).sqrt() + args.eps) for g in A.split(args.G)]
        A = torch.cat(groups).clamp(-3, 3)
    if args.w:
        A = A * torch.tensor([min(max(1 / t, 0.1), 10) for t in level.tolist()])
    if args.pi and args.coupled:
        A = A / pi
    return A


def part_by_hand(args, nets, teacher, disc, drawn):
    """Both losses of a part of an update, and the row it logs; asserts what was asked of `drawn`:
    (arguments, result) of the teacher's start, draw_levels, rollout, then of all that the student
    was shown in it, (B, L) each, and twice of forward_mask."""
    (_, z_1), (asked, (grid, tau, pi)), (roll, (x, _, _)), shown, (of, z), (of_ref, z_ref) = drawn
    groups, G, n = len(z_1), args.G, math.ceil(len(z_1) / 2) * args.G
    assert asked[0].tolist() == [1.0] * groups and asked[1:] == (args.K, *args.beta)
    assert roll[0] is nets["model"] and roll[1] is z_1 and roll[2] is grid and roll[4] == G
    assert of[0] is x and of[2:] == of_ref[2:] == (HIDDEN, PAD)
    assert len(of_ref[0]) == n and torch.equal(of_ref[1], of[1][:n])
    tau, pi = (torch.stack([value[b // G] for b in range(groups * G)]) for value in (tau, pi))
    level = of[1]
    assert torch.equal(level, tau) == args.coupled and torch.equal(level[::G], level[G - 1::G])
    disc_loss, r_ref, r = disc_by_hand(disc, z_ref, z, args.smoothing)
    assert shown[0] is z_1 and len(shown) == args.K
    states = [z_1.repeat_interleave(G, 0), *shown[1:], x]
    terms = student_by_hand(args, nets["model"], teacher, states,
                            weights_by_hand(args, r, level, pi))
    right = (r_ref > 0).float().mean() / 2 + (r < 0).float().mean() / 2
    row = {"disc_loss": disc_loss, "disc_acc": right, "r_ref": r_ref.mean(), "r_student": r.mean(),
           "spread": r.view(groups, G).var(1, correction=0).sqrt().mean()}
    student_loss = terms[0] + args.kl * terms[1] - args.entropy * terms[2]
    return disc_loss, student_loss, row | dict(zip(("policy", "kl", "entropy"), terms))


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("flags", WAYS)
def test_an_update_is_the_algorithm_by_hand(folder, monkeypatch, flags, moving):
    """What update() asks of didi's functions, the gradients it leaves and the row it logs."""
    args, data, teacher, nets = begin(*flags.split())
    disc, found, references = copy.deepcopy(nets["disc"]), {}, []
    calls = watch(monkeypatch, didi, "draw_levels", "rollout", "forward_mask")
    calls |= watch(monkeypatch, teacher, "draw_lengths", "start")
    calls |= watch(monkeypatch, nets["model"], "hidden")

    def descend(net, optimizer):
        found[optimizer] = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        return 7.0

    def reference(n):
        references.append(data.batch(n, 24))
        return references[-1]
    monkeypatch.setattr(distill, "descend", descend)
    row = distill.update(args, nets, teacher, reference, args.groups // args.accumulate, moving)
    starts, levels, rollouts = calls["start"], calls["draw_levels"], calls["rollout"]
    noised, shown = calls["forward_mask"], [z for (z, _), _ in calls["hidden"]]
    assert [id(call[0]) for call, _ in noised[1::2]] == list(map(id, references))
    assert len(starts) == args.accumulate and len(noised) == 2 * args.accumulate
    assert [call for call, _ in starts] == [(lengths,) for _, lengths in calls["draw_lengths"]]
    assert all(log_prob.requires_grad == moving for _, (_, log_prob, _) in rollouts)
    for i, drawn in enumerate(zip(starts, levels, rollouts)):
        drawn += (shown[args.K * i:args.K * (i + 1)],)
        losses = part_by_hand(args, nets, teacher, disc, [*drawn, *noised[2 * i:2 * i + 2]])
        (sum(losses[:1 + moving]) / args.accumulate).backward()
    hand = losses[2] | {"disc_norm": 7.0, "norm": 7.0 * moving}
    numbers = {name: torch.as_tensor(value).item() for name, value in hand.items()}
    absent = set() if moving else {"policy", "kl", "entropy"}
    assert row.keys() == numbers.keys() - absent
    assert row == pytest.approx({name: numbers[name] for name in row}, rel=1e-3, abs=1e-5)
    expected = {nets["disc_opt"]: disc, nets["opt"]: nets["model"]}
    assert list(found) == list(expected)[:1 + moving]
    for optimizer, slopes in found.items():
        ours = [p.grad for p in expected[optimizer].parameters() if p.grad is not None]
        a, b = (torch.cat([slope.flatten() for slope in each]) for each in (slopes, ours))
        assert len(ours) > 5 and (a - b).norm() < 1e-3 * b.norm()


def test_a_step_clips_to_norm_1_and_leaves_no_gradient(monkeypatch):
    """By hand, of gradients longer and shorter than 1, averaged first; with the step's own rate."""
    net, averaged = torch.nn.Linear(2, 1, bias=False), []
    optimizer, weights = torch.optim.SGD(net.parameters(), 0.5), net.weight.detach().clone()

    def average(net):
        averaged.append(net.weight.grad.clone())
        net.weight.grad /= 2
    monkeypatch.setattr(distill, "average_gradients", average)
    for slope, norm in (([6.0, 8.0], 5.0), ([0.6, 0.0], 0.3)):
        net.weight.grad = torch.tensor([slope])
        assert distill.descend(net, optimizer) == pytest.approx(norm)
        weights -= 0.5 * torch.tensor([slope]) / 2 / max(norm, 1)
        assert torch.allclose(net.weight, weights, atol=1e-6) and len(averaged) == 1
        assert net.weight.grad is None
        assert averaged.pop().tolist() == [pytest.approx(slope)]


def test_uncoupled_levels_are_uniform():
    args = distill.parse_flags(["--no-coupled", "--w", "--pi"])[0]
    t, w = distill.reward_levels(args, torch.full((40000,), 0.5), torch.full((40000,), 9.0))
    check_law((t * 10).long(), torch.full((10,), 0.1))
    assert torch.allclose(w, 1 / t.clamp(0.1, 10))


def test_networks_are_copies_and_their_optimisers_adam_without_decay(folder):
    """No weight in common; moments after one step by hand; a weight without gradient stays."""
    args, _, teacher, _ = begin("--disc_blocks", "0")
    nets = distill.networks(args, teacher)
    of = [teacher, nets["model"], nets["ema"], nets["disc"]]
    weights = [p.data_ptr() for net in of for p in net.parameters()]
    assert len(weights) == len(set(weights))
    assert not any(p.requires_grad for net in (teacher, nets["ema"]) for p in net.parameters())
    for net, optimizer in (("model", "opt"), ("disc", "disc_opt")):
        p, q = [p for p in nets[net].parameters() if p.requires_grad][:2]
        p.grad, q.grad = torch.full_like(p, 3.0), torch.zeros_like(q)
        before = q.detach().clone()
        nets[optimizer].step()
        state = nets[optimizer].state[p]
        assert torch.allclose(state["exp_avg"], 0.1 * p.grad)
        assert torch.allclose(state["exp_avg_sq"], 0.01 * p.grad ** 2) and torch.equal(q, before)


def test_the_student_begins_as_the_teacher_at_a_temperature(folder):
    """softmax of its logits over T, average and student alike; the paper's is a copy, bit by bit.

    The teacher and what the discriminator sees of it stay as they are.
    """
    _, data, teacher, _ = begin()
    z = teacher.start(teacher.draw_lengths(8))
    z[:, 0] = data.batch(8, teacher.config.length)[:, 0]
    logits, before = teacher(z), copy.deepcopy(teacher.state_dict())
    assert table.BEGINS == 0.6  # the control without training
    for flags, T in (("", 0.6), ("--temperature 2", 2.0), ("--paper", 1.0)):
        nets = distill.networks(distill.parse_flags(flags.split())[0], teacher)
        for net in (nets["model"], nets["ema"]):
            assert torch.allclose(net(z), logits / T, atol=1e-6)
            assert T != 1 or all(map(torch.equal, net.state_dict().values(), before.values()))
        assert all(map(torch.equal, teacher.state_dict().values(), before.values()))
        assert torch.equal(nets["disc"].body.embed.weight, teacher.embed.weight)


def test_the_reference_is_samples_of_the_teacher_as_many_as_a_short_run_uses(folder, monkeypatch):
    """16 of 3 updates of 2 groups of 2, one of them warm-up; else 2,048. In 64 steps, whole."""
    made, sample = [], didi.sample

    def see(net, z, steps, mask_id):
        assert net is teacher and steps == 64 and (z[z != net.config.pad_id] == mask_id).all()
        made.extend(tuple(row.tolist()) for row in sample(net, z, steps, mask_id)[0])
        return torch.tensor(made[-len(z):]), None
    args, data, teacher, _ = begin("--reference", "teacher", "--updates", "3")
    monkeypatch.setattr(didi, "sample", see)
    x = distill.make_reference(args, data, teacher)(500)
    assert len(made) == 16 and {tuple(row.tolist()) for row in x} == set(made)
    assert not (x == teacher.config.mask_id).any()
    args.updates, counts = 1000, []
    monkeypatch.setattr(didi, "sample", lambda net, z, *_: counts.append(len(z)) or (z, 1))
    distill.make_reference(args, data, teacher)
    assert counts == [256] * 8


def test_learning_rates_are_in_the_measure_of_the_teachers_matrices(folder):
    """Of blocks of size c, whatever else is large: a teacher trained for less has smaller ones."""
    args, _, teacher, _ = begin()
    for p in teacher.parameters():
        torch.nn.init.constant_(p, 99)
    for p in (p for block in teacher.blocks for p in block.parameters() if p.dim() == 2):
        p.data = torch.where(torch.arange(p.numel()).view_as(p) % 2 == 0, 0.3, -0.4)
    for flags, lr, disc_lr in (("", .0006 * .125 ** .5, .006 * .125 ** .5),
                               ("--lr 1e-6", 1e-6, 1e-5), ("--lr 2e-6 --disc_lr 1e-5", 2e-6, 1e-5)):
        args = distill.parse_flags(flags.split())[0]
        nets = distill.networks(args, teacher)
        rates = [nets[name].param_groups[0]["lr"] for name in ("opt", "disc_opt")]
        assert rates == pytest.approx([lr, disc_lr]) and [args.lr, args.disc_lr] == rates


def test_the_loop_warms_up_falls_to_a_tenth_and_averages(folder, monkeypatch):
    """Rates, what moves, the average and when it is looked at; resumed with more updates."""
    seen, tables, argv = [], [], [*STUDENT, "--lr", "1e-3", "--disc_lr", "2e-4", "--ema", ".75"]
    argv += ["--disc_warmup", "3", "--eval_every", "2"]

    def update(args, nets, teacher, reference, groups, moving):
        rates = [nets[name].param_groups[0]["lr"] for name in ("opt", "disc_opt")]
        seen.append((moving, *rates))
        nets["model"].norm.bias.data.fill_(len(seen) ** 2)
        return {"loss": 0.0}

    def measures(data, net, sample, each):
        tables.append((len(seen), net.norm.bias[0].item()))
        return {}
    monkeypatch.setattr(distill, "update", update)
    monkeypatch.setattr(corpus.Corpus, "measures", measures)
    assert not distill.main([*argv, "--updates", "5"])
    assert not distill.main([*argv, "--updates", "6", "--resume"])
    rates = [1e-3 * (1 - 0.9 * share) for share in (0, 0, 0, 0, .2, .4, .6, .8, 5 / 6)]
    assert [moving for moving, *_ in seen] == [False] * 3 + [True] * 6
    assert [lr for _, lr, _ in seen] == pytest.approx(rates)
    assert [lr for *_, lr in seen] == [2e-4] * 9
    logged = [json.loads(line) for line in open("out/student.jsonl")]
    assert [row["lr"] for row in logged if "lr" in row] == pytest.approx(rates)
    average, hand = model.load_checkpoint("out/teacher.pt", ("teacher",))[1].norm.bias[0].item(), []
    for number in range(4, 10):
        average = 0.75 * average + 0.25 * number ** 2
        hand.append((number, pytest.approx(average, rel=1e-5)))
    assert tables == [hand[i] for i in (1, 3, 4, 5)]  # after updates 2, 4, the last, and the last


def test_regularisers_of_states_without_masks_are_nothing():
    """Every mask falls in the first of two steps: half of its mean, no NaN in value or slope."""
    table, teacher = torch.randn(16, L, V, requires_grad=True), torch.randn(16, L, V)
    levels = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(-1, 3)
    kinds = {"forward": lambda p, q: q * (q / p).log(), "reverse": lambda p, q: p * (p / q).log()}
    p, q = table[-1].softmax(-1), teacher[-1].softmax(-1)
    for kind, f in kinds.items():
        _, _, (kl, entropy) = didi.rollout(lookup(table), masks(3), levels, MASK, 2,
                                           lookup(teacher), kind)
        assert torch.isclose(kl, f(p, q).sum(-1).mean() / 2)
        assert torch.isclose(entropy, -(p * p.log()).sum(-1).mean() / 2)
        assert torch.autograd.grad(kl + entropy, table)[0].isfinite().all()


@pytest.mark.parametrize("script, argv", [(train_teacher, TEACHER), (distill, STUDENT)])
def test_no_two_processes_have_the_same_random_numbers(folder, monkeypatch, script, argv):
    """Seeds of the second and the third, begun and resumed, and the seed of the first."""
    seeds = watch(monkeypatch, torch, "manual_seed")["manual_seed"]
    assert not script.main([*argv, "--seed", "5", "--out", "a.pt"])
    seeds.clear()
    for rank in (1, 2):
        monkeypatch.setattr(script, "RANK", rank)
        assert not script.main([*argv, "--seed", "5", "--out", "b.pt"])
        assert not script.main(["--updates", "3", "--out", "a.pt", "--resume"])
    used = {call[0][0] for call in seeds} - {5, 1234, 4321}  # of all, of validation, of tables
    assert len(used) == 4


# ------------------------------------------------------------------------ corners of didi's numbers
@pytest.mark.parametrize("K", [1, 2, 3])
def test_levels_are_beta_of_a_and_b_in_this_order(K):
    """Mean a/(a + b) of each level's share, and pi; most is kept with a = 5, b = 2."""
    levels, tau, pi = didi.draw_levels(torch.full((20000,), 0.6), K, 5.0, 2.0)
    above = levels[max(K - 2, 0)]
    assert abs((tau / above).mean() - 5 / 7) < 5 * (5 * 2 / 49 / 8 / 20000) ** 0.5
    density = torch.distributions.Beta(5.0, 2.0).log_prob(tau / above).exp() / above
    assert torch.allclose(pi, density, rtol=1e-3)


def test_a_reward_is_clipped_after_the_mean_over_positions():
    logits, every = torch.tensor([[14.0, 0.0], [50.0, 0.0]]), torch.ones(2, 2).bool()
    assert didi.reward(logits, every).tolist() == [7.0, 8.0]


class Likes:
    """A discriminator that rates the share of zeros in z (B, L); asked(z, soft) hears of it."""

    def __init__(self, scale, asked):
        self.scale, self.asked = scale, asked

    def __call__(self, z, where=None, probs=None):
        self.asked(z, where is not None)
        zeros = self.scale * (z == 0).float()
        if where is not None:
            zeros[where] = self.scale * probs[:, 0]
        return zeros

    def enters(self, z):
        return torch.ones_like(z, dtype=torch.bool)


def test_reranking_sees_rewards_beyond_the_clip_of_training():
    """Of 20 candidates the best, 30 nats above the next, not any that is above 8."""
    def denoiser(z, where):
        return torch.zeros(int(where.sum()), V)
    how = {"M": 20, "switch": 0.0}
    x, _, _ = didi.guided_sample(denoiser, Likes(60, lambda *_: 0), masks(200), 1, MASK, **how)
    chance = 1 - (1 - 1 / 9) ** 20  # that (0, 0) is among them: else one of (0, _), (_, 0)
    share = (x == 0).all(1).float().mean()
    assert abs(share - chance) < 5 * (chance * (1 - chance) / 200) ** 0.5


def test_guidance_tilts_first_and_reranks_then():
    plan = []
    guide = Likes(1, lambda z, soft: plan.append((soft, len(z))))
    didi.guided_sample(lookup(torch.zeros(16, L, V)), guide, masks(500), 4, MASK, M=3, switch=0.3)
    assert [soft for soft, _ in plan] == [True, True, False, False]


def test_a_large_draw_is_made_in_parts_of_a_gibibyte():
    """Of rows that say they are wide, and are certain of one token each."""
    certain, sizes = torch.eye(5).log(), []

    class Wide:
        shape = (5, 2 ** 26)  # two of them are 1 GiB of float64

        def __len__(self):
            return 5

        def split(self, rows):
            sizes.append(rows)
            return certain.split(rows)
    assert didi.draw(Wide(), 3).tolist() == [[i] * 3 for i in range(5)] and sizes == [2]


def test_no_level_is_nearly_the_one_before_or_nearly_nothing():
    levels, tau, _ = didi.draw_levels(torch.full((4000,), 0.5), 3, 0.2, 0.2)
    for share in (levels[1] / levels[0], tau / levels[1]):
        assert share.min() == pytest.approx(0.02) and share.max() == pytest.approx(0.98)


# ----------------------------------------------------------------------------------------- numbers
def test_draws_at_gpt2s_vocabulary_have_its_law_down_to_tails_of_1e_9():
    """A million draws: chi-square over groups of tokens, and how often rare ones come."""
    weights = 1 / (1 + torch.randperm(10257, dtype=torch.float64))
    tail = torch.full((20000,), 1e-9, dtype=torch.float64)  # first and last, where the sum is 1
    law = torch.cat((tail, weights / weights.sum() * (1 - 4e-5), tail))  # (50257,)
    rows = law.log().float().expand(50, -1)  # (n, V), num = 20,000 of each
    drawn = didi.draw(rows, 20000).flatten()
    check_law(drawn // 37, torch.stack([part.sum() for part in law.split(37)]))
    check_law(drawn[:300_000], law)  # token by token; the rare ones pooled with the most frequent
    for rare in (drawn < 20000, drawn >= 30257):
        assert 1 <= rare.sum() <= 50  # Poisson of mean 20: chance 2e-9, 2e-9


@pytest.mark.parametrize("preset", [[], ["--paper"]])
def test_rewards_equal_up_to_rounding_have_no_advantage(preset):
    """Ulps apart around any level; and as a network gives them for one state, in any place."""
    args, ulps = distill.parse_flags(preset)[0], torch.randint(-2, 3, (4000,))
    r = torch.linspace(-8, 8, 500).repeat_interleave(8) * (1 + 2 ** -23 * ulps)
    assert didi.grouped_advantage(r, 8, eps=args.eps).abs().max() < 0.05
    teacher = model.Denoiser(model.Config(257, 24, 2, 2, 32, pads=True))
    for teacher.bf16 in (False, True):
        disc = model.Discriminator(teacher)
        disc.score[2].bias.data.fill_(6.0)
        z = torch.randint(0, 258, (1, 24)).repeat(51, 1)
        r = didi.reward(disc(z), disc.enters(z))
        assert 1 < r.min() and didi.grouped_advantage(r, 17, eps=args.eps).abs().max() < 0.05


def test_a_slow_average_loses_no_update():
    """10,000 steps at decay .9999 in float32, after bfloat16 products, against float64."""
    net, exact = model.Denoiser(model.Config(5, 4, 1, 1, 8)), {}
    net.bf16, ema = True, copy.deepcopy(net)
    net(torch.zeros(1, 4, dtype=torch.long)).float().sum().backward()
    assert {p.dtype for of in (net, ema) for p in of.parameters()} == {torch.float32}
    start = net.norm.weight.detach().double()
    exact, moved = start.clone(), start.clone()
    for _ in range(10_000):
        moved += 1e-4  # as a small learning rate does
        net.norm.weight.data.copy_(moved)
        exact = 0.9999 * exact + 0.0001 * net.norm.weight.detach().double()
        model.update_ema(ema, net, 0.9999)
    assert (exact - start).min() > 0.3
    assert (ema.norm.weight - exact).abs().max() < 1e-3 * (exact - start).min()

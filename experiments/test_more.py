"""test_more.py - SDTT, the ablation, the benchmarks and the animation; 3 tokens, or tiny models."""
import functools
import importlib.util
import json
import os
import shutil
import signal
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import didi
import distill
import model
import train_teacher
from data import command, corpus
from experiments import ablate, animate, bench, sdtt
from test_didi import check_law

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
    args, _ = distill.parse_flags([*STUDENT, "--coupled", "--K", str(K), "--groups", "3"])
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
        (_, (t, share), (t_ref, share_ref)), tau = calls[-3:], taus[-1]
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

"""test_experiments.py - the autoregressive baseline, evaluation and its tables, on tiny models."""
import collections
import importlib.util
import json
import math
import mmap
import os
import sys
import types
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch

import model
import train_teacher
from data import corpus
from data.test_data import exit_code, forked, gpt2, outcome  # noqa: F401
from experiments import autoregressive, common, evaluate, table
from experiments.autoregressive import autoregress
from test_didi import check_law

torch.set_num_threads(1)
LENGTH = 16  # of the tiny corpus' rows
LINES = [f"def f{i}(a={i}):" for i in range(80)]
CPU = ["--device", "cpu", "--no-bf16"]
FEW = [*CPU, "--samples", "3", "--json", "r.json"]
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


# ------------------------------------------------------------------------------------ a tiny world
def network(V, L, causal=False, seed=0, pads=False):
    """A random Denoiser far from uniform; texts that have pads are 2 tokens or more."""
    torch.manual_seed(seed)
    net = model.Denoiser(model.Config(V, L, 2, 2, 8, causal, pads)).eval().requires_grad_(False)
    if pads:
        net.lengths[:] = torch.arange(L + 1) > 1
    for p in net.parameters():
        p.mul_(2)
    return net


def save(path, kind, L=LENGTH, disc=False, seed=0, tokenizer="bytes", packed=False):
    """A checkpoint of a random network, in the form that the three scripts write."""
    net = network(corpus.make_tokenizer(tokenizer).n_vocab, L, kind == "causal", pads=not packed)
    nets = {"model": net, "ema": net}
    if disc:
        nets["disc"] = model.Discriminator(net, 1)
    model.save_checkpoint(path, nets, kind=kind, config=asdict(net.config), tokenizer=tokenizer,
                          flags={"data": "corpus", "seed": seed}, step=1,
                          seconds=1.0)
    return net


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a corpus of 80 lines in it."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("out")
    corpus.write_rows("corpus", LINES, "signatures", "bytes", LENGTH, {})
    return tmp_path


@pytest.fixture
def models(folder):
    """The same with a teacher, a student with a discriminator, and a causal model in out/."""
    save("out/teacher.pt", "teacher")
    save("out/student.pt", "student", disc=True)
    save("out/causal.pt", "causal")
    return folder


def refused(main, argv, capsys, *words):
    """main(argv) as the shell would run it: code 2, and one line on stderr with these words."""
    code, _, err = outcome(main, argv, capsys)
    line, = err.strip().splitlines()
    assert code == 2 and line.startswith("error: ")
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------- the autoregressive baseline
@pytest.fixture
def causal():
    return network(3, 3, causal=True)


def test_a_causal_model_sees_the_past_alone_and_its_cache_changes_nothing(causal):
    x = torch.randint(0, 3, (5, 3))
    z, cache = torch.cat((torch.full((5, 1), 3), x[:, :-1]), 1), autoregressive.new_cache(causal, 5)
    steps = [autoregressive.next_logits(causal, z[:, i], i, cache) for i in range(3)]
    logits = torch.stack(steps, 1)
    assert torch.allclose(logits, causal(z), atol=1e-5)
    nll = -logits.log_softmax(-1).gather(2, x[..., None])[..., 0]
    assert torch.allclose(train_teacher.causal_nll(causal, x, 3), nll, atol=1e-5)
    for i in range(3):
        other = x.clone()
        other[:, i] = (x[:, i] + 1) % 3
        moved = (train_teacher.causal_nll(causal, other, 3) - nll).abs().amax(0) > 1e-6
        assert not moved[:i].any() and moved[i] and moved[i + 1:].all()


def test_the_cache_in_bfloat16_is_close_to_the_whole_call(causal):
    causal.bf16, z = True, torch.randint(0, 4, (5, 3))
    cache = autoregressive.new_cache(causal, 5)
    steps = [autoregressive.next_logits(causal, z[:, i], i, cache) for i in range(3)]
    assert torch.allclose(torch.stack(steps, 1).float(), causal(z).float(), atol=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_autoregressive_sampler_draws_from_the_models_law(causal, temperature):
    torch.manual_seed(0)
    eos, n = 2, 20000
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    until = corpus.until_end(texts, eos)
    ends = (texts == torch.where(until, texts, eos)).all(1)  # nothing but eos behind the first
    nll = train_teacher.causal_nll(lambda z: causal(z) / temperature, texts, 3)
    law = torch.where(ends, (-nll * until).sum(1).exp(), 0.0)
    assert torch.isclose(law.sum(), torch.tensor(1.0), atol=1e-4)
    x, nfe = autoregress(causal, n, eos, temperature)
    check_law((x * torch.tensor([9, 3, 1])).sum(1), law)
    assert torch.equal(nfe, corpus.until_end(x, eos).sum(1))


def test_packed_texts_do_not_end_and_each_token_is_shown(causal):
    seen = []
    x, nfe = autoregress(causal, 50, -1, on_step=lambda z: seen.append(z.clone()))
    assert (nfe == 3).all() and (x >= 0).all() and (x < 3).all()
    assert [z.shape[1] for z in seen] == [1, 2, 3] and torch.equal(seen[-1], x)


def test_until_end():
    x = torch.tensor([[1, 2, 1, 2], [2, 2, 2, 2], [0, 1, 1, 0]])
    assert corpus.until_end(x, 2).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1] * 4]


def test_the_autoregressive_script_prints_samples(folder, capsys):
    save("out/causal.pt", "causal")
    assert not autoregressive.main([*CPU, "--num", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "network calls" in lines[0]
    assert all(line.isprintable() for line in lines)
    save("out/teacher.pt", "teacher")
    refused(autoregressive.main, ["--model", "out/teacher.pt"], capsys, "teacher", "causal")


# ------------------------------------------------------------------------------- what is shared
def test_timed_sampling_repeats_and_counts_calls(models):
    student = common.load_model("out/student.pt", torch.device("cpu"), False)
    teacher = common.load_model("out/teacher.pt", torch.device("cpu"), False, ("teacher",))
    assert "discriminator" not in teacher and student["config"].pad_id == 256
    x, cost = common.write(student, 5, 4, seed=1, batch=2)
    again, _ = common.write(student, 5, 4, seed=1, batch=2)
    other, _ = common.write(student, 5, 4, seed=2, batch=2)
    assert torch.equal(x, again) and not torch.equal(x, other) and x.shape == (5, LENGTH)
    assert 2 < cost["nfe"] <= 4 and cost["disc_calls"] == 0 and cost["seq_per_s"] > 0
    _, cost = common.write(student, 5, 4, sampler="rgas", rgas=(1.0, 3, 0.5))
    assert cost["disc_calls"] == pytest.approx(1 + 1 + 3 + 3, abs=1)  # 2 tilted, 2 re-ranked
    seen = []
    common.write(student, 5, 4, on_step=seen.append)
    assert len(seen) == 4 and (seen[-1] < 257).all()  # no warm-up: it would be seen


def test_a_frequency_penalty_by_hand():
    z = torch.tensor([[3, 1, 1, 3], [2, 3, 0, 0]])
    plain = torch.arange(9.0).view(3, 3)  # logits at the 3 masks
    logits = common.penalised(lambda z, where: plain, 3, 0.5)(z, z == 3)
    assert torch.equal(plain - logits, torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 0.5]]))


def test_spread():
    assert common.spread([1.0, 2.0, 3.0]) == "2.000 +- 1.000"
    assert common.spread([1.0, math.nan, None], 1) == "1.0" and common.spread([None]) == ""


def test_memory_meter():
    peak = common.memory_meter(torch.device("cpu"))
    np.frombuffer(mmap.mmap(-1, 2 ** 26), np.uint8)[:] = 1  # 64 MiB that are new, freed again
    assert sys.platform != "linux" or 60 < peak() < 200


def test_results_are_added_and_never_half_written(folder, capsys):
    run = {"rows": [], "flags": {"sweep": 1}}
    common.add_run("r.json", "sweep")
    common.add_run("r.json", "sweep", "a", 0, run)
    common.add_run("r.json", "sweep", "a", 1, run)
    assert common.read_results("r.json", "sweep") == {"a": {"0": run, "1": run}}
    with pytest.raises(ValueError, match="r.json"):
        common.add_run("r.json", "what", "a", 1, {"rows": [], "flags": {"what": 1}})
    with pytest.raises(TypeError):
        common.write_json("r.json", {"a": torch})
    assert len(common.read_results("r.json", "sweep")["a"]) == 2
    for content in ("[]", "{", '{"a": {"0": {}}}', '{"a": 1}'):
        with open("odd.json", "w") as f:
            f.write(content)
        with pytest.raises(ValueError, match="odd.json"):
            common.read_results("odd.json", "sweep")


# ----------------------------------------------------------------------------------------- tables
def row(name, steps, entropy, post, T=1.0):
    return {"row": name, "steps": steps, "entropy": entropy, "post": post, "T": T}


def test_equal_entropy_by_hand():
    rows, at_2 = [row("held-out data", None, 2.0, 1.0)], partial(table.at_entropy, entropy=2.0)
    rows += [row("student", 8, e, v) for e, v in ((1.5, 0.9), (2.5, 0.5))]  # at 2.0: .7
    assert at_2(rows, "student", 8, "post") == pytest.approx(0.7)
    assert math.isnan(table.at_entropy(rows, "student", 8, "post", 2.6))
    assert math.isnan(at_2(rows, "student", 4, "post"))
    assert math.isnan(table.steps_to_match(rows, "post", 8, at_2))  # no teacher
    for n, v in {4: 0.2, 8: 0.3, 16: 0.5, 32: 0.6, 64: 0.8, 256: 0.9}.items():
        rows += [row("teacher", n, 2.2, v - 0.1), row("teacher", n, 1.8, v + 0.1)]
    worth = partial(table.steps_to_match, column="post", value=at_2)
    assert worth(rows) == pytest.approx(2 ** 5.5)  # half-way from .6 to .8
    assert math.isnan(worth(rows, value=partial(table.at_entropy, entropy=2.3)))

    def moved(by):
        students = [r | {"post": r["post"] + by} for r in rows if r["row"] == "student"]
        return [r for r in rows if r["row"] != "student"] + students
    better = moved(0.25)
    assert worth(moved(-0.6)) == 4
    assert worth(better) == math.inf
    no_4 = [r for r in better if (r["row"], r["steps"]) != ("teacher", 4)]
    assert worth(no_4) == math.inf
    unknown = [r for r in better if (r["steps"], r["entropy"]) != (256, 2.2)]
    assert math.isnan(worth(unknown))  # 256 steps: outside what was measured


def test_what_steps_are_worth_at_temperature_1_and_less_is_better_of_three_measures():
    rows = [row("teacher", 8, 2.0, 0.2, T=0.5)]
    for name, n, value in (("student", 16, 20), ("teacher", 8, 30), ("teacher", 32, 10)):
        rows.append(row(name, n, 2.0, -value) | {"judge_ppl": value, "tv": value, "js3": value})
    for name in table.GOALS:
        assert table.steps_to_match(rows, name, 16) == pytest.approx(16)
        assert math.isnan(table.steps_to_match(rows, name, 8))


def write_results(path, *seeds, sweep=False):
    """A file of one label with these rows of its seeds."""
    runs = {str(k): {"rows": rows, "flags": {"sweep": sweep}} for k, rows in enumerate(seeds)}
    common.write_json(path, {"default": runs})


def test_rows_are_paired_by_what_they_are(folder, capsys):
    """The second seed's rows stand in another order, with one more and one fewer."""
    write_results("r.json", [row("teacher", 8, 2.0, 0.1), row("student", 8, 2.0, 0.2)],
                  [row("new", None, 2.0, 0.9), row("student", 8, 2.0, 0.4)])
    assert not table.main(["r.json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | seeds | row | steps | T | post | entropy |"
    assert lines[2:5] == ["| default | 1 | teacher | 8 | 1.0 | 0.100 | 2.000 |",
                          "| default | 2 | student | 8 | 1.0 | 0.300 +- 0.141 | 2.000 +- 0.000 |",
                          "| default | 1 | new |  | 1.0 | 0.900 | 2.000 |"]


def test_a_sweeps_table_compares_at_equal_entropy(folder, capsys):
    def seed(by):
        rows = [{"row": "held-out data", "entropy": 2.0, "post": 1.0}]
        for T, e in ((1.0, 2.1), (0.8, 1.9 + by)):
            rows += [row("teacher", 32, e, 0.4, T), row("student", 8, e, 0.4 + by, T)]
        return rows
    write_results("r.json", seed(0.0), seed(0.15), sweep=True)  # the second never gets to 2.0
    assert not table.main(["r.json"])
    out = capsys.readouterr().out
    assert "| default | 1 of 2 | student | 8 | 0.400 |" in out
    assert "| default | nan nan |" in out and "32 inf" in out and "| 0.8 |" not in out
    if HAS_MATPLOTLIB:
        assert not table.main(["r.json", "--plot", "p.png"]) and os.path.getsize("p.png") > 5000
        assert table.curve({}, "student", 8, "post").shape == (0, 2)


def test_worth_at_equal_entropy_and_untrained_by_hand(folder, capsys):
    """8 steps of the student are worth 8 at temperature 1; at an entropy of 2 they have .6, three
    fifths from .45 to .7, the teacher's 8 and 16; its 8 at .6 have a quarter from .4 to .6."""
    rows = [{"row": "held-out data", "entropy": 2.0, "post": 1.0}]
    for n, post in ((4, 0.2), (8, 0.4), (16, 0.6)):
        rows += [row("teacher", n, 2.1, post), row("teacher", n, 1.9, post + 0.2, 0.7)]
    rows += [row("teacher", 8, 2.0, 0.45, 0.6)]
    rows += [row("student", 8, 2.1, 0.4), row("student", 8, 1.9, 0.8, 0.7)]
    write_results("r.json", rows, sweep=True)
    assert not table.main(["r.json"])
    lines = capsys.readouterr().out.splitlines()
    worth = {line.split(" | ")[0]: line.split(" | ")[5] for line in lines if "nan" in line}
    assert worth == {"| default": "8", "| default, equal entropy": f"{8 * 2 ** .6:.0f}",
                     "| default, untrained": f"{8 * 2 ** .25:.0f}"}


def test_tables_refuse_what_they_cannot_read(folder, monkeypatch, capsys):
    with open("odd.json", "w") as f:
        f.write("{}}")
    refused(table.main, ["odd.json"], capsys, "odd.json")
    refused(table.main, ["none.json"], capsys, "none.json")
    write_results("r.json", [row("student", 8, 2.0, 0.2)])
    if HAS_MATPLOTLIB:
        refused(table.main, ["r.json", "--plot", "p.png"], capsys, "--sweep")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(table.main, ["r.json", "--plot", "p.png"], capsys, "pip install matplotlib")


# ------------------------------------------------------------------------------------- evaluation
def test_the_table_and_its_file(models, capsys):
    assert not evaluate.main(FEW)
    out, results = capsys.readouterr().out, json.load(open("r.json"))
    run, names = results["default"]["0"], ["held-out data", "training data", "teacher", "student"]
    counts = collections.Counter(r["row"] for r in run["rows"])
    penalised = ["teacher, penalty 0.1", "teacher, penalty 0.3"]
    assert list(counts) == [*names, "autoregressive", *penalised, "student, penalty 0.1",
                            "student, penalty 0.3", "student, guided"]
    assert counts["teacher"] == 12 and counts["student"] == 4  # the teacher: 8 steps at 7 T
    assert all(f"\n{name}" in out for name in counts) and "      post " in out
    held, real = run["rows"][:2]
    assert held["valid"] == real["valid"] == 1 and held["novel"] == 1 and real["novel"] == 0
    assert all(r["judge_ppl"] > 1 and r["valid_se"] >= 0 for r in run["rows"])
    assert set(real["examples"]) <= set(LINES)
    assert run["training"]["student"] == {"data": "corpus", "seed": 0}
    assert run["hardware"]["device"] == "cpu" and run["flags"]["samples"] == 3
    guided, = [r for r in run["rows"] if r["row"] == "student, guided"]
    assert guided["disc_calls"] > guided["nfe"] > 0
    ar, = [r for r in run["rows"] if r["row"] == "autoregressive"]
    assert ar["steps"] is None and ar["disc_calls"] == 0 and 1 <= ar["nfe"] <= LENGTH
    assert not evaluate.main([*FEW, "--rows", "teacher", "--label", "other"])
    results = json.load(open("r.json"))
    assert results["default"]["0"] == run and not os.path.exists("r.json.partial")
    assert {r["row"] for r in results["other"]["0"]["rows"]} == {*names[:3], *penalised}


def test_a_sweep_with_two_seeds_and_its_pictures(models, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", {"teacher": (4, 8), "student": (8,),
                                            "autoregressive": (None,)})
    save("out/other.pt", "student", seed=1)  # without a discriminator, as of experiments.sdtt
    assert not evaluate.main([*FEW, "--sweep"])
    assert not evaluate.main([*FEW, "--sweep", "--student", "out/other.pt"])
    seeds = json.load(open("r.json"))["default"]
    counts = [collections.Counter(r["row"] for r in seeds[k]["rows"]) for k in "01"]
    assert counts[0] == {"held-out data": 1, "training data": 1, "teacher": 14, "student": 7,
                         "student, guided": 1, "autoregressive": 7, "teacher, penalty 0.1": 1,
                         "teacher, penalty 0.3": 1, "student, penalty 0.1": 1,
                         "student, penalty 0.3": 1}
    assert counts[0] - counts[1] == {"student, guided": 1}
    pictures = ["--plot", "p.png"] if HAS_MATPLOTLIB else []
    capsys.readouterr()
    assert not table.main(["r.json", *pictures])
    out = capsys.readouterr().out
    assert "At the entropy of held-out data" in out and "| default | 1 | student, guided |" in out


def test_no_more_steps_than_make_a_difference():
    teacher = {"teacher": {}}
    assert max(steps for _, _, steps, _, _ in evaluate.plan(teacher, False, 48)) == 256
    assert max(steps for _, _, steps, _, _ in evaluate.plan(teacher, False, 256)) == 1024


def test_the_steps_given_are_those_of_the_table(models, capsys):
    assert not evaluate.main([*FEW, "--steps", "3", "300"])
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    steps = [(r["row"], r["steps"]) for r in rows if r.get("T") == 1 and r["steps"]]
    names = ("teacher", "student", "student, guided")
    assert steps == [(name, n) for name in names for n in (3, 300)]


def test_the_judges_perplexity_by_hand(models):
    """One text after the other, each token up to and including the first end."""
    judge = common.load_model("out/causal.pt", torch.device("cpu"), False)
    x, net = torch.randint(250, 257, (7, LENGTH)), judge["denoiser"]
    nll = []
    for text in x.tolist():
        end = text.index(256) + 1 if 256 in text else LENGTH
        log_p = net(torch.tensor([[257, *text[:-1]]]))[0].log_softmax(-1)
        nll += [-log_p[i, text[i]].item() for i in range(end)]
    assert len(nll) < x.numel()
    by_hand = math.exp(sum(nll) / len(nll))
    assert evaluate.causal_judge(x, judge, 3) == pytest.approx(by_hand, rel=1e-5)


def test_packed_text(folder, monkeypatch):
    """Passages that do not end: each token counts, and the autoregressive model writes them all."""
    monkeypatch.setattr(evaluate, "STEPS", {"teacher": (8,), "student": (8,),
                                            "autoregressive": (None,)})
    pieces = [("train", torch.randint(257, (400,))), ("val", torch.randint(257, (100,)))]
    corpus.write("packed", pieces, "text", "bytes", 0, {})
    for kind in ("teacher", "student", "causal"):
        save(f"out/{kind}.pt", kind, packed=True)
    assert not evaluate.main([*FEW, "--data", "packed"])
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    assert all({"entropy", "distinct", "judge_ppl"} <= r.keys() and "valid" not in r for r in rows)
    assert [r["nfe"] for r in rows if r["row"] == "autoregressive"] == [LENGTH]


def test_what_does_not_fit_is_refused(models, capsys):
    refused(evaluate.main, [*CPU, "--student", "none.pt"], capsys, "none.pt", "distill.py")
    refused(evaluate.main, [*CPU, "--student", "out/teacher.pt"], capsys, "holds a teacher")
    refused(evaluate.main, [*CPU, "--data", "none"], capsys, "none")
    refused(evaluate.main, ["--json", "no/such.json"], capsys, "no/such.json")
    corpus.write_rows("longer", LINES, "signatures", "bytes", 20, {})
    refused(evaluate.main, [*CPU, "--data", "longer"], capsys, "longer", "--data")
    save("out/longer.pt", "student", L=20)
    refused(evaluate.main, [*CPU, "--student", "out/longer.pt"], capsys, "out/longer.pt", "length")
    ckpt = torch.load("out/student.pt", weights_only=True)
    torch.save(ckpt | {"disc": {}}, "out/broken.pt")
    refused(evaluate.main, [*CPU, "--student", "out/broken.pt"], capsys, "out/broken.pt")


def test_without_a_causal_model_there_is_no_judge(models, capsys):
    os.remove("out/causal.pt")
    assert not evaluate.main([*FEW, "--rows", "student"])
    assert "--causal" in capsys.readouterr().out
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    assert not any("judge_ppl" in r for r in rows)
    refused(evaluate.main, [*FEW, "--causal", "out/causal.pt"], capsys, "out/causal.pt")


# ------------------------------------------------------------------------------- GPT-2 as the judge
class StandIn:
    """In place of transformers.GPT2LMHeadModel: a tiny causal model whose "gpt2" can be loaded."""
    net = None

    @classmethod
    def from_pretrained(cls, name):
        if name != "gpt2":
            raise OSError("no such folder")
        cls.net = network(257, 64, causal=True)
        cls.net.register_forward_hook(lambda net, z, out: types.SimpleNamespace(logits=out))
        return cls.net


@pytest.fixture
def gpt2_judge(gpt2, monkeypatch):
    """Its tokens, and the package transformers with that model in it."""
    package = types.SimpleNamespace(GPT2LMHeadModel=StandIn)
    monkeypatch.setitem(sys.modules, "transformers", package)
    return gpt2


def by_hand(rows):
    """Perplexity of lists of tokens, one after the other, under the stand-in."""
    nll = []
    for ids in rows:
        log_p = StandIn.net(torch.tensor([[256, *ids[:-1]]])).logits[0].log_softmax(-1)
        nll += [-log_p[i, ids[i]].item() for i in range(len(ids))]
    return pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_gpt2_judges_texts_in_its_own_tokens(models, gpt2_judge, monkeypatch):
    args = evaluate.parse_flags([*CPU, "--judge", "gpt2", "--batch", "1"])
    device = torch.device("cpu")
    texts = ["def f(x):", "def gogo():", ""]
    x = torch.from_numpy(corpus.encode(texts, "bytes", LENGTH).astype("int64")).view(3, LENGTH)
    judge = evaluate.make_judge(args, {}, corpus.load("corpus"), device)
    assert judge(x) == by_hand([[*text.encode(), 256] for text in texts])  # each with its end
    pieces = [("train", torch.randint(257, (400,))), ("val", torch.randint(257, (100,)))]
    passages = torch.randint(97, 110, (4, 64))
    for tokenizer in ("bytes", "gpt2"):  # passages have no end, and of its own tokens all count
        corpus.write(tokenizer, pieces, "text", tokenizer, 0, {})
        judge = evaluate.make_judge(args, {}, corpus.load(tokenizer), device)
        assert judge(passages) == by_hand(passages.tolist())
    ends = torch.randint(250, 257, (4, 64))
    assert judge(ends) == by_hand(ends.tolist())
    judge = evaluate.make_judge(args, {}, replace(corpus.load("gpt2"), framed=True), device)
    passages[:, [0, 5, -1]] = 256  # framed, and a text ends within: what follows ends counts
    nll = -StandIn.net(passages).logits.log_softmax(-1)[:, :-1].gather(2, passages[:, 1:, None])
    counted = nll[passages[:, 1:, None] != 256]
    assert len(counted) == 4 * 61
    assert judge(passages) == pytest.approx(counted.mean().exp().item(), 1e-5)


def test_a_gpt2_alone_or_one_that_cannot_be_loaded(models, gpt2_judge, monkeypatch, capsys):
    save("out/causal.pt", "causal", L=20)  # of another experiment
    assert not evaluate.main([*FEW, "--rows", "student", "--judge", "gpt2"])
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    assert all(r["judge_ppl"] > 1 for r in rows)
    refused(evaluate.main, [*CPU, "--judge", "no/such/folder"], capsys, "no/such/folder")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(evaluate.main, [*CPU, "--judge", "gpt2"], capsys, "pip install transformers")


def good_run():
    rows = [row("held-out data", None, 1.0, 0.9), row("teacher", 8, 1.0, 0.5),
            row("teacher", 4, 0.9, 0.4), row("teacher", 8, 1.2, 0.3, 1.1),
            row("student", 8, 0.9, 0.6), row("student", 4, 1.1, 0.5)]
    return {"rows": rows, "flags": {"sweep": True}}


def lie(*keys, to):
    """The runs of two seeds with what is below these keys changed, as JSON."""
    runs = {"default": {"0": good_run(), "1": good_run()}}
    inner = runs
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return json.dumps(runs)


FIRST = ("default", "0", "rows")
ODD = [lie(*keys, to=to) for keys, to in (
    (("default",), []), (("default", "0"), None), (FIRST, 3), (FIRST, [3]), (FIRST, [{}]),
    ((*FIRST, 1, "steps"), "8"), ((*FIRST, 1, "steps"), 0), ((*FIRST, 1, "steps"), -4),
    ((*FIRST, 1, "post"), "high"), ((*FIRST, 1, "entropy"), [1.0]), ((*FIRST, 1, "T"), {}),
    ((*FIRST, 1, "post"), 10 ** 400), ((*FIRST, 1, "post"), 1e308), ((*FIRST, 1, "row"), 8),
    ((*FIRST, 1, "post"), True), (("default", "0", "flags"), None),
    (("default", "0", "flags"), {"what": "models"}))]
ODD += ["[" * 10 ** 5, '{"a":' * 10 ** 5, "9" * 5000, "", "null", "\udcff", '{"a": {"0": {}}}']


@pytest.mark.parametrize("content", ODD)
def test_a_results_file_of_any_json_is_one_line(folder, capsys, content):
    with open("r.json", "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(content)
    for main, argv in ((table.main, ["r.json"]), (evaluate.main, ["--json", "r.json"])):
        code, out, err = outcome(main, argv, capsys)
        assert (code, out) == (2, "") and err.startswith("error: 'r.json' has no results")
        assert err.count("\n") == 1
    assert open("r.json", errors="surrogateescape", encoding="utf-8").read() == content


@pytest.mark.parametrize("content", [lie(*keys, to=to) for keys, to in (
    (FIRST, []), (("default",), {}), ((*FIRST, 1, "post"), None), ((*FIRST, 0, "entropy"), None),
    ((*FIRST, 1, "steps"), None), ((*FIRST, 1, "post"), math.nan), ((*FIRST, 3, "T"), math.inf),
    ((*FIRST, 0, "row"), "other"), (("\x1b[31m\n",), {}))])
def test_what_was_not_measured_is_left_out(folder, capsys, content):
    """And a label's escape sequence does not reach the terminal."""
    with open("r.json", "w", encoding="utf-8") as f:
        f.write(content)
    assert not table.main(["r.json"])
    assert "\x1b" not in capsys.readouterr().out


def test_tables_pair_rows_by_what_they_are(folder, capsys):
    """Seeds whose rows stand in another order, and runs whose first row has not all columns."""
    texts = []
    for shuffle in (lambda rows: rows, lambda rows: rows[::-1]):
        runs = {"default": {"0": good_run(), "1": good_run()}}
        runs["default"]["1"]["rows"] = shuffle(runs["default"]["1"]["rows"])
        with open("r.json", "w") as f:
            json.dump(runs, f)
        assert not table.main(["r.json"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    del runs["default"]["0"]["rows"][0]["post"]
    with open("r.json", "w") as f:
        json.dump(runs, f)
    assert not table.main(["r.json"])
    assert "| post |" in capsys.readouterr().out


def test_processes_add_to_one_results_file(folder):
    """60 runs of three at the same time, none lost."""
    def add_20(label):
        for seed in range(20):
            common.add_run("r.json", "sweep", label, seed, good_run())
    children = [forked(partial(add_20, label)) for label in "abc"]
    assert list(map(exit_code, children)) == [0, 0, 0]
    assert sum(map(len, common.read_results("r.json", "sweep").values())) == 60

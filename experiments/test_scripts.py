"""test_scripts.py - the three scripts at toy size: the loop by hand, and what runs promise.

What the formulas compute is tested in test_didi.py.
"""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tqdm import tqdm

import didi
import distill
import model
import sample
import train_teacher
from data import corpus

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ON_CPU = "--device cpu --no-bf16"
TEACH = f"--n_layer 2 --n_head 2 --n_embd 16 --batch 8 --updates 4 --warmup 1 {ON_CPU}"
DISTIL = f"--groups 4 --G 2 --disc_blocks 2 --disc_warmup 1 --updates 3 --lr 1e-3 {ON_CPU}"
PAD, MASK = 256, 257  # of bytes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BOTH = pytest.mark.parametrize("script, flags", [
    (train_teacher, TEACH),
    (distill, DISTIL)
])


def call(script, flags):
    """Run a script in this process with the flags of a command line; return its result."""
    return script.main(flags.split())


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Make a folder with out/signatures of 80 lines, out/teacher.pt and out/student.pt, once."""
    folder = tmp_path_factory.mktemp("toys")
    lines = [f"def f{i}({'abcdefg'[:i % 7 + 1]}={i}):" for i in range(80)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus.write_rows(corpus.DEFAULT, lines, "signatures", "bytes", 24, {})
        call(train_teacher, TEACH)
        call(distill, DISTIL)
    return folder


@pytest.fixture
def tiny(toys, tmp_path, monkeypatch):
    """Enter a test's own copy of that folder; restore the signal handlers at the end."""
    handlers = list(map(signal.getsignal, SIGNALS))
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)


def read(path):
    """Return the checkpoint at `path`."""
    return torch.load(path, weights_only=True)


def steps_of(path):
    """Return the steps of the rows in a log, except tables."""
    rows = map(json.loads, open(path))
    return [row["step"] for row in rows if "seconds" in row]


def differing(path, other):
    """Return the names of the tensors that differ in two checkpoints."""
    found = []
    for name in read(path).keys() & {"model", "ema", "disc"}:
        a = read(path)[name]
        b = read(other)[name]
        found += [key for key in a if not torch.equal(a[key], b[key])]
    return found


def refused(script, flags, capsys):
    """Run a script that must exit with code 2; return its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        model.run(lambda: call(script, flags))

    lines = capsys.readouterr().err.splitlines()
    complaint, = [line for line in lines if "error: " in line]
    assert end.value.code == 2
    return complaint


# ---------------------------------------------------------------------------- the loop by hand
def watch(patch, module, name):
    """Return the list of (arguments, result) of all calls of a function from now on; arguments
    are those by position, then those by name."""
    calls = []
    real = getattr(module, name)

    def watched(*args, **how):
        result = real(*args, **how)
        calls.append(((*args, *how.values()), result))
        return result

    patch.setattr(module, name, watched)
    return calls


def watch_discriminator(patch):
    """Return the list of copies of the discriminator before each pass, in which spectral norms
    iterate."""
    copies = []
    forward = model.Discriminator.forward

    def watched(disc, *args):
        copies.append(copy.deepcopy(disc))
        return forward(disc, *args)

    patch.setattr(model.Discriminator, "forward", watched)
    return copies


def update(monkeypatch, flags):
    """Run one update without its steps; return the flags, what each part drew, and the networks,
    the discriminator first, with their gradients."""
    steps = []

    def descend(net, lr, optimizer):
        steps.append((net, [p.grad for p in net.parameters()]))
        net.zero_grad()
        return 0.0

    flags = f"{DISTIL} --updates 1 --disc_warmup 0 --out a.pt {flags}"
    with monkeypatch.context() as patch:
        drawn = {
            name: watch(patch, didi, name)
            for name in ("draw_levels", "predict_once", "rollout", "draw_weighted_levels",
                         "forward_mask")
        }
        discs = watch_discriminator(patch)
        patch.setattr(distill, "descend", descend)
        call(distill, flags)

    args, _ = distill.parse_flags(flags.split())
    parts = [part_of(args, drawn, discs, i) for i in range(args.accumulate)]
    assert len(discs) == 2 * len(parts)
    return args, parts, steps


def part_of(args, drawn, discs, i):
    """Return what part i of an update drew: the discriminator before its two passes, the states
    z_1 .. x, and both maskings; check lengths and levels."""
    calls = drawn["predict_once"][args.K * i:args.K * (i + 1)]
    z = [called[1] for called, _ in calls]
    (_, z_1, levels, _, order, _), (x, *_) = drawn["rollout"][i]
    of_x, of_ref = drawn["forward_mask"][2 * i:2 * i + 2]
    level = of_x[0][1]
    level_ref = of_ref[0][1]
    assert order == args.order
    if args.grid:
        exponent = 1 if args.order == "random" else 1.5
        assert levels == [1 - (k / args.K) ** exponent for k in range(args.K + 1)]
    else:
        of_groups, tau = drawn["draw_levels"][i][1]
        assert torch.equal(levels, of_groups.repeat_interleave(args.G, 1))
    if args.coupled:
        assert torch.equal(level, tau.repeat_interleave(args.G))
    elif args.w:
        assert torch.equal(level, drawn["draw_weighted_levels"][i][1].repeat_interleave(args.G))
    assert torch.equal(z_1, z_1[::args.G].repeat_interleave(args.G, 0))
    assert of_x[0][0] is x
    assert {of_x[0][4], of_ref[0][4]} == {"random"}
    assert torch.equal(level[:len(level_ref)], level_ref)
    return discs[2 * i:2 * i + 2], [*z, x], of_x, of_ref


def advantage_by_hand(args, r, level):
    """Return A * w (B,) for rewards r (B,) at these levels."""
    A = r
    if args.group_norm:
        A = A.view(-1, args.G)
        A = A - A.mean(1, keepdim=True)
        variance = A.var(1, correction=0, keepdim=True)
        A = A / (variance.sqrt() + 1e-4)
        A = A.flatten()
    if args.w and args.coupled:
        A = A * torch.tensor([min(1 / t, 10) for t in level.tolist()])
    return A


def means_by_hand(values, texts):
    """Return the mean (B,) of values (B, L) over each text."""
    means = [some[text != PAD].mean() for some, text in zip(values, texts)]
    return torch.stack(means)


def disc_loss_by_hand(logits, texts, e):
    """Return the loss of logits (2B, L), text by text: the first half is the student's."""
    p = logits.sigmoid()
    label = torch.full_like(p, 1 - e)
    label[:len(p) // 2] = e
    losses = -(label * p.log() + (1 - label) * (1 - p).log())
    return means_by_hand(losses, texts).mean()


def student_loss_by_hand(args, student, states, weights):
    """Return the student's loss from the states (B, L) of a rollout and A * w (B,)."""
    _, teacher = model.load("out/teacher.pt", "teacher")
    log_prob = kl = entropy = 0
    x = states[-1]
    for before, after in itertools.pairwise(states):
        log_p = student(before).log_softmax(-1)
        log_q = teacher(before).log_softmax(-1)
        token = log_p.gather(2, after.clamp(max=PAD - 1)[..., None])[..., 0]
        log_prob = log_prob + (token * (before != after)).sum(1)
        p = log_p[before == MASK]  # (n, V)
        q = log_q[before == MASK]
        n = max(len(p), 1) * args.K
        kl = kl + (q.exp() * (q - p)).sum() / n
        entropy = entropy - (p.exp() * p).sum() / n
    policy_loss = -(weights * log_prob).mean() * len(x) / (x != PAD).sum()
    return policy_loss + args.kl * kl - args.entropy * entropy


def assert_near(gradients, net):
    """Assert that gradients, a list, are those of the net's parameters."""
    ours = []
    theirs = []
    for gradient, p in zip(gradients, net.parameters()):
        if gradient is not None:
            ours.append(gradient.flatten())
            theirs.append(p.grad.flatten())
    theirs = torch.cat(theirs)
    assert theirs.norm() > 0
    assert (torch.cat(ours) - theirs).norm() < 1e-3 * theirs.norm()


def part_by_hand(args, disc, student, part):
    """Return the losses (discriminator's, student's) of one part of an update."""
    (first, second), states, ((x, level, *_), z), ((x_ref, *_), z_ref) = part
    n = len(x) // 2  # half of the texts train the discriminator
    assert len(z_ref) == n
    disc.load_state_dict(first.state_dict())

    logits = disc(torch.cat((z[:n], z_ref)))
    texts = torch.cat((x[:n], x_ref))
    disc_loss = disc_loss_by_hand(logits, texts, args.smoothing)

    logits = torch.cat((logits[:n], second(z[n:])))
    r = means_by_hand(logits, x).detach()
    weights = advantage_by_hand(args, r, level)
    return disc_loss, student_loss_by_hand(args, student, states, weights)


@pytest.mark.parametrize("flags", [
    "",
    "--coupled --G 4 --K 2 --w --kl .5 --smoothing .2 --no-grid",
    "--K 1 --no-group_norm --order random",
    "--no-grid --entropy .3 --smoothing 0",
    "--accumulate 2 --K 3 --coupled --no-grid --no-w"
])
def test_an_update_is_the_algorithm_by_hand(tiny, monkeypatch, flags):
    """Compare the gradients of both networks, from the states that the update drew."""
    args, parts, steps = update(monkeypatch, flags)
    (disc, disc_grads), (student, grads) = steps

    for part in parts:
        losses = part_by_hand(args, disc, student, part)
        (sum(losses) / args.accumulate).backward()

    assert_near(disc_grads, disc)
    assert_near(grads, student)


@pytest.mark.parametrize("flags", ["--disc_blocks 1", "--reference teacher", "--ema .5"])
def test_a_flag_changes_the_student(tiny, flags):
    call(distill, f"{DISTIL} {flags} --out a.pt")

    assert differing("a.pt", "out/student.pt")


def test_uncoupled_levels_without_their_weight_are_uniform(tiny, monkeypatch):
    _, (part,), _ = update(monkeypatch, "--groups 400 --no-w")

    level = part[2][0][1]
    counts = torch.histc(level, 10, 0, 1) / 2  # levels of groups of two
    assert counts.sum() == 400
    assert (counts - 40).abs().max() < 5 * 36**0.5


@pytest.mark.parametrize("T", [0.6, 2.0])
def test_the_student_begins_as_the_teacher_at_a_temperature(tiny, T):
    call(distill, f"{DISTIL} --temperature {T} --lr 1e-9 --out a.pt")

    _, student = model.load("a.pt")
    _, teacher = model.load("out/teacher.pt")
    z = teacher.start(teacher.draw_lengths(8))
    assert torch.allclose(student(z), teacher(z) / T, atol=1e-5)


def test_without_decay_the_average_is_the_student(tiny):
    call(distill, f"{DISTIL} --temperature 1 --ema 0 --out a.pt")

    average = read("a.pt")["ema"]
    start = read("out/teacher.pt")["ema"]
    assert all(torch.equal(average[name], p) for name, p in read("a.pt")["model"].items())
    assert not torch.equal(average["out.weight"], start["out.weight"])


def test_learning_rates_are_in_the_measure_of_the_teachers_matrices():
    net = model.Denoiser(model.Config(5, 4, 2, 1, 8))
    for p in net.parameters():
        p.data.fill_(99)
    for p in net.blocks.parameters():
        if p.dim() == 2:
            p.data.fill_(-0.3)
            p.data[::2] = 0.4

    assert distill.rms_of_matrices(net) == pytest.approx(0.125**0.5)


def test_the_students_rate_falls_to_a_tenth_and_the_discriminators_stays(tiny, monkeypatch):
    rates = []
    monkeypatch.setattr(distill, "descend", lambda net, lr, _: rates.append(lr) or 0.0)

    call(distill, f"{DISTIL} --disc_lr 2e-4 --updates 2 --out a.pt")

    assert rates == pytest.approx([2e-4, 2e-4, 1e-3, 2e-4, 5.5e-4])


def test_a_step_takes_the_mean_over_processes_clipped_to_norm_1(monkeypatch):
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[6.0, 2.0]])
    others = torch.tensor([6.0, 14.0])
    monkeypatch.setattr(model, "WORLD", 2)
    monkeypatch.setattr(model.dist, "all_reduce", lambda grad: grad.add_(others))

    norm = model.descend(net, 0.5, torch.optim.SGD(net.parameters(), 9.0))

    step = net.weight - before
    assert norm == pytest.approx(10)  # of the mean, (6, 8)
    assert step.tolist()[0] == pytest.approx([-0.3, -0.4], abs=1e-6)
    assert net.weight.grad is None


def test_parts_of_a_batch_have_its_gradient(tiny, monkeypatch):
    rows = corpus.load(corpus.DEFAULT).batch(4, 24)
    monkeypatch.setattr(corpus.Corpus, "batch", lambda *_: rows)
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device: torch.ones(B))

    norms = []
    for parts in (1, 2):
        call(train_teacher, f"{TEACH} --updates 1 --accumulate {parts} --out a.pt")
        norms.append(read("a.pt")["log"][0]["norm"])

    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_muon_is_torchs_but_for_its_precision(monkeypatch):
    """torch's iterates in bfloat16: here that is made float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    start = [torch.randn(8, 5), torch.randn(5, 8)]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = copy.deepcopy(ours)
    muon = train_teacher.Muon(ours, {"lr": 0.1})
    torchs = torch.optim.Muon(theirs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        torchs.step()

    for p, q, x in zip(ours, theirs, start):
        assert torch.allclose(p, q, atol=1e-6)
        assert (p != x).all()


def test_every_other_batch_of_the_teacher_is_masked_in_the_samplers_order(tiny, monkeypatch):
    calls = watch(monkeypatch, didi, "nelbo")

    call(train_teacher, TEACH)

    # four updates come before the table
    assert [inputs[-1] for inputs, _ in calls[:4]] == ["random", "interlaced"] * 2


@pytest.mark.parametrize("passes, held_out, samples", [
    (0, 4, 2),
    (500, 5, 2),
    (10**6, 6, 128)
])
def test_a_table_costs_what_its_time_allows(tiny, passes, held_out, samples):
    _, net = model.load("out/teacher.pt")
    data = corpus.load(corpus.DEFAULT)

    row = train_teacher.validate(net, data, torch.device("cpu"), passes)

    assert row["held_out"] == held_out
    assert row["samples"] == samples


# ------------------------------------------------------------ stopped, killed, resumed, diverged
def at_update(monkeypatch, number, act):
    """Call act(average, net) after the weights' update `number`, counted from 1."""
    real = didi.update_ema
    count = itertools.count(1)

    def watched(average, net, decay):
        real(average, net, decay)
        if next(count) == number:
            act(average, net)

    monkeypatch.setattr(didi, "update_ema", watched)


@BOTH
@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_run_goes_on_bit_for_bit(tiny, monkeypatch, script, flags, number):
    call(script, f"{flags} --out whole.pt")
    at_update(monkeypatch, 2, lambda *_: os.kill(os.getpid(), number))

    assert call(script, f"{flags} --out a.pt") == number
    call(script, "--resume --out a.pt")  # the other flags are the checkpoint's

    assert differing("a.pt", "whole.pt") == []
    assert steps_of("a.jsonl") == steps_of("whole.jsonl")


@BOTH
def test_a_resumed_run_says_when_its_time_is_over_and_takes_new_limits(
    tiny, capsys, script, flags
):
    call(script, f"{flags} --minutes 1e-4 --out a.pt")
    steps = read("a.pt")["step"]

    call(script, "--resume --out a.pt")
    said = capsys.readouterr().out
    call(script, f"--resume --updates {steps + 1} --out a.pt")

    assert "give more --updates or --minutes" in said
    assert read("a.pt")["step"] > steps


def test_the_papers_objective_wins_over_that_of_a_checkpoint(tiny):
    args, _ = distill.parse_flags("--resume --paper --out out/student.pt".split())

    assert args.kl == 0.1


def test_a_run_too_short_for_the_student_says_so(tiny, capsys):
    call(distill, f"{DISTIL} --minutes 1e-4 --disc_warmup 99 --out a.pt")

    assert "only the discriminator has learnt" in capsys.readouterr().out


def test_what_is_ignored_stays_ignored():
    real = signal.signal(signal.SIGINT, signal.SIG_IGN)

    model.catch_signals()

    assert signal.signal(signal.SIGINT, real) == signal.SIG_IGN


def killed_after(seconds, script, flags):
    """Run a script in its own process and SIGKILL it these seconds after it has saved a new
    step."""
    before = os.path.exists("a.pt") and read("a.pt")["step"]
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # a child killed with the common lock would keep it
        try:
            call(script, f"{flags} --out a.pt")
        finally:
            os._exit(1)
    while not os.path.exists("a.pt") or read("a.pt")["step"] == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it still runs
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@BOTH
def test_kills_leave_a_whole_checkpoint(tiny, script, flags):
    """Kill a run that saves after every update at five moments, so that some hit a save."""
    monotone = []
    killed_after(0, script, f"{flags} --updates 5000 --eval_every 1")
    for k in range(4):
        monotone.append(read("a.pt")["step"])
        killed_after(0.02 * k, script, "--resume")

    assert monotone == sorted(set(monotone))
    model.load("a.pt", "teacher", "student")


@BOTH
def test_a_kill_while_the_new_checkpoint_is_written_leaves_the_old_one(
    tiny, monkeypatch, script, flags
):
    def torn(parts, path):
        open(path, "wb").write(b"PK")
        raise KeyboardInterrupt

    paths = [tiny / "out/teacher.pt", tiny / "out/student.pt"]
    old = [path.read_bytes() for path in paths]
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        call(script, flags)

    assert [path.read_bytes() for path in paths] == old


@BOTH
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_not_saved(
    tiny, capsys, monkeypatch, script, flags, side
):
    def spoil(*average_and_net):
        average_and_net[side].lengths[0] = torch.nan
        os.kill(os.getpid(), signal.SIGTERM)

    at_update(monkeypatch, 1, spoil)

    assert "not finite" in refused(script, f"{flags} --out a.pt", capsys)
    assert not os.path.exists("a.pt")


def test_a_loss_that_is_not_finite_ends_the_run(tiny, capsys):
    complaint = refused(train_teacher, f"{TEACH} --lr 1e6 --updates 99", capsys)

    assert "lower --lr" in complaint


DRIVER = """
import importlib, sys, torch, model
script, real, seen = importlib.import_module(sys.argv[1]), torch.nn.utils.clip_grad_norm_, []
def clip(parameters, norm):
    parameters = list(parameters)
    seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    return real(parameters, norm)
torch.nn.utils.clip_grad_norm_ = clip
script.main(sys.argv[2:])
torch.save(seen + [torch.rand(1)], f"seen{model.RANK}.pt")
model.run(lambda: 0)
"""


def test_processes_of_torchrun_take_the_same_steps(tiny):
    (tiny / "driver.py").write_text(DRIVER)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    flags = f"{torchrun} driver.py distill {DISTIL} --out a.pt"
    command = [sys.executable, *flags.split()]
    env = os.environ | {"PYTHONPATH": HERE}

    subprocess.run(command, check=True, env=env, timeout=100)

    ours = read("seen0.pt")
    theirs = read("seen1.pt")
    assert len(ours) >= 5
    assert all(map(torch.equal, ours[:-1], theirs))  # gradients
    assert ours[-1] != theirs[-1]  # random numbers


# ------------------------------------------------------------------------------ foreign checkpoints
class Evil:
    """Make a folder when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_loading_runs_no_code(tiny):
    torch.save(read("out/teacher.pt") | {"step": Evil()}, "a.pt")

    with pytest.raises(ValueError, match="a.pt is not a checkpoint"):
        model.load("a.pt", "teacher")

    assert not os.path.exists("executed")
    torch.load("a.pt", weights_only=False)
    assert os.path.exists("executed")  # so the trap was real


@pytest.mark.parametrize("change", [
    {"ema": {}},
    {"config": {}},
    {"kind": "poem"},
    {"config": {"n_layer": 9}},
    {"ema": 3}
])
def test_checkpoints_of_another_kind_or_shape_are_refused(tiny, change):
    torch.save(read("out/teacher.pt") | change, "a.pt")

    with pytest.raises(ValueError, match="^a.pt "):
        model.load("a.pt", "teacher")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_of_another_shape_are_refused(tiny, capsys, name):
    ckpt = read("out/teacher.pt")
    moments = ckpt[name]["state"][0]
    key = [key for key, x in moments.items() if x.dim() > 0][0]
    moments[key] = torch.zeros(3, 3)
    torch.save(ckpt, "a.pt")

    complaint = refused(train_teacher, "--resume --out a.pt", capsys)

    assert "does not fit" in complaint


# ----------------------------------------------------------------------------- everyday mistakes
MISTAKES = [
    (train_teacher, f"{TEACH} --n_head 3", "--n_head"),
    (train_teacher, f"{TEACH} --data none", "data.text"),
    (train_teacher, f"{TEACH} --data other", "trained on out/signatures"),
    (train_teacher, f"{TEACH} --accumulate 3", "--accumulate"),
    (train_teacher, "--resume --size mini", "does not fit"),
    (distill, f"{DISTIL} --teacher out/student.pt", "student"),
    (distill, f"{DISTIL} --out out/teacher.pt", "teacher"),
    (distill, f"{DISTIL} --exponent 0", "--exponent"),
    (distill, f"{DISTIL} --coupled", "--no-grid"),
    (sample, "--steps 0", "--steps"),
    (sample, "--order left", "--order"),
    (sample, "--model LICENSE", "LICENSE"),
    (sample, "--prompt a_text_of_25_letters_____", "25 tokens"),
    (sample, "--sampler rgas --model out/teacher.pt", "rgas"),
    (sample, "--out out/student.pt", "--out")
]


@pytest.mark.parametrize("script, flags, word", MISTAKES)
def test_an_everyday_mistake_is_one_line(tiny, capsys, script, flags, word):
    (tiny / "LICENSE").write_text("text")
    shutil.copytree("out/signatures", "other")

    complaint = refused(script, f"{ON_CPU} {flags}", capsys)

    assert word in complaint


# ------------------------------------------------------------------------------------- sample.py
@pytest.mark.parametrize("flags, exponent", [("", 1.5), ("--order random", 1.0),
                                             ("--data packed --length 8", 1.0)])
def test_first_steps_reveal_less_in_short_texts_alone(tiny, flags, exponent):
    ids = range(200)
    corpus.write("packed", [("train", ids), ("val", ids)], "text", "bytes", 0, {})

    call(train_teacher, f"{TEACH} --updates 1 {flags} --out a.pt")

    assert read("a.pt")["config"]["exponent"] == exponent


@pytest.mark.parametrize("flags, lengths", [
    ("", {1, 2, 5}),
    ("--prompt ab", {2, 5}),
    ("--prompt ab --length 8", {8}),
    ("--infill a?b", {3}),
    ("--infill a?b --length 8", {8})
])
def test_a_text_has_the_length_given_or_one_of_the_training_texts_with_room(flags, lengths):
    config = model.Config(length=8, n_layer=1, n_head=1, n_embd=8, pads=True)
    net = model.Denoiser(config)
    net.lengths[:] = torch.tensor([0, 0.3, 0.3, 0, 0, 0.4, 0, 0, 0])
    args = sample.parse_flags(f"--num 200 {flags}".split())
    ids = sample.given_tokens(args, corpus.make_tokenizer("bytes"), MASK)

    z = sample.start_states(args, net, ids)

    assert set((z != PAD).sum(1).tolist()) == lengths
    assert z[:, :len(ids)].tolist() == [ids] * 200


@pytest.mark.parametrize("sampler", ["ancestral", "rgas"])
def test_given_text_stays(tiny, capsys, sampler):
    call(sample, f"{ON_CPU} --infill de?f? --num 6 --sampler {sampler}")

    texts = capsys.readouterr().out.splitlines()[1:]
    assert [text[:2] + text[3] for text in texts] == ["def"] * 6


def test_every_step_is_shown(tiny, capsys):
    call(sample, f"{ON_CPU} --num 2 --steps 3 --watch --prompt def")

    frames = capsys.readouterr().out.split("\n\n")
    assert len(frames) == 4
    assert all(frame.startswith("def") for frame in frames[:3])
    assert "\u2591" in frames[0]
    assert "\u2591" not in frames[2]


def test_texts_are_written_to_a_file(tiny, capsys):
    call(sample, f"{ON_CPU} --num 5 --out a.txt")

    _, *texts = capsys.readouterr().out.splitlines()
    assert (tiny / "a.txt").read_text("utf-8").splitlines() == texts


def test_a_prompt_is_utf_8_whatever_the_locale(tiny):
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = f"{ON_CPU} --prompt é --out x.txt"
    command = [sys.executable, f"{HERE}/sample.py", *flags.split()]

    subprocess.run(command, check=True, env=os.environ | c_locale)

    assert (tiny / "x.txt").read_bytes().startswith(b"\xc3\xa9")

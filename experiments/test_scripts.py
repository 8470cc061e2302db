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
import time

import pytest
import torch

import didi
import distill
import model
import sample
import train_teacher
from data import corpus

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ON_CPU = ["--device", "cpu", "--no-bf16"]
TEACH = (
    "--n_layer 2 --n_head 2 --n_embd 16 --batch 8 --updates 4 --warmup 1".split()
    + ON_CPU
)
DISTIL = (
    "--groups 4 --G 2 --disc_blocks 2 --disc_warmup 1 --updates 3 --lr 1e-3".split()
    + ON_CPU
)
PAD, MASK = 256, 257  # of bytes
BOTH = pytest.mark.parametrize(
    "script, flags", [(train_teacher, TEACH), (distill, DISTIL)]
)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Make a folder with out/signatures of 80 lines, out/teacher.pt and out/student.pt, once."""
    folder = tmp_path_factory.mktemp("toys")
    lines = [f"def f{i}(a, b={i}):" for i in range(80)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus.write_rows(
            corpus.DEFAULT, lines, "signatures", "bytes", 24, {}
        )
        train_teacher.main(TEACH)
        distill.main(DISTIL)
    return folder


@pytest.fixture
def tiny(toys, tmp_path, monkeypatch):
    """Enter a test's own copy of that folder; restore the signal handlers at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def read(path):
    """Return the checkpoint at `path`."""
    return torch.load(path, weights_only=True)


def steps_of(path):
    """Return the steps of the rows in a log, except tables."""
    rows = [json.loads(line) for line in open(path)]
    return [row["step"] for row in rows if "seconds" in row]


def differing(path, other):
    """Return the names of the tensors that differ in two checkpoints."""
    found = []
    for name in read(path).keys() & {"model", "ema", "disc"}:
        a, b = read(path)[name], read(other)[name]
        found += [key for key in a if not torch.equal(a[key], b[key])]
    return found


def start(script, *flags, **how):
    """Start a script as its own process, with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    command = [sys.executable, os.path.join(HERE, script), *flags]
    return subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )


def refused(script, argv, capsys):
    """Run a script that must exit with code 2; return its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        model.run(lambda: script.main(argv))
    complaints = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "error: " in line
    ]
    assert end.value.code == 2
    assert len(complaints) == 1
    return complaints[0]


# ---------------------------------------------------------------------------- the loop by hand
def watch(monkeypatch, module, name):
    """Return the list of (arguments, result) of all calls of a function from now on."""
    calls = []
    real = getattr(module, name)

    def watched(*args, **how):
        calls.append((args, real(*args, **how)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.fixture
def update(tiny, monkeypatch):
    """Return a function of flags that runs one update, without its steps, and returns the flags,
    all that it drew, the discriminators, and the networks with their gradients.
    """

    def run(flags):
        drawn = {
            name: watch(monkeypatch, didi, name)
            for name in (
                "draw_levels",
                "reveal_positions",
                "rollout",
                "forward_mask",
            )
        }
        made = watch(monkeypatch, distill, "Discriminator")
        before, steps = [], []
        forward = model.Discriminator.forward

        def note(disc, *args):  # spectral norms iterate in every pass
            before.append(copy.deepcopy(disc))
            return forward(disc, *args)

        def descend(net, lr, optimizer):
            steps.append((net, [p.grad for p in net.parameters()]))
            net.zero_grad()
            return 0.0

        monkeypatch.setattr(model.Discriminator, "forward", note)
        monkeypatch.setattr(distill, "descend", descend)
        argv = [
            *DISTIL,
            "--updates",
            "1",
            "--disc_warmup",
            "0",
            "--out",
            "a.pt",
            *flags.split(),
        ]
        distill.main(argv)
        monkeypatch.setattr(model.Discriminator, "forward", forward)
        args, _ = distill.parse_flags(argv)
        assert steps[0][0] is made[0][1]
        return args, drawn, before, steps

    return run


def part_of(drawn, i, K):
    """Return what part i of an update drew: levels, states z_1 .. x, and both maskings."""
    levels = drawn["draw_levels"][i][1]
    x = drawn["rollout"][i][1][0]
    states = [
        args[0] for args, _ in drawn["reveal_positions"][K * i : K * (i + 1)]
    ]
    return levels, [*states, x], drawn["forward_mask"][2 * i : 2 * i + 2]


def advantage_by_hand(args, r, level, pi):
    """Return A * w (B,) for rewards r (B,) at these levels."""
    A = r
    if args.power:
        A = ((args.power * r).exp() - 1) / args.power
    if args.group_norm:
        A = A.view(-1, args.G)
        A = (A - A.mean(1, keepdim=True)) / (
            A.var(1, correction=0, keepdim=True).sqrt() + args.eps
        )
        A = A.clamp(-3, 3).flatten()
    if args.w:
        A = A * torch.tensor([min(1 / t, 10) for t in level.tolist()])
    if args.pi and args.coupled:
        A = A / pi.repeat_interleave(args.G)
    return A


def disc_loss_by_hand(logits, texts, e):
    """Return the loss of logits (2B, L), text by text: the first half is the student's."""
    B = len(texts) // 2
    losses = []
    for i, (logit, text) in enumerate(zip(logits, texts)):
        label = e if i < B else 1 - e
        p = logit[text != PAD].sigmoid()
        losses.append(-(label * p.log() + (1 - label) * (1 - p).log()).mean())
    return torch.stack(losses).mean()


def student_loss_by_hand(args, student, states, weights):
    """Return the student's loss from the states (B, L) of a rollout and A * w (B,)."""
    _, teacher = model.load("out/teacher.pt", "teacher")
    log_prob = kl = entropy = 0
    x = states[-1]
    for before, after in zip(states[:-1], states[1:]):
        log_p = student(before).log_softmax(-1)
        log_q = teacher(before).log_softmax(-1)
        token = log_p.gather(2, after.clamp(max=PAD - 1)[..., None])[..., 0]
        log_prob = log_prob + (token * (before != after)).sum(1)
        p, q = log_p[before == MASK], log_q[before == MASK]  # (n, V)
        kl = kl + (q.exp() * (q - p)).sum() / max(len(p), 1) / args.K
        entropy = entropy - (p.exp() * p).sum() / max(len(p), 1) / args.K
    policy_loss = -(weights * log_prob).mean() * len(x) / (x != PAD).sum()
    return policy_loss + args.kl * kl - args.entropy * entropy


def assert_near(gradients, net):
    """Assert that gradients, a list, are those of the net's parameters."""
    pairs = [
        (g, p.grad)
        for g, p in zip(gradients, net.parameters())
        if g is not None
    ]
    ours, theirs = (
        torch.cat([x.flatten() for x in side]) for side in zip(*pairs)
    )
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def part_by_hand(args, disc, student, part):
    """Return the losses (discriminator's, student's) of one part of an update."""
    (_, tau, pi), states, ((of_x, z), (of_ref, z_ref)) = part
    x, level = of_x[:2]
    x_ref, level_ref = of_ref[:2]
    n = len(z_ref)  # half of the groups train the discriminator
    assert x is states[-1]
    assert torch.equal(level[:n], level_ref)
    coupled = torch.equal(level, tau.repeat_interleave(args.G))
    assert coupled == args.coupled

    logits = disc(torch.cat((z, z_ref)))
    halves = torch.cat((logits[:n], logits[-n:]))
    texts = torch.cat((x[:n], x_ref))
    disc_loss = disc_loss_by_hand(halves, texts, args.smoothing)

    r = [logit[text != PAD].mean() for logit, text in zip(logits, x)]
    weights = advantage_by_hand(args, torch.stack(r).detach(), level, pi)
    return disc_loss, student_loss_by_hand(args, student, states, weights)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--G 4 --K 2 --w --pi --kl .5 --smoothing .1",
        "--K 1 --no-group_norm --power .5 --w",
        "--no-coupled --w --pi --power 0 --entropy .3 --eps .01",
        "--accumulate 2 --pi --K 3",
    ],
)
def test_an_update_is_the_algorithm_by_hand(update, flags):
    """Compare the gradients of both networks, from the states that the update drew."""
    args, drawn, before, steps = update(flags)
    (_, disc_grads), (student, grads) = steps
    disc = copy.deepcopy(before[0])

    for i, at_start in enumerate(before):
        disc.load_state_dict(at_start.state_dict())
        part = part_of(drawn, i, args.K)
        losses = part_by_hand(args, disc, student, part)
        (sum(losses) / args.accumulate).backward()

    assert len(before) == args.accumulate
    assert_near(disc_grads, disc)
    assert_near(grads, student)


@pytest.mark.parametrize(
    "flags", ["--disc_blocks 1", "--reference teacher", "--ema .5"]
)
def test_a_flag_changes_the_student(tiny, flags):
    distill.main([*DISTIL, *flags.split(), "--out", "a.pt"])

    assert differing("a.pt", "out/student.pt")


def test_uncoupled_levels_are_uniform(update):
    _, drawn, _, _ = update("--no-coupled --groups 400")

    args, _ = drawn["forward_mask"][0]
    counts = torch.histc(args[1], 10, 0, 1) / 2  # levels of groups of two
    assert (counts - 40).abs().max() < 5 * 36**0.5


@pytest.mark.parametrize("T", [0.6, 2.0])
def test_the_student_begins_as_the_teacher_at_a_temperature(tiny, T):
    distill.main(
        [*DISTIL, "--temperature", str(T), "--lr", "1e-9", "--out", "a.pt"]
    )

    _, student = model.load("a.pt")
    _, teacher = model.load("out/teacher.pt")
    z = teacher.start(teacher.draw_lengths(8))
    assert torch.allclose(student(z), teacher(z) / T, atol=1e-5)


def test_learning_rates_are_in_the_measure_of_the_teachers_matrices():
    net = model.Denoiser(model.Config(5, 4, 2, 1, 8))
    for p in net.parameters():
        p.data.fill_(99)
    for p in net.blocks.parameters():
        if p.dim() == 2:
            p.data.fill_(-0.3)
            p.data[::2] = 0.4

    assert distill.rms_of_matrices(net) == pytest.approx(0.125**0.5)


def test_the_students_rate_falls_to_a_tenth_and_the_discriminators_stays(
    tiny, monkeypatch
):
    rates = []
    monkeypatch.setattr(
        distill, "descend", lambda net, lr, _: rates.append(lr) or 0.0
    )

    distill.main(
        [*DISTIL, "--disc_lr", "2e-4", "--updates", "2", "--out", "a.pt"]
    )

    assert rates == pytest.approx([2e-4, 2e-4, 1e-3, 2e-4, 5.5e-4])


def test_a_step_takes_the_mean_over_processes_clipped_to_norm_1(monkeypatch):
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[6.0, 2.0]])
    monkeypatch.setattr(model, "WORLD", 2)
    monkeypatch.setattr(
        model.dist,
        "all_reduce",
        lambda grad: grad.add_(torch.tensor([6.0, 14.0])),
    )

    norm = model.descend(net, 0.5, torch.optim.SGD(net.parameters(), 9.0))

    assert norm == pytest.approx(10)  # of the mean, (6, 8)
    assert torch.allclose(
        net.weight, before - 0.5 * torch.tensor([[0.6, 0.8]]), atol=1e-6
    )
    assert net.weight.grad is None


def test_parts_of_a_batch_have_its_gradient(tiny, monkeypatch):
    rows = corpus.load(corpus.DEFAULT).batch(4, 24)
    monkeypatch.setattr(corpus.Corpus, "batch", lambda *_: rows)
    monkeypatch.setattr(
        didi, "low_discrepancy_times", lambda B, device=None: torch.ones(B)
    )

    train_teacher.main([*TEACH, "--updates", "1", "--out", "a.pt"])
    train_teacher.main(
        [*TEACH, "--updates", "1", "--accumulate", "2", "--out", "b.pt"]
    )

    norm, other = (read(path)["log"][0]["norm"] for path in ("a.pt", "b.pt"))
    assert norm == pytest.approx(other, rel=1e-4)


# ------------------------------------------------------------ stopped, killed, resumed, diverged
def at_update(script, monkeypatch, number, act):
    """Call act(average, net) after the weights' update `number`, counted from 1."""
    real, count = didi.update_ema, itertools.count(1)

    def watched(average, net, decay):
        real(average, net, decay)
        if next(count) == number:
            act(average, net)

    monkeypatch.setattr(didi, "update_ema", watched)


@BOTH
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny, monkeypatch, script, flags, number
):
    script.main([*flags, "--out", "whole.pt"])
    at_update(script, monkeypatch, 2, lambda *_: os.kill(os.getpid(), number))

    assert script.main([*flags, "--out", "a.pt"]) == number
    script.main(
        ["--resume", "--out", "a.pt"]
    )  # the other flags are the checkpoint's

    assert differing("a.pt", "whole.pt") == []
    assert steps_of("a.jsonl") == steps_of("whole.jsonl")


@BOTH
def test_a_resumed_run_says_when_its_time_is_over_and_takes_new_limits(
    tiny, capsys, script, flags
):
    script.main([*flags, "--minutes", "1e-4", "--out", "a.pt"])
    steps = read("a.pt")["step"]

    script.main(["--resume", "--out", "a.pt"])
    said = capsys.readouterr().out
    script.main(["--resume", "--updates", str(steps + 1), "--out", "a.pt"])

    assert "give more --updates or --minutes" in said
    assert read("a.pt")["step"] > steps


def test_what_is_ignored_stays_ignored():
    real = signal.signal(signal.SIGINT, signal.SIG_IGN)

    model.catch_signals()

    assert signal.signal(signal.SIGINT, real) == signal.SIG_IGN


def killed_after(seconds, script, *flags):
    """Run a script in its own process and SIGKILL it these seconds after it has saved a new
    step."""
    before = os.path.exists("a.pt") and read("a.pt")["step"]
    child = os.fork()
    if child == 0:
        script.main([*flags, "--out", "a.pt"])
        os._exit(0)
    while not os.path.exists("a.pt") or read("a.pt")["step"] == before:
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@BOTH
def test_kills_leave_a_whole_checkpoint(tiny, script, flags):
    """Kill a run that saves after every update at five moments, so that some hit a save."""
    monotone = []
    killed_after(0, script, *flags, "--updates", "5000", "--eval_every", "1")
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

    old = (tiny / "out/teacher.pt").read_bytes(), (
        tiny / "out/student.pt"
    ).read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        script.main(flags)

    assert old == (
        (tiny / "out/teacher.pt").read_bytes(),
        (tiny / "out/student.pt").read_bytes(),
    )


@BOTH
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_not_saved(
    tiny, capsys, monkeypatch, script, flags, side
):
    def spoil(*average_and_net):
        average_and_net[side].lengths[0] = torch.nan
        os.kill(os.getpid(), signal.SIGTERM)

    at_update(script, monkeypatch, 1, spoil)

    assert "not finite" in refused(script, [*flags, "--out", "a.pt"], capsys)
    assert not os.path.exists("a.pt")


def test_a_loss_that_is_not_finite_ends_the_run(tiny, capsys):
    complaint = refused(
        train_teacher, [*TEACH, "--lr", "1e6", "--updates", "99"], capsys
    )

    assert "lower --lr" in complaint or "diverged" in complaint


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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "driver.py",
        "distill",
        *DISTIL,
        "--out",
        "a.pt",
    ]

    subprocess.run(
        command,
        check=True,
        env=os.environ | {"PYTHONPATH": HERE},
        timeout=100,
    )

    ours, theirs = torch.load("seen0.pt"), torch.load("seen1.pt")
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


@pytest.mark.parametrize(
    "change",
    [
        {"ema": {}},
        {"config": {}},
        {"kind": "poem"},
        {"config": {"n_layer": 9}},
        {"ema": 3},
    ],
)
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

    assert "does not fit" in refused(
        train_teacher, ["--resume", "--out", "a.pt"], capsys
    )


# ----------------------------------------------------------------------------- everyday mistakes
MISTAKES = [
    (train_teacher, TEACH, "--n_head 3", "--n_head"),
    (train_teacher, TEACH, "--data none", "data.text"),
    (train_teacher, TEACH, "--accumulate 3", "--accumulate"),
    (train_teacher, [], "--resume --n_layer 1", "does not fit"),
    (distill, DISTIL, "--teacher out/student.pt", "student"),
    (distill, DISTIL, "--out out/teacher.pt", "teacher"),
    (sample, ON_CPU, "--steps 0", "--steps"),
    (sample, ON_CPU, "--model LICENSE", "LICENSE"),
    (sample, ON_CPU, "--prompt a_text_of_25_letters_____", "25 tokens"),
    (sample, ON_CPU, "--sampler rgas --model out/teacher.pt", "rgas"),
    (sample, ON_CPU, "--out out/student.pt", "--out"),
]


@pytest.mark.parametrize("script, flags, mistake, word", MISTAKES)
def test_an_everyday_mistake_is_one_line(
    tiny, capsys, script, flags, mistake, word
):
    (tiny / "LICENSE").write_text("text")
    assert word in refused(script, [*flags, *mistake.split()], capsys)


def test_a_checkpoint_of_another_corpus_is_not_written_over(tiny, capsys):
    shutil.copytree("out/signatures", "other")

    complaint = refused(train_teacher, [*TEACH, "--data", "other"], capsys)

    assert "trained on out/signatures" in complaint


# ------------------------------------------------------------------------------------- sample.py
@pytest.mark.parametrize(
    "flags, lengths",
    [
        ("", {1, 2, 5}),
        ("--prompt ab", {2, 5}),
        ("--prompt ab --length 8", {8}),
        ("--infill a?b", {3}),
    ],
)
def test_a_text_has_the_length_given_or_one_of_the_training_texts_with_room(
    flags, lengths
):
    net = model.Denoiser(
        model.Config(length=8, n_layer=1, n_head=1, n_embd=8, pads=True)
    )
    net.lengths.copy_(torch.tensor([0, 0.3, 0.3, 0, 0, 0.4, 0, 0, 0]))
    args = sample.parse_flags(["--num", "200", *flags.split()])
    ids = sample.given_tokens(args, corpus.make_tokenizer("bytes"), MASK)

    z = sample.start_states(args, net, ids)

    assert set((z != PAD).sum(1).tolist()) == lengths
    assert z[:, : len(ids)].tolist() == [ids] * 200


@pytest.mark.parametrize("sampler", ["ancestral", "rgas"])
def test_given_text_stays(tiny, capsys, sampler):
    sample.main(
        [*ON_CPU, "--infill", "de?f?", "--num", "6", "--sampler", sampler]
    )

    texts = capsys.readouterr().out.splitlines()[1:]
    assert len(texts) == 6
    assert all(text.startswith("de") for text in texts)
    assert all(text[3] == "f" for text in texts)


def test_every_step_is_shown(tiny, capsys):
    sample.main(
        [*ON_CPU, "--num", "2", "--steps", "3", "--watch", "--prompt", "def"]
    )

    frames = capsys.readouterr().out.split("\n\n")
    assert len(frames) == 4
    assert all(frame.startswith("def") for frame in frames[:3])
    assert "\u2591" in frames[0]
    assert "\u2591" not in frames[2]


def test_texts_are_written_to_a_file(tiny, capsys):
    sample.main([*ON_CPU, "--num", "5", "--out", "a.txt"])

    _, *texts = capsys.readouterr().out.splitlines()
    assert (tiny / "a.txt").read_text("utf-8").splitlines() == texts


def test_a_prompt_is_utf_8_whatever_the_locale(tiny):
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = start(
        "sample.py",
        "--prompt",
        "é",
        "--out",
        "x.txt",
        *ON_CPU,
        cwd=tiny,
        env=c_locale,
    )

    _, complaint = run.communicate()

    assert run.returncode == 0, complaint
    assert (tiny / "x.txt").read_bytes().startswith(b"\xc3\xa9")


def test_the_three_commands_run_without_the_experiments(tiny):
    shutil.copytree(os.path.join(HERE, "data"), "data")
    commands = {
        "train_teacher.py": TEACH,
        "distill.py": DISTIL,
        "sample.py": ["--num", "3"],
    }
    for path in ("didi.py", "model.py", *commands):
        shutil.copy(os.path.join(HERE, path), path)

    for path, flags in commands.items():
        done = subprocess.run(
            [sys.executable, path, *flags], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    assert len(done.stdout.splitlines()) == 4

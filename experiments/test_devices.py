"""test_devices.py - what a GPU does otherwise, as far as it shows without one.

No tensor is left on another device: "meta" stands for the GPU, whose tensors have shapes and no
numbers (FakeTensorMode's "cuda" has no gradients in a build of torch for CPUs). bfloat16 against
float32 at the published size; old GPUs; and what a checkpoint keeps for another device.
"""
import contextlib
import copy
import importlib.util
import types

import pytest
import torch
import torch.fx.experimental._config as fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import didi
import distill
import model
import train_teacher
from data import command, memory
from experiments import autoregressive, sdtt
from experiments.test_runs import load, tiny, toys  # noqa: F401

torch.set_num_threads(1)
aten, GPU, MASK = torch.ops.aten, torch.device("meta"), 5
CONFIG = model.Config(vocab_size=MASK, length=6, n_layer=2, n_head=2, n_embd=8, pads=True)


# -------------------------------------------------------------------------------- device placement
class OneDevice(TorchDispatchMode):
    """Within it an operation whose tensors are on two devices is an error, as on a GPU; a number
    is one (not read, so invented), a condition holds, and nothing is NaN."""
    def __init__(self):
        super().__init__()
        self.no = []  # conditions that do not hold

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device for x in tensors if x.dim()}  # a number may come from the CPU
        if len(devices) > 1 and function not in (aten._to_copy.default, aten.copy_.default):
            raise RuntimeError(f"{function} on {devices}")
        known = any(x is no for x in tensors for no in self.no)
        if function is aten._local_scalar_dense.default and tensors[0].is_meta:
            return not known if tensors[0].dtype == torch.bool else 1
        if function is aten._sample_dirichlet.default:
            return torch.empty_like(*tensors)
        result = function(*args, **kwargs or {})
        if known and function is aten.any.default or function is aten.isnan.default or (
                function is aten.ne.Tensor and args[0] is args[1]):
            self.no.append(result)
        return result


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())
    with fx.patch(meta_nonzero_assume_all_nonzero=True), OneDevice():
        yield GPU


def texts(n=4):
    return torch.zeros(n, CONFIG.length, dtype=torch.long, device=GPU)


def settings(flags):
    return distill.parse_flags([*flags.split(), "--groups", "2", "--G", "2", "--lr", "1"])[0]


def networks(flags=""):
    """A frozen teacher, and the networks and optimisers of a distillation with these flags."""
    teacher = model.Denoiser(CONFIG).to(GPU).requires_grad_(False)
    return teacher, distill.networks(settings(flags), teacher)


def move(flags, moving=True):
    """An update of the student, in two parts."""
    teacher, nets = networks(flags)
    args = settings(f"--accumulate 2 {flags}")
    return distill.update(args, nets, teacher, texts, 2, moving)


def train(causal):
    """A step of the teacher's, or the causal model's, gradients and average."""
    args, _ = train_teacher.parse_flags(["--lr", "1e-3"])
    data = types.SimpleNamespace(length_shares=lambda L: torch.ones(L + 1) / L)
    config = model.Config(MASK, 6, 2, 2, 8, causal, pads=True)
    nets = train_teacher.networks(args, config, data, GPU, False)
    bound, loss = train_teacher.bound_and_loss(nets["model"], texts())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(nets["model"].parameters(), 1.0)
    model.update_ema(nets["ema"], nets["model"], 0.9)
    return bound, loss, norm


def write(guided=False, steps=3):
    teacher, nets = networks()
    z = teacher.start(teacher.draw_lengths(4))
    if guided:
        return didi.guided_sample(nets["ema"], nets["disc"], z, steps, MASK)
    return didi.sample(nets["ema"], z, steps, MASK)


def write_one_by_one():
    causal = model.Denoiser(model.Config(MASK, 6, 2, 2, 8, causal=True, pads=True))
    return autoregressive.autoregress(causal.to(GPU), 3, MASK - 1)


def teacher_samples():
    """As a reference, from less steps than are usual."""
    sample = didi.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(didi, "sample", lambda net, z, steps, mask: sample(net, z, 1, mask))
        return distill.make_reference(settings("--paper"), None, networks()[0])(3)


def match():
    """An update of SDTT."""
    teacher, nets = networks()
    args = sdtt.parse_flags([])
    return sdtt.update(args, nets["model"], teacher, nets["opt"], texts(), 4)


RUNS = {
    "update": lambda: move(""), "paper": lambda: move("--paper"), "K 1": lambda: move("--K 1"),
    "paper_scale": lambda: move("--paper_scale"), "warm-up": lambda: move("", moving=False),
    "rest": lambda: move("--no-group_norm --no-coupled --w --kl .1 --power 0"),
    "teacher": lambda: train(False), "causal": lambda: train(True), "SDTT": match,
    "sample": write, "guided": lambda: write(guided=True), "autoregressive": write_one_by_one,
    "teacher samples": teacher_samples}


@pytest.mark.parametrize("run", RUNS)
def test_all_tensors_are_on_one_device(gpu, run):
    results = tree_leaves(RUNS[run]())
    assert results
    for x in results:
        assert not torch.is_tensor(x) or x.device == GPU


def on_the_cpu(function):
    """The function, whose new tensors are on the CPU, as without device=."""
    return lambda *args, **how: function(*args, **{**how, "device": "cpu"})


@pytest.mark.parametrize("name, runs", [
    ("rand", "update sample SDTT"), ("zeros", "update sample"),
    ("ones_like", "update"), ("as_tensor", "sample"), ("arange", "sample guided teacher"),
    ("full", "autoregressive"), ("full_like", "autoregressive"), ("empty", "update")])
def test_a_tensor_that_is_left_on_the_cpu_is_seen(gpu, monkeypatch, name, runs):
    monkeypatch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
    for run in runs.split():
        with pytest.raises(RuntimeError, match="device|copy out of meta"):
            RUNS[run]()


# ------------------------------------------------------------------------ bfloat16, and old GPUs
def prediction(net, z, x, bf16):
    """Log-probabilities at the masks of z and the gradients of their loss on x, each flat."""
    net.bf16, where = bf16, z == net.config.mask_id
    net.zero_grad()
    log_p_x = didi.predict(net, z, where)
    log_p_x.gather(1, x[where][:, None]).mean().backward()
    assert {log_p_x.dtype, *(p.grad.dtype for p in net.parameters())} == {torch.float32}
    return log_p_x.detach().flatten(), torch.cat([p.grad.flatten() for p in net.parameters()])


def test_bfloat16_is_as_near_at_the_published_size_as_rounded_weights():
    """What products round costs little more than weights that are once rounded to bfloat16, and
    those are as near as a network can be that has them."""
    torch.manual_seed(0)
    net = model.Denoiser(model.Config(1000, 32, 12, 12, 768))
    x = torch.randint(1000, (1, 32))
    z, rounded = didi.forward_mask(x, 0.7, 1000), copy.deepcopy(net)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    exact, half = prediction(net, z, x, False), prediction(net, z, x, True)
    least = didi.predict(rounded.requires_grad_(False), z, z == 1000).flatten()
    assert 1 < (half[0] - exact[0]).norm() / (least - exact[0]).norm() < 2
    for a, b in zip(exact, half):
        assert 0 < (b - a).norm() < 0.02 * (a - a.mean()).norm()


@pytest.mark.parametrize("capability, flags, bf16, line", [
    ((7, 5), "", False, "capability 7.5"), ((7, 0), "--no-bf16", False, ""),
    ((7, 5), "--bf16", True, ""), ((8, 0), "", True, ""), ((9, 0), "--no-bf16", False, "")])
def test_an_old_gpu_computes_in_float32_and_says_so(monkeypatch, capsys, capability, flags, bf16,
                                                    line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args, _ = distill.parse_flags(flags.split())
    assert command.setup(args) == (torch.device("cuda"), bf16)
    said = capsys.readouterr().out
    assert said.count("\n") == bool(line) and line in said


@pytest.mark.parametrize("cuda, asked, triton, compiled", [
    (True, False, True, True), (True, False, False, False), (True, True, False, True),
    (False, False, True, False), (False, True, False, True)])
def test_without_triton_nothing_is_compiled(monkeypatch, cuda, asked, triton, compiled):
    find, lengths = importlib.util.find_spec, types.SimpleNamespace(is_cuda=cuda)
    net = types.SimpleNamespace(trunk="as it is", lengths=lengths)
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: triton or None if name == "triton" else find(name))
    monkeypatch.setattr(torch, "compile", lambda trunk: "compiled")
    model.compile_trunk(net, asked)
    assert net.trunk == ("compiled" if compiled else "as it is")


def test_a_checkpoint_keeps_what_was_given_not_what_a_device_settled(tiny, monkeypatch, capsys):
    """Made where there is little memory, it goes on where there is more, and with bfloat16."""
    settled, real = [], memory.fit_update

    def fit_update(args, config, device, bf16):
        least = 2 * (memory.weight_bytes(config, 6) + memory.update_bytes(args, config, bf16, 2))
        monkeypatch.setattr(memory, "free", lambda device: least * (1 + 9 * bf16))
        real(args, config, device, bf16)
        settled.append((args.accumulate, bf16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "fit_update", fit_update)
    flags = "--paper_scale --groups 2 --G 2 --updates 1"
    for flags, fast in ((flags, False), ("--resume --updates 2", True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert not distill.main(flags.split())
        kept = load("out/student.pt")[0]["flags"]
        assert (kept["device"], kept["bf16"], kept["accumulate"]) == ("auto", None, 0)
    assert settled == [(2, False), (1, True)]
    said = [line for line in capsys.readouterr().out.splitlines() if "--accumulate" in line]
    assert [line.split(":")[0] for line in said] == ["--accumulate 2", "--accumulate 1"]

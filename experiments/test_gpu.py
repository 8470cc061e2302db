"""test_gpu.py - what is otherwise on a GPU.

    ON_A_GPU=yes python -m pytest -q experiments/test_gpu.py

All other tests hide the GPU, as they start processes by forks: so test_runs.py runs these in one of
its own.
"""
import os

import pytest
import torch

import didi
import distill
import model
import sample
import train_teacher
from test_didi import DISTIL, ON_CPU, TEACH, load, seed, tiny, toys  # noqa: F401

GPU = "cuda"
pytestmark = pytest.mark.skipif("ON_A_GPU" not in os.environ or not torch.cuda.is_available(),
                                reason="needs a CUDA GPU, see the top")


def test_samples_on_a_gpu_have_the_law_of_a_lookup_table():
    """Two steps at two positions: both revealed at once, or the one or the other first."""
    torch.manual_seed(0)
    table, N = torch.randn(4, 4, 2, 3, device=GPU), 40000  # logits at each z_1, z_2
    p = table.softmax(-1)
    first, second = p[3, 3]
    law = first[:, None] * (second / 2 + p[:3, 3, 1] / 4) + second * p[3, :3, 0].T / 4
    x, _ = didi.sample(lambda z, where: table[z[:, 0], z[:, 1]][where],
                       torch.full((N, 2), 3, device=GPU), 2, 3)
    seen, expected = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9), N * law.flatten()
    assert ((seen - expected) ** 2 / expected).sum() < 45  # chi-square, 8 degrees: p < 1e-6


def test_losses_and_gradients_on_a_gpu_are_those_of_the_cpu():
    torch.manual_seed(0)
    net, z, found = model.Denoiser(model.Config(50, 32, 2, 2, 64)), torch.full((8, 32), 50), []
    for device, bf16, bound in (("cpu", False, 0), (GPU, False, 1e-2), (GPU, True, 5e-2)):
        net.to(device).bf16 = bf16
        net.zero_grad()
        where = torch.ones(8, 32, dtype=torch.bool, device=device)
        loss = -didi.predict(net, z.to(device), where)[:, 7].mean()
        loss.backward()
        grads = [p.grad.flatten().cpu() for p in net.parameters()]
        found.append(torch.cat([loss.detach().cpu()[None], *grads]))
        assert (found[-1] - found[0]).norm() <= bound * found[0].norm()
        assert (found[-1] - found[0])[0].abs() <= bound * found[0][0]


def test_tables_made_in_parts_on_a_gpu_have_the_gradients_of_the_tokens_drawn(monkeypatch):
    """They are made again in backward, random tokens included: one step from all masks."""
    monkeypatch.setattr(model.Config, "part", 50)
    config = model.Config(5000, 32, 2, 2, 32)
    net = model.Denoiser(config).to(GPU)
    z = torch.full((8, 32), config.mask_id, device=GPU)
    x, log_prob, _ = didi.rollout(net, z, torch.tensor([[1.0], [0.0]], device=GPU).expand(-1, 8),
                                  config.mask_id, 2)
    log_p = didi.predict(net, z, z == config.mask_id).view(8, 1, 32, -1).expand(-1, 2, -1, -1)
    again = log_p.flatten(0, 1).gather(2, x[..., None])[..., 0].sum(1)  # (16,)
    weight = torch.arange(16, device=GPU)
    ours, right = (torch.autograd.grad((of * weight).sum(), net.out.weight)[0]
                   for of in (log_prob, again))
    assert (ours - right).norm() < 1e-3 * right.norm()


def test_the_whole_way_on_a_gpu(tiny):
    """With a GPU's defaults, bfloat16 and a compiled teacher; checkpoints move between devices."""
    for script, flags in ((train_teacher, TEACH), (distill, DISTIL)):
        gpu = [*flags[:-len(ON_CPU)], "--device", GPU]
        assert not script.main([*gpu, "--out", "a.pt"])
        assert not script.main(["--resume", "--updates", "6", "--out", "a.pt"])
        load("a.pt")
    for flags in (["--device", GPU], ["--device", GPU, "--sampler", "rgas"], ON_CPU):
        assert not sample.main(["--model", "a.pt", "--num", "3", *flags])

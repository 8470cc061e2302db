"""test_gpu.py - what differs on a GPU; skipped where there is none."""
import pytest
import torch

import didi
import distill
import sample
import train_teacher
from test_didi import MASK, V, chain, check_law, index, masks, seed  # noqa: F401
from test_experiments import SMALL, STUDENT, folder  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = ["--device", "cuda"]


def test_samples_have_the_law_of_the_enumerated_chain():
    table = torch.randn(16, 2, V)
    law = chain(table, [1.0, 0.5, 0.0])
    on_gpu = table.cuda()

    def denoiser(z, where):
        states = z[:, 0] * (V + 1) + z[:, 1]
        return on_gpu[states][where]

    z = masks(40000, 2).cuda()
    x, _ = didi.sample(denoiser, z, 2, MASK)

    check_law(index(x.cpu()), law)


def test_the_whole_way_runs_and_goes_on(folder):  # noqa: F811
    """Run with a GPU's own defaults, so in bfloat16; checkpoints move between devices."""
    train_teacher.main([*GPU, *SMALL.split(), "--updates", "2", "--out", "out/a.pt"])
    distill.main([*GPU, *STUDENT.split(), "--teacher", "out/a.pt", "--out", "out/b.pt"])
    distill.main(["--resume", "--updates", "4", "--out", "out/b.pt"])

    for device in ("cuda", "cpu"):
        flags = ["--sampler", "rgas", "--device", device]
        sample.main(["--model", "out/b.pt", *flags])

"""test_gpu.py - what differs on a GPU; skipped where there is none."""
import pytest
import torch

import didi
import distill
import sample
import train_teacher
from test_didi import MASK, V, chain, check_law, index, lookup, masks, seed  # noqa: F401
from test_experiments import SMALL, STUDENT, folder  # noqa: F401
from test_scripts import call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_samples_have_the_law_of_the_enumerated_chain():
    table = torch.randn(16, 2, V)
    z = masks(40000, 2).cuda()

    x, _ = didi.sample(lookup(table.cuda()), z, 2, MASK, order="random", exponent=1)

    check_law(index(x.cpu()), chain(table, [1.0, 0.5, 0.0]))


def test_the_whole_way_runs_and_goes_on(folder):  # noqa: F811
    """Run with a GPU's own defaults, so in bfloat16; checkpoints move between devices."""
    call(train_teacher, f"{SMALL} --device cuda --updates 2 --out out/a.pt")
    call(distill, f"{STUDENT} --device cuda --teacher out/a.pt --out out/b.pt")
    call(distill, "--resume --updates 4 --out out/b.pt")

    for device in ("cuda", "cpu"):
        call(sample, f"--model out/b.pt --sampler rgas --device {device}")

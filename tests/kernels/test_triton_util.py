"""How kernels are launched and compiled."""

from __future__ import annotations

import math

import torch

from semipd.kernels.rms_norm import rms_norm
from semipd.kernels.triton_util import compiling_in_parallel, is_interpreted


def test_tests_without_a_gpu_interpret_kernels() -> None:
    assert is_interpreted() != torch.cuda.is_available()


def test_launches_inside_compiling_in_parallel_do_not_run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    out = torch.full_like(x, math.nan)
    with compiling_in_parallel():
        rms_norm(x, weight, 1e-5, out)
    assert out.isnan().all()
    rms_norm(x, weight, 1e-5, out)
    assert not out.isnan().any()

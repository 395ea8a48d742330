"""The gated SiLU, kernel and reference, against its formula in float64. Random data, strided inputs between NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from semipd.kernels import silu_mul as module
from semipd.kernels.silu_mul import silu_mul, silu_mul_reference
from semipd.kernels.triton_util import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
# One rounding of the dtype, to the other side.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FILL = -77  # in memory that nothing may write


@pytest.mark.parametrize("function", [silu_mul, silu_mul_reference])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("max_block", [32, 2048])  # rows of several programs, and of one
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 5), (3, 64), (4, 100), (2, 1536)])
def test_silu_of_the_gate_times_up(
    function: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    max_block: int,
    num_rows: int,
    dim: int,
) -> None:
    monkeypatch.setattr(module, "_MAX_BLOCK", max_block)
    generator = torch.Generator(DEVICE).manual_seed(dim)
    inputs = torch.full((num_rows, 2 * dim + 8), math.nan, dtype=dtype, device=DEVICE)
    gate_up = inputs[:, : 2 * dim]
    gate_up.copy_(torch.randn(num_rows, 2 * dim, dtype=torch.float64, device=DEVICE, generator=generator) * 4)
    outputs = torch.full((num_rows + 1, dim + 8), FILL, dtype=dtype, device=DEVICE)
    out = outputs[:-1, :dim]

    function(gate_up, out)

    gate, up = gate_up.double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    assert outputs[-1].eq(FILL).all() and outputs[:, dim:].eq(FILL).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by the interpreter's numpy
@pytest.mark.parametrize("function", [silu_mul, silu_mul_reference])
def test_large_gates_saturate(function: Callable[..., None]) -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 3.0, 5.0, 7.0]], device=DEVICE)
    out = torch.empty(1, 4, device=DEVICE)
    function(gate_up, out)
    torch.testing.assert_close(out, torch.tensor([[0, 0, 500.0, 7e4]], device=DEVICE))

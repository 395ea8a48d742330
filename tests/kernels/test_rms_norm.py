"""RMS norm, kernel and reference, against torch's in float64. Random data, strided inputs between NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels import rms_norm as module
from semipd.kernels.rms_norm import rms_norm, rms_norm_reference
from semipd.kernels.triton_util import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
# One rounding of the dtype, to the other side.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FILL = -77  # in memory that nothing may write

both = pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE, generator=generator).to(dtype)


def padded(rows_TD: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """A strided copy, and the buffer full of `fill` that it lies in."""
    num_rows, dim = rows_TD.shape
    buffer = rows_TD.new_full((num_rows + 2, dim + 16), fill)
    view = buffer[1:-1, 8 : 8 + dim]
    view.copy_(rows_TD)
    return view, buffer


def assert_neighbours_untouched(buffer: Tensor) -> None:
    assert buffer[[0, -1]].eq(FILL).all()
    assert buffer[:, :8].eq(FILL).all() and buffer[:, -8:].eq(FILL).all()


def assert_normed(actual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    expected = F.rms_norm(x.double(), x.shape[-1:], weight.double(), eps)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=1e-6)


@both
@dtypes
@pytest.mark.parametrize("max_block", [32, 8192])  # rows that are read twice, and rows that fit
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 7), (5, 64), (3, 100), (2, 576)])
def test_rows_are_normed(
    norm: Callable[..., None],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    max_block: int,
    num_rows: int,
    dim: int,
) -> None:
    monkeypatch.setattr(module, "_MAX_BLOCK", max_block)
    x, _ = padded(randn(num_rows, dim, dtype=dtype, generator=generator) * 3, math.nan)
    before = x.clone()
    weight = randn(dim, dtype=dtype, generator=generator)
    out, buffer = padded(torch.zeros_like(x), FILL)
    norm(x, weight, 1e-2, out)
    assert_normed(out, x, weight, 1e-2)
    assert torch.equal(x, before)
    assert_neighbours_untouched(buffer)


@both
@dtypes
@pytest.mark.parametrize("max_block", [32, 8192])
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 7), (5, 64), (3, 100), (2, 576)])
def test_the_residual_grows_and_is_normed_as_rounded(
    norm: Callable[..., None],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    max_block: int,
    num_rows: int,
    dim: int,
) -> None:
    monkeypatch.setattr(module, "_MAX_BLOCK", max_block)
    x, _ = padded(randn(num_rows, dim, dtype=dtype, generator=generator), math.nan)
    residual, residual_buffer = padded(randn(num_rows, dim, dtype=dtype, generator=generator) * 3, FILL)
    total = residual + x
    weight = randn(dim, dtype=dtype, generator=generator)
    out, buffer = padded(torch.zeros_like(x), FILL)
    norm(x, weight, 1e-5, out, residual)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    rounding = TOLERANCE[dtype] if dtype == torch.bfloat16 and is_interpreted() else 0
    torch.testing.assert_close(residual, total, rtol=rounding, atol=0)
    assert_normed(out, residual, weight, 1e-5)
    assert_neighbours_untouched(buffer)
    assert_neighbours_untouched(residual_buffer)


@both
def test_the_output_may_be_the_input(norm: Callable[..., None], generator: torch.Generator) -> None:
    x = randn(4, 48, dtype=torch.float32, generator=generator)
    before = x.clone()
    weight = randn(48, dtype=torch.float32, generator=generator)
    norm(x, weight, 1e-5, x)
    assert_normed(x, before, weight, 1e-5)


@both
def test_a_row_of_zeros_is_zero(norm: Callable[..., None]) -> None:
    out = torch.full((2, 40), math.nan, device=DEVICE)
    norm(torch.zeros(2, 40, device=DEVICE), torch.ones(40, device=DEVICE), 1e-6, out)
    assert out.eq(0).all()


def test_a_row_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    x = randn(9, 200, dtype=torch.bfloat16, generator=generator)
    weight = randn(200, dtype=torch.bfloat16, generator=generator)
    out, single = torch.empty_like(x), torch.empty_like(x)
    rms_norm(x, weight, 1e-5, out)
    for row in range(9):
        rms_norm(x[row : row + 1], weight, 1e-5, single[row : row + 1])
    assert torch.equal(out, single)

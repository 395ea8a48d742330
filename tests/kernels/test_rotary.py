"""Head norm, rotation and the write to the pool, kernel and reference, against complex numbers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from semipd.kernels.rotary import rotary_write_kv, rotary_write_kv_reference
from semipd.kernels.triton_util import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
# One rounding of the dtype, to the other side.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NUM_SLOTS = 40
POSITIONS = (0, 1, 7, 4095, 100_000, 0, 131_071)
PADDING_ROW = 5

# Query heads, KV heads, head dim: ratios 1, 3, 4, 7, 8; several programs a token; parts that are no power of two.
SHAPES = ((3, 3, 64), (9, 3, 64), (8, 2, 96), (7, 1, 128), (16, 2, 64), (4, 2, 256), (24, 6, 16), (20, 20, 8))


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE, generator=generator).to(dtype)


def normed(x_TNH: Tensor, weight_H: Tensor | None, eps: float) -> Tensor:
    if weight_H is None:
        return x_TNH
    return x_TNH / (x_TNH.square().mean(-1, keepdim=True) + eps).sqrt() * weight_H.double()


def rotated(x_TNH: Tensor, angles_TH: Tensor) -> Tensor:
    """The halves of a head are the real and the imaginary parts of what turns by `angles_TH`."""
    turned = torch.complex(*x_TNH.chunk(2, -1)) * torch.polar(torch.ones_like(angles_TH), angles_TH)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within a rounding, or one of values an eighth as large as the largest where the two products cancel."""
    tolerance = TOLERANCE[actual.dtype]
    atol = tolerance * float(expected.abs().max()) / 8
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("function", [rotary_write_kv, rotary_write_kv_reference])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_heads_turn_and_the_pool_gets_keys_and_values(
    function: Callable[..., None],
    dtype: torch.dtype,
    has_norm: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(num_heads * head_dim)
    num_rows, num_all_heads, eps = len(POSITIONS), num_heads + 2 * num_kv_heads, 1e-2
    positions = torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(NUM_SLOTS, device=DEVICE, generator=generator)[:num_rows].int()
    slots[PADDING_ROW] = -1
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    buffer = torch.full((num_rows, num_all_heads * head_dim + 16), math.nan, dtype=dtype, device=DEVICE)
    qkv = buffer[:, :-16].view(num_rows, num_all_heads, head_dim)
    qkv.copy_(randn(num_rows, num_all_heads, head_dim, dtype=dtype, generator=generator) * 2)
    before = qkv.clone()
    layers = torch.full((2, NUM_SLOTS, 2 * num_kv_heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    norms = [randn(head_dim, dtype=dtype, generator=generator) if has_norm else None for _ in range(2)]

    function(qkv, positions, inv_freq, layers[1], slots, *norms, eps)

    q, k, v = before.double().split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    angles = (positions[:, None] * inv_freq).double()  # of a float32 product, as the models are trained
    expected_q, expected_k = (
        rotated(normed(heads, weight, eps), angles) for heads, weight in zip((q, k), norms, strict=True)
    )
    assert_near(qkv[:, :num_heads], expected_q)
    assert torch.equal(qkv[:, num_heads:], before[:, num_heads:])
    assert buffer[:, -16:].isnan().all()

    rows = [row for row in range(num_rows) if row != PADDING_ROW]
    written = layers[1, slots[rows].long()]
    assert_near(written[:, :num_kv_heads], expected_k[rows])
    assert torch.equal(written[:, num_kv_heads:], v[rows].to(dtype))
    untouched = sorted(set(range(NUM_SLOTS)) - set(slots[rows].tolist()))
    assert layers[0].isnan().all() and layers[1, untouched].isnan().all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv = randn(6, 12, 64, dtype=torch.bfloat16, generator=generator)
    single = qkv.clone()
    positions = torch.arange(6, dtype=torch.int32, device=DEVICE) * 1000
    slots = torch.arange(6, dtype=torch.int32, device=DEVICE)
    inv_freq = 10_000.0 ** -(torch.arange(0, 64, 2, device=DEVICE) / 64)
    pool, single_pool = (torch.zeros(6, 4, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    rotary_write_kv(qkv, positions, inv_freq, pool, slots)
    for row in range(6):
        at = slice(row, row + 1)
        rotary_write_kv(single[at], positions[at], inv_freq, single_pool, slots[at])
    assert torch.equal(qkv, single) and torch.equal(pool, single_pool)

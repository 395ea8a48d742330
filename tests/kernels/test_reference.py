"""The reference ops against formulas written out in float64. Pure CPU, random data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from semipd.errors import ConfigError
from semipd.kernels import reference
from semipd.kernels.ops import Ops, create_ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest error of one op in units of its largest output: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LINEAR_SHAPES = ((7, 13), (96, 64), (257, 33))  # (outputs, inputs)
MIN_PREPACK_BYTES = 16_000  # between the first and the others in float32


@pytest.fixture(scope="module")
def ops() -> Ops:
    return create_ops("reference")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * expected.double().abs().max(), f"error {error:g}"


def test_an_unknown_op_table_answers_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="op table is 'cuda'; expected one of reference"):
        create_ops("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 17])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_linear_is_a_matmul_with_the_transposed_weight(
    ops: Ops,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_rows: int,
    has_bias: bool,
    is_shared: bool,
) -> None:
    monkeypatch.setattr(reference, "_MIN_PREPACK_BYTES", MIN_PREPACK_BYTES)
    for num_outputs, num_inputs in LINEAR_SHAPES:
        weight = randn(num_outputs, num_inputs, dtype=dtype, generator=generator)
        bias = randn(num_outputs, dtype=dtype, generator=generator) if has_bias else None
        x = randn(num_rows, num_inputs, dtype=dtype, generator=generator)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        linear = ops.pack_linear(weight, bias, is_shared=is_shared)
        assert_near(linear(x), expected, dtype)
        assert torch.equal(linear(x), linear(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 576), (4, 6, 64)])
def test_rms_norm(ops: Ops, generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = (randn(*shape, dtype=dtype, generator=generator) * scale for scale in (3, 0.1))
    weight = randn(*shape[1:], dtype=dtype, generator=generator)
    norm = ops.pack_rms_norm(weight, 1e-2)

    def expected(values: Tensor) -> Tensor:
        values = values.double()
        return values / (values.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()

    assert_near(norm(x), expected(x), dtype)
    total = residual + x
    assert_near(norm.add_(residual, x), expected(total), dtype)
    assert torch.equal(residual, total)


def test_rms_norm_of_zeros_is_zero(ops: Ops) -> None:
    assert ops.pack_rms_norm(torch.ones(8), 1e-6)(torch.zeros(2, 8)).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(ops: Ops, generator: torch.Generator, dtype: torch.dtype) -> None:
    gate_up = randn(5, 2 * 19, dtype=dtype, generator=generator) * 4
    gate, up = gate_up.double()[:, :19], gate_up.double()[:, 19:]
    assert_near(ops.silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, 64), (6, 2, 96), (7, 1, 128)])
def test_rotary_rotates_pairs_and_writes_only_the_given_slots(
    ops: Ops, generator: torch.Generator, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    positions, slots = torch.tensor([0, 1, 7, 1000]), torch.tensor([11, 2, 5, 0])
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    qkv = randn(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, generator=generator)
    before = qkv.double().clone()
    pool = torch.full((12, 2 * num_kv_heads, head_dim), math.nan, dtype=dtype)

    table = ops.rotary_table(positions, inv_freq, dtype)
    ops.rotary_write_kv_(qkv, table, pool, slots)

    expected = before.clone()
    for row, position in enumerate(positions.tolist()):
        for head in range(num_heads + num_kv_heads):
            for pair in range(head_dim // 2):
                angle = position * float(inv_freq[pair])
                a, b = before[row, head, pair], before[row, head, pair + head_dim // 2]
                expected[row, head, pair] = a * math.cos(angle) - b * math.sin(angle)
                expected[row, head, pair + head_dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    assert_near(qkv, expected, dtype)
    assert torch.equal(pool[slots], qkv[:, num_heads:])
    others = [slot for slot in range(12) if slot not in slots.tolist()]
    assert pool[others].isnan().all()


def test_a_build_without_onednn_has_the_same_linear(
    monkeypatch: pytest.MonkeyPatch, ops: Ops, generator: torch.Generator
) -> None:
    monkeypatch.setattr(reference, "_MIN_PREPACK_BYTES", 0)
    weight = randn(50, 16, dtype=torch.float32, generator=generator)
    x = randn(5, 16, dtype=torch.float32, generator=generator)
    expected: dict[bool, Any] = {shared: ops.pack_linear(weight, None, is_shared=shared)(x) for shared in (False, True)}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for shared, outputs in expected.items():
        torch.testing.assert_close(ops.pack_linear(weight, None, is_shared=shared)(x), outputs)

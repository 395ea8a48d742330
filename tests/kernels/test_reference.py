"""The reference ops against formulas written out in float64. Pure CPU, random data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from semipd.errors import ConfigError
from semipd.kernels import reference
from semipd.kernels.ops import AttentionSpec, Ops, StepContext, create_ops
from semipd.kernels.paged_attention import AttentionMetadata

CONTEXT = StepContext(num_sms=1)
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
    with pytest.raises(ConfigError, match="op table is 'cuda'; expected one of reference, triton"):
        create_ops("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 17])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_a_matmul_with_the_transposed_weight(
    ops: Ops,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_rows: int,
    has_bias: bool,
) -> None:
    monkeypatch.setattr(reference, "_MIN_PREPACK_BYTES", MIN_PREPACK_BYTES)
    for num_outputs, num_inputs in LINEAR_SHAPES:
        weight = randn(num_outputs, num_inputs, dtype=dtype, generator=generator)
        bias = randn(num_outputs, dtype=dtype, generator=generator) if has_bias else None
        x = randn(num_rows, num_inputs, dtype=dtype, generator=generator)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        linear = ops.pack_linear(weight, bias)
        outputs = linear(x, CONTEXT)
        assert_near(outputs, expected, dtype)
        assert torch.equal(linear(x, CONTEXT), outputs)
        residual = randn(num_rows, num_outputs, dtype=dtype, generator=generator)
        total = residual.double() + expected
        linear.add_(residual, x, CONTEXT)
        assert_near(residual, total, dtype)
        written = torch.full_like(residual, math.nan)
        linear.write_(written, x, CONTEXT)
        assert torch.equal(written, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 17])
@pytest.mark.parametrize("is_shared", [False, True])
def test_logits_are_float32_at_least(
    ops: Ops, generator: torch.Generator, dtype: torch.dtype, num_rows: int, is_shared: bool
) -> None:
    weight, x = (randn(rows, 64, dtype=dtype, generator=generator) for rows in (2500, num_rows))
    logits = ops.pack_head(weight, is_shared=is_shared)(x, CONTEXT)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(logits.to(dtype), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_table_embeds_its_own_ids(ops: Ops, generator: torch.Generator, dtype: torch.dtype) -> None:
    table = randn(20, 6, dtype=dtype, generator=generator)
    token_ids = torch.tensor([0, 19, 7, 8, 11, 12, 8])
    assert torch.equal(ops.embed(token_ids, table, CONTEXT), table[token_ids])
    part = torch.cat((table[7:12], torch.full((1, 6), math.nan, dtype=dtype)))[:-1]
    rows = ops.embed(token_ids, part, CONTEXT, 7)
    is_here = (token_ids >= 7) & (token_ids < 12)
    assert torch.equal(rows[is_here], table[token_ids[is_here]]) and rows[~is_here].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(ops: Ops, generator: torch.Generator, dtype: torch.dtype) -> None:
    for shape in (1, 5), (3, 576):
        x, weight = (randn(*size, dtype=dtype, generator=generator) for size in (shape, shape[1:]))
        before = x.clone()
        actual = ops.pack_rms_norm(weight, 1e-2)(x, CONTEXT)
        assert_near(actual, normed(x, 1e-2) * weight.double(), dtype)
        assert torch.equal(x, before)


def normed(x: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_rms_norm_of_zeros_is_zero(ops: Ops) -> None:
    assert ops.pack_rms_norm(torch.ones(8), 1e-6)(torch.zeros(2, 8), CONTEXT).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gate_up_is_the_activation_of_both_projections(
    ops: Ops, generator: torch.Generator, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, x = (randn(rows, 16, dtype=dtype, generator=generator) for rows in (2 * 19, 5))
    bias = randn(2 * 19, dtype=dtype, generator=generator) if has_bias else None
    both = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    gate, up = both[:, :19], both[:, 19:]
    assert_near(ops.pack_gate_up(weight, bias)(x, CONTEXT), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, 64), (6, 2, 96), (7, 1, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotary_rotates_pairs_and_writes_only_the_given_slots(
    ops: Ops,
    generator: torch.Generator,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    has_norm: bool,
) -> None:
    positions, slots = torch.tensor([0, 1, 7, 1000]), torch.tensor([11, 2, 5, 0])
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    qkv = randn(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, generator=generator)
    before = qkv.double().clone()
    pool = torch.full((2, 3, 4, 2, num_kv_heads, head_dim), math.nan, dtype=dtype)
    norm = None
    if has_norm:
        q_norm, k_norm = (randn(head_dim, dtype=dtype, generator=generator) for _ in range(2))
        norm = ops.pack_qk_norm(q_norm, k_norm, num_heads, num_kv_heads, 1e-2)
        before[:, :num_heads] = normed(before[:, :num_heads], 1e-2) * q_norm.double()
        keys = before[:, num_heads : num_heads + num_kv_heads]
        keys.copy_(normed(keys, 1e-2) * k_norm.double())

    spec = AttentionSpec(windows=(None, None), scale=1.0, inv_freq=inv_freq)
    metadata = AttentionMetadata(
        slot_mapping_T=slots,
        num_decodes=0,
        decode_block_table_BN=slots[None, :0],
        decode_context_lens_B=slots[:0],
    )
    reference.ReferencePlan(positions, metadata, pool, spec).rotary_write_kv_(1, qkv, norm, CONTEXT)

    expected = before.clone()
    for row, position in enumerate(positions.tolist()):
        for head in range(num_heads + num_kv_heads):
            for pair in range(head_dim // 2):
                angle = position * float(inv_freq[pair])
                a, b = before[row, head, pair], before[row, head, pair + head_dim // 2]
                expected[row, head, pair] = a * math.cos(angle) - b * math.sin(angle)
                expected[row, head, pair + head_dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    assert_near(qkv, expected, dtype)
    written = pool[1].view(12, 2 * num_kv_heads, head_dim)
    assert torch.equal(written[slots], qkv[:, num_heads:])
    others = [slot for slot in range(12) if slot not in slots.tolist()]
    assert written[others].isnan().all()
    assert pool[0].isnan().all()


def test_a_build_without_onednn_has_the_same_linear(
    monkeypatch: pytest.MonkeyPatch, ops: Ops, generator: torch.Generator
) -> None:
    monkeypatch.setattr(reference, "_MIN_PREPACK_BYTES", 0)
    weight = randn(50, 16, dtype=torch.float32, generator=generator)
    x = randn(5, 16, dtype=torch.float32, generator=generator)
    linear, shared_head = ops.pack_linear(weight, None), ops.pack_head(weight, is_shared=True)
    expected = linear(x, CONTEXT), shared_head(x, CONTEXT)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(ops.pack_linear(weight, None)(x, CONTEXT), expected[0])
    torch.testing.assert_close(ops.pack_head(weight, is_shared=True)(x, CONTEXT), expected[1])

"""Paged attention against a loop over single queries in float64, with NaN in every slot that nobody should read."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semipd.kernels import paged_attention
from semipd.kernels.ops import StepContext
from semipd.kernels.paged_attention import AttentionMetadata, PagedAttention, PrefillMetadata

CONTEXT = StepContext(num_sms=1)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GARBAGE = 10**9  # a block id that would be an error to read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Contexts of a step: decodes by length, chunks by (start, rows)."""

    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    windows: tuple[int | None, ...] = (None,)
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 2
    is_shuffled: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0


def check(case: Case) -> None:
    """Lay the contexts of `case` out in a pool of NaN, attend, and compare with the loop."""
    rng, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    size, num_layers = case.block_size, len(case.windows)
    ends = list(case.decodes) + [start + num_rows for start, num_rows in case.chunks]
    counts = [1] * len(case.decodes) + [num_rows for _, num_rows in case.chunks]
    needed = [-(-end // size) for end in ends]
    block_ids = list(range(sum(needed) + 3))
    if case.is_shuffled:
        rng.shuffle(block_ids)
    kv = torch.full((num_layers, len(block_ids), size, 2, case.num_kv_heads, case.head_dim), math.nan, dtype=case.dtype)
    widest = None if None in case.windows else max(window for window in case.windows if window is not None)
    tables: list[list[int]] = []
    contexts: list[Tensor] = []  # [L, C, 2, K, H] each
    for end, num_rows, num_blocks in zip(ends, counts, needed, strict=True):
        table = [block_ids.pop(0) for _ in range(num_blocks)]
        shape = (num_layers, end, 2, case.num_kv_heads, case.head_dim)
        context = torch.randn(shape, dtype=torch.float64, generator=generator).to(case.dtype)
        first = 0 if widest is None else max(0, end - num_rows - widest + 1)
        for position in range(first, end):
            kv[:, table[position // size], position % size] = context[:, position]
        table[: first // size] = [GARBAGE] * (first // size)
        tables.append(table)
        contexts.append(context)
    num_rows = sum(counts)
    q = torch.randn(num_rows, case.num_heads, case.head_dim, dtype=torch.float64, generator=generator).to(case.dtype)
    metadata = make_metadata(case, tables)
    scale = 0.3

    plan = PagedAttention(metadata, kv, case.windows, scale)
    for layer, window in enumerate(case.windows):
        actual = plan.attend(layer, q, CONTEXT)
        expected = naive(q, [context[layer] for context in contexts], ends, counts, window, scale)
        assert actual.shape == (num_rows, case.num_heads * case.head_dim)
        assert actual.dtype == case.dtype
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCE[case.dtype], f"layer {layer}: error {error:g}"
        assert torch.equal(actual, plan.attend(layer, q, CONTEXT))


def make_metadata(case: Case, tables: list[list[int]]) -> AttentionMetadata:
    num_decodes = len(case.decodes)
    width = max(map(len, tables[:num_decodes]), default=0)
    decode_tables = [table + [GARBAGE] * (width - len(table)) for table in tables[:num_decodes]]
    prefills = []
    row = num_decodes
    for (start, num_rows), table in zip(case.chunks, tables[num_decodes:], strict=True):
        table_N = torch.tensor([*table, GARBAGE])
        prefills.append(PrefillMetadata(row_start=row, num_rows=num_rows, start_position=start, block_table_N=table_N))
        row += num_rows
    return AttentionMetadata(
        slot_mapping_T=torch.zeros(row, dtype=torch.int64),  # attention does not write
        num_decodes=num_decodes,
        decode_block_table_BN=torch.tensor(decode_tables, dtype=torch.int64).view(num_decodes, width),
        decode_context_lens_B=torch.tensor(case.decodes, dtype=torch.int64),
        prefills=tuple(prefills),
    )


def naive(
    q_TNH: Tensor, contexts: list[Tensor], ends: list[int], counts: list[int], window: int | None, scale: float
) -> Tensor:
    outputs = []
    rows = iter(q_TNH.double())
    for context, end, num_rows in zip(contexts, ends, counts, strict=True):
        for position in range(end - num_rows, end):
            first = 0 if window is None else max(0, position - window + 1)
            keys, values = context[first : position + 1].double().unbind(1)
            for head, query in enumerate(next(rows)):
                kv_head = head * keys.shape[1] // q_TNH.shape[1]
                outputs.append(torch.softmax(keys[:, kv_head] @ query * scale, 0) @ values[:, kv_head])
    return torch.stack(outputs).view(q_TNH.shape[0], -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 64), (9, 3, 96), (8, 1, 128), (7, 1, 64)])
def test_mixed_step_of_every_dtype_and_head_shape(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    check(
        Case(
            decodes=(1, 37, 18),
            chunks=((0, 5), (9, 4), (16, 1)),
            windows=(None, 6),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
    )


@given(
    decodes=st.lists(st.integers(1, 40), max_size=4),
    chunks=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=3),
    windows=st.lists(st.none() | st.integers(1, 24), min_size=1, max_size=3),
    group=st.sampled_from([1, 3, 4, 7]),
    block_size=st.sampled_from([1, 2, 16]),
    is_shuffled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_step(
    decodes: list[int],
    chunks: list[tuple[int, int]],
    windows: list[int | None],
    group: int,
    block_size: int,
    is_shuffled: bool,
    seed: int,
) -> None:
    if not decodes and not chunks:
        decodes = [1]
    case = Case(
        decodes=tuple(decodes),
        chunks=tuple(chunks),
        windows=tuple(windows),
        num_heads=2 * group,
        block_size=block_size,
        is_shuffled=is_shuffled,
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as patch:  # the same paths as with long contexts
        patch.setattr(paged_attention, "_MAX_PADDING", 5)
        patch.setattr(paged_attention, "_MAX_MASKED_ROWS", 6)
        check(case)


@pytest.mark.parametrize("window", [None, 100, 700])
def test_chunks_longer_than_one_tile(window: int | None) -> None:
    check(Case(chunks=((0, 600), (300, 530)), windows=(window,), block_size=16, num_heads=1, num_kv_heads=1))


def test_decode_rows_do_not_depend_on_lengths_of_others_beyond_rounding() -> None:
    check(Case(decodes=(400, 3, 250, 130, 1), num_heads=6, block_size=16, dtype=torch.float32))


def test_contexts_that_lie_in_order_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail("gathered a context that lies in the pool in order")

    case = Case(decodes=(37,), chunks=((5, 8),), windows=(None, 9), block_size=4, is_shuffled=False)
    monkeypatch.setattr(torch, "index_select", refuse)
    check(case)

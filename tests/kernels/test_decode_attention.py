"""Decode attention, kernel and reference, against single queries in float64, with NaN where nobody should read."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semipd.kernels.decode_attention import decode_attention, decode_attention_reference
from semipd.kernels.decode_splits import (
    DecodeConfig,
    DecodeScratch,
    decode_config,
    max_decode_items,
    plan_decode_splits,
)
from tests.kernels.contexts import DEVICE, TOLERANCE, Contexts, Heads

SCALE = 0.3
CONFIG = DecodeConfig(block_n=16, split_tokens=32, max_splits=3, num_warps=1, num_stages=3, ctas_per_sm=1)
LENGTHS = (37, 1, 16, 129, 33)


def to_device(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_scratch(heads: Heads, num_requests: int, max_items: int, q_len: int) -> DecodeScratch:
    """Scratch memory of NaN, and of counts that are wrong."""
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim, q_len)
    scratch = DecodeScratch.create(num_requests, max_items, *shape, device=DEVICE)
    for tensor in (scratch.partials_WNH, scratch.lse_WN, scratch.arrivals_BK):
        tensor.view(torch.uint8).fill_(255)
    return scratch


def run(
    contexts: Contexts,
    q_len: int = 1,
    num_padding: int = 0,
    num_sms: int = 3,
    config: DecodeConfig = CONFIG,
    q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plan the step and launch it twice; the second launch finds what the first one left. Returns queries, outputs."""
    heads, table = contexts.heads, contexts.block_table_XN
    slots = to_device([*contexts.slots, *[table.shape[0] - 1] * num_padding])
    lengths = to_device([*(length for length, _ in contexts.sizes), *[0] * num_padding])
    random_q, out = contexts.queries(num_padding * q_len)
    q = random_q if q is None else q
    max_items = max_decode_items(len(slots), int(lengths.max()), config)
    scratch = make_scratch(heads, len(slots), max_items, q_len)
    items = torch.full((1 + max_items, 8), -1, dtype=torch.int32, device=DEVICE)
    window = contexts.window
    plan_decode_splits(slots, lengths, items, scratch, config=config, q_len=q_len, window=window)
    for _ in range(2):
        out.fill_(math.nan)
        decode_attention(
            q,
            contexts.kv_R2KH,
            table,
            items,
            scratch,
            out,
            block_size=heads.block_size,
            scale=SCALE,
            config=config,
            num_sms=num_sms,
            q_len=q_len,
            window=window,
        )
        assert not scratch.arrivals_BK.any()
    return q, out


def rows_of(lengths: Sequence[int], q_len: int = 1) -> list[tuple[int, int]]:
    return [(length, q_len) for length in lengths]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 32), (7, 1, 96)])
def test_every_dtype_and_head_shape(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    contexts = Contexts(heads, rows_of((37, 1, 98)), None)
    contexts.check(*run(contexts), SCALE)


@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 64])
def test_every_block_size_and_window(block_size: int, window: int | None) -> None:
    contexts = Contexts(Heads(block_size=block_size), rows_of(LENGTHS), window)
    config = dataclasses.replace(CONFIG, block_n=32, num_warps=2)
    contexts.check(*run(contexts, num_padding=2, config=config), SCALE)


def test_more_splits_than_are_merged_at_once() -> None:
    config = dataclasses.replace(CONFIG, split_tokens=16, max_splits=20)
    contexts = Contexts(Heads(), rows_of((300, 130, 20)), None)
    contexts.check(*run(contexts, config=config), SCALE)


@pytest.mark.parametrize("window", [None, 2, 21])
@pytest.mark.parametrize(("q_len", "num_heads"), [(2, 2), (3, 14), (8, 16)])
def test_query_rows_of_a_request_see_one_token_more_each(q_len: int, num_heads: int, window: int | None) -> None:
    heads = Heads(num_heads=num_heads, head_dim=32, block_size=8, dtype=torch.float16)
    # 98 tokens: the last split has two tokens, which the first rows do not see.
    contexts = Contexts(heads, rows_of((8, 40, 98), q_len), window)
    contexts.check(*run(contexts, q_len=q_len, num_padding=1), SCALE)


@pytest.mark.parametrize(("block_n", "num_warps"), [(16, 1), (32, 1), (32, 2), (64, 4)])
def test_tiles_of_several_blocks_and_blocks_of_several_tiles(block_n: int, num_warps: int) -> None:
    config = dataclasses.replace(CONFIG, block_n=block_n, split_tokens=64, num_warps=num_warps)
    contexts = Contexts(Heads(block_size=32), rows_of(LENGTHS), 50)
    contexts.check(*run(contexts, config=config), SCALE)


def test_a_result_depends_neither_on_the_number_of_sms_nor_on_neighbours() -> None:
    contexts = Contexts(Heads(dtype=torch.bfloat16), rows_of(LENGTHS), None)
    q, out = run(contexts, num_sms=1)
    for num_sms, rows in ((2, slice(5)), (132, slice(2, 5)), (3, slice(3, 4))):
        part = copy.copy(contexts)
        part.sizes, part.slots = contexts.sizes[rows], contexts.slots[rows]
        assert torch.equal(run(part, num_sms=num_sms, q=q[rows])[1], out[rows])


def test_a_step_of_padding_writes_nothing() -> None:
    contexts = Contexts(Heads(), rows_of((5,)), None)
    contexts.sizes, contexts.slots = [], []
    _, out = run(contexts, num_padding=3)
    assert out.shape[0] == 3 and out.isnan().all()


@pytest.mark.parametrize("window", [None, 3, 40])
def test_items_cover_what_is_read_in_equal_parts_and_in_order(window: int | None) -> None:
    lengths = [0, 1, 31, 32, 33, 64, 65, 96, 97, 160, 1000, 0]
    slots = list(range(len(lengths)))[::-1]
    max_items = max_decode_items(len(lengths), max(lengths), CONFIG)
    scratch = make_scratch(Heads(), len(lengths), max_items, 1)
    items = torch.full((1 + max_items, 8), -1, dtype=torch.int32, device=DEVICE)
    plan_decode_splits(to_device(slots), to_device(lengths), items, scratch, config=CONFIG, window=window)

    (num_items, *_), *rows = items.tolist()
    assert rows[num_items:] == [[-1] * 8] * (max_items - num_items)
    for request, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        mine = [row for row in rows[:num_items] if row[0] == request]
        first = 0 if window is None else max(0, length - window)
        begins, ends = [row[2] for row in mine], [row[3] for row in mine]
        assert [row[1] for row in mine] == [slot] * len(mine)
        assert [row[4:7] for row in mine] == [[length, split, len(mine)] for split in range(len(mine))]
        if length:
            read = length - first // 16 * 16
            assert begins == [first // 16 * 16, *ends[:-1]] and ends[-1] == length
            assert len(mine) <= min(3, -(-read // 32)) and max(ends[i] - begins[i] for i in range(len(mine))) >= 1
            sizes = [-(-(end - begin) // 16) for begin, end in zip(begins, ends, strict=True)]
            assert set(sizes[:-1]) <= {sizes[0]} and 1 <= sizes[-1] <= sizes[0]
        else:
            assert not mine
    assert [row[0] for row in rows[:num_items]] == sorted(row[0] for row in rows[:num_items])


def test_more_requests_than_the_plan_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semipd.kernels.decode_splits._PLAN_BLOCK", 4)
    contexts = Contexts(Heads(), rows_of((33, 5, 70, 1, 64, 18, 97)), None)
    contexts.check(*run(contexts, num_padding=2), SCALE)


def test_items_that_do_not_fit_are_left_out() -> None:
    lengths = to_device([40, 100])
    items = torch.full((5, 8), -1, dtype=torch.int32, device=DEVICE)
    scratch = make_scratch(Heads(), 2, 3, 1)
    plan_decode_splits(to_device([0, 1]), lengths, items[:4], scratch, config=CONFIG)
    assert items[:, 0].tolist() == [3, 0, 0, 1, -1]


@pytest.mark.parametrize("window", [None, 2, 21])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference(dtype: torch.dtype, window: int | None) -> None:
    q_len = 2
    contexts = Contexts(Heads(dtype=dtype, block_size=8), rows_of((2, 40, 98), q_len), window)
    q, out = contexts.queries(num_padding=q_len)
    decode_attention_reference(
        q,
        contexts.kv_R2KH,
        contexts.block_table_XN,
        to_device([*contexts.slots, contexts.block_table_XN.shape[0] - 1]),
        to_device([2, 40, 98, 0]),
        out,
        block_size=8,
        scale=SCALE,
        q_len=q_len,
        window=window,
    )
    contexts.check(q, out, SCALE)


@pytest.mark.parametrize(("has_tma", "kib"), [(False, 100), (True, 228)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_configurations_fit_an_sm(head_dim: int, dtype: torch.dtype, has_tma: bool, kib: int) -> None:
    config = decode_config(head_dim, dtype, has_tma=has_tma)
    head_block = 1 << (head_dim - 1).bit_length()
    # What the pipeliner keeps of K and V, the queries, 2 KiB of weights, and 1 KiB that the driver takes.
    rows = 16 + 2 * (config.num_stages - 1) * config.block_n
    assert (rows * head_block * dtype.itemsize + 3 * 1024) * config.ctas_per_sm <= kib * 1024
    assert config.max_registers >= 128 and config.split_tokens % config.block_n == 0

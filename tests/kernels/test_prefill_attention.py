"""Prefill attention, kernel and reference, against single queries in float64, with NaN where nobody should read."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semipd.kernels.prefill_attention import (
    PrefillConfig,
    max_prefill_tiles,
    prefill_attention,
    prefill_attention_reference,
    prefill_config,
    prefill_tiles,
)
from semipd.kernels.prefill_attention_hopper import HALF_M
from tests.kernels.contexts import DEVICE, TOLERANCE, Contexts, Heads

SCALE = 0.3
POINTERS = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, use_tma=False)
TMA = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, use_tma=True)
# By (length, rows of the chunk): a whole prompt, a later chunk whose ends are ragged, one row, whole tiles.
SIZES = ((20, 20), (70, 9), (33, 1), (48, 16))


def tiles_of(contexts: Contexts, block_m: int, num_unused: int = 2) -> Tensor:
    """The tiles of the contexts' rows in order, then unused ones."""
    chunks, row = [], 0
    for slot, (length, num_rows) in zip(contexts.slots, contexts.sizes, strict=True):
        chunks.append((slot, row, num_rows, length - num_rows))
        row += num_rows
    tiles = prefill_tiles(chunks, block_m) + [(0, 0, 0, 0)] * num_unused
    return torch.tensor(tiles, dtype=torch.int32, device=DEVICE)


def run(contexts: Contexts, config: PrefillConfig, num_padding: int = 2) -> tuple[Tensor, Tensor]:
    q, out = contexts.queries(num_padding)
    prefill_attention(
        q,
        contexts.kv_R2KH,
        contexts.block_table_XN,
        tiles_of(contexts, config.block_m),
        out,
        block_size=contexts.heads.block_size,
        scale=SCALE,
        config=config,
        num_sms=4,
        window=contexts.window,
    )
    return q, out


@pytest.mark.parametrize("config", [POINTERS, TMA])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 32), (7, 1, 96)])
def test_every_dtype_and_head_shape(
    config: PrefillConfig, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    contexts = Contexts(heads, ((37, 12), (5, 5)), None)
    contexts.check(*run(contexts, config), SCALE)


@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize(
    ("block_size", "config"), [*((size, POINTERS) for size in (1, 2, 8, 16, 64)), (16, TMA), (64, TMA)]
)
def test_every_block_size_and_window(block_size: int, config: PrefillConfig, window: int | None) -> None:
    contexts = Contexts(Heads(num_heads=2, num_kv_heads=1, block_size=block_size), SIZES, window)
    contexts.check(*run(contexts, config), SCALE)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("use_tma", [False, True])
def test_tiles_of_every_shape(block_m: int, block_n: int, use_tma: bool, window: int | None) -> None:
    config = PrefillConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2, use_tma=use_tma)
    contexts = Contexts(Heads(num_heads=2, num_kv_heads=1, block_size=64, dtype=torch.float16), SIZES, window)
    contexts.check(*run(contexts, config), SCALE)


@pytest.mark.parametrize("window", [None, 3, 17, 30])
def test_ragged_ends_of_every_kind(window: int | None) -> None:
    rng = random.Random(window)
    sizes = [(length, rng.randint(1, min(length, 20))) for length in rng.sample(range(1, 64), 12)]
    contexts = Contexts(Heads(num_heads=1, num_kv_heads=1, head_dim=16), sizes, window)
    contexts.check(*run(contexts, TMA), SCALE)


@pytest.mark.parametrize("config", [POINTERS, TMA])
def test_a_row_depends_on_its_context_alone(config: PrefillConfig) -> None:
    """Bit for bit: not on how its prompt was cut into chunks, nor on the step's other rows."""
    heads = Heads(num_heads=2, num_kv_heads=1, dtype=torch.bfloat16)
    whole = Contexts(heads, ((50, 50), (20, 7)), None)
    q, out = run(whole, config)
    for cut in (1, 16, 23, 49):
        first, second = torch.full_like(out, math.nan), torch.full_like(out, math.nan)
        for target, (row, end) in ((first, (0, cut)), (second, (cut, 50))):
            tiles = prefill_tiles([(whole.slots[0], row, end - row, row)], config.block_m)
            prefill_attention(
                q,
                whole.kv_R2KH,
                whole.block_table_XN,
                torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
                target,
                block_size=heads.block_size,
                scale=SCALE,
                config=config,
                num_sms=4,
            )
        assert torch.equal(first[:cut], out[:cut]) and torch.equal(second[cut:50], out[cut:50])
        assert first[cut:].isnan().all() and second[:cut].isnan().all()


@pytest.mark.parametrize("window", [None, 2, 21])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference(dtype: torch.dtype, window: int | None) -> None:
    contexts = Contexts(Heads(dtype=dtype, block_size=8), SIZES, window)
    q, out = contexts.queries(2)
    tiles = tiles_of(contexts, 16)
    shared = (q, contexts.kv_R2KH, contexts.block_table_XN, tiles, out)
    prefill_attention_reference(*shared, block_size=8, scale=SCALE, window=window)
    contexts.check(q, out, SCALE)


Chunks = Sequence[tuple[int, int, int, int]]


@pytest.mark.parametrize("block_m", [1, 16, 128])
@pytest.mark.parametrize("seed", range(5))
def test_tiles_cover_each_row_once_and_the_longest_come_first(block_m: int, seed: int) -> None:
    rng = random.Random(seed)
    chunks, row = [], 0
    for slot in range(rng.randint(1, 9)):
        num_rows = rng.choice((1, 2, block_m, rng.randint(1, 700)))
        chunks.append((slot, row, num_rows, rng.choice((0, block_m, rng.randint(0, 900)))))
        row += num_rows

    tiles = prefill_tiles(chunks, block_m)

    covered = sorted((row_start + i, slot, start + i) for slot, row_start, count, start in tiles for i in range(count))
    expected = [(first + i, slot, start + i) for slot, first, count, start in chunks for i in range(count)]
    assert covered == expected
    assert all(0 < count <= block_m for _, _, count, _ in tiles)
    assert all(start // block_m == (start + count - 1) // block_m for _, _, count, start in tiles)
    ends = [start + count for _, _, count, start in tiles]
    assert ends == sorted(ends, reverse=True)
    assert len(tiles) <= max_prefill_tiles(row, len(chunks), block_m)


@pytest.mark.parametrize("num_rows", [[2, 2], [128], [129, 1], [127] * 3])
def test_the_most_tiles_fit(num_rows: list[int]) -> None:
    """Chunks that start at a tile's last position."""
    chunks = [(0, 0, count, 127) for count in num_rows]
    assert len(prefill_tiles(chunks, 128)) <= max_prefill_tiles(sum(num_rows), len(num_rows), 128)


@pytest.mark.parametrize(("has_tma", "kib"), [(False, 99), (True, 227)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_configurations_fit_an_sm(head_dim: int, block_size: int, dtype: torch.dtype, has_tma: bool, kib: int) -> None:
    config = prefill_config(head_dim, block_size, dtype, has_tma=has_tma)
    head_block = 1 << (head_dim - 1).bit_length()
    # The asynchronous products of Hopper read the buffer that the next load would take, and their weights in registers.
    is_async = has_tma and dtype != torch.float32
    rows = config.block_m + 2 * (config.num_stages - (not is_async)) * config.block_n
    num_weights = 0 if is_async else config.block_m * config.block_n
    assert (rows * head_block + num_weights) * dtype.itemsize <= kib * 1024 - 512  # barriers and sums
    assert not config.use_tma or (has_tma and block_size % config.block_n == 0)


@pytest.mark.parametrize("window", [None, 5])
def test_the_hopper_kernel_runs_where_it_should(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiles and the SMs that were given, and not where there is a window."""
    launched: list[tuple[int, int]] = []

    def launch(*tensors: Tensor, block_size: int, num_sms: int, scale: float) -> None:
        launched.append((len(tensors[3]), num_sms))

    monkeypatch.setattr("semipd.kernels.prefill_attention_hopper.prefill_attention_hopper", launch)
    contexts = Contexts(Heads(num_heads=2, num_kv_heads=1), SIZES, window)
    run(contexts, dataclasses.replace(POINTERS, use_hopper_kernel=True))
    assert launched == ([(len(tiles_of(contexts, POINTERS.block_m)), 4)] if window is None else [])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_the_hopper_kernel_is_for_what_it_covers(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    config = prefill_config(head_dim, block_size, dtype, has_tma=True, is_hopper=True)
    is_covered = dtype != torch.float32 and head_dim in (64, 128) and block_size in (64, 128, 192, 256)
    assert config.use_hopper_kernel == is_covered
    assert not is_covered or config.block_m == 2 * HALF_M
    elsewhere = prefill_config(head_dim, block_size, dtype, has_tma=True)
    assert dataclasses.replace(config, use_hopper_kernel=False) == elsewhere

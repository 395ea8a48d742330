"""Step inputs, kernels and references, against loops over rows. Random requests; outputs are slices of full buffers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from semipd.kernels import step_inputs as module
from semipd.kernels.step_inputs import (
    apply_block_updates,
    apply_block_updates_reference,
    decode_inputs,
    decode_inputs_reference,
    gather_rows,
    gather_rows_reference,
    prefill_inputs,
    prefill_inputs_reference,
)
from semipd.kernels.triton_util import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
NUM_REQUESTS = 37  # and the null slot behind them
MAX_BLOCKS = 12
FILL = -77  # in memory that nothing may write

block_sizes = pytest.mark.parametrize("block_size", [1, 2, 16, 64])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a few rows."""
    monkeypatch.setattr(module, "_BLOCK", 8)
    monkeypatch.setattr(module, "_CHUNK_BLOCK", 8)


def randint(low: int, high: int, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32, device=DEVICE, generator=generator)


def random_table(generator: torch.Generator) -> Tensor:
    """Distinct blocks everywhere; the null request's are garbage."""
    num_blocks = (NUM_REQUESTS + 1) * MAX_BLOCKS
    table = torch.randperm(num_blocks, device=DEVICE, generator=generator).int().view(-1, MAX_BLOCKS)
    table[-1] = 2**30
    return table


def outputs(count: int, num_rows: int, dtype: torch.dtype = torch.int32) -> list[tuple[Tensor, Tensor]]:
    """Slices for results, each with its buffer, at odd alignments."""
    buffers = [torch.full((num_rows + 2 + index,), FILL, dtype=dtype, device=DEVICE) for index in range(count)]
    return [(buffer[1 + index : 1 + index + num_rows], buffer) for index, buffer in enumerate(buffers)]


def assert_neighbours_untouched(results: list[tuple[Tensor, Tensor]]) -> None:
    for index, (view, buffer) in enumerate(results):
        assert buffer[: 1 + index].eq(FILL).all()
        assert buffer[1 + index + view.shape[0] :].eq(FILL).all()


@pytest.mark.parametrize("function", [apply_block_updates, apply_block_updates_reference])
@pytest.mark.parametrize("num_updates", [0, 1, 13, 20])
def test_only_the_first_updates_are_applied(
    function: Callable[..., None], generator: torch.Generator, num_updates: int
) -> None:
    table = random_table(generator)
    expected = table.clone()
    places = torch.randperm(table.numel(), device=DEVICE, generator=generator)[:20]
    block_ids = randint(0, 10_000, 20, generator=generator)
    updates = torch.stack((places // MAX_BLOCKS, places % MAX_BLOCKS, block_ids), 1).int()
    for slot, index, block_id in updates[:num_updates].tolist():
        expected[slot, index] = block_id
    function(updates, torch.tensor([num_updates], dtype=torch.int32, device=DEVICE), table)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("function", [decode_inputs, decode_inputs_reference])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_decodes", "num_padding"), [(1, 0), (0, 3), (5, 3), (30, 2)])
@block_sizes
def test_decode_rows_append_to_their_requests(
    function: Callable[..., None],
    generator: torch.Generator,
    block_size: int,
    token_dtype: torch.dtype,
    num_decodes: int,
    num_padding: int,
) -> None:
    num_rows = num_decodes + num_padding
    table = random_table(generator)
    lengths = randint(0, MAX_BLOCKS * block_size, NUM_REQUESTS + 1, generator=generator)
    last_token = randint(1, 50_000, NUM_REQUESTS + 1, generator=generator).long()
    slots = torch.full((num_rows,), NUM_REQUESTS, dtype=torch.int32, device=DEVICE)
    rows = torch.randperm(num_rows, device=DEVICE, generator=generator)[:num_decodes]
    slots[rows] = torch.randperm(NUM_REQUESTS, device=DEVICE, generator=generator)[:num_decodes].int()
    expected_lengths = lengths.clone()
    expected = []
    for slot in slots.tolist():
        if slot == NUM_REQUESTS:
            expected.append((FILL, 0, -1, 0))
            continue
        position = int(lengths[slot])
        block_id, offset = int(table[slot, position // block_size]), position % block_size
        expected.append((int(last_token[slot]), position, block_id * block_size + offset, position + 1))
        expected_lengths[slot] += 1
    before = table.clone(), last_token.clone()

    results = outputs(1, num_rows, token_dtype) + outputs(4, num_rows)[1:]
    function(slots, lengths, last_token, table, block_size, *(view for view, _ in results))

    assert list(zip(*(view.tolist() for view, _ in results), strict=True)) == expected
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(table, before[0]) and torch.equal(last_token, before[1])
    assert_neighbours_untouched(results)


@pytest.mark.parametrize("function", [prefill_inputs, prefill_inputs_reference])
@pytest.mark.parametrize(("counts", "num_padding"), [((1,), 0), ((), 3), ((3, 1, 20), 5), ((8, 8), 0), ((2, 5, 9), 30)])
@pytest.mark.parametrize("num_decodes", [0, 1, 13])
@block_sizes
def test_chunks_have_consecutive_positions(
    function: Callable[..., None],
    generator: torch.Generator,
    block_size: int,
    num_decodes: int,
    counts: tuple[int, ...],
    num_padding: int,
) -> None:
    table = random_table(generator)
    lengths = randint(0, 100, NUM_REQUESTS + 1, generator=generator)
    requests = torch.randperm(NUM_REQUESTS, device=DEVICE, generator=generator).tolist()
    chunks = torch.tensor([[0, 10**6, 0, 10**6]] * 6, dtype=torch.int32, device=DEVICE)  # unused
    expected_lengths = lengths.clone()
    expected = [(FILL, FILL)] * num_decodes
    for chunk, count in enumerate(counts):
        slot = requests[chunk]
        count = min(count, MAX_BLOCKS * block_size)
        start = int(randint(0, MAX_BLOCKS * block_size - count + 1, 1, generator=generator))
        chunks[chunk] = torch.tensor((slot, len(expected), count, start))
        for position in range(start, start + count):
            block_id, offset = int(table[slot, position // block_size]), position % block_size
            expected.append((position, block_id * block_size + offset))
        expected_lengths[slot] = start + count
    chunks[len(counts)] = torch.tensor((NUM_REQUESTS, len(expected), num_padding, 0))
    expected += [(position, -1) for position in range(num_padding)]

    results = outputs(2, len(expected))
    function(chunks, table, lengths, block_size, *(view for view, _ in results))

    assert list(zip(*(view.tolist() for view, _ in results), strict=True)) == expected
    assert torch.equal(lengths, expected_lengths)
    assert_neighbours_untouched(results)


@pytest.mark.parametrize("function", [gather_rows, gather_rows_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("max_block", [32, 4096])  # rows of several programs, and of one
@pytest.mark.parametrize("dim", [5, 64, 100, 576])
def test_rows_are_gathered_and_padding_is_zero(
    function: Callable[..., None],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    max_block: int,
    dim: int,
) -> None:
    monkeypatch.setattr(module, "_MAX_ROW_BLOCK", max_block)
    rows = torch.tensor([3, -1, 8, 0, 3, -1], dtype=index_dtype, device=DEVICE)
    source = torch.full((9, dim + 4), math.nan, dtype=dtype, device=DEVICE)[:, :dim]
    used = [0, 3, 8]
    source[used] = torch.randn(len(used), dim, device=DEVICE, generator=generator).to(dtype)
    buffer = torch.full((8, dim + 8), FILL, dtype=dtype, device=DEVICE)
    out = buffer[1:-1, :dim]

    function(source, rows, out)

    for row, values in zip(rows.tolist(), out, strict=True):
        assert torch.equal(values, torch.zeros_like(values) if row < 0 else source[row])
    assert buffer[:, dim:].eq(FILL).all() and buffer[[0, -1]].eq(FILL).all()


@pytest.mark.parametrize("function", [gather_rows, gather_rows_reference])
def test_rows_that_a_part_of_a_table_has_not_are_zero(
    function: Callable[..., None], generator: torch.Generator
) -> None:
    table = torch.full((12, 40), math.nan, device=DEVICE)
    table[3:8] = torch.randn(5, 40, device=DEVICE, generator=generator)
    rows = torch.tensor([0, 2, 3, 5, 7, 8, 11, 3], dtype=torch.int32, device=DEVICE)
    out = torch.full((8, 40), FILL, dtype=torch.float32, device=DEVICE)

    function(table[3:8], rows, out, first_row=3)

    for row, values in zip(rows.tolist(), out, strict=True):
        assert torch.equal(values, table[row] if 3 <= row < 8 else torch.zeros_like(values))

"""Sums over the ranks of one host, with the residual and the RMS norm behind them, in one launch and without NCCL.

Every rank has an inbox, which the others write over NVLink (`device/peer_memory.py`). A message is its own signal: an
inbox is full of EMPTY, a word that is never sent, and who waits for a word polls its own memory until it is something
else. So a sum costs one way over the link, and no flag, fence or count of steps: graphs can replay it. What has been
read is made EMPTY again. For that calls alternate between the two halves of the inboxes: who sends into a half again
has everything of the call in between, hence from ranks that were done with the half.

One shot: all send their rows to all, and all sum all rows. Two shots, for more bytes or ranks: a rank sums a share of
the rows and sends them on as normed; the residual of a row then stays with the rank that sums it.

All move words of 4 bytes, which arrive whole; a sum is over the ranks in their order, in float32, by a layout that
follows from the row's length and the number of ranks. So all ranks get the same bits, whatever the batch and grid.

Shapes: T rows of a step, D model dim, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.rms_norm import rms_norm_reference
from semipd.kernels.triton_util import launch, wait_for_previous

EMPTY = -0x7FFF8000
"""The word of an inbox that holds nothing: two negative zeros of 16 bits. Zero is sent in its stead."""

WORD_BYTES = 4

MAX_POLLS = 1 << 30
"""Looks for a word before a wait gives up: ten minutes and more, as other ranks may be compiling kernels."""

MAX_CTAS = 64
"""Of a launch; all of both lanes' find an SM. Of 64 rows of 8,192 it takes 7.1 us on two H200, with 32 of them 9.7."""

_EMPTY = tl.constexpr(EMPTY)
_STOP_INTERVAL = tl.constexpr(1024)  # polls, of 0.7 us, between looks at the host's memory
_MAX_WARPS = 16
_VALUES_PER_WARP = 512
_MAX_TILE_WORDS = 16384  # that wait in registers, of all ranks' rows: 32 a thread
# Of the rows, by ranks; more goes in two shots. On two H200 1 MiB takes 7.1 us in one shot and 8.5 in two, 2 MiB 12.6
# and 11.6. Those of 4 and 8 ranks are not measured.
_MAX_ONE_SHOT_BYTES = {2: 1 << 20, 4: 512 << 10, 8: 256 << 10}
_MAX_ROW_BYTES = _MAX_TILE_WORDS * WORD_BYTES
_MAX_BYTES = 4 << 20  # the largest that was measured: 19 us, 34 with NCCL
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeerInboxes:
    """The inboxes of one lane, as a rank sees them.

    Attributes:
        addresses_W: int64, on the device: each rank's inbox in this process's address space, all full of EMPTY.
        half_words: words of each of an inbox's two halves.
        stop: int32 `[1]`, host memory that the device reads: nonzero releases who waits, with wrong results. A wait
            that gives up sets it.
    """

    rank: int
    addresses_W: Tensor
    half_words: int
    stop: Tensor

    @property
    def world_size(self) -> int:
        return len(self.addresses_W)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSumConfig:
    """How a launch is cut; sums depend on `num_sources` alone.

    Attributes:
        has_two_shots: whether each row is summed by one rank.
        block_rows: rows of a tile.
        num_sources: ranks whose rows a program waits for at a time.
    """

    has_two_shots: bool
    block_rows: int
    num_sources: int


def config_for(num_rows: int, dim: int, dtype: torch.dtype, world_size: int, num_ctas: int) -> PeerSumConfig:
    """How to cut a launch."""
    row_words = triton.next_power_of_2(dim) * dtype.itemsize // WORD_BYTES
    num_sources = min(world_size, max(1, _MAX_TILE_WORDS // row_words))
    has_two_shots = num_rows * dim * dtype.itemsize > _MAX_ONE_SHOT_BYTES[world_size]
    rows_per_cta = _cdiv(_cdiv(num_rows, world_size) if has_two_shots else num_rows, num_ctas)
    max_rows = max(1, _MAX_TILE_WORDS // (num_sources * row_words))
    block_rows = min(triton.next_power_of_2(rows_per_cta), max_rows)
    return PeerSumConfig(has_two_shots=has_two_shots, block_rows=block_rows, num_sources=num_sources)


def max_peer_rows(dim: int, dtype: torch.dtype, world_size: int) -> int:
    """Rows up to which these sums are faster than NCCL's; 0 where there are none."""
    row_bytes = dim * dtype.itemsize
    is_known = world_size in _MAX_ONE_SHOT_BYTES and dtype in _DTYPES
    return _MAX_BYTES // row_bytes if is_known and row_bytes % 16 == 0 and row_bytes <= _MAX_ROW_BYTES else 0


def half_words(num_rows: int, dim: int, dtype: torch.dtype, world_size: int) -> int:
    """Words of half an inbox that suit all calls of up to `num_rows` rows."""
    row_words = dim * dtype.itemsize // WORD_BYTES
    one_shot_rows = min(num_rows, _MAX_ONE_SHOT_BYTES[world_size] // (row_words * WORD_BYTES))
    share = _cdiv(num_rows, world_size)
    return max(world_size * one_shot_rows, 2 * world_size * share) * row_words


def peer_add_norm(
    residual_TD: Tensor,
    partial_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    inboxes: PeerInboxes,
    *,
    half: int,
    num_ctas: int,
    config: PeerSumConfig,
    max_polls: int = MAX_POLLS,
) -> None:
    """Adds all ranks' `partial_TD` to the residual, and writes the sum as the residual's dtype rounds it, normed.

    All ranks call it alike, with the same residual. In two shots a rank's residual is changed in the rows that it sums
    alone: further calls with it must have as many rows. All tensors are contiguous.

    Args:
        half: 0 and 1 in turn, of the calls with these inboxes.
        num_ctas: programs, all of which must be resident at once: no more than SMs.
    """
    num_rows, dim = residual_TD.shape
    tensors = (residual_TD, partial_TD, out_TD)
    assert all(tensor.shape == residual_TD.shape and tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.dtype == weight_D.dtype for tensor in tensors) and weight_D.is_contiguous()
    block = max(triton.next_power_of_2(dim), 64)
    share = _cdiv(num_rows, inboxes.world_size)
    if config.has_two_shots:
        num_tiles = _cdiv(share, config.block_rows) * inboxes.world_size
    else:
        num_tiles = _cdiv(num_rows, config.block_rows)
    used = (2 * inboxes.world_size * share if config.has_two_shots else inboxes.world_size * num_rows) * dim
    assert used * weight_D.itemsize <= inboxes.half_words * WORD_BYTES
    kernel = _two_shots_kernel if config.has_two_shots else _one_shot_kernel
    launch(kernel, (min(num_ctas, num_tiles),), pdl_on=residual_TD.device)(
        *(tensor.view(torch.int32) for tensor in (residual_TD, partial_TD, weight_D, out_TD)),
        inboxes.addresses_W,
        inboxes.stop,
        half * inboxes.half_words,
        num_rows,
        eps,
        max_polls,
        RANK=inboxes.rank,
        WORLD_SIZE=inboxes.world_size,
        NUM_SOURCES=config.num_sources,
        DTYPE=_DTYPES[weight_D.dtype],
        DIM=dim,
        WORDS=dim * weight_D.itemsize // WORD_BYTES,
        BLOCK_ROWS=config.block_rows,
        BLOCK_WORDS=block * weight_D.itemsize // WORD_BYTES,
        num_warps=min(max(1, block // _VALUES_PER_WARP), _MAX_WARPS),
    )


def peer_add_norm_reference(
    residual_TD: Tensor, partials: Sequence[Tensor], weight_D: Tensor, eps: float, out_TD: Tensor
) -> None:
    """`peer_add_norm` in plain torch, given the partial sums of all ranks; the residual is changed in all rows."""
    wide_dtype = torch.promote_types(residual_TD.dtype, torch.float32)
    total_TD = sum((partial_TD.to(wide_dtype) for partial_TD in partials), start=torch.zeros((), dtype=wide_dtype))
    residual_TD.copy_(residual_TD.to(wide_dtype) + total_TD)
    rms_norm_reference(residual_TD, weight_D, eps, out_TD)


@triton.jit(do_not_specialize=["num_rows", "max_polls"])
def _one_shot_kernel(
    residual_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    first_word: int,
    num_rows: int,
    eps: float,
    max_polls: int,
    RANK: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    first_tile, step, num_tiles = tl.program_id(0), tl.num_programs(0), tl.cdiv(num_rows, BLOCK_ROWS)
    wait_for_previous(USE_PDL)
    for tile in range(first_tile, num_tiles, step):
        words, mask = _tile(tile, num_rows, WORDS, BLOCK_ROWS, BLOCK_WORDS)
        values = _sendable(tl.load(partial_ptr + words, mask=mask, other=0))
        for distance in tl.static_range(1, WORLD_SIZE + 1):  # the own inbox last
            inbox_ptr = _inbox(addresses_ptr, (RANK + distance) % WORLD_SIZE) + first_word
            tl.store(inbox_ptr + RANK * num_rows * WORDS + words, values, mask=mask)
    inbox_ptr = _inbox(addresses_ptr, RANK) + first_word
    for tile in range(first_tile, num_tiles, step):
        words, mask = _tile(tile, num_rows, WORDS, BLOCK_ROWS, BLOCK_WORDS)
        total = _add_received(
            residual_ptr + words,
            inbox_ptr + words,
            mask,
            num_rows * WORDS,
            stop_ptr,
            max_polls,
            WORLD_SIZE,
            NUM_SOURCES,
            DTYPE,
        )
        tl.store(out_ptr + words, _normed(total, weight_ptr, eps, DTYPE, DIM, WORDS, BLOCK_WORDS), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "max_polls"])
def _two_shots_kernel(
    residual_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    stop_ptr: tl.tensor,
    first_word: int,
    num_rows: int,
    eps: float,
    max_polls: int,
    RANK: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    share = tl.cdiv(num_rows, WORLD_SIZE)  # rank r sums rows from r * share on
    first_tile, step, num_tiles = tl.program_id(0), tl.num_programs(0), tl.cdiv(share, BLOCK_ROWS)
    first_normed = first_word + WORLD_SIZE * share * WORDS
    wait_for_previous(USE_PDL)
    for index in range(first_tile, num_tiles * WORLD_SIZE, step):
        owner = (RANK + index // num_tiles) % WORLD_SIZE
        first = owner * share
        words, mask = _tile(index % num_tiles, min(share, num_rows - first), WORDS, BLOCK_ROWS, BLOCK_WORDS)
        values = _sendable(tl.load(partial_ptr + first * WORDS + words, mask=mask, other=0))
        tl.store(_inbox(addresses_ptr, owner) + first_word + RANK * share * WORDS + words, values, mask=mask)
    inbox_ptr = _inbox(addresses_ptr, RANK)
    own = RANK * share
    for tile in range(first_tile, num_tiles, step):
        words, mask = _tile(tile, min(share, num_rows - own), WORDS, BLOCK_ROWS, BLOCK_WORDS)
        total = _add_received(
            residual_ptr + own * WORDS + words,
            inbox_ptr + first_word + words,
            mask,
            share * WORDS,
            stop_ptr,
            max_polls,
            WORLD_SIZE,
            NUM_SOURCES,
            DTYPE,
        )
        normed = _sendable(_normed(total, weight_ptr, eps, DTYPE, DIM, WORDS, BLOCK_WORDS))
        for distance in tl.static_range(1, WORLD_SIZE):
            peer_ptr = _inbox(addresses_ptr, (RANK + distance) % WORLD_SIZE)
            tl.store(peer_ptr + first_normed + own * WORDS + words, normed, mask=mask)
        tl.store(out_ptr + own * WORDS + words, normed, mask=mask)
    for index in range(first_tile, num_tiles * (WORLD_SIZE - 1), step):
        first = (RANK + 1 + index // num_tiles) % WORLD_SIZE * share
        words, mask = _tile(index % num_tiles, min(share, num_rows - first), WORDS, BLOCK_ROWS, BLOCK_WORDS)
        words += first * WORDS
        normed = _receive(inbox_ptr + first_normed + words, mask, stop_ptr, max_polls)
        tl.store(out_ptr + words, normed, mask=mask)


@triton.jit
def _tile(
    tile: tl.tensor, num_rows: tl.tensor, WORDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The words of some rows, `[BLOCK_ROWS, BLOCK_WORDS]`, counted from the first row's first, and which there are."""
    rows, columns = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WORDS)
    return rows[:, None] * WORDS + columns[None, :], (rows < num_rows)[:, None] & (columns < WORDS)[None, :]


@triton.jit
def _inbox(addresses_ptr: tl.tensor, rank: tl.tensor) -> tl.tensor:
    return tl.multiple_of(tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _sendable(words: tl.tensor) -> tl.tensor:
    return tl.where(words == _EMPTY, 0, words)


@triton.jit
def _receive(words_ptr: tl.tensor, mask: tl.tensor, stop_ptr: tl.tensor, max_polls: tl.tensor) -> tl.tensor:
    """The words, once all are there; their places in the inbox are empty again."""
    words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
    polls = 0
    while (tl.max((words == _EMPTY).to(tl.int32)) != 0) & (polls < max_polls):
        words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
        polls += 1
        if polls % _STOP_INTERVAL == 0:
            if tl.load(stop_ptr, volatile=True) != 0:
                polls = max_polls
    if polls == max_polls:
        tl.store(stop_ptr, 1)
    tl.store(words_ptr, _EMPTY, mask=mask)
    return words


@triton.jit
def _add_received(
    residual_ptr: tl.tensor,
    inbox_ptr: tl.tensor,
    mask: tl.tensor,
    source_words: tl.tensor,
    stop_ptr: tl.tensor,
    max_polls: tl.tensor,
    WORLD_SIZE: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Adds what all ranks sent to rows of the residual; the sums, as they are rounded, in float32."""
    total = _unpack(tl.load(residual_ptr, mask=mask, other=0), DTYPE)  # on its way while the ranks' words are
    for first in tl.static_range(0, WORLD_SIZE, NUM_SOURCES):
        offsets = (first + tl.arange(0, NUM_SOURCES)) * source_words
        words = _receive(inbox_ptr[None, :, :] + offsets[:, None, None], mask[None, :, :], stop_ptr, max_polls)
        total += tl.sum(_unpack(words, DTYPE), 0)
    packed = _pack(total, DTYPE)
    tl.store(residual_ptr, packed, mask=mask)
    return _unpack(packed, DTYPE)


@triton.jit
def _normed(
    rows: tl.tensor,
    weight_ptr: tl.tensor,
    eps: float,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> tl.tensor:
    """The words of rows, normed."""
    columns = tl.arange(0, BLOCK_WORDS)
    weight = _unpack(tl.load(weight_ptr + columns, mask=columns < WORDS, other=0)[None, :], DTYPE)
    scale = tl.rsqrt(tl.sum(rows * rows, 1) / DIM + eps)
    return _pack(rows * scale[:, None] * weight, DTYPE)


@triton.jit
def _unpack(words: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The float32 values of words along their last dim, which is twice as long if they are of 16 bits."""
    if DTYPE == tl.float32:
        return words.to(tl.float32, bitcast=True)
    else:
        pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
        return tl.reshape(pairs, words.shape[:-1] + (2 * words.shape[-1],)).to(tl.float32)


@triton.jit
def _pack(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The words of float32 values `[rows, columns]`, rounded."""
    if DTYPE == tl.float32:
        return values.to(tl.int32, bitcast=True)
    else:
        pairs = values.to(DTYPE).to(tl.int16, bitcast=True)
        low, high = tl.split(tl.reshape(pairs, (values.shape[0], values.shape[1] // 2, 2)))
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

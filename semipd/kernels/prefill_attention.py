"""Attention of prompt chunks over the block pool: a program for each tile of query rows and each query head.

The host lists the tiles of a step; lengths and positions are read from that list on the device, so one captured graph
serves any chunks and any prefixes. Both products run on tensor cores; on GPUs that have it, the tensor memory
accelerator (TMA) brings the tiles of K and V. On Hopper the common cases have a kernel of their own, which is in
`prefill_attention_hopper`.

Shapes: T query rows of a step, N query heads (of a block table: its entries), K KV heads, H head dim, R slots of the
pool, X request slots, W tiles; in kernels M query rows of a tile and N tokens of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from semipd.kernels.paged_tiles import NO_SCORE, attend_reference, dot, softmax_step, tile_block_ids, tile_slots
from semipd.kernels.triton_util import is_interpreted, launch


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How the kernel is compiled; `prefill_config` has the table.

    Attributes:
        block_m: query rows of a tile.
        block_n: tokens of a tile.
        num_warps: warps of a CTA.
        num_stages: buffers of K and of V.
        use_tma: let the TMA load K and V. A tile must lie in one block: `block_n` divides the block size.
        use_hopper_kernel: run `prefill_attention_hopper` where there is no window; it takes only `block_m` from here.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool
    use_hopper_kernel: bool = False


def prefill_config(
    head_dim: int, block_size: int, dtype: torch.dtype, *, has_tma: bool, is_hopper: bool = False
) -> PrefillConfig:
    """The configuration for a head dim, a block size and a dtype, on a GPU with or without the TMA."""
    is_wide = head_dim > 128
    if dtype == torch.float32:  # without tensor cores; what matters is that it fits
        return PrefillConfig(block_m=16 if is_wide else 32, block_n=32, num_warps=4, num_stages=2, use_tma=False)
    if not has_tma:  # and an SM may have no more than 99 KiB of shared memory
        shape = (64, 32) if is_wide else (128, 64)
        return PrefillConfig(block_m=shape[0], block_n=shape[1], num_warps=8, num_stages=2, use_tma=False)
    block_n = 32 if is_wide else 128 if block_size % 128 == 0 else 64
    # For windows, where the Hopper kernel is not run: two CTAs on an SM hide each other's waits, 507 TFLOP/s at 8k
    # tokens on an H100, where 8 warps and 3 stages reach 481.
    num_warps, num_stages = (4, 2) if block_n == 64 and block_size % 64 == 0 else (8, 3)
    return PrefillConfig(
        block_m=128,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        use_tma=block_size % block_n == 0,
        use_hopper_kernel=is_hopper and head_dim in (64, 128) and block_size % 64 == 0,
    )


def prefill_tiles(chunks: Sequence[tuple[int, int, int, int]], block_m: int) -> list[tuple[int, int, int, int]]:
    """The tiles of a step, those that read most first: programs start in order, and the last ones should be short.

    Tiles end where positions are multiples of `block_m`, and thus of the tiles of K and V, so that few of these are
    read in part.

    Args:
        chunks: of each prompt chunk its request slot, its first row, its number of rows, and the position of that row.
        block_m: query rows of a tile.

    Returns:
        The same four numbers of each tile.
    """
    tiles = []
    for slot, row_start, num_rows, start_position in chunks:
        position, end = start_position, start_position + num_rows
        while position < end:
            tile_end = min(end, (position // block_m + 1) * block_m)
            tiles.append((slot, row_start + position - start_position, tile_end - position, position))
            position = tile_end
    return sorted(tiles, key=lambda tile: -(tile[2] + tile[3]))


def max_prefill_tiles(num_rows: int, num_chunks: int, block_m: int) -> int:
    """Tiles that up to `num_rows` rows in up to `num_chunks` chunks can have."""
    return num_rows // block_m + 2 * num_chunks


def prefill_attention(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    tiles_W4: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    config: PrefillConfig,
    num_sms: int,
    window: int | None = None,
) -> None:
    """Writes the attention outputs of the rows of `tiles_W4`; other rows are left as they are.

    A query at position p reads positions up to p, and with a window w only those above p - w.

    Args:
        q_TNH: the rotated queries; rows may be strided.
        kv_R2KH: one layer of the pool, the chunks' own K and V included.
        block_table_XN: int32 block ids; entries that nobody reads may be anything.
        tiles_W4: int32, by `prefill_tiles` with the block_m of `config`, then any number of tiles of no rows.
        out_TNH: the result; rows may be strided.
        block_size: slots of a block.
        scale: of the scores; positive.
        config: by `prefill_config`.
        num_sms: SMs of the partition.
        window: the sliding window.
    """
    num_heads, head_dim = q_TNH.shape[1:]
    num_slots, num_kv_heads = kv_R2KH.shape[0], kv_R2KH.shape[1] // 2
    assert kv_R2KH.is_contiguous() and kv_R2KH.shape[2] == head_dim and block_table_XN.stride(1) == 1
    assert q_TNH.stride()[1:] == out_TNH.stride()[1:] == (head_dim, 1) and out_TNH.shape == q_TNH.shape
    assert tiles_W4.dtype == block_table_XN.dtype == torch.int32 and tiles_W4.is_contiguous()
    assert not (config.use_tma and block_size % config.block_n)
    if config.use_hopper_kernel and window is None:
        # Imported where it is used: Gluon is experimental, and other GPUs and the interpreter have none of it.
        from semipd.kernels.prefill_attention_hopper import prefill_attention_hopper

        prefill_attention_hopper(
            q_TNH,
            kv_R2KH,
            block_table_XN,
            tiles_W4,
            out_TNH,
            block_size=block_size,
            scale=scale,
            num_sms=num_sms,
        )
        return
    head_block = triton.next_power_of_2(head_dim)
    kv = kv_R2KH
    if config.use_tma:
        slot_size = 2 * num_kv_heads * head_dim
        kv = TensorDescriptor(kv, [num_slots, slot_size], [slot_size, 1], [config.block_n, head_block])
    # The query heads of a KV head start together, so that all but one find its K and V in the L2 cache.
    launch(_prefill_attention_kernel, (num_heads, tiles_W4.shape[0]))(
        q_TNH,
        kv,
        block_table_XN,
        tiles_W4,
        out_TNH,
        scale * math.log2(math.e),
        q_TNH.stride(0),
        block_table_XN.stride(0),
        out_TNH.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        QUERIES_PER_KV=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block,
        WINDOW=window or 0,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        USE_TMA=config.use_tma,
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
    )


def prefill_attention_reference(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    tiles_W4: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
) -> None:
    """`prefill_attention` in plain torch."""
    for slot, row_start, num_rows, start_position in tiles_W4.tolist():
        if num_rows > 0:
            rows, table_N = slice(row_start, row_start + num_rows), block_table_XN[slot]
            out = attend_reference(q_TNH[rows], kv_R2KH, table_N, start_position, block_size, scale, window)
            out_TNH[rows] = out.to(out_TNH.dtype)


@triton.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def _prefill_attention_kernel(
    q_ptr: tl.tensor,
    kv: tl.tensor,  # a pointer or, with USE_TMA, a descriptor
    table_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: float,
    q_stride: int,
    table_stride: int,
    out_stride: int,
    NUM_KV_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 4
    num_rows = tl.load(tile_ptr + 2)
    if num_rows == 0:
        return
    slot = tl.load(tile_ptr)
    row_start = tl.load(tile_ptr + 1).to(tl.int64)
    start = tl.load(tile_ptr + 3)  # the position of the first row
    end = start + num_rows

    kv_head = head // QUERIES_PER_KV
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_BLOCK)
    mask_MH = (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + row_start * q_stride + head * HEAD_DIM + rows[:, None] * q_stride + columns[None, :]
    q = tl.load(q_ptrs, mask=mask_MH, other=0.0)
    table_row = table_ptr + slot.to(tl.int64) * table_stride

    # Some row reads [begin, end).
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start - WINDOW + 1, 0)
    loop_begin = begin // BLOCK_N * BLOCK_N
    loop_end = end
    if USE_TMA:  # which reads tiles to their edges: those that are read in part come after the loop
        loop_begin = tl.cdiv(begin, BLOCK_N) * BLOCK_N
        loop_end = end // BLOCK_N * BLOCK_N

    max_M = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MH = tl.zeros([BLOCK_M, HEAD_BLOCK], tl.float32)
    block_ids = tile_block_ids(table_row, loop_begin, loop_end, BLOCK_SIZE, BLOCK_N)
    for first in tl.range(loop_begin, loop_end, BLOCK_N, num_stages=NUM_STAGES):
        k, v = _load_tile(
            kv, block_ids, first, begin, end, kv_head, NUM_KV_HEADS, HEAD_DIM, HEAD_BLOCK, BLOCK_SIZE, BLOCK_N, USE_TMA
        )
        block_ids = tile_block_ids(table_row, first + BLOCK_N, loop_end, BLOCK_SIZE, BLOCK_N)
        is_masked = first + BLOCK_N > start + 1
        if WINDOW > 0:
            is_masked = is_masked | (first < end - WINDOW)
        max_M, sum_M, acc_MH = _attend(
            q, k, v, first, start, is_masked, max_M, sum_M, acc_MH, scale, WINDOW, INTERPRETED
        )

    if USE_TMA:
        # Unrolled: after a second loop ptxas would serialize the tensor core instructions of the first (C7515).
        for edge in tl.static_range(2 if WINDOW > 0 else 1):
            if edge == 0:
                first = loop_end
                is_edge = loop_end < end
            else:
                first = loop_begin - BLOCK_N
                is_edge = (begin < loop_begin) & (loop_begin <= loop_end)
            if is_edge:
                block_id = tl.load(table_row + first // BLOCK_SIZE)
                k, v = _load_tile(
                    kv,
                    block_id,
                    first,
                    begin,
                    end,
                    kv_head,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    HEAD_BLOCK,
                    BLOCK_SIZE,
                    BLOCK_N,
                    True,
                )
                # What is not written may be NaN, which a weight of 0 does not hide.
                positions_N = first + tl.arange(0, BLOCK_N)
                v = tl.where(((positions_N >= begin) & (positions_N < end))[:, None], v, 0.0)
                max_M, sum_M, acc_MH = _attend(
                    q, k, v, first, start, True, max_M, sum_M, acc_MH, scale, WINDOW, INTERPRETED
                )

    out_ptrs = out_ptr + row_start * out_stride + head * HEAD_DIM + rows[:, None] * out_stride + columns[None, :]
    sum_M = tl.where(sum_M > 0, sum_M, 1.0)  # of rows behind the last, which may see nothing of a window
    tl.store(out_ptrs, acc_MH * (1.0 / sum_M)[:, None], mask=mask_MH)


@triton.jit
def _load_tile(
    kv: tl.tensor,
    block_ids: tl.tensor,
    first: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    kv_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """K and V of tokens from `first` on; without the TMA 0 outside [begin, end)."""
    if USE_TMA:
        tile_slot = block_ids * BLOCK_SIZE + first % BLOCK_SIZE
        k = kv.load([tile_slot, kv_head * HEAD_DIM])
        v = kv.load([tile_slot, (NUM_KV_HEADS + kv_head) * HEAD_DIM])
    else:
        columns = tl.arange(0, HEAD_BLOCK)
        positions_N = first + tl.arange(0, BLOCK_N)
        slots_N = tile_slots(block_ids, first, BLOCK_SIZE, BLOCK_N)
        k_ptrs = kv + kv_head * HEAD_DIM + slots_N[:, None] * (2 * NUM_KV_HEADS * HEAD_DIM) + columns[None, :]
        mask_NH = ((positions_N >= begin) & (positions_N < end))[:, None]
        if HEAD_DIM < HEAD_BLOCK:
            mask_NH = mask_NH & (columns < HEAD_DIM)[None, :]
        k = tl.load(k_ptrs, mask=mask_NH, other=0.0)
        v = tl.load(k_ptrs + NUM_KV_HEADS * HEAD_DIM, mask=mask_NH, other=0.0)
    return k, v


@triton.jit
def _attend(
    q_MH: tl.tensor,
    k_NH: tl.tensor,
    v_NH: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    is_masked: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_MH: tl.tensor,
    scale: float,
    WINDOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add tokens from `first` on to the outputs of rows from `start` on; not `is_masked` if all rows read them all."""
    scores_MN = dot(q_MH, tl.trans(k_NH), None, INTERPRETED)
    if is_masked:
        positions_M = start + tl.arange(0, scores_MN.shape[0])
        positions_N = first + tl.arange(0, scores_MN.shape[1])
        age_MN = positions_M[:, None] - positions_N[None, :]
        is_visible_MN = age_MN >= 0
        if WINDOW > 0:
            is_visible_MN = is_visible_MN & (age_MN < WINDOW)
        scores_MN = tl.where(is_visible_MN, scores_MN, float("-inf"))
    weights_MN, max_M, factor_M = softmax_step(scores_MN, max_M, scale)
    sum_M = sum_M * factor_M + tl.sum(weights_MN, 1)
    acc_MH = dot(weights_MN.to(v_NH.dtype), v_NH, acc_MH * factor_M[:, None], INTERPRETED)
    return max_M, sum_M, acc_MH

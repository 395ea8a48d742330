"""Attention of decode rows over the block pool: contexts are cut into splits that any number of CTAs can walk.

`plan_decode_splits` lists the splits once per step, on the device. In each layer persistent CTAs take (split, KV head)
pairs in turn: the query heads of a KV head are the rows of one tile, so K and V are read once. The CTA that finishes
the last split of a request merges them all, in their order. How a context is cut depends on its length alone, so the
result depends neither on its neighbours nor on the number of SMs.

Few SMs must each take in much, so a tile must cost few instructions and no waiting. Each warp has tokens of its own,
the rows of its products, with a maximum and sums of its own: products are batched by warp, and warps meet only where
a tile arrives and at the end of a split. Query heads are the columns, of which tensor cores take 8, not 16 as of rows.

Shapes: B requests, T = B * q_len query rows (those of a request follow one another), N query heads (of a block table:
its entries), K KV heads, H head dim, R slots of the pool, X request slots, W work items; in kernels W warps, N tokens
that a warp has of a tile, R query rows of a KV head, S splits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.decode_splits import ITEM_INTS, MIN_WARP_TOKENS, DecodeConfig, DecodeScratch
from semipd.kernels.paged_tiles import NO_SCORE, attend_reference, dot
from semipd.kernels.triton_util import is_interpreted, launch, wait_for_previous

_MIN_COLUMNS = 8  # that the tensor cores take


def decode_attention(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    items_W8: Tensor,
    scratch: DecodeScratch,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    config: DecodeConfig,
    num_sms: int,
    q_len: int = 1,
    window: int | None = None,
) -> None:
    """Writes the attention outputs of the requests that `items_W8` lists; rows of others are left as they are.

    Row i of a request's `q_len` rows is at position context length - q_len + i. A query at position p reads positions
    up to p, and with a window w only those above p - w.

    Args:
        q_TNH: the rotated queries; rows may be strided.
        kv_R2KH: one layer of the pool, the rows' own K and V included.
        block_table_XN: int32 block ids; entries that nobody reads may be anything.
        items_W8: by `plan_decode_splits` with the same `config`, `q_len` and `window`.
        scratch: of the lane.
        out_TNH: the result; rows may be strided.
        block_size: slots of a block.
        scale: of the scores; positive.
        config: by `decode_config`.
        num_sms: SMs that the launch may use.
        q_len: query rows of each request, 1 to 8.
        window: the sliding window.
    """
    num_heads, head_dim = q_TNH.shape[1:]
    num_kv_heads = kv_R2KH.shape[1] // 2
    assert kv_R2KH.is_contiguous() and kv_R2KH.shape[2] == head_dim and block_table_XN.stride(1) == 1
    assert q_TNH.stride()[1:] == out_TNH.stride()[1:] == (head_dim, 1) and out_TNH.shape == q_TNH.shape
    assert items_W8.dtype == block_table_XN.dtype == torch.int32
    assert config.block_n % (MIN_WARP_TOKENS * config.num_warps) == 0
    assert scratch.partials_WNH.shape[1:] == (q_len * num_heads, head_dim)
    max_work = (items_W8.shape[0] - 1) * num_kv_heads
    launch(_decode_attention_kernel, (min(num_sms * config.ctas_per_sm, max_work),), pdl_on=q_TNH.device)(
        q_TNH,
        kv_R2KH,
        block_table_XN,
        items_W8,
        scratch.partials_WNH,
        scratch.lse_WN,
        scratch.arrivals_BK,
        out_TNH,
        scale * math.log2(math.e),
        q_TNH.stride(0),
        block_table_XN.stride(0),
        out_TNH.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        QUERIES_PER_KV=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        Q_LEN=q_len,
        ROWS_BLOCK=max(_MIN_COLUMNS, triton.next_power_of_2(q_len * num_heads // num_kv_heads)),
        WINDOW=window or 0,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        ITEM_INTS=ITEM_INTS,
        NUM_STAGES=config.num_stages,
        NUM_WARPS=config.num_warps,
        INTERPRETED=is_interpreted(),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )


def decode_attention_reference(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    slots_B: Tensor,
    context_lens_B: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    q_len: int = 1,
    window: int | None = None,
) -> None:
    """`plan_decode_splits` and `decode_attention` in plain torch."""
    for index, (slot, length) in enumerate(zip(slots_B.tolist(), context_lens_B.tolist(), strict=True)):
        if length > 0:
            rows = slice(index * q_len, (index + 1) * q_len)
            table_N = block_table_XN[slot]
            out = attend_reference(q_TNH[rows], kv_R2KH, table_N, length - q_len, block_size, scale, window)
            out_TNH[rows] = out.to(out_TNH.dtype)


@triton.jit
def _decode_attention_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    table_ptr: tl.tensor,
    items_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: float,
    q_stride: int,
    table_stride: int,
    out_stride: int,
    NUM_KV_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    Q_LEN: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    ROWS: tl.constexpr = Q_LEN * QUERIES_PER_KV
    SLOT_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_DIM
    PART_STRIDE: tl.constexpr = NUM_KV_HEADS * ROWS
    WARP_N: tl.constexpr = BLOCK_N // NUM_WARPS
    rows = tl.arange(0, ROWS_BLOCK)
    columns = tl.arange(0, HEAD_BLOCK)
    tokens_WN = tl.arange(0, NUM_WARPS)[:, None] * WARP_N + tl.arange(0, WARP_N)[None, :]
    k_offsets_WNH = tokens_WN[:, :, None] * SLOT_STRIDE + columns[None, None, :]
    v_offsets_WHN = tokens_WN[:, None, :] * SLOT_STRIDE + columns[None, :, None]
    is_row = rows < ROWS
    mask_RH = is_row[:, None] & (columns < HEAD_DIM)[None, :]

    num_work = tl.load(items_ptr) * NUM_KV_HEADS
    work = tl.program_id(0)
    # There may be no such item, but there is memory for it.
    request, slot, begin, end, context_len, split, num_splits = _load_item(items_ptr, work // NUM_KV_HEADS, ITEM_INTS)
    table_row = table_ptr + slot.to(tl.int64) * table_stride
    is_item = work < num_work
    block_ids = _tile_block_ids(table_row, begin, end, tokens_WN, is_item, BLOCK_SIZE, BLOCK_N)
    q_ptrs = q_ptr + _query_offsets(request, work % NUM_KV_HEADS, rows, q_stride, Q_LEN, QUERIES_PER_KV, HEAD_DIM)
    q = tl.load(q_ptrs + columns[None, :], mask=mask_RH & is_item, other=0.0)
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), num_stages=1):
        # The KV heads of a split are neighbours in memory, and in time.
        kv_head = work % NUM_KV_HEADS
        item = work // NUM_KV_HEADS
        q_WHR = tl.broadcast_to(tl.trans(q)[None, :, :], (NUM_WARPS, HEAD_BLOCK, ROWS_BLOCK))
        positions = context_len - Q_LEN + rows // QUERIES_PER_KV  # of the rows
        first_read = tl.maximum(context_len - Q_LEN - WINDOW + 1, 0)
        # On their way while this item is computed: the next item and, in the end, what its loads wait for.
        next_work = work + tl.num_programs(0)
        next_item = tl.minimum(next_work, num_work - 1) // NUM_KV_HEADS
        next_request, next_slot, next_begin, next_end, next_context_len, next_split, next_num_splits = _load_item(
            items_ptr, next_item, ITEM_INTS
        )

        max_WR = tl.full([NUM_WARPS, ROWS_BLOCK], NO_SCORE, tl.float32)
        # Summed over its tokens once, at the end.
        sums_WNR = tl.zeros([NUM_WARPS, WARP_N, ROWS_BLOCK], tl.float32)
        acc_WHR = tl.zeros([NUM_WARPS, HEAD_BLOCK, ROWS_BLOCK], tl.float32)
        k_ptr = kv_ptr + kv_head * HEAD_DIM
        v_ptr = k_ptr + NUM_KV_HEADS * HEAD_DIM
        for first in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
            if BLOCK_SIZE % BLOCK_N == 0:
                tile_slot = block_ids.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE
                k_ptrs = k_ptr + tile_slot * SLOT_STRIDE + k_offsets_WNH
                v_ptrs = v_ptr + tile_slot * SLOT_STRIDE + v_offsets_WHN
            else:
                slots_WN = block_ids.to(tl.int64) * BLOCK_SIZE + (first + tokens_WN) % BLOCK_SIZE
                k_ptrs = k_ptr + (slots_WN * SLOT_STRIDE)[:, :, None] + columns[None, None, :]
                v_ptrs = v_ptr + (slots_WN * SLOT_STRIDE)[:, None, :] + columns[None, :, None]
            block_ids = _tile_block_ids(table_row, first + BLOCK_N, end, tokens_WN, True, BLOCK_SIZE, BLOCK_N)
            # What lies outside may be NaN, which a weight of 0 does not hide.
            is_read_WN = tokens_WN < end - first
            if WINDOW > 0:
                is_read_WN = is_read_WN & (tokens_WN >= first_read - first)
            k_mask_WNH, v_mask_WHN = is_read_WN[:, :, None], is_read_WN[:, None, :]
            if HEAD_DIM < HEAD_BLOCK:
                k_mask_WNH = k_mask_WNH & (columns < HEAD_DIM)[None, None, :]
                v_mask_WHN = v_mask_WHN & (columns < HEAD_DIM)[None, :, None]
            k_WNH = tl.load(k_ptrs, mask=k_mask_WNH, other=0.0)
            # Loaded in this shape, since the pipeliner does not see through a transposition of an operand's rows.
            v_WHN = tl.load(v_ptrs, mask=v_mask_WHN, other=0.0)

            scores_WNR = dot(k_WNH, q_WHR, None, INTERPRETED)
            ages_WNR = (positions - first)[None, None, :] - tokens_WN[:, :, None]
            is_visible = ages_WNR >= 0
            if WINDOW > 0:
                is_visible = is_visible & (ages_WNR < WINDOW)
            scores_WNR = tl.where(is_visible, scores_WNR, float("-inf"))
            new_max_WR = tl.maximum(max_WR, tl.max(scores_WNR, 1) * scale)
            weights_WNR = tl.exp2(scores_WNR * scale - new_max_WR[:, None, :])
            factor_WR = tl.exp2(max_WR - new_max_WR)
            max_WR = new_max_WR
            sums_WNR = sums_WNR * factor_WR[:, None, :] + weights_WNR
            acc_WHR = dot(v_WHN, weights_WNR.to(v_WHN.dtype), acc_WHR * factor_WR[:, None, :], INTERPRETED)

        table_row = table_ptr + next_slot.to(tl.int64) * table_stride
        is_item = next_work < num_work
        block_ids = _tile_block_ids(table_row, next_begin, next_end, tokens_WN, is_item, BLOCK_SIZE, BLOCK_N)
        next_head = next_work % NUM_KV_HEADS
        q_ptrs = q_ptr + _query_offsets(next_request, next_head, rows, q_stride, Q_LEN, QUERIES_PER_KV, HEAD_DIM)
        q = tl.load(q_ptrs + columns[None, :], mask=mask_RH & is_item, other=0.0)

        max_R = tl.max(max_WR, 0)
        factor_WR = tl.exp2(max_WR - max_R[None, :])
        sum_R = tl.sum(tl.sum(sums_WNR, 1) * factor_WR, 0)
        sum_R = tl.where(sum_R > 0, sum_R, 1.0)  # of a row that sees none of this split
        acc_HR = _sum_warps(acc_WHR * (factor_WR * (1.0 / sum_R)[None, :])[:, None, :])
        acc_RH = tl.trans(acc_HR)
        lse_R = max_R + tl.log2(sum_R)
        out_ptrs = out_ptr + _query_offsets(request, kv_head, rows, out_stride, Q_LEN, QUERIES_PER_KV, HEAD_DIM)
        out_ptrs += columns[None, :]
        if num_splits == 1:
            tl.store(out_ptrs, acc_RH, mask=mask_RH)
        else:
            part = item.to(tl.int64) * PART_STRIDE + kv_head * ROWS
            partial_ptrs = partials_ptr + part * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :]
            lse_ptrs = lse_ptr + part + rows
            tl.store(partial_ptrs, acc_RH, mask=mask_RH)
            tl.store(lse_ptrs, lse_R, mask=is_row)
            # All threads' stores come before the one thread's release.
            tl.debug_barrier()
            arrival_ptr = arrivals_ptr + request * NUM_KV_HEADS + kv_head
            if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_splits - 1:
                # The items of a request follow one another.
                part -= split * PART_STRIDE
                _merge(
                    partials_ptr + part * HEAD_DIM,
                    lse_ptr + part,
                    out_ptr,
                    request,
                    kv_head,
                    num_splits,
                    out_stride,
                    PART_STRIDE,
                    QUERIES_PER_KV,
                    Q_LEN,
                    HEAD_DIM,
                    HEAD_BLOCK,
                )
                tl.store(arrival_ptr, 0)
        request, slot, begin, end = next_request, next_slot, next_begin, next_end
        context_len, split, num_splits = next_context_len, next_split, next_num_splits


@triton.jit
def _load_item(
    items_ptr: tl.tensor, item: tl.tensor, ITEM_INTS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Request, slot, begin, end, context length, split and number of splits."""
    item_ptr = items_ptr + (1 + item) * ITEM_INTS
    request = tl.load(item_ptr)
    slot = tl.load(item_ptr + 1)
    begin = tl.load(item_ptr + 2)
    end = tl.load(item_ptr + 3)
    context_len = tl.load(item_ptr + 4)
    split = tl.load(item_ptr + 5)
    num_splits = tl.load(item_ptr + 6)
    return request, slot, begin, end, context_len, split, num_splits


@triton.jit
def _tile_block_ids(
    table_row: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    tokens_WN: tl.tensor,
    is_item: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """`tile_block_ids` for tokens in two dimensions; 0 if there is no such item."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_row + first // BLOCK_SIZE, mask=is_item & (first < end), other=0)
    else:
        positions_WN = first + tokens_WN
        return tl.load(table_row + positions_WN // BLOCK_SIZE, mask=is_item & (positions_WN < end), other=0)


@triton.jit
def _query_offsets(
    request: tl.tensor,
    kv_head: tl.tensor,
    rows: tl.tensor,
    stride: int,
    Q_LEN: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Where the query heads of a KV head begin, as a column."""
    queries = request * Q_LEN + rows // QUERIES_PER_KV
    return (queries * stride + (kv_head * QUERIES_PER_KV + rows % QUERIES_PER_KV) * HEAD_DIM)[:, None]


@triton.jit
def _sum_warps(x_WHR: tl.tensor) -> tl.tensor:
    """The sum over the warps, by halves: `tl.sum` would shuffle it together word by word."""
    W: tl.constexpr = x_WHR.shape[0]
    H: tl.constexpr = x_WHR.shape[1]
    R: tl.constexpr = x_WHR.shape[2]
    if W == 1:
        return tl.reshape(x_WHR, (H, R))
    else:
        low, high = tl.split(tl.permute(tl.reshape(x_WHR, (2, W // 2, H, R)), (1, 2, 3, 0)))
        return _sum_warps(low + high)


@triton.jit
def _merge(
    partials_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    request: tl.tensor,
    kv_head: tl.tensor,
    num_splits: tl.tensor,
    out_stride: int,
    PART_STRIDE: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    Q_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> None:
    """The outputs of a KV head from those of its splits, several at once: the cost is trips to the L2 cache."""
    ROWS: tl.constexpr = Q_LEN * QUERIES_PER_KV
    ROWS_BLOCK: tl.constexpr = triton.next_power_of_2(ROWS)
    SPLITS: tl.constexpr = max(1, min(8, 4096 // (ROWS_BLOCK * HEAD_BLOCK)))
    rows = tl.arange(0, ROWS_BLOCK)
    columns = tl.arange(0, HEAD_BLOCK)
    is_row = rows < ROWS
    mask_RH = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    max_R = tl.full([ROWS_BLOCK], NO_SCORE, tl.float32)
    sum_R = tl.zeros([ROWS_BLOCK], tl.float32)
    acc_RH = tl.zeros([ROWS_BLOCK, HEAD_BLOCK], tl.float32)
    for first in tl.range(0, num_splits, SPLITS, num_stages=1):
        splits = first + tl.arange(0, SPLITS)
        is_split = splits < num_splits
        parts_SR = splits[:, None] * PART_STRIDE + rows[None, :]
        # Not by L1, which may hold a neighbour's line from before.
        lse_SR = tl.load(
            lse_ptr + parts_SR, mask=is_split[:, None] & is_row[None, :], other=NO_SCORE, cache_modifier=".cg"
        )
        part_SRH = tl.load(
            partials_ptr + parts_SR[:, :, None] * HEAD_DIM + columns[None, None, :],
            mask=is_split[:, None, None] & mask_RH[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max_R = tl.maximum(max_R, tl.max(lse_SR, 0))
        weights_SR = tl.exp2(lse_SR - new_max_R[None, :])
        factor_R = tl.exp2(max_R - new_max_R)
        sum_R = sum_R * factor_R + tl.sum(weights_SR, 0)
        acc_RH = acc_RH * factor_R[:, None] + tl.sum(part_SRH * weights_SR[:, :, None], 0)
        max_R = new_max_R
    out_ptrs = out_ptr + _query_offsets(request, kv_head, rows, out_stride, Q_LEN, QUERIES_PER_KV, HEAD_DIM)
    tl.store(out_ptrs + columns[None, :], acc_RH * (1.0 / sum_R)[:, None], mask=mask_RH)

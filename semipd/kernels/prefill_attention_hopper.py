"""Attention of prompt chunks on Hopper GPUs, where one warp loads and two warpgroups compute.

A program takes 128 query rows of one query head, 64 for each warpgroup. A third partition, of one warp, has the tensor
memory accelerator (TMA) bring tiles of 128 tokens into two rings, of K and of V. A warpgroup issues the scores of a
tile together with the weighted sum of the tile before it, so that the tensor cores have work during the softmax; and
the two warpgroups, which nothing keeps in step, fill each other's gaps.

Tiles are walked from the diagonal to the start of the context: only the first needs a mask.

Shapes: see `semipd.kernels.prefill_attention`; in kernels M query rows of a warpgroup, N tokens of a box, a half tile,
which lies in one block of the pool.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BLOCK_M = 128  # query rows of a tile
BOX_N = gl.constexpr(64)  # tokens that the TMA brings at once
TILE_N = gl.constexpr(128)
NUM_CONSUMERS = gl.constexpr(2)


def prefill_attention_hopper(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    tiles_W4: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    num_stages: int,
) -> None:
    """`prefill_attention` without a window, of blocks of a multiple of 64 slots, by tiles of 128 rows."""
    num_heads, head_dim = q_TNH.shape[1:]
    num_slots, num_kv_heads = kv_R2KH.shape[0], kv_R2KH.shape[1] // 2
    slot_size = 2 * num_kv_heads * head_dim
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[kv_R2KH.dtype]
    box = [BOX_N.value, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    kv = TensorDescriptor(kv_R2KH, [num_slots, slot_size], [slot_size, 1], box, layout)
    _prefill_attention_kernel[(num_heads, tiles_W4.shape[0])](
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
        BLOCK_SIZE=block_size,
        NUM_STAGES=num_stages,
        num_warps=4,
    )


@gluon.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def _prefill_attention_kernel(
    q_ptr,
    kv,
    table_ptr,
    tiles_ptr,
    out_ptr,
    scale,
    q_stride,
    table_stride,
    out_stride,
    NUM_KV_HEADS: gl.constexpr,
    QUERIES_PER_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    head = gl.program_id(0)
    tile_ptr = tiles_ptr + gl.program_id(1) * 4
    num_rows = gl.load(tile_ptr + 2)
    if num_rows == 0:
        return
    slot = gl.load(tile_ptr)
    row_start = gl.load(tile_ptr + 1).to(gl.int64)
    start = gl.load(tile_ptr + 3)  # the position of the first row
    end = start + num_rows
    table_row = table_ptr + slot.to(gl.int64) * table_stride
    k_column = head // QUERIES_PER_KV * HEAD_DIM
    q_ptr += row_start * q_stride + head * HEAD_DIM
    out_ptr += row_start * out_stride + head * HEAD_DIM

    q_smem = gl.allocate_shared_memory(kv.dtype, [NUM_CONSUMERS, BOX_N, HEAD_DIM], kv.layout)
    k_smem = gl.allocate_shared_memory(kv.dtype, [NUM_STAGES * 2, BOX_N, HEAD_DIM], kv.layout)
    v_smem = gl.allocate_shared_memory(kv.dtype, [NUM_STAGES * 2, BOX_N, HEAD_DIM], kv.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=NUM_CONSUMERS)
        mbarrier.init(v_empty.index(i), count=NUM_CONSUMERS)
    fence_async_shared()

    rings = (k_smem, v_smem, k_full, v_full, k_empty, v_empty)
    first_half = (q_ptr, out_ptr, q_smem.index(0), rings, start, num_rows, scale, q_stride, out_stride)
    second_half = (
        q_ptr + BOX_N * q_stride,
        out_ptr + BOX_N * out_stride,
        q_smem.index(1),
        rings,
        start + BOX_N,
        num_rows - BOX_N,
        scale,
        q_stride,
        out_stride,
    )
    gl.warp_specialize(
        [
            (_attend, first_half),
            (_attend, second_half),
            (_load, (kv, table_row, rings, end, k_column, k_column + NUM_KV_HEADS * HEAD_DIM, BLOCK_SIZE)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load(kv, table_row, rings, end, k_column, v_column, BLOCK_SIZE: gl.constexpr):
    """Bring the tiles in the order in which they are read: K one ahead of V."""
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = rings
    num_tiles = gl.cdiv(end, TILE_N)
    v_slots = _box_slots(table_row, num_tiles - 1, end, BLOCK_SIZE)
    k_slots = v_slots
    for i in range(num_tiles + 1):
        if i < num_tiles:
            _load_tile(kv, k_slots, k_column, k_smem, k_full, k_empty, i)
        if i > 0:
            _load_tile(kv, v_slots, v_column, v_smem, v_full, v_empty, i - 1)
        v_slots = k_slots
        k_slots = _box_slots(table_row, num_tiles - 2 - i, end, BLOCK_SIZE)


@gluon.jit
def _box_slots(table_row, tile, end, BLOCK_SIZE: gl.constexpr):
    """The first pool slots of the tile's boxes; of a box that nobody reads any."""
    first = tile * TILE_N
    second = first + BOX_N
    first_id = gl.load(table_row + first // BLOCK_SIZE, mask=first >= 0, other=0)
    second_id = gl.load(table_row + second // BLOCK_SIZE, mask=(second >= 0) & (second < end), other=0)
    return first_id * BLOCK_SIZE + first % BLOCK_SIZE, second_id * BLOCK_SIZE + second % BLOCK_SIZE


@gluon.jit
def _load_tile(kv, slots, column, smem, full, empty, i):
    """Bring the i-th tile of K or of V once its place in the ring is free."""
    NUM_STAGES: gl.constexpr = full.shape[0]
    stage = i % NUM_STAGES
    mbarrier.wait(empty.index(stage), (i // NUM_STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), 2 * kv.block_type.nbytes)
    tma.async_copy_global_to_shared(kv, [slots[0], column], full.index(stage), smem.index(stage * 2))
    tma.async_copy_global_to_shared(kv, [slots[1], column], full.index(stage), smem.index(stage * 2 + 1))


@gluon.jit
def _attend(q_ptr, out_ptr, q_smem, rings, start, num_rows, scale, q_stride, out_stride):
    """The outputs of 64 query rows, of which `num_rows`, maybe none, exist."""
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = rings
    NUM_STAGES: gl.constexpr = k_full.shape[0]
    HEAD_DIM: gl.constexpr = q_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BOX_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    rows = gl.arange(0, BOX_N, gl.SliceLayout(1, COALESCED))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COALESCED))
    mask_MH = (rows < num_rows)[:, None] & (columns >= 0)[None, :]
    q_smem.store(gl.load(q_ptr + rows[:, None] * q_stride + columns[None, :], mask=mask_MH, other=0.0))
    fence_async_shared()

    end = start + num_rows
    num_tiles = gl.cdiv(end, TILE_N)
    first = (num_tiles - 1) * TILE_N

    # The tile of the diagonal.
    mbarrier.wait(k_full.index(0), 0)
    scores_a, scores_b = _issue_scores(q_smem, k_smem, 0, SCORES)
    scores_a, scores_b = warpgroup_mma_wait(0, deps=[scores_a, scores_b])
    mbarrier.arrive(k_empty.index(0), count=1)
    positions_M = start + gl.arange(0, BOX_N, gl.SliceLayout(1, SCORES))
    positions_N = first + gl.arange(0, BOX_N, gl.SliceLayout(0, SCORES))
    age_MN = positions_M[:, None] - positions_N[None, :]
    scores_a = gl.where(age_MN >= 0, scores_a, float("-inf"))
    scores_b = gl.where(age_MN >= BOX_N, scores_b, float("-inf"))
    max_M = gl.max(gl.maximum(scores_a, scores_b), 1) * scale
    scores_a = gl.exp2(scores_a * scale - max_M[:, None])
    scores_b = gl.exp2(scores_b * scale - max_M[:, None])
    sum_M = gl.sum(scores_a + scores_b, 1)
    factor_M = gl.full_like(sum_M, 1.0)
    outputs = warpgroup_mma_init(gl.zeros([BOX_N, HEAD_DIM], gl.float32, OUTPUT))
    mbarrier.wait(v_full.index(0), 0)
    if end < first + TILE_N:
        # What is not written may be NaN, which a weight of 0 does not hide. Both warpgroups write the same.
        _clear_from(v_smem.index(0), end - first, COALESCED)
        _clear_from(v_smem.index(1), end - first - BOX_N, COALESCED)
        fence_async_shared()

    for i in range(1, num_tiles):
        # Here and not behind the loop's exponentials, past which ptxas would move it.
        acc_MH = warpgroup_mma_wait(0, deps=[outputs])
        mbarrier.arrive(v_empty.index((i - 2) % NUM_STAGES), count=1, pred=i > 1)
        weights_a = gl.convert_layout(scores_a.to(k_smem.dtype), WEIGHTS)
        weights_b = gl.convert_layout(scores_b.to(k_smem.dtype), WEIGHTS)
        stage = i % NUM_STAGES
        mbarrier.wait(k_full.index(stage), i // NUM_STAGES & 1)
        scores_a, scores_b = _issue_scores(q_smem, k_smem, stage, SCORES)
        acc_MH *= gl.convert_layout(factor_M, gl.SliceLayout(1, OUTPUT))[:, None]
        v_stage = (i - 1) % NUM_STAGES
        mbarrier.wait(v_full.index(v_stage), (i - 1) // NUM_STAGES & 1)
        outputs = _issue_outputs(weights_a, weights_b, v_smem, v_stage, acc_MH)
        scores_a, scores_b = warpgroup_mma_wait(2, deps=[scores_a, scores_b])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new_max_M = gl.maximum(max_M, gl.max(gl.maximum(scores_a, scores_b), 1) * scale)
        factor_M = gl.exp2(max_M - new_max_M)
        max_M = new_max_M
        scores_a = gl.exp2(scores_a * scale - max_M[:, None])
        scores_b = gl.exp2(scores_b * scale - max_M[:, None])
        sum_M = sum_M * factor_M + gl.sum(scores_a + scores_b, 1)

    acc_MH = warpgroup_mma_wait(0, deps=[outputs])
    acc_MH *= gl.convert_layout(factor_M, gl.SliceLayout(1, OUTPUT))[:, None]
    weights_a = gl.convert_layout(scores_a.to(k_smem.dtype), WEIGHTS)
    weights_b = gl.convert_layout(scores_b.to(k_smem.dtype), WEIGHTS)
    last = num_tiles - 1
    mbarrier.wait(v_full.index(last % NUM_STAGES), last // NUM_STAGES & 1)
    outputs = _issue_outputs(weights_a, weights_b, v_smem, last % NUM_STAGES, acc_MH)
    acc_MH = warpgroup_mma_wait(0, deps=[outputs])
    acc_MH *= gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, OUTPUT))[:, None]
    out_MH = gl.convert_layout(acc_MH.to(k_smem.dtype), COALESCED)
    gl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out_MH, mask=mask_MH)


@gluon.jit
def _issue_scores(q_smem, k_smem, stage, SCORES: gl.constexpr):
    """Start the scores of a tile's two boxes."""
    none = warpgroup_mma_init(gl.zeros([BOX_N, BOX_N], gl.float32, SCORES))
    scores_a = warpgroup_mma(q_smem, k_smem.index(stage * 2).permute((1, 0)), none, use_acc=False, is_async=True)
    scores_b = warpgroup_mma(q_smem, k_smem.index(stage * 2 + 1).permute((1, 0)), none, use_acc=False, is_async=True)
    return scores_a, scores_b


@gluon.jit
def _issue_outputs(weights_a, weights_b, v_smem, stage, acc_MH):
    """Start to add a tile's two boxes of V to the outputs."""
    acc_MH = warpgroup_mma(weights_a, v_smem.index(stage * 2), warpgroup_mma_init(acc_MH), is_async=True)
    return warpgroup_mma(weights_b, v_smem.index(stage * 2 + 1), acc_MH, is_async=True)


@gluon.jit
def _clear_from(v_smem, count, layout: gl.constexpr):
    """Set rows from `count` on to 0."""
    rows = gl.arange(0, BOX_N, gl.SliceLayout(1, layout))
    v = v_smem.load(layout)
    v_smem.store(gl.where((rows < count)[:, None], v, gl.zeros_like(v)))

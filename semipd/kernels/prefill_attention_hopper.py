"""Attention of prompt chunks on Hopper GPUs, where one warp loads and two warpgroups compute.

A program takes 128 query rows of one query head, 64 for each warpgroup. A third partition, of one warp, has the tensor
memory accelerator (TMA) bring tiles of 128 tokens into two rings, of K and of V. A warpgroup issues the scores of a
tile together with the weighted sum of the tile before it, so that the tensor cores have work during the softmax; and
the two warpgroups, which nothing keeps in step, fill each other's gaps.

Tiles are walked from the diagonal to the start of the context: only the first needs a mask.

Shapes: see `semipd.kernels.prefill_attention`; in kernels M query rows of a warpgroup and N tokens of a tile.
"""

from __future__ import annotations

import math

import torch
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

BLOCK_M = 128  # query rows of a tile, half of them for each warpgroup
NUM_STAGES = 2  # tiles in each ring
HALF_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)  # tokens of a tile
BOX = gl.constexpr(64)  # tokens, and columns, that the TMA brings at once
NUM_CONSUMERS = gl.constexpr(2)


def is_hopper(device: torch.device | int | None = None) -> bool:
    """Whether the GPU has warpgroup products, which other architectures lack; False without a GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


def can_run_on_hopper(head_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    """Whether `prefill_attention_hopper` can read such a pool."""
    return head_dim in (64, 128) and block_size % BOX.value == 0 and dtype in (torch.bfloat16, torch.float16)


def prefill_attention_hopper(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    tiles_W4: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
) -> None:
    """`prefill_attention` without a window, by tiles of `BLOCK_M` rows, where `can_run_on_hopper`."""
    num_heads, head_dim = q_TNH.shape[1:]
    num_slots, num_kv_heads = kv_R2KH.shape[0], kv_R2KH.shape[1] // 2
    slot_size = 2 * num_kv_heads * head_dim
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[kv_R2KH.dtype]
    box = [BOX.value, BOX.value]
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
        NUM_STAGES=NUM_STAGES,
        num_warps=4,
    )


@gluon.jit(do_not_specialize_on_alignment=["tiles_ptr"])
def _prefill_attention_kernel(
    q_ptr: gl.tensor,
    kv: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    out_ptr: gl.tensor,
    scale: float,
    q_stride: int,
    table_stride: int,
    out_stride: int,
    NUM_KV_HEADS: gl.constexpr,
    QUERIES_PER_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    NUM_STAGES: gl.constexpr,
) -> None:
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

    q_smem = gl.allocate_shared_memory(kv.dtype, [NUM_CONSUMERS, HALF_M, HEAD_DIM], kv.layout)
    k_smem = gl.allocate_shared_memory(kv.dtype, [NUM_STAGES, BLOCK_N, HEAD_DIM], kv.layout)
    v_smem = gl.allocate_shared_memory(kv.dtype, [NUM_STAGES, BLOCK_N, HEAD_DIM], kv.layout)
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
        q_ptr + HALF_M * q_stride,
        out_ptr + HALF_M * out_stride,
        q_smem.index(1),
        rings,
        start + HALF_M,
        num_rows - HALF_M,
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
def _load(
    kv: tma.tensor_descriptor,
    table_row: gl.tensor,
    rings: gl.tuple,
    end: gl.tensor,
    k_column: gl.tensor,
    v_column: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Bring the tiles in the order in which they are read: K one ahead of V."""
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = rings
    num_tiles = gl.cdiv(end, BLOCK_N)
    k_slots = _box_slots(table_row, num_tiles - 1, end, BLOCK_SIZE)
    v_slots = k_slots
    for i in range(num_tiles + 1):
        if i < num_tiles:
            _load_tile(kv, k_slots, k_column, k_smem, k_full, k_empty, i)
        if i > 0:
            _load_tile(kv, v_slots, v_column, v_smem, v_full, v_empty, i - 1)
        v_slots = k_slots
        k_slots = _box_slots(table_row, num_tiles - 2 - i, end, BLOCK_SIZE)


@gluon.jit
def _box_slots(table_row: gl.tensor, tile: gl.tensor, end: gl.tensor, BLOCK_SIZE: gl.constexpr) -> gl.tuple:
    """The first pool slots of the tile's two boxes of tokens; of one that nobody reads any."""
    first = tile * BLOCK_N
    second = first + BOX
    first_id = gl.load(table_row + first // BLOCK_SIZE, mask=first >= 0, other=0)
    second_id = gl.load(table_row + second // BLOCK_SIZE, mask=(second >= 0) & (second < end), other=0)
    return first_id * BLOCK_SIZE + first % BLOCK_SIZE, second_id * BLOCK_SIZE + second % BLOCK_SIZE


@gluon.jit
def _boxes(smem: gl.shared_memory_descriptor) -> gl.shared_memory_descriptor:
    """Tiles as boxes of 64 tokens and 64 columns: in memory a tile is its first 64 columns, then the next."""
    NUM_BOXES: gl.constexpr = smem.shape[0] * smem.shape[1] * smem.shape[2] // (BOX * BOX)
    return smem._reinterpret(smem.dtype, [NUM_BOXES, BOX, BOX], smem.layout)


@gluon.jit
def _load_tile(
    kv: tma.tensor_descriptor,
    slots: gl.tuple,
    column: gl.tensor,
    smem: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    i: gl.tensor,
) -> None:
    """Bring the i-th tile of K or of V once its place in the ring is free."""
    NUM_STAGES: gl.constexpr = smem.shape[0]
    NUM_COLUMN_BOXES: gl.constexpr = smem.shape[2] // BOX
    stage = i % NUM_STAGES
    bar = full.index(stage)
    boxes = _boxes(smem)
    mbarrier.wait(empty.index(stage), (i // NUM_STAGES & 1) ^ 1)
    mbarrier.expect(bar, NUM_COLUMN_BOXES * 2 * kv.block_type.nbytes)
    for c in gl.static_range(NUM_COLUMN_BOXES):
        box = (stage * NUM_COLUMN_BOXES + c) * 2
        tma.async_copy_global_to_shared(kv, [slots[0], column + c * BOX], bar, boxes.index(box))
        tma.async_copy_global_to_shared(kv, [slots[1], column + c * BOX], bar, boxes.index(box + 1))


@gluon.jit
def _attend(
    q_ptr: gl.tensor,
    out_ptr: gl.tensor,
    q_smem: gl.shared_memory_descriptor,
    rings: gl.tuple,
    start: gl.tensor,
    num_rows: gl.tensor,
    scale: float,
    q_stride: int,
    out_stride: int,
) -> None:
    """The outputs of 64 query rows, of which `num_rows`, maybe none, exist."""
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = rings
    NUM_STAGES: gl.constexpr = k_smem.shape[0]
    HEAD_DIM: gl.constexpr = q_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    sum_smem = gl.allocate_shared_memory(gl.float32, [HALF_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    rows = gl.arange(0, HALF_M, gl.SliceLayout(1, COALESCED))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COALESCED))
    mask_MH = (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    q_smem.store(gl.load(q_ptr + rows[:, None] * q_stride + columns[None, :], mask=mask_MH, other=0.0))
    fence_async_shared()

    end = start + num_rows
    num_tiles = gl.cdiv(end, BLOCK_N)
    first = (num_tiles - 1) * BLOCK_N

    # The tile of the diagonal.
    mbarrier.wait(k_full.index(0), 0)
    scores_MN = warpgroup_mma_wait(0, deps=[_issue_scores(q_smem, k_smem.index(0), SCORES)])
    mbarrier.arrive(k_empty.index(0), count=1)
    positions_M = start + gl.arange(0, HALF_M, gl.SliceLayout(1, SCORES))
    positions_N = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    scores_MN = gl.where(positions_M[:, None] >= positions_N[None, :], scores_MN, float("-inf"))
    max_M = gl.max(scores_MN, 1) * scale
    scores_MN = gl.exp2(scores_MN * scale - max_M[:, None])
    sum_M = gl.sum(scores_MN, 1)
    weights_MN = gl.convert_layout(scores_MN.to(k_smem.dtype), WEIGHTS)
    acc_MH = gl.zeros([HALF_M, HEAD_DIM], gl.float32, OUTPUT)
    mbarrier.wait(v_full.index(0), 0)
    if end < first + BLOCK_N:
        # What is not written may be NaN, which a weight of 0 does not hide. Both warpgroups write the same.
        boxes = _boxes(v_smem)
        for box in gl.static_range(HEAD_DIM // BOX * 2):
            _clear_from(boxes.index(box), end - first - box % 2 * BOX)
        fence_async_shared()

    for i in range(1, num_tiles):
        stage = i % NUM_STAGES
        v_stage = (i - 1) % NUM_STAGES
        mbarrier.wait(k_full.index(stage), i // NUM_STAGES & 1)
        scores = _issue_scores(q_smem, k_smem.index(stage), SCORES)
        mbarrier.wait(v_full.index(v_stage), (i - 1) // NUM_STAGES & 1)
        outputs = warpgroup_mma(weights_MN, v_smem.index(v_stage), warpgroup_mma_init(acc_MH), is_async=True)
        scores_MN = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new_max_M = gl.maximum(max_M, gl.max(scores_MN, 1) * scale)
        factor_M = gl.exp2(max_M - new_max_M)
        max_M = new_max_M
        scores_MN = gl.exp2(scores_MN * scale - max_M[:, None])
        tile_sum_M = gl.sum(scores_MN, 1)
        sum_M = sum_M * factor_M + tile_sum_M
        # Nobody reads it: without a store that needs all weights, ptxas moves the wait in front of them.
        sum_smem.store(tile_sum_M)
        acc_MH = warpgroup_mma_wait(0, deps=[outputs])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        weights_MN = gl.convert_layout(scores_MN.to(k_smem.dtype), WEIGHTS)
        acc_MH *= gl.convert_layout(factor_M, gl.SliceLayout(1, OUTPUT))[:, None]

    stage = (num_tiles - 1) % NUM_STAGES
    mbarrier.wait(v_full.index(stage), (num_tiles - 1) // NUM_STAGES & 1)
    outputs = warpgroup_mma(weights_MN, v_smem.index(stage), warpgroup_mma_init(acc_MH), is_async=True)
    acc_MH = warpgroup_mma_wait(0, deps=[outputs])
    acc_MH *= gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, OUTPUT))[:, None]
    out_MH = gl.convert_layout(acc_MH.to(k_smem.dtype), COALESCED)
    gl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out_MH, mask=mask_MH)


@gluon.jit
def _issue_scores(
    q_smem: gl.shared_memory_descriptor, k_smem: gl.shared_memory_descriptor, SCORES: gl.constexpr
) -> gl.tensor:
    """Start the scores of the rows over a tile."""
    none = warpgroup_mma_init(gl.zeros([HALF_M, BLOCK_N], gl.float32, SCORES))
    return warpgroup_mma(q_smem, k_smem.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _clear_from(smem: gl.shared_memory_descriptor, count: gl.tensor) -> None:
    """Set the rows of a box from `count` on to 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BOX, gl.SliceLayout(1, LAYOUT))
    values = smem.load(LAYOUT)
    smem.store(gl.where((rows < count)[:, None], values, gl.zeros_like(values)))

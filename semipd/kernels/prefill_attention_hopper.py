"""Attention of prompt chunks on Hopper: one warpgroup loads, two compute, so that tensor cores and softmax overlap.

The idea is FlashAttention-3's (arXiv 2407.08608), here over a block pool. A persistent program has three warpgroups:

    loader       Q, K and V, by the TMA, into rings of shared memory
    upper half   query rows 0 to 63 of a tile
    lower half   query rows 64 to 127

A half issues the scores of a block of tokens and, behind them, the outputs of the block before. While the tensor cores
compute these outputs it takes the softmax of those scores; and while one half is in its softmax, the other's products
run. On an H100 2,048 rows behind 6,144 tokens reach 598 TFLOP/s, where the Triton kernel of `prefill_attention` reaches
479. Turns between the halves by named barriers (the paper's ping-pong) would add up to 3 %.

Items of work, a tile and a query head each, come longest first and are dealt to the programs back and forth; a program
ends at its first tile of no rows. An item is computed by one program in one order, so results do not depend on how
many programs there are.

The ring protocol: entry n lies in stage n % stages. Its `full` barrier completes when the bytes have come, its `empty`
barrier when all readers have released it. A barrier completes once per round, of which the parity is waited for.

Shapes: T query rows of a step, N query heads (of a block table: its entries), K KV heads, H head dim, R slots of the
pool, X request slots, W tiles; in the kernel M query rows of half a tile and N tokens of a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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

from semipd.kernels.hopper_gemm import COMPUTE_REGISTERS, shared_layout
from semipd.kernels.triton_util import launch

if TYPE_CHECKING:
    from torch import Tensor

HALF_M = gl.constexpr(64)
"""Query rows of a computing warpgroup: those of a tensor core instruction."""

BLOCK_N = gl.constexpr(128)
"""Tokens of a block of K or V."""

BOX = gl.constexpr(64)
"""Rows and columns of what one TMA copy brings: 64 tokens lie in one block of the pool, 64 columns fill a swizzle."""

BOX_BYTES = gl.constexpr(64 * 64 * 2)

NUM_STAGES = gl.constexpr(2)
"""Entries of a ring: 192 KiB of shared memory at 128 columns."""


def prefill_attention_hopper(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_XN: Tensor,
    tiles_W4: Tensor,
    out_TNH: Tensor,
    *,
    block_size: int,
    scale: float,
    num_sms: int,
) -> None:
    """See `prefill_attention`, which checks the arguments: of 16 bits, 64 or 128 columns, no window."""
    num_rows, num_heads, head_dim = q_TNH.shape
    num_slots, num_kv_heads = kv_R2KH.shape[0], kv_R2KH.shape[1] // 2
    num_tiles, slot_size = tiles_W4.shape[0], 2 * num_kv_heads * head_dim
    box = [BOX.value, BOX.value]
    layout = shared_layout(*box, q_TNH.dtype)
    launch(_prefill_attention_hopper_kernel, (min(num_sms, num_tiles * num_heads),))(
        TensorDescriptor(q_TNH, [num_rows, num_heads * head_dim], [q_TNH.stride(0), 1], box, layout),
        TensorDescriptor(kv_R2KH, [num_slots, slot_size], [slot_size, 1], box, layout),
        block_table_XN,
        tiles_W4,
        out_TNH,
        num_tiles,
        scale * math.log2(math.e),
        block_table_XN.stride(0),
        out_TNH.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        num_warps=4,  # of the loader
    )


@gluon.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["tiles_ptr"])
def _prefill_attention_hopper_kernel(
    q: gl.tensor,  # a descriptor, as is kv
    kv: gl.tensor,
    table_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    out_ptr: gl.tensor,
    num_tiles: int,
    scale: float,
    table_stride: int,
    out_stride: int,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    upper_q_ring = _make_ring(kv, HALF_M, HEAD_DIM, 1)
    lower_q_ring = _make_ring(kv, HALF_M, HEAD_DIM, 1)
    k_ring = _make_ring(kv, BLOCK_N, HEAD_DIM, 2)
    v_ring = _make_ring(kv, BLOCK_N, HEAD_DIM, 2)
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(cleared.index(0), count=2)
    fence_async_shared()
    work = (tiles_ptr, num_tiles)
    rings = (upper_q_ring, lower_q_ring, k_ring, v_ring)
    gl.warp_specialize(
        [
            (_load, (q, kv, table_ptr, table_stride, work, rings, NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE)),
            (_attend, (out_ptr, out_stride, work, upper_q_ring, k_ring, v_ring, cleared, scale, NUM_HEADS, 0)),
            (_attend, (out_ptr, out_stride, work, lower_q_ring, k_ring, v_ring, cleared, scale, NUM_HEADS, HALF_M)),
        ],
        [4, 4],
        [COMPUTE_REGISTERS, COMPUTE_REGISTERS],
    )


@gluon.jit
def _item(work: gl.tuple, index: gl.tensor, NUM_HEADS: gl.constexpr) -> gl.tuple:
    """Of the program's item: head, request slot, first row, rows (0 behind the last item), position of the first."""
    tiles_ptr, num_tiles = work
    program = gl.program_id(0)
    size = gl.num_programs(0)
    item = index * size + gl.where(index % 2 == 0, program, size - 1 - program)
    exists = item < num_tiles * NUM_HEADS
    # The query heads of a KV head are neighbours, so that all but one find its K and V in the L2 cache.
    tile_ptr = tiles_ptr + item // NUM_HEADS * 4
    slot = gl.load(tile_ptr, mask=exists, other=0)
    row_start = gl.load(tile_ptr + 1, mask=exists, other=0)
    num_rows = gl.load(tile_ptr + 2, mask=exists, other=0)
    start = gl.load(tile_ptr + 3, mask=exists, other=0)
    return item % NUM_HEADS, slot, row_start, num_rows, start


# ---- rings: tuples of the stages' memory, their `full` and their `empty` barriers


@gluon.jit
def _make_ring(source: gl.tensor, ROWS: gl.constexpr, COLUMNS: gl.constexpr, READERS: gl.constexpr) -> gl.tuple:
    """A ring for boxes of `source`."""
    smem = gl.allocate_shared_memory(source.dtype, [NUM_STAGES, ROWS, COLUMNS], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return smem, full, empty


@gluon.jit
def _fill(ring: gl.tuple, n: gl.tensor, source: gl.tensor, first_rows: gl.tuple, column: gl.tensor) -> None:
    """Have the TMA load entry n once it is empty: boxes of rows, each from one of `first_rows` on.

    Triton has all warps meet before each copy, so none is still at the wait when the stage comes round again.
    """
    smem, full, empty = ring
    COLUMNS: gl.constexpr = smem.shape[2] // BOX
    ROWS: gl.constexpr = smem.shape[1] // BOX
    stage = n % NUM_STAGES
    barrier = full.index(stage)
    boxes = _boxes(smem)
    mbarrier.wait(empty.index(stage), (n // NUM_STAGES & 1) ^ 1)
    mbarrier.expect(barrier, COLUMNS * ROWS * BOX_BYTES)
    for c in gl.static_range(COLUMNS):
        for r in gl.static_range(ROWS):
            box = boxes.index((stage * COLUMNS + c) * ROWS + r)
            tma.async_copy_global_to_shared(source, [first_rows[r], column + c * BOX], barrier, box)


@gluon.jit
def _wait_full(ring: gl.tuple, n: gl.tensor) -> gl.tensor:
    """The memory of entry n, once it is there."""
    smem, full, _ = ring
    mbarrier.wait(full.index(n % NUM_STAGES), n // NUM_STAGES & 1)
    return smem.index(n % NUM_STAGES)


@gluon.jit
def _release(ring: gl.tuple, n: gl.tensor) -> None:
    """Let entry n be overwritten once all readers have done this."""
    mbarrier.arrive(ring[2].index(n % NUM_STAGES), count=1)


@gluon.jit
def _boxes(smem: gl.tensor) -> gl.tensor:
    """The boxes of a ring's stages in memory order: the rows of a stage's first 64 columns, then of the next."""
    NUM_BOXES: gl.constexpr = smem.shape[0] * smem.shape[1] * smem.shape[2] // (BOX * BOX)
    return smem._reinterpret(smem.dtype, [NUM_BOXES, BOX, BOX], smem.layout)


# ---- the loader


@gluon.jit
def _load(
    q: gl.tensor,
    kv: gl.tensor,
    table_ptr: gl.tensor,
    table_stride: int,
    work: gl.tuple,
    rings: gl.tuple,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Load the items' queries, and their blocks from the last, which has the diagonal, to the first."""
    upper_q_ring, lower_q_ring, k_ring, v_ring = rings
    HEAD_DIM: gl.constexpr = k_ring[0].shape[2]
    n = 0  # blocks so far
    index = 0
    item = _item(work, 0, NUM_HEADS)
    while item[3] > 0:
        head, slot, row_start, num_rows, start = item
        item = _item(work, index + 1, NUM_HEADS)  # now, so that it is there when this one is done
        end = start + num_rows
        num_blocks = gl.cdiv(end, BLOCK_N)
        table_row = table_ptr + slot.to(gl.int64) * table_stride
        k_column = head // (NUM_HEADS // NUM_KV_HEADS) * HEAD_DIM
        v_column = k_column + NUM_KV_HEADS * HEAD_DIM
        slots = _box_slots(table_row, num_blocks - 1, end, BLOCK_SIZE)
        next_slots = _box_slots(table_row, num_blocks - 2, end, BLOCK_SIZE)
        _fill(upper_q_ring, index, q, (row_start,), head * HEAD_DIM)
        _fill(lower_q_ring, index, q, (row_start + HALF_M,), head * HEAD_DIM)
        _fill(k_ring, n, kv, slots, k_column)
        for i in range(1, num_blocks):
            _fill(k_ring, n + i, kv, next_slots, k_column)
            _fill(v_ring, n + i - 1, kv, slots, v_column)
            slots = next_slots
            next_slots = _box_slots(table_row, num_blocks - 2 - i, end, BLOCK_SIZE)
        _fill(v_ring, n + num_blocks - 1, kv, slots, v_column)
        n += num_blocks
        index += 1


@gluon.jit
def _box_slots(table_row: gl.tensor, block: gl.tensor, end: gl.tensor, BLOCK_SIZE: gl.constexpr) -> gl.tuple:
    """The first pool slots of the block's two boxes of tokens; any for a box that nobody reads."""
    first = block * BLOCK_N
    second = first + BOX
    first_id = gl.load(table_row + first // BLOCK_SIZE, mask=first >= 0, other=0)
    second_id = gl.load(table_row + second // BLOCK_SIZE, mask=(first >= 0) & (second < end), other=0)
    return first_id * BLOCK_SIZE + first % BLOCK_SIZE, second_id * BLOCK_SIZE + second % BLOCK_SIZE


# ---- half of a tile


@gluon.jit
def _attend(
    out_ptr: gl.tensor,
    out_stride: int,
    work: gl.tuple,
    q_ring: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    cleared: gl.tensor,
    scale: float,
    NUM_HEADS: gl.constexpr,
    FIRST_ROW: gl.constexpr,
) -> None:
    """The outputs of the items' rows from `FIRST_ROW` on; `scale` is that of the scores times log2(e)."""
    DTYPE: gl.constexpr = k_ring[0].dtype
    HEAD_DIM: gl.constexpr = k_ring[0].shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    sum_smem = gl.allocate_shared_memory(gl.float32, [HALF_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    n = 0  # blocks so far
    num_cleared = 0
    index = 0
    item = _item(work, 0, NUM_HEADS)
    while item[3] > 0:
        head, _, row_start, num_rows, start = item
        item = _item(work, index + 1, NUM_HEADS)
        end = start + num_rows
        num_blocks = gl.cdiv(end, BLOCK_N)
        first = (num_blocks - 1) * BLOCK_N

        # The block of the diagonal. Its scores are finite in every row that is stored: a token sees itself.
        q_smem = _wait_full(q_ring, index)
        scores_MN = warpgroup_mma_wait(0, deps=[_issue_scores(q_smem, _wait_full(k_ring, n), SCORES)])
        _release(k_ring, n)
        positions_M = start + FIRST_ROW + gl.arange(0, HALF_M, gl.SliceLayout(1, SCORES))
        positions_N = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores_MN = gl.where(positions_M[:, None] >= positions_N[None, :], scores_MN, float("-inf"))
        max_M = gl.max(scores_MN, 1) * scale
        weights_MN = gl.exp2(scores_MN * scale - max_M[:, None])
        sum_M = gl.sum(weights_MN, 1)
        weights_MN = gl.convert_layout(weights_MN.to(DTYPE), WEIGHTS)
        acc_MH = gl.zeros([HALF_M, HEAD_DIM], gl.float32, OUTPUT)
        _wait_full(v_ring, n)
        if end < first + BLOCK_N:
            _clear_from(v_ring[0], n % NUM_STAGES, end - first, FIRST_ROW // HALF_M)
            mbarrier.arrive(cleared.index(0), count=1)
            mbarrier.wait(cleared.index(0), num_cleared & 1)
            num_cleared += 1

        for i in range(n + 1, n + num_blocks):
            k_smem = _wait_full(k_ring, i)
            v_smem = _wait_full(v_ring, i - 1)
            scores = _issue_scores(q_smem, k_smem, SCORES)
            outputs = warpgroup_mma(weights_MN, v_smem, warpgroup_mma_init(acc_MH), is_async=True)
            scores_MN = warpgroup_mma_wait(1, deps=[scores])
            _release(k_ring, i)
            new_max_M = gl.maximum(max_M, gl.max(scores_MN, 1) * scale)
            factor_M = gl.exp2(max_M - new_max_M)
            max_M = new_max_M
            scores_MN = gl.exp2(scores_MN * scale - max_M[:, None])
            block_sum_M = gl.sum(scores_MN, 1)
            sum_M = sum_M * factor_M + block_sum_M
            # Nobody reads it: without a store that needs all weights, ptxas moves the wait in front of them.
            sum_smem.store(block_sum_M)
            acc_MH = warpgroup_mma_wait(0, deps=[outputs])
            _release(v_ring, i - 1)
            weights_MN = gl.convert_layout(scores_MN.to(DTYPE), WEIGHTS)
            acc_MH *= gl.convert_layout(factor_M, gl.SliceLayout(1, OUTPUT))[:, None]

        _release(q_ring, index)
        n += num_blocks
        v_smem = _wait_full(v_ring, n - 1)
        outputs = warpgroup_mma(weights_MN, v_smem, warpgroup_mma_init(acc_MH), is_async=True)
        acc_MH = warpgroup_mma_wait(0, deps=[outputs])
        _release(v_ring, n - 1)
        acc_MH *= gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, OUTPUT))[:, None]
        out_row_ptr = out_ptr + (row_start + FIRST_ROW).to(gl.int64) * out_stride + head * HEAD_DIM
        _store(out_row_ptr, out_stride, acc_MH.to(DTYPE), num_rows - FIRST_ROW)
        index += 1


@gluon.jit
def _issue_scores(q_smem: gl.tensor, k_smem: gl.tensor, SCORES: gl.constexpr) -> gl.tensor:
    none = warpgroup_mma_init(gl.zeros([HALF_M, BLOCK_N], gl.float32, SCORES))
    return warpgroup_mma(q_smem, k_smem.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _clear_from(smem: gl.tensor, stage: gl.tensor, count: gl.tensor, HALF: gl.constexpr) -> None:
    """Set the rows of a stage from `count` on to 0: what is not written may be NaN, which a weight of 0 does not hide.

    Each half does the boxes of a half of the rows.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = smem.shape[2] // BOX
    ROWS: gl.constexpr = smem.shape[1] // BOX
    rows = gl.arange(0, BOX, gl.SliceLayout(1, LAYOUT))
    boxes = _boxes(smem)
    for c in gl.static_range(COLUMNS):
        box = boxes.index((stage * COLUMNS + c) * ROWS + HALF)
        values = box.load(LAYOUT)
        box.store(gl.where((rows < count - HALF * BOX)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _store(out_row_ptr: gl.tensor, out_stride: int, out_MH: gl.tensor, num_rows: gl.tensor) -> None:
    """Store the first `num_rows` rows, 16 bytes a thread."""
    HEAD_DIM: gl.constexpr = out_MH.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    rows = gl.arange(0, HALF_M, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    mask_MH = (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    out_ptrs = out_row_ptr + rows[:, None] * out_stride + columns[None, :]
    gl.store(out_ptrs, gl.convert_layout(out_MH, LAYOUT), mask=mask_MH)

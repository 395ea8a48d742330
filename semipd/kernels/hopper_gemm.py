"""What the GEMMs on Hopper share: warps that load, warps that multiply, warps that store.

A persistent program has a warp that loads operands by the TMA into a ring of shared memory, two warpgroups that each
multiply a half of a tile's rows, and for each of them a warp that stores what it hands on. So the tensor cores wait for
no store: a half hands its sums on in parts of their columns, through a ring of their own, and goes on with the next
tile, whose operands are there. What a tile is added to comes by the same ring: the storing warp has the TMA fetch it
ahead into the memory of the part that it will be added to.

The ring protocol: entry n lies in stage n % stages. Its `full` barrier completes when the bytes have come, its `empty`
barrier when all readers have released it. A barrier completes once per round, of which the parity is waited for.

Shapes: M rows, N outputs and K inputs of a tile, W columns of a part.
"""

from __future__ import annotations

from functools import cache

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

# Of a thread. A program of 12 warps starts with 168 for each: 2 x 240 leave 24 for the others, the least there is.
COMPUTE_REGISTERS = gl.constexpr(240)
COPY_REGISTERS = gl.constexpr(24)


def descriptor(matrix: Tensor, box: list[int]) -> TensorDescriptor:
    """What the TMA reads or writes a matrix of 16 bits by, in boxes of rows and columns."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box, shared_layout(*box, matrix.dtype))


@cache
def shared_layout(num_rows: int, num_columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box of 16 bits lies in shared memory; made once, as it takes 11 us, a fifth of a launch."""
    return gl.NVMMASharedLayout.get_default_for(
        [num_rows, num_columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def is_aligned(matrix: Tensor) -> bool:
    """Whether the TMA takes boxes of its rows as operands of the tensor cores: 16 bits, rows at 16 bytes."""
    return matrix.element_size() == 2 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0


@gluon.jit
def make_rings(
    x: gl.tensor,
    weight: gl.tensor,
    out: gl.tensor,
    NUM_STAGES: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    OUT_STAGES: gl.constexpr,
) -> gl.tuple:
    """The ring of operands, and that of parts of columns, of which each half has its own stages."""
    M: gl.constexpr = x.block_shape[0]
    N: gl.constexpr = weight.block_shape[0]
    K: gl.constexpr = x.block_shape[1]
    x_smem = gl.allocate_shared_memory(x.dtype, [2 * NUM_STAGES, M // 2, K], x.layout)
    weight_smem = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, N, K], weight.layout)
    out_smem = gl.allocate_shared_memory(x.dtype, [2 * OUT_STAGES, M // 2, N // NUM_PARTS], out.layout)
    ring = (x_smem, weight_smem, _barriers(NUM_STAGES, 1), _barriers(NUM_STAGES, 2))
    out_ring = (out_smem, _barriers(2 * OUT_STAGES, 1), _barriers(2 * OUT_STAGES, 1))
    fence_async_shared()
    return ring, out_ring


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.tensor:
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


# ---- the loading warp


@gluon.jit
def load_step(
    x: gl.tensor, weight: gl.tensor, row: gl.tensor, output: gl.tensor, start: gl.tensor, n: gl.tensor, ring: gl.tuple
) -> None:
    """Have the n-th entry of the ring loaded, once its stage is free: from a row, an output and an input on."""
    x_smem, weight_smem, full, empty = ring
    NUM_STAGES: gl.constexpr = weight_smem.shape[0]
    M: gl.constexpr = x.block_shape[0]
    N: gl.constexpr = weight.block_shape[0]
    K: gl.constexpr = x.block_shape[1]
    whole_x_smem = x_smem._reinterpret(x.dtype, [NUM_STAGES, M, K], x.layout)
    stage = n % NUM_STAGES
    barrier = full.index(stage)
    mbarrier.wait(empty.index(stage), (n // NUM_STAGES & 1) ^ 1)
    mbarrier.expect(barrier, (M + N) * K * 2)
    tma.async_copy_global_to_shared(x, [row, start], barrier, whole_x_smem.index(stage))
    tma.async_copy_global_to_shared(weight, [output, start], barrier, weight_smem.index(stage))


# ---- a multiplying warpgroup


@gluon.jit
def add_steps(sums_MN: gl.tensor, ring: gl.tuple, n: gl.tensor, num_steps: gl.tensor, HALF: gl.constexpr) -> gl.tensor:
    """The sums with the products of `num_steps` entries of the ring, from the n-th on, for a half of the rows."""
    x_smem, weight_smem, full, empty = ring
    NUM_STAGES: gl.constexpr = weight_smem.shape[0]
    for k in range(num_steps):
        stage = (n + k) % NUM_STAGES
        mbarrier.wait(full.index(stage), (n + k) // NUM_STAGES & 1)
        weight_KN = weight_smem.index(stage).permute((1, 0))
        sums = warpgroup_mma_init(sums_MN)
        sums = warpgroup_mma(x_smem.index(2 * stage + HALF), weight_KN, sums, is_async=True)
        sums_MN = warpgroup_mma_wait(1, deps=[sums])  # of the step before
        mbarrier.arrive(empty.index((n + k + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
    sums_MN = warpgroup_mma_wait(0, deps=[sums_MN])
    mbarrier.arrive(empty.index((n + num_steps + NUM_STAGES - 1) % NUM_STAGES), count=1)
    return sums_MN


@gluon.jit
def split_columns(sums_MN: gl.tensor, NUM_PARTS: gl.constexpr) -> gl.tuple:
    """Equal ranges of columns; a thread has its own of each."""
    if NUM_PARTS == 1:
        return (sums_MN,)
    else:
        M: gl.constexpr = sums_MN.shape[0]
        N: gl.constexpr = sums_MN.shape[1]
        low, high = sums_MN.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()
        return split_columns(low, NUM_PARTS // 2) + split_columns(high, NUM_PARTS // 2)


@gluon.jit
def hand_on(
    y_MW: gl.tensor, part: gl.tensor, out_ring: gl.tuple, HAS_RESIDUAL: gl.constexpr, HALF: gl.constexpr
) -> None:
    """Give a part of this half to the storing warp, with a residual added to what that has had fetched.

    `part` counts the parts handed on before it.
    """
    out_smem, ready, done = out_ring
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, out_smem.shape[2], 16])
    stage = HALF * OUT_STAGES + part % OUT_STAGES
    smem = out_smem.index(stage)
    y_MW = gl.convert_layout(y_MW, PART)
    # With a residual the round's bytes have come; without one, the round before has left.
    mbarrier.wait(ready.index(stage), (part // OUT_STAGES & 1) ^ (0 if HAS_RESIDUAL else 1))
    if HAS_RESIDUAL:
        y_MW += smem.load(PART).to(gl.float32)
    smem.store(y_MW.to(smem.dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(stage), count=1)


# ---- a storing warp


@gluon.jit
def store_part(out: gl.tensor, place: gl.tuple, part: gl.tensor, out_ring: gl.tuple, HALF: gl.constexpr) -> None:
    """Store the `part`-th part of this half; at return its memory is read, and may be written."""
    out_smem = out_ring[0]
    done = out_ring[2]
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    stage = HALF * OUT_STAGES + part % OUT_STAGES
    mbarrier.wait(done.index(stage), part // OUT_STAGES & 1)
    row, column = place
    tma.async_copy_shared_to_global(out, [row, column], out_smem.index(stage))
    tma.store_wait(0)


@gluon.jit
def fetch_part(residual: gl.tensor, place: gl.tuple, part: gl.tensor, out_ring: gl.tuple, HALF: gl.constexpr) -> None:
    """Have the TMA load what the `part`-th part of this half will be added to."""
    out_smem = out_ring[0]
    ready = out_ring[1]
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    stage = HALF * OUT_STAGES + part % OUT_STAGES
    mbarrier.expect(ready.index(stage), out_smem.shape[1] * out_smem.shape[2] * 2)
    row, column = place
    tma.async_copy_global_to_shared(residual, [row, column], ready.index(stage), out_smem.index(stage))


@gluon.jit
def release_part(part: gl.tensor, out_ring: gl.tuple, HALF: gl.constexpr) -> None:
    """Say that the memory of the `part`-th part, which is stored, may be written: nothing is fetched into it."""
    out_smem = out_ring[0]
    ready = out_ring[1]
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    mbarrier.arrive(ready.index(HALF * OUT_STAGES + part % OUT_STAGES), count=1)

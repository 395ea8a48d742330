"""The signalling GEMM on Hopper: warps that load, warps that multiply, warps that store.

A persistent program has a warp that loads operands by the TMA into a ring of shared memory, two warpgroups that each
multiply a half of a tile's rows, and for each of them a warp that stores what it hands on. So the tensor cores wait for
no store: a half hands its sums on in parts of its columns, through a ring of their own, and goes on with the next tile,
whose operands are there. A residual comes by the same ring: the storing warp has the TMA fetch it ahead into the memory
of the part that it will be added to.

When all stores of its half are visible to the GPU, the storing warp adds 1 to the counter of the tile's group.

The ring protocol: entry n lies in stage n % stages. Its `full` barrier completes when the bytes have come, its `empty`
barrier when all readers have released it. A barrier completes once per round, of which the parity is waited for.

Shapes: T rows, I inputs, O outputs, G groups as in `gemm_signal`; M rows, N outputs and K inputs of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

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

from semipd.kernels.gemm_signal_raster import count_turns, place_of, tile_of
from semipd.kernels.triton_util import launch

# Of a thread. A program of 12 warps starts with 168 for each: 2 x 240 leave 24 for the others, the least there is.
_COMPUTE_REGISTERS = gl.constexpr(240)
_COPY_REGISTERS = gl.constexpr(24)


def gemm_signal_hopper(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    residual_TO: Tensor | None,
    bias_O: Tensor | None,
    counters_G: Tensor,
    inner_ends: Sequence[int],
    num_reserved: int,
    *,
    grid: tuple[int],
    block_m: int,
    block_n: int,
    block_k: int,
    num_stages: int,
    num_parts: int,
    out_stages: int,
    band: int,
) -> None:
    """See `gemm_signal`, which checks the arguments: of 16 bits, aligned to 16 bytes."""
    part = [block_m // 2, block_n // num_parts]
    launch(_gemm_signal_hopper_kernel, grid)(
        _descriptor(x_TI, [block_m, block_k]),
        _descriptor(weight_OI, [block_n, block_k]),
        _descriptor(out_TO, part),
        _descriptor(out_TO if residual_TO is None else residual_TO, part),
        bias_O,
        counters_G,
        -(-x_TI.shape[1] // block_k),
        -(-len(x_TI) // block_m),
        -(-len(weight_OI) // block_n),
        len(weight_OI),
        *inner_ends,
        num_reserved,
        NUM_STAGES=num_stages,
        NUM_PARTS=num_parts,
        OUT_STAGES=out_stages,
        BAND=band,
        HAS_RESIDUAL=residual_TO is not None,
        num_warps=4,  # of the upper half
    )


def _descriptor(matrix: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box, layout)


_INTEGERS = ("num_steps", "num_blocks", "num_columns", "num_outputs", "end0", "end1", "end2", "end3", "num_reserved")


@gluon.jit(do_not_specialize=_INTEGERS)
def _gemm_signal_hopper_kernel(
    x: gl.tensor,  # a descriptor, as are weight, out and residual
    weight: gl.tensor,
    out: gl.tensor,
    residual: gl.tensor,
    bias_ptr: gl.tensor,
    counters_ptr: gl.tensor,
    num_steps: int,
    num_blocks: int,
    num_columns: int,
    num_outputs: int,
    end0: int,
    end1: int,
    end2: int,
    end3: int,
    num_reserved: int,
    NUM_STAGES: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    OUT_STAGES: gl.constexpr,
    BAND: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
) -> None:
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_N: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = x.block_shape[1]
    x_smem = gl.allocate_shared_memory(x.dtype, [2 * NUM_STAGES, BLOCK_M // 2, BLOCK_K], x.layout)
    weight_smem = gl.allocate_shared_memory(x.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], weight.layout)
    out_smem = gl.allocate_shared_memory(x.dtype, [2 * OUT_STAGES, BLOCK_M // 2, BLOCK_N // NUM_PARTS], out.layout)
    ring = (x_smem, weight_smem, _barriers(NUM_STAGES, 1), _barriers(NUM_STAGES, 2))
    out_ring = (out_smem, _barriers(2 * OUT_STAGES, 1), _barriers(2 * OUT_STAGES, 1))
    fence_async_shared()
    raster = (num_blocks, num_columns, (end0, end1, end2, end3, num_blocks), num_reserved)
    bias = (bias_ptr, num_outputs)
    gl.warp_specialize(
        [
            (_multiply, (bias, num_steps, raster, ring, out_ring, BAND, NUM_PARTS, HAS_RESIDUAL, 0)),
            (_multiply, (bias, num_steps, raster, ring, out_ring, BAND, NUM_PARTS, HAS_RESIDUAL, 1)),
            (_load, (x, weight, num_steps, raster, ring, BAND)),
            (_store, (out, residual, counters_ptr, raster, out_ring, BAND, NUM_PARTS, HAS_RESIDUAL, 0)),
            (_store, (out, residual, counters_ptr, raster, out_ring, BAND, NUM_PARTS, HAS_RESIDUAL, 1)),
        ],
        [4, 1, 1, 1],
        [_COMPUTE_REGISTERS, _COPY_REGISTERS, _COPY_REGISTERS, _COPY_REGISTERS],
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.tensor:
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _load(
    x: gl.tensor, weight: gl.tensor, num_steps: int, raster: gl.tuple, ring: gl.tuple, BAND: gl.constexpr
) -> None:
    """Load the operands of the program's tiles, step by step."""
    x_smem, weight_smem, full, empty = ring
    NUM_STAGES: gl.constexpr = weight_smem.shape[0]
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_N: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = x.block_shape[1]
    whole_x_smem = x_smem._reinterpret(x.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x.layout)
    n = 0  # steps so far
    for turn in range(count_turns(raster)):
        block, column, _ = place_of(tile_of(turn, raster), raster, BAND)
        for k in range(num_steps):
            stage = n % NUM_STAGES
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), (n // NUM_STAGES & 1) ^ 1)
            mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(x, [block * BLOCK_M, k * BLOCK_K], barrier, whole_x_smem.index(stage))
            tma.async_copy_global_to_shared(weight, [column * BLOCK_N, k * BLOCK_K], barrier, weight_smem.index(stage))
            n += 1


@gluon.jit
def _multiply(
    bias: gl.tuple,
    num_steps: int,
    raster: gl.tuple,
    ring: gl.tuple,
    out_ring: gl.tuple,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """The sums of a half of the tiles' rows, handed on in parts of their columns."""
    x_smem, weight_smem, full, empty = ring
    out_smem, ready, done = out_ring
    NUM_STAGES: gl.constexpr = weight_smem.shape[0]
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    HALF_M: gl.constexpr = x_smem.shape[1]
    BLOCK_N: gl.constexpr = weight_smem.shape[1]
    WIDTH: gl.constexpr = BLOCK_N // NUM_PARTS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    n = 0  # steps so far
    part = 0  # parts so far
    for turn in range(count_turns(raster)):
        sums_MN = gl.zeros([HALF_M, BLOCK_N], gl.float32, SUMS)
        for k in range(num_steps):
            stage = n % NUM_STAGES
            mbarrier.wait(full.index(stage), n // NUM_STAGES & 1)
            weight_KN = weight_smem.index(stage).permute((1, 0))
            sums = warpgroup_mma_init(sums_MN)
            sums = warpgroup_mma(x_smem.index(2 * stage + HALF), weight_KN, sums, use_acc=k > 0, is_async=True)
            sums_MN = warpgroup_mma_wait(1, deps=[sums])  # of the step before
            mbarrier.arrive(empty.index((n + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
            n += 1
        sums_MN = warpgroup_mma_wait(0, deps=[sums_MN])
        mbarrier.arrive(empty.index((n + NUM_STAGES - 1) % NUM_STAGES), count=1)
        parts = _split(sums_MN, NUM_PARTS)
        for i in gl.static_range(NUM_PARTS):
            y_MN = gl.convert_layout(parts[i], PART)
            y_MN = _add_bias(y_MN, bias, turn, i, raster, BLOCK_N, BAND, PART)
            stage = HALF * OUT_STAGES + part % OUT_STAGES
            smem = out_smem.index(stage)
            # With a residual the round's bytes have come; without one, the round before has left.
            mbarrier.wait(ready.index(stage), (part // OUT_STAGES & 1) ^ (0 if HAS_RESIDUAL else 1))
            if HAS_RESIDUAL:
                y_MN += smem.load(PART).to(gl.float32)
            smem.store(y_MN.to(smem.dtype))
            fence_async_shared()
            mbarrier.arrive(done.index(stage), count=1)
            part += 1


@gluon.jit
def _split(sums_MN: gl.tensor, NUM_PARTS: gl.constexpr) -> gl.tuple:
    """Equal ranges of columns; a thread has its own of each."""
    if NUM_PARTS == 1:
        return (sums_MN,)
    else:
        M: gl.constexpr = sums_MN.shape[0]
        N: gl.constexpr = sums_MN.shape[1]
        low, high = sums_MN.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()
        return _split(low, NUM_PARTS // 2) + _split(high, NUM_PARTS // 2)


@gluon.jit
def _add_bias(
    y_MN: gl.tensor,
    bias: gl.tuple,
    turn: gl.tensor,
    part: gl.constexpr,
    raster: gl.tuple,
    BLOCK_N: gl.constexpr,
    BAND: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    bias_ptr, num_outputs = bias
    if bias_ptr is not None:
        WIDTH: gl.constexpr = y_MN.shape[1]
        _, column, _ = place_of(tile_of(turn, raster), raster, BAND)
        outputs_N = column * BLOCK_N + part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
        y_MN += gl.load(bias_ptr + outputs_N, mask=outputs_N < num_outputs, other=0).to(gl.float32)[None, :]
    return y_MN


@gluon.jit
def _store(
    out: gl.tensor,
    residual: gl.tensor,
    counters_ptr: gl.tensor,
    raster: gl.tuple,
    out_ring: gl.tuple,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """Store a half of the tiles and signal; before, fetch the residual's parts as memory for them becomes free."""
    out_smem, ready, done = out_ring
    OUT_STAGES: gl.constexpr = out_smem.shape[0] // 2
    HALF_M: gl.constexpr = out_smem.shape[1]
    WIDTH: gl.constexpr = out_smem.shape[2]
    num_turns = count_turns(raster)
    if HAS_RESIDUAL:
        for i in gl.static_range(OUT_STAGES):
            if i // NUM_PARTS < num_turns:
                _fetch(
                    residual,
                    i // NUM_PARTS,
                    i % NUM_PARTS,
                    HALF * OUT_STAGES + i,
                    raster,
                    out_ring,
                    BAND,
                    NUM_PARTS,
                    HALF,
                )
    part = 0  # parts so far
    for turn in range(num_turns):
        block, column, group = place_of(tile_of(turn, raster), raster, BAND)
        for i in gl.static_range(NUM_PARTS):
            stage = HALF * OUT_STAGES + part % OUT_STAGES
            coordinates = [(block * 2 + HALF) * HALF_M, (column * NUM_PARTS + i) * WIDTH]
            mbarrier.wait(done.index(stage), part // OUT_STAGES & 1)
            tma.async_copy_shared_to_global(out, coordinates, out_smem.index(stage))
            tma.store_wait(0)  # until the memory is read
            if HAS_RESIDUAL:
                next_turn = turn + (i + OUT_STAGES) // NUM_PARTS
                if next_turn < num_turns:
                    _fetch(
                        residual,
                        next_turn,
                        (i + OUT_STAGES) % NUM_PARTS,
                        stage,
                        raster,
                        out_ring,
                        BAND,
                        NUM_PARTS,
                        HALF,
                    )
            else:
                mbarrier.arrive(ready.index(stage), count=1)
            part += 1
        _signal(counters_ptr + group)


@gluon.jit
def _fetch(
    residual: gl.tensor,
    turn: gl.tensor,
    part: gl.constexpr,
    stage: gl.tensor,
    raster: gl.tuple,
    out_ring: gl.tuple,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """Have the TMA load a part of the residual."""
    out_smem = out_ring[0]
    ready = out_ring[1]
    HALF_M: gl.constexpr = out_smem.shape[1]
    WIDTH: gl.constexpr = out_smem.shape[2]
    block, column, _ = place_of(tile_of(turn, raster), raster, BAND)
    coordinates = [(block * 2 + HALF) * HALF_M, (column * NUM_PARTS + part) * WIDTH]
    mbarrier.expect(ready.index(stage), HALF_M * WIDTH * 2)
    tma.async_copy_global_to_shared(residual, coordinates, ready.index(stage), out_smem.index(stage))


@gluon.jit
def _signal(counter_ptr: gl.tensor) -> None:
    """By a warp: once all stores that it has issued are visible to the GPU, add 1 to the counter.

    `tma.store_wait` waits only until the shared memory is read.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_first;
        .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 is_first, lane, 0;
        @is_first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [counter_ptr],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )

"""The signalling GEMM on Hopper: the warps of `hopper_gemm`, which walk the tiles of `gemm_signal_raster`.

When all stores of its half are visible to the GPU, a storing warp adds 1 to the counter of the tile's group.

Shapes: T rows, I inputs, O outputs, G groups as in `gemm_signal`; M rows, N outputs and K inputs of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from semipd.kernels.gemm_signal_raster import count_turns, place_of, tile_of
from semipd.kernels.hopper_gemm import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    add_steps,
    descriptor,
    fetch_part,
    hand_on,
    load_step,
    make_rings,
    release_part,
    split_columns,
    store_part,
)
from semipd.kernels.triton_util import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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
        descriptor(x_TI, [block_m, block_k]),
        descriptor(weight_OI, [block_n, block_k]),
        descriptor(out_TO, part),
        descriptor(out_TO if residual_TO is None else residual_TO, part),
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
    ring, out_ring = make_rings(x, weight, out, NUM_STAGES, NUM_PARTS, OUT_STAGES)
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
        [COMPUTE_REGISTERS, COPY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


@gluon.jit
def _load(
    x: gl.tensor, weight: gl.tensor, num_steps: int, raster: gl.tuple, ring: gl.tuple, BAND: gl.constexpr
) -> None:
    """Load the operands of the program's tiles, step by step."""
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BLOCK_N: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = x.block_shape[1]
    n = 0  # steps so far
    for turn in range(count_turns(raster)):
        block, column, _ = place_of(tile_of(turn, raster), raster, BAND)
        for k in range(num_steps):
            load_step(x, weight, block * BLOCK_M, column * BLOCK_N, k * BLOCK_K, n, ring)
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
    HALF_M: gl.constexpr = ring[0].shape[1]
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // NUM_PARTS, 16])
    part = 0  # parts so far
    for turn in range(count_turns(raster)):
        sums_MN = gl.zeros([HALF_M, BLOCK_N], gl.float32, SUMS)
        parts = split_columns(add_steps(sums_MN, ring, turn * num_steps, num_steps, HALF), NUM_PARTS)
        for i in gl.static_range(NUM_PARTS):
            y_MN = _add_bias(gl.convert_layout(parts[i], PART), bias, turn, i, raster, BLOCK_N, BAND, PART)
            hand_on(y_MN, part, out_ring, HAS_RESIDUAL, HALF)
            part += 1


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
    OUT_STAGES: gl.constexpr = out_ring[0].shape[0] // 2
    num_turns = count_turns(raster)
    if HAS_RESIDUAL:
        for i in gl.static_range(OUT_STAGES):
            if i // NUM_PARTS < num_turns:
                place = _part_place(out, i // NUM_PARTS, i % NUM_PARTS, raster, BAND, NUM_PARTS, HALF)
                fetch_part(residual, place, i, out_ring, HALF)
    part = 0  # parts so far
    for turn in range(num_turns):
        for i in gl.static_range(NUM_PARTS):
            store_part(out, _part_place(out, turn, i, raster, BAND, NUM_PARTS, HALF), part, out_ring, HALF)
            if HAS_RESIDUAL:
                later = turn + (i + OUT_STAGES) // NUM_PARTS
                if later < num_turns:
                    place = _part_place(out, later, (i + OUT_STAGES) % NUM_PARTS, raster, BAND, NUM_PARTS, HALF)
                    fetch_part(residual, place, part + OUT_STAGES, out_ring, HALF)
            else:
                release_part(part, out_ring, HALF)
            part += 1
        _, _, group = place_of(tile_of(turn, raster), raster, BAND)
        _signal(counters_ptr + group)


@gluon.jit
def _part_place(
    out: gl.tensor,
    turn: gl.tensor,
    part: gl.tensor,
    raster: gl.tuple,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HALF: gl.constexpr,
) -> gl.tuple:
    """Where a part of a turn's tile lies."""
    block, column, _ = place_of(tile_of(turn, raster), raster, BAND)
    return (block * 2 + HALF) * out.block_shape[0], (column * NUM_PARTS + part) * out.block_shape[1]


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

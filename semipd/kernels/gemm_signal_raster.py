"""Which tiles a program of the signalling GEMM on Hopper computes, in which order, and where they lie.

Every warp of a program walks the same tiles by itself. A raster is (row blocks, columns of tiles, row block behind
which each group ends, programs that end with the first group).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def count_turns(raster: gl.tuple) -> gl.tensor:
    """Tiles of this program."""
    num_blocks, num_columns, ends, num_reserved = raster
    program = gl.program_id(0)
    num_staying = gl.num_programs(0) - num_reserved
    first = _first_turns(raster)
    rest = num_blocks * num_columns - ends[0] * num_columns - _place_in_rest(raster)
    return first + gl.where(program < num_staying, (rest + num_staying - 1) // num_staying, 0)


@gluon.jit
def tile_of(turn: gl.tensor, raster: gl.tuple) -> gl.tensor:
    """The tile of a turn: those of the first group are dealt to all programs, the rest to those that stay."""
    _, num_columns, ends, num_reserved = raster
    num_programs = gl.num_programs(0)
    first = _first_turns(raster)
    rest = ends[0] * num_columns + _place_in_rest(raster) + (turn - first) * (num_programs - num_reserved)
    return gl.where(turn < first, gl.program_id(0) + turn * num_programs, rest)


@gluon.jit
def _first_turns(raster: gl.tuple) -> gl.tensor:
    """Tiles of this program in the first group."""
    num_programs = gl.num_programs(0)
    return (raster[2][0] * raster[1] - gl.program_id(0) + num_programs - 1) // num_programs


@gluon.jit
def _place_in_rest(raster: gl.tuple) -> gl.tensor:
    """Where this program comes when the rest is dealt: first those that the last deal of the first group left out."""
    num_programs = gl.num_programs(0)
    num_staying = num_programs - raster[3]
    dealt = gl.minimum(raster[2][0] * raster[1] % num_programs, num_staying)
    return (gl.program_id(0) - dealt + num_staying) % num_staying


@gluon.jit
def place_of(tile: gl.tensor, raster: gl.tuple, BAND: gl.constexpr) -> gl.tuple:
    """Row block, column block and group of a tile. Unused ends are the last row block's."""
    _, num_columns, ends, _ = raster
    block = tile // num_columns
    group = 0
    start = 0
    end = ends[0]
    for i in gl.static_range(1, len(ends)):
        group = gl.where(block >= ends[i - 1], i, group)
        start = gl.where(block >= ends[i - 1], ends[i - 1], start)
        end = gl.where(block >= ends[i - 1], ends[i], end)
    start += (block - start) // BAND * BAND
    height = gl.minimum(end - start, BAND)
    tile -= start * num_columns
    return start + tile % height, tile // height, group

"""The stream-K GEMM on Hopper: see `stream_k_gemm` for what is cut how, `hopper_gemm` for its warps and rings.

A program's *pieces* are, in this order: the whole units that are dealt to it; the *head*, the first steps of the last
unit of its range, which the program behind it goes on with; the whole units of its range; and the *tail*, the rest of
the first unit of its range, of which the program before has summed the first steps. Each multiplying warpgroup hands
its own half of the rows on, through memory that both read past the L1 cache, and by a flag that the reader takes down.

A tail waits for the program before, a head for nobody. Programs start in their order, so no waiting program keeps the
one that it waits for from an SM. Sums of a unit are added up in the order of the inputs, whoever adds them: where a
unit is cut changes no bit.

Shapes: M rows and N outputs of a unit's half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    from torch import Tensor

    from semipd.kernels.stream_k_gemm import StreamKConfig

_SNAP = gl.constexpr(3)  # steps; a hand-over takes as long, so a cut so near a unit's border is moved there
_thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # triton 3.6, 3.7


def stream_k_gemm_hopper(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    partials: Tensor,
    flags: Tensor,
    num_cut: int,
    config: StreamKConfig,
    *,
    grid: tuple[int],
    adds: bool,
) -> None:
    """See `stream_k_gemm`, which checks the arguments: of 16 bits, aligned to 16 bytes."""
    launch(_stream_k_gemm_kernel, grid, pdl_on=x_TI.device)(
        descriptor(x_TI, [config.block_m, config.block_k]),
        descriptor(weight_OI, [config.block_n, config.block_k]),
        descriptor(out_TO, [config.block_m // 2, config.block_n // config.num_parts]),
        partials,
        flags,
        -(-x_TI.shape[1] // config.block_k),
        -(-len(x_TI) // config.block_m),
        -(-len(weight_OI) // config.block_n),
        num_cut,
        NUM_STAGES=config.num_stages,
        NUM_PARTS=config.num_parts,
        OUT_STAGES=config.out_stages,
        BAND=config.band,
        ADDS=adds,
        num_warps=4,  # of the upper half
    )


@gluon.jit(do_not_specialize=("num_steps", "num_blocks", "num_columns", "num_cut"))
def _stream_k_gemm_kernel(
    x: gl.tensor,  # a descriptor, as are weight and out
    weight: gl.tensor,
    out: gl.tensor,
    partials_ptr: gl.tensor,
    flags_ptr: gl.tensor,
    num_steps: int,
    num_blocks: int,
    num_columns: int,
    num_cut: int,
    NUM_STAGES: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    OUT_STAGES: gl.constexpr,
    BAND: gl.constexpr,
    ADDS: gl.constexpr,
    USE_PDL: gl.constexpr,
) -> None:
    if USE_PDL:
        gdc_launch_dependents()
    ring, out_ring = make_rings(x, weight, out, NUM_STAGES, NUM_PARTS, OUT_STAGES)
    work = _work(num_steps, num_blocks * num_columns - num_cut, num_cut)
    raster = (num_blocks, num_columns)
    scratch = (partials_ptr, flags_ptr)
    gl.warp_specialize(
        [
            (_multiply, (scratch, work, ring, out_ring, NUM_PARTS, ADDS, USE_PDL, 0)),
            (_multiply, (scratch, work, ring, out_ring, NUM_PARTS, ADDS, USE_PDL, 1)),
            (_load, (x, weight, work, raster, ring, BAND, USE_PDL)),
            (_store, (out, work, raster, out_ring, BAND, NUM_PARTS, ADDS, USE_PDL, 0)),
            (_store, (out, work, raster, out_ring, BAND, NUM_PARTS, ADDS, USE_PDL, 1)),
        ],
        [4, 1, 1, 1],
        [COMPUTE_REGISTERS, COPY_REGISTERS, COPY_REGISTERS, COPY_REGISTERS],
    )


# ---- which work


@gluon.jit
def _work(num_steps: int, num_dealt: gl.tensor, num_cut: int) -> gl.tuple:
    """This program's: units dealt to it and to all, and the first and last step of its range of those that are cut."""
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    own = (num_dealt - program + num_programs - 1) // num_programs
    begin = _cut(program, num_cut, num_steps)
    end = _cut(program + 1, num_cut, num_steps)
    return own, num_dealt, begin, end, num_steps


@gluon.jit
def _cut(program: gl.tensor, num_cut: int, num_steps: int) -> gl.tensor:
    """Where the range of a program begins."""
    cut = program * (num_cut * num_steps) // gl.num_programs(0)
    inside = cut % num_steps
    outside = num_steps - inside
    return gl.where(inside <= _SNAP, cut - inside, gl.where(outside <= _SNAP, cut + outside, cut))


@gluon.jit
def _num_finished(work: gl.tuple) -> gl.tensor:
    """Pieces that finish a unit: all but the head."""
    own, _, begin, end, num_steps = work
    return own + end // num_steps - begin // num_steps


@gluon.jit
def _finished_unit(work: gl.tuple, i: gl.tensor) -> gl.tensor:
    """The unit of the i-th piece that is not the head. The tail's, of the range's first unit, comes last."""
    own, num_dealt, begin, end, num_steps = work
    first = num_dealt + begin // num_steps
    has_tail = gl.where(begin % num_steps > 0, 1, 0)
    unit = gl.where(i + has_tail < _num_finished(work), first + has_tail + i - own, first)
    return gl.where(i < own, i * gl.num_programs(0) + gl.program_id(0), unit)


@gluon.jit
def _num_pieces(work: gl.tuple) -> gl.tensor:
    _, _, _, end, num_steps = work
    return _num_finished(work) + gl.where(end % num_steps > 0, 1, 0)


@gluon.jit
def _piece(work: gl.tuple, p: gl.tensor) -> gl.tuple:
    """Unit, first step of it and number of steps of the p-th piece; whether it is the head, and the tail."""
    own, num_dealt, begin, end, num_steps = work
    head = end % num_steps
    is_head = (head > 0) & (p == own)
    i = gl.where((head > 0) & (p > own), p - 1, p)
    is_tail = (is_head == 0) & (begin % num_steps > 0) & (i == _num_finished(work) - 1)
    unit = gl.where(is_head, num_dealt + end // num_steps, _finished_unit(work, i))
    start = gl.where(is_tail, begin % num_steps, 0)
    length = gl.where(is_head, head, num_steps - start)
    return unit, start, length, is_head, is_tail


@gluon.jit
def _place(unit: gl.tensor, raster: gl.tuple, BAND: gl.constexpr) -> gl.tuple:
    """Row block and column of a unit: by bands of rows, in each the blocks of a column one after another.

    So neighbours in time read the same weights, and the rows of a band stay in the L2 cache.
    """
    num_blocks, num_columns = raster
    start = unit // (num_columns * BAND) * BAND
    height = gl.minimum(num_blocks - start, BAND)
    rest = unit - start * num_columns
    return start + rest % height, rest // height


# ---- the loading warp


@gluon.jit
def _load(
    x: gl.tensor,
    weight: gl.tensor,
    work: gl.tuple,
    raster: gl.tuple,
    ring: gl.tuple,
    BAND: gl.constexpr,
    USE_PDL: gl.constexpr,
) -> None:
    """Load the operands of the program's pieces, step by step."""
    M: gl.constexpr = x.block_shape[0]
    N: gl.constexpr = weight.block_shape[0]
    K: gl.constexpr = x.block_shape[1]
    if USE_PDL:
        gdc_wait()
    n = 0  # steps so far
    for p in range(_num_pieces(work)):
        unit, start, length, _, _ = _piece(work, p)
        block, column = _place(unit, raster, BAND)
        for k in range(length):
            load_step(x, weight, block * M, column * N, (start + k) * K, n, ring)
            n += 1


# ---- a multiplying warpgroup


@gluon.jit
def _multiply(
    scratch: gl.tuple,
    work: gl.tuple,
    ring: gl.tuple,
    out_ring: gl.tuple,
    NUM_PARTS: gl.constexpr,
    ADDS: gl.constexpr,
    USE_PDL: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """The sums of a half of the units' rows: to the storing warp, those of the head to the next program."""
    M: gl.constexpr = ring[0].shape[1]
    N: gl.constexpr = ring[1].shape[1]
    partials_ptr, flags_ptr = scratch
    slot = gl.program_id(0) * 2 + HALF
    previous = slot - 2
    if USE_PDL:
        gdc_wait()
    n = 0  # steps so far
    part = 0  # parts so far
    for p in range(_num_pieces(work)):
        _, _, length, is_head, is_tail = _piece(work, p)
        if is_tail:
            _await(flags_ptr + previous)
        sums_MN = _load_partial(partials_ptr, previous, is_tail, M, N)
        if is_tail:
            _thread_barrier()
            gl.store(flags_ptr + previous, 0)
        sums_MN = add_steps(sums_MN, ring, n, length, HALF)
        n += length
        if is_head:
            _store_partial(sums_MN, partials_ptr, slot)
            _thread_barrier()
            gl.atomic_xchg(flags_ptr + slot, 1, sem="release")
        else:
            parts = split_columns(sums_MN, NUM_PARTS)
            for i in gl.static_range(NUM_PARTS):
                hand_on(parts[i], part + i, out_ring, ADDS, HALF)
            part += NUM_PARTS


@gluon.jit
def _partial_ptrs(partials_ptr: gl.tensor, slot: gl.tensor, M: gl.constexpr, N: gl.constexpr) -> gl.tensor:
    """Of sums in the order in which a warpgroup's registers have them, 8 bytes a thread: by 8 rows, 8 columns."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    m = gl.arange(0, M, gl.SliceLayout(1, SUMS))
    n = gl.arange(0, N, gl.SliceLayout(0, SUMS))
    offsets_M = m // 8 * (8 * N) + m % 8 * 8
    offsets_N = n // 8 * 64 + n % 8
    return partials_ptr + slot.to(gl.int64) * (M * N) + offsets_M[:, None] + offsets_N[None, :]


@gluon.jit
def _store_partial(sums_MN: gl.tensor, partials_ptr: gl.tensor, slot: gl.tensor) -> None:
    gl.store(_partial_ptrs(partials_ptr, slot, sums_MN.shape[0], sums_MN.shape[1]), sums_MN)


@gluon.jit
def _load_partial(
    partials_ptr: gl.tensor, slot: gl.tensor, is_there: gl.tensor, M: gl.constexpr, N: gl.constexpr
) -> gl.tensor:
    """What another SM left, or zeros."""
    return gl.load(_partial_ptrs(partials_ptr, slot, M, N), mask=is_there, other=0.0, cache_modifier=".cg")


# ---- a storing warp


@gluon.jit
def _store(
    out: gl.tensor,
    work: gl.tuple,
    raster: gl.tuple,
    out_ring: gl.tuple,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    ADDS: gl.constexpr,
    USE_PDL: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """Store a half of the units that are finished here; before, fetch what they are added to as memory becomes free."""
    OUT_STAGES: gl.constexpr = out_ring[0].shape[0] // 2
    num_units = _num_finished(work)
    if USE_PDL:
        gdc_wait()
    if ADDS:
        for i in gl.static_range(OUT_STAGES):
            if i // NUM_PARTS < num_units:
                place = _part_place(out, work, raster, i // NUM_PARTS, i % NUM_PARTS, BAND, NUM_PARTS, HALF)
                fetch_part(out, place, i, out_ring, HALF)
    part = 0  # parts so far
    for u in range(num_units):
        for i in gl.static_range(NUM_PARTS):
            store_part(out, _part_place(out, work, raster, u, i, BAND, NUM_PARTS, HALF), part, out_ring, HALF)
            if ADDS:
                later = u + (i + OUT_STAGES) // NUM_PARTS
                if later < num_units:
                    place = _part_place(out, work, raster, later, (i + OUT_STAGES) % NUM_PARTS, BAND, NUM_PARTS, HALF)
                    fetch_part(out, place, part + OUT_STAGES, out_ring, HALF)
            else:
                release_part(part, out_ring, HALF)
            part += 1
    _await_stores()


@gluon.jit
def _part_place(
    out: gl.tensor,
    work: gl.tuple,
    raster: gl.tuple,
    i: gl.tensor,
    part: gl.tensor,
    BAND: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HALF: gl.constexpr,
) -> gl.tuple:
    """Where a part of the i-th unit that is finished here lies."""
    block, column = _place(_finished_unit(work, i), raster, BAND)
    return (block * 2 + HALF) * out.block_shape[0], (column * NUM_PARTS + part) * out.block_shape[1]


# ---- in assembler


@gluon.jit
def _await(flag_ptr: gl.tensor) -> None:
    """Until the flag is up; what was written before it is then visible."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_down;
        spin:
        ld.acquire.gpu.global.b32 $0, [$1];
        setp.eq.b32 is_down, $0, 0;
        @is_down bra spin;
        }""",
        "=r,l",
        [flag_ptr],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _await_stores() -> None:
    """Until all that this warp has had the TMA store is written; `tma.store_wait` waits until it is read."""
    code: gl.constexpr = "cp.async.bulk.wait_group 0; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)

"""The kernel of `decode_gemm.py`, which says how the work is cut, and its parts.

Shapes: T rows, I inputs, O outputs as there; M rows of a launch, padded; N outputs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows", "steps_per_unit", "steps_per_cta", "num_longer_ctas"])
def decode_gemm_kernel(
    x_desc: tl.tensor_descriptor,
    weight_desc: tl.tensor_descriptor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    steps_per_unit: int,
    steps_per_cta: int,
    num_longer_ctas: int,
    x_stride: int,
    weight_stride: int,
    out_stride: int,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    PREFETCH: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """CTA i walks `steps_per_cta` steps, one more if it is among the first `num_longer_ctas`.

    Without descriptors operands are loaded by pointers. A gated weight's rows lie in a tile as GROUP gates, then their
    GROUP ups, and so on.
    """
    HEIGHT: tl.constexpr = BLOCK_N if IS_SWAPPED else BLOCK_M
    WIDTH: tl.constexpr = BLOCK_M if IS_SWAPPED else BLOCK_N
    NUM_GROUPS: tl.constexpr = BLOCK_N // (2 * GROUP)
    pid = tl.program_id(0)
    num_ctas = tl.num_programs(0)
    begin = pid * steps_per_cta + tl.minimum(pid, num_longer_ctas)
    end = begin + steps_per_cta + (pid < num_longer_ctas).to(tl.int32)
    head = end % steps_per_unit  # steps of the last unit, if the next CTA has the others
    tail = (steps_per_unit - begin % steps_per_unit) % steps_per_unit  # of the first, if the CTA before has the others
    tail_start = end - begin - tail

    if USE_PDL:
        gdc_launch_dependents()
        first = tl.where(head > 0, end - head, begin)
        unit = first // steps_per_unit
        rows = _weight_rows(unit // SPLIT_K, num_outputs, IS_GATED, BLOCK_N, GROUP)
        start = (unit % SPLIT_K * steps_per_unit + first % steps_per_unit) * BLOCK_K
        _prefetch(weight_ptr + rows * weight_stride, start, num_inputs, PREFETCH)
        gdc_wait()

    x_rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1).to(tl.int64)
    acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for i in tl.range(0, end - begin, num_stages=NUM_STAGES):
        # The head, the whole units, the tail.
        after_head = tl.where(i < tail_start, begin + tail + i - head, begin + i - tail_start)
        step = tl.where(i < head, end - head + i, after_head)
        unit = step // steps_per_unit
        k = step - unit * steps_per_unit
        tile = unit // SPLIT_K
        start = ((unit - tile * SPLIT_K) * steps_per_unit + k) * BLOCK_K
        if x_desc is not None:
            x = x_desc.load([0, start])
            if IS_GATED:
                group = tile * NUM_GROUPS if NUM_GROUPS > 1 else 0
                feature = 0 if NUM_GROUPS > 1 else tile * GROUP
                weight = tl.reshape(weight_desc.load([group, 0, feature, start]), (BLOCK_N, BLOCK_K))
            else:
                weight = weight_desc.load([tile * BLOCK_N, start])
        else:
            inputs = start + tl.arange(0, BLOCK_K)
            mask = inputs[None, :] < num_inputs
            x = tl.load(x_ptr + x_rows[:, None] * x_stride + inputs[None, :], mask=mask, other=0)
            rows = _weight_rows(tile, num_outputs, IS_GATED, BLOCK_N, GROUP)
            weight = tl.load(weight_ptr + rows[:, None] * weight_stride + inputs[None, :], mask=mask, other=0)
        if INTERPRETED:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        if IS_SWAPPED:
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")

        is_complete = k == steps_per_unit - 1
        if is_complete | (i == head - 1):
            if not is_complete:
                _store_partial(acc, partials_ptr, pid, NUM_WARPS, INTERPRETED)
                tl.atomic_xchg(counters_ptr + pid, 1, sem="release")
            elif SPLIT_K > 1:
                _store_partial(acc, partials_ptr, num_ctas + unit, NUM_WARPS, INTERPRETED)
                is_complete = tl.atomic_add(counters_ptr + num_ctas + tile, 1, sem="acq_rel") == SPLIT_K - 1
                if is_complete:  # the last to arrive adds all slices, in their order
                    tl.store(counters_ptr + num_ctas + tile, 0)
                    slot = num_ctas + tile * SPLIT_K
                    if SPLIT_K == 2:  # a + b is b + a: no need to read its own
                        acc += _load_partial(partials_ptr, slot + 1 - unit % 2, True, HEIGHT, WIDTH, NUM_WARPS)
                    else:
                        acc = _load_partial(partials_ptr, slot, True, HEIGHT, WIDTH, NUM_WARPS)
                        for other in tl.static_range(1, SPLIT_K):
                            acc += _load_partial(partials_ptr, slot + other, True, HEIGHT, WIDTH, NUM_WARPS)
            if is_complete:
                y = tl.trans(acc) if IS_SWAPPED else acc
                _store_tile(y, bias_ptr, out_ptr, tile, num_rows, num_outputs, out_stride, IS_GATED, ADDS, GROUP)
            is_continued = (i + 1 == tail_start) & (tail > 0)
            if is_continued:
                _await(counters_ptr + pid - 1, INTERPRETED)
            acc = _load_partial(partials_ptr, pid - 1, is_continued, HEIGHT, WIDTH, NUM_WARPS)
            if is_continued:
                _barrier(INTERPRETED)
                tl.store(counters_ptr + pid - 1, 0)


@triton.jit
def _weight_rows(
    tile: tl.tensor, num_outputs: int, IS_GATED: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """The weight's rows that are a tile's outputs, in their order in the tile; none is past the end."""
    rows = tl.arange(0, BLOCK_N)
    if IS_GATED:
        features = tile * (BLOCK_N // 2) + rows // (2 * GROUP) * GROUP + rows % GROUP
        half = num_outputs // 2
        return (tl.minimum(features, half - 1) + rows // GROUP % 2 * half).to(tl.int64)
    return tl.minimum(tile * BLOCK_N + rows, num_outputs - 1).to(tl.int64)


@triton.jit
def _store_tile(
    y: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tile: tl.tensor,
    num_rows: int,
    num_outputs: int,
    out_stride: int,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """The epilogue of a tile `y_MN`: bias, gate, addition to what is there, one rounding."""
    HALF: tl.constexpr = y.shape[1] // 2
    columns = tl.arange(0, HALF)
    if IS_GATED:
        num_features = num_outputs // 2
        columns += tile * HALF
        gate, up = _split_groups(y, GROUP)
        gate = _add_bias(gate, bias_ptr, columns, columns < num_features)
        up = _add_bias(up, bias_ptr, columns + num_features, columns < num_features)
        _store_columns(gate * tl.sigmoid(gate) * up, out_ptr, columns, num_rows, num_features, out_stride, ADDS)
    else:
        # In halves: on its way to rows of 16 bytes a thread a tile passes through shared memory, which is scarce.
        columns += tile * (2 * HALF)
        low, high = _split_groups(y, HALF)
        low = _add_bias(low, bias_ptr, columns, columns < num_outputs)
        high = _add_bias(high, bias_ptr, columns + HALF, columns + HALF < num_outputs)
        _store_columns(low, out_ptr, columns, num_rows, num_outputs, out_stride, ADDS)
        _store_columns(high, out_ptr, columns + HALF, num_rows, num_outputs, out_stride, ADDS)


@triton.jit
def _split_groups(y: tl.tensor, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The even and the odd ones of the groups of columns."""
    M: tl.constexpr = y.shape[0]
    N: tl.constexpr = y.shape[1]
    pairs = tl.permute(tl.reshape(y, (M, N // (2 * GROUP), 2, GROUP)), (0, 1, 3, 2))
    even, odd = tl.split(tl.reshape(pairs, (M, N // 2, 2)))
    return even, odd


@triton.jit
def _add_bias(y: tl.tensor, bias_ptr: tl.tensor, columns: tl.tensor, mask: tl.tensor) -> tl.tensor:
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=mask, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store_columns(
    y: tl.tensor,
    out_ptr: tl.tensor,
    columns: tl.tensor,
    num_rows: int,
    num_columns: int,
    out_stride: int,
    ADDS: tl.constexpr,
) -> None:
    rows = tl.arange(0, y.shape[0])
    ptrs = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    if ADDS:
        # Past the L1 cache, which a kernel that starts early (PDL) may share with one that runs.
        y += tl.load(ptrs, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_partial(
    acc: tl.tensor, partials_ptr: tl.tensor, slot: tl.tensor, NUM_WARPS: tl.constexpr, INTERPRETED: tl.constexpr
) -> None:
    """Accumulators to a slot, in the order in which Hopper's tensor cores spread them over the threads' registers.

    16 bytes a thread lie next to each other, so nothing passes through shared memory. On other GPUs the order is as
    good as any and costs a conversion.
    """
    HEIGHT: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    WARPS_M: tl.constexpr = min(HEIGHT // 16, NUM_WARPS)
    WARPS_N: tl.constexpr = NUM_WARPS // WARPS_M
    shape: tl.constexpr = (HEIGHT // (16 * WARPS_M), WARPS_M, 2, 8, WARPS_N, WIDTH // (16 * WARPS_N), 2, 4, 2)
    fragments = tl.reshape(tl.permute(tl.reshape(acc, shape), (0, 5, 2, 4, 1, 3, 7, 6, 8)), (HEIGHT * WIDTH,))
    tl.store(partials_ptr + slot.to(tl.int64) * (HEIGHT * WIDTH) + tl.arange(0, HEIGHT * WIDTH), fragments)
    _barrier(INTERPRETED)  # before one thread says for all of them that they are there


@triton.jit
def _load_partial(
    partials_ptr: tl.tensor,
    slot: tl.tensor,
    mask: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_WARPS: tl.constexpr,
) -> tl.tensor:
    """What `_store_partial` stored; zeros where `mask` is not set. Past the L1 cache: another SM wrote it."""
    WARPS_M: tl.constexpr = min(HEIGHT // 16, NUM_WARPS)
    WARPS_N: tl.constexpr = NUM_WARPS // WARPS_M
    shape: tl.constexpr = (HEIGHT // (16 * WARPS_M), WIDTH // (16 * WARPS_N), 2, WARPS_N, WARPS_M, 8, 4, 2, 2)
    ptrs = partials_ptr + slot.to(tl.int64) * (HEIGHT * WIDTH) + tl.arange(0, HEIGHT * WIDTH)
    fragments = tl.load(ptrs, mask=mask, other=0, cache_modifier=".cg")
    return tl.reshape(tl.permute(tl.reshape(fragments, shape), (0, 4, 2, 5, 3, 1, 7, 6, 8)), (HEIGHT, WIDTH))


@triton.jit
def _prefetch(row_ptrs: tl.tensor, start: tl.tensor, num_inputs: int, LENGTH: tl.constexpr) -> None:
    """Draws LENGTH inputs of each row, from `start`, into the L2 cache, and waits for nothing."""
    if LENGTH > 0:
        inputs = tl.minimum(start + tl.arange(0, LENGTH // 64) * 64, num_inputs - 1)  # lines of 128 bytes
        ptrs = row_ptrs[:, None] + inputs[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _barrier(INTERPRETED: tl.constexpr) -> None:
    """All threads of the CTA meet. `tl.debug_barrier` would do, but a loop with one inside is not pipelined."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _await(flag_ptr: tl.tensor, INTERPRETED: tl.constexpr) -> None:
    """Spins until the flag is set. In assembler, since a loop with another inside is not pipelined.

    The interpreter runs one CTA after another, so there the flag is set.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred is_unset;
            spin:
            ld.acquire.gpu.global.b32 $0, [$1];
            setp.eq.b32 is_unset, $0, 0;
            @is_unset bra spin;
            }""",
            "=r,l",
            [flag_ptr],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

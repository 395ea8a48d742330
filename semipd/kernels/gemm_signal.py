"""A GEMM that says while it runs which rows of its output are there: `residual + x @ weight.T + bias`.

The rows are cut in *groups*, each a contiguous range that a collective can take as it is. Persistent programs walk the
tiles group by group, and within a group by bands of rows whose columns come one after another, so that the operands of
neighbours in time lie in the L2 cache. When a tile's stores are visible to the whole GPU, the counter of its group goes
up; a stream that waits until it has reached `signal_targets` may read the group's rows.

On Hopper `gemm_signal_hopper` does the work. The kernel here is for other GPUs, for rows that are not aligned to 16
bytes and for the interpreter: correct everywhere, fast nowhere.

An output is summed over its inputs in one order by one program, so results depend neither on the groups nor on the
number of SMs.

Shapes: T rows, I inputs, O outputs (rows of the weight), G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.gemm_signal_hopper import gemm_signal_hopper
from semipd.kernels.hopper_gemm import is_aligned
from semipd.kernels.triton_util import is_hopper, is_interpreted, launch

MAX_GROUPS = 5
"""Of a launch."""

SIGNALS_PER_TILE = 2
"""What a tile adds to its counter: the Hopper kernel stores, and signals, a tile by halves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSignalConfig:
    """How a launch is cut.

    Attributes:
        block_m: rows of a tile; groups are multiples of it.
        block_n: outputs of a tile.
        block_k: inputs of a step.
        num_stages: steps whose operands are in shared memory or on the way there.
        num_parts: ranges of columns in which a tile is stored, through as little shared memory.
        out_stages: such ranges that are in shared memory at a time.
        band: row blocks that a group's tiles are walked by.
        uses_hopper: whether the kernel of Hopper runs.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    num_parts: int = 4
    out_stages: int = 2
    band: int = 16
    uses_hopper: bool = True


def config_for(x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> GemmSignalConfig:
    """How to cut a launch on these tensors, or others that are aligned alike."""
    if is_hopper(x_TI.device) and all(map(is_aligned, (x_TI, weight_OI, out_TO))):
        return GemmSignalConfig()
    block_k = 32 if x_TI.dtype == torch.float32 else 64
    return GemmSignalConfig(block_n=128, block_k=block_k, num_stages=3, band=8, uses_hopper=False)


def signal_targets(group_ends: Sequence[int], num_outputs: int, config: GemmSignalConfig) -> tuple[int, ...]:
    """What each group's counter rises by in a launch."""
    num_columns = _cdiv(num_outputs, config.block_n)
    blocks = [_cdiv(end, config.block_m) for end in (0, *group_ends)]
    return tuple((end - start) * num_columns * SIGNALS_PER_TILE for start, end in pairwise(blocks))


def gemm_signal(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    counters_G: Tensor,
    *,
    group_ends: Sequence[int],
    num_sms: int,
    config: GemmSignalConfig,
    num_reserved: int = 0,
    residual_TO: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> None:
    """Writes `residual + x @ weight.T + bias` to `out_TO`, which may be the residual itself.

    Sums are in float32 and rounded once. Rows of all matrices may be strided.

    Args:
        counters_G: int32; `counters_G[g]` rises by `signal_targets` as group g's rows are written.
        group_ends: behind which row each group ends: multiples of `config.block_m`, ascending, the last T.
        num_sms: programs.
        num_reserved: those of them that end with the first group and leave their SMs to whoever waits for it.
    """
    num_rows, num_inputs = x_TI.shape
    assert weight_OI.shape[1] == num_inputs and out_TO.shape == (num_rows, len(weight_OI))
    assert x_TI.stride(1) == weight_OI.stride(1) == out_TO.stride(1) == 1
    assert residual_TO is None or (residual_TO.shape == out_TO.shape and residual_TO.stride(1) == 1)
    assert x_TI.dtype == weight_OI.dtype == out_TO.dtype and counters_G.dtype == torch.int32
    blocks = _row_blocks(group_ends, num_rows, config)
    assert len(blocks) <= len(counters_G)
    inner_ends = (blocks + [blocks[-1]] * MAX_GROUPS)[: MAX_GROUPS - 1]
    assert 0 <= num_reserved < num_sms
    grid = (num_sms if num_reserved else min(num_sms, blocks[-1] * _cdiv(len(weight_OI), config.block_n)),)
    if config.uses_hopper:
        gemm_signal_hopper(
            x_TI,
            weight_OI,
            out_TO,
            residual_TO,
            bias_O,
            counters_G,
            inner_ends,
            num_reserved,
            grid=grid,
            block_m=config.block_m,
            block_n=config.block_n,
            block_k=config.block_k,
            num_stages=config.num_stages,
            num_parts=config.num_parts,
            out_stages=config.out_stages,
            band=config.band,
        )
        return
    launch(_gemm_signal_kernel, grid)(
        x_TI,
        weight_OI,
        out_TO,
        residual_TO,
        bias_O,
        counters_G,
        num_rows,
        len(weight_OI),
        num_inputs,
        *inner_ends,
        num_reserved,
        x_TI.stride(0),
        weight_OI.stride(0),
        out_TO.stride(0),
        0 if residual_TO is None else residual_TO.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BAND=config.band,
        SIGNALS=SIGNALS_PER_TILE,
        INTERPRETED=is_interpreted(),
        num_warps=8,
        num_stages=config.num_stages,
    )


def gemm_signal_reference(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    counters_G: Tensor,
    *,
    group_ends: Sequence[int],
    config: GemmSignalConfig,
    residual_TO: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> None:
    """What `gemm_signal` does, in plain torch: in float32, or in float64 if the inputs are."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    y_TO = torch.nn.functional.linear(x_TI.to(dtype), weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
    out_TO.copy_(y_TO if residual_TO is None else residual_TO.to(dtype) + y_TO)
    _row_blocks(group_ends, len(x_TI), config)
    targets = signal_targets(group_ends, len(weight_OI), config)
    counters_G[: len(targets)] += torch.tensor(targets, dtype=counters_G.dtype, device=counters_G.device)


@triton.jit(do_not_specialize=["num_rows", "num_outputs", "end0", "end1", "end2", "end3", "num_reserved"])
def _gemm_signal_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    end0: int,
    end1: int,
    end2: int,
    end3: int,
    num_reserved: int,
    x_stride: int,
    weight_stride: int,
    out_stride: int,
    residual_stride: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SIGNALS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_columns = tl.cdiv(num_outputs, BLOCK_N)
    ends = (end0, end1, end2, end3, num_blocks)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_staying = num_programs - num_reserved
    first_end = end0 * num_columns
    num_first = (first_end - program + num_programs - 1) // num_programs
    # The rest is dealt from the program on that the last deal of the first group left out.
    rest = first_end + (program - tl.minimum(first_end % num_programs, num_staying) + num_staying) % num_staying
    num_rest = (num_blocks * num_columns - rest + num_staying - 1) // num_staying
    for turn in range(num_first + tl.where(program < num_staying, num_rest, 0)):
        tile = tl.where(turn < num_first, program + turn * num_programs, rest + (turn - num_first) * num_staying)
        block, column, group = _place(tile, num_columns, ends, BAND)
        rows_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
        outputs_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
        x_ptrs = x_ptr + tl.minimum(rows_M, num_rows - 1).to(tl.int64)[:, None] * x_stride
        weight_ptrs = weight_ptr + tl.minimum(outputs_N, num_outputs - 1).to(tl.int64)[:, None] * weight_stride
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            inputs_K = start + tl.arange(0, BLOCK_K)[None, :]
            x_MK = tl.load(x_ptrs + inputs_K, mask=inputs_K < num_inputs, other=0)
            weight_NK = tl.load(weight_ptrs + inputs_K, mask=inputs_K < num_inputs, other=0)
            if INTERPRETED:
                x_MK = x_MK.to(tl.float32)
                weight_NK = weight_NK.to(tl.float32)
            y_MN = tl.dot(x_MK, weight_NK.T, y_MN, input_precision="ieee")
        if bias_ptr is not None:
            y_MN += tl.load(bias_ptr + outputs_N, mask=outputs_N < num_outputs, other=0).to(tl.float32)[None, :]
        mask_MN = (rows_M < num_rows)[:, None] & (outputs_N < num_outputs)[None, :]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + rows_M.to(tl.int64)[:, None] * residual_stride + outputs_N[None, :]
            y_MN += tl.load(residual_ptrs, mask=mask_MN, other=0).to(tl.float32)
        out_ptrs = out_ptr + rows_M.to(tl.int64)[:, None] * out_stride + outputs_N[None, :]
        tl.store(out_ptrs, y_MN.to(out_ptr.dtype.element_ty), mask=mask_MN)
        tl.debug_barrier()  # before one thread says for all of them that it is there
        tl.atomic_add(counters_ptr + group, SIGNALS, sem="release")


@triton.jit
def _place(
    tile: tl.tensor, num_columns: int, ends: tl.tuple, BAND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Row block, column block and group of a tile. Unused ends are the last row block's."""
    block = tile // num_columns
    group = 0
    start = 0
    end = ends[0]
    for i in tl.static_range(1, len(ends)):
        group = tl.where(block >= ends[i - 1], i, group)
        start = tl.where(block >= ends[i - 1], ends[i - 1], start)
        end = tl.where(block >= ends[i - 1], ends[i], end)
    start += (block - start) // BAND * BAND
    height = tl.minimum(end - start, BAND)
    tile -= start * num_columns
    return start + tile % height, tile // height, group


def _row_blocks(group_ends: Sequence[int], num_rows: int, config: GemmSignalConfig) -> list[int]:
    """Behind which row block each group ends."""
    assert 1 <= len(group_ends) <= MAX_GROUPS and group_ends[-1] == num_rows
    assert all(start < end for start, end in pairwise((0, *group_ends)))
    assert all(end % config.block_m == 0 for end in group_ends[:-1])
    return [_cdiv(end, config.block_m) for end in group_ends]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)

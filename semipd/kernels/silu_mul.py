"""The gate of a feed-forward: `silu(gate) * up` in one pass over both halves of a fused projection.

Shapes: T rows of a step, F feed-forward dim; 2F: the gate's outputs, then the up projection's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import launch, wait_for_previous

# Columns of one program of 4 warps: two loads of 16 bytes in flight a thread for each of gate and up in bfloat16.
_MAX_BLOCK = 2048
_VALUES_PER_WARP = 512


def silu_mul(gate_up_T2F: Tensor, out_TF: Tensor) -> None:
    """Writes `silu(gate) * up` to `out_TF`, computed in float32 and rounded once. Rows may be strided."""
    num_rows, dim = out_TF.shape
    assert gate_up_T2F.shape == (num_rows, 2 * dim) and gate_up_T2F.stride(1) == out_TF.stride(1) == 1
    block = min(triton.next_power_of_2(dim), _MAX_BLOCK)
    launch(_silu_mul_kernel, (num_rows, triton.cdiv(dim, block)), pdl_on=out_TF.device)(
        gate_up_T2F,
        out_TF,
        gate_up_T2F.stride(0),
        out_TF.stride(0),
        DIM=dim,
        BLOCK=block,
        num_warps=max(1, block // _VALUES_PER_WARP),
    )


def silu_mul_reference(gate_up_T2F: Tensor, out_TF: Tensor) -> None:
    """`silu_mul` in plain torch."""
    wide_T2F = gate_up_T2F.to(torch.promote_types(gate_up_T2F.dtype, torch.float32))
    gate_TF, up_TF = wide_T2F.chunk(2, -1)
    out_TF.copy_(F.silu(gate_TF) * up_TF)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: int,
    out_stride: int,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < DIM
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    wait_for_previous(USE_PDL)
    # Nobody reads them again: 470 MB at T = 8192 and F = 14336 should not drive the next weights out of the L2 cache.
    gate = tl.load(gate_ptrs, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_ptrs + DIM, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, gate * tl.sigmoid(gate) * up, mask=mask)

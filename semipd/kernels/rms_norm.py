"""RMS norm of rows, alone or behind the addition to the residual stream: each row is read once and written once.

One program owns a row, and its shape follows from D alone, so a row's result does not depend on its batch.

Shapes: T rows of a step, D model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import launch, wait_for_previous

# Longest row that a program keeps in registers: 16 values a thread of 16 warps. Longer ones are read a second time,
# from the L1 or L2 cache.
_MAX_BLOCK = 8192
_VALUES_PER_WARP = 512


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    residual_TD: Tensor | None = None,
) -> None:
    """Writes `x / sqrt(mean(x * x) + eps) * weight_D` over the last dim to `out_TD`, computed in float32.

    With `residual_TD`, `x_TD` is first added to it in place, and the sum is normed as rounded to the residual's dtype.
    Rows may be strided; `out_TD` may be `x_TD`.
    """
    num_rows, dim = x_TD.shape
    tensors = (x_TD, out_TD) if residual_TD is None else (x_TD, out_TD, residual_TD)
    assert all(tensor.shape == x_TD.shape and tensor.stride(1) == 1 for tensor in tensors)
    assert weight_D.shape == (dim,) and weight_D.is_contiguous()
    # At least a value per thread: replicas of a value in other threads would read a residual that is already written.
    block = min(max(triton.next_power_of_2(dim), 32), _MAX_BLOCK)
    launch(_rms_norm_kernel, (num_rows,), pdl_on=x_TD.device)(
        x_TD,
        weight_D,
        out_TD,
        residual_TD,
        x_TD.stride(0),
        out_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        DIM=dim,
        BLOCK=block,
        num_warps=max(1, block // _VALUES_PER_WARP),
    )


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor, residual_TD: Tensor | None = None
) -> None:
    """`rms_norm` in plain torch."""
    if residual_TD is not None:
        x_TD = residual_TD.add_(x_TD)
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    out_TD.copy_(wide_TD * scale_T1 * weight_D)


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    x_stride: int,
    out_stride: int,
    residual_stride: int,
    eps: float,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    columns = tl.arange(0, BLOCK)
    if DIM <= BLOCK:
        mask = columns < DIM
        weight = tl.load(weight_ptr + columns, mask=mask, other=0).to(tl.float32)  # a constant: before the wait
        wait_for_previous(USE_PDL)
        x = _load_sum(x_ptr, residual_ptr, columns, mask)
        if residual_ptr is not None:
            tl.store(residual_ptr + columns, x, mask=mask)
        scale = tl.rsqrt(tl.sum(x * x) / DIM + eps)
        tl.store(out_ptr + columns, x * scale * weight, mask=mask)
    else:
        wait_for_previous(USE_PDL)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, DIM, BLOCK):
            x = _load_sum(x_ptr, residual_ptr, start + columns, start + columns < DIM)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares) / DIM + eps)
        for start in range(0, DIM, BLOCK):
            mask = start + columns < DIM
            x = _load_sum(x_ptr, residual_ptr, start + columns, mask)
            weight = tl.load(weight_ptr + start + columns, mask=mask, other=0).to(tl.float32)
            if residual_ptr is not None:
                tl.store(residual_ptr + start + columns, x, mask=mask)
            tl.store(out_ptr + start + columns, x * scale * weight, mask=mask)


@triton.jit
def _load_sum(x_ptr: tl.tensor, residual_ptr: tl.tensor, columns: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Columns of a row of x, or of residual + x as the residual's dtype rounds it; in float32."""
    x = tl.load(x_ptr + columns, mask=mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + columns, mask=mask, other=0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    return x

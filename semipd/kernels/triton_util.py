"""What all Triton kernels share."""

from __future__ import annotations

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _probe() -> None:
    pass


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong: operands of dots are upcast."""
    return isinstance(_probe, InterpretedFunction)


def has_tma(device: torch.device | int | None = None) -> bool:
    """Whether the GPU has the tensor memory accelerator (compute capability 9.0 and later); False without a GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)

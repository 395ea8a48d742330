"""What all Triton kernels share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime import _async_compile
from triton.runtime.interpreter import InterpretedFunction

_MAX_COMPILERS = 16  # threads


@triton.jit
def _probe() -> None:
    pass


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong: operands of dots are upcast."""
    return isinstance(_probe, InterpretedFunction)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """`kernel[grid]`; within `compiling_in_parallel` a call compiles the kernel and does not run it."""
    return partial(kernel.run, grid=grid, warmup=_async_compile.active_mode.get() is not None)


@contextmanager
def compiling_in_parallel() -> Iterator[None]:
    """Kernels that are launched in here by this thread are compiled, side by side, and loaded by their first launch."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_COMPILERS)) as pool, triton.AsyncCompileMode(pool):
        yield


def has_tma(device: torch.device | int | None = None) -> bool:
    """Whether the GPU has the tensor memory accelerator (compute capability 9.0 and later); False without a GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)

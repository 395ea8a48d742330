"""What all Triton kernels share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import _async_compile
from triton.runtime.cache import triton_key
from triton.runtime.interpreter import InterpretedFunction

_MAX_COMPILERS = 16  # threads


@triton.jit
def _probe() -> None:
    pass


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong: operands of dots are upcast."""
    return isinstance(_probe, InterpretedFunction)


def launch(kernel: Any, grid: tuple[int, ...], *, pdl_on: torch.device | None = None) -> Callable[..., object]:
    """`kernel[grid]`; within `compiling_in_parallel` a call compiles the kernel and does not run it.

    A kernel that takes USE_PDL, and waits for the ones before in every warp that reads or writes what they do (mostly
    by `wait_for_previous`), may start while the one before it ends (PDL, programmatic dependent launch), where the
    device `pdl_on` can do that: 0.9 us less a launch on an H100.
    """
    options: dict[str, Any] = {} if pdl_on is None else {"USE_PDL": has_tma(pdl_on), "launch_pdl": has_tma(pdl_on)}
    return partial(kernel.run, grid=grid, warmup=is_compiling_only(), **options)


def is_compiling_only() -> bool:
    """Whether launches of this thread do not run now: see `compiling_in_parallel`."""
    return _async_compile.active_mode.get() is not None


@triton.jit
def wait_for_previous(USE_PDL: tl.constexpr) -> None:
    """Behind it everything that was launched before is done; the kernel launched next may start, and waits here."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()


@contextmanager
def starting_compiler() -> Iterator[None]:
    """Triton does in the meantime what it does once in a process, before it compiles.

    It hashes itself, 0.9 s from a cold disk and 0.5 from memory, and has gcc build its bridge to the driver, 0.6 s with
    an empty cache. Both leave the interpreter to others.
    """
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(triton_key), pool.submit(lambda: triton.runtime.driver.active.utils)]
        yield
        for each in started:
            each.result()


class _Compilers(ThreadPoolExecutor):
    """Threads that compile a kernel each, and what it is launched by.

    That is a module in C up to Triton 3.6, for which gcc takes 0.2 s. Its first launch would have it built, so a cold
    start waited for one after the other, 4.8 of 13.5 s on an H100's host; now the first launch finds it in the cache.
    """

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(_compile_with_launcher, compile_kernel)


def _compile_with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


@contextmanager
def compiling_in_parallel() -> Iterator[None]:
    """Kernels that are launched in here by this thread are compiled, side by side, and loaded by their first launch."""
    with _Compilers(min(os.cpu_count() or 1, _MAX_COMPILERS)) as pool:
        try:
            with triton.AsyncCompileMode(pool):
                yield
        finally:
            _async_compile.active_mode.set(None)  # Triton leaves it if a kernel does not compile


@cache
def has_tma(device: torch.device | int | None = None) -> bool:
    """Whether the GPU has the tensor memory accelerator, and PDL (capability 9.0 and later); False without a GPU."""
    is_cpu = isinstance(device, torch.device) and device.type == "cpu"
    return not is_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def is_hopper(device: torch.device | int | None = None) -> bool:
    """Whether the GPU has the warpgroup instructions, which no later one has; False without a GPU."""
    return has_tma(device) and torch.cuda.get_device_capability(device)[0] == 9


@cache
def num_device_sms(device: torch.device | int | None = None) -> int:
    """SMs of the whole GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

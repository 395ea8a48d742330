"""What `warpgroups` is for GEMMs on Hopper: stages of any shape, stores by the TMA, sums that go on."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from semipd.kernels import hopper_gemm
from tests.kernels import warpgroups


class Shared(warpgroups.Shared):
    """Shared memory whose stages are boxes of any shape."""

    def index(self, index: Any) -> Shared:
        return Shared(self.values[int(index)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.values.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
        return Shared(self.values.view(*shape))


class Descriptor:
    """What the TMA reads or writes a matrix by."""

    layout = None

    def __init__(self, source: TensorDescriptor) -> None:
        self.matrix = source.base.as_strided(source.shape, source.strides, source.base.storage_offset())
        self.dtype = self.matrix.dtype
        self.block_shape = source.block_shape

    def box(self, coordinates: Sequence[Any]) -> Tensor:
        """What of a box lies in the matrix."""
        row, column = (int(value) for value in coordinates)
        box: Tensor = self.matrix[row : row + self.block_shape[0], column : column + self.block_shape[1]]
        return box


class Tma:
    """Copies that end late; each warp waits for its own stores."""

    def __init__(self) -> None:
        self._own = threading.local()

    def async_copy_global_to_shared(self, source: Descriptor, coordinates: Any, barrier: Any, box: Shared) -> None:
        values = torch.zeros(source.block_shape, dtype=source.dtype)
        inside = source.box(coordinates)
        values[: inside.shape[0], : inside.shape[1]] = inside
        box.values.fill_(math.nan)

        def complete() -> None:
            box.values.copy_(values)
            barrier.arrive(0, -values.nbytes)

        self._late(complete)

    def async_copy_shared_to_global(self, target: Descriptor, coordinates: Any, box: Shared) -> None:
        inside = target.box(coordinates)
        self._stores().append(self._late(lambda: inside.copy_(box.values[: inside.shape[0], : inside.shape[1]])))

    def store_wait(self, pending: int = 0) -> None:
        assert pending == 0
        for store in self._stores():
            store.join()
        self._stores().clear()

    def _stores(self) -> list[threading.Thread]:
        stores: list[threading.Thread] = self._own.__dict__.setdefault("stores", [])
        return stores

    def _late(self, action: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            time.sleep(random.random() * 2e-4)
            action()

        thread = threading.Thread(target=run)
        thread.start()
        return thread


def launch_gemm(
    module: ModuleType, tma: Tma, *others: ModuleType, replaced: Mapping[str, object]
) -> Callable[..., Callable[..., None]]:
    """A `launch` for the kernel of `module`, which runs one program after another, a thread for each kind of warps.

    Args:
        tma: what it copies by.
        others: modules whose kernels' functions it uses, beside `hopper_gemm`.
        replaced: names of `module` and what stands for them, such as functions in assembler.
    """

    def launch(kernel: Any, grid: tuple[int], **options: object) -> Callable[..., None]:
        def run(*args: object, num_warps: int, **constants: object) -> None:
            uses_pdl = {"USE_PDL": True} if options else {}
            with pytest.MonkeyPatch.context() as patch:
                modules = (module, hopper_gemm, *others)
                for each in modules:
                    warpgroups.replace_names(each, patch)
                    patch.setattr(each, "tma", tma, raising=False)
                patch.setattr(hopper_gemm, "split_columns", lambda sums, num_parts: sums.chunk(num_parts, 1))
                patch.setattr(module, "split_columns", hopper_gemm.split_columns)
                for name, value in replaced.items():
                    patch.setattr(module, name, value)
                for program in range(grid[0]):
                    language = {**vars(warpgroups.language(program, grid[0])), **_LANGUAGE}
                    for each in modules:
                        patch.setattr(each, "gl", SimpleNamespace(**language))
                    kernel.fn(*map(_argument, args), **constants, **uses_pdl)

        return run

    return launch


def _argument(value: object) -> object:
    if isinstance(value, Tensor):
        return warpgroups.Pointer(value)
    return Descriptor(value) if isinstance(value, TensorDescriptor) else value


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> object:
    return warpgroups.Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, math.nan, dtype=dtype))


def _load(pointer: warpgroups.Pointer, mask: Tensor, other: float) -> Tensor:
    return pointer.memory[pointer.offset.clamp(max=len(pointer.memory) - 1)]


def _put(pointer: warpgroups.Pointer, value: int, sem: str = "relaxed") -> None:
    """Write one element."""
    pointer.memory[pointer.offset] = value


_LANGUAGE = {
    "allocate_shared_memory": _allocate,
    "minimum": min,
    "where": lambda condition, a, b: a if condition else b,
    "load": _load,
    "store": _put,
    "atomic_xchg": _put,
}

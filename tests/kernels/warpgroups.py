"""A Hopper kernel's warpgroups as threads over torch tensors: what Triton's interpreter cannot run.

A launch replaces the names that a Gluon module has imported, and its kernels by the Python functions that they were
made of. Loads of the TMA and products of the tensor cores take effect late, at a random time: a stage that is read
before its barrier says so holds NaN, one that is overwritten too early spoils a product, and a barrier for which too
few arrive fails by a time limit. Layouts mean nothing here, and neither order nor visibility of plain memory accesses
is looked at.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

_LATE = 5e-4  # seconds that a copy or product takes at most
_TIME_LIMIT = 20.0  # seconds of a wait


class Pointer:
    """A tensor's first element, or others behind it."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + other)

    @property
    def memory(self) -> Tensor:
        """All that lies behind the first element."""
        first = self.tensor.storage_offset()
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - first
        return self.tensor.as_strided((size,), (1,), first)


class Descriptor:
    """What the TMA reads a matrix by, in boxes of 64 x 64."""

    layout = None

    def __init__(self, source: TensorDescriptor) -> None:
        assert source.block_shape == [64, 64]
        self.matrix = source.base.as_strided(source.shape, source.strides, source.base.storage_offset())
        self.dtype = self.matrix.dtype


class Shared:
    """Shared memory: `[stages, rows, columns]`, a stage, or a box."""

    layout = None

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.dtype = list(values.shape), values.dtype

    def index(self, index: Any) -> Shared:
        return Shared(self.values[int(index)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.values.permute(*order))

    def load(self, layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared | _Boxes:
        return _Boxes([Shared(box) for stage in self.values for c in stage.split(64, 1) for box in c.split(64)])


class _Boxes:
    """The boxes of all stages: rows first, then columns."""

    def __init__(self, boxes: Sequence[Shared]) -> None:
        self._boxes = boxes

    def index(self, index: Any) -> Shared:
        return self._boxes[int(index)]


class Barriers:
    """Barriers of stages, as `index` gives them."""

    def __init__(self, count: int) -> None:
        self._barriers = [_Barrier() for _ in range(count)]

    def index(self, index: Any) -> _Barrier:
        return self._barriers[int(index)]


class _Barrier:
    """A phase completes when all have arrived and all bytes that were announced have come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase = self._count = self._pending = self._num_bytes = 0

    def init(self, count: int) -> None:
        self._count = self._pending = count

    def arrive(self, count: int = 1, num_bytes: int = 0) -> None:
        with self._changed:
            self._pending -= count
            self._num_bytes += num_bytes
            assert self._pending >= 0, "more arrivals than the barrier counts"
            if self._pending == self._num_bytes == 0:
                self._phase, self._pending = self._phase ^ 1, self._count
                self._changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._phase != int(parity), _TIME_LIMIT), "nobody arrives"


def _copy(source: Descriptor, coordinates: Sequence[Any], barrier: _Barrier, box: Shared) -> None:
    row, column = (int(value) for value in coordinates)
    rows = source.matrix[row : row + 64, column : column + 64]
    values = torch.zeros(64, 64, dtype=source.dtype)  # what lies outside the matrix
    values[: len(rows)] = rows
    box.values.fill_(math.nan)

    def complete() -> None:
        time.sleep(random.random() * _LATE)
        box.values.copy_(values)
        barrier.arrive(0, -values.nbytes)

    threading.Thread(target=complete).start()


def _product(a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool) -> Callable[[], Tensor]:
    assert is_async
    acc = acc.clone()

    def complete() -> Tensor:
        time.sleep(random.random() * _LATE)
        product = (a.values if isinstance(a, Shared) else a).float() @ b.values.float()
        return product + acc if use_acc else product

    return complete


def _load(pointer: Pointer, mask: Any, other: Any) -> Tensor:
    """Of one element."""
    return pointer.memory[pointer.offset] if mask else torch.tensor(other, dtype=pointer.memory.dtype)


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    is_written = mask.expand(values.shape)
    pointer.memory[pointer.offset[is_written]] = values[is_written]


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared | Barriers:
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, math.nan, dtype=dtype))


def _warp_specialize(partitions: Sequence[tuple[Callable[..., None], Any]], warps: object, registers: object) -> None:
    problems: list[BaseException] = []

    def run(function: Callable[..., None], arguments: Sequence[object]) -> None:
        try:
            function(*arguments)
        except BaseException as problem:  # of any kind: raised below, in the test's own thread
            problems.append(problem)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def _no_layout(*_: object) -> None:
    return None


def language(program: int, num_programs: int) -> SimpleNamespace:
    """What stands for `gluon.language` in one program."""
    names = ("SliceLayout", "BlockedLayout", "SwizzledSharedLayout", "DotOperandLayout", "NVMMADistributedLayout")
    return SimpleNamespace(
        **dict.fromkeys(names, _no_layout),
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: program,
        num_programs=lambda axis: num_programs,
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
        static_range=range,
        load=_load,
        store=_store,
        cdiv=lambda a, b: (a + b - 1) // b,
        arange=lambda start, end, layout: torch.arange(start, end),
        where=lambda condition, a, b: torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda values, layout: values,
        max=lambda values, axis: values.amax(axis),
        sum=lambda values, axis: values.sum(axis),
        zeros_like=torch.zeros_like,
        maximum=torch.maximum,
        exp2=torch.exp2,
    )


def launch_warpgroups(module: ModuleType) -> Callable[..., Callable[..., None]]:
    """A `launch` for kernels of `module`, which runs one program after another."""

    def launch(kernel: Any, grid: tuple[int]) -> Callable[..., None]:
        def run(*args: object, num_warps: int, **constants: object) -> None:
            with pytest.MonkeyPatch.context() as patch:
                replace_names(module, patch)
                for program in range(grid[0]):
                    patch.setattr(module, "gl", language(program, grid[0]))
                    kernel.fn(*map(_argument, args), **constants)

        return run

    return launch


def _argument(value: Any) -> object:
    if isinstance(value, Tensor):
        return Pointer(value)
    return Descriptor(value) if isinstance(value, TensorDescriptor) else value


def replace_names(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    for name, value in vars(module).copy().items():
        if isinstance(value, JITFunction):
            patch.setattr(module, name, value.fn)
        elif isinstance(value, constexpr):
            patch.setattr(module, name, value.value)
    barriers = SimpleNamespace(
        MBarrierLayout=_no_layout,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        arrive=lambda barrier, count, pred=True: barrier.arrive(count) if pred else None,
        expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
    )
    names = {
        "mbarrier": barriers,
        "tma": SimpleNamespace(async_copy_global_to_shared=_copy),
        "warpgroup_mma": _product,
        "warpgroup_mma_init": lambda acc: acc,
        "warpgroup_mma_wait": lambda pending, deps: deps[0]() if callable(deps[0]) else deps[0],
        "fence_async_shared": lambda: None,
    }
    for name in names.keys() & vars(module).keys():
        patch.setattr(module, name, names[name])

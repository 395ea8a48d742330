"""Memory of one GPU that the processes of other GPUs of the host write: CUDA IPC through the driver.

`cuda.bindings` is imported when memory is made. A device's primary context must be current, as torch leaves it.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_GRANULE = 2 << 20  # smaller allocations share a page, of which a handle would give away all


class PeerMemoryUnavailable(Exception):
    """The ranks cannot share memory; the message says why."""


class PeerMemory:
    """An allocation of this process, full of one word, and the mappings of other processes' allocations.

    Args:
        num_bytes: a multiple of 4.
        word: what all words of 4 bytes are in the beginning.
        bindings: a module like `cuda.bindings.driver`, which None imports.

    Raises:
        PeerMemoryUnavailable: without bindings, or when the driver refuses.
    """

    def __init__(self, num_bytes: int, word: int, bindings: Any = None) -> None:
        self._bindings = _import_bindings() if bindings is None else bindings
        self._mapped: list[Any] = []
        self._memory: Any = self._call("cuMemAlloc", -(-num_bytes // _GRANULE) * _GRANULE)
        try:
            self._call("cuMemsetD32", self._memory, word % (1 << 32), num_bytes // 4)
            self._call("cuCtxSynchronize")
            self.handle: bytes = self._call("cuIpcGetMemHandle", self._memory).reserved
            """By which another process maps the memory; 64 bytes."""
        except PeerMemoryUnavailable:
            self.free()
            raise

    @property
    def address(self) -> int:
        """Of the memory, in this process."""
        return int(self._memory)

    def tensor(self, first_byte: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A part of the memory, which must outlive the tensor, as a tensor on its device."""
        num_bytes = math.prod(shape) * dtype.itemsize
        interface = {"data": (self.address + first_byte, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3}
        part = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)
        return part.view(dtype).view(shape)

    def copy_to(self, address: int, source: Tensor, stream: int) -> None:
        """Have the copy engines write a contiguous tensor to an address, mapped or not, behind a CUDA stream."""
        assert source.is_contiguous()
        self._call("cuMemcpyAsync", address, source.data_ptr(), source.nbytes, stream)

    def map(self, handle: bytes) -> int:
        """The address in this process of another process's memory.

        Raises:
            PeerMemoryUnavailable: that memory's GPU cannot be reached from this one.
        """
        ipc_handle = self._bindings.CUipcMemHandle()
        ipc_handle.reserved = handle
        flags = self._bindings.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        self._mapped.append(self._call("cuIpcOpenMemHandle", ipc_handle, flags))
        return int(self._mapped[-1])

    def unmap(self) -> None:
        """Let go of the other processes' memory; no kernel uses it any more."""
        while self._mapped:
            self._release("cuIpcCloseMemHandle", self._mapped.pop())

    def free(self) -> None:
        """Give the memory back, which no process has mapped any more; not twice."""
        self._release("cuMemFree", self._memory)

    def _release(self, function: str, memory: Any) -> None:
        try:
            self._call(function, memory)
        except PeerMemoryUnavailable as error:  # after a fault on the device every call fails; the rest must go on
            logger.warning("memory that ranks shared was not given back: %s", error)

    def _call(self, function: str, *args: Any) -> Any:
        try:
            status, *results = getattr(self._bindings, function)(*args)
        except RuntimeError as error:
            raise PeerMemoryUnavailable(f"{function} cannot be called: {error}") from error
        if status != self._bindings.CUresult.CUDA_SUCCESS:
            raise PeerMemoryUnavailable(f"the CUDA driver refused {function} with {status.name}")
        return results[0] if results else None


def _import_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise PeerMemoryUnavailable(
            f"cuda-bindings cannot be imported ({error}); install it with pip install 'semipd[cuda]'"
        ) from error
    return driver

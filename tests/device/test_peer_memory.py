"""Memory that processes share, over a driver of Python objects that every rank of a test has in common."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semipd.device.peer_memory import PeerMemory, PeerMemoryUnavailable

WORD = -0x7FFF8000
OK = SimpleNamespace(name="CUDA_SUCCESS")
REFUSED = SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED")


class Driver:
    """What `PeerMemory` uses of `cuda.bindings.driver`. Addresses count the allocations of all processes.

    Args:
        refused: functions that fail.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=OK)
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=SimpleNamespace(value=1))
    CUipcMemHandle = SimpleNamespace

    def __init__(self, refused: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.live: set[int] = set()
        self.mapped: list[int] = []
        self._refused = refused
        self._lock = threading.Lock()

    def __getattr__(self, function: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls.append((function, args))
                return (REFUSED,) if function in self._refused.split() else (OK, *getattr(self, f"_{function}")(*args))

        return call

    def _cuMemAlloc(self, num_bytes: int) -> tuple[int]:
        assert num_bytes % (2 << 20) == 0
        address = len([name for name, _ in self.calls if name == "cuMemAlloc"]) << 32
        self.live.add(address)
        return (address,)

    def _cuMemsetD32(self, address: int, word: int, count: int) -> tuple[()]:
        assert address in self.live and 0 <= word < 1 << 32
        return ()

    def _cuCtxSynchronize(self) -> tuple[()]:
        return ()

    def _cuIpcGetMemHandle(self, address: int) -> tuple[SimpleNamespace]:
        assert address in self.live
        return (SimpleNamespace(reserved=address.to_bytes(64)),)

    def _cuIpcOpenMemHandle(self, handle: SimpleNamespace, flags: int) -> tuple[int]:
        address = int.from_bytes(handle.reserved)
        assert address in self.live and flags == 1
        self.mapped.append(address)
        return (address + 1,)

    def _cuMemcpyAsync(self, *args: int) -> tuple[()]:
        return ()

    def _cuIpcCloseMemHandle(self, address: int) -> tuple[()]:
        self.mapped.remove(address - 1)
        return ()

    def _cuMemFree(self, address: int) -> tuple[()]:
        assert address not in self.mapped, "memory is freed that another process has mapped"
        self.live.remove(address)
        return ()


def test_memory_is_filled_mapped_and_given_back() -> None:
    driver = Driver()
    mine, other = PeerMemory(12, WORD, driver), PeerMemory(3 << 20, WORD, driver)
    assert ("cuMemsetD32", (mine.address, 0x80008000, 3)) in driver.calls
    assert mine.map(other.handle) == other.address + 1
    mine.unmap()
    other.free()
    mine.free()
    assert not driver.live and not driver.mapped


def test_a_copy_is_of_all_bytes_of_a_tensor() -> None:
    driver = Driver()
    memory, source = PeerMemory(64, WORD, driver), torch.ones(3, 4, dtype=torch.bfloat16)
    memory.copy_to(1234, source[1:], 77)
    assert driver.calls[-1] == ("cuMemcpyAsync", (1234, source.data_ptr() + 8, 16, 77))
    with pytest.raises(AssertionError):
        memory.copy_to(1234, source[:, :2], 77)


def test_what_the_driver_refuses_is_said_and_leaves_nothing() -> None:
    driver = Driver("cuIpcGetMemHandle")
    with pytest.raises(PeerMemoryUnavailable, match="refused cuIpcGetMemHandle with CUDA_ERROR_NOT_SUPPORTED"):
        PeerMemory(64, WORD, driver)
    assert not driver.live


def test_memory_that_cannot_be_given_back_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    PeerMemory(64, WORD, Driver("cuMemFree")).free()
    assert "not given back: the CUDA driver refused cuMemFree" in caplog.text

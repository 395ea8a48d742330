"""What ranks agree on when they share memory, over the driver of `tests/device/test_peer_memory.py`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from semipd.config import Shard
from semipd.device.peer_memory import PeerMemory, PeerMemoryUnavailable
from semipd.parallel import peer_memory
from semipd.parallel.peer_memory import share_memory
from tests.device.test_peer_memory import Driver


def share_on_all_ranks(monkeypatch: pytest.MonkeyPatch, drivers: list[Driver]) -> list[Any]:
    """What sharing returns or raises on each rank; ranks of one driver share memory."""
    barrier, values = threading.Barrier(len(drivers), timeout=20), [0] * len(drivers)
    own = threading.local()
    monkeypatch.setattr(peer_memory, "PeerMemory", lambda size, word: PeerMemory(size, word, own.driver))

    def share(rank: int) -> Any:
        own.driver = drivers[rank]

        def exchange(value: int, *, timeout: float = 20.0) -> list[int]:
            values[rank] = value
            barrier.wait()
            result = list(values)
            barrier.wait()
            return result

        try:
            return share_memory(Shard(rank=rank, world_size=len(drivers)), exchange, 1 << 20, 0)
        except PeerMemoryUnavailable as error:
            return str(error)

    with ThreadPoolExecutor(len(drivers)) as pool:
        return list(pool.map(share, range(len(drivers))))


def test_ranks_get_the_addresses_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    results = share_on_all_ranks(monkeypatch, [driver] * 3)
    memories = [memory for memory, _ in results]
    for rank, (_, addresses) in enumerate(results):
        assert addresses == [memory.address + (other != rank) for other, memory in enumerate(memories)]
    assert len(driver.mapped) == 6


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuIpcGetMemHandle", "cuIpcOpenMemHandle"])
def test_without_the_memory_of_one_rank_none_shares(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    class Twin(Driver):
        """The driver of a process that is refused something, of the same machine."""

        def __init__(self, whole: Driver) -> None:
            super().__init__(function)
            self.calls, self.live, self.mapped, self._lock = whole.calls, whole.live, whole.mapped, whole._lock

    driver = Driver()
    problems = share_on_all_ranks(monkeypatch, [driver, Twin(driver), driver])
    assert [function in problem for problem in problems] == [False, True, False]
    assert problems[0] == problems[2] == "another rank could not share its memory"
    assert not driver.live and not driver.mapped

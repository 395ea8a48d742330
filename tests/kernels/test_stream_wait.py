"""The wait for a counter, in the interpreter: what it looks at, and when it ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from semipd.kernels.stream_wait import stream_wait
from semipd.kernels.triton_util import is_interpreted

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="the flag is memory of the CPU")
NEVER = 1000.0


@pytest.fixture
def memory() -> tuple[Tensor, Tensor]:
    """A counter among others, and a flag."""
    return torch.tensor([9, 0, 9], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("value", [5, 6, 1 << 30])
def test_enough_is_enough(memory: tuple[Tensor, Tensor], value: int) -> None:
    counters, flag = memory
    counters[1] = value
    stream_wait(counters[1:2], 5, flag, limit=NEVER)
    assert counters.tolist() == [9, 0, 9] and flag.tolist() == [0], "the counter is for the next wait"


def test_it_waits_for_the_last_signal(memory: tuple[Tensor, Tensor]) -> None:
    counters, flag = memory
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(stream_wait, counters[1:2], 3, flag, limit=NEVER)
        for _ in range(3):
            time.sleep(0.05)
            assert not done.done()
            counters[1] += 1
        done.result(10)
    assert flag.tolist() == [0] and counters.tolist() == [9, 0, 9]


def test_the_flag_releases_it_and_those_to_come(memory: tuple[Tensor, Tensor]) -> None:
    counters, flag = memory
    counters[1] = 1
    threading.Timer(0.1, lambda: flag.fill_(1)).start()
    for target in (2, 3):
        stream_wait(counters[1:2], target, flag, limit=NEVER)
    assert counters.tolist() == [9, 1, 9]


def test_at_its_limit_it_sets_the_flag(memory: tuple[Tensor, Tensor]) -> None:
    counters, flag = memory
    stream_wait(counters[1:2], 1, flag, limit=1e-5)
    assert flag.tolist() == [1]

"""Streams on cores: order, failures, the end, and what the rest of the process may not notice."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from semipd.config import Phase
from semipd.device import cpu
from semipd.device.contention import Counters, ProcCounters
from semipd.device.cpu import MAX_SPLITS, CpuPartitionBackend
from semipd.device.partition import Completion, PartitionBackend
from semipd.errors import ConfigError, DeviceError, PartitionUnavailable

T = TypeVar("T")

NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

needs_two_cores = pytest.mark.skipif(NUM_CORES < 2, reason="one core cannot be split")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
needs_counters = pytest.mark.skipif(not ProcCounters.are_supported(), reason="this system has no such counters")


@pytest.fixture
def backend() -> Iterator[CpuPartitionBackend]:
    backend = CpuPartitionBackend()
    yield backend
    backend.close()


def pretend_cores(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    """Let a backend believe in cores that are not there; for tests that ask for no stream."""
    monkeypatch.setattr(cpu, "_available_cores", lambda: list(range(num_cores)))


def reads(work: Callable[[], T]) -> Callable[[], Callable[[], T]]:
    """A launch of work that a CPU does when its result is read."""
    return lambda: work


def in_new_thread(work: Callable[[], int]) -> int:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_it_is_a_partition_backend() -> None:
    backend: PartitionBackend = CpuPartitionBackend()
    assert backend.num_sms == NUM_CORES
    backend.close()


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cores", [2, 3, 7, 16])
def test_a_small_device_offers_every_split(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    pretend_cores(monkeypatch, num_cores)
    splits = CpuPartitionBackend().splits
    assert list(splits) == [(num_cores - decode, decode) for decode in range(1, num_cores)]


@pytest.mark.parametrize("num_cores", [17, 33, 64, 191])
def test_a_large_device_offers_evenly_spread_splits(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    pretend_cores(monkeypatch, num_cores)
    splits = CpuPartitionBackend().splits
    decode = [share for _, share in splits]
    assert len(splits) == MAX_SPLITS
    assert all(prefill + share == num_cores and min(prefill, share) >= 1 for prefill, share in splits)
    steps = [after - before for before, after in zip([0, *decode], [*decode, num_cores], strict=True)]
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1


@pytest.mark.parametrize(
    ("num_cores", "expected"), [(2, (1, 1)), (3, (2, 1)), (8, (4, 4)), (33, (17, 16)), (64, (32, 32))]
)
def test_the_default_split_halves_the_device(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, expected: tuple[int, int]
) -> None:
    pretend_cores(monkeypatch, num_cores)
    backend = CpuPartitionBackend()
    assert backend.default_split == expected
    assert expected in backend.splits


def test_one_core_is_not_split() -> None:
    backend = CpuPartitionBackend(1)
    assert (backend.num_sms, list(backend.splits), backend.default_split) == (1, [], None)
    with pytest.raises(PartitionUnavailable, match="expected one of 1 on this device of 1"):
        backend.stream(Phase.DECODE, 2)
    assert backend.stream(Phase.DECODE, 1).submit(reads(lambda: 7)).wait() == 7
    backend.close()


def test_a_share_that_is_not_offered_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cores(monkeypatch, 4)
    with pytest.raises(PartitionUnavailable, match=r"decode was to run on 0 cores; expected one of 1, 2, 3, 4 "):
        CpuPartitionBackend().stream(Phase.DECODE, 0)


@pytest.mark.parametrize("num_cores", [0, -1, NUM_CORES + 1, True, 1.0])
def test_a_number_of_cores_that_is_not_there_is_refused(num_cores: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 1 to {NUM_CORES}"):
        CpuPartitionBackend(num_cores)


def test_the_whole_device_is_one_stream_of_both_phases(backend: CpuPartitionBackend) -> None:
    whole = backend.stream(Phase.PREFILL, NUM_CORES)
    assert backend.stream(Phase.DECODE, NUM_CORES) is whole
    assert whole.num_sms == NUM_CORES


@needs_two_cores
def test_each_share_of_each_phase_has_one_stream(backend: CpuPartitionBackend) -> None:
    prefill, decode = backend.stream(Phase.PREFILL, 1), backend.stream(Phase.DECODE, 1)
    assert prefill is not decode
    assert backend.stream(Phase.PREFILL, 1) is prefill
    names = {stream.submit(reads(lambda: threading.current_thread().name)).wait() for stream in (prefill, decode)}
    assert names == {"semipd-cpu-prefill-1", "semipd-cpu-decode-1"}


# Work -----------------------------------------------------------------------------------------------------------------


def test_work_runs_in_order_and_returns_its_result(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    ran: list[int] = []

    def work(index: int) -> int:
        ran.append(index)
        return index * index

    completions = [stream.submit(reads(partial(work, index))) for index in range(300)]
    assert [completion.wait() for completion in completions] == [index * index for index in range(300)]
    assert ran == list(range(300))
    assert all(completion.is_done() for completion in completions)


def test_submit_and_is_done_do_not_wait_for_the_work(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    gate = threading.Event()
    first, second = stream.submit(reads(gate.wait)), stream.submit(reads(lambda: "second"))
    assert not first.is_done()
    assert not second.is_done()
    gate.set()
    assert second.wait() == "second"
    assert first.is_done()


@needs_two_cores
def test_two_streams_run_at_the_same_time(backend: CpuPartitionBackend) -> None:
    meeting = threading.Barrier(2, timeout=30)
    streams = [backend.stream(phase, 1) for phase in Phase]
    for completion in [stream.submit(reads(meeting.wait)) for stream in streams]:
        completion.wait()


@needs_two_cores
def test_work_waits_for_completions_of_another_stream(backend: CpuPartitionBackend) -> None:
    prefill, decode = backend.stream(Phase.PREFILL, 1), backend.stream(Phase.DECODE, 1)
    gate = threading.Event()
    written: list[str] = []

    def write() -> None:
        gate.wait()
        written.append("prefill")

    first = prefill.submit(reads(write))
    unrelated = decode.submit(reads(lambda: "unrelated"))
    dependent = decode.submit(reads(lambda: list(written)), after=[first, unrelated])
    behind = decode.submit(reads(lambda: "behind"))
    assert unrelated.wait() == "unrelated"
    assert not dependent.is_done()
    assert not behind.is_done()
    gate.set()
    assert dependent.wait() == ["prefill"]
    assert behind.wait() == "behind"


def test_a_failure_reaches_its_waiters_and_spares_the_stream(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    error = ValueError("a step that fails")

    def fail() -> None:
        raise error

    failed = stream.submit(reads(fail))
    for _ in range(2):
        with pytest.raises(ValueError, match="a step that fails") as caught:
            failed.wait()
        assert caught.value is error
    assert failed.is_done()
    assert stream.submit(reads(lambda: "next")).wait() == "next"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_work_cannot_end_the_stream(backend: CpuPartitionBackend, kind: type[BaseException]) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)

    def leave() -> None:
        raise kind

    with pytest.raises(kind):
        stream.submit(reads(leave)).wait()
    assert stream.submit(reads(lambda: "next")).wait() == "next"


def test_work_behind_a_failure_does_not_run_and_fails_the_same(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    error = RuntimeError("lost")
    ran: list[str] = []

    def fail() -> None:
        raise error

    failed = stream.submit(reads(fail))
    dependent = stream.submit(reads(lambda: ran.append("dependent")), after=[failed])
    indirect = stream.submit(reads(lambda: ran.append("indirect")), after=[dependent])
    for completion in (dependent, indirect):
        with pytest.raises(RuntimeError) as caught:
            completion.wait()
        assert caught.value is error
    assert ran == []


def test_work_runs_in_inference_mode(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    assert stream.submit(reads(torch.is_inference_mode_enabled)).wait()
    assert not torch.is_inference_mode_enabled()


def test_a_stream_keeps_neither_work_nor_result(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    ran = threading.Event()

    def submit() -> tuple[Completion[torch.Tensor], weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]:
        argument, result = torch.ones(4), torch.zeros(4)
        completion = stream.submit(reads(lambda: result if argument.numel() else argument))
        completion.wait()
        return completion, weakref.ref(argument), weakref.ref(result)

    completion, argument, result = submit()
    stream.submit(reads(ran.set)).wait()  # the worker has let go of the work before it
    gc.collect()
    assert argument() is None
    assert result() is not None
    del completion
    assert result() is None


# The end --------------------------------------------------------------------------------------------------------------


def test_close_ends_behind_the_queued_work(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    gate = threading.Event()
    first = stream.submit(reads(gate.wait))
    last = stream.submit(reads(lambda: "last"))
    closing = threading.Thread(target=backend.close)
    closing.start()
    gate.set()
    closing.join()
    assert first.is_done()
    assert last.is_done()
    assert last.wait() == "last"


def test_a_closed_backend_takes_no_work(backend: CpuPartitionBackend) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    backend.close()
    backend.close()
    with pytest.raises(DeviceError, match="make a new backend"):
        stream.submit(reads(lambda: None))
    with pytest.raises(DeviceError, match="make a new one"):
        backend.stream(Phase.DECODE, NUM_CORES)


def test_close_leaves_no_thread_behind() -> None:
    for _ in range(3):
        backend = CpuPartitionBackend()
        streams = [backend.stream(phase, num_cores) for phase in Phase for num_cores in {1, NUM_CORES}]
        for stream in streams:
            stream.submit(reads(lambda: torch.ones(1 << 16).sum())).wait()
        backend.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("semipd-cpu")]
    deadline = time.monotonic() + 30
    while named_tasks() and time.monotonic() < deadline:  # OpenMP threads end on their own time
        time.sleep(0.01)
    assert not named_tasks()


def named_tasks() -> list[str]:
    """Names of this process's threads that belong to a team, Python's or not."""
    names = []
    for task in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(task.read_text().strip())
        except OSError:
            continue
    return [name for name in names if name.startswith("semipd")]


def test_a_stream_that_cannot_be_made_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cores: object) -> None:
        raise OSError("Invalid argument")

    monkeypatch.setattr(cpu, "_pin", refuse)
    backend = CpuPartitionBackend()
    with pytest.raises(DeviceError, match="Invalid argument"):
        backend.stream(Phase.DECODE, NUM_CORES)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("semipd-cpu")]
    backend.close()


# The process around it ------------------------------------------------------------------------------------------------


class ScriptedSizer:
    """Sizes a team as the test says instead of as the load on this machine does."""

    def __init__(self, num_cores: int, counters: Counters, now: float) -> None:
        self.num_threads = num_cores
        self.sizes: list[int | Exception] = []

    def update(self, now: float) -> bool:
        if not self.sizes:
            return False
        size = self.sizes.pop(0)
        if isinstance(size, Exception):
            raise size
        self.num_threads = size
        return True


@pytest.fixture
def sizers(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedSizer]:
    """The sizers of teams of several threads, in the order in which they are made; without a script they do nothing."""
    made: list[ScriptedSizer] = []

    def make(num_cores: int, counters: Counters, now: float) -> ScriptedSizer:
        made.append(ScriptedSizer(num_cores, counters, now))
        return made[-1]

    monkeypatch.setattr(cpu, "TeamSizer", make)
    return made


def team_affinities() -> list[set[int]]:
    """Cores of each thread of the calling thread's team, the caller's own first."""
    own = threading.get_native_id()
    counters = ProcCounters(f"semipd-{own}", [])
    others = set(counters.find_team()) - {own}
    counters.close()
    return [os.sched_getaffinity(thread) for thread in [own, *others]]


def test_the_number_of_threads_of_others_does_not_change(sizers: list[ScriptedSizer]) -> None:
    torch.set_num_threads(3)  # neither the default nor the size of a team here
    first, second = CpuPartitionBackend(), CpuPartitionBackend()
    for backend in (first, second):
        for phase in Phase:
            for num_cores in sorted({1, NUM_CORES}):
                stream = backend.stream(phase, num_cores)
                assert stream.submit(reads(torch.get_num_threads)).wait() == num_cores
                assert torch.get_num_threads() == 3
                assert in_new_thread(torch.get_num_threads) == 3
    for sizer in sizers:
        sizer.sizes = [1, NUM_CORES, 1]
    for backend in (first, second):
        whole = backend.stream(Phase.DECODE, NUM_CORES)
        for _ in range(5):
            whole.submit(reads(lambda: None)).wait()
            assert in_new_thread(torch.get_num_threads) == 3
    first.close()
    second.close()
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_backends_made_at_once_do_not_confuse_the_number_of_threads(sizers: list[ScriptedSizer]) -> None:
    torch.set_num_threads(3)

    def make_and_close() -> int:
        backend = CpuPartitionBackend()
        inside = backend.stream(Phase.DECODE, NUM_CORES).submit(reads(torch.get_num_threads)).wait()
        backend.close()
        return inside

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            inside = [future.result() for future in [pool.submit(make_and_close) for _ in range(4)]]
        assert inside == [NUM_CORES] * 4
        assert in_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3


@needs_two_cores
@needs_counters
def test_a_stream_on_one_core_has_no_other_threads(backend: CpuPartitionBackend) -> None:
    torch.set_num_threads(3)  # what MKL and OpenMP would use by themselves

    def compute() -> int:
        torch.rand(600, 600) @ torch.rand(600, 600)
        torch.ones(1 << 18).exp_()
        return len(team_affinities())

    assert backend.stream(Phase.PREFILL, 1).submit(reads(compute)).wait() == 1


@needs_affinity
def test_the_cores_of_others_do_not_change(backend: CpuPartitionBackend) -> None:
    before = os.sched_getaffinity(0)
    for num_cores in {1, NUM_CORES}:
        backend.stream(Phase.PREFILL, num_cores).submit(reads(lambda: None)).wait()
    assert os.sched_getaffinity(0) == before


@needs_two_cores
@needs_affinity
def test_a_split_has_the_first_cores_for_prefill_and_the_last_for_decode(backend: CpuPartitionBackend) -> None:
    cores = sorted(os.sched_getaffinity(0))
    used = {phase: backend.stream(phase, 1).submit(reads(lambda: os.sched_getaffinity(0))).wait() for phase in Phase}
    assert used == {Phase.PREFILL: {cores[0]}, Phase.DECODE: {cores[-1]}}


@needs_counters
def test_a_full_team_has_one_thread_on_each_core(backend: CpuPartitionBackend, sizers: list[ScriptedSizer]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    affinities = backend.stream(Phase.DECODE, NUM_CORES).submit(reads(team_affinities)).wait()
    assert affinities[0] == {cores[0]}
    assert sorted(affinities, key=min) == [{core} for core in cores]


@needs_two_cores
@needs_counters
def test_a_smaller_team_moves_freely_and_a_full_one_is_pinned_again(
    backend: CpuPartitionBackend, sizers: list[ScriptedSizer]
) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)

    def look() -> tuple[int, list[set[int]]]:
        return torch.get_num_threads(), team_affinities()

    sizers[0].sizes = [1, NUM_CORES]
    _, small, full = [stream.submit(reads(look)).wait() for _ in range(3)]
    assert small[0] == 1
    assert small[1][0] == os.sched_getaffinity(0)
    assert full[0] == NUM_CORES
    assert sorted(full[1], key=min) == [{core} for core in sorted(os.sched_getaffinity(0))]


@needs_two_cores
@needs_counters
def test_no_work_is_lost_when_a_team_cannot_adapt(
    backend: CpuPartitionBackend, sizers: list[ScriptedSizer], caplog: pytest.LogCaptureFixture
) -> None:
    stream = backend.stream(Phase.DECODE, NUM_CORES)
    sizers[0].sizes = [OSError("no such file"), 1]
    with caplog.at_level(logging.ERROR, logger=cpu.__name__):
        results = [stream.submit(reads(torch.get_num_threads)).wait() for _ in range(3)]
    assert results == [NUM_CORES] * 3
    assert "no longer adapts" in caplog.text


def test_without_pinning_and_counters_it_works_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_can_pin", lambda: False)
    monkeypatch.setattr(ProcCounters, "are_supported", staticmethod(lambda: False))
    with caplog.at_level(logging.WARNING, logger=cpu.__name__):
        backend = CpuPartitionBackend()
    num_cores = backend.num_sms
    stream = backend.stream(Phase.DECODE, num_cores)
    assert stream.submit(reads(torch.get_num_threads)).wait() == num_cores
    assert "cannot be pinned" in caplog.text
    assert "not counted" in caplog.text
    backend.close()

"""Partitions of a CUDA device: which shares there are, what the driver is asked for, order, failures and the end.

The driver and torch.cuda are fakes here, so nothing runs: an event fires when the test says so. tests/gpu has the real
ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semipd.config import Phase, StaticPolicy
from semipd.device.cuda_driver import CudaDriver, raise_max_connections
from semipd.device.green_context import HIGH_PRIORITY, GreenContextBackend, PlainStreamBackend, create_cuda_backend
from semipd.device.partition import PartitionBackend
from semipd.errors import ConfigError, DeviceError, PartitionUnavailable
from semipd.sched.latency import LatencyModel
from semipd.sched.policies import make_policy

SM, QUEUES = 1, 1000
DEVICE_BYTES = 80 << 30


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """`cuda.bindings.driver` with a device of its own; `calls` holds what changed it, in order."""

    CUresult = Status
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUdevWorkqueueConfigScope = SimpleNamespace(CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED=1)

    def __init__(
        self,
        num_sms: int = 132,
        *,
        num_groups: int | None = None,
        group_size: int = 8,
        version: int = 13000,
        failing: dict[str, Status | Exception] | None = None,
        missing_sms: int = 0,
        has_queues: bool = False,
    ) -> None:
        self.num_sms = num_sms
        # An H100 of 132 SMs makes 15 groups and a remainder of 12, not 16 and 4.
        self.num_groups = num_groups or {132: 15}.get(num_sms, num_sms // 8)
        self.group_size = group_size
        self.version = version
        self.failing = failing or {}
        self.missing_sms = missing_sms
        self.calls: list[tuple[str, Any]] = []
        self.contexts: dict[int, list[Any]] = {}
        self.streams: dict[int, tuple[int, int]] = {}
        self.creation_seconds = 0.0
        types = {"CU_DEV_RESOURCE_TYPE_SM": SM}
        if has_queues:
            types["CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG"] = QUEUES
        self.CUdevResourceType = SimpleNamespace(**types)

    def _status(self, function: str) -> Status:
        failure = self.failing.get(function, Status.CUDA_SUCCESS)
        if isinstance(failure, Exception):
            raise failure
        return failure

    def _sms(self, num_sms: int) -> SimpleNamespace:
        return SimpleNamespace(type=SM if num_sms else 0, sm=SimpleNamespace(smCount=num_sms))

    def cuDriverGetVersion(self) -> tuple[Status, int]:
        return self._status("cuDriverGetVersion"), self.version

    def cuDeviceGet(self, index: int) -> tuple[Status, str]:
        return self._status("cuDeviceGet"), f"device {index}"

    def cuDeviceGetDevResource(self, device: str, kind: int) -> tuple[Status, Any]:
        assert device == "device 0"
        if kind == QUEUES:
            assert self.version >= 13010, "the driver does not know that type"
            queues = SimpleNamespace(type=QUEUES, wqConfig=SimpleNamespace(sharingScope=0, wqConcurrencyLimit=32))
            return self._status("work queues"), queues
        return self._status("cuDeviceGetDevResource"), self._sms(self.num_sms)

    def cuDevSmResourceSplitByCount(
        self, num_groups: int, resource: Any, flags: int, min_count: int
    ) -> tuple[Status, list[Any], int, Any]:
        assert (num_groups, resource.sm.smCount, flags, min_count) == (self.num_sms // 8, self.num_sms, 0, 8)
        granted = min(num_groups, self.num_groups)
        groups = [self._sms(self.group_size if index < granted else 0) for index in range(num_groups)]
        self.calls.append(("split", granted))
        return (
            self._status("cuDevSmResourceSplitByCount"),
            groups,
            granted,
            self._sms(self.num_sms - granted * self.group_size),
        )

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> tuple[Status, Any]:
        assert len(resources) == count
        if any(resource.type == QUEUES for resource in resources):
            return self._status("queues in a descriptor"), tuple(resources)
        return self._status("cuDevResourceGenerateDesc"), tuple(resources)

    def cuMemAlloc(self, num_bytes: int) -> tuple[Status, int]:
        self.calls.append(("allocate", num_bytes))
        return (Status.CUDA_ERROR_OUT_OF_MEMORY if num_bytes >= DEVICE_BYTES else Status.CUDA_SUCCESS), 0

    def cuGreenCtxCreate(self, descriptor: tuple[Any, ...], device: str, flags: int) -> tuple[Status, int]:
        assert (device, flags) == ("device 0", 1)
        time.sleep(self.creation_seconds)
        context = 100 + len(self.contexts)
        status = self._status("cuGreenCtxCreate")
        if status is Status.CUDA_SUCCESS:
            self.contexts[context] = list(descriptor)
            self.calls.append(("context", context))
        return status, context

    def cuGreenCtxGetDevResource(self, context: int, kind: int) -> tuple[Status, Any]:
        num_sms = sum(resource.sm.smCount for resource in self.contexts[context] if resource.type == kind)
        return self._status("cuGreenCtxGetDevResource"), self._sms(num_sms - self.missing_sms)

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Status, int]:
        assert flags == 1
        stream = 0x1000 + 16 * len(self.streams)
        self.streams[stream] = (context, priority)
        self.calls.append(("stream", stream))
        return self._status("cuGreenCtxStreamCreate"), stream

    def cuStreamDestroy(self, stream: int) -> tuple[Status]:
        self.calls.append(("destroy stream", stream))
        return (self._status("cuStreamDestroy"),)

    def cuGreenCtxDestroy(self, context: int) -> tuple[Status]:
        self.calls.append(("destroy context", context))
        return (self._status("cuGreenCtxDestroy"),)


class FakeEvent:
    """An event that fires when the test says so."""

    def __init__(self, blocking: bool = False) -> None:
        assert blocking, "the host would spin"
        self.has_fired = threading.Event()
        self.fault: Exception | None = None

    def record(self, stream: FakeStream) -> None:
        stream.work.append(self)

    def query(self) -> bool:
        if self.fault is not None:
            raise self.fault
        return self.has_fired.is_set()

    def synchronize(self) -> None:
        if self.fault is not None:
            raise self.fault
        assert self.has_fired.wait(timeout=30)


class FakeStream:
    """A stream that keeps what is enqueued."""

    def __init__(self, cuda: FakeCuda, *, device: int, priority: int = 0, handle: int | None = None) -> None:
        assert device == 0
        self.priority = priority
        self.handle = handle
        self.work: list[Any] = []
        self.cuda = cuda
        cuda.streams.append(self)
        self.cuda_stream = handle or len(cuda.streams)

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(("wait", event))

    def synchronize(self) -> None:
        self.cuda.calls.append(("synchronize", self))
        if self.cuda.fault is not None:
            raise self.cuda.fault


class FakeCuda:
    """What the backends use of `torch.cuda`."""

    Event = FakeEvent

    def __init__(
        self, num_sms: int = 132, *, capability: tuple[int, int] = (9, 0), is_initialized: bool = False
    ) -> None:
        self.num_sms = num_sms
        self.capability = capability
        self.has_started = is_initialized
        self.streams: list[FakeStream] = []
        self.current: list[FakeStream] = []
        self.calls: list[tuple[str, Any]] = []
        self.fault: Exception | None = None

    def is_initialized(self) -> bool:
        return self.has_started

    def synchronize(self, device: int) -> None:
        assert device == 0
        self.calls.append(("start", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
        self.has_started = True

    def get_device_properties(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=self.num_sms)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return self.capability

    def Stream(self, device: int, priority: int) -> FakeStream:
        return FakeStream(self, device=device, priority=priority)

    def ExternalStream(self, handle: int, device: int) -> FakeStream:
        return FakeStream(self, device=device, handle=handle)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def empty_cache(self) -> None:
        self.calls.append(("empty cache", None))

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        assert index == 0
        yield

    def mem_get_info(self, device: int) -> tuple[int, int]:
        assert device == 0
        if self.fault is not None:
            raise self.fault
        return DEVICE_BYTES // 2, DEVICE_BYTES


class HostCompletion:
    """A completion of another kind of backend."""

    def __init__(self) -> None:
        self.num_waits = 0

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        self.num_waits += 1


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests, and none of theirs left behind."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    monkeypatch.delenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", raising=False)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def backend(driver: FakeDriver, cuda: FakeCuda) -> Iterator[GreenContextBackend]:
    backend = GreenContextBackend(cuda=cuda, bindings=driver)
    yield backend
    backend.close()


def make(driver: FakeDriver) -> GreenContextBackend:
    return GreenContextBackend(cuda=FakeCuda(driver.num_sms), bindings=driver)


def raw(backend: PlainStreamBackend, phase: Phase, num_sms: int) -> FakeStream:
    """The fake behind a stream of the backend."""
    stream = backend.stream(phase, num_sms).torch_stream
    assert isinstance(stream, FakeStream)
    return stream


def context_of(driver: FakeDriver, stream: Any) -> int:
    return driver.streams[stream.handle][0]


def test_both_are_partition_backends(cuda: FakeCuda, driver: FakeDriver) -> None:
    backends: Sequence[PartitionBackend] = [
        GreenContextBackend(cuda=cuda, bindings=driver),
        PlainStreamBackend(cuda=cuda),
    ]
    assert [backend.num_sms for backend in backends] == [132, 132]


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_sms", "expected", "default"),
    [
        (132, [(132 - decode, decode) for decode in range(8, 113, 8)], (84, 48)),
        (114, [(114 - decode, decode) for decode in range(8, 105, 8)], (74, 40)),
        (108, [(108 - decode, decode) for decode in range(8, 97, 8)], (68, 40)),
        (24, [(16, 8), (8, 16)], (16, 8)),
        (16, [(8, 8)], (8, 8)),
    ],
)
def test_splits_are_of_whole_groups(num_sms: int, expected: list[tuple[int, int]], default: tuple[int, int]) -> None:
    backend = make(FakeDriver(num_sms))
    assert list(backend.splits) == expected
    assert backend.default_split == default


def test_shares_are_counted_by_the_driver_and_not_by_what_was_asked() -> None:
    backend = make(FakeDriver(132, num_groups=12, group_size=10))
    assert list(backend.splits) == [(132 - 10 * first, 10 * first) for first in range(1, 12)]
    assert backend.default_split == (82, 50)


def test_groups_that_the_driver_could_not_make_belong_to_the_remainder(driver: FakeDriver) -> None:
    driver.num_groups = 13
    backend = make(driver)
    assert backend.splits[-1] == (132 - 12 * 8, 12 * 8)
    context = context_of(driver, raw(backend, Phase.PREFILL, 132 - 12 * 8))
    assert [resource.sm.smCount for resource in driver.contexts[context]] == [8, 132 - 13 * 8]


@pytest.mark.parametrize("num_sms", [132, 24, 45])
def test_the_two_sides_of_every_split_share_no_group_and_leave_none(num_sms: int) -> None:
    driver = FakeDriver(num_sms)
    backend = make(driver)
    for split in backend.splits:
        groups = [
            driver.contexts[context_of(driver, raw(backend, phase, share))]
            for phase, share in zip(Phase, split, strict=True)
        ]
        identities = [id(group) for side in groups for group in side]
        assert len(set(identities)) == len(identities)
        assert sum(group.sm.smCount for side in groups for group in side) == num_sms
        assert [sum(group.sm.smCount for group in side) for side in groups] == list(split)
    assert [name for name, _ in driver.calls].count("split") == 1


def test_each_phase_has_its_shares_and_the_whole_device(backend: GreenContextBackend) -> None:
    assert backend.shares(Phase.DECODE) == [*range(8, 113, 8), 132]
    assert backend.shares(Phase.PREFILL) == [*range(20, 125, 8), 132]
    for phase in Phase:
        for num_sms in backend.shares(phase):
            assert backend.stream(phase, num_sms).num_sms == num_sms


def test_a_share_of_the_other_phase_is_refused_with_those_that_are_offered(backend: GreenContextBackend) -> None:
    with pytest.raises(PartitionUnavailable, match=r"prefill was to run on 48 SMs; expected one of 20, 28, .*, 132 on"):
        backend.stream(Phase.PREFILL, 48)
    with pytest.raises(PartitionUnavailable, match="decode was to run on 0 SMs"):
        backend.capture_stream(Phase.DECODE, 0)


# Streams --------------------------------------------------------------------------------------------------------------


def test_a_share_has_one_stream_and_its_context_is_made_when_asked_for(
    backend: GreenContextBackend, driver: FakeDriver
) -> None:
    assert len(driver.contexts) == 2  # the default split's
    stream = backend.stream(Phase.DECODE, 64)
    assert backend.stream(Phase.DECODE, 64) is stream
    assert len(driver.contexts) == 3
    backend.prebuild([(124, 8), (124, 8), backend.default_split])
    assert len(driver.contexts) == 5
    backend.prebuild()
    assert len(driver.contexts) == len(driver.streams) == 2 * len(backend.splits)


def test_the_whole_device_is_a_stream_of_each_phase_without_a_context(
    backend: GreenContextBackend, driver: FakeDriver
) -> None:
    prefill, decode = (raw(backend, phase, 132) for phase in Phase)
    assert prefill is not decode
    assert (prefill.handle, decode.handle) == (None, None)
    assert backend.stream(Phase.DECODE, 132).num_sms == 132
    assert len(driver.contexts) == 2


@pytest.mark.parametrize(("decode_priority", "expected"), [(True, -5), (False, 0)])
def test_decode_goes_first_where_both_phases_may_use_an_sm(
    driver: FakeDriver, cuda: FakeCuda, decode_priority: bool, expected: int
) -> None:
    backend = GreenContextBackend(decode_priority=decode_priority, cuda=cuda, bindings=driver)
    assert (raw(backend, Phase.PREFILL, 132).priority, raw(backend, Phase.DECODE, 132).priority) == (0, expected)
    handles = [raw(backend, phase, share).handle for phase, share in zip(Phase, backend.default_split, strict=True)]
    assert [driver.streams[handle][1] for handle in handles if handle is not None] == [0, expected]


@pytest.mark.parametrize("num_sms", [48, 132])
def test_a_capture_stream_is_another_stream_on_the_same_partition(
    backend: GreenContextBackend, driver: FakeDriver, num_sms: int
) -> None:
    lane, capture = raw(backend, Phase.DECODE, num_sms), backend.capture_stream(Phase.DECODE, num_sms)
    assert isinstance(capture, FakeStream)
    assert capture is not lane
    assert backend.capture_stream(Phase.DECODE, num_sms) is capture
    if num_sms == 132:
        assert (capture.handle, capture.priority) == (None, lane.priority)
    else:
        assert lane.handle is not None
        assert capture.handle is not None
        assert driver.streams[capture.handle] == driver.streams[lane.handle]
    assert len(driver.contexts) == 2


@pytest.mark.parametrize("num_sms", [48, 132])
def test_side_streams_are_on_the_partitions_of_their_streams(
    backend: GreenContextBackend, driver: FakeDriver, num_sms: int
) -> None:
    for phase, share in ((Phase.DECODE, num_sms), (Phase.PREFILL, 132 if num_sms == 132 else 84)):
        streams = backend.stream(phase, share).torch_stream, backend.capture_stream(phase, share)
        sides: list[Any] = [backend.beside(stream) for stream in streams]
        assert len({*streams, *sides}) == 4
        assert [backend.beside(stream) for stream in streams] == sides
        for stream, side in zip(streams, sides, strict=True):
            owner: Any = stream
            if num_sms == 132:
                assert (side.handle, side.priority) == (None, HIGH_PRIORITY)
            else:
                context, _ = driver.streams[owner.handle]
                assert driver.streams[side.handle] == (context, HIGH_PRIORITY)


def test_capture_streams_have_side_streams_before_they_capture(backend: GreenContextBackend) -> None:
    backend.capture_stream(Phase.PREFILL, 84)
    assert not backend._sides, "nobody uses any"
    backend.beside(backend.stream(Phase.PREFILL, 84).torch_stream)
    stream = backend.capture_stream(Phase.DECODE, 48)
    assert stream.cuda_stream in backend._sides


def test_a_foreign_stream_has_a_side_stream_too(backend: GreenContextBackend, cuda: FakeCuda) -> None:
    foreign: Any = FakeStream(cuda, device=0)
    side: Any = backend.beside(foreign)
    assert (side.handle, side.priority) == (None, HIGH_PRIORITY) and backend.beside(foreign) is side
    backend.close()
    with pytest.raises(DeviceError, match="closed"):
        backend.beside(foreign)


def test_threads_that_ask_at_once_get_one_stream(backend: GreenContextBackend, driver: FakeDriver) -> None:
    driver.creation_seconds = 0.02
    start = threading.Barrier(4)

    def ask(_: int) -> object:
        start.wait()
        return backend.stream(Phase.DECODE, 96)

    with ThreadPoolExecutor(4) as pool:
        streams = set(pool.map(ask, range(4)))
    assert len(streams) == 1
    assert len(driver.contexts) == len(driver.streams) == 3


# Work -----------------------------------------------------------------------------------------------------------------


def launched(value: str) -> Callable[[], Callable[[], str]]:
    """Work that does nothing and reads as `value`."""
    return lambda: lambda: value


def fire(stream: FakeStream) -> None:
    """Let all work on the stream end."""
    for item in stream.work:
        if isinstance(item, FakeEvent):
            item.has_fired.set()


def test_work_is_launched_at_once_and_read_once_when_it_has_ended(backend: GreenContextBackend, cuda: FakeCuda) -> None:
    stream, fake = backend.stream(Phase.DECODE, 48), raw(backend, Phase.DECODE, 48)
    log: list[str] = []

    def read() -> int:
        assert torch.is_inference_mode_enabled()
        log.append("read")
        return 7

    def launch() -> Callable[[], int]:
        assert torch.is_inference_mode_enabled()
        assert cuda.current == [fake]
        fake.work.append("kernel")
        log.append("launch")
        return read

    completion = stream.submit(launch)
    assert log == ["launch"]
    assert fake.work[0] == "kernel"
    assert isinstance(fake.work[1], FakeEvent)
    assert cuda.current == []
    assert not torch.is_inference_mode_enabled()
    assert not completion.is_done()
    threading.Timer(0.05, fire, [fake]).start()
    assert [completion.wait(), completion.wait()] == [7, 7]
    assert log == ["launch", "read"]
    assert completion.is_done()


def test_only_work_of_other_streams_is_waited_for_and_by_the_device(backend: GreenContextBackend) -> None:
    prefill, decode = backend.stream(Phase.PREFILL, 84), backend.stream(Phase.DECODE, 48)
    fake = raw(backend, Phase.DECODE, 48)
    first = prefill.submit(launched("prefill"))
    own = decode.submit(launched("own"))
    host = HostCompletion()
    decode.submit(launched("behind"), after=[first, own, host])
    (event,) = raw(backend, Phase.PREFILL, 84).work
    assert [item for item in fake.work if isinstance(item, tuple)] == [("wait", event)]
    assert fake.work.index(("wait", event)) == 1  # behind its own first work, ahead of the second
    assert host.num_waits == 1
    assert not first.is_done()


def test_what_a_launch_raises_comes_out_of_submit_and_spares_the_stream(backend: GreenContextBackend) -> None:
    stream, fake = backend.stream(Phase.DECODE, 48), raw(backend, Phase.DECODE, 48)

    def fail() -> Callable[[], None]:
        raise ValueError("a step that fails")

    with pytest.raises(ValueError, match="a step that fails"):
        stream.submit(fail)
    assert fake.work == []
    completion = stream.submit(launched("next"))
    fire(fake)
    assert completion.wait() == "next"


def test_what_a_read_raises_reaches_every_waiter(backend: GreenContextBackend) -> None:
    stream = backend.stream(Phase.DECODE, 48)
    error = ValueError("a result that cannot be read")
    reads: list[str] = []

    def read() -> None:
        reads.append("read")
        raise error

    completion = stream.submit(lambda: read)
    fire(raw(backend, Phase.DECODE, 48))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            completion.wait()
        assert caught.value is error
    assert reads == ["read"]


def test_a_fault_on_the_device_ends_the_work_and_is_raised_by_its_waiters(backend: GreenContextBackend) -> None:
    completion = backend.stream(Phase.DECODE, 48).submit(launched("lost"))
    (event,) = raw(backend, Phase.DECODE, 48).work
    event.fault = RuntimeError("an illegal memory access was encountered")
    assert completion.is_done()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        completion.wait()


def test_several_waiters_read_once(backend: GreenContextBackend) -> None:
    reads: list[int] = []

    def read() -> int:
        time.sleep(0.02)
        reads.append(1)
        return len(reads)

    completion = backend.stream(Phase.DECODE, 48).submit(lambda: read)
    fire(raw(backend, Phase.DECODE, 48))
    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(completion.wait) for _ in range(4)]] == [1] * 4


# The end --------------------------------------------------------------------------------------------------------------


def test_close_destroys_streams_before_their_contexts_and_nothing_twice(driver: FakeDriver, cuda: FakeCuda) -> None:
    backend = GreenContextBackend(cuda=cuda, bindings=driver)
    backend.prebuild()
    backend.beside(backend.capture_stream(Phase.DECODE, 48))
    whole = raw(backend, Phase.DECODE, 132)
    made = len(driver.calls)
    backend.close()
    backend.close()
    assert {stream for name, stream in cuda.calls if name == "synchronize"} == set(cuda.streams)
    assert whole in cuda.streams
    assert cuda.calls[-1] == ("empty cache", None)
    *ended, last = driver.calls[made:]
    assert last == ("allocate", DEVICE_BYTES), "refused, and with it the driver gives back what it keeps"
    assert sorted(stream for name, stream in ended if name == "destroy stream") == sorted(driver.streams)
    assert sorted(context for name, context in ended if name == "destroy context") == sorted(driver.contexts)
    for stream, (context, _) in driver.streams.items():
        assert ended.index(("destroy stream", stream)) < ended.index(("destroy context", context))


def test_a_closed_backend_gives_no_streams_and_its_streams_take_no_work(backend: GreenContextBackend) -> None:
    stream = backend.stream(Phase.DECODE, 48)
    backend.close()
    with pytest.raises(DeviceError, match="closed GreenContextBackend"):
        backend.stream(Phase.DECODE, 48)
    with pytest.raises(DeviceError, match="closed GreenContextBackend"):
        backend.capture_stream(Phase.DECODE, 56)
    with pytest.raises(DeviceError, match="make a new backend"):
        stream.submit(launched("late"))


def test_close_waits_for_a_launch_in_another_thread(backend: GreenContextBackend, driver: FakeDriver) -> None:
    entered, gate = threading.Event(), threading.Event()

    def launch() -> Callable[[], None]:
        entered.set()
        gate.wait()
        return lambda: None

    stream = backend.stream(Phase.DECODE, 48)
    with ThreadPoolExecutor(2) as pool:
        submitted = pool.submit(stream.submit, launch)
        entered.wait()
        closed = pool.submit(backend.close)
        time.sleep(0.02)
        assert not any(name.startswith("destroy") for name, _ in driver.calls)
        gate.set()
        submitted.result()
        closed.result()
    assert any(name.startswith("destroy") for name, _ in driver.calls)


def test_close_goes_on_after_a_fault_on_the_device(
    driver: FakeDriver, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    backend = GreenContextBackend(cuda=cuda, bindings=driver)
    cuda.fault = RuntimeError("an illegal memory access was encountered")
    driver.failing = {"cuStreamDestroy": Status.CUDA_ERROR_NOT_SUPPORTED}
    with caplog.at_level(logging.WARNING):
        backend.close()
    assert [name for name, _ in driver.calls].count("destroy context") == 2
    assert "refused cuStreamDestroy" in caplog.text
    assert "work of a closing stream failed" in caplog.text
    assert "keeps memory of CUDA graphs that are no more: an illegal memory access" in caplog.text


# Devices that cannot be split -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "capability", "reason"),
    [
        (FakeDriver(version=12040), (9, 0), r"supports CUDA 12\.4; partitions need 12\.5 or later, so update"),
        (FakeDriver(), (5, 2), r"compute capability 5\.2; partitions need 6\.0"),
        (FakeDriver(8), (9, 0), "needs two groups of 8 SMs, and the device's 8 make 1"),
        (FakeDriver(4), (9, 0), "needs two groups of 8 SMs, and the device's 4 make 0"),
        (FakeDriver(132, num_groups=1), (9, 0), "132 make 1"),
        (
            FakeDriver(failing={"cuDeviceGetDevResource": Status.CUDA_ERROR_NOT_SUPPORTED}),
            (9, 0),
            "refused cuDeviceGetDevResource with CUDA_ERROR_NOT_SUPPORTED",
        ),
        (
            FakeDriver(failing={"cuDevSmResourceSplitByCount": Status.CUDA_ERROR_NOT_SUPPORTED}),
            (9, 0),
            "refused cuDevSmResourceSplitByCount",
        ),
        (
            FakeDriver(failing={"cuGreenCtxCreate": Status.CUDA_ERROR_OUT_OF_MEMORY}),
            (9, 0),
            "refused cuGreenCtxCreate with CUDA_ERROR_OUT_OF_MEMORY",
        ),
        (
            FakeDriver(failing={"cuDriverGetVersion": RuntimeError("Failed to dlopen libcuda.so.1")}),
            (9, 0),
            "cuDriverGetVersion cannot be called: Failed to dlopen",
        ),
    ],
)
def test_a_device_that_cannot_be_split_says_why(driver: FakeDriver, capability: tuple[int, int], reason: str) -> None:
    with pytest.raises(PartitionUnavailable, match=reason):
        GreenContextBackend(cuda=FakeCuda(driver.num_sms, capability=capability), bindings=driver)


def test_without_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(PartitionUnavailable, match=r"pip install 'semipd\[cuda\]'"):
        CudaDriver(0)


def test_a_part_of_a_device_is_not_split(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PartitionUnavailable, match="132 SMs can be split but this process uses 66"):
        GreenContextBackend(cuda=FakeCuda(66), bindings=driver)
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50")
    with pytest.raises(PartitionUnavailable, match="CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is 50"):
        make(driver)
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
    make(driver)


def test_a_context_of_another_size_is_refused_and_given_back(driver: FakeDriver, cuda: FakeCuda) -> None:
    driver.missing_sms = 8
    with pytest.raises(PartitionUnavailable, match="a partition of 84 SMs was to be made and the driver gave 76"):
        GreenContextBackend(cuda=cuda, bindings=driver)
    assert [name for name, _ in driver.calls] == ["split", "context", "destroy context", "allocate"]


def test_half_a_backend_is_given_back(driver: FakeDriver, cuda: FakeCuda) -> None:
    driver.failing = {"cuGreenCtxStreamCreate": Status.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(PartitionUnavailable, match="cuGreenCtxStreamCreate"):
        GreenContextBackend(cuda=cuda, bindings=driver)
    assert [name for name, _ in driver.calls if "context" in name] == ["context", "destroy context"]


def test_a_share_that_fails_later_fails_alone(backend: GreenContextBackend, driver: FakeDriver) -> None:
    driver.failing = {"cuGreenCtxCreate": Status.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(PartitionUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY"):
        backend.stream(Phase.DECODE, 64)
    assert backend.stream(Phase.DECODE, 48).num_sms == 48
    driver.failing = {}
    assert backend.stream(Phase.DECODE, 64).num_sms == 64


def test_the_plain_backend_has_a_stream_for_each_phase_and_no_splits(cuda: FakeCuda) -> None:
    backend = PlainStreamBackend(cuda=cuda)
    assert (list(backend.splits), backend.default_split, backend.num_sms) == ([], None, 132)
    assert [backend.shares(phase) for phase in Phase] == [[132], [132]]
    prefill, decode = (raw(backend, phase, 132) for phase in Phase)
    assert (prefill.priority, decode.priority) == (0, -5)
    assert backend.capture_stream(Phase.DECODE, 132) not in (prefill, decode)
    with pytest.raises(PartitionUnavailable, match="decode was to run on 48 SMs; expected one of 132"):
        backend.stream(Phase.DECODE, 48)
    backend.close()
    with pytest.raises(DeviceError, match="closed PlainStreamBackend"):
        backend.stream(Phase.DECODE, 132)
    assert {stream for name, stream in cuda.calls if name == "synchronize"} == set(cuda.streams)


def test_a_static_policy_falls_back_without_a_split_and_an_explicit_one_is_refused(cuda: FakeCuda) -> None:
    backend = PlainStreamBackend(cuda=cuda)
    offer: dict[str, Any] = {"num_sms": 132, "splits": backend.splits, "default_split": backend.default_split}
    offer |= {"max_prefill_tokens": 2048, "slo": None, "latency": LatencyModel(132)}
    make_policy(StaticPolicy(), **offer)
    with pytest.raises(ConfigError, match="cannot be split"):
        make_policy(StaticPolicy(prefill_sms=84, decode_sms=48), **offer)


def test_the_factory_splits_the_device_where_it_can(
    driver: FakeDriver, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = create_cuda_backend(cuda=cuda, bindings=driver)
    assert isinstance(backend, GreenContextBackend)
    assert caplog.records == []


def test_the_factory_says_once_why_it_does_not_split(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backend = create_cuda_backend(cuda=cuda, bindings=FakeDriver(version=12020))
    assert type(backend) is PlainStreamBackend
    (record,) = caplog.records
    assert record.getMessage().startswith("prefill and decode share all SMs of cuda:0: the NVIDIA driver supports CUDA")


# Work queues ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initialized", "value", "expected", "warns"),
    [
        (False, None, "32", False),
        (False, "64", "64", False),
        (False, "1", "1", True),
        (True, None, None, True),
        (True, "8", "8", True),
        (True, "many", "many", True),
        (True, "32", "32", False),
    ],
)
def test_connections_are_raised_while_cuda_can_still_notice(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    initialized: bool,
    value: str | None,
    expected: str | None,
    warns: bool,
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        raise_max_connections(FakeCuda(is_initialized=initialized))
    assert os.environ.get(name) == expected
    assert len(caplog.records) == warns
    if warns:
        assert f"{name} is {value or 'unset'}" in caplog.text
        assert "set it to 32 before CUDA is used" in caplog.text


def test_too_few_connections_are_warned_of_once_on_the_way_to_a_plain_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    with caplog.at_level(logging.WARNING):
        create_cuda_backend(cuda=FakeCuda(is_initialized=True), bindings=FakeDriver(version=12020))
    assert [record.name for record in caplog.records] == ["semipd.device.cuda_driver", "semipd.device.green_context"]


def test_connections_are_raised_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, cuda: FakeCuda
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    GreenContextBackend(cuda=cuda, bindings=driver)
    assert cuda.calls[0] == ("start", "32")


def queues_of(driver: FakeDriver) -> list[Any]:
    """The work queues of each context."""
    return [[r.wqConfig for r in resources if r.type == QUEUES] for resources in driver.contexts.values()]


def test_contexts_have_work_queues_of_their_own_where_cuda_offers_them() -> None:
    driver = FakeDriver(version=13010, has_queues=True)
    backend = make(driver)
    backend.prebuild()
    queues = queues_of(driver)
    assert len(queues) == 2 * len(backend.splits)
    assert all(queue.sharingScope == 1 for (queue,) in queues)
    assert sum(queue.wqConcurrencyLimit for (queue,) in queues) <= 32


@pytest.mark.parametrize(
    "driver",
    [
        FakeDriver(version=13000, has_queues=True),
        FakeDriver(version=13010, has_queues=False),
        FakeDriver(version=13010, has_queues=True, failing={"work queues": Status.CUDA_ERROR_NOT_SUPPORTED}),
        FakeDriver(version=13010, has_queues=True, failing={"queues in a descriptor": Status.CUDA_ERROR_NOT_SUPPORTED}),
    ],
)
def test_contexts_do_without_work_queues_of_their_own(driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = make(driver)
    assert backend.stream(Phase.DECODE, 48).num_sms == 48
    assert queues_of(driver) == [[], []]
    assert caplog.records == []

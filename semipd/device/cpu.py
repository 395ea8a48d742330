"""Cores as the device: a stream is a worker thread with an OpenMP team of its own, pinned to cores of its own.

What a CUDA stream on a green context is to a GPU. OpenMP gives every master thread its own pool of workers, which
inherit its core affinity, so two streams on disjoint cores share nothing but the caches and memory behind them.

GNU OpenMP lets threads spin between operations only while all its pools in the process together have no more threads
than there are cores. A pool that the main thread made while it loaded weights ends that: a decode step of a 135M model
on two cores then took 43 ms, as on one, in place of 26 ms. So load on a stream, or in a thread that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch

from semipd.config import Phase, Shard
from semipd.device.contention import ProcCounters, TeamSizer
from semipd.device.partition import Completion, Stream
from semipd.engine_thread import EngineThread
from semipd.errors import ConfigError, DeviceError, PartitionUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WHOLE = Shard()

MAX_SPLITS = 15
"""Splits offered at most; on more than 16 cores they step by a sixteenth of the device."""


class CpuPartitionBackend:
    """Streams on the cores of this process.

    A stream's threads are made when it is first asked for, in milliseconds, and are ready when `stream` returns:
    ask for the streams of a policy before serving. The whole device is one stream for both phases, so that two lanes
    never run two teams on the same cores. In a split, prefill takes the first cores and decode the last.
    """

    def __init__(self, num_cores: int | None = None, *, shard: Shard = _WHOLE) -> None:
        """A backend on the first `num_cores` of the cores that this process may use; None takes all of them.

        Args:
            num_cores: how many.
            shard: which of several ranks on these cores this is. Each has a part of them if that is two or more, enough
                for two lanes; otherwise the ranks share them all.

        Raises:
            ConfigError: there are fewer cores than that.
        """
        available = _available_cores()
        part = len(available) // shard.world_size
        if part >= len(Phase):
            available = available[shard.rank * part : (shard.rank + 1) * part]
        if num_cores is None:
            num_cores = len(available)
        if isinstance(num_cores, bool) or not isinstance(num_cores, int) or not 1 <= num_cores <= len(available):
            raise ConfigError(
                f"num_cores is {num_cores!r}; expected 1 to {len(available)}, as many as this process may use, "
                "or None for all of them"
            )
        self._cores = available[:num_cores]
        steps = min(num_cores, MAX_SPLITS + 1)
        decode_shares = [step * num_cores // steps for step in range(1, steps)]
        self._splits = tuple((num_cores - share, share) for share in decode_shares)
        self._streams: dict[tuple[Phase | None, int], _CpuStream] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        if not torch._C.has_openmp:
            logger.warning("this build of torch has no OpenMP: the lanes share one pool of threads")
        if not _can_pin():
            logger.warning("threads cannot be pinned to cores on this platform: the lanes are not kept apart")
        if not ProcCounters.are_supported():
            logger.warning("waits for a core are not counted on this platform: steps slow down beside busy programs")

    @property
    def num_sms(self) -> int:
        """Cores of the whole device."""
        return len(self._cores)

    @property
    def splits(self) -> Sequence[tuple[int, int]]:
        """(prefill, decode) cores, by growing decode share; empty on one core."""
        return self._splits

    @property
    def default_split(self) -> tuple[int, int] | None:
        """Half of the cores for each phase, the odd one for prefill; None on one core."""
        decode = self.num_sms // 2
        return (self.num_sms - decode, decode) if decode else None

    def stream(self, phase: Phase, num_sms: int) -> Stream:
        """The stream of `phase` on `num_sms` cores; the same one at every call, and for both phases on all cores.

        Raises:
            PartitionUnavailable: no such share is offered; the message lists those that are.
            DeviceError: the backend is closed, or the system refused the thread its cores.
        """
        offered = sorted(split[0 if phase is Phase.PREFILL else 1] for split in self._splits) + [self.num_sms]
        if num_sms not in offered:
            raise PartitionUnavailable(
                f"{phase} was to run on {num_sms} cores; expected one of {', '.join(map(str, offered))} "
                f"on this device of {self.num_sms}"
            )
        with self._lock:
            if self._is_closed:
                raise DeviceError("a stream was asked of a closed CpuPartitionBackend; make a new one")
            key = (None if num_sms == self.num_sms else phase, num_sms)
            if key not in self._streams:
                cores = self._cores[:num_sms] if phase is Phase.PREFILL else self._cores[-num_sms:]
                self._streams[key] = _CpuStream(f"cpu-{key[0] or 'all'}-{num_sms}", cores)
            return self._streams[key]

    def close(self) -> None:
        """End all streams after their queued work, and their threads; may be called again."""
        with self._lock:
            self._is_closed = True
            streams = list(self._streams.values())
        for stream in streams:
            stream.end()
        for stream in streams:
            stream.join()
        _return_free_memory()


class _CpuCompletion(Generic[T]):
    """Work on its way through a stream."""

    def __init__(self, launch: Callable[[], Callable[[], T]], after: Sequence[Completion[object]]) -> None:
        self._launch: Callable[[], Callable[[], T]] | None = launch
        self._after = after
        self._done = threading.Event()
        self._result: T
        self._error: BaseException | None = None

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> T:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Run the work behind `after`, and keep what comes of it; never raises."""
        assert self._launch is not None, "work is run once"
        try:
            for completion in self._after:
                completion.wait()
            self._result = self._launch()()
        except BaseException as error:  # the waiter's to handle; the stream goes on
            self._error = error
        self._launch, self._after = None, ()  # what the work holds must not live as long as its completion
        self._done.set()


class _CpuStream:
    """A worker thread, its team, and the queue between it and the lanes."""

    def __init__(self, name: str, cores: Sequence[int]) -> None:
        self._cores = tuple(cores)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_ended = False
        self._team: _Team | None = None
        self._thread = EngineThread(self._run, name)
        self._thread.start()
        try:
            self.submit(self._make_team).wait()
        except Exception as error:
            self.end()
            self.join()
            raise DeviceError(f"no team of threads could be made on cores {list(cores)}: {error}") from error

    @property
    def num_sms(self) -> int:
        """Cores of the stream; while others keep some of them busy its work may use fewer."""
        return len(self._cores)

    def submit(self, launch: Callable[[], Callable[[], T]], after: Sequence[Completion[object]] = ()) -> Completion[T]:
        """Run `launch` and what it returns in inference mode, behind what was submitted so far and behind `after`.

        Work behind a completion that failed does not run, and fails with the same exception.

        Raises:
            DeviceError: the backend is closed.
        """
        completion = _CpuCompletion(launch, tuple(after))
        with self._lock:  # nothing may be queued behind the end
            if self._is_ended:
                raise DeviceError(f"work was submitted to {self._thread.name}, which is closed; make a new backend")
            self._queue.put(completion.run)
        return completion

    def end(self) -> None:
        """Take no more work."""
        with self._lock:
            if not self._is_ended:
                self._is_ended = True
                self._queue.put(None)

    def join(self) -> None:
        """Return once the queued work is done and the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (run := self._queue.get()) is not None:
                run()
                del run  # or the last result would live until the next work
                if self._team is not None:
                    self._team.adapt()
        if self._team is not None:
            self._team.close()

    def _make_team(self) -> Callable[[], None]:
        self._team = _Team(self._cores)
        return lambda: None


class _Team:
    """The OpenMP team of the thread that makes it, one thread to a core; every method is that thread's to call."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = cores
        self._name = f"semipd-{threading.get_native_id()}"
        self._counters: ProcCounters | None = None
        self._sizer: TeamSizer | None = None
        if ProcCounters.are_supported():
            Path("/proc/thread-self/comm").write_text(self._name)  # the team's threads inherit it
            self._counters = ProcCounters(self._name, cores)
        self._resize(len(cores))
        if self._counters is not None and len(cores) > 1:
            self._sizer = TeamSizer(len(cores), self._counters, time.monotonic())

    def adapt(self) -> None:
        """Follow the load that others put on the cores. Costs under a microsecond, and a few every 20 ms."""
        if self._sizer is None:
            return
        before = self._sizer.num_threads
        try:
            if self._sizer.update(time.monotonic()):
                logger.debug("%s: %d -> %d threads", self._name, before, self._sizer.num_threads)
                self._resize(self._sizer.num_threads)
        except Exception:  # the work runs without it, and must not be lost with the thread
            logger.exception("%s no longer adapts to the load on its cores", self._name)
            self._sizer = None

    def close(self) -> None:
        """Give back what the counters hold; the team's threads end with their master."""
        if self._counters is not None:
            self._counters.close()

    def _resize(self, num_threads: int) -> None:
        """Make the team `num_threads` large: one thread to a core if that is all cores, else free to move among them.

        Beside busy processes, pinned one by one they were 1.5 times faster than free ones, until the size adapts.
        """
        master = threading.get_native_id()
        _set_own_num_threads(num_threads)
        _pin(master, self._cores)
        torch.ones(1 << 16)  # over ATen's grain of 2^15 elements: a parallel region, which is what makes the threads
        if self._counters is None:
            return
        others = [thread for thread in self._counters.find_team() if thread != master]
        is_full = num_threads == len(self._cores)
        for index, thread in enumerate([master, *others]):
            _pin(thread, [self._cores[index % num_threads]] if is_full else self._cores)


def _return_free_memory() -> None:
    """Give what was freed back to the system: glibc keeps 500 MB of a closed 135M engine for its next allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc; others return it by themselves
        trim(0)


def _set_own_num_threads(num_threads: int) -> None:
    """Set the size of the calling thread's OpenMP and MKL teams, and nobody else's.

    torch.set_num_threads does that too, but also stores the number that every thread takes over at its first use of
    torch, so a user's thread that begins meanwhile would get ours. Hence the libraries below it, asked by themselves.
    """
    torch.get_num_threads()  # this thread takes over that number now, and not later in place of ours
    libraries = ctypes.CDLL(torch._C.__file__)  # finds the functions of all that it links to
    calls = {
        "omp_set_num_threads": num_threads,
        "MKL_Set_Num_Threads_Local": num_threads,
        "MKL_Set_Dynamic": 0,  # as torch.set_num_threads: teams that differ from OpenMP's are remade at every operation
    }
    for name, argument in calls.items():
        with contextlib.suppress(AttributeError):  # torch was built without that library
            getattr(libraries, name)(argument)


def _pin(thread: int, cores: Iterable[int]) -> None:
    if _can_pin():
        with contextlib.suppress(ProcessLookupError):  # the OpenMP runtime is just ending it
            os.sched_setaffinity(thread, cores)


def _can_pin() -> bool:
    return hasattr(os, "sched_setaffinity")


def _available_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if _can_pin() else list(range(os.cpu_count() or 1))

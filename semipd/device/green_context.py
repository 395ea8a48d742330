"""SMs of a CUDA device as partitions: a stream in a green context keeps its kernels on that context's SMs.

Graphs captured on such a stream stay on its SMs too, wherever they are replayed. The whole device is a plain stream for
each phase, decode's at high priority, so any share of one phase may run beside any of the other: shares of one split
are disjoint, others are over-subscribed. Where the driver cannot split there are only the plain streams.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from semipd.config import Phase
from semipd.device.cuda_driver import CudaDriver, GreenContext, SmGroup, raise_max_connections
from semipd.device.partition import Completion
from semipd.errors import DeviceError, PartitionUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

GROUP_SIZE = 8
"""SMs by which shares differ: the least that Hopper grants, and what it schedules thread block clusters in."""

MIN_CAPABILITY = (6, 0)
"""Compute capability of the first architecture that has green contexts."""

HIGH_PRIORITY = -5
"""The greatest stream priority of CUDA; where there is less, as in torch's own streams (-3), it is clamped."""


class GpuCompletion(Generic[T]):
    """Work on its way through a GPU stream.

    Attributes:
        event: recorded behind the work.
        stream: runs the work.
    """

    def __init__(self, read: Callable[[], T], event: torch.cuda.Event, stream: GpuStream) -> None:
        self.event = event
        self.stream = stream
        self._read: Callable[[], T] | None = read
        self._lock = threading.Lock()
        self._result: T
        self._error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether the work has ended, well or not; never waits."""
        try:
            is_done: bool = self.event.query()  # type: ignore[no-untyped-call]
        except RuntimeError:  # a fault on the device, which `wait` raises
            return True
        return is_done

    def wait(self) -> T:
        """The result, read once; the thread sleeps until the work has ended and leaves the GIL to others."""
        self.event.synchronize()
        with self._lock:
            if self._read is not None:
                read, self._read = self._read, None  # what it holds must not live as long as its completion
                try:
                    with torch.inference_mode():
                        self._result = read()
                except BaseException as error:  # every waiter's, as the result would be
                    self._error = error
        if self._error is not None:
            raise self._error
        return self._result


class GpuStream:
    """A CUDA stream on a partition or on the whole device."""

    def __init__(self, stream: torch.cuda.Stream, num_sms: int, cuda: Any) -> None:
        self._stream = stream
        self._num_sms = num_sms
        self._cuda = cuda
        self._lock = threading.Lock()
        self._is_ended = False

    @property
    def num_sms(self) -> int:
        """SMs that its work runs on."""
        return self._num_sms

    @property
    def torch_stream(self) -> torch.cuda.Stream:
        """The stream for torch; not to be used once the backend is closed."""
        return self._stream

    def submit(self, launch: Callable[[], Callable[[], T]], after: Sequence[Completion[object]] = ()) -> Completion[T]:
        """Launch work behind what was submitted so far and behind `after`, and return at once.

        `launch` runs here and now, in inference mode with this stream as torch's current one; it enqueues the work and
        returns the function that reads the result once the work has ended. The device waits for `after` by itself;
        completions of other backends are waited for on the host.

        Raises:
            DeviceError: the backend is closed.
            BaseException: what `launch` raises, so that a lane ends before it launches the next step on half a one.
        """
        event = self._cuda.Event(blocking=True)  # waiters sleep; the default spins on a core
        with self._lock:
            if self._is_ended:
                raise DeviceError("work was submitted to a stream of a closed backend; make a new backend")
            for completion in after:
                self._wait_for(completion)
            with torch.inference_mode(), self._cuda.stream(self._stream):  # the latter selects the device too
                read = launch()
                event.record(self._stream)
        return GpuCompletion(read, event, self)

    def end(self) -> None:
        """Take no more work, and return once what was submitted has ended."""
        with self._lock:
            self._is_ended = True
            try:
                self._stream.synchronize()
            except RuntimeError:  # a fault on the device; its waiters have it, and closing goes on
                logger.warning("work of a closing stream failed", exc_info=True)

    def _wait_for(self, completion: Completion[object]) -> None:
        if not isinstance(completion, GpuCompletion):
            completion.wait()
        elif completion.stream is not self:
            self._stream.wait_event(completion.event)


class PlainStreamBackend:
    """A CUDA device that is not split: each phase has a stream on all of its SMs."""

    def __init__(self, device_index: int = 0, *, decode_priority: bool = True, cuda: Any = torch.cuda) -> None:
        """A backend on the device that torch calls `cuda:<device_index>`.

        Args:
            device_index: which device.
            decode_priority: whether blocks of decode's kernels are scheduled before waiting ones of prefill's.
            cuda: torch's module for CUDA, or what a test has in its place.
        """
        cuda.synchronize(device_index)  # starts CUDA and makes the primary context, which all others build on
        self._device_index = device_index
        self._cuda = cuda
        self._num_sms = int(cuda.get_device_properties(device_index).multi_processor_count)
        self._priorities = {Phase.PREFILL: 0, Phase.DECODE: HIGH_PRIORITY if decode_priority else 0}
        self._streams: dict[tuple[Phase, int, bool], GpuStream] = {}
        self._sides: dict[int, GpuStream] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def num_sms(self) -> int:
        """SMs of the whole device."""
        return self._num_sms

    @property
    def splits(self) -> Sequence[tuple[int, int]]:
        """(prefill, decode) SMs that are disjoint, by growing decode share; empty when the device is not split."""
        return ()

    @property
    def default_split(self) -> tuple[int, int] | None:
        """The split of `StaticPolicy()`; None when the device is not split."""
        return None

    def shares(self, phase: Phase) -> Sequence[int]:
        """SMs that `phase` can have, ascending. Two that sum to more than the device are over-subscribed."""
        shares = {prefill if phase is Phase.PREFILL else decode for prefill, decode in self.splits}
        return sorted(shares | {self.num_sms})

    def stream(self, phase: Phase, num_sms: int) -> GpuStream:
        """The stream of `phase` on `num_sms` SMs, the same one at every call; safe from any thread.

        Made when it is first asked for, since each split takes memory that few policies would use all of.

        Raises:
            PartitionUnavailable: no such share is offered, or the driver cannot make it.
            DeviceError: the backend is closed.
        """
        return self._stream(phase, num_sms, is_capture=False)

    def capture_stream(self, phase: Phase, num_sms: int) -> torch.cuda.Stream:
        """A second stream on the same SMs and at the same priority, which are what a graph takes over from it.

        For capturing in another thread than the lane's, one graph at a time. The same one at every call; raises what
        `stream` raises.
        """
        stream = self._stream(phase, num_sms, is_capture=True).torch_stream
        if self._sides:
            self.beside(stream)  # which is not to be made while this one captures
        return stream

    def beside(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        """A side stream of one of these streams, on the same SMs, or of any other, on the whole device.

        For what is to run beside the work of that stream, and before it where both may use an SM. The same one at every
        call.
        """
        side = self._sides.get(stream.cuda_stream)
        if side is not None:
            return side.torch_stream
        with self._lock:
            if self._is_closed:
                raise DeviceError(f"a stream was asked of a closed {type(self).__name__}; make a new one")
            owners = [key for key, owner in self._streams.items() if owner.torch_stream == stream]
            phase, num_sms = owners[0][:2] if owners else (Phase.PREFILL, self.num_sms)
            if stream.cuda_stream not in self._sides:
                opened = self._open(phase, num_sms, HIGH_PRIORITY)
                self._sides[stream.cuda_stream] = GpuStream(opened, num_sms, self._cuda)
            return self._sides[stream.cuda_stream].torch_stream

    def close(self) -> None:
        """End all streams behind their work and give the memory back; may be called again.

        Graphs captured on these streams and pinned memory copied on them must be gone before: torch records an event
        on such a stream when it frees them, and a stream that was destroyed is not checked.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            streams = [*self._streams.values(), *self._sides.values()]
            self._streams.clear()
            self._sides.clear()
        for stream in streams:
            stream.end()
        self._release()
        # torch keeps a workspace of 32 MiB for cuBLAS on each stream, also on those that are no more.
        clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear_workspaces is not None:
            clear_workspaces()
        self._cuda.empty_cache()  # what torch keeps of freed tensors, for streams that are no more
        self._trim()

    def _stream(self, phase: Phase, num_sms: int, *, is_capture: bool) -> GpuStream:
        key = (phase, num_sms, is_capture)
        stream = self._streams.get(key)  # without the lock: lanes ask at every step
        if stream is not None:
            return stream
        with self._lock:
            if self._is_closed:
                raise DeviceError(f"a stream was asked of a closed {type(self).__name__}; make a new one")
            shares = self.shares(phase)
            if num_sms not in shares:
                raise PartitionUnavailable(
                    f"{phase} was to run on {num_sms} SMs; expected one of {', '.join(map(str, shares))} "
                    f"on this device of {self.num_sms}"
                )
            if key not in self._streams:
                opened = self._open(phase, num_sms, self._priorities[phase])
                self._streams[key] = GpuStream(opened, num_sms, self._cuda)
            return self._streams[key]

    def _open(self, phase: Phase, num_sms: int, priority: int) -> torch.cuda.Stream:
        """A new stream for an offered share."""
        stream: torch.cuda.Stream = self._cuda.Stream(device=self._device_index, priority=priority)
        return stream

    def _release(self) -> None:
        """Give back what `_open` made; torch keeps its own streams."""

    def _trim(self) -> None:
        """Give back what the driver keeps."""


class GreenContextBackend(PlainStreamBackend):
    """A CUDA device whose SMs can be split between the phases.

    The device is split once into groups of 8 SMs and a remainder: 15 and 12 SMs on an H100 of 132. In a split, decode
    has the first groups and prefill has all others and the remainder.
    """

    def __init__(
        self, device_index: int = 0, *, decode_priority: bool = True, cuda: Any = torch.cuda, bindings: Any = None
    ) -> None:
        """A backend on the device that torch calls `cuda:<device_index>`, with the default split already made.

        Args:
            device_index: which device.
            decode_priority: whether blocks of decode's kernels are scheduled before waiting ones of prefill's, where
                both may use an SM.
            cuda: torch's module for CUDA, or what a test has in its place.
            bindings: the same for `cuda.bindings.driver`; None imports it.

        Raises:
            PartitionUnavailable: the device cannot be split; the message says why.
        """
        raise_max_connections(cuda)  # a stream for each share is more than the 8 queues that there are by default
        super().__init__(device_index, decode_priority=decode_priority, cuda=cuda)
        capability = cuda.get_device_capability(device_index)
        if capability < MIN_CAPABILITY:
            raise PartitionUnavailable(
                f"the device has compute capability {capability[0]}.{capability[1]}; partitions need "
                f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
            )
        self._driver = CudaDriver(device_index, bindings)
        self._refuse_limits()
        groups, remainder = self._driver.split(GROUP_SIZE)
        if len(groups) < 2:
            raise PartitionUnavailable(
                f"a split needs two groups of {GROUP_SIZE} SMs, and the device's {self.num_sms} make {len(groups)}"
            )
        self._splits, self._groups = _deal(groups, remainder)
        self._contexts: dict[tuple[Phase, int], GreenContext] = {}
        try:
            self.prebuild([self.default_split])  # a driver that grants groups and refuses contexts says so here
        except BaseException:
            self.close()
            raise

    @property
    def splits(self) -> Sequence[tuple[int, int]]:
        """(prefill, decode) SMs that are disjoint, by growing decode share."""
        return self._splits

    @property
    def default_split(self) -> tuple[int, int]:
        """About three eighths of the SMs for decode: 48 of 132.

        On an H100 they read 3.04 of the 3.15 TB/s that all SMs reach. Beside a busy prefill, an 8B model's decode step
        of 64 requests at 1k tokens took 14.1 ms there, 17.0 on 32 SMs and 12.2 on 64, while prefill ran 25,200, 28,800
        and 19,500 tokens/s: 48 gave the highest sum of both rates.
        """
        num_groups = len(self._splits) + 1
        return self._splits[(3 * num_groups + 4) // 8 - 1]

    def prebuild(self, splits: Sequence[tuple[int, int]] | None = None) -> None:
        """Make the streams of `splits` now instead of at the first step that needs them; None makes all.

        A split takes about 12 MiB on an H100. To be called before the KV
        pool is sized by the memory that is left, with the splits that the policy can choose.

        Raises:
            PartitionUnavailable: a split is not offered, or the driver cannot make it.
        """
        for split in self.splits if splits is None else splits:
            for phase, num_sms in zip(Phase, split, strict=True):
                self.stream(phase, num_sms)

    def _refuse_limits(self) -> None:
        """Raise when the process has a part of the device: kernels may then leave a green context for all of it."""
        percentage = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
        if percentage not in ("", "100"):
            raise PartitionUnavailable(
                f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is {percentage}, and under such a limit partitions do not hold; "
                "unset it"
            )
        if self._driver.num_sms != self.num_sms:
            raise PartitionUnavailable(
                f"{self._driver.num_sms} SMs can be split but this process uses {self.num_sms}, as under a limit of "
                "MPS, where partitions do not hold; lift it"
            )

    def _open(self, phase: Phase, num_sms: int, priority: int) -> torch.cuda.Stream:
        if num_sms == self.num_sms:
            return super()._open(phase, num_sms, priority)
        key = (phase, num_sms)
        if key not in self._contexts:
            self._contexts[key] = self._driver.make_context(self._groups[key])
        handle = self._contexts[key].make_stream(priority)
        stream: torch.cuda.Stream = self._cuda.ExternalStream(handle, device=self._device_index)
        return stream

    def _release(self) -> None:
        while self._contexts:
            self._contexts.popitem()[1].close()

    def _trim(self) -> None:
        try:
            with self._cuda.device(self._device_index):
                _, device_bytes = self._cuda.mem_get_info(self._device_index)  # also makes its context current
                self._driver.trim(device_bytes)
        except RuntimeError as error:  # after a fault on the device every call fails; the rest must go on
            logger.warning("the driver keeps memory of CUDA graphs that are no more: %s", error)


def create_cuda_backend(
    device_index: int = 0, *, decode_priority: bool = True, cuda: Any = torch.cuda, bindings: Any = None
) -> PlainStreamBackend:
    """A backend that splits the device where that can be done, and else, with a warning that says why, does not.

    Arguments are those of `GreenContextBackend`.
    """
    try:
        return GreenContextBackend(device_index, decode_priority=decode_priority, cuda=cuda, bindings=bindings)
    except PartitionUnavailable as error:
        logger.warning("prefill and decode share all SMs of cuda:%d: %s", device_index, error)
        return PlainStreamBackend(device_index, decode_priority=decode_priority, cuda=cuda)


def _deal(
    groups: list[SmGroup], remainder: SmGroup | None
) -> tuple[tuple[tuple[int, int], ...], dict[tuple[Phase, int], list[SmGroup]]]:
    """All splits, and the groups behind each phase's shares: the first ones for decode, all others for prefill.

    Each phase has a whole group at least, since kernels in thread block clusters need not fit the remainder.
    """
    rest = [] if remainder is None else [remainder]
    halves = [(groups[first:] + rest, groups[:first]) for first in range(1, len(groups))]
    splits = tuple((_count_sms(prefill), _count_sms(decode)) for prefill, decode in halves)
    shared = {}
    for (prefill_sms, decode_sms), (prefill, decode) in zip(splits, halves, strict=True):
        shared[Phase.PREFILL, prefill_sms] = prefill
        shared[Phase.DECODE, decode_sms] = decode
    return splits, shared


def _count_sms(groups: Sequence[SmGroup]) -> int:
    return sum(group.num_sms for group in groups)

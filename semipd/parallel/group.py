"""The ranks of one engine as a group: what they agree on while they start, and the collectives of each lane's steps.

Only this module knows torch.distributed, and it makes process groups directly on a store of the engine's own:
`init_process_group` is global to the process, which belongs to the user and may hold several engines. Each lane has a
communicator, so that two lanes' collectives may be under way at once.

Shapes: W ranks, n rows of one of them.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # all that torch.distributed has of these classes, and their types

from semipd.config import Phase, Shard
from semipd.errors import RankError

LOOPBACK = "127.0.0.1"

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for the other ranks, which may be compiling kernels. A rank that died is noticed at
once, in another way."""

MAX_CTAS: Mapping[Phase, int] = MappingProxyType({Phase.PREFILL: 16, Phase.DECODE: 8})
"""CTAs of a collective on a GPU, which take SMs from what computes: 64 MiB are reduced on two H200 in 281 us with
16 and 247 with 32; one of 1 MiB 20 us with 16 and 30 with 8. Decode's smallest partition has 8 SMs."""

_CONNECT_TIMEOUT = timedelta(seconds=60)  # all ranks have met when they connect
_POLL_SECONDS = 0.01  # between looks for what other ranks say while they start
_CLOSE_SECONDS = 10.0  # for NCCL to give its memory back
_ABORT_SECONDS = 0.5  # between looks whether a collective on a CPU was aborted
_WARM_UP_BYTES = tuple(1 << bits for bits in range(10, 27, 4))  # NCCL connects anew where it changes algorithms

# Capturing a graph must not talk to the other ranks, which do not capture it at the same time. And a lane has one
# collective under way at a time, of a graph or not: what NCCL does for parallel graphs would only cost time, as would
# one order for both lanes' collectives. They need no order: a few CTAs find an SM once finite kernels have ended.
_NCCL_DEFAULTS = MappingProxyType(
    {"NCCL_GRAPH_REGISTER": "0", "NCCL_GRAPH_MIXING_SUPPORT": "0", "NCCL_LAUNCH_ORDER_IMPLICIT": "0"}
)
# torch would end the process, which is the user's, when a collective fails or its watchdog thread is late.
_TORCH_NCCL_DEFAULTS = MappingProxyType({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"})


class Communicator(Protocol):
    """Collectives of one lane, in the same order on all ranks; safe from several threads.

    On a GPU they are launched on the current stream and may be captured in graphs; on a CPU they block.
    """

    rank: int
    world_size: int

    def all_reduce_(self, tensor: Tensor) -> None:
        """Leaves in `tensor`, contiguous, its sum over the ranks: the same bits on each."""
        ...

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """Writes to `out`, `[W * n, ...]`, every rank's `tensor`, in order."""
        ...

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        """Writes to `out`, `[n / W, ...]`, this rank's chunk of the sum of `tensor`; it may be that chunk itself."""
        ...

    def all_to_all(self, out: Tensor, tensor: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> None:
        """Sends `in_splits[r]` rows of `tensor` to each rank r, and writes `out_splits[r]` rows from each to `out`."""
        ...

    def abort(self) -> None:
        """From any thread: collectives that wait, and later ones, fail."""
        ...


class TensorGroup:
    """A rank's membership among those that hold the shards of one model.

    It begins without communicators, so that ranks load their weights before they wait for each other. `abort` may be
    called from any thread at any time; all else is the building thread's.

    Args:
        shard: this rank.
        store: the ranks' own keys; see `host_store` and `join_store`.
        host: an address by which the others reach this rank; the loopback one keeps all on this host.
        timeout: of a collective.
    """

    def __init__(
        self, shard: Shard, store: c10d.Store, *, host: str = LOOPBACK, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        self.shard = shard
        self._store: c10d.Store | None = store
        self._host = host
        self._timeout = timeout
        self._rounds = count()
        self._is_aborted = threading.Event()
        self._communicators: dict[Phase, _GlooCommunicator | _NcclCommunicator] = {}
        self._aborting: dict[Phase, threading.Thread] = {}
        self._on_abort: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def connect(self, device: torch.device, *, max_ctas: Mapping[Phase, int] = MAX_CTAS) -> None:
        """Make the communicators, over NCCL on a GPU and gloo on a CPU, once all ranks are here.

        On a GPU its primary context must be current.
        """
        assert not self._communicators, "a group is connected once"
        self.exchange(0)  # or making them would wait for a rank that failed before
        store, shard = self._store, self.shard
        assert store is not None
        if device.type == "cpu":
            for phase in Phase:
                process_group = _make_gloo(c10d.PrefixStore(phase, store), shard, self._host, self._timeout)
                self._add(phase, _GlooCommunicator(process_group, shard))
        else:
            for phase in Phase:
                process_group = _make_nccl(c10d.PrefixStore(phase, store), shard, self._timeout, max_ctas[phase])
                self._add(phase, _NcclCommunicator(process_group, shard))
            with torch.cuda.device(device), torch.inference_mode():
                for communicator in self._communicators.values():
                    _warm_up(communicator, device)
                torch.cuda.synchronize(device)
        if self._is_aborted.is_set():
            raise _aborted()

    def communicator(self, phase: Phase) -> Communicator:
        """The collectives of a lane."""
        return self._communicators[phase]

    @contextmanager
    def quiet(self, phase: Phase) -> Iterator[None]:
        """Nobody launches collectives of the lane meanwhile: NCCL (2.28) crashes if a capture of one ends just then."""
        with self._communicators[phase].lock:
            yield

    def agree_min(self, value: int) -> int:
        """The smallest `value` of all ranks; see `exchange`."""
        return min(self.exchange(value))

    def exchange(self, value: int, *, timeout: float = math.inf) -> list[int]:
        """Every rank's value, by rank; each rank calls this as often as the others.

        Raises:
            RankError: the group was aborted, or others did not come within `timeout` seconds.
        """
        assert self._store is not None, "the group is closed"
        if self._is_aborted.is_set():  # what it says now could be taken for another round's answer
            raise _aborted()
        number = next(self._rounds)
        keys = [f"{number}/{rank}" for rank in range(self.shard.world_size)]
        self._store.set(keys[self.shard.rank], str(value))
        deadline = time.monotonic() + timeout
        while not self._store.check(keys):  # and not `wait`, which no other thread could end
            if self._is_aborted.wait(_POLL_SECONDS):
                raise _aborted()
            if time.monotonic() > deadline:
                raise RankError(f"other ranks did not come within {timeout:g} s")
        return [int(self._store.get(key)) for key in keys]

    def call_on_abort(self, function: Callable[[], None]) -> None:
        """Have `function` called by `abort`, or now if that was before; in any thread, and perhaps more than once."""
        with self._lock:
            self._on_abort.append(function)
        if self._is_aborted.is_set():
            function()

    def abort(self) -> None:
        """Release this rank from waiting for the others, wherever it does, and for good; returns at once."""
        self._is_aborted.set()
        with self._lock:
            for function in self._on_abort:
                function()
            for phase, communicator in self._communicators.items():
                if phase not in self._aborting:
                    # Side by side: on a GPU the end of one waits for the kernels of the other.
                    thread = threading.Thread(target=communicator.abort, name=f"semipd-abort-{phase}", daemon=True)
                    self._aborting[phase] = thread
                    thread.start()

    def close(self) -> None:
        """Let go of the communicators and the store; no step runs any more, and no graph holds a collective."""
        self.abort()  # with nothing under way it is a close that waits for no other rank
        for thread in self._aborting.values():
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            self._communicators.clear()
        self._store = None

    def _add(self, phase: Phase, communicator: _GlooCommunicator | _NcclCommunicator) -> None:
        with self._lock:
            self._communicators[phase] = communicator
        if self._is_aborted.is_set():  # which came too early to find it
            self.abort()


def connect(
    shard: Shard, *, store: c10d.Store, device: torch.device, max_ctas: Mapping[Phase, int] = MAX_CTAS
) -> TensorGroup:
    """A group of ranks on one host, connected."""
    group = TensorGroup(shard, store)
    group.connect(device, max_ctas=max_ctas)
    return group


def host_store() -> tuple[c10d.Store, int]:
    """A new store in this process, and the port by which the ranks of this host join it; no other host can."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = c10d.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def join_store(host: str, port: int, *, is_host: bool = False, prefix: str = "") -> c10d.Store:
    """The store that another process hosts, or, with `is_host`, this one for others, on all of its addresses."""
    store = c10d.TCPStore(host, port, is_master=is_host, wait_for_workers=False)
    return c10d.PrefixStore(prefix, store) if prefix else store


# ---- CPU


def _make_gloo(store: c10d.Store, shard: Shard, host: str, timeout: timedelta) -> Any:
    gloo: Any = c10d.ProcessGroupGloo  # torch's types leave out its options
    options = gloo._Options()
    options._timeout = _CONNECT_TIMEOUT
    options._threads = 1  # a lane has one collective at a time
    options._devices = [gloo.create_device(hostname=host) if host == LOOPBACK else gloo.create_default_device()]
    process_group = gloo(store, shard.rank, shard.world_size, options)
    process_group._set_default_timeout(timeout)
    return process_group


class _GlooCommunicator:
    """Collectives over TCP, which fail when a peer's connection closes."""

    def __init__(self, process_group: Any, shard: Shard) -> None:
        self.rank, self.world_size = shard.rank, shard.world_size
        self._process_group = process_group
        self.lock = threading.Lock()
        self._is_aborted = False

    def all_reduce_(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._run(lambda: self._process_group.allreduce([tensor]))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        self._run(lambda: self._process_group._allgather_base(out, tensor))

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        summed = tensor.clone()  # gloo has no reduce-scatter into a tensor in every version
        self.all_reduce_(summed)
        out.copy_(summed.chunk(self.world_size)[self.rank])

    def all_to_all(self, out: Tensor, tensor: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> None:
        self._run(lambda: self._process_group.alltoall_base(out, tensor, list(out_splits), list(in_splits)))

    def abort(self) -> None:
        self._is_aborted = True

    def _run(self, start: Callable[[], Any]) -> None:
        """Run one collective. Gloo has no abort, so whoever waits looks for it now and then."""
        with self.lock:
            if self._is_aborted:
                raise _aborted()
            work = start()
            while True:
                try:
                    work.wait(timedelta(seconds=_ABORT_SECONDS))
                    return
                except RuntimeError:
                    if self._is_aborted:
                        raise _aborted() from None
                    if work.is_completed():
                        raise


# ---- GPU


def _make_nccl(store: c10d.Store, shard: Shard, timeout: timedelta, max_ctas: int) -> Any:
    for name, value in _NCCL_DEFAULTS.items():  # NCCL reads them when it first needs them, and so for good
        os.environ.setdefault(name, value)
    nccl: Any = c10d.ProcessGroupNCCL  # which only builds for GPUs have
    options = nccl.Options()
    options._timeout = timeout
    options.config.max_ctas = max_ctas
    with _environment(_TORCH_NCCL_DEFAULTS):
        return nccl(store, shard.rank, shard.world_size, options)


class _NcclCommunicator:
    """Collectives on the current stream; a lane's thread and the one that captures its graphs take turns."""

    def __init__(self, process_group: Any, shard: Shard) -> None:
        self.rank, self.world_size = shard.rank, shard.world_size
        self._process_group = process_group
        self.lock = threading.Lock()
        self._aborting = threading.Lock()
        self._is_aborted = False
        self._all_reduce = _on_current_stream(c10d.AllreduceOptions())
        self._all_gather = _on_current_stream(c10d.AllgatherOptions())
        self._reduce_scatter = _on_current_stream(c10d.ReduceScatterOptions())
        self._all_to_all = _on_current_stream(c10d.AllToAllOptions())

    def all_reduce_(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        with self._launching():
            self._process_group.allreduce([tensor], self._all_reduce)

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        with self._launching():
            self._process_group._allgather_base(out, tensor, self._all_gather)

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        with self._launching():
            self._process_group._reduce_scatter_base(out, tensor, self._reduce_scatter)

    def all_to_all(self, out: Tensor, tensor: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> None:
        with self._launching():
            self._process_group.alltoall_base(out, tensor, list(out_splits), list(in_splits), self._all_to_all)

    def abort(self) -> None:
        with self._aborting:
            if not self._is_aborted:
                self._is_aborted = True
                self._process_group.abort()  # without the launches' lock, which one that hangs holds

    @contextmanager
    def _launching(self) -> Iterator[None]:
        with self.lock:
            if self._is_aborted:
                raise _aborted()
            yield


def _on_current_stream(options: Any) -> Any:
    options.asyncOp = False  # torch's own stream would leave the partition
    return options


def _warm_up(communicator: Communicator, device: torch.device) -> None:
    """Have NCCL make all connections that collectives of any size need: a capture later on cannot."""
    for num_bytes in _WARM_UP_BYTES:
        num_rows = num_bytes // 2 // communicator.world_size * communicator.world_size
        whole = torch.zeros(num_rows, dtype=torch.float16, device=device)
        part = whole.chunk(communicator.world_size)[communicator.rank]
        communicator.all_reduce_(whole)
        communicator.reduce_scatter(part, whole)
        communicator.all_gather(whole, part)
    splits = [1] * communicator.world_size
    rows = torch.zeros(len(splits), device=device)
    communicator.all_to_all(rows.clone(), rows, splits, splits)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables that are unset are set for a moment, in which a constructor reads them."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _aborted() -> RankError:
    return RankError("the ranks no longer compute together")

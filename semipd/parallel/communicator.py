"""Collectives of ranks: over gloo on CPUs, over NCCL on GPUs.

With `group.py`, which makes them, this is all that knows torch.distributed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # all that torch.distributed has of these classes, and their types

from semipd.config import Shard
from semipd.errors import RankError

LOOPBACK = "127.0.0.1"

_CONNECT_TIMEOUT = timedelta(seconds=60)  # all ranks have met when they connect
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


# ---- CPU


def make_gloo(store: c10d.Store, shard: Shard, host: str, timeout: timedelta) -> Any:
    """A process group of CPUs.

    Args:
        host: an address by which the others reach this rank.
        timeout: of a collective.
    """
    gloo: Any = c10d.ProcessGroupGloo  # torch's types leave out its options
    options = gloo._Options()
    options._timeout = _CONNECT_TIMEOUT
    options._threads = 1  # a lane has one collective at a time
    options._devices = [gloo.create_device(hostname=host) if host == LOOPBACK else gloo.create_default_device()]
    process_group = gloo(store, shard.rank, shard.world_size, options)
    process_group._set_default_timeout(timeout)
    return process_group


class GlooCommunicator:
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
                raise aborted()
            work = start()
            while True:
                try:
                    work.wait(timedelta(seconds=_ABORT_SECONDS))
                    return
                except RuntimeError:
                    if self._is_aborted:
                        raise aborted() from None
                    if work.is_completed():
                        raise


# ---- GPU


def make_nccl(store: c10d.Store, shard: Shard, timeout: timedelta, max_ctas: int, *, is_clustered: bool = True) -> Any:
    """A process group of GPUs.

    Args:
        timeout: of a collective.
        max_ctas: of a collective, at most.
        is_clustered: whether its CTAs may come in clusters, by fours on Hopper, as NCCL likes them: large all-reduces
            of two H200 took up to a fifth longer without. But SMs that a product leaves one by one need not lie side by
            side, as a cluster's must.
    """
    for name, value in _NCCL_DEFAULTS.items():  # NCCL reads them when it first needs them, and so for good
        os.environ.setdefault(name, value)
    nccl: Any = c10d.ProcessGroupNCCL  # which only builds for GPUs have
    options = nccl.Options()
    options._timeout = timeout
    options.config.max_ctas = max_ctas
    if not is_clustered:
        options.config.cga_cluster_size = 0
    with _environment(_TORCH_NCCL_DEFAULTS):
        return nccl(store, shard.rank, shard.world_size, options)


class NcclCommunicator:
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
                raise aborted()
            yield


def _on_current_stream(options: Any) -> Any:
    options.asyncOp = False  # torch's own stream would leave the partition
    return options


def warm_up(communicator: Communicator, device: torch.device) -> None:
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


def aborted() -> RankError:
    """What collectives raise that were aborted, or came later."""
    return RankError("the ranks no longer compute together")

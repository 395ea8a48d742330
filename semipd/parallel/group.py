"""The ranks of one engine as a group: what they agree on while they start, and the collectives of each lane's steps.

Process groups are made directly on a store of the engine's own: `init_process_group` is global to the process, which
belongs to the user and may hold several engines. Each lane has communicators of its own, so that two lanes' collectives
may be under way at once; a lane's differ by the SMs that they take of a GPU, and only one of them is under way.

Shapes: W ranks, n rows of one of them.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count
from types import MappingProxyType

import torch
from torch._C import _distributed_c10d as c10d  # all that torch.distributed has of these classes, and their types

from semipd.config import Phase, Shard
from semipd.engine_thread import EngineThread
from semipd.errors import RankError
from semipd.parallel.communicator import (
    LOOPBACK,
    Communicator,
    GlooCommunicator,
    NcclCommunicator,
    aborted,
    make_gloo,
    make_nccl,
    warm_up,
)

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for the other ranks, which may be compiling kernels. A rank that died is noticed at
once, in another way."""

MAX_CTAS: Mapping[Phase, int] = MappingProxyType({Phase.PREFILL: 16, Phase.DECODE: 8})
"""CTAs of a collective on a GPU, which take SMs from what computes: 64 MiB are reduced on two H200 in 281 us with
16 and 247 with 32; one of 1 MiB 20 us with 16 and 30 with 8. Decode's smallest partition has 8 SMs."""

_POLL_SECONDS = 0.01  # between looks for what other ranks say while they start
_CLOSE_SECONDS = 10.0  # for NCCL to give its memory back

_Key = tuple[Phase, int | None]
"""A lane, and the CTAs of its collectives; None for what is usual."""


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
        self._communicators: dict[_Key, GlooCommunicator | NcclCommunicator] = {}
        self._aborting: dict[_Key, threading.Thread] = {}
        self._on_abort: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def connect(
        self,
        device: torch.device,
        *,
        max_ctas: Mapping[Phase, int] = MAX_CTAS,
        beside_ctas: Sequence[int] = (),
        alone_ctas: Sequence[int] = (),
    ) -> None:
        """Make the communicators, over NCCL on a GPU and gloo on a CPU, once all ranks are here.

        On a GPU its primary context must be current.

        Args:
            device: of this rank.
            max_ctas: of each lane's usual collectives on a GPU.
            beside_ctas: of others in each lane, for collectives while a product computes.
            alone_ctas: of others in each lane, for collectives that have the device. No number is in both.
        """
        assert not self._communicators, "a group is connected once"
        self.exchange(0)  # or making them would wait for a rank that failed before
        store, shard = self._store, self.shard
        assert store is not None
        if device.type == "cpu":
            for phase in Phase:
                process_group = make_gloo(c10d.PrefixStore(phase, store), shard, self._host, self._timeout)
                self._add((phase, None), GlooCommunicator(process_group, shard))
        else:
            for phase in Phase:
                for num_ctas in (None, *beside_ctas, *alone_ctas):
                    prefix = c10d.PrefixStore(f"{phase}/{num_ctas}", store)
                    size, is_clustered = num_ctas or max_ctas[phase], num_ctas not in beside_ctas
                    process_group = make_nccl(prefix, shard, self._timeout, size, is_clustered=is_clustered)
                    self._add((phase, num_ctas), NcclCommunicator(process_group, shard))
            with torch.cuda.device(device), torch.inference_mode():
                for communicator in self._communicators.values():
                    warm_up(communicator, device)
                torch.cuda.synchronize(device)
        if self._is_aborted.is_set():
            raise aborted()

    def communicator(self, phase: Phase, num_ctas: int | None = None) -> Communicator:
        """The collectives of a lane: on a GPU with so many CTAs, if there are such, and else the usual ones."""
        return self._communicators.get((phase, num_ctas)) or self._communicators[phase, None]

    @contextmanager
    def quiet(self, phase: Phase) -> Iterator[None]:
        """Nobody launches collectives of the lane meanwhile: NCCL (2.28) crashes if a capture of one ends just then."""
        with ExitStack() as stack:
            for (owner, _), communicator in self._communicators.items():
                if owner is phase:
                    stack.enter_context(communicator.lock)
            yield

    def agree_min(self, value: int) -> int:
        """The smallest `value` of all ranks; see `exchange`."""
        return min(self.exchange(value))

    def exchange(self, value: int, *, timeout: float = math.inf) -> list[int]:
        """Every rank's value, by rank; each rank calls this as often as the others.

        Raises:
            RankError: the group was aborted, or others did not come within `timeout` seconds.
        """
        return [int(text) for text in self._exchange(str(value), range(self.shard.world_size), timeout)]

    def share(self, text: str) -> str:
        """What rank 0 passes, on every rank; called like `exchange`, and raises the same."""
        return self._exchange(text, range(1))[0]

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
            for key, communicator in self._communicators.items():
                if key not in self._aborting:
                    # Side by side: on a GPU the end of one waits for the kernels of the others.
                    thread = EngineThread(communicator.abort, f"abort-{key}")
                    self._aborting[key] = thread
                    thread.start()

    def close(self) -> None:
        """Let go of the communicators and the store; no step runs any more, and no graph holds a collective."""
        self.abort()  # with nothing under way it is a close that waits for no other rank
        for thread in self._aborting.values():
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            self._communicators.clear()
        self._store = None

    def _exchange(self, text: str, speakers: range, timeout: float = math.inf) -> list[str]:
        """The texts of the ranks that speak in this round."""
        assert self._store is not None, "the group is closed"
        if self._is_aborted.is_set():  # what it says now could be taken for another round's answer
            raise aborted()
        number = next(self._rounds)
        keys = [f"{number}/{rank}" for rank in speakers]
        if self.shard.rank in speakers:
            self._store.set(keys[self.shard.rank], text)
        deadline = time.monotonic() + timeout
        while not self._store.check(keys):  # and not `wait`, which no other thread could end
            if self._is_aborted.wait(_POLL_SECONDS):
                raise aborted()
            if time.monotonic() > deadline:
                raise RankError(f"other ranks did not come within {timeout:g} s")
        return [self._store.get(key).decode() for key in keys]

    def _add(self, key: _Key, communicator: GlooCommunicator | NcclCommunicator) -> None:
        with self._lock:
            self._communicators[key] = communicator
        if self._is_aborted.is_set():  # which came too early to find it
            self.abort()


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

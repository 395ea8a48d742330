"""Ranks as threads of the test: a `TensorGroup` whose collectives are exact and add in the order of ranks.

One rank computes at a time, until it waits for the others: Triton's interpreter has no room for two.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.kernels.ops import RMSNorm, StepContext
from semipd.kernels.peer_all_reduce import peer_add_norm_reference

if TYPE_CHECKING:
    from semipd.parallel.group import TensorGroup

T = TypeVar("T")
TIMEOUT = 30.0


class Meeting:
    """Where ranks hand tensors to each other."""

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT)
        self._tensors = [torch.empty(0)] * world_size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks as they are now."""
        assert tensor.is_contiguous()
        self._tensors[rank] = tensor.clone()
        self._wait()
        tensors = list(self._tensors)
        self._wait()
        assert len({(part.shape, part.dtype) for part in tensors}) == 1, "ranks take the same steps"
        return tensors

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class ThreadCommunicator:
    """What the linears use of a `Communicator`; counts its calls."""

    def __init__(self, shard: Shard, meeting: Meeting) -> None:
        self.rank, self.world_size = shard.rank, shard.world_size
        self.num_calls: Counter[str] = Counter()
        self._meeting = meeting

    def all_reduce_(self, tensor: Tensor) -> None:
        """The sum, in place."""
        self.num_calls["all_reduce_"] += 1
        total, *others = self._meeting.exchange(self.rank, tensor)
        for other in others:
            total = total + other
        tensor.copy_(total)

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """All, one behind the other."""
        self.num_calls["all_gather"] += 1
        assert out.is_contiguous() and out.shape == (self.world_size * len(tensor), *tensor.shape[1:])
        out.copy_(torch.cat(self._meeting.exchange(self.rank, tensor)))


class ThreadPeerSums:
    """A lane's `PeerSums` by its collectives; notes the halves of the inboxes that calls would use."""

    def __init__(self, communicator: ThreadCommunicator, *, max_rows: int) -> None:
        self.halves: list[int] = []
        self._communicator = communicator
        self.max_rows = max_rows

    def add_norm(
        self, residual_TD: Tensor, partial_TD: Tensor, norm: RMSNorm, context: StepContext, *, half: int
    ) -> Tensor:
        """The residual, normed."""
        self.halves.append(half)
        world_size = self._communicator.world_size
        partials = partial_TD.new_empty(world_size * len(partial_TD), *partial_TD.shape[1:])
        self._communicator.all_gather(partials, partial_TD)
        out_TD = torch.empty_like(residual_TD)
        peer_add_norm_reference(residual_TD, partials.chunk(world_size), norm.weight_D, norm.eps, out_TD)
        return out_TD


class ThreadGroup:
    """One rank's membership."""

    def __init__(self, shard: Shard, meetings: dict[Phase, Meeting]) -> None:
        self.shard = shard
        self.communicators = {phase: ThreadCommunicator(shard, meeting) for phase, meeting in meetings.items()}

    def communicator(self, phase: Phase) -> ThreadCommunicator:
        """The collectives of a lane."""
        return self.communicators[phase]


def run_ranks(world_size: int, body: Callable[[TensorGroup], T]) -> list[T]:
    """What `body` returns on each rank, in their order; of errors the first."""
    meetings = {phase: Meeting(world_size) for phase in Phase}
    for meeting in meetings.values():  # one turn for all
        meeting.turn = meetings[Phase.DECODE].turn
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        group = ThreadGroup(Shard(rank=rank, world_size=world_size), meetings)
        with meetings[Phase.DECODE].turn, torch.inference_mode():
            try:
                results[rank] = body(cast("TensorGroup", group))
            except BaseException as error:
                errors.append(error)
                for meeting in meetings.values():
                    meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]

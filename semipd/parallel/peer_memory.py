"""The sums of small steps over the ranks of one host, through inboxes that the ranks write in each other's memory.

What NCCL takes 10 us for and more, and the norm behind it, is one launch of `kernels/peer_all_reduce.py`. Where ranks
cannot share memory there is none of this, and all sums are NCCL's.

Shapes: T rows of a step, D model dim, W ranks.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from semipd.config import Shard
from semipd.device.peer_memory import PeerMemory, PeerMemoryUnavailable
from semipd.errors import RankError
from semipd.kernels.ops import RMSNorm, StepContext
from semipd.kernels.peer_all_reduce import (
    EMPTY,
    MAX_CTAS,
    WORD_BYTES,
    PeerInboxes,
    config_for,
    half_words,
    max_peer_rows,
    peer_add_norm,
)

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0  # in which the other ranks let go of this one's memory


class Exchange(Protocol):
    """Gives each rank the values of all, by rank, once all have called it; the integers are of any size."""

    def __call__(self, value: int, /, *, timeout: float = ...) -> list[int]:
        """Raises RankError when others do not come within `timeout` seconds, or are gone."""
        ...


class PeerSums:
    """The inboxes of one lane. See `connect_peers` for the arguments, and `kernels.ops.PeerSums`.

    Raises:
        PeerMemoryUnavailable: on all ranks, if any could not map the memory of the others.
    """

    def __init__(
        self, shard: Shard, exchange: Exchange, device: torch.device, *, dim: int, dtype: torch.dtype, max_rows: int
    ) -> None:
        self._exchange = exchange
        self.max_rows = max_rows
        num_words = half_words(max_rows, dim, dtype, shard.world_size)
        with torch.cuda.device(device):
            self._memory, addresses = share_memory(shard, exchange, 2 * num_words * WORD_BYTES, EMPTY)
        with torch.inference_mode(False):  # made in it, a tensor could not be written outside of it
            self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        addresses_W = torch.tensor(addresses, device=device)
        self._inboxes = PeerInboxes(rank=shard.rank, addresses_W=addresses_W, half_words=num_words, stop=self._stop)

    def add_norm(
        self, residual_TD: Tensor, partial_TD: Tensor, norm: RMSNorm, context: StepContext, *, half: int
    ) -> Tensor:
        """See `PeerSums.add_norm`."""
        out_TD = context.buffer("normed", tuple(residual_TD.shape), residual_TD)
        num_ctas = min(context.num_sms, MAX_CTAS)
        num_rows, dim = residual_TD.shape
        config = config_for(num_rows, dim, residual_TD.dtype, self._inboxes.world_size, num_ctas)
        peer_add_norm(
            residual_TD,
            partial_TD,
            norm.weight_D,
            norm.eps,
            out_TD,
            self._inboxes,
            half=half,
            num_ctas=num_ctas,
            config=config,
        )
        return out_TD

    def abort(self) -> None:
        """From any thread: sums that wait, and later ones, end with wrong results instead of waiting."""
        self._stop.fill_(1)

    def raise_if_released(self) -> None:
        """Raise if sums ended without what they waited for: theirs and all later results are wrong.

        Raises:
            RankError: another rank kept them waiting for too long, or they were aborted.
        """
        if self._stop.item():
            raise RankError("a sum over the ranks was aborted, or waited for another rank for too long")

    def close(self) -> None:
        """Give the memory back; no step runs any more, on any rank that is still there."""
        give_back(self._memory, self._exchange)


def connect_peers(
    shard: Shard, exchange: Exchange, device: torch.device, *, dim: int, dtype: torch.dtype
) -> PeerSums | None:
    """The sums of one lane, or None where NCCL is to make them all; all ranks call it, and get the same.

    Args:
        shard: this rank, among ranks on one host.
        exchange: with which the ranks also agree on the end.
        device: the rank's GPU, whose primary context must be current.
        dim: of the residual, like `dtype`.
    """
    max_rows = max_peer_rows(dim, dtype, shard.world_size)
    if max_rows == 0:
        return None
    try:
        return PeerSums(shard, exchange, device, dim=dim, dtype=dtype, max_rows=max_rows)
    except PeerMemoryUnavailable as error:
        logger.warning("small steps are summed over the ranks by NCCL, which takes longer: %s", error)
        return None


def give_back(memory: PeerMemory, exchange: Exchange) -> None:
    """End what `share_memory` began; all ranks that are still there call it."""
    memory.unmap()
    with suppress(RankError):  # a rank that is gone has nothing mapped
        exchange(0, timeout=_CLOSE_SECONDS)
    memory.free()


def share_memory(shard: Shard, exchange: Exchange, num_bytes: int, word: int) -> tuple[PeerMemory, list[int]]:
    """New memory of this rank, full of a word, and the addresses of all ranks' here; all ranks call it.

    Raises:
        PeerMemoryUnavailable: on all ranks, if any could not map the memory of the others.
    """
    memory, problem = None, "another rank could not share its memory"
    try:
        memory = PeerMemory(num_bytes, word)
    except PeerMemoryUnavailable as error:
        problem = str(error)
    handles = exchange(0 if memory is None else 1 + int.from_bytes(memory.handle))  # 0: it has none
    addresses: list[int] = []
    if memory is not None and all(handles):
        try:
            for rank, handle in enumerate(handles):
                is_own = rank == shard.rank
                addresses.append(memory.address if is_own else memory.map((handle - 1).to_bytes(len(memory.handle))))
        except PeerMemoryUnavailable as error:
            problem = str(error)
    have_all = exchange(int(len(addresses) == len(handles)))
    if memory is not None and all(have_all):
        return memory, addresses
    if memory is not None:
        memory.unmap()
    exchange(0)
    if memory is not None:
        memory.free()
    raise PeerMemoryUnavailable(problem)

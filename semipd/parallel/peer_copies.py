"""Rows of a product that go to the other of two GPUs by their copy engines, while the product goes on.

A copy engine moves 0.39 TB/s each way over an H200's NVLink and takes no SM, where NCCL takes 16 for less. Each rank
has memory for the other's rows. What it got is added to its own, and the sum of two values does not depend on their
order: both ranks have the same bits, after one way over the link. Of more than two ranks each would send its rows to
all others, more bytes than an all-reduce has; so there it is NCCL's.

Signals are words that the copy engines write as well: one for each group of rows that has arrived, and one by which
both say, when a product begins, that they have read what came of the last. Who waits for a word makes it 0, so graphs
can replay all of it.

Shapes: T rows of a product, S of a group, D model dim.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from semipd.config import Shard
from semipd.device.peer_memory import PeerMemoryUnavailable
from semipd.kernels.ops import RMSNorm
from semipd.parallel.peer_memory import Exchange, give_back, share_memory
from semipd.parallel.plans import MAX_GROUPS

logger = logging.getLogger(__name__)

_LIMIT = 600.0  # seconds of a wait for the other rank, which may be compiling kernels
_WORD_BYTES = 4
_BEGINS, _TELLS_NOTHING = MAX_GROUPS, MAX_GROUPS + 1  # words behind those of the groups
_NUM_WORDS = MAX_GROUPS + 2


class PeerCopies:
    """The memory of one lane; see `connect_copies`. All methods but `close` are of the current stream.

    Attributes:
        max_bytes: of all rows of a product.
    """

    def __init__(
        self,
        shard: Shard,
        exchange: Exchange,
        device: torch.device,
        flag: Tensor,
        *,
        dim: int,
        dtype: torch.dtype,
        max_rows: int,
    ) -> None:
        from semipd.kernels import rms_norm, stream_wait, triton_util  # Triton, which a CPU need not have

        self._add_norm, self._wait = rms_norm.rms_norm, stream_wait.stream_wait
        self._is_compiling_only = triton_util.is_compiling_only
        self.max_bytes = max_rows * dim * dtype.itemsize
        self._exchange, self._flag = exchange, flag
        self._row_bytes = dim * dtype.itemsize
        self._first_word = -(-self.max_bytes // 128) * 128
        with torch.cuda.device(device), torch.inference_mode(False):
            self._one = torch.ones(1, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)
            self._memory, addresses = share_memory(shard, exchange, self._first_word + _NUM_WORDS * _WORD_BYTES, 0)
            self._other = addresses[1 - shard.rank]
            self._received_TD = self._memory.tensor(0, (max_rows, dim), dtype, device)
            self._words = self._memory.tensor(self._first_word, (_NUM_WORDS,), torch.int32, device)

    def begin(self) -> None:
        """Tell the other rank that this one has read what it got before, and wait until the other has."""
        self._tell(_BEGINS)
        self._wait_for(_BEGINS)

    def send(self, rows_SD: Tensor, first_row: int, group: int) -> None:
        """Write rows to the other rank's memory, from a row of it on, and tell it that this group is there."""
        assert first_row * self._row_bytes + rows_SD.nbytes <= self.max_bytes
        self._copy(first_row * self._row_bytes, rows_SD)
        self._tell(group)

    def receive(self, num_rows: int, first_row: int, group: int) -> Tensor:
        """The other's rows from a row of this rank's memory on, `[S, D]`, behind a wait for their group."""
        self._wait_for(group)
        return self._received_TD[first_row : first_row + num_rows]

    def add_norm(self, residual_SD: Tensor, received_SD: Tensor, norm: RMSNorm, out_SD: Tensor) -> None:
        """Add rows to the residual, and write the sum normed to `out_SD`."""
        self._add_norm(received_SD, norm.weight_D, norm.eps, out_SD, residual_SD)

    def try_sending(self, values: Tensor) -> None:
        """What `send` does for so many values, in full rows or not, but that nobody is told: to be timed."""
        self._copy(0, values)
        self._tell(_TELLS_NOTHING)

    def try_adding(self, values: Tensor) -> None:
        """Add what there is in this rank's memory to so many values: to be timed."""
        values.add_(self._received_TD.flatten()[: len(values)])

    def close(self) -> None:
        """Give the memory back; no step runs any more, on any rank that is still there."""
        give_back(self._memory, self._exchange)

    def _wait_for(self, index: int) -> None:
        self._wait(self._words[index : index + 1], 1, self._flag, limit=_LIMIT)

    def _tell(self, index: int) -> None:
        self._copy(self._first_word + index * _WORD_BYTES, self._one)

    def _copy(self, first_byte: int, source: Tensor) -> None:
        if not self._is_compiling_only():  # nobody would wait for what it says
            self._memory.copy_to(self._other + first_byte, source, torch.cuda.current_stream(source.device).cuda_stream)


def connect_copies(
    shard: Shard,
    exchange: Exchange,
    device: torch.device,
    flag: Tensor,
    *,
    dim: int,
    dtype: torch.dtype,
    max_rows: int,
) -> PeerCopies | None:
    """The copies of one lane, or None where collectives are to move all rows; all ranks call it, and get the same.

    Args:
        shard: this rank, among ranks on one host.
        exchange: with which the ranks also agree on the end.
        device: the rank's GPU, whose primary context must be current.
        flag: int32, one element of pinned memory of the host, that releases the waits; see `stream_wait`.
        dim: of a row, like `dtype`.
        max_rows: of a product.
    """
    if shard.world_size != 2:
        return None
    try:
        return PeerCopies(shard, exchange, device, flag, dim=dim, dtype=dtype, max_rows=max_rows)
    except PeerMemoryUnavailable as error:
        logger.warning("NCCL moves the rows of large steps between the ranks, which takes longer: %s", error)
        return None

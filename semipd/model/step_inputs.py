"""How a step reaches the device: its plain ints in pinned host memory, and one copy of them to static device memory.

A step's rows are its decodes, then its prompt chunks, then padding up to the number of rows of its `StepShape`, for
which a graph may exist. Where decodes end and chunks begin and end is in the copy: a graph depends on the number of
rows alone, and has room for decodes and chunks. A ring of host buffers, each with the event of its last copy, lets the
next step be staged while the copy of this one waits for its turn on the device.

Shapes: T rows of a step, B decode rows, R sampled rows, E prompt chunks, G tiles of prompt rows, U block updates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semipd.config import Phase, Plan
from semipd.kernels.prefill_attention import max_prefill_tiles, prefill_tiles
from semipd.sched.batch import Batch

if TYPE_CHECKING:
    import numpy as np

_RING = 8  # copies on their way; a step makes two or three, and a lane is one step ahead
_MAX_UPDATES = 4096  # block updates of one copy
_ROWS_PER_CHUNK = 16  # on average; steps of shorter chunks have graphs of their own, with room for any number
_FEW_CHUNKS = 16  # which all steps have room for
_UP_TO_512 = (16, 32, 64, 96, *range(128, 257, 16), 320, 384, 512)  # up to 128 are computed while weights are read
_MOST_PADDING = 1.06  # rows over the fewest of a size, from 512 rows on
_MULTIPLES = (128, 64, 32, 16)  # that numbers of rows are rounded to, the first one that the padding allows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the graph of a step's layers is captured for.

    Attributes:
        num_rows: rows, padding included.
        max_decodes: so many of them, the first ones, may be decodes; more than rows is as good as all.
        max_chunks: prompt chunks that there is room for; 0 for a step of decodes alone.
    """

    num_rows: int
    max_decodes: int
    max_chunks: int

    def covers(self, other: StepShape) -> bool:
        """Whether a step of the other shape can run as one of this with more padding."""
        return (
            self.num_rows >= other.num_rows
            and self.max_decodes >= other.max_decodes
            and self.max_chunks >= other.max_chunks
        )


class Buckets:
    """The sizes that a lane's steps are rounded up to.

    Steps of decodes alone have sizes of their own. In all others decodes and chunks share the rows. In the decode lane
    these have room for as many decodes as can run: decode attention has as many CTAs for one context as for hundreds.

    Args:
        max_decodes: most decode rows, chunks and sampled rows of a step.
        max_prompt_rows: most rows of prompt chunks; 0 for a lane that has none.
    """

    def __init__(self, max_decodes: int, max_prompt_rows: int) -> None:
        self._max_decodes = max_decodes
        self._max_prompt_rows = max_prompt_rows
        self._decodes = _decode_sizes(max_decodes)
        self._rows = _row_sizes(max_decodes + max_prompt_rows)

    def padded_rows(self, num_decodes: int, num_prompt_rows: int) -> int:
        """The rows that a step of these computes."""
        return _round_up(num_decodes + num_prompt_rows, self._rows if num_prompt_rows else self._decodes)

    def shape_of(self, batch: Batch) -> StepShape:
        """The shape of a batch."""
        num_decodes = len(batch.decode_slots)
        num_rows = self.padded_rows(num_decodes, batch.num_tokens - num_decodes)
        return self._shape(batch.phase, num_rows, len(batch.prefill))

    def sampled_of(self, batch: Batch) -> int:
        """The rows of its head; 0 if it samples nothing."""
        return _round_up(len(batch.decode_slots) + sum(entry.samples for entry in batch.prefill), self._decodes)

    @property
    def largest(self) -> StepShape:
        """A shape that covers all others."""
        max_chunks = self._max_decodes if self._max_prompt_rows else 0
        return StepShape(num_rows=self._rows[-1], max_decodes=self._max_decodes, max_chunks=max_chunks)

    @property
    def heads(self) -> Sequence[int]:
        """All numbers of sampled rows, padding included, that there are graphs of the head for."""
        return self._decodes

    def samples(self, phase: Phase) -> Iterator[StepShape]:
        """Shapes that between them use every kernel of a lane's layers, the largest first."""
        if self._max_prompt_rows:
            most = self.padded_rows(self._max_decodes if phase is Phase.DECODE else 0, self._max_prompt_rows)
            few = (256, 128, 64, 32, 16) if phase is Phase.PREFILL else ()
            for num_rows in most, *(size for size in few if size in self._rows and size < most):
                yield self._shape(phase, num_rows, self._max_decodes if num_rows == most else 1)
        for size in self.sample_heads() if phase is Phase.DECODE else ():
            yield self._shape(phase, size, 0)

    def sample_heads(self) -> list[int]:
        """Numbers of sampled rows that between them use every kernel of the head; the largest first."""
        powers = (1 << bit for bit in range(self._max_decodes.bit_length() + 1))
        return sorted({_round_up(min(power, self._max_decodes), self._decodes) for power in powers}, reverse=True)

    def usual(self, phase: Phase) -> list[StepShape]:
        """The shapes of steps to have graphs of before they come: all but those of very short chunks.

        The first ones, some sizes apart, stand in for the others while these are captured.
        """
        is_mixed = phase is Phase.DECODE
        decodes = [self._shape(phase, size, 0) for size in self._decodes] if is_mixed else []
        prompts: list[StepShape] = []
        if self._max_prompt_rows:
            most = self._max_prompt_rows
            if is_mixed:  # which decodes are part of: see `Plan.prompt_budget`
                most = self._max_decodes + Plan.mixed(most, 0).prompt_budget(self._max_decodes)
            sizes = self._rows[: bisect_left(self._rows, most) + 1]
            by_need = dict.fromkeys(size for stride in (8, 4, 2, 1) for size in sizes[::-stride])
            prompts = [self._shape(phase, size, 1) for size in by_need]
        return [shape for pair in zip_longest(prompts, decodes) for shape in pair if shape is not None]

    def _shape(self, phase: Phase, num_rows: int, num_chunks: int) -> StepShape:
        if num_chunks == 0:
            return StepShape(num_rows=num_rows, max_decodes=num_rows, max_chunks=0)
        max_chunks = min(max(_FEW_CHUNKS, num_rows // _ROWS_PER_CHUNK), self._max_decodes)
        return StepShape(
            num_rows=num_rows,
            max_decodes=self._max_decodes if phase is Phase.DECODE else 0,
            max_chunks=max_chunks if num_chunks <= max_chunks else self._max_decodes,
        )


class StepInputs:
    """The static device memory that describes a step of one lane, and its host side.

    Attributes:
        token_ids_T: int32, of every row; those of decode rows are written on the device.
        positions_T, slot_mapping_T, context_lens_B: int32, written on the device.
    """

    def __init__(self, buckets: Buckets, *, tile_rows: int, null_slot: int, device: torch.device) -> None:
        largest = buckets.largest
        num_seqs, num_rows = largest.max_decodes, largest.num_rows
        self._num_seqs = num_seqs
        self._tile_rows = tile_rows
        self._null_slot = null_slot
        max_tiles = self._num_tiles(largest)
        num_control = 3 * num_seqs + 4 * (largest.max_chunks + 1) + 4 * max_tiles

        def make(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        with torch.inference_mode(False):
            self._control = make(num_control)
            self.token_ids_T, self.positions_T, self.slot_mapping_T = make(num_rows), make(num_rows), make(num_rows)
            self.context_lens_B = make(num_seqs)
            self._updates = make(1 + 3 * _MAX_UPDATES)
            size = max(num_control, num_rows, len(self._updates))
            self._ring = [_Staging(size, device) for _ in range(_RING)]
        self._next = 0

    # ---- what kernels read

    def decode_slots(self, shape: StepShape) -> Tensor:
        """Request slots of the decode rows."""
        return self._control[: shape.max_decodes]

    def sampled_rows(self, num_sampled: int) -> Tensor:
        """Rows of the step whose hidden states go to the head; -1 for padding."""
        return self._control[self._num_seqs : self._num_seqs + num_sampled]

    def sampled_slots(self, num_sampled: int) -> Tensor:
        """Request slots of those rows."""
        return self._control[2 * self._num_seqs : 2 * self._num_seqs + num_sampled]

    def chunks(self, shape: StepShape) -> Tensor:
        """The prompt chunks and one of padding, `[E + 1, 4]`: see `prefill_inputs`."""
        return self._control[3 * self._num_seqs :][: 4 * (shape.max_chunks + 1)].view(-1, 4)

    def tiles(self, shape: StepShape) -> Tensor:
        """The tiles of prompt rows, `[G, 4]`: see `prefill_tiles`."""
        start = 3 * self._num_seqs + 4 * (shape.max_chunks + 1)
        return self._control[start : start + 4 * self._num_tiles(shape)].view(-1, 4)

    def _num_tiles(self, shape: StepShape) -> int:
        return max_prefill_tiles(shape.num_rows, shape.max_chunks, self._tile_rows) if shape.max_chunks else 0

    # ---- what the host writes

    def stage(self, batch: Batch, shape: StepShape, num_sampled: int) -> None:
        """Copy the step, and `num_sampled` rows for its head, to the device, in the order of the current stream."""
        num_seqs, slots = self._num_seqs, batch.decode_slots
        chunks = []
        rows, sampled_slots = list(range(len(slots))), list(slots)
        row = len(slots)
        for entry in batch.prefill:
            chunks.append((entry.slot, row, len(entry.token_ids), entry.start))
            row += len(entry.token_ids)
            if entry.samples:
                rows.append(row - 1)
                sampled_slots.append(entry.slot)
        if shape.max_chunks:
            self._stage_token_ids(batch, shape)
        staging = self._take_staging()
        control = staging.array
        _fill(control, 0, slots, shape.max_decodes, self._null_slot)
        _fill(control, num_seqs, rows, num_sampled, -1)
        _fill(control, 2 * num_seqs, sampled_slots, num_sampled, self._null_slot)
        used = 2 * num_seqs + num_sampled
        if shape.max_chunks:
            tiles = prefill_tiles(chunks, self._tile_rows)
            chunks.append((self._null_slot, row, shape.num_rows - row, 0))  # the padding
            used = 3 * num_seqs
            for items, size in ((chunks, shape.max_chunks + 1), (tiles, self._num_tiles(shape))):
                _fill(control, used, [value for item in items for value in item], 4 * size, 0)
                used += 4 * size
        staging.copy_to(self._control[:used])

    def _stage_token_ids(self, batch: Batch, shape: StepShape) -> None:
        """Copy the token ids of all rows behind the decodes; decodes know theirs on the device."""
        staging = self._take_staging()
        num_rows = 0
        for entry in batch.prefill:
            staging.array[num_rows : num_rows + len(entry.token_ids)] = entry.token_ids
            num_rows += len(entry.token_ids)
        target = self.token_ids_T[len(batch.decode_slots) : shape.num_rows]
        staging.array[num_rows : len(target)] = 0
        staging.copy_to(target)

    def stage_updates(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Block updates as (`[U, 3]`, their number), each to be applied before the next is asked for."""
        updates = [
            (update.slot, update.index + offset, block_id)
            for update in batch.block_updates
            for offset, block_id in enumerate(update.block_ids)
        ]
        for first in range(0, len(updates), _MAX_UPDATES):
            part = updates[first : first + _MAX_UPDATES]
            staging = self._take_staging()
            staging.array[0] = len(part)
            staging.array[1 : 1 + 3 * len(part)] = [value for update in part for value in update]
            staging.copy_to(self._updates[: 1 + 3 * len(part)])
            yield self._updates[1 : 1 + 3 * len(part)].view(-1, 3), self._updates[:1]

    def _take_staging(self) -> _Staging:
        staging = self._ring[self._next]
        self._next = (self._next + 1) % _RING
        staging.wait()
        return staging


class _Staging:
    """Pinned host memory and the event of the last copy out of it."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._tensor = torch.empty(size, dtype=torch.int32, pin_memory=is_cuda)
        self._event = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]
        self.array = self._tensor.numpy()

    def wait(self) -> None:
        """Return once the last copy is done and the memory may be written."""
        if self._event is not None:
            self._event.synchronize()

    def copy_to(self, target: Tensor) -> None:
        """Copy the first values to device memory, behind what the current stream does."""
        target.copy_(self._tensor[: len(target)], non_blocking=True)
        if self._event is not None:
            self._event.record()


def _fill(
    array: np.ndarray[tuple[int], np.dtype[np.int32]], start: int, values: Sequence[int], size: int, padding: int
) -> None:
    """Write `values` and then padding up to `size` values."""
    end = start + len(values)
    array[start:end] = values
    array[end : start + size] = padding


def _round_up(size: int, buckets: Sequence[int]) -> int:
    return 0 if size == 0 else buckets[bisect_left(buckets, size)]


def _decode_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then by 16, from 128 on by 32, and from 256 on as in `_row_sizes`."""
    sizes = [1, 2, 4, 8, *range(16, 128, 16), *range(128, 256, 32)]
    sizes += [size for size in _row_sizes(largest) if size >= 256]
    return [size for size in sizes if size < largest] + [largest]


def _row_sizes(largest: int) -> list[int]:
    """Few up to 128 rows and from 256 to 512, multiples of 16 between them, and from 512 on up to 6 % of padding.

    Products are computed in tiles, so their time rises in stairs: on an H100 the four of a layer of Llama-3-8B take 207
    us for 256 rows, 244 for 320, 268 for 384 and 307 for 512, but 266 for 288, 294 for 352 and 468 for 448
    (`python -m benchmarks.rows`). From 512 on all numbers of four significant bits are sizes: policies size steps so
    (`sched.sizing.on_grid`), and chunks of long prompts have as many rows as a step may have. Those between them are as
    round as the padding allows.
    """
    sizes = list(_UP_TO_512)
    while (last := sizes[-1]) < largest:
        most = int((last + 1) * _MOST_PADDING)
        round_sizes = (most // multiple * multiple for multiple in _MULTIPLES)
        size = next((size for size in round_sizes if size > last), last + _MULTIPLES[-1])
        spare_bits = last.bit_length() - 4
        sizes.append(min(size, ((last >> spare_bits) + 1) << spare_bits))
    return [size for size in sizes if size < largest] + [largest]

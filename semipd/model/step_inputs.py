"""How a step reaches the device: its plain ints in pinned host memory, and one copy of them to static device memory.

The sizes of a step are rounded up to those of a `StepShape`, for which a graph may exist; what is behind the step's own
rows says that it is padding. A ring of host buffers, each with the event of its last copy, lets the next step be staged
while the copy of this one waits for its turn on the device.

Shapes: T rows of a step, B decode rows, R sampled rows, E prompt chunks, G tiles of prompt rows, U block updates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semipd.config import Phase
from semipd.kernels.prefill_attention import max_prefill_tiles, prefill_tiles
from semipd.sched.batch import Batch

if TYPE_CHECKING:
    import numpy as np

_RING = 8  # copies on their way; a step makes two or three, and a lane is one step ahead
_MAX_UPDATES = 4096  # block updates of one copy
_USUAL_DECODES = (16, 64, 128, 256)  # rows of steps with prompts that have graphs from the start, beside the most
_USUAL_PROMPTS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
_USUAL_ENTRIES = 16
_FEWEST_BESIDE_DECODES = 64  # prompt rows that have graphs from the start; fewer are as fast as these
_FINE_PADDING = 1.06  # between prompt buckets from 512 rows on


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The padded sizes of a step: what a graph is captured for.

    Attributes:
        num_decodes: decode rows.
        num_prompt_rows: rows of prompt chunks.
        num_entries: prompt chunks.
        num_sampled: rows of the head; 0 for a step that samples nothing.
    """

    num_decodes: int
    num_prompt_rows: int
    num_entries: int
    num_sampled: int

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.num_decodes + self.num_prompt_rows

    def covers(self, other: StepShape) -> bool:
        """Whether a step of the other shape, and of the same kind, can run as one of this with more padding."""
        return (
            self.num_decodes >= other.num_decodes
            and self.num_prompt_rows >= other.num_prompt_rows
            and self.num_entries >= other.num_entries
            and (self.num_decodes > 0) is (other.num_decodes > 0)
        )


class Buckets:
    """The sizes that steps are rounded up to, up to the largest that a lane can have."""

    def __init__(self, max_decodes: int, max_prompt_rows: int) -> None:
        self._decodes = _decode_buckets(max_decodes)
        self._prompt_rows = _prompt_buckets(max_prompt_rows)
        self._entries = [size for size in (1, 4, 16, 64, 256) if size < max_decodes] + [max_decodes]

    def rounded(self, num_decodes: int, num_prompt_rows: int) -> tuple[int, int]:
        """The rows that a step of so many has."""
        return _round_up(num_decodes, self._decodes), _round_up(num_prompt_rows, self._prompt_rows)

    def shape_of(self, batch: Batch) -> StepShape:
        """The shape of a batch."""
        num_sampled = len(batch.decode_slots) + sum(entry.samples for entry in batch.prefill)
        num_decodes, num_prompt_rows = self.rounded(len(batch.decode_slots), batch.num_tokens - len(batch.decode_slots))
        return StepShape(
            num_decodes=num_decodes,
            num_prompt_rows=num_prompt_rows,
            num_entries=_round_up(len(batch.prefill), self._entries),
            num_sampled=_round_up(num_sampled, self._decodes),
        )

    @property
    def largest(self) -> StepShape:
        """The largest of every size."""
        return StepShape(
            num_decodes=self._decodes[-1],
            num_prompt_rows=self._prompt_rows[-1] if self._prompt_rows else 0,
            num_entries=self._entries[-1],
            num_sampled=self._decodes[-1],
        )

    def samples(self, phase: Phase) -> Iterator[StepShape]:
        """Shapes that between them use every kernel of a lane, the largest first."""
        largest = self.largest
        if phase is Phase.PREFILL:
            yield replace(largest, num_decodes=0)
            for size in self._prompt_rows[-1], *(size for size in (256, 128, 64, 32, 16) if size in self._prompt_rows):
                yield StepShape(num_decodes=0, num_prompt_rows=size, num_entries=1, num_sampled=1)
            return
        if largest.num_prompt_rows:
            yield largest
        powers = (1 << bit for bit in range(largest.num_decodes.bit_length() + 1))
        sizes = {_round_up(min(power, largest.num_decodes), self._decodes) for power in powers}
        for size in sorted(sizes, reverse=True):
            yield StepShape(num_decodes=size, num_prompt_rows=0, num_entries=0, num_sampled=size)

    def usual(self, phase: Phase) -> Iterator[StepShape]:
        """Shapes of whole steps to have graphs of before they come: all of decodes, and of prompts a few sizes."""
        for size in self._decodes if phase is Phase.DECODE else ():
            yield StepShape(num_decodes=size, num_prompt_rows=0, num_entries=0, num_sampled=size)
        decodes = [size for size in _USUAL_DECODES if size < self._decodes[-1]] + [self._decodes[-1]]
        num_entries = _round_up(min(_USUAL_ENTRIES, self._entries[-1]), self._entries)
        fewest = _FEWEST_BESIDE_DECODES if phase is Phase.DECODE else 0
        largest = self.largest.num_prompt_rows
        sizes = [_round_up(size, self._prompt_rows) for size in _USUAL_PROMPTS if fewest <= size <= largest]
        for rows in dict.fromkeys((*sizes, largest)) if largest else ():
            for size in (0, *decodes) if phase is Phase.DECODE else (0,):
                yield StepShape(
                    num_decodes=size, num_prompt_rows=rows, num_entries=num_entries, num_sampled=max(size, 1)
                )


class StepInputs:
    """The static device memory that describes a step of one lane, and its host side.

    Attributes:
        token_ids_T: int32, of every row; those of decode rows are written on the device.
        positions_T, slot_mapping_T, context_lens_B: int32, written on the device.
    """

    def __init__(self, buckets: Buckets, *, tile_rows: int, null_slot: int, device: torch.device) -> None:
        largest = buckets.largest
        num_seqs, num_rows = largest.num_decodes, largest.num_decodes + largest.num_prompt_rows
        self._num_seqs = num_seqs
        self._tile_rows = tile_rows
        self._null_slot = null_slot
        max_tiles = self._num_tiles(largest)
        num_control = 3 * num_seqs + 4 * largest.num_entries + 4 * max_tiles

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
        return self._control[: shape.num_decodes]

    def sampled_rows(self, shape: StepShape) -> Tensor:
        """Rows of the step whose hidden states go to the head; -1 for padding."""
        return self._control[self._num_seqs : self._num_seqs + shape.num_sampled]

    def sampled_slots(self, shape: StepShape) -> Tensor:
        """Request slots of those rows."""
        return self._control[2 * self._num_seqs : 2 * self._num_seqs + shape.num_sampled]

    def entries(self, shape: StepShape) -> Tensor:
        """The prompt chunks, `[E, 4]`: see `prefill_inputs`."""
        return self._control[3 * self._num_seqs :][: 4 * shape.num_entries].view(-1, 4)

    def tiles(self, shape: StepShape) -> Tensor:
        """The tiles of prompt rows, `[G, 4]`: see `prefill_tiles`."""
        start = 3 * self._num_seqs + 4 * shape.num_entries
        return self._control[start : start + 4 * self._num_tiles(shape)].view(-1, 4)

    def _num_tiles(self, shape: StepShape) -> int:
        return max_prefill_tiles(shape.num_prompt_rows, shape.num_entries, self._tile_rows)

    # ---- what the host writes

    def stage(self, batch: Batch, shape: StepShape) -> None:
        """Copy the step to the device, in the order of the current stream."""
        staging = self._take_staging()
        control = staging.array
        num_seqs, slots = self._num_seqs, batch.decode_slots
        _fill(control, 0, slots, shape.num_decodes, self._null_slot)
        rows, sampled_slots = list(range(len(slots))), list(slots)
        used = 2 * num_seqs + shape.num_sampled
        if batch.prefill:
            chunks = self._stage_prompts(batch, shape, rows, sampled_slots)
            used = 3 * num_seqs
            flat = [value for chunk in chunks for value in chunk]
            _fill(control, used, flat, 4 * shape.num_entries, 0)
            used += 4 * shape.num_entries
            tiles = [value for tile in prefill_tiles(chunks, self._tile_rows) for value in tile]
            _fill(control, used, tiles, 4 * self._num_tiles(shape), 0)
            used += 4 * self._num_tiles(shape)
        _fill(control, num_seqs, rows, shape.num_sampled, -1)
        _fill(control, 2 * num_seqs, sampled_slots, shape.num_sampled, self._null_slot)
        staging.copy_to(self._control[:used])

    def _stage_prompts(
        self, batch: Batch, shape: StepShape, rows: list[int], sampled_slots: list[int]
    ) -> list[tuple[int, int, int, int]]:
        """Copy the prompts' token ids; their chunks as (slot, first prompt row, rows, start), and who samples."""
        staging = self._take_staging()
        chunks = []
        row = 0
        for entry in batch.prefill:
            num_rows = len(entry.token_ids)
            staging.array[row : row + num_rows] = entry.token_ids
            chunks.append((entry.slot, row, num_rows, entry.start))
            row += num_rows
            if entry.samples:
                rows.append(shape.num_decodes + row - 1)
                sampled_slots.append(entry.slot)
        staging.array[row : shape.num_prompt_rows] = 0
        staging.copy_to(self.token_ids_T[shape.num_decodes : shape.num_decodes + shape.num_prompt_rows])
        return chunks

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


def _decode_buckets(largest: int) -> list[int]:
    """1, 2, 4, 8, then by 16, from 128 on by 32."""
    sizes = [1, 2, 4, 8, *range(16, 128, 16), *range(128, largest + 32, 32)]
    return [size for size in sizes if size < largest] + [largest]


def _prompt_buckets(largest: int) -> list[int]:
    """By a fifth at most below 512 rows, from there on by 6 %, in multiples of 16."""
    if largest == 0:
        return []
    sizes = [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 304, 352, 416, 464, 512]
    while sizes[-1] < largest:
        sizes.append(int(sizes[-1] * _FINE_PADDING) // 16 * 16)
    return [size for size in sizes if size < largest] + [largest]

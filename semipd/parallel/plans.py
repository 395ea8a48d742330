"""How a product is cut so that its collective hides behind it, and what such a cut is for: plain numbers.

The rows of the product come in blocks, as its kernel computes them, and groups of blocks leave one after another.

Shapes: M rows of the product, N outputs, K inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

BLOCK_M, BLOCK_N = 128, 256
"""Rows and outputs of a tile."""

MAX_GROUPS = 5


class Collective(StrEnum):
    """What becomes of the rows of a product."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product and its collective run.

    Attributes:
        ends: behind which block of `BLOCK_M` rows each group ends, for a product of `ends[-1]` such blocks. With one
            group, or none, the collective follows the product.
        reserved: SMs that the product leaves to the collectives once the first group is done: as many as they have
            CTAs.
        copies: whether the copy engines carry the groups to the other GPU, which needs no SM, instead of collectives.
    """

    ends: tuple[int, ...] = ()
    reserved: int = 0
    copies: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether there is more than one group."""
        return len(self.ends) > 1

    @property
    def num_waiting(self) -> int:
        """SMs that the product leaves to the waits for its groups from the start.

        Its programs take all registers of their SMs. Beside them no wait would begin before the first of them end,
        which those of reserved SMs do in time.
        """
        return int(self.overlaps and self.copies)

    def row_ends(self, num_rows: int) -> tuple[int, ...]:
        """Behind which row each group ends in a product of `num_rows`, which may be other than the plan is for."""
        if not self.overlaps:
            return (num_rows,)
        blocks = -(-num_rows // BLOCK_M)
        inner = (round(end / self.ends[-1] * blocks) for end in self.ends[:-1])
        ends = sorted({end * BLOCK_M for end in inner if 0 < end < blocks})
        return (*ends, num_rows)

    def __str__(self) -> str:
        if not self.overlaps:
            return "copies" if self.copies else "sequence"
        sizes = (end - start for start, end in itertools.pairwise((0, *self.ends)))
        return "+".join(map(str, sizes)) + ("/copies" if self.copies else f"/{self.reserved}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """A plan that was made values of JSON by `asdict`."""
        return cls(tuple(map(int, values["ends"])), int(values["reserved"]), bool(values["copies"]))


SEQUENCE = Plan()
"""The product, then one collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a plan is for, and the key that it is remembered by.

    Attributes:
        device: its full name.
        num_rows: of the product; see `bucket`.
        num_outputs: of the weight.
        num_inputs: of this rank.
        dtype: of the product, as torch names it.
        world_size: ranks.
        num_sms: of the partition.
        collective: that follows.
        ctas: of the collectives that may run beside the product, to choose from.
        has_copies: whether copies are a choice.
    """

    device: str
    num_rows: int
    num_outputs: int
    num_inputs: int
    dtype: str
    world_size: int
    num_sms: int
    collective: Collective
    ctas: tuple[int, ...]
    has_copies: bool = False

    @property
    def num_blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.num_rows // BLOCK_M)

    @property
    def num_columns(self) -> int:
        """Tiles of a block of rows."""
        return -(-self.num_outputs // BLOCK_N)

    def num_bytes(self, num_blocks: int) -> int:
        """Of the outputs of so many blocks of rows."""
        return min(num_blocks * BLOCK_M, self.num_rows) * self.num_outputs * 2

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Problem:
        """A problem that was made values of JSON by `asdict`."""
        ctas = tuple(map(int, values["ctas"]))
        return cls(**{**values, "collective": Collective(values["collective"]), "ctas": ctas})


def bucket(num_rows: int) -> int:
    """The number of rows whose plan is good for so many: the nearest power of two or middle between two of them."""
    power = 1 << max(num_rows - 1, 1).bit_length()
    return min((power // 2, power * 3 // 4, power), key=lambda size: max(size / num_rows, num_rows / size))

"""The row-parallel layers of a decoder with products that overlap with their sums over the ranks.

Shapes: T rows of a step, I inputs (of this rank), O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from semipd.config import Phase
from semipd.kernels.ops import Ops, RMSNorm, StepContext
from semipd.parallel.overlap import ALONE_CTAS, Communicators, OverlappedLinear, Release, SideStreams
from semipd.parallel.plans import SEQUENCE, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from semipd.parallel.group import TensorGroup
    from semipd.parallel.peer_copies import PeerCopies


class Planner(Protocol):
    """Knows a plan for each product, the same on all ranks and at every call."""

    def plan(self, num_rows: int, weight_OI: Tensor, context: StepContext) -> Plan | None:
        """How to run the product of so many rows and its all-reduce.

        None in a step that is too small, or does not have the device for itself and shares its SMs with collectives:
        the sequence, by usual collectives.
        """
        ...


class OverlappedProduct:
    """The product of a row-parallel layer with its all-reduce: a `RowParallelProduct`."""

    def __init__(
        self,
        linear: OverlappedLinear,
        weight_OI: Tensor,
        group: TensorGroup,
        planner: Planner,
        copies: Mapping[Phase, PeerCopies],
    ) -> None:
        self.write_ = linear.write_
        self._linear = linear
        self._weight_OI = weight_OI
        self._group = group
        self._planner = planner
        self._copies = copies

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        """See `RowParallelProduct`."""
        plan = self._planner.plan(len(x_TI), self._weight_OI, context)
        communicators = lane_communicators(self._group, context, plan, self._copies)
        return self._linear.add_norm(residual_TO, x_TI, norm, communicators, plan or SEQUENCE, context)


def lane_communicators(
    group: TensorGroup, context: StepContext, plan: Plan | None, copies: Mapping[Phase, PeerCopies]
) -> Communicators:
    """What the lane of `context` communicates by, in a step that may have no plan."""
    if plan is None:
        usual = group.communicator(context.phase)
        return Communicators(usual, usual)
    return Communicators(
        group.communicator(context.phase, plan.reserved),
        group.communicator(context.phase, ALONE_CTAS),
        copies.get(context.phase),
    )


class OverlappedProducts:
    """Makes them: a `RowParallelProducts`.

    Args:
        planner: whose plans by copies are for the lanes that `copies` has.
        copies: of each lane that can have products for them.
    """

    def __init__(
        self,
        planner: Planner,
        sides: SideStreams | None,
        release: Release | None,
        copies: Mapping[Phase, PeerCopies] = MappingProxyType({}),
    ) -> None:
        self._planner = planner
        self._sides = sides
        self._release = release
        self._copies = copies

    def __call__(self, weight_OI: Tensor, bias_O: Tensor | None, *, ops: Ops, group: TensorGroup) -> OverlappedProduct:
        """See `RowParallelProducts`."""
        linear = OverlappedLinear(
            weight_OI, bias_O, ops=ops, adds=group.shard.rank == 0, sides=self._sides, release=self._release
        )
        return OverlappedProduct(linear, weight_OI, group, self._planner, self._copies)

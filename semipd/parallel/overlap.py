"""A product and the collective of its rows, group by group: while one group is under way, the next is computed.

One launch computes the whole product and counts, for each group of rows, what is there (`kernels/gemm_signal.py`). On a
second stream of the same partition a wait for each counter is followed by a collective of those rows:

    stream   |---------------- product ----------------|                          |- next layer
    side       wait 0 |- rows of 0 -| wait 1 |- rows of 1 -| ... |- rows of the last -|

The last collective waits for the product itself, whose SMs are free by then. The counters are zeroed for the next
product behind the last wait, while collectives still run.

Without a second group, on a CPU and on GPUs other than Hopper it is a plain product and a plain collective for each
group: the same interface, and the same results but for rounding.

Shapes: T rows, I inputs (of this rank), O outputs, S rows of a rank, T / W; W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from semipd.errors import RankError
from semipd.kernels.ops import Ops, StepContext
from semipd.parallel.plans import BLOCK_M, BLOCK_N, MAX_GROUPS, SEQUENCE, Plan

if TYPE_CHECKING:
    from semipd.kernels.gemm_signal import GemmSignalConfig
    from semipd.parallel.communicator import Communicator
    from semipd.parallel.group import TensorGroup

BESIDE_CTAS = (8, 16)
"""CTAs of collectives beside a product, to choose from. Products many times as long as their collective lose less to 8;
24 were predicted to be no better for any shape but one of a few waves."""

ALONE_CTAS = 32
"""CTAs of a collective that has the device: as many as NCCL takes by itself, or a few more."""

DEFAULT_LIMIT = 30.0
"""Seconds that a wait for a group may take."""


class Collect(Protocol):
    """Launches the collective of a group's rows on the current stream."""

    def __call__(self, start: int, end: int, communicator: Communicator) -> None:
        """Of the rows from `start` to `end`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Communicators:
    """Which collectives take which share of the device.

    Attributes:
        beside: on few SMs, while a product computes.
        alone: when no product does: for the last group, and without overlap.
    """

    beside: Communicator
    alone: Communicator


class SideStreams(Protocol):
    """Second streams on the SMs of others."""

    def beside(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        """A stream on the SMs of `stream`, the same at every call, that nobody uses beside another stream."""
        ...


class Release:
    """Ends all waits of streams for products, from any thread: those that wait and those to come.

    What the streams compute from then on is garbage.

    Args:
        device: of the streams.
        limit: seconds that a wait may take before it releases all by itself.
    """

    def __init__(self, device: torch.device, *, limit: float = DEFAULT_LIMIT) -> None:
        self.limit = limit
        with torch.inference_mode(False):  # made in it, a tensor could not be written outside of it
            self.flag = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def set(self) -> None:
        """Let all waits pass."""
        self.flag.fill_(1)

    @property
    def is_set(self) -> bool:
        """Whether waits pass, as they also do once one of them has reached its time limit."""
        return bool(self.flag.item())

    def check(self) -> None:
        """Raise if waits pass: what the streams have computed may be garbage."""
        if self.is_set:
            raise RankError(f"a product was not there after {self.limit:g} s, or the ranks no longer compute together")


class OverlappedLinear:
    """A weight of which each rank has some inputs, with what becomes of its product.

    Args:
        adds: whether `all_reduce_` adds this rank's product to what is there.
        sides: None computes and communicates in turns.
        release: ends the waits.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None = None,
        *,
        ops: Ops,
        adds: bool,
        sides: SideStreams | None = None,
        release: Release | None = None,
    ) -> None:
        packed = ops.pack_linear(weight_OI, bias_O)
        self.write_ = packed.write_
        self._add = packed.add_
        self._weight_OI, self._bias_O = weight_OI, bias_O
        self._adds = adds
        self._signals = None if sides is None or release is None else _Signals(sides, release)

    def all_reduce_(
        self, residual_TO: Tensor, x_TI: Tensor, communicators: Communicators, plan: Plan, context: StepContext
    ) -> None:
        """Leaves in `residual_TO`, on every rank, the products of all and what those that add had there."""

        def collect(start: int, end: int, communicator: Communicator) -> None:
            communicator.all_reduce_(residual_TO[start:end])

        self._run(residual_TO, x_TI, plan, collect, communicators, context, adds=self._adds)

    def reduce_scatter(
        self, out_SO: Tensor, x_TI: Tensor, communicators: Communicators, plan: Plan, context: StepContext
    ) -> None:
        """Writes the sum of all products in the rows that are this rank's, `owned_rows`, to `out_SO`."""
        product_TO = self._buffer(x_TI, context)
        world_size = communicators.alone.world_size
        assert len(x_TI) % world_size == 0, "each rank gets as many rows of the last group too"

        def collect(start: int, end: int, communicator: Communicator) -> None:
            communicator.reduce_scatter(out_SO[start // world_size : end // world_size], product_TO[start:end])

        self._run(product_TO, x_TI, plan, collect, communicators, context)

    def all_to_all(
        self, out_TO: Tensor, x_TI: Tensor, communicators: Communicators, plan: Plan, context: StepContext
    ) -> None:
        """Sends the rows of this rank's product that are another's, `owned_rows`, to it.

        A group's rows come to lie in `out_TO` where the group has its own, those of rank 0 first.
        """
        product_TO = self._buffer(x_TI, context)
        world_size = communicators.alone.world_size

        def collect(start: int, end: int, communicator: Communicator) -> None:
            splits = [(end - start) // world_size] * world_size
            communicator.all_to_all(out_TO[start:end], product_TO[start:end], splits, splits)

        self._run(product_TO, x_TI, plan, collect, communicators, context)

    def _buffer(self, x_TI: Tensor, context: StepContext) -> Tensor:
        return context.buffer("overlapped_product", (len(x_TI), len(self._weight_OI)), x_TI)

    def _run(
        self,
        out_TO: Tensor,
        x_TI: Tensor,
        plan: Plan,
        collect: Collect,
        communicators: Communicators,
        context: StepContext,
        *,
        adds: bool = False,
    ) -> None:
        ends = plan.row_ends(len(x_TI)) if plan.overlaps else (len(x_TI),)
        if self._signals is not None:
            # Also for plans without signals: memory is made in a lane's first steps, and not while one is captured.
            counters_G = context.buffer("overlap_counters", (MAX_GROUPS,), x_TI, torch.int32)
            config = self._signals.config(x_TI, self._weight_OI, out_TO)
            if len(ends) > 1 and config is not None:
                residual_TO = out_TO if adds else None
                product = (x_TI, self._weight_OI, out_TO, residual_TO, self._bias_O)
                self._signals.run(product, counters_G, config, plan, ends, collect, communicators, context)
                return
            ends = (len(x_TI),)
        multiply = self._add if adds else self.write_
        for start, end in pairwise((0, *ends)):
            multiply(out_TO[start:end], x_TI[start:end], context)
            collect(start, end, communicators.alone)


class _Signals:
    """The product on the current stream, the collectives on a second one."""

    def __init__(self, sides: SideStreams, release: Release) -> None:
        from semipd.kernels import gemm_signal, stream_wait  # Triton, which a CPU need not have

        self._gemm, self._wait = gemm_signal, stream_wait
        self._sides = sides
        self._release = release

    def config(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> GemmSignalConfig | None:
        """How the product is cut; None where a plain one is faster."""
        config = self._gemm.config_for(x_TI, weight_OI, out_TO)
        return config if config.uses_hopper and (config.block_m, config.block_n) == (BLOCK_M, BLOCK_N) else None

    def run(
        self,
        product: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        counters_G: Tensor,
        config: GemmSignalConfig,
        plan: Plan,
        ends: Sequence[int],
        collect: Collect,
        communicators: Communicators,
        context: StepContext,
    ) -> None:
        """Launch all; behind it the current stream goes on when the last collective has ended."""
        x_TI, weight_OI, out_TO, residual_TO, bias_O = product
        stream = torch.cuda.current_stream(x_TI.device)
        side = self._sides.beside(stream)
        side.wait_event(stream.record_event())
        # Before the waits: behind one on the same hardware queue it would never start.
        self._gemm.gemm_signal(
            x_TI,
            weight_OI,
            out_TO,
            counters_G,
            group_ends=ends,
            num_sms=context.num_sms,
            num_reserved=plan.reserved,
            config=config,
            residual_TO=residual_TO,
            bias_O=bias_O,
        )
        computed = stream.record_event()
        targets = self._gemm.signal_targets(ends, len(weight_OI), config)
        with torch.cuda.stream(side):
            for i, (start, end) in enumerate(pairwise((0, *ends[:-1]))):
                self._wait.stream_wait(counters_G[i : i + 1], targets[i], self._release.flag, limit=self._release.limit)
                waited = side.record_event()
                collect(start, end, communicators.beside)
            side.wait_event(computed)
            collect(ends[-2], ends[-1], communicators.alone)
        stream.wait_event(waited)
        counters_G.zero_()
        stream.wait_stream(side)


class Planner(Protocol):
    """Knows a plan for each product, the same on all ranks and at every call."""

    def plan(self, num_rows: int, weight_OI: Tensor, context: StepContext) -> Plan | None:
        """How to run the product of so many rows and its all-reduce.

        None in a step that does not have the device for itself, or is too small: the sequence, by usual collectives.
        """
        ...


class OverlappedProduct:
    """The product of a row-parallel layer with its all-reduce: a `RowParallelProduct`."""

    def __init__(self, linear: OverlappedLinear, weight_OI: Tensor, group: TensorGroup, planner: Planner) -> None:
        self.write_ = linear.write_
        self._linear = linear
        self._weight_OI = weight_OI
        self._group = group
        self._planner = planner

    def __call__(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """See `RowParallelProduct`."""
        plan = self._planner.plan(len(x_TI), self._weight_OI, context)
        self._linear.all_reduce_(
            residual_TO, x_TI, lane_communicators(self._group, context, plan), plan or SEQUENCE, context
        )


def lane_communicators(group: TensorGroup, context: StepContext, plan: Plan | None) -> Communicators:
    """What the lane of `context` communicates by, in a step that may have no plan."""
    if plan is None:
        usual = group.communicator(context.phase)
        return Communicators(usual, usual)
    return Communicators(
        group.communicator(context.phase, plan.reserved), group.communicator(context.phase, ALONE_CTAS)
    )


class OverlappedProducts:
    """Makes them: a `RowParallelProducts`."""

    def __init__(self, planner: Planner, sides: SideStreams | None, release: Release | None) -> None:
        self._planner = planner
        self._sides = sides
        self._release = release

    def __call__(self, weight_OI: Tensor, bias_O: Tensor | None, *, ops: Ops, group: TensorGroup) -> OverlappedProduct:
        """See `RowParallelProducts`."""
        linear = OverlappedLinear(
            weight_OI, bias_O, ops=ops, adds=group.shard.rank == 0, sides=self._sides, release=self._release
        )
        return OverlappedProduct(linear, weight_OI, group, self._planner)


def owned_rows(row_ends: Sequence[int], rank: int, world_size: int) -> Iterator[range]:
    """The rows of a product that `reduce_scatter` leaves to a rank: of each group, one of W equal parts.

    They follow each other in its output, those of group g from row `row_ends[g - 1] / W` on.
    """
    for start, end in pairwise((0, *row_ends)):
        size = (end - start) // world_size
        yield range(start + rank * size, start + (rank + 1) * size)


def all_gather(out_TO: Tensor, own_SO: Tensor, row_ends: Sequence[int], communicator: Communicator) -> None:
    """Writes to `out_TO` the rows that `reduce_scatter` left to the ranks, each where the product had it."""
    world_size = communicator.world_size
    for start, end in pairwise((0, *row_ends)):
        communicator.all_gather(out_TO[start:end], own_SO[start // world_size : end // world_size])

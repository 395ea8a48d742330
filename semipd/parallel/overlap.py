"""A product and the collective of its rows, group by group: while one group is under way, the next is computed.

One launch computes the whole product and counts, for each group of rows, what is there (`kernels/gemm_signal.py`). On a
second stream of the same partition a wait for each counter is followed by a collective of those rows:

    stream   |---------------- product ----------------|                          |- next layer
    side       wait 0 |- rows of 0 -| wait 1 |- rows of 1 -| ... |- rows of the last -|

The last collective waits for the product itself, whose SMs are free by then.

Between two GPUs the rows may also go by copy engines (`parallel/peer_copies.py`), which take no SM. Then each rank adds
what it got, group by group behind the product, while the last groups are still on their way.

The engine sums by `add_norm`. The other collectives are for who builds on it; tests and benchmarks run them.

Without a second group, on a CPU and on GPUs other than Hopper it is a plain product and a plain collective for each
group: the same interface, and the same results but for rounding.

Shapes: T rows, I inputs (of this rank), O outputs, S rows of a rank, T / W; W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from semipd.errors import RankError
from semipd.kernels.ops import Ops, RMSNorm, StepContext
from semipd.parallel.plans import BLOCK_M, BLOCK_N, MAX_GROUPS, Plan

if TYPE_CHECKING:
    from semipd.kernels.gemm_signal import GemmSignalConfig
    from semipd.parallel.communicator import Communicator
    from semipd.parallel.peer_copies import PeerCopies

BESIDE_CTAS = (8, 16)
"""CTAs of collectives beside a product, to choose from. Products many times as long as their collective lose less to 8;
24 were predicted to be no better for any shape but one of a few waves."""

ALONE_CTAS = 32
"""CTAs of a collective that has the device: as many as NCCL takes by itself, or a few more."""

DEFAULT_LIMIT = 30.0
"""Seconds that a wait for a group may take."""


class Collect(Protocol):
    """Launches the collective of a group's rows on the current stream."""

    def __call__(self, start: int, end: int, *, beside: bool) -> None:
        """Of the rows from `start` to `end`; while the product computes others, or when it has ended."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Communicators:
    """Which collectives take which share of the device.

    Attributes:
        beside: on few SMs, while a product computes.
        alone: when no product does: for the last group, and without overlap.
        copies: for plans by copies.
    """

    beside: Communicator
    alone: Communicator
    copies: PeerCopies | None = None

    def pick(self, beside: bool) -> Communicator:
        """The one for a collective beside a product, or alone."""
        return self.beside if beside else self.alone


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
            raise RankError(
                f"a step was released from waiting: for a product, after {self.limit:g} s, for another rank's rows, or "
                "because the ranks no longer compute together; make a new engine"
            )


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

        def collect(start: int, end: int, *, beside: bool) -> None:
            communicators.pick(beside).all_reduce_(residual_TO[start:end])

        def add(start: int, end: int, received_SO: Tensor) -> None:
            residual_TO[start:end].add_(received_SO)

        if plan.copies:
            self._send_and_add(residual_TO, x_TI, _all_rows, add, communicators.copies, plan, context, adds=self._adds)
        else:
            self._run(residual_TO, x_TI, plan, collect, context, adds=self._adds)

    def add_norm(
        self,
        residual_TO: Tensor,
        x_TI: Tensor,
        norm: RMSNorm,
        communicators: Communicators,
        plan: Plan,
        context: StepContext,
    ) -> Tensor:
        """The same, and the new residual normed."""
        copies = communicators.copies
        if not plan.copies:
            self.all_reduce_(residual_TO, x_TI, communicators, plan, context)
            return norm(residual_TO, context)
        assert copies is not None
        out_TO = context.buffer("normed", tuple(residual_TO.shape), residual_TO)

        def add(start: int, end: int, received_SO: Tensor) -> None:
            copies.add_norm(residual_TO[start:end], received_SO, norm, out_TO[start:end])

        self._send_and_add(residual_TO, x_TI, _all_rows, add, copies, plan, context, adds=self._adds)
        return out_TO

    def reduce_scatter(
        self, out_SO: Tensor, x_TI: Tensor, communicators: Communicators, plan: Plan, context: StepContext
    ) -> None:
        """Writes the sum of all products in the rows that are this rank's, `owned_rows`, to `out_SO`."""
        product_TO = self._buffer(x_TI, context)
        world_size, rank = communicators.alone.world_size, communicators.alone.rank
        assert len(x_TI) % world_size == 0, "each rank gets as many rows of the last group too"

        def collect(start: int, end: int, *, beside: bool) -> None:
            own_SO = out_SO[start // world_size : end // world_size]
            communicators.pick(beside).reduce_scatter(own_SO, product_TO[start:end])

        def others(start: int, end: int) -> tuple[int, int, int]:
            size = (end - start) // world_size
            first = start + (1 - rank) * size
            return first, first + size, start // world_size

        def add(start: int, end: int, received_SO: Tensor) -> None:
            first = start + rank * len(received_SO)
            own = slice(start // world_size, end // world_size)
            torch.add(product_TO[first : first + len(received_SO)], received_SO, out=out_SO[own])

        if plan.copies:
            self._send_and_add(product_TO, x_TI, others, add, communicators.copies, plan, context)
        else:
            self._run(product_TO, x_TI, plan, collect, context)

    def all_to_all(
        self, out_TO: Tensor, x_TI: Tensor, communicators: Communicators, plan: Plan, context: StepContext
    ) -> None:
        """Sends the rows of this rank's product that are another's, `owned_rows`, to it.

        A group's rows come to lie in `out_TO` where the group has its own, those of rank 0 first.
        """
        assert not plan.copies, "copies are for sums"
        product_TO = self._buffer(x_TI, context)
        world_size = communicators.alone.world_size

        def collect(start: int, end: int, *, beside: bool) -> None:
            splits = [(end - start) // world_size] * world_size
            communicators.pick(beside).all_to_all(out_TO[start:end], product_TO[start:end], splits, splits)

        self._run(product_TO, x_TI, plan, collect, context)

    def _buffer(self, x_TI: Tensor, context: StepContext) -> Tensor:
        return context.buffer("overlapped_product", (len(x_TI), len(self._weight_OI)), x_TI)

    def _run(
        self, out_TO: Tensor, x_TI: Tensor, plan: Plan, collect: Collect, context: StepContext, *, adds: bool = False
    ) -> None:
        """The product and all collectives."""
        *_, last = self._launch(out_TO, x_TI, plan, collect, context, adds=adds)
        last.wait(x_TI.device)

    def _send_and_add(
        self,
        out_TO: Tensor,
        x_TI: Tensor,
        sent: Callable[[int, int], tuple[int, int, int]],
        add: Callable[[int, int, Tensor], None],
        copies: PeerCopies | None,
        plan: Plan,
        context: StepContext,
        *,
        adds: bool = False,
    ) -> None:
        """The product, of which the ranks send each other rows.

        Args:
            sent: of a group's rows, those that are sent (the first, and the one behind the last), and the row of the
                other's memory that they go to.
            add: what becomes of a group's rows and those that came for them.
        """
        assert copies is not None, "a plan by copies is for two ranks that share memory"
        numbers = count()

        def send(start: int, end: int, *, beside: bool) -> None:
            first, last, place = sent(start, end)
            copies.send(out_TO[first:last], place, next(numbers))

        for i, group in enumerate(self._launch(out_TO, x_TI, plan, send, context, adds=adds, prepare=copies.begin)):
            group.wait(x_TI.device)  # its rows have left and may change
            first, last, place = sent(group.start, group.end)
            add(group.start, group.end, copies.receive(last - first, place, i))

    def _launch(
        self,
        out_TO: Tensor,
        x_TI: Tensor,
        plan: Plan,
        collect: Collect,
        context: StepContext,
        *,
        adds: bool,
        prepare: Callable[[], None] = lambda: None,
    ) -> list[_Group]:
        """The product, and what collects each of the groups that are returned; `prepare` comes before the first is."""
        ends = plan.row_ends(len(x_TI))
        if self._signals is not None:
            # Also for plans without signals: memory is made in a lane's first steps, and not while one is captured.
            counters_G = context.buffer("overlap_counters", (MAX_GROUPS,), x_TI, torch.int32)
            config = self._signals.config(x_TI, self._weight_OI, out_TO)
            if len(ends) > 1 and config is not None:
                residual_TO = out_TO if adds else None
                product = (x_TI, self._weight_OI, out_TO, residual_TO, self._bias_O)
                return self._signals.run(product, counters_G, config, plan, ends, collect, context, prepare)
        multiply = self._add if adds else self.write_
        groups = [_Group(start, end) for start, end in pairwise((0, *ends))]
        for group in groups:
            multiply(out_TO[group.start : group.end], x_TI[group.start : group.end], context)
            if group is groups[0]:
                prepare()
            collect(group.start, group.end, beside=False)
        return groups


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Rows of a product that are collected together.

    Attributes:
        ended: behind it, on another stream; None on the stream of the product.
    """

    start: int
    end: int
    ended: torch.cuda.Event | None = None

    def wait(self, device: torch.device) -> None:
        """Have the current stream wait until they are."""
        if self.ended is not None:
            torch.cuda.current_stream(device).wait_event(self.ended)


def _all_rows(start: int, end: int) -> tuple[int, int, int]:
    """What an all-reduce sends of a group."""
    return start, end, start


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
        context: StepContext,
        prepare: Callable[[], None],
    ) -> list[_Group]:
        """Launch all; the groups end on the second stream, one behind the other."""
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
            num_sms=context.num_sms - plan.num_waiting,
            num_reserved=plan.reserved,
            config=config,
            residual_TO=residual_TO,
            bias_O=bias_O,
        )
        computed = stream.record_event()
        targets = self._gemm.signal_targets(ends, len(weight_OI), config)
        last = len(ends) - 1
        groups = []
        with torch.cuda.stream(side):
            prepare()
            for i, (start, end) in enumerate(pairwise((0, *ends))):
                if i == last:
                    side.wait_event(computed)
                else:
                    self._wait.stream_wait(
                        counters_G[i : i + 1], targets[i], self._release.flag, limit=self._release.limit
                    )
                collect(start, end, beside=i < last)
                groups.append(_Group(start, end, side.record_event()))
        counters_G[last].zero_()  # the waits have zeroed theirs
        return groups


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

"""The plans of an engine's products: which it needs, and where they come from.

Rank 0 decides. What an earlier engine tuned is taken over; the rest is tuned before the first step, by all ranks
together. From then on plans are fixed: a product has the same plan on every rank, launched or in a graph.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semipd.kernels.ops import Ops, StepContext
from semipd.parallel.overlap import ALONE_CTAS, OverlappedLinear, Release, SideStreams
from semipd.parallel.overlapped_product import lane_communicators
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.plans import SEQUENCE, Plan, Problem, bucket
from semipd.parallel.tuner import CollectiveCurve, Costs, Tuned, tune, waves
from semipd.parallel.turns import GraphTurns, time_in_turns

if TYPE_CHECKING:
    from semipd.config import Phase
    from semipd.parallel.group import TensorGroup
    from semipd.parallel.peer_copies import PeerCopies

logger = logging.getLogger(__name__)

MIN_ROWS = 512
"""Of products that may overlap: below, the collective of a few waves' rows is latency alone."""

# Of the SMs. On 84 of an H200's 132, 70B layers gain 3 to 4 % by the plans of the whole device. The fewer they are, the
# more the one costs that waits for the groups, and the longer products take than what they hide.
_MIN_SHARE = 0.6
_CACHED = 200_000_000  # bytes of operands in turn: four times the L2 cache of a Hopper GPU
_CURVE_BYTES = tuple(1 << bits for bits in (16, 18, 20, 22, 24, 26))
_CURVE_SECONDS = 0.15
_MAX_ERROR = 1e-2  # of a plan's result from the sequence's, over its norm: roundings to 16 bits


class WrongPlan(Exception):
    """A plan gave another result than the sequence on some rank; raised on all ranks."""


class FixedPlans:
    """A `Planner` of the steps that have the whole device, and by copies of those that have most of it.

    Args:
        num_sms: of the device.
        plans: of products by (rows, outputs, inputs); the rows are those of a `bucket`.
    """

    def __init__(self, num_sms: int, plans: Mapping[tuple[int, int, int], Plan]) -> None:
        self._num_sms = num_sms
        self._plans = plans

    def plan(self, num_rows: int, weight_OI: Tensor, context: StepContext) -> Plan | None:
        """See `Planner.plan`."""
        if num_rows < MIN_ROWS or context.num_sms < _MIN_SHARE * self._num_sms:
            return None
        num_outputs, num_inputs = weight_OI.shape
        plan = self._plans.get((bucket(num_rows), num_outputs, num_inputs))
        return plan if plan is None or plan.copies or context.num_sms == self._num_sms else None


def problems_of(problem: Problem, shapes: Iterable[tuple[int, int]], max_rows: int) -> list[Problem]:
    """What an engine needs plans for: `problem` with each of the (outputs, inputs), for steps of up to `max_rows`."""
    sizes = {bucket(num_rows) for num_rows in (MIN_ROWS, *range(MIN_ROWS, max_rows + 1, MIN_ROWS // 4), max_rows)}
    return [
        replace(problem, num_rows=num_rows, num_outputs=num_outputs, num_inputs=num_inputs)
        for num_outputs, num_inputs in dict.fromkeys(shapes)
        for num_rows in sorted(sizes, reverse=True)
        if MIN_ROWS <= max_rows
    ]


def find_plans(
    problems: Sequence[Problem],
    store: PlanStore,
    share: Callable[[str], str],
    tune: Callable[[Problem], Tuned],
) -> dict[Problem, Plan]:
    """A plan for each problem: of rank 0's store, or tuned and put there. All ranks call it together."""
    stored = [store.get(problem) for problem in problems]
    known = json.loads(share(json.dumps([None if tuned is None else tuned.to_json() for tuned in stored])))
    found = {}
    for problem, values in zip(problems, known, strict=True):
        tuned = Tuned.from_json(values) if values is not None else tune(problem)
        found[problem] = tuned.plan
        if values is None:
            store.put(problem, tuned)
    if None in known:
        store.save()
    return found


class ProductTuner:
    """Tunes products with their all-reduce on the device, by random operands of its own.

    Args:
        group: connected with the CTAs that problems may choose from beside a product, and with `ALONE_CTAS` alone.
        stream: of the whole device; the current one at every call.
        context: of the lane of that stream, with memory for the tuner alone.
        sides: see `OverlappedLinear`; so `release`.
        copies: of each lane, where ranks have them.
    """

    def __init__(
        self,
        group: TensorGroup,
        stream: torch.cuda.Stream,
        context: StepContext,
        *,
        ops: Ops,
        dtype: torch.dtype,
        sides: SideStreams,
        release: Release,
        copies: Mapping[Phase, PeerCopies],
    ) -> None:
        self._group, self._context, self._copies = group, context, copies
        self._ops, self._dtype, self._sides, self._release = ops, dtype, sides, release
        self._device = stream.device
        meeting = torch.zeros(16, device=self._device)
        self._turns = GraphTurns(stream, lambda: group.communicator(context.phase).all_reduce_(meeting))
        self._curves: dict[int, CollectiveCurve] = {}
        self._copied: list[CollectiveCurve] = []  # of copies, and of sums of what is copied
        self._waves: dict[tuple[int, int], float] = {}

    def tune(self, problem: Problem) -> Tuned:
        """The fastest plan of those whose result is right; all ranks call it together."""
        operands = _Operands(self, problem)

        def measure(plans: Sequence[Plan]) -> list[float]:
            for plan in plans:
                if plan != SEQUENCE and not self._agree(operands.is_right(plan)):
                    raise WrongPlan(f"the plan {plan} gives a wrong result for {problem}")
            turns = [self._turns.capture(operands.run(plan), operands.number) for plan in plans]
            times = time_in_turns(turns, self._group.share)
            self._release.check()  # or they are times of waits that no longer wait
            return [value / operands.number for value in times]

        tuned = tune(problem, self._costs(problem, operands), measure, self._group.share)
        if self._group.shard.rank == 0:
            logger.info("tuned %s: %s", problem, tuned)
        return tuned

    def check(self, problem: Problem, plan: Plan) -> None:
        """Run a plan once, which also loads its kernels; all ranks call it together.

        Raises:
            WrongPlan: the result is not that of the sequence on some rank.
        """
        if not self._agree(_Operands(self, problem, number=1).is_right(plan)):
            raise WrongPlan(f"the plan {plan} gives a wrong result for {problem}")

    def _agree(self, is_right: bool) -> bool:
        return self._group.agree_min(int(is_right)) == 1

    def _costs(self, problem: Problem, operands: _Operands) -> Costs:
        if not self._curves:
            self._measure_curves(problem.ctas)
        shape = problem.num_outputs, problem.num_inputs
        if shape not in self._waves:
            turn = self._turns.capture(operands.multiply, operands.number)
            (seconds,) = time_in_turns([turn], self._group.share, seconds=0.05)
            num_tiles = problem.num_blocks * problem.num_columns
            self._waves[shape] = seconds / operands.number / waves(num_tiles, problem, SEQUENCE)
        beside = {num_ctas: self._curves[num_ctas] for num_ctas in problem.ctas}
        return Costs(self._waves[shape], beside, self._curves[ALONE_CTAS], *self._copied)

    def _measure_curves(self, ctas: Sequence[int]) -> None:
        phase = self._context.phase
        copies = self._copies.get(phase)
        largest = torch.zeros(_CURVE_BYTES[-1] // self._dtype.itemsize, dtype=self._dtype, device=self._device)
        launches: list[tuple[Callable[[Tensor], None], int]] = [
            (self._group.communicator(phase, num_ctas).all_reduce_, largest.nbytes) for num_ctas in (*ctas, ALONE_CTAS)
        ]
        if copies is not None:
            launches += [(copies.try_sending, copies.max_bytes), (copies.try_adding, copies.max_bytes)]
        sizes = [[size for size in _CURVE_BYTES if size <= max_bytes] for _, max_bytes in launches]
        turns = []
        for (launch, _), own_sizes in zip(launches, sizes, strict=True):
            for size in own_sizes:

                def run(i: int, launch: Callable[[Tensor], None] = launch, size: int = size) -> None:
                    launch(largest[: size // largest.itemsize])

                turns.append(self._turns.capture(run, _number_of(size)))
        times = iter(time_in_turns(turns, self._group.share, seconds=_CURVE_SECONDS))
        curves = [
            CollectiveCurve(tuple((size, next(times) / _number_of(size)) for size in own_sizes)) for own_sizes in sizes
        ]
        self._curves = dict(zip((*ctas, ALONE_CTAS), curves, strict=False))
        self._copied = curves[len(self._curves) :]


def _number_of(num_bytes: int) -> int:
    """Collectives of a size in one graph."""
    return 1 if num_bytes > 1 << 22 else 10


class _Operands:
    """Random ones of a problem, in as many sets as the L2 cache does not hold."""

    def __init__(self, tuner: ProductTuner, problem: Problem, *, number: int = 0) -> None:
        self._tuner = tuner
        num_rows, num_outputs, num_inputs = problem.num_rows, problem.num_outputs, problem.num_inputs
        num_bytes = 2 * (num_rows * num_inputs + num_outputs * (num_inputs + num_rows))
        self.number = number or max(4, math.ceil(_CACHED / num_bytes))
        self._xs = [self._randn(num_rows, num_inputs) for _ in range(self.number)]
        self._outs = [self._randn(num_rows, num_outputs) for _ in range(self.number)]
        self._norm = tuner._ops.pack_rms_norm(self._randn(num_outputs, 1).flatten(), 1e-5)
        self._linears = [
            OverlappedLinear(
                self._randn(num_outputs, num_inputs).mul_(num_inputs**-0.5),
                ops=tuner._ops,
                adds=tuner._group.shard.rank == 0,
                sides=tuner._sides,
                release=tuner._release,
            )
            for _ in range(self.number)
        ]

    def run(self, plan: Plan) -> Callable[[int], Tensor]:
        """The product with its all-reduce and the norm behind it, which adds what was copied."""
        tuner = self._tuner
        communicators = lane_communicators(tuner._group, tuner._context, plan, tuner._copies)

        def launch(i: int) -> Tensor:
            return self._linears[i].add_norm(
                self._outs[i], self._xs[i], self._norm, communicators, plan, tuner._context
            )

        return launch

    def multiply(self, i: int) -> None:
        """The product."""
        self._linears[i].write_(self._outs[i], self._xs[i], self._tuner._context)

    def is_right(self, plan: Plan) -> bool:
        """Whether a plan gives what the sequence does: the residual, and that normed."""
        residual = self._outs[0]
        before = residual.clone()
        expected = [self.run(SEQUENCE)(0).float(), residual.float()]
        residual.copy_(before)
        results = [self.run(plan)(0), residual]
        errors = [
            float((one.float() - other).norm() / other.norm()) for one, other in zip(results, expected, strict=True)
        ]
        return max(errors) < _MAX_ERROR and not self._tuner._release.is_set

    def _randn(self, num_rows: int, num_columns: int) -> Tensor:
        return torch.randn(num_rows, num_columns, device=self._tuner._device, dtype=self._tuner._dtype)

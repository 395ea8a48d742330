"""Which groups to cut a product into, so that its collective hides behind it: predicted, and then measured.

The product runs in waves: each SM computes a tile at a time, and all tiles take as long. A group can leave when its
last tile is there and the group before it has left. So two curves of a machine predict any cut: the time of a wave, and
the time of a collective by its size. The best few are measured in turns with the plain sequence, and the fastest of all
is kept: "no overlap" is an answer like the others, so nothing is ever lost.

Everything here is arithmetic on plain numbers; the times come from whoever can measure.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from semipd.parallel.plans import MAX_GROUPS, SEQUENCE, Plan, Problem

MARGIN = 0.02
"""Share by which a plan must beat the sequence when both are measured: twice what repeated measurements differ by."""

_CUTS = 16  # places at which a group may end, for large M
_MIN_ROWS = 256  # below, a product is done before a collective could begin
_WAIT_SECONDS = 1.5e-6  # from the last tile of a group to the start of its collective
# What a collective takes longer beside a product than alone. On two H200, of 21 plans whose product lasts from 50 us to
# 2.7 ms, predictions are then 5 % off (root mean square) and not biased. Long products are slower than predicted, by up
# to 10 %: power.
_SLOWED = 1.1
_HOPE = 1.03  # a plan is worth measuring if it is predicted to take at most so many times what the sequence is


@dataclass(frozen=True, slots=True)
class CollectiveCurve:
    """Seconds of a collective by the bytes of its whole input; between two sizes, a line in logarithms.

    Attributes:
        points: (bytes, seconds), ascending. The first holds for all that is smaller: it is latency. Beyond the last,
            its bandwidth holds.
    """

    points: tuple[tuple[int, float], ...]

    def seconds(self, num_bytes: int) -> float:
        """Of a collective of that size."""
        sizes = [size for size, _ in self.points]
        i = bisect.bisect_right(sizes, num_bytes)
        if i == 0:
            return self.points[0][1]
        low, low_seconds = self.points[i - 1]
        if i == len(sizes):
            return low_seconds * num_bytes / low
        high, high_seconds = self.points[i]
        share = math.log(num_bytes / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(low_seconds) + share * math.log(high_seconds))


@dataclass(frozen=True, slots=True)
class Costs:
    """What a plan's time comes from.

    Attributes:
        wave_seconds: in which each SM computes a tile.
        beside: of collectives by their CTAs, the SMs that a plan reserves; measured without a product beside them.
        alone: of one on as many as it likes: the last, and that of the sequence.
        copies: of rows that copy engines carry both ways; None without.
        adding: of the sum of such rows and a rank's own.
    """

    wave_seconds: float
    beside: Mapping[int, CollectiveCurve]
    alone: CollectiveCurve
    copies: CollectiveCurve | None = None
    adding: CollectiveCurve | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """A plan with the seconds that it should take."""

    plan: Plan
    seconds: float


def waves(num_tiles: int, problem: Problem, plan: Plan) -> int:
    """Waves after which the first `num_tiles` tiles are done."""
    num_sms = problem.num_sms - plan.num_waiting
    num_staying = num_sms - plan.reserved
    first = problem.num_columns * (plan.ends or (problem.num_blocks,))[0]
    if num_tiles <= first:
        return -(-num_tiles // num_sms)
    full, partial = divmod(first, num_sms)
    turn, place = divmod(num_tiles - first - 1, num_staying)
    is_behind = place >= num_staying - partial  # those that had a tile of the partial wave come last in each turn
    return max(full + turn + 1 + is_behind, full + (partial > 0))


def predict(problem: Problem, plan: Plan, costs: Costs) -> float:
    """Seconds from the start of the product to the end of the last collective."""
    if plan.copies:
        return _predict_copies(problem, plan, costs)
    seconds = 0.0
    for start, end in itertools.pairwise((0, *(plan.ends or (problem.num_blocks,)))):
        ready = waves(end * problem.num_columns, problem, plan) * costs.wave_seconds + _WAIT_SECONDS * plan.overlaps
        num_bytes = problem.num_bytes(end) - problem.num_bytes(start)
        if end < problem.num_blocks:
            seconds = max(seconds, ready) + costs.beside[plan.reserved].seconds(num_bytes) * _SLOWED
        else:
            seconds = max(seconds, ready) + costs.alone.seconds(num_bytes)
    return seconds


def _predict_copies(problem: Problem, plan: Plan, costs: Costs) -> float:
    """The same of copies: groups are added one by one when the product has ended."""
    assert costs.copies is not None and costs.adding is not None
    arrived, added = 0.0, waves(problem.num_blocks * problem.num_columns, problem, plan) * costs.wave_seconds
    for start, end in itertools.pairwise((0, *plan.ends)):
        ready = waves(end * problem.num_columns, problem, plan) * costs.wave_seconds + _WAIT_SECONDS * plan.overlaps
        num_bytes = problem.num_bytes(end) - problem.num_bytes(start)
        arrived = max(arrived, ready) + costs.copies.seconds(num_bytes)
        added = max(added, arrived) + _WAIT_SECONDS + costs.adding.seconds(num_bytes)
    return added


def candidates(problem: Problem) -> Iterator[Plan]:
    """Plans of two and more groups, which end at multiples of a sixteenth of the rows where there are many.

    By copies, one group may be faster than the sequence too.
    """
    if problem.num_rows < _MIN_ROWS:
        return
    blocks = problem.num_blocks
    places = sorted({round(blocks * i / _CUTS) for i in range(1, _CUTS)} - {0, blocks})
    cuts = [(*inner, blocks) for num_cuts in range(MAX_GROUPS) for inner in itertools.combinations(places, num_cuts)]
    if problem.has_copies:
        yield from (Plan(ends, copies=True) for ends in cuts)
    for num_ctas in problem.ctas:
        if num_ctas < problem.num_sms:
            yield from (Plan(ends, num_ctas) for ends in cuts[1:])


def best_plans(problem: Problem, costs: Costs, count: int) -> list[Predicted]:
    """The plans that should be fastest, those by copies before those by collectives, as many of each.

    Those that the sequence should beat by far are left out. Of plans that differ by a block or two only the best is
    tried: beside it the next ones teach nothing.
    """
    limit = _HOPE * predict(problem, SEQUENCE, costs)
    predicted = [Predicted(plan, predict(problem, plan, costs)) for plan in candidates(problem)]
    predicted.sort(key=lambda entry: entry.seconds)
    best: list[Predicted] = []
    for copies in (True, False):
        chosen: list[Predicted] = []
        for entry in predicted:
            if len(chosen) == count or entry.seconds > limit:
                break
            if entry.plan.copies is copies and all(_differ(entry.plan, other.plan) for other in chosen):
                chosen.append(entry)
        best += chosen
    return best


def _differ(a: Plan, b: Plan) -> bool:
    if a.reserved != b.reserved or len(a.ends) != len(b.ends):
        return True
    step = a.ends[-1] / _CUTS
    return any(abs(x - y) > 1.5 * step for x, y in zip(a.ends, b.ends, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A plan that was measured.

    Attributes:
        predicted: seconds by the curves.
        measured: seconds.
    """

    plan: Plan
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The plan for a problem.

    Attributes:
        plan: maybe `SEQUENCE`.
        trials: of the sequence and the plans that were measured; none if no plan was worth it.
    """

    plan: Plan
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuned:
        """What `to_json` gave."""
        trials = (
            Trial(plan=Plan.from_json(t["plan"]), predicted=float(t["predicted"]), measured=float(t["measured"]))
            for t in values["trials"]
        )
        return cls(plan=Plan.from_json(values["plan"]), trials=tuple(trials))


def tune(
    problem: Problem,
    costs: Costs,
    measure: Callable[[Sequence[Plan]], Sequence[float]],
    share: Callable[[str], str],
    *,
    count: int = 3,
) -> Tuned:
    """The fastest plan, by a measurement of those that should be, beside the sequence. All ranks call it together.

    Args:
        measure: seconds of each plan, in turns; all ranks call it together, with the same plans.
        share: gives every rank what rank 0 passes; only rank 0's costs and times count.
        count: see `best_plans`.
    """
    predicted = best_plans(problem, costs, count)
    if predicted:
        predicted.insert(0, Predicted(SEQUENCE, predict(problem, SEQUENCE, costs)))
    text = share(json.dumps([[asdict(entry.plan), entry.seconds] for entry in predicted]))
    tried = [Predicted(Plan.from_json(plan), seconds) for plan, seconds in json.loads(text)]
    if not tried:
        return Tuned(plan=SEQUENCE)
    measured = measure([entry.plan for entry in tried])
    trials = tuple(
        Trial(plan=entry.plan, predicted=entry.seconds, measured=seconds)
        for entry, seconds in zip(tried, measured, strict=True)
    )
    best = min(trials, key=lambda trial: trial.measured)
    is_better = best.measured < (1 - MARGIN) * trials[0].measured
    tuned = Tuned(plan=best.plan if is_better else SEQUENCE, trials=trials)
    return Tuned.from_json(json.loads(share(json.dumps(tuned.to_json()))))

"""Which groups to cut a product into, so that its collective hides behind it: predicted, and then measured.

The product runs in waves: each SM computes a tile at a time, and all tiles take as long. A group can leave when its
last tile is there and the group before it has left. So two curves of a machine predict any cut: the time of a wave, and
the time of a collective by its size. The best few are measured beside the plain sequence, and the fastest of all is
kept: "no overlap" is an answer like the others, so nothing is ever lost.

Everything here is arithmetic on plain numbers; the times come from whoever can measure.

Shapes: M rows of the product, N outputs, K inputs.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BLOCK_M, BLOCK_N = 128, 256
"""Rows and outputs of a tile."""

MAX_GROUPS = 5
_CUTS = 16  # places at which a group may end, for large M
_WAIT_SECONDS = 1.5e-6  # from the last tile of a group to the start of its collective
_VERSION = 1  # of stored plans
_MIN_ROWS = 256  # below, a product is done before a collective could begin


class Collective(StrEnum):
    """What becomes of the rows of a product."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product and its collective run.

    Attributes:
        ends: behind which block of `BLOCK_M` rows each group ends, for a product of `ends[-1]` such blocks. With one
            group, or none, the collective follows the product.
        reserved: SMs that the product leaves to the collective.
        is_early: whether it leaves them from the start, and not only when the first group is done.
    """

    ends: tuple[int, ...] = ()
    reserved: int = 0
    is_early: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether there is more than one group."""
        return len(self.ends) > 1

    def row_ends(self, num_rows: int) -> tuple[int, ...]:
        """Behind which row each group ends in a product of `num_rows`, which may be other than the plan is for."""
        blocks = -(-num_rows // BLOCK_M)
        inner = (round(end / self.ends[-1] * blocks) for end in self.ends[:-1])
        ends = sorted({end * BLOCK_M for end in inner if 0 < end < blocks})
        return (*ends, num_rows)

    def __str__(self) -> str:
        if not self.overlaps:
            return "sequence"
        sizes = (end - start for start, end in itertools.pairwise((0, *self.ends)))
        return "+".join(map(str, sizes)) + f"/{self.reserved}" + (" early" if self.is_early else "")


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
        num_ctas: of the collective: SMs that it takes.
    """

    device: str
    num_rows: int
    num_outputs: int
    num_inputs: int
    dtype: str
    world_size: int
    num_sms: int
    collective: Collective
    num_ctas: int

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


def bucket(num_rows: int) -> int:
    """The number of rows, at least as large, for which there is a plan: powers of two and the middles between."""
    power = 1 << max(num_rows - 1, 1).bit_length()
    return power * 3 // 4 if num_rows <= power * 3 // 4 else power


@dataclass(frozen=True, slots=True)
class GemmCurve:
    """Seconds of a wave, in which each SM computes a tile, by the inputs that it is summed over: a line.

    Attributes:
        fixed: what a tile takes besides its sums.
        per_input: for each input.
    """

    fixed: float
    per_input: float

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> GemmCurve:
        """The line through measured (inputs, seconds); through zero if there is only one."""
        if len({num_inputs for num_inputs, _ in points}) == 1:
            return cls(0.0, points[0][1] / points[0][0])
        per_input, fixed = statistics.linear_regression(*zip(*points, strict=True))
        return cls(fixed, per_input)

    def seconds(self, num_inputs: int) -> float:
        """Of a wave."""
        return self.fixed + self.per_input * num_inputs


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
        wave_seconds: see `GemmCurve`.
        beside: of a collective on the SMs that a plan reserves.
        alone: of one on as many as it likes: the last, and that of the sequence.
    """

    wave_seconds: float
    beside: CollectiveCurve
    alone: CollectiveCurve


@dataclass(frozen=True, slots=True)
class Predicted:
    """A plan with the seconds that it should take."""

    plan: Plan
    seconds: float


def waves(num_tiles: int, problem: Problem, plan: Plan) -> int:
    """Waves after which the first `num_tiles` tiles are done."""
    num_programs = problem.num_sms - plan.reserved * plan.is_early
    num_staying = problem.num_sms - plan.reserved
    first = problem.num_columns * (plan.ends or (problem.num_blocks,))[0]
    if num_tiles <= first:
        return -(-num_tiles // num_programs)
    full, partial = divmod(first, num_programs)
    turn, place = divmod(num_tiles - first - 1, num_staying)
    is_behind = place >= num_staying - partial  # those that had a tile of the partial wave come last in each turn
    return max(full + turn + 1 + is_behind, full + (partial > 0))


def predict(problem: Problem, plan: Plan, costs: Costs) -> float:
    """Seconds from the start of the product to the end of the last collective."""
    seconds = 0.0
    for start, end in itertools.pairwise((0, *(plan.ends or (problem.num_blocks,)))):
        ready = waves(end * problem.num_columns, problem, plan) * costs.wave_seconds + _WAIT_SECONDS * plan.overlaps
        curve = costs.beside if end < problem.num_blocks else costs.alone
        seconds = max(seconds, ready) + curve.seconds(problem.num_bytes(end) - problem.num_bytes(start))
    return seconds


def candidates(problem: Problem) -> Iterator[Plan]:
    """Plans of two and more groups, which end at multiples of a sixteenth of the rows where there are many."""
    if problem.num_rows < _MIN_ROWS or problem.num_ctas >= problem.num_sms:
        return
    blocks = problem.num_blocks
    places = sorted({round(blocks * i / _CUTS) for i in range(1, _CUTS)} - {0, blocks})
    for num_cuts in range(1, MAX_GROUPS):
        for inner in itertools.combinations(places, num_cuts):
            yield Plan((*inner, blocks), problem.num_ctas)


def best_plans(problem: Problem, costs: Costs, count: int) -> list[Predicted]:
    """The plans that should be fastest, in order, and the first of them with its SMs reserved from the start.

    Of plans that differ by a block or two only the best is tried: beside it the next ones teach nothing.
    """
    predicted = [Predicted(plan, predict(problem, plan, costs)) for plan in candidates(problem)]
    chosen: list[Predicted] = []
    for entry in sorted(predicted, key=lambda entry: entry.seconds):
        if len(chosen) == count:
            break
        if all(_differ(entry.plan, other.plan) for other in chosen):
            chosen.append(entry)
    if chosen:
        early = replace(chosen[0].plan, is_early=True)
        chosen.append(Predicted(early, predict(problem, early, costs)))
    return chosen


def _differ(a: Plan, b: Plan) -> bool:
    step = a.ends[-1] / _CUTS
    return len(a.ends) != len(b.ends) or any(abs(x - y) > 1.5 * step for x, y in zip(a.ends, b.ends, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The plan that was fastest when it was measured.

    Attributes:
        plan: maybe `SEQUENCE`.
        predicted: its seconds by the curves; None for the sequence.
        measured: its seconds.
        sequence: the seconds of the sequence.
    """

    plan: Plan
    predicted: float | None
    measured: float
    sequence: float

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuned:
        """What `to_json` gave."""
        return cls(
            plan=_plan_from_json(values["plan"]),
            predicted=values["predicted"],
            measured=float(values["measured"]),
            sequence=float(values["sequence"]),
        )


def tune(
    problem: Problem,
    costs: Costs,
    measure: Callable[[Sequence[Plan]], Sequence[float]],
    share: Callable[[str], str],
    *,
    count: int = 3,
    margin: float = 0.01,
) -> Tuned:
    """The fastest plan, by a measurement of those that should be, beside the sequence. All ranks call it together.

    Args:
        measure: seconds of each plan; all ranks call it together, with the same plans.
        share: gives every rank what rank 0 passes; only rank 0's costs and times count.
        count: see `best_plans`.
        margin: share by which a plan must beat the sequence.
    """
    predicted = best_plans(problem, costs, count)
    text = share(json.dumps([[asdict(entry.plan), entry.seconds] for entry in predicted]))
    tried = [Predicted(_plan_from_json(plan), seconds) for plan, seconds in json.loads(text)]
    sequence, *seconds = measure([SEQUENCE, *(entry.plan for entry in tried)])
    tuned = Tuned(plan=SEQUENCE, predicted=None, measured=sequence, sequence=sequence)
    for entry, measured in zip(tried, seconds, strict=True):
        if measured < min(tuned.measured, sequence * (1 - margin)):
            tuned = Tuned(plan=entry.plan, predicted=entry.seconds, measured=measured, sequence=sequence)
    return Tuned.from_json(json.loads(share(json.dumps(tuned.to_json()))))


class PlanStore:
    """Tuned plans by their problems, kept in a file: another run need not measure again.

    Args:
        path: of the file, which need not exist; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._tuned: dict[Problem, Tuned] = {}
        if path is not None:
            self._load(path)

    def get(self, problem: Problem) -> Tuned | None:
        """What `put` got for it."""
        return self._tuned.get(problem)

    def put(self, problem: Problem, tuned: Tuned) -> None:
        """Remember it."""
        self._tuned[problem] = tuned

    def save(self) -> None:
        """Replace the file; readers see the old one or the new one."""
        if self._path is None:
            return
        entries = [{"problem": asdict(problem), "tuned": tuned.to_json()} for problem, tuned in self._tuned.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            with open(file, "w") as stream:
                json.dump({"version": _VERSION, "plans": entries}, stream, indent=1)
            os.replace(name, self._path)
        except OSError as error:
            logger.warning("plans cannot be stored in %s: %s", self._path, error)

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"they are of version {content['version']}, not {_VERSION}")
            for entry in content["plans"]:
                values = {**entry["problem"], "collective": Collective(entry["problem"]["collective"])}
                self._tuned[Problem(**values)] = Tuned.from_json(entry["tuned"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tuned.clear()
            logger.warning("stored plans in %s are ignored: %s", path, error)


def _plan_from_json(values: Mapping[str, Any]) -> Plan:
    return Plan(tuple(map(int, values["ends"])), int(values["reserved"]), bool(values["is_early"]))

"""Step times between and beyond those measured: what `benchmarks.step_times` wrote, as a function of the work.

    python -m benchmarks.step_table FILE

prints how far the table is from its own points, and from each point when it is made without it.

The points of one kind of step on one share beside one share of the other lane are a *cell*. A cell has a rough physical
form, least squares fitted: m = rows + contexts + pairs, where rows = hypot(weights, row * n) + own * n. It is corrected
so that it goes through all points. With a point's time t, its m, and a = sqrt(t) / m,

    seconds(x) = max over points of a * meet  *  min over points of a * join

where meet and join take, term by term, the smaller and the larger one of x and the point. Both factors rise with each
term, so the product does: no interpolation of residuals could promise that. At a point it gives the point's time, if no
two points contradict each other by growing more than twice as fast as m; near one point alone, or far beyond all,
it is m times that point's residual.

A share that was not measured takes the geometric mean of the nearest two cells, each scaled by how memory and compute
follow from shares. What the other lane computes does not count, only its share: a point is a mean over that.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from semipd.sched.latency import StepKind, StepWork

_DEFAULT = (5.9e-3, 24e-6, 2e-6, 45e-9, 0.4e-9)  # seconds: weights, row, own, context, pair of Llama-3-8B on an H100
_IS_COMPUTE = np.array([False, True, False, False, True])  # the others are of memory
_WIDE = (3.0, 0.7)  # sd of the logarithms of coefficients that no other cell knows: all together, each by itself
_NARROW = (0.5, 0.4)  # the same where the nearest cell of the kind is known
_NOISE = 0.02
_ITERATIONS = 40
_MAX_STEP = 1.0  # of a logarithm in one iteration

Vector = NDArray[np.float64]
Key = tuple[StepKind, int, int]


class TableError(ValueError):
    """A file that is no table of step times."""


class Point(NamedTuple):
    """A measured step."""

    work: StepWork
    seconds: float


class StepTable:
    """Step times as measured on one device.

    Args:
        points: at least one.
        num_sms: of the whole device.
        splits: (prefill, decode) shares that the device offers.
    """

    def __init__(self, points: Iterable[Point], num_sms: int, splits: Sequence[tuple[int, int]] = ()) -> None:
        self.points = tuple(points)
        self.num_sms = num_sms
        self.splits = tuple(splits)
        if not self.points:
            raise TableError("the table has no point; expected at least one measured step")
        by_key: dict[Key, list[Point]] = {}
        for point in self.points:
            by_key.setdefault(_key(point.work), []).append(point)
        self._cells: dict[Key, _Cell] = {}
        for key, cell_points in sorted(by_key.items(), key=lambda item: -len(item[1])):  # those that know most first
            self._cells[key] = _Cell(cell_points, *self._prior(key))
        self._mixes: dict[Key, tuple[tuple[_Cell, float, float], ...]] = {}

    @staticmethod
    def load(path: Path | str) -> StepTable:
        """The table in a file of `benchmarks.step_times`.

        Raises:
            TableError: there is no such file, or it is of another kind; the message says what is wrong with it.
        """
        hint = "expected what `python -m benchmarks.step_times --json FILE` writes"
        try:
            content = json.loads(Path(path).read_text())
        except OSError as error:
            raise TableError(f"{path} cannot be read ({error.strerror}); {hint}") from error
        except ValueError as error:
            raise TableError(f"{path} is no JSON ({error}); {hint}") from error
        if not isinstance(content, Mapping) or not {"points", "num_sms"} <= content.keys():
            raise TableError(f"{path} has no 'points' and 'num_sms'; {hint}")
        points = []
        for index, row in enumerate(content["points"]):
            try:
                point = Point(
                    StepWork(**{field.name: int(row[field.name]) for field in fields(StepWork)}), row["seconds"]
                )
                is_valid = 0.0 < point.seconds < math.inf and point.work.num_sms > 0
            except (KeyError, TypeError, ValueError) as error:
                raise TableError(f"point {index} of {path} is incomplete ({error!r}); {hint}") from error
            if not is_valid:
                raise TableError(f"point {index} of {path} has {row['seconds']!r} seconds on {point.work.num_sms} SMs")
            points.append(point)
        if not points:
            raise TableError(f"{path} has no point: the run was cut off before its first trial ended; {hint}")
        return StepTable(points, int(content["num_sms"]), [(int(a), int(b)) for a, b in content.get("splits", ())])

    def seconds(self, work: StepWork) -> float:
        """How long the step runs on its stream; where `work.other_sms` is not 0, the other lane is busy all the time.

        Rises with rows, contexts and pairs.

        Raises:
            TableError: the table has no step of that kind.
        """
        key = (work.kind, work.num_sms, work.other_sms)
        mix = self._mixes.get(key)
        if mix is None:
            mix = self._mixes[key] = self._mix(key)
        cell, scale, _ = mix[0]
        if len(mix) == 1:
            return cell.seconds(work) * scale
        return math.exp(sum(weight * math.log(cell.seconds(work) * scale) for cell, scale, weight in mix))

    def keys(self) -> list[Key]:
        """The kinds of steps and shares that were measured, as (kind, num_sms, other_sms)."""
        return sorted(self._cells)

    def without(self, index: int) -> StepTable:
        """The table had that point not been measured."""
        return StepTable(self.points[:index] + self.points[index + 1 :], self.num_sms, self.splits)

    def _mix(self, key: Key) -> tuple[tuple[_Cell, float, float], ...]:
        """The cell of `key`, or the nearest two with their scale and weight."""
        if key in self._cells:
            return ((self._cells[key], 1.0, 1.0),)
        same_kind = [other for other in self._cells if other[0] is key[0]]
        if not same_kind:
            kinds = ", ".join(sorted({other[0] for other in self._cells}))
            raise TableError(f"a {key[0]} step was asked for, and the table has only {kinds}; measure some")
        for alike in (_is_busy, self._is_oversubscribed):
            same_kind = [other for other in same_kind if alike(other) is alike(key)] or same_kind
        nearest = sorted(same_kind, key=lambda other: self._distance(key, other))[:2]
        closeness = [self._distance(key, other) ** -2.0 for other in nearest]
        return tuple(
            (self._cells[other], self._scale(key, other), close / sum(closeness))
            for other, close in zip(nearest, closeness, strict=True)
        )

    def _scale(self, key: Key, other: Key) -> float:
        """How much longer steps take there: the part of memory for decodes, of compute for prompts, both for MIXED."""
        memory, compute = (mine / theirs for mine, theirs in zip(self._law(key), self._law(other), strict=True))
        match key[0]:
            case StepKind.DECODE:
                return memory
            case StepKind.PREFILL:
                return compute
        return math.sqrt(memory * compute)

    def _law(self, key: Key) -> tuple[float, float]:
        """What reading and computing take on a share over what they take on the whole device alone; see `latency`."""
        _, num_sms, other_sms = key
        share, other = num_sms / self.num_sms, other_sms / self.num_sms
        return (share + 0.1) / (1.1 * share) * (1.0 + 0.6 * other), math.pow(share, -0.8) * (1.0 + 1.3 * other)

    def _prior(self, key: Key) -> tuple[Vector, tuple[float, float]]:
        """Logarithms of the coefficients to be expected in a cell, and how far off they may be."""
        known = [other for other in self._cells if other[0] is key[0]]
        if known:
            nearest = min(known, key=lambda other: self._distance(key, other))
            logs, (own_memory, own_compute) = self._cells[nearest].logs, self._law(nearest)
        else:
            logs, own_memory, own_compute = np.log(_DEFAULT), 1.0, 1.0
        memory, compute = self._law(key)
        ratios = np.where(_IS_COMPUTE, math.log(compute / own_compute), math.log(memory / own_memory))
        return logs + ratios, _NARROW if known else _WIDE

    def _distance(self, key: Key, other: Key) -> float:
        shares = abs(math.log(key[1] / other[1])) + abs(key[2] - other[2]) / self.num_sms
        return shares + 0.5 * (_is_busy(key) is not _is_busy(other))

    def _is_oversubscribed(self, key: Key) -> bool:
        return key[1] + key[2] > self.num_sms


def _key(work: StepWork) -> Key:
    return work.kind, work.num_sms, work.other_sms


def _is_busy(key: Key) -> bool:
    return key[2] > 0


class _Cell:
    """The steps of one kind on one share beside one other."""

    def __init__(self, points: Sequence[Point], prior: Vector, spreads: tuple[float, float]) -> None:
        times: dict[tuple[int, int, int], list[float]] = {}
        for work, seconds in points:
            times.setdefault(_features(work), []).append(math.log(seconds))
        features = np.array(list(times), dtype=np.float64)
        log_times = np.array([statistics.mean(values) for values in times.values()])
        self.logs = _fit(features, log_times, prior, spreads)
        weights, row, own, context, pair = np.exp(self.logs)
        self._weights, self._row, self._own = float(weights), float(row), float(own)
        self._context, self._pair = float(context), float(pair)
        rows, contexts, pairs = _terms(features, self.logs)
        roots = np.exp(log_times / 2.0)
        lines = np.stack((roots, roots / (rows + contexts + pairs), rows, contexts, pairs), 1)
        self._rising: list[tuple[float, ...]] = [tuple(line) for line in lines[np.argsort(roots)].tolist()]
        self._falling = self._rising[::-1]

    def seconds(self, work: StepWork) -> float:
        num_rows = work.num_decodes + work.num_prompt_tokens
        rows = math.hypot(self._weights, self._row * num_rows) + self._own * num_rows
        contexts, pairs = self._context * work.context_tokens, self._pair * work.prompt_pairs
        low, high = 0.0, math.inf
        for root, a, its_rows, its_contexts, its_pairs in self._falling:
            if root <= low:  # a * meet is root at most
                break
            meet = rows if rows < its_rows else its_rows
            meet += contexts if contexts < its_contexts else its_contexts
            meet += pairs if pairs < its_pairs else its_pairs
            if a * meet > low:
                low = a * meet
        for root, a, its_rows, its_contexts, its_pairs in self._rising:
            if root >= high:  # a * join is root at least
                break
            join = rows if rows > its_rows else its_rows
            join += contexts if contexts > its_contexts else its_contexts
            join += pairs if pairs > its_pairs else its_pairs
            if a * join < high:
                high = a * join
        return low * high


def _features(work: StepWork) -> tuple[int, int, int]:
    return work.num_decodes + work.num_prompt_tokens, work.context_tokens, work.prompt_pairs


def _terms(features: Vector, logs: Vector) -> tuple[Vector, Vector, Vector]:
    """Seconds for rows, for contexts and for pairs."""
    weights, row, own, context, pair = np.exp(logs)
    num_rows, contexts, pairs = features.T
    return np.hypot(weights, row * num_rows) + own * num_rows, context * contexts, pair * pairs


def _fit(features: Vector, log_times: Vector, prior: Vector, spreads: tuple[float, float]) -> Vector:
    """Logarithms of the coefficients: Gauss-Newton on relative errors, with a normal prior."""
    common, own = spreads
    precision = np.linalg.inv(np.full((len(prior), len(prior)), common**2) + np.eye(len(prior)) * own**2)
    logs = prior.copy()
    for _ in range(_ITERATIONS):
        weights, row, own_row = np.exp(logs[:3])
        num_rows = features[:, 0]
        rows, contexts, pairs = _terms(features, logs)
        total = rows + contexts + pairs
        products = np.hypot(weights, row * num_rows)
        parts = (weights**2 / products, (row * num_rows) ** 2 / products, own_row * num_rows, contexts, pairs)
        shares = np.stack(parts, 1) / total[:, None]
        gradient = shares.T @ (log_times - np.log(total)) / _NOISE**2 - precision @ (logs - prior)
        step = np.linalg.solve(shares.T @ shares / _NOISE**2 + precision, gradient)
        logs = logs + step * min(1.0, _MAX_STEP / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-6:
            break
    return logs


# ---- how good a table is


def errors(table: StepTable) -> dict[Key, list[tuple[float, float]]]:
    """By cell, each point's |table / measured - 1|: of the table, and of the table without the point."""
    found: dict[Key, list[tuple[float, float]]] = {key: [] for key in table.keys()}
    for index, (work, seconds) in enumerate(table.points):
        held_out = table.without(index)
        own = abs(table.seconds(work) / seconds - 1.0)
        found[_key(work)].append((own, abs(held_out.seconds(work) / seconds - 1.0)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    table = StepTable.load(parser.parse_args().file)
    output = Table(title=f"errors of {len(table.points)} points, %", caption="left out: the table without the point")
    for name in ("kind", "SMs", "other lane", "points", "at points", "worst", "left out", "its worst"):
        output.add_column(name, justify="right")
    found: dict[Any, list[tuple[float, float]]] = dict(errors(table))
    found["all", "", ""] = [pair for pairs in found.values() for pair in pairs]
    for key, pairs in found.items():
        own, left_out = zip(*pairs, strict=True)
        values = (statistics.median(own), max(own), statistics.median(left_out), max(left_out))
        output.add_row(*map(str, key), str(len(pairs)), *(f"{100.0 * value:.1f}" for value in values))
    Console(width=None if sys.stdout.isatty() else 100).print(output)


if __name__ == "__main__":
    main()

"""From a table of measured step times to the figures that an engine starts with before it has measured anything.

    python -m benchmarks.latency_figures FILE [--write]

FILE is what `benchmarks.step_times` wrote. The latency model learns its points, over and over in random order, and
becomes a state; `--write` puts it into the package, beside what the model and device were, so that
`semipd/latency_figures.py` can scale it to others. Printed are its errors at the points, and at points that it was made
without.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import percentile
from benchmarks.step_table import Point, StepTable
from semipd.latency_figures import FIGURES
from semipd.sched.latency import LatencyModel, StepKind

_PASSES = 60
_FOLDS = 5  # the points left out at a time, as a share


def learn(points: Sequence[Point], num_sms: int, *, seed: int = 0) -> LatencyModel:
    """A model that has seen the points, of steps on all of the device first: the other cells start from those."""
    rng = random.Random(seed)
    model = LatencyModel(num_sms)
    whole = [point for point in points if point.work.num_sms == num_sms and point.work.other_sms == 0]
    shares = [point for point in points if point.work.num_sms < num_sms]
    for part in (whole, shares):
        for _ in range(_PASSES):
            for work, seconds in rng.sample(part, len(part)):
                model.calibrate(work, seconds)
    return model


def errors(model: LatencyModel, points: Sequence[Point]) -> list[tuple[StepKind, float]]:
    """By point its kind and |predicted / measured - 1|."""
    return [(work.kind, abs(model.predict(work) / seconds - 1.0)) for work, seconds in points]


def left_out_errors(points: Sequence[Point], num_sms: int) -> list[tuple[StepKind, float]]:
    """The errors at each fifth of the points of a model that has learned the others."""
    shuffled = random.Random(0).sample(points, len(points))
    found = []
    for fold in range(_FOLDS):
        rest = [point for index, point in enumerate(shuffled) if index % _FOLDS != fold]
        found += errors(learn(rest, num_sms), shuffled[fold::_FOLDS])
    return found


def add_rows(table: Table, what: str, found: Sequence[tuple[StepKind, float]]) -> None:
    """A row per kind of step, and one for all."""
    for kind in (*StepKind, "all"):
        values = [error for its_kind, error in found if kind in (its_kind, "all")]
        numbers = (statistics.median(values), percentile(values, 0.95))
        table.add_row(what, str(kind), str(len(values)), *(f"{100.0 * value:.1f}" for value in numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help=f"replace {FIGURES.name} of the package")
    args = parser.parse_args()
    steps = StepTable.load(args.file)
    # Shares that overlap are for policies that do not ask the model.
    points = [point for point in steps.points if point.work.num_sms + point.work.other_sms <= steps.num_sms]
    model = learn(points, steps.num_sms)
    table = Table(title="errors, %")
    for name in ("points", "kind", "number", "median", "p95"):
        table.add_column(name, justify="right")
    add_rows(table, "learned", errors(model, points))
    add_rows(table, "left out", left_out_errors(points, steps.num_sms))
    Console().print(table)
    if args.write:
        state: dict[str, Any] = model.to_state()
        measured = state.pop("measured")
        cells = [[*key, [float(f"{value:.4g}") for value in values]] for *key, values in measured]
        lines = ",\n  ".join(json.dumps(cell) for cell in cells)
        head = json.dumps(state | {"source": args.file.name, "measured": [], "given": 0})
        FIGURES.write_text(head.replace('"given": 0', f'"given": [\n  {lines}\n ]') + "\n")


if __name__ == "__main__":
    main()

"""Goodput: the highest rate whose attainment reaches a goal, by bisection.

It takes attainment to fall with the rate. Measurements are noisy, so where they disagree the lower answer stands: the
goodput lies below the lowest rate that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What a search found.

    Attributes:
        rate: the highest rate that passed below all that failed; None if none did.
        failed_rate: the lowest rate that failed; None if none did.
    """

    rate: float | None
    failed_rate: float | None


def bracket(attainments: Mapping[float, float], goal: float) -> Goodput:
    """What known measurements say, without new ones."""
    failed = min((rate for rate, attainment in attainments.items() if attainment < goal), default=None)
    passed = [rate for rate in attainments if failed is None or rate < failed]
    return Goodput(rate=max(passed, default=None), failed_rate=failed)


def find_goodput(
    measure: Callable[[float], float],
    *,
    goal: float,
    start: float,
    known: Mapping[float, float] | None = None,
    precision: float = 0.05,
    max_runs: int = 10,
    lowest: float = 0.0,
    growth: float = 2.0,
) -> Goodput:
    """Bisect for the highest rate at which `measure(rate)` is at least `goal`.

    Args:
        measure: the attainment at a rate; costs a run.
        goal: the attainment to reach.
        start: the first rate to try where nothing is known.
        known: attainment by rate of earlier runs, which cost nothing.
        precision: stop once the rates that passed and failed differ by this share of the former.
        max_runs: most calls of `measure`.
        lowest: rates below it are not tried.
        growth: by how much the rate changes from one run to the next until one has passed and one has failed.
    """
    attainments = dict(known or {})
    for _ in range(max_runs):
        found = bracket(attainments, goal)
        rate = _next_rate(found, start, precision, growth)
        if rate is None or rate < lowest:
            break
        attainments[rate] = measure(rate)
    return bracket(attainments, goal)


def _next_rate(found: Goodput, start: float, precision: float, growth: float) -> float | None:
    """The rate to try next: more or less than what is known until both ends are, then between them."""
    match found.rate, found.failed_rate:
        case None, None:
            return start
        case float() | int() as passed, None:
            return passed * growth
        case None, float() | int() as failed:
            return failed / growth
        case float() | int() as passed, float() | int() as failed if failed > passed * (1 + precision):
            return sqrt(passed * failed)
    return None

"""The controller of semi-PD as its released code has it: the class DynamicPartitioner of its branch on DistServe.

It is not the paper's: once 400 more requests have a TPOT, fixed polynomials predict what 2 to 6 points more or less
would do, within 80 to 100 percent for each phase. Nothing is learned, nothing is normalised, and nothing is given back
while both targets hold.

Kept as it is, since it is what that code does:

- The waiting time is predicted by a parabola that jumps from 1.11 to 1 at 100 % and has its minimum at 88.9 %, so that
  from 98 down to 89 fewer SMs are said to shorten it.
- The TPOT has a margin of a tenth when it is judged and none when it is predicted.
- If both targets fail, both phases get the whole device, unless one has it: then nothing changes.

Not kept: the index of the 90th percentile, int(0.9 n + 1), is bounded by the last one of n (beyond it for up to 10
values, where that code would raise); a decision that changes nothing rebuilds nothing; nothing has to be left out while
processes are exchanged, since a plan changes at a step border. TTFTs are told when requests end, with their TPOT, and
not with the first token. While only one kind of work waits, it has the whole device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from semipd.request import RequestTimings
from semipd.sched.semi_pd import Shares, SplitDecision, SplitPolicy, SplitReason

T = TypeVar("T", float, tuple[float, float])

WINDOW = 400
"""Requests with a TPOT from one decision to the next."""

_STEP, _MAX_STEPS = 2.0, 3  # points of percent
_FLOOR, _CEILING = 80.0, 100.0
_MARGIN = 1.1
_PREFILL, _DECODE = range(2)


class ReleasedSemiPD(SplitPolicy):
    """The rules of the released code, from 100 % for each phase on.

    Args:
        shares: of the device.
        ttft: target in seconds.
        tpot: target in seconds.
    """

    def __init__(self, shares: Shares, *, ttft: float, tpot: float) -> None:
        super().__init__(shares, (_CEILING, _CEILING))
        self._targets = (ttft, tpot)
        self._tpots: list[float] = []
        self._ttfts: list[tuple[float, float]] = []  # and how much of each was waiting

    def observe(self, timings: RequestTimings) -> None:
        """Keep what a request measured, and decide once there are enough of them."""
        if timings.ttft is not None and timings.queued is not None:
            self._ttfts.append((timings.ttft, timings.queued))
        if timings.tpot is not None:
            self._tpots.append(timings.tpot)
        if len(self._tpots) >= WINDOW and self._ttfts:
            self._decide()
            self._tpots.clear()
            self._ttfts.clear()

    def _decide(self) -> None:
        tpot = _p90(self._tpots)
        ttft, waiting = _p90(self._ttfts)
        before = self._percents

        def predict(percents: tuple[float, float]) -> tuple[float, float]:
            """TTFT and TPOT after a change from `before`."""
            new, old = percents[_PREFILL], before[_PREFILL]
            new_ttft = waiting * _ratio(waiting_factor, new, old) + (ttft - waiting) * _ratio(prefill_factor, new, old)
            return new_ttft, tpot * _ratio(tpot_factor, percents[_DECODE], before[_DECODE])

        ttft_holds, tpot_holds = ttft <= self._targets[0], _MARGIN * tpot <= self._targets[1]
        asked = before
        if not ttft_holds and not tpot_holds:
            if max(before) < _CEILING:
                asked = (_CEILING, _CEILING)
        elif not (ttft_holds and tpot_holds):
            asked = self._shift(_DECODE if ttft_holds else _PREFILL, predict)
        self._take(
            SplitDecision(
                asked=asked,
                given=self._shares.round(asked),
                reason=SplitReason.of(ttft_holds=ttft_holds, tpot_holds=tpot_holds),
                observed=(ttft, tpot),
                predicted=predict(asked),
            )
        )

    def _shift(self, side: int, predict: Callable[[tuple[float, float]], tuple[float, float]]) -> tuple[float, float]:
        """Percentages that favour `side`.

        They raise it until it is predicted to hold; at the ceiling they lower the other one as long as that one is.
        """
        other = 1 - side
        asked = self._percents
        if asked[side] < _CEILING:
            for _ in range(_MAX_STEPS):
                asked = _with(asked, side, min(asked[side] + _STEP, _CEILING))
                if asked[side] == _CEILING or predict(asked)[side] <= self._targets[side]:
                    break
            return asked
        for _ in range(_MAX_STEPS):
            lower = _with(asked, other, asked[other] - _STEP)
            if lower[other] < _FLOOR or predict(lower)[other] > self._targets[other]:
                break
            asked = lower
        return asked


def tpot_factor(percent: float) -> float:
    """TPOT on a percentage of the device, as a multiple of that on all of it; there all three factors are 1."""
    return _polynomial(percent, 0.0, 0.60992, 0.41531)


def prefill_factor(percent: float) -> float:
    """The same for the time from a prompt's first step to its first token."""
    return _polynomial(percent, 0.0, 0.73244, 0.31853)


def waiting_factor(percent: float) -> float:
    """The same for the time from arrival to a prompt's first step."""
    return _polynomial(percent, 1.40465, -3.15935, 2.87347)


def _polynomial(percent: float, square: float, linear: float, constant: float) -> float:
    u = 100 / percent
    return 1.0 if u == 1 else square * u * u + linear * u + constant


def _ratio(factor: Callable[[float], float], new: float, old: float) -> float:
    return factor(new) / factor(old)


def _with(percents: tuple[float, float], side: int, percent: float) -> tuple[float, float]:
    return (percent, percents[_DECODE]) if side == _PREFILL else (percents[_PREFILL], percent)


def _p90(values: list[T]) -> T:
    """What the released code calls the 90th percentile: the 362nd smallest of 400."""
    return sorted(values)[min(int(0.9 * len(values) + 1), len(values) - 1)]

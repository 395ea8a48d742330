"""The controller of semi-PD as its paper has it (arXiv 2504.19867, section 5, Algorithm 1).

The phases have percentages x and y of the device, each by itself, so that both together may be over-subscribed. Once in
so many iterations the percentiles of TTFT and TPOT teach a model, and the phase that misses its target is given more,
step by step, until the model expects it to hold. Where the paper's listing and its text differ, the text is followed.
What stands in neither is decided so:

- An iteration is a decode step: the two lanes have no step in common, and decode's never rest while both kinds wait.
- A TTFT counts in the window of the first token, a TPOT in that of the last one. A target of which a window has no
  measurement holds.
- Percentages are rounded to shares that the device offers, and the model learns and predicts at what was given.
- While only one kind of work waits, it has the whole device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from semipd.config import Phase, Plan, SemiPDPolicy
from semipd.request import Request, RequestTimings
from semipd.sched.policy import Load

_MOST_REQUESTS = 10_000  # of a window: one of requests that never decode would not end

# Figure 10 of the paper, times as multiples of those at 100 %: 0.6809 / (x - lambda) + 0.022 and 0.6284 / y + 0.3818.
_TTFT_SHAPE, _TPOT_SHAPE = (0.6809, 0.022), (0.6284, 0.3818)
_USUAL_LAMBDA, _LAMBDA_SPREAD = 0.3, 0.3  # the former makes the first of them 1 at 100 %
_FINEST = 0.02  # steps of lambda, and the least x - lambda: at the pole the model says "very long", not infinity
_NOISE = 0.1  # how far off a window's percentile is, as a share of it
_KEPT = 0.95  # what a window counts one window later
_SURPRISE = 0.3  # logarithm of a time over its prediction from which it is the load that changed


class SplitReason(StrEnum):
    """What a window showed."""

    BOTH_HOLD = "TTFT and TPOT hold"
    TTFT_FAILS = "TTFT fails"
    TPOT_FAILS = "TPOT fails"
    BOTH_FAIL = "TTFT and TPOT fail"

    @staticmethod
    def of(*, ttft_holds: bool, tpot_holds: bool) -> SplitReason:
        """The reason for whether each target holds."""
        if ttft_holds:
            return SplitReason.BOTH_HOLD if tpot_holds else SplitReason.TPOT_FAILS
        return SplitReason.TTFT_FAILS if tpot_holds else SplitReason.BOTH_FAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitDecision:
    """What came of a window. Pairs are (prefill, decode) or (TTFT, TPOT), times in seconds.

    Attributes:
        asked: percentages of the device.
        given: the shares that they were rounded to.
        reason: which targets held.
        observed: percentiles of the window; None without a measurement.
        predicted: those expected under `given`; None before the first measurement.
    """

    asked: tuple[float, float]
    given: tuple[int, int]
    reason: SplitReason
    observed: tuple[float | None, float | None]
    predicted: tuple[float | None, float | None]


class Shares:
    """Rounds percentages to the shares that a device of `num_sms` offers.

    Args:
        num_sms: of the device.
        splits: (prefill, decode) shares that are disjoint; the whole device is offered to each phase besides.
    """

    def __init__(self, num_sms: int, splits: Sequence[tuple[int, int]]) -> None:
        self.num_sms = num_sms
        self._splits = splits
        self._offered = tuple(sorted({num_sms, *(split[side] for split in splits)}) for side in range(2))

    def wanted(self, percents: tuple[float, float]) -> tuple[float, float]:
        """The shares behind (prefill, decode) percentages before they are rounded."""
        return percents[0] * self.num_sms / 100, percents[1] * self.num_sms / 100

    def round(self, percents: tuple[float, float]) -> tuple[int, int]:
        """The nearest shares, the larger of two; disjoint ones, if there are any, for percentages up to 100 in all."""
        wanted = self.wanted(percents)
        if sum(percents) <= 100 and self._splits:
            return min(self._splits, key=lambda split: math.dist(split, wanted))
        prefill, decode = (
            min(offered, key=lambda share: (abs(share - target), -share))
            for offered, target in zip(self._offered, wanted, strict=True)
        )
        return prefill, decode

    def least(self, side: int) -> float:
        """The smallest share of prefill (0) or decode (1), in percent."""
        return 100 * self._offered[side][0] / self.num_sms


class SplitPolicy:
    """Base of policies that move a pair of percentages: the split while both kinds of work wait, else the device.

    Attributes:
        last_decision: of the last window; None before the first.
        reason: what the last window showed, while its split is new; else empty.
        asked: the shares wanted by the split that was chosen; None with the whole device for one kind.
    """

    last_decision: SplitDecision | None = None
    reason: str = ""
    asked: tuple[float, float] | None = None

    def __init__(self, shares: Shares, percents: tuple[float, float]) -> None:
        self._shares = shares
        self._percents = percents
        self._given = self._announced = shares.round(percents)
        self._split = Plan.split(*self._given)
        self._alone = {phase: Plan.exclusive(phase, shares.num_sms) for phase in Phase}

    def choose(self, load: Load) -> Plan:
        """The split, or the whole device for the one kind of work that waits."""
        if not (load.has_prefill and load.has_decode):
            self.reason, self.asked = "", None
            return self._alone[Phase.PREFILL if load.has_prefill else Phase.DECODE]
        self.reason = ""
        if self.last_decision is not None and self._given != self._announced:
            self.reason, self._announced = self.last_decision.reason.value, self._given
        self.asked = self._shares.wanted(self._percents)
        return self._split

    def _take(self, decision: SplitDecision) -> None:
        """Go over to the split of `decision`."""
        self.last_decision = decision
        self._percents = decision.asked
        if decision.given != self._given:
            self._given = decision.given
            self._split = Plan.split(*decision.given)


class SemiPD(SplitPolicy):
    """Algorithm 1 of the paper.

    Args:
        shares: of the device.
        config: window, steps and the percentages to start from.
        ttft: target in seconds.
        tpot: target in seconds.
    """

    def __init__(self, shares: Shares, config: SemiPDPolicy, *, ttft: float, tpot: float) -> None:
        super().__init__(shares, (config.prefill_percent, config.decode_percent))
        self._config = config
        self._targets = (ttft, tpot)
        lambdas = [index * _FINEST for index in range(int(1 / _FINEST) - 1)]
        self._models = (ShareModel(_TTFT_SHAPE, lambdas), ShareModel(_TPOT_SHAPE, (0.0,)))
        self._ended = deque[RequestTimings](maxlen=_MOST_REQUESTS)
        self._num_iterations = 0
        self._num_decode_steps = 0
        self._window_start = -math.inf

    def choose(self, load: Load) -> Plan:
        """The plan after the window that this step border may end."""
        # At most one step was launched since the last step border; one with prompt tokens sets the count to 0.
        is_iteration = load.num_decode_steps > self._num_decode_steps
        self._num_decode_steps = load.num_decode_steps
        if is_iteration:
            self._num_iterations += 1
            if self._num_iterations % self._config.window_size == 0:
                self._end_window(load)
        return super().choose(load)

    def observe(self, timings: RequestTimings) -> None:
        """Keep what a request measured until its window ends."""
        self._ended.append(timings)

    def _end_window(self, load: Load) -> None:
        observed = self._observed(load.decoding)
        self._window_start = load.now
        self._ended.clear()
        for model, share, seconds in zip(self._models, _normalised(self._given), observed, strict=True):
            if seconds is not None:
                model.observe(share, seconds)
        ttft_holds, tpot_holds = (
            seconds is None or seconds <= target for seconds, target in zip(observed, self._targets, strict=True)
        )
        asked = self._percents
        if ttft_holds != tpot_holds:
            asked = self._raise(0 if tpot_holds else 1, asked)
        given = self._shares.round(asked)
        self._take(
            SplitDecision(
                asked=asked,
                given=given,
                reason=SplitReason.of(ttft_holds=ttft_holds, tpot_holds=tpot_holds),
                observed=observed,
                predicted=(self._predict(0, given), self._predict(1, given)),
            )
        )

    def _observed(self, decoding: Sequence[Request]) -> tuple[float | None, float | None]:
        """Percentiles of (TTFT, TPOT) in the window that ends."""
        start = self._window_start
        ttfts = [t.ttft for t in self._ended if t.ttft is not None and t.arrival + t.ttft > start]
        ttfts += [
            request.first_token_time - request.arrival_time
            for request in decoding
            if request.first_token_time is not None and request.first_token_time > start
        ]
        tpots = [t.tpot for t in self._ended if t.tpot is not None]
        return percentile(ttfts, self._config.percentile), percentile(tpots, self._config.percentile)

    def _raise(self, side: int, percents: tuple[float, float]) -> tuple[float, float]:
        """Up to `max_step` steps for prefill (0) or decode (1), while it is predicted to fail.

        A step raises its percentage, or lowers the other one where that would pass 100.
        """
        step = self._config.step_size
        pair = list(percents)
        for _ in range(self._config.max_step):
            predicted = self._predict(side, self._shares.round((pair[0], pair[1])))
            if predicted is not None and predicted <= self._targets[side]:
                break
            if pair[side] + step <= 100:
                pair[side] += step
            elif pair[1 - side] - step >= self._shares.least(1 - side):
                pair[1 - side] -= step
            else:
                break  # nothing is left to give
        return pair[0], pair[1]

    def _predict(self, side: int, given: tuple[int, int]) -> float | None:
        return self._models[side].predict(_normalised(given)[side])


class ShareModel:
    """Learns seconds = a / (x - lambda) + b of a share x in (0, 1], old observations forgotten.

    The one parameter that is not linear is taken from a grid: for each lambda the best a and b follow from sums, and
    the lambda whose line errs least is believed (separable least squares: Golub and Pereyra, "The differentiation of
    pseudo-inverses and nonlinear least squares problems whose variables separate", 1973). Errors count relative to the
    seconds. Until shares have varied, the curve has the paper's shape through what was seen. A window far from its
    prediction has those before it forgotten at once (a variable forgetting factor: Fortescue, Kershenbaum and Ydstie,
    "Implementation of self-tuning regulators with variable forgetting factors", 1981).

    Args:
        shape: a and b, of which only the ratio is used.
        lambdas: the grid; 0 alone learns a / x + b.
    """

    def __init__(self, shape: tuple[float, float], lambdas: Sequence[float]) -> None:
        self._lines = [(pole, _Line(*shape)) for pole in lambdas]
        self._fit: tuple[float, float, float] | None = None

    @property
    def coefficients(self) -> tuple[float, float, float] | None:
        """a, b and lambda as they are believed now; None before the first observation."""
        return self._fit

    def observe(self, share: float, seconds: float) -> None:
        """A window at `share` took `seconds`. Times that are not positive teach nothing."""
        if seconds <= 0:
            return
        predicted = self.predict(share)
        surprise = abs(math.log(seconds / predicted)) if predicted else 0.0
        kept = _KEPT * math.exp(-4 * max(surprise - _SURPRISE, 0.0))  # 2 of the 4 undo that short times weigh more
        best = math.inf
        for pole, line in self._lines:
            line.observe(_reciprocal(share, pole), seconds, kept)
            if pole and pole > share - _FINEST:
                continue  # the queue would not have been served
            a, b, error = line.solve()
            error += (_NOISE * (pole - _USUAL_LAMBDA) / _LAMBDA_SPREAD) ** 2
            if error < best:
                best, self._fit = error, (a, b, pole)

    def predict(self, share: float) -> float | None:
        """Seconds at `share`; None before the first observation."""
        if self._fit is None:
            return None
        a, b, pole = self._fit
        return a * _reciprocal(share, pole) + b


class _Line:
    """Recursive least squares of t = a u + b with forgetting, a and b not negative, errors relative to t.

    A prior that is never forgotten keeps both determined while u rests: the shape, scaled to the observations, as if
    each coefficient were known to the scale itself.
    """

    def __init__(self, a: float, b: float) -> None:
        self._shape = (a, b)
        self._count = self._w = self._u = self._uu = self._t = self._tu = 0.0

    def observe(self, u: float, t: float, kept: float) -> None:
        """One more pair; those before count `kept` of what they did."""
        weight = 1 / (t * t)
        self._count = kept * self._count + 1
        self._w = kept * self._w + weight
        self._u = kept * self._u + weight * u
        self._uu = kept * self._uu + weight * u * u
        self._t = kept * self._t + weight * t
        self._tu = kept * self._tu + weight * t * u

    def solve(self) -> tuple[float, float, float]:
        """a, b and the sum of squared errors, the prior's among them."""
        shape_a, shape_b = self._shape
        squares = shape_a**2 * self._uu + 2 * shape_a * shape_b * self._u + shape_b**2 * self._w
        scale = (shape_a * self._tu + shape_b * self._t) / squares
        prior_a, prior_b, prior = scale * shape_a, scale * shape_b, (_NOISE / scale) ** 2
        uu, w = self._uu + prior, self._w + prior
        tu, t = self._tu + prior * prior_a, self._t + prior * prior_b
        determinant = uu * w - self._u**2
        a = (tu * w - t * self._u) / determinant
        b = (t * uu - tu * self._u) / determinant
        if a < 0:
            a, b = 0.0, t / w
        elif b < 0:
            a, b = tu / uu, 0.0
        error = self._count - 2 * (a * self._tu + b * self._t)
        error += a * a * self._uu + 2 * a * b * self._u + b * b * self._w
        return a, b, error + prior * ((a - prior_a) ** 2 + (b - prior_b) ** 2)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that `percent` of all do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


def _normalised(given: tuple[int, int]) -> tuple[float, float]:
    """The paper's x' = x / (x + y) and y' = y / (x + y)."""
    return given[0] / sum(given), given[1] / sum(given)


def _reciprocal(share: float, pole: float) -> float:
    return 1 / max(share - pole, _FINEST)

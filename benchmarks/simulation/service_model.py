"""An engine as two queues with fitted service curves, cheap enough for fleets of 10,000.

    first token:  a prompt of w tokens is served first come, first served, in w * (p0 + p1 * n) seconds, and
                  c seconds later its token is out
    decode:       the n requests that decode share the engine: each makes a token every
                  d0 + d1 * n + d2 * n * context seconds, and d3 + d4 * n more while a prompt is served

n counts requests that decode; context is the mean over them of prompt and half of the output. The coefficients are
fitted to what fleets of simulated engines served. What they do not know: blocks running out, prefix hits, worst gaps.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation.fleet import Arrivals, Served
from semipd.bench.schedule import PlannedRequest

Array = NDArray[np.float64]

_FOREVER = 1e9  # seconds
_FULL = 0.9  # share of the places from which on prompts wait for one


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceModel:
    """The curves, in seconds; see the module.

    Attributes:
        delay: c.
        token, token_per_decode: p0 and p1.
        step, step_per_decode, step_per_context: d0 to d2.
        beside_prompt, beside_prompt_per_decode: d3 and d4.
        max_decodes: requests that decode at the same time.
    """

    delay: float
    token: float
    token_per_decode: float
    step: float
    step_per_decode: float
    step_per_context: float
    beside_prompt: float
    beside_prompt_per_decode: float
    max_decodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How far engines of the model are from those that it was fitted to, given the same requests: median and p90.

    Attributes:
        ttft: in seconds.
        tpot: as a share of what was measured.
    """

    ttft: tuple[float, float]
    tpot: tuple[float, float]


def fit(served: Sequence[Served], *, max_decodes: int) -> tuple[ServiceModel, FitError]:
    """The curves that explain best what engines did, by least squares of relative errors.

    TTFT is fitted by busy periods, from a prompt that finds none before it to the last first token of those that
    follow: engines compute short prompts together, so single prompts have no time of their own. Periods in which
    prompts wait for one of the `max_decodes` places are left out.
    """
    engines = [[one for one in served if one.engine == engine] for engine in sorted({one.engine for one in served})]
    parts = [_terms(requests) for requests in engines]
    periods, period_terms, steps, step_terms = (np.concatenate(part) for part in zip(*parts, strict=True))
    has_room = period_terms[:, 2] < _FULL * max_decodes * period_terms[:, 1]  # tokens * decodes, tokens
    first = _solve(period_terms[has_room], periods[has_room]).tolist()
    step = _solve(step_terms, steps).tolist()
    model = ServiceModel(
        delay=first[0],
        token=first[1],
        token_per_decode=first[2],
        step=step[0],
        step_per_decode=step[1],
        step_per_context=step[2],
        beside_prompt=step[3],
        beside_prompt_per_decode=step[4],
        max_decodes=max_decodes,
    )
    return model, _replay(model, engines)


def _replay(model: ServiceModel, engines: Sequence[Sequence[Served]]) -> FitError:
    ttft, tpot = [], []
    for requests in engines:
        engine = _Engine(model, 0)
        for one in requests:
            engine.advance(one.request.due)
            engine.add(one.request)
        engine.advance(_FOREVER)
        foretold = {one.request.index: one for one in engine.served}
        for one in requests:
            other = foretold[one.request.index]
            if one.last < math.inf:
                ttft.append(other.ttft - one.ttft)
            if one.tpot is not None and other.tpot is not None:
                tpot.append(other.tpot / one.tpot - 1.0)
    return FitError(ttft=_spread(ttft), tpot=_spread(tpot))


def describe(model: ServiceModel) -> dict[str, float]:
    """The coefficients, for results."""
    return asdict(model)


def _terms(served: Sequence[Served]) -> tuple[Array, Array, Array, Array]:
    """Of one engine: lengths of busy periods with their terms, and times per token with theirs."""
    ended = [one for one in served if one.last < math.inf]
    due = np.array([one.request.due for one in ended])
    first = np.array([one.first for one in ended])
    last = np.array([one.last for one in ended])
    inputs = np.array([one.request.num_prompt_tokens for one in ended], dtype=float)
    outputs = np.array([one.request.num_output_tokens for one in ended], dtype=float)
    decodes = _Level(first, last, np.ones(len(ended)))
    contexts = _Level(first, last, inputs + outputs / 2)
    prompts = _Level(due, first, np.ones(len(ended)))

    latest = np.maximum.accumulate(first)  # first token of all up to this one
    starts = np.flatnonzero(np.concatenate([[True], due[1:] > latest[:-1]]))
    period_start, period_end = due[starts], latest[np.append(starts[1:], len(due)) - 1]
    tokens = np.add.reduceat(inputs, starts)
    period_decodes = decodes.mean(period_start, period_end)
    period_terms = np.stack([np.ones(len(starts)), tokens, tokens * period_decodes], axis=1)

    busy, beside = prompts.busy(first, last), decodes.mean(first, last)
    step_terms = np.stack([np.ones(len(ended)), beside, contexts.mean(first, last), busy, busy * beside], axis=1)
    has_steps = outputs > 1
    steps = (last - first)[has_steps] / (outputs[has_steps] - 1)
    return period_end - period_start, period_terms, steps, step_terms[has_steps]


class _Level:
    """The sum over time of weights that hold from a start to an end each."""

    def __init__(self, starts: Array, ends: Array, weights: Array) -> None:
        times = np.concatenate([starts, ends])
        order = np.argsort(times, kind="stable")
        self._times = times[order]
        levels = np.cumsum(np.concatenate([weights, -weights])[order])
        widths = np.diff(self._times)
        self._integral = np.concatenate([[0.0], np.cumsum(levels[:-1] * widths)])
        self._busy = np.concatenate([[0.0], np.cumsum((levels[:-1] > 0.5) * widths)])

    def mean(self, starts: Array, ends: Array) -> Array:
        """The mean level of each stretch of time."""
        return self._over(self._integral, starts, ends)

    def busy(self, starts: Array, ends: Array) -> Array:
        """The share of each stretch in which the level is above 0."""
        return self._over(self._busy, starts, ends)

    def _over(self, integral: Array, starts: Array, ends: Array) -> Array:
        widths = np.maximum(ends - starts, 1e-9)
        return (np.interp(ends, self._times, integral) - np.interp(starts, self._times, integral)) / widths


def _solve(terms: Array, values: Array) -> Array:
    """Coefficients from 0 on that minimise relative errors."""
    scaled = terms / values[:, None]
    kept = list(range(terms.shape[1]))
    while True:  # a coefficient below 0 is none; so few of them need no better method
        solution = np.linalg.lstsq(scaled[:, kept], np.ones(len(values)), rcond=None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    curve = np.zeros(terms.shape[1])
    curve[kept] = solution
    return curve


def _spread(errors: Sequence[float]) -> tuple[float, float]:
    return float(np.quantile(np.abs(errors), 0.5)), float(np.quantile(np.abs(errors), 0.9))


class ModelShard:
    """Engines that follow a `ServiceModel`; a `Shard` of a fleet."""

    def __init__(self, model: ServiceModel, numbers: Sequence[int]) -> None:
        self._engines = {number: _Engine(model, number) for number in numbers}

    def begin(self, until: float, arrivals: Arrivals) -> None:
        engines = self._engines
        for number, request in arrivals:
            engine = engines[number]
            if engine.next_event <= request.due:
                engine.advance(request.due)
            engine.add(request)
        for engine in engines.values():
            if engine.next_event <= until:
                engine.advance(until)

    def loads(self) -> Sequence[float]:
        return [engine.load for engine in self._engines.values()]

    def close(self) -> Sequence[Served]:
        return [one for engine in self._engines.values() for one in engine.served]


class _Engine:
    """One engine between its events: a prompt is done, or the next request of those that decode."""

    __slots__ = (
        "_busy_until", "_context", "_decoding", "_events", "_model", "_now", "_number", "_per_token", "_prompts",
        "_starting", "_tokens", "load", "next_event", "served",
    )  # fmt: skip

    def __init__(self, model: ServiceModel, number: int) -> None:
        self._model = model
        self._number = number
        self._now = 0.0
        self._prompts = deque[PlannedRequest]()  # the first one is served
        self._busy_until = math.inf  # when it is done
        self._starting = deque[tuple[float, PlannedRequest]]()  # whose first token is under way
        self._decoding: list[tuple[float, int, float, PlannedRequest]] = []  # by the token count at which they end
        self._tokens = 0.0  # that each request that decodes has made since the beginning
        self._per_token = math.inf
        self._context = 0.0  # sum over them
        self.load = 0.0
        self.next_event = math.inf
        self.served: list[Served] = []

    def add(self, request: PlannedRequest) -> None:
        """A request arrives; whatever was due before must have happened."""
        self._move(request.due)
        self._prompts.append(request)
        self.load += request.num_prompt_tokens + request.num_output_tokens
        self._plan()

    def advance(self, until: float) -> None:
        """Let everything happen that is due."""
        while self.next_event <= until:
            self._move(self.next_event)
            if self._busy_until <= self._now:
                self._busy_until = math.inf
                self._starting.append((self._now + self._model.delay, self._prompts.popleft()))
            while self._starting and self._starting[0][0] <= self._now:
                self._start(self._starting.popleft()[1])
            while self._decoding and self._decoding[0][0] <= self._tokens + 1e-6:
                _, _, first, request = heapq.heappop(self._decoding)
                self._context -= _context(request)
                self.load -= request.num_output_tokens
                self._end(request, first)
            self._plan()

    def _move(self, now: float) -> None:
        if self._decoding:
            self._tokens += (now - self._now) / self._per_token
        self._now = now

    def _start(self, request: PlannedRequest) -> None:
        self.load -= request.num_prompt_tokens
        if request.num_output_tokens == 1:
            self.load -= 1
            self._end(request, self._now)
            return
        end = self._tokens + request.num_output_tokens - 1
        heapq.heappush(self._decoding, (end, request.index, self._now, request))
        self._context += _context(request)

    def _end(self, request: PlannedRequest, first: float) -> None:
        self.served.append(Served(engine=self._number, request=request, first=first, last=self._now, worst_gap=None))

    def _plan(self) -> None:
        """Serve the next prompt if none is served, and find out what happens next."""
        model, num_decodes = self._model, len(self._decoding)
        if self._busy_until == math.inf and self._prompts and num_decodes + len(self._starting) < model.max_decodes:
            per_token = model.token + model.token_per_decode * num_decodes
            self._busy_until = self._now + self._prompts[0].num_prompt_tokens * per_token
        self.next_event = min(self._busy_until, self._starting[0][0] if self._starting else math.inf)
        if num_decodes:
            self._per_token = model.step + model.step_per_decode * num_decodes + model.step_per_context * self._context
            if self._prompts or self._starting:
                self._per_token += model.beside_prompt + model.beside_prompt_per_decode * num_decodes
            left = max(self._decoding[0][0] - self._tokens, 0.0)
            self.next_event = min(self.next_event, self._now + left * self._per_token)


def _context(request: PlannedRequest) -> float:
    return request.num_prompt_tokens + request.num_output_tokens / 2

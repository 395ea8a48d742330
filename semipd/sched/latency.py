"""How long a step takes: a model of step times, fitted online from the steps that were measured.

The one idea: a step is four terms, and their sum fits prompts, decodes and both together,

    seconds = hypot(weights, row * rows) + context * context_tokens + pair * prompt_pairs

The products of a step read the weights and compute its rows, which overlap: hypot is the soft maximum of the two times.
Attention of decodes reads their contexts; attention of prompts computes pairs of tokens. On an H100, 1 to 8,192 rows
follow it within 4 %, and steps with both kinds of work, foretold from steps of one kind each, within 8 %.

Coefficients belong to a kind of step on a share of the device, beside a share of the other lane (a *cell*). A cell that
has seen no step takes each coefficient from the nearest cell that knows it, scaled by how bandwidth and compute follow
from shares, or as the figures say that a model may start with, be they of another device.

Each cell is a recursive least squares fit (an extended Kalman filter) of the logarithms of its coefficients to the
logarithm of the time: errors count relative to the step, no coefficient can become negative, so predictions rise with
rows, pairs and contexts, and the gradient is simply the share of each term in the prediction.

The scheduler owns a model and calls it under its lock. It knows neither devices, clocks nor requests, nor sliding
windows: the work of such a model is counted as if it read everything, and the fit makes up for it at usual contexts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

STATE_VERSION = 1
"""Of `LatencyModel.to_state`. Raise it whenever stored coefficients would mean something else."""

_WEIGHTS, _ROW, _CONTEXT, _PAIR = _TERMS = range(4)
_DEFAULT = (5.9e-3, 24e-6, 45e-9, 0.4e-9)  # seconds: Llama-3-8B in bfloat16 on one H100; ratios serve any device
# How far off a new cell's coefficients may be, as sd of their logarithms: all four together, and each by itself.
_COMMON, _OWN = 0.3, 0.5  # taken from another cell
_UNSEEN_COMMON, _UNSEEN_OWN = 3.0, 1.5  # of a model, of a term that no cell knows: ratios differ from device to device
_NOISE = 0.08  # log sd of a step at first; then a running mean of what it is
_NOISE_FLOOR = 0.01
_NOISE_RATE = 0.05  # of that mean
_DRIFT = 0.1  # what coefficients change a step, in units of the noise's variance: a new level is learned in 10 steps
_GATE = 4.0  # standard deviations from which a step is an outlier
_NEW_LEVEL = 3  # as many outliers in a row, all above or all below, are no outliers
_WINDOW = 512  # steps that errors are taken over
_FIRST_CHUNK = 64  # prompt tokens of a MIXED step before any was measured
_TRUST = 1.5
_RECENT = 0.97  # what a chunk counts for one MIXED step later

Vector = list[float]
Matrix = list[list[float]]


class StepKind(StrEnum):
    """What a step computes; each kind has coefficients of its own."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


# The terms that a kind's steps tell apart; its other coefficients only follow its level.
_KNOWS = {
    StepKind.PREFILL: (_ROW, _PAIR),
    StepKind.DECODE: (_WEIGHTS, _CONTEXT),
    StepKind.MIXED: (_WEIGHTS, _ROW, _CONTEXT, _PAIR),
}


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do, and where.

    Attributes:
        num_sms: the share of the device that it runs on.
        other_sms: the share that the other lane's running step holds; 0 if that lane rests.
        num_prompt_tokens: tokens of all prompt chunks.
        prompt_pairs: (token, token it attends to) of all prompt chunks.
        num_decodes: decode rows.
        context_tokens: tokens that decode rows attend to.
    """

    num_sms: int
    other_sms: int = 0
    num_prompt_tokens: int = 0
    prompt_pairs: int = 0
    num_decodes: int = 0
    context_tokens: int = 0

    @staticmethod
    def of(
        num_sms: int,
        *,
        other_sms: int = 0,
        chunks: Iterable[tuple[int, int]] = (),
        num_decodes: int = 0,
        context_tokens: int = 0,
    ) -> StepWork:
        """The work of prompt chunks, each as (position of its first token, tokens), and of decodes."""
        num_tokens = num_pairs = 0
        for start, length in chunks:
            num_tokens += length
            num_pairs += count_pairs(start, length)
        return StepWork(num_sms, other_sms, num_tokens, num_pairs, num_decodes, context_tokens)

    @property
    def kind(self) -> StepKind:
        """Follows from what the step holds."""
        if self.num_prompt_tokens:
            return StepKind.MIXED if self.num_decodes else StepKind.PREFILL
        return StepKind.DECODE


def count_pairs(start: int, length: int) -> int:
    """Pairs of a chunk of `length` tokens from position `start`: each token attends to all before it and itself."""
    return length * start + length * (length + 1) // 2


class LatencyModel:
    """Predicts step times on a device of `num_sms`, and learns from those measured.

    Args:
        num_sms: of the whole device: SMs of a GPU, cores of a CPU.

    Attributes:
        num_sms: of the whole device.
        is_calibrated: a calibration of this device and model is part of what it knows.
    """

    def __init__(self, num_sms: int) -> None:
        self.num_sms = num_sms
        self.is_calibrated = False
        self._cells: dict[_Key, _Cell] = {}
        self._given: dict[_Key, Sequence[float]] = {}  # coefficients, of another device or model perhaps
        self._bases: dict[_Key, Sequence[float]] = {}
        self._lenders: dict[_Key, tuple[tuple[_Cell, float], ...]] = {}
        self._errors = deque[float](maxlen=_WINDOW)
        self._recent_chunk = 0.0
        self._known_chunk = 0  # prompt tokens of the largest MIXED step that was not learned in steady load

    @staticmethod
    def from_state(state: object) -> LatencyModel:
        """The model whose `to_state` this is, unsure enough of it to relearn a device that has changed in a few steps.

        Raises:
            ValueError: it is of another version, or no such state; the message says what is wrong with it.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"the version of a latency model's state is {version!r}; expected {STATE_VERSION}")
        try:
            model = LatencyModel(_positive_int(state["num_sms"]))
            model.is_calibrated = state["is_calibrated"] is True
            model._known_chunk = _positive_int(state["prompt_tokens"], least=0)
            model._given = dict(map(_parse_cell, state["given"]))
            for key, coefficients in map(_parse_cell, state["measured"]):
                model._cells[key] = _Cell(coefficients, model._base(key), _PRIOR)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state of a latency model is damaged: {error!r}") from error
        return model

    def to_state(self) -> dict[str, Any]:
        """What was given and learned, as values that JSON can hold; not how sure it is, nor the record of errors."""
        return {
            "version": STATE_VERSION,
            "num_sms": self.num_sms,
            "is_calibrated": self.is_calibrated,
            "prompt_tokens": max(self._known_chunk, int(self._recent_chunk)),
            "given": [[str(key[0]), *key[1:], list(values)] for key, values in self._given.items()],
            "measured": [[str(key[0]), *key[1:], list(cell.coefficients)] for key, cell in self._cells.items()],
        }

    def has_measured(self, work: StepWork) -> bool:
        """Whether steps of this kind, on this share beside that one, were ever measured on this device."""
        return (work.kind, work.num_sms, work.other_sms) in self._cells

    def predict(self, work: StepWork) -> float:
        """Seconds that the step will take on its stream."""
        weights, row, context, pair = self._coefficients((work.kind, work.num_sms, work.other_sms))
        num_rows = work.num_decodes + work.num_prompt_tokens
        return math.hypot(weights, row * num_rows) + context * work.context_tokens + pair * work.prompt_pairs

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a measured step. A backend without timers reports 0 seconds, which teaches nothing."""
        if not (0.0 < seconds < math.inf):
            return
        self._errors.append(abs(self.predict(work) / seconds - 1.0))
        if work.kind is StepKind.MIXED:
            self._recent_chunk = max(work.num_prompt_tokens, self._recent_chunk * _RECENT)
        self._learn(work, seconds)

    def calibrate(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that was made to be measured: its error is not counted, and its size trusted for good."""
        if not (0.0 < seconds < math.inf):
            return
        if work.kind is StepKind.MIXED:
            self._known_chunk = max(self._known_chunk, work.num_prompt_tokens)
        self._learn(work, seconds)

    def error(self) -> tuple[float, float] | None:
        """Median and p95 of |predicted / measured - 1|, predicted before the step was learned from; of recent steps.

        None before the first step.
        """
        if not self._errors:
            return None
        errors = sorted(self._errors)
        return errors[len(errors) // 2], errors[int(0.95 * (len(errors) - 1))]

    @property
    def trusted_prompt_tokens(self) -> int:
        """Prompt tokens of a MIXED step that are not far from what recent or stored steps had.

        In steady load all steps are alike: what of their time is for weights and what for rows does not show. So a
        prediction for many more rows may be far off, also of a model that is never off. Calibrations and stored figures
        come from steps of many sizes, so up to the largest of those the two are told apart.
        """
        return max(_FIRST_CHUNK, self._known_chunk, int(_TRUST * self._recent_chunk))

    def max_prompt_tokens(self, work: StepWork, limit: float, chunks: Iterable[tuple[int, int]]) -> int:
        """How many tokens of `chunks` the step may take beside `work` and still be predicted to last `limit` seconds.

        `chunks` is what waits, in order, each as (position of its first token, tokens); all but the last one taken are
        taken whole. 0 if not even one token fits.
        """
        kind = StepKind.MIXED if work.num_decodes else StepKind.PREFILL
        weights, row, context, pair = self._coefficients((kind, work.num_sms, work.other_sms))
        limit -= context * work.context_tokens
        num_rows = work.num_decodes + work.num_prompt_tokens
        num_pairs = work.prompt_pairs
        num_taken = 0
        for start, length in chunks:
            fitting, trial, too_many = 0, length, length + 1
            while fitting < trial:
                trial_pairs = num_pairs + count_pairs(start, trial)
                if math.hypot(weights, row * (num_rows + trial)) + pair * trial_pairs <= limit:
                    fitting = trial
                else:
                    too_many = trial
                trial = (fitting + too_many) // 2
            num_taken += fitting
            if fitting < length:
                break
            num_rows += length
            num_pairs += count_pairs(start, length)
        return num_taken

    def _learn(self, work: StepWork, seconds: float) -> None:
        key = work.kind, work.num_sms, work.other_sms
        cell = self._cells.get(key)
        if cell is None:
            known = set(_TERMS) if self._given else {term for kind, _, _ in self._cells for term in _KNOWS[kind]}
            covariance = _covariance(
                _COMMON if self._cells or self._given else _UNSEEN_COMMON,
                [_OWN if term in known else _UNSEEN_OWN for term in _TERMS],
            )
            cell = _Cell(self._coefficients(key), self._base(key), covariance)
            self._cells[key] = cell
            self._lenders.clear()
        cell.update(work, seconds)

    def _coefficients(self, key: _Key) -> Sequence[float]:
        """Of the cell, or of its lenders, as they are now."""
        cell = self._cells.get(key)
        if cell is not None:
            return cell.coefficients
        if not self._cells:
            return self._base(key)
        lenders = self._lenders.get(key)
        if lenders is None:
            lenders = self._lenders[key] = self._find_lenders(key)
        return [lender.coefficients[term] * ratio for term, (lender, ratio) in enumerate(lenders)]

    def _find_lenders(self, key: _Key) -> tuple[tuple[_Cell, float], ...]:
        """For each term the nearest cell that knows it, and by how much the term is larger here."""
        base = self._base(key)
        lenders = []
        for term in _TERMS:
            lender = self._cells[self._nearest(key, term, self._cells)]
            lenders.append((lender, base[term] / lender.base[term]))
        return tuple(lenders)

    def _base(self, key: _Key) -> Sequence[float]:
        """What the cell was expected to be before any was measured: its ratio to another's outlasts both values."""
        base = self._bases.get(key)
        if base is None:
            scales, base = self._scales(key), self._given.get(key)
            if base is None and self._given:
                nearest = [self._nearest(key, term, self._given) for term in _TERMS]
                base = [self._given[near][t] * scales[t] / self._scales(near)[t] for t, near in enumerate(nearest)]
            elif base is None:
                base = [default * scale for default, scale in zip(_DEFAULT, scales, strict=True)]
            self._bases[key] = base
        return base

    def _nearest(self, key: _Key, term: int, others: Iterable[_Key]) -> _Key:
        """Of the others that know the term, or else of all."""
        knowing = [other for other in others if term in _KNOWS[other[0]]] or others
        return min(knowing, key=lambda other: _distance(key, other, self.num_sms))

    def _scales(self, key: _Key) -> tuple[float, ...]:
        """How the terms on a share of the device compare with those on all of it, the other lane resting.

        On an H100, decode reads with 79 / 88 / 91 % of its bandwidth on 32 / 48 / 56 of 132 SMs; prefill, bound by
        power on all of them, computes at 70 / 74 / 76 % of its rate on 76 / 84 / 100. Beside the other lane prefill
        takes 1.3 times as long where that has 32 SMs, 1.6 times at 56; decode 1.4 times where prefill has 76 or more.
        """
        _, num_sms, other_sms = key
        share, other = num_sms / self.num_sms, other_sms / self.num_sms
        memory = (share + 0.1) / (1.1 * share) * (1.0 + 0.6 * other)
        compute = share**-0.8 * (1.0 + 1.3 * other)
        return memory, compute, memory, compute


_Key = tuple[StepKind, int, int]  # kind, num_sms, other_sms


def _distance(key: _Key, other: _Key, num_sms: int) -> float:
    """How little a cell tells of another: one kind tells little of another kind, an idle other lane of a busy one."""
    shares = abs(math.log(key[1] / other[1])) + abs(key[2] - other[2]) / num_sms
    return shares + 3.0 * (key[0] is not other[0]) + 0.5 * ((key[2] > 0) is not (other[2] > 0))


def _parse_cell(values: Sequence[Any]) -> tuple[_Key, list[float]]:
    """A line of a stored state: kind, num_sms, other_sms, coefficients."""
    kind, num_sms, other_sms, coefficients = values
    coefficients = [float(value) for value in coefficients]
    if len(coefficients) != len(_TERMS) or not all(0.0 < value < math.inf for value in coefficients):
        raise ValueError(f"coefficients {coefficients}; expected {len(_TERMS)} positive numbers")
    return (StepKind(kind), _positive_int(num_sms), _positive_int(other_sms, least=0)), coefficients


def _positive_int(value: object, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r}; expected an integer from {least}")
    return value


def _covariance(common: float, own: Sequence[float]) -> Matrix:
    return [[common**2 + (own[row] ** 2 if row == column else 0.0) for column in _TERMS] for row in _TERMS]


_PRIOR = _covariance(_COMMON, [_OWN] * 4)
_LEVEL = _covariance(_UNSEEN_COMMON, [_OWN] * 4)  # all terms have moved, by the same factor as far as one step can tell


def _project(covariance: Matrix, shares: tuple[float, float, float, float]) -> tuple[Vector, float]:
    """Covariance of the coefficients with a prediction of these shares, and the prediction's variance."""
    w, r, c, p = shares
    spread = [w * a + r * b + c * d + p * e for a, b, d, e in covariance]
    return spread, w * spread[_WEIGHTS] + r * spread[_ROW] + c * spread[_CONTEXT] + p * spread[_PAIR]


class _Cell:
    """The coefficients of one kind of step on one share, and how sure they are."""

    __slots__ = ("_covariance", "_logs", "_noise", "_num_outliers", "base", "coefficients")

    def __init__(self, coefficients: Sequence[float], base: Sequence[float], covariance: Matrix) -> None:
        self.coefficients = list(coefficients)
        self.base = base  # what it was expected to be before any cell was measured
        self._logs = [math.log(value) for value in coefficients]
        self._covariance = covariance
        self._noise = _NOISE
        self._num_outliers = 0  # in a row; below zero: of steps faster than predicted

    def update(self, work: StepWork, seconds: float) -> None:
        """One step of the filter. An outlier, say a step that compiled a kernel, is set aside until more confirm it."""
        weights, row, context, pair = self.coefficients
        rows = row * (work.num_decodes + work.num_prompt_tokens)
        products = math.hypot(weights, rows)
        contexts, pairs = context * work.context_tokens, pair * work.prompt_pairs
        predicted = products + contexts + pairs
        shares = (
            weights * weights / (products * predicted),
            rows * rows / (products * predicted),
            contexts / predicted,
            pairs / predicted,
        )
        innovation = math.log(seconds / predicted)
        noise = self._noise
        self._noise += (max(min(abs(innovation), _GATE * noise), _NOISE_FLOOR) - noise) * _NOISE_RATE
        spread, variance = _project(self._covariance, shares)
        variance += noise * noise
        if innovation * innovation > _GATE * _GATE * variance:
            side = 1 if innovation > 0 else -1
            self._num_outliers = side * max(side * self._num_outliers, 0) + side
            if abs(self._num_outliers) < _NEW_LEVEL:
                return
            self._covariance = _LEVEL
            spread, variance = _project(_LEVEL, shares)
            variance += noise * noise
        self._num_outliers = 0
        gain = innovation / variance
        self._logs = [value + gain * one for value, one in zip(self._logs, spread, strict=True)]
        self.coefficients = [math.exp(value) for value in self._logs]
        # What the step told, then back to the prior's covariance by a little: this forgets, and a direction that no
        # step excites ends there, never beyond.
        drift = _DRIFT * noise * noise
        keep = 1.0 - drift
        told = [value / math.sqrt(variance) for value in spread]
        self._covariance = [
            [
                (value - one * other) * keep + prior * drift
                for value, other, prior in zip(line, told, priors, strict=True)
            ]
            for line, one, priors in zip(self._covariance, told, _PRIOR, strict=True)
        ]

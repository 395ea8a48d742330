"""How long a step takes: a model of step times, fitted online from the steps that were measured.

The one idea: a step is four terms, and their sum fits prompts, decodes and both together,

    seconds = hypot(weights, row * rows) + context * context_tokens + pair * prompt_pairs

The products of a step read the weights and compute its rows, which overlap: hypot is the soft maximum of the two times.
Attention of decodes reads their contexts; attention of prompts computes pairs of tokens. On an H100, 1 to 8,192 rows
follow it within 4 %, and steps with both kinds of work, foretold from steps of one kind each, within 8 %.

Coefficients belong to a kind of step on a share of the device, beside a share of the other lane (a *cell*). A cell that
has seen no step takes each coefficient from the nearest cell that knows it, scaled by how bandwidth and compute follow
from shares.

Each cell is a recursive least squares fit (an extended Kalman filter) of the logarithms of its coefficients to the
logarithm of the time: errors count relative to the step, no coefficient can become negative, so predictions rise with
rows, pairs and contexts, and the gradient is simply the share of each term in the prediction.

The scheduler owns a model and calls it under its lock. It knows neither devices, clocks nor requests, nor sliding
windows: the work of such a model is counted as if it read everything, and the fit makes up for it at usual contexts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
    """

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms
        self._cells: dict[_Key, _Cell] = {}
        self._lenders: dict[_Key, tuple[tuple[_Cell, float], ...]] = {}
        self._errors = deque[float](maxlen=_WINDOW)
        self._recent_chunk = 0.0

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
        """Prompt tokens of a MIXED step that are not far from what recent steps had.

        In steady load all steps are alike: what of their time is for weights and what for rows does not show. So a
        prediction for many more rows may be far off, also of a model that is never off.
        """
        return max(_FIRST_CHUNK, int(_TRUST * self._recent_chunk))

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
            known = {term for kind, _, _ in self._cells for term in _KNOWS[kind]}
            covariance = _covariance(
                _COMMON if self._cells else _UNSEEN_COMMON,
                [_OWN if term in known else _UNSEEN_OWN for term in _TERMS],
            )
            cell = _Cell(self._coefficients(key), self._scales(key), covariance)
            self._cells[key] = cell
            self._lenders.clear()
        cell.update(work, seconds)

    def _coefficients(self, key: _Key) -> Sequence[float]:
        """Of the cell, or of its lenders, as they are now."""
        cell = self._cells.get(key)
        if cell is not None:
            return cell.coefficients
        if not self._cells:
            return [default * scale for default, scale in zip(_DEFAULT, self._scales(key), strict=True)]
        lenders = self._lenders.get(key)
        if lenders is None:
            lenders = self._lenders[key] = self._find_lenders(key)
        return [lender.coefficients[term] * ratio for term, (lender, ratio) in enumerate(lenders)]

    def _find_lenders(self, key: _Key) -> tuple[tuple[_Cell, float], ...]:
        """For each term the nearest cell that knows it, and by how much the term is larger here."""
        scales = self._scales(key)
        lenders = []
        for term in _TERMS:
            others = [other for other in self._cells if term in _KNOWS[other[0]]] or list(self._cells)
            lender = self._cells[min(others, key=lambda other: _distance(key, other, self._num_sms))]
            lenders.append((lender, scales[term] / lender.scales[term]))
        return tuple(lenders)

    def _scales(self, key: _Key) -> tuple[float, ...]:
        """How the terms on a share of the device compare with those on all of it, the other lane resting.

        On an H100, decode reads with 79 / 88 / 91 % of its bandwidth on 32 / 48 / 56 of 132 SMs; prefill, bound by
        power on all of them, computes at 70 / 74 / 76 % of its rate on 76 / 84 / 100. Beside the other lane prefill
        takes 1.3 times as long where that has 32 SMs, 1.6 times at 56; decode 1.4 times where prefill has 76 or more.
        """
        _, num_sms, other_sms = key
        share, other = num_sms / self._num_sms, other_sms / self._num_sms
        memory = (share + 0.1) / (1.1 * share) * (1.0 + 0.6 * other)
        compute = share**-0.8 * (1.0 + 1.3 * other)
        return memory, compute, memory, compute


_Key = tuple[StepKind, int, int]  # kind, num_sms, other_sms


def _distance(key: _Key, other: _Key, num_sms: int) -> float:
    """How little a cell tells of another: one kind tells little of another kind, an idle other lane of a busy one."""
    shares = abs(math.log(key[1] / other[1])) + abs(key[2] - other[2]) / num_sms
    return shares + 3.0 * (key[0] is not other[0]) + 0.5 * ((key[2] > 0) is not (other[2] > 0))


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

    __slots__ = ("_covariance", "_logs", "_noise", "_num_outliers", "coefficients", "scales")

    def __init__(self, coefficients: Sequence[float], scales: Sequence[float], covariance: Matrix) -> None:
        self.coefficients = list(coefficients)
        self.scales = scales
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

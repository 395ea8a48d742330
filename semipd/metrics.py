"""What an engine counts: histograms and totals fed by step events, their frozen snapshot, and its Prometheus text.

`Metrics` is written and read under the scheduler's lock. It learns of steps and of the ends of requests, never of
single tokens: a decode step of 256 requests costs one call. It knows neither scheduler nor allocator; their gauges come
in as plain numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from semipd.config import Phase, Plan
from semipd.request import FinishReason, RequestTimings
from semipd.sched.decisions import Decision

T = TypeVar("T")

# Bounds in seconds. Usual latency targets are among them, so the share that met one is read off and not interpolated.
_REQUEST_BOUNDS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
_TOKEN_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramStatistics:
    """How often a measurement fell between fixed bounds.

    Attributes:
        bounds: upper bounds of the buckets, growing; a value equal to a bound is below it.
        counts: measurements in each bucket; one more than bounds, the last is above all of them.
        total: sum of all measurements.
        maximum: the largest measurement; None without any.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    maximum: float | None

    @property
    def count(self) -> int:
        """Number of measurements."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean of all measurements, exact; None without any."""
        return self.total / self.count if self.count else None

    @property
    def p50(self) -> float | None:
        """The median; see `quantile`."""
        return self.quantile(0.5)

    @property
    def p90(self) -> float | None:
        """Nine in ten are below; see `quantile`."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float | None:
        """All but one in a hundred are below; see `quantile`."""
        return self.quantile(0.99)

    def quantile(self, share: float) -> float | None:
        """An estimate of the value that `share` of the measurements do not exceed; None without any.

        It lies in the right bucket, which it takes to be evenly filled, and never above the largest measurement.
        """
        assert 0 <= share <= 1, f"share is {share}; expected 0 to 1"
        if self.maximum is None:
            return None
        rank = max(share * self.count, 1.0)
        num_up_to = list(accumulate(self.counts))
        index = bisect_left(num_up_to, rank)
        low = self.bounds[index - 1] if index else 0.0
        high = self.bounds[index] if index < len(self.bounds) else self.maximum
        num_below = num_up_to[index] - self.counts[index]
        return min(low + (high - low) * (rank - num_below) / self.counts[index], self.maximum)


class Histogram:
    """Counts measurements that are not negative in buckets with fixed bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        assert bounds and all(a < b for a, b in pairwise((0.0, *bounds))), f"bounds do not grow from 0: {bounds}"
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._maximum: float | None = None

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` measurements of `value`."""
        if count:
            self._counts[bisect_left(self._bounds, value)] += count
            self._total += value * count
            if self._maximum is None or value > self._maximum:
                self._maximum = value

    def statistics(self) -> HistogramStatistics:
        """A snapshot."""
        return HistogramStatistics(
            bounds=self._bounds, counts=tuple(self._counts), total=self._total, maximum=self._maximum
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """An engine at one moment. Totals count from its start, times are seconds, histograms hold ended requests.

    Attributes:
        num_running: admitted requests, by the phase that they are in.
        num_waiting: requests that wait to be admitted, preempted ones included.
        kv_cache_usage: share of the KV blocks that cannot be allocated now.
        num_cached_blocks: KV blocks whose content can be matched, in use or not.
        num_prefix_query_tokens: prompt tokens looked up in the prefix cache, once per request.
        num_prefix_hit_tokens: prompt tokens found there.
        plan: what the lanes do now; None before the first plan.
        num_plan_changes: times that one plan followed another.
        num_forced_plan_changes: those of them at which a kind of work had just run out or arrived; the policy chose the
            others.
        decisions: the last 256 plans that followed another, oldest first, with reasons, predicted and measured step
            times.
        num_prompt_tokens: prompt tokens computed; those found in the prefix cache are not, those computed again after a
            preemption are.
        num_generation_tokens: tokens generated.
        num_preemptions: times that a running request lost its blocks to others.
        num_finished: ended requests by reason.
        slo_attainment: share of the ended requests with an SLO that met it; None if there are none.
        ttft: arrival to first token.
        tpot: mean time per token after the first, per request.
        inter_token_latency: time between tokens: of each request its largest gap, and its other gaps at their mean.
        worst_gap: largest time between two tokens, per request.
        queue_time: arrival to the first step that computed any of the request.
        e2e_latency: arrival to the end; aborted requests are left out.
        step_time: duration of steps, of all since the start, by the lane that ran them.
        step_time_error: how far predicted durations were off, as a share, of recent steps: median and p95; None before
            the first step.
    """

    num_running: Mapping[Phase, int]
    num_waiting: int
    kv_cache_usage: float
    num_cached_blocks: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    plan: Plan | None
    num_plan_changes: int
    num_forced_plan_changes: int
    decisions: tuple[Decision, ...]
    num_prompt_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    num_finished: Mapping[FinishReason, int]
    slo_attainment: float | None
    ttft: HistogramStatistics
    tpot: HistogramStatistics
    inter_token_latency: HistogramStatistics
    worst_gap: HistogramStatistics
    queue_time: HistogramStatistics
    e2e_latency: HistogramStatistics
    step_time: Mapping[Phase, HistogramStatistics]
    step_time_error: tuple[float, float] | None


class Metrics:
    """Counts what the lanes and requests of one engine do."""

    def __init__(self) -> None:
        self._num_prefix_query_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._num_plan_changes = 0
        self._num_forced_plan_changes = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_preemptions = 0
        self._num_finished = dict.fromkeys(FinishReason, 0)
        self._num_with_slo = 0
        self._num_slo_attained = 0
        self._ttft = Histogram(_REQUEST_BOUNDS)
        self._tpot = Histogram(_TOKEN_BOUNDS)
        self._inter_token_latency = Histogram(_TOKEN_BOUNDS)
        self._worst_gap = Histogram(_TOKEN_BOUNDS)
        self._queue_time = Histogram(_REQUEST_BOUNDS)
        self._e2e_latency = Histogram(_REQUEST_BOUNDS)
        self._step_time = {phase: Histogram(_TOKEN_BOUNDS) for phase in Phase}

    def on_first_admission(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request was admitted for the first time, with that much of its prompt in the prefix cache."""
        self._num_prefix_query_tokens += num_prompt_tokens
        self._num_prefix_hit_tokens += num_cached_tokens

    def on_step(self, phase: Phase, num_prefill_tokens: int, num_decode_tokens: int, seconds: float) -> None:
        """A step was committed.

        Args:
            phase: the lane that ran it.
            num_prefill_tokens: prompt tokens that it computed.
            num_decode_tokens: tokens that it gave to requests, first tokens included, dropped ones not.
            seconds: how long it ran.
        """
        self._num_prompt_tokens += num_prefill_tokens
        self._num_generation_tokens += num_decode_tokens
        self._step_time[phase].observe(seconds)

    def on_finish(
        self, timings: RequestTimings, reason: FinishReason, num_output_tokens: int, slo_attained: bool | None
    ) -> None:
        """A request ended; `slo_attained` is None if it had no SLO."""
        self._num_finished[reason] += 1
        if slo_attained is not None:
            self._num_with_slo += 1
            self._num_slo_attained += slo_attained
        if timings.queued is not None:
            self._queue_time.observe(timings.queued)
        if timings.ttft is not None:
            self._ttft.observe(timings.ttft)
        if timings.tpot is not None:
            self._tpot.observe(timings.tpot)
        if timings.worst_gap is not None:
            self._worst_gap.observe(timings.worst_gap)
        if timings.tpot is not None and timings.worst_gap is not None:
            self._observe_gaps(timings.tpot, timings.worst_gap, num_output_tokens - 1)
        if reason is not FinishReason.ABORT:  # its end says when the user left, not how fast we were
            self._e2e_latency.observe(timings.e2e)

    def on_preemption(self) -> None:
        """A running request lost its blocks and waits again."""
        self._num_preemptions += 1

    def on_plan_change(self, *, is_forced: bool) -> None:
        """The lanes go over to another plan; forced: because a kind of work ran out or arrived."""
        self._num_plan_changes += 1
        self._num_forced_plan_changes += is_forced

    def snapshot(
        self,
        *,
        num_running: Mapping[Phase, int],
        num_waiting: int,
        kv_cache_usage: float,
        num_cached_blocks: int,
        plan: Plan | None,
        decisions: tuple[Decision, ...],
        step_time_error: tuple[float, float] | None,
    ) -> EngineStatistics:
        """Everything counted so far, beside the given gauges, which `EngineStatistics` explains."""
        return EngineStatistics(
            num_running={phase: num_running.get(phase, 0) for phase in Phase},
            num_waiting=num_waiting,
            kv_cache_usage=kv_cache_usage,
            num_cached_blocks=num_cached_blocks,
            num_prefix_query_tokens=self._num_prefix_query_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            plan=plan,
            num_plan_changes=self._num_plan_changes,
            num_forced_plan_changes=self._num_forced_plan_changes,
            decisions=decisions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_preemptions=self._num_preemptions,
            num_finished=dict(self._num_finished),
            slo_attainment=self._num_slo_attained / self._num_with_slo if self._num_with_slo else None,
            ttft=self._ttft.statistics(),
            tpot=self._tpot.statistics(),
            inter_token_latency=self._inter_token_latency.statistics(),
            worst_gap=self._worst_gap.statistics(),
            queue_time=self._queue_time.statistics(),
            e2e_latency=self._e2e_latency.statistics(),
            step_time={phase: histogram.statistics() for phase, histogram in self._step_time.items()},
            step_time_error=step_time_error,
        )

    def _observe_gaps(self, tpot: float, worst_gap: float, num_gaps: int) -> None:
        # Count, sum and largest gap are exact; the gaps between are known by their mean alone. One call per token would
        # tell more and cost a decode step of 256 requests 0.1 ms under the lock.
        self._inter_token_latency.observe(worst_gap)
        if num_gaps > 1:
            self._inter_token_latency.observe(max(tpot * num_gaps - worst_gap, 0.0) / (num_gaps - 1), num_gaps - 1)


_ERROR_LABELS = ('quantile="0.5"', 'quantile="0.95"')


def prometheus_text(statistics: EngineStatistics) -> str:
    """The statistics in Prometheus' text exposition format, version 0.0.4 (`text/plain; version=0.0.4`)."""
    return "".join(f"{line}\n" for family in _families(statistics) for line in family)


def _families(statistics: EngineStatistics) -> Iterator[Sequence[str]]:
    s = statistics
    yield _gauge("num_requests_running", "Admitted requests by phase.", _by_phase(s.num_running))
    yield _gauge("num_requests_waiting", "Requests that wait to be admitted.", {"": s.num_waiting})
    yield _gauge("kv_cache_usage_ratio", "Share of the KV blocks that cannot be allocated now.", {"": s.kv_cache_usage})
    yield _gauge("kv_cache_cached_blocks", "KV blocks whose content can be matched.", {"": s.num_cached_blocks})
    yield _counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", {"": s.num_prefix_query_tokens})
    yield _counter("prefix_cache_hits", "Tokens found in the prefix cache.", {"": s.num_prefix_hit_tokens})
    yield _counter("prompt_tokens", "Prompt tokens computed.", {"": s.num_prompt_tokens})
    yield _counter("generation_tokens", "Tokens generated.", {"": s.num_generation_tokens})
    yield _counter("preemptions", "Running requests that lost their blocks.", {"": s.num_preemptions})
    finished = {f'reason="{reason}"': count for reason, count in s.num_finished.items()}
    yield _counter("requests_finished", "Ended requests by reason.", finished)
    attainment = {} if s.slo_attainment is None else {'slo="all"': s.slo_attainment}
    yield _gauge("slo_attainment_ratio", "Share of the ended requests with an SLO that met all of it.", attainment)
    num_sms = {} if s.plan is None else {phase: s.plan.num_sms(phase) for phase in Phase}
    yield _gauge("partition_num_sms", "SMs (cores on a CPU) of each lane; 0 if it parks.", _by_phase(num_sms))
    resizes = {
        'cause="work"': s.num_forced_plan_changes,
        'cause="policy"': s.num_plan_changes - s.num_forced_plan_changes,
    }
    yield _counter("partition_resizes", "Changes of plan: a kind of work ran out or arrived, or by choice.", resizes)
    errors = {} if s.step_time_error is None else dict(zip(_ERROR_LABELS, s.step_time_error, strict=True))
    yield _gauge("step_time_error_ratio", "How far predicted step times were off, of recent steps.", errors)
    yield _histogram("time_to_first_token_seconds", "Arrival to first token.", {"": s.ttft})
    yield _histogram("time_per_output_token_seconds", "Mean time per token after a request's first.", {"": s.tpot})
    itl_help = "Time between tokens: of each request its largest gap, and its other gaps at their mean."
    yield _histogram("inter_token_latency_seconds", itl_help, {"": s.inter_token_latency})
    yield _histogram("worst_token_gap_seconds", "Largest time between two tokens of a request.", {"": s.worst_gap})
    yield _histogram("e2e_request_latency_seconds", "Arrival to the end, unless aborted.", {"": s.e2e_latency})
    yield _histogram("request_queue_time_seconds", "Arrival to the first step of a request.", {"": s.queue_time})
    yield _histogram("step_seconds", "Duration of a step, by lane.", _by_phase(s.step_time))


def _by_phase(values: Mapping[Phase, T]) -> dict[str, T]:
    return {f'phase="{phase}"': value for phase, value in values.items()}


def _gauge(name: str, text: str, samples: Mapping[str, float]) -> list[str]:
    return _head(name, text, "gauge") + [_sample(name, labels, value) for labels, value in samples.items()]


def _counter(name: str, text: str, samples: Mapping[str, int]) -> list[str]:
    name += "_total"
    return _head(name, text, "counter") + [_sample(name, labels, value) for labels, value in samples.items()]


def _histogram(name: str, text: str, samples: Mapping[str, HistogramStatistics]) -> list[str]:
    lines = _head(name, text, "histogram")
    for labels, histogram in samples.items():
        for bound, count in zip((*histogram.bounds, "+Inf"), accumulate(histogram.counts), strict=True):
            bucket = f'le="{bound}"'
            lines.append(_sample(f"{name}_bucket", f"{labels},{bucket}" if labels else bucket, count))
        lines.append(_sample(f"{name}_sum", labels, histogram.total))
        lines.append(_sample(f"{name}_count", labels, histogram.count))
    return lines


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP semipd_{name} {text}", f"# TYPE semipd_{name} {kind}"]


def _sample(name: str, labels: str, value: float) -> str:
    return f"semipd_{name}{{{labels}}} {value}" if labels else f"semipd_{name} {value}"

"""Pure tests of the counters, their snapshot and its Prometheus text."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.config import Phase, Plan
from semipd.metrics import EngineStatistics, Histogram, HistogramStatistics, Metrics, prometheus_text
from semipd.request import FinishReason, RequestTimings


def make_timings(
    *,
    queued: float | None = None,
    ttft: float | None = None,
    tpot: float | None = None,
    worst_gap: float | None = None,
    e2e: float = 1.0,
) -> RequestTimings:
    return RequestTimings(arrival=50.0, queued=queued, ttft=ttft, tpot=tpot, worst_gap=worst_gap, e2e=e2e)


def snapshot(
    metrics: Metrics, *, plan: Plan | None = None, step_time_error: tuple[float, float] | None = None
) -> EngineStatistics:
    return metrics.snapshot(
        num_running={Phase.PREFILL: 2, Phase.DECODE: 5},
        num_waiting=7,
        kv_cache_usage=0.25,
        num_cached_blocks=33,
        plan=plan,
        decisions=(),
        step_time_error=step_time_error,
    )


# Histograms


def test_a_value_equal_to_a_bound_is_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5, 9.0):
        histogram.observe(value)
    statistics = histogram.statistics()
    assert statistics.counts == (2, 2, 2)
    assert (statistics.count, statistics.total, statistics.maximum) == (6, 16.0, 9.0)
    assert statistics.mean == pytest.approx(16 / 6)


def test_several_measurements_are_observed_at_once() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.5, 3)
    histogram.observe(5.0, 0)
    statistics = histogram.statistics()
    assert (statistics.counts, statistics.total, statistics.maximum) == ((0, 3, 0), 4.5, 1.5)


def test_an_empty_histogram_has_no_mean_and_no_quantiles() -> None:
    statistics = Histogram((1.0,)).statistics()
    assert statistics.count == 0
    assert (statistics.mean, statistics.p50, statistics.p90, statistics.p99) == (None, None, None, None)


def test_a_snapshot_does_not_change() -> None:
    histogram = Histogram((1.0,))
    before = histogram.statistics()
    histogram.observe(0.5)
    assert before.counts == (0, 0)


@given(
    values=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60),
    shares=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=5).map(sorted),
)
def test_a_quantile_lies_in_the_bucket_of_the_value_that_it_estimates(values: list[float], shares: list[float]) -> None:
    bounds = (0.5, 1.0, 4.0, 10.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    statistics = histogram.statistics()
    values.sort()
    estimates = []
    for share in shares:
        estimate = statistics.quantile(share)
        assert estimate is not None
        estimates.append(estimate)
        exact = values[max(math.ceil(share * len(values)) - 1, 0)]
        low, high = next((a, b) for a, b in pairwise((0.0, *bounds, math.inf)) if exact <= b)
        assert low <= estimate <= high or math.isclose(estimate, low) or estimate == statistics.maximum
        assert estimate <= values[-1]
    assert estimates == sorted(estimates)
    assert statistics.quantile(1.0) == values[-1] or values[-1] <= bounds[-1]


def test_quantiles_of_many_values_are_close() -> None:
    rng = random.Random(3)
    metrics = Metrics()
    values = sorted(rng.lognormvariate(-2.0, 0.7) for _ in range(5000))
    for value in values:
        metrics.on_finish(make_timings(ttft=value), FinishReason.STOP, 1, None)
    ttft = snapshot(metrics).ttft
    assert ttft.p50 == pytest.approx(values[2500], rel=0.1)
    assert ttft.p90 == pytest.approx(values[4500], rel=0.1)
    assert ttft.p99 == pytest.approx(values[4950], rel=0.15)


@pytest.mark.parametrize("bounds", [(), (0.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_grow_from_above_zero(bounds: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError, match="bounds do not grow from 0"):
        Histogram(bounds)


# Counting


def test_a_new_engine_has_counted_nothing() -> None:
    statistics = snapshot(Metrics())
    assert statistics.num_finished == dict.fromkeys(FinishReason, 0)
    assert statistics.slo_attainment is None
    assert statistics.plan is None
    assert statistics.step_time[Phase.PREFILL].count == 0


def test_gauges_are_passed_on() -> None:
    plan = Plan.split(1, 3)
    statistics = snapshot(Metrics(), plan=plan)
    assert statistics.num_running == {Phase.PREFILL: 2, Phase.DECODE: 5}
    assert (statistics.num_waiting, statistics.num_cached_blocks, statistics.plan) == (7, 33, plan)
    assert statistics.kv_cache_usage == 0.25


def test_prefix_hits_are_counted_once_per_request() -> None:
    metrics = Metrics()
    metrics.on_first_admission(60, 0)
    metrics.on_first_admission(30, 16)
    statistics = snapshot(metrics)
    assert (statistics.num_prefix_query_tokens, statistics.num_prefix_hit_tokens) == (90, 16)


def test_steps_are_counted_by_lane() -> None:
    metrics = Metrics()
    metrics.on_step(Phase.PREFILL, 512, 1, 0.05)
    metrics.on_step(Phase.DECODE, 0, 64, 0.01)
    metrics.on_step(Phase.DECODE, 100, 65, 0.03)  # a MIXED step
    statistics = snapshot(metrics)
    assert (statistics.num_prompt_tokens, statistics.num_generation_tokens) == (612, 130)
    assert (statistics.step_time[Phase.PREFILL].count, statistics.step_time[Phase.DECODE].count) == (1, 2)
    assert statistics.step_time[Phase.DECODE].total == pytest.approx(0.04)
    assert statistics.step_time[Phase.PREFILL].maximum == 0.05


def test_events_are_counted() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.on_preemption()
    for is_forced in (True, False):
        metrics.on_plan_change(is_forced=is_forced)
    statistics = snapshot(metrics)
    assert statistics.num_preemptions == 3
    assert (statistics.num_plan_changes, statistics.num_forced_plan_changes) == (2, 1)


def test_timings_of_an_ended_request_are_counted() -> None:
    metrics = Metrics()
    timings = make_timings(queued=0.01, ttft=0.2, tpot=0.02, worst_gap=0.09, e2e=0.4)
    metrics.on_finish(timings, FinishReason.LENGTH, 11, None)
    statistics = snapshot(metrics)
    for name, value in (("queue_time", 0.01), ("ttft", 0.2), ("tpot", 0.02), ("worst_gap", 0.09), ("e2e_latency", 0.4)):
        histogram = getattr(statistics, name)
        assert (histogram.count, histogram.total) == (1, value), name
    assert statistics.num_finished == {FinishReason.STOP: 0, FinishReason.LENGTH: 1, FinishReason.ABORT: 0}


def test_times_that_a_request_never_had_are_not_counted() -> None:
    metrics = Metrics()
    metrics.on_finish(make_timings(), FinishReason.ABORT, 0, None)
    metrics.on_finish(make_timings(queued=0.1, ttft=0.2), FinishReason.STOP, 1, None)
    statistics = snapshot(metrics)
    assert (statistics.queue_time.count, statistics.ttft.count) == (1, 1)
    assert (statistics.tpot.count, statistics.worst_gap.count, statistics.inter_token_latency.count) == (0, 0, 0)
    assert statistics.num_finished[FinishReason.ABORT] == 1


def test_the_end_of_an_aborted_request_is_no_latency() -> None:
    metrics = Metrics()
    metrics.on_finish(make_timings(ttft=0.2, e2e=100.0), FinishReason.ABORT, 1, None)
    assert snapshot(metrics).e2e_latency.count == 0
    assert snapshot(metrics).ttft.count == 1


@given(st.lists(st.lists(st.floats(1e-4, 5.0), min_size=1, max_size=20), min_size=1, max_size=5))
def test_gaps_between_tokens_keep_count_sum_and_maximum(gaps_of_requests: list[list[float]]) -> None:
    metrics = Metrics()
    for gaps in gaps_of_requests:
        timings = make_timings(ttft=0.1, tpot=sum(gaps) / len(gaps), worst_gap=max(gaps))
        metrics.on_finish(timings, FinishReason.STOP, len(gaps) + 1, None)
    latency = snapshot(metrics).inter_token_latency
    assert latency.count == sum(map(len, gaps_of_requests))
    assert latency.total == pytest.approx(sum(map(sum, gaps_of_requests)))
    assert latency.maximum == pytest.approx(max(map(max, gaps_of_requests)))


def test_attainment_is_the_share_of_requests_with_an_slo() -> None:
    metrics = Metrics()
    for slo_attained in (True, None, False, True, None, True):
        metrics.on_finish(make_timings(ttft=0.2), FinishReason.STOP, 1, slo_attained)
    assert snapshot(metrics).slo_attainment == 0.75


@pytest.mark.parametrize("kind", [EngineStatistics, HistogramStatistics])
def test_every_field_is_explained(kind: type[EngineStatistics | HistogramStatistics]) -> None:
    text = inspect.getdoc(kind)
    assert text is not None
    for field in dataclasses.fields(kind):
        assert re.search(rf"^    {field.name}: \w", text, re.MULTILINE), field.name


def test_counting_a_step_costs_microseconds() -> None:
    metrics = Metrics()
    start = time.perf_counter()
    for _ in range(1000):
        metrics.on_step(Phase.DECODE, 0, 256, 0.012)
    assert time.perf_counter() - start < 0.1  # 100 us a step; 1 us measured


# Prometheus text

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ([^ ]+)")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "counter": ("",)}

Samples = dict[tuple[str, str], float]  # (name, labels as written) -> value


def parse(text: str) -> tuple[dict[str, str], Samples]:
    """Types of families, and samples; asserts the grammar and order that the format asks for."""
    assert text.endswith("\n")
    types: dict[str, str] = {}
    samples: Samples = {}
    family = ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("#"):
            found = re.fullmatch(rf"# HELP ({_NAME}) \S.*", line)
            assert found, line
            family = found[1]
            assert family not in types
            head = re.fullmatch(rf"# TYPE {family} (gauge|counter|histogram)", next(lines))
            assert head, line
            types[family] = head[1]
            assert (head[1] == "counter") == family.endswith("_total")
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] in {family + suffix for suffix in _SUFFIXES[types[family]]}, line
            assert (sample[1], sample[2] or "") not in samples
            samples[sample[1], sample[2] or ""] = float(sample[3])
    return types, samples


def busy_statistics() -> EngineStatistics:
    rng = random.Random(5)
    metrics = Metrics()
    for _ in range(200):
        metrics.on_step(rng.choice(list(Phase)), rng.randrange(100), rng.randrange(100), rng.expovariate(20))
        times = make_timings(
            queued=rng.expovariate(9), ttft=rng.expovariate(3), tpot=0.02, worst_gap=rng.uniform(0.02, 30), e2e=400.0
        )
        metrics.on_finish(times, rng.choice(list(FinishReason)), 2000, rng.random() < 0.7)
    for is_forced in (True, False, True):
        metrics.on_plan_change(is_forced=is_forced)
    metrics.on_first_admission(90, 40)
    metrics.on_preemption()
    return snapshot(metrics, plan=Plan.split(84, 48), step_time_error=(0.05, 0.12))


def test_text_has_every_documented_family() -> None:
    types, _ = parse(prometheus_text(busy_statistics()))
    assert types == {
        "semipd_num_requests_running": "gauge",
        "semipd_num_requests_waiting": "gauge",
        "semipd_kv_cache_usage_ratio": "gauge",
        "semipd_kv_cache_cached_blocks": "gauge",
        "semipd_prefix_cache_queries_total": "counter",
        "semipd_prefix_cache_hits_total": "counter",
        "semipd_prompt_tokens_total": "counter",
        "semipd_generation_tokens_total": "counter",
        "semipd_preemptions_total": "counter",
        "semipd_requests_finished_total": "counter",
        "semipd_slo_attainment_ratio": "gauge",
        "semipd_partition_num_sms": "gauge",
        "semipd_partition_resizes_total": "counter",
        "semipd_step_time_error_ratio": "gauge",
        "semipd_time_to_first_token_seconds": "histogram",
        "semipd_time_per_output_token_seconds": "histogram",
        "semipd_inter_token_latency_seconds": "histogram",
        "semipd_worst_token_gap_seconds": "histogram",
        "semipd_e2e_request_latency_seconds": "histogram",
        "semipd_request_queue_time_seconds": "histogram",
        "semipd_step_seconds": "histogram",
    }


def test_samples_are_the_statistics() -> None:
    statistics = busy_statistics()
    _, samples = parse(prometheus_text(statistics))
    expected = {
        ("semipd_num_requests_running", 'phase="prefill"'): 2,
        ("semipd_num_requests_running", 'phase="decode"'): 5,
        ("semipd_num_requests_waiting", ""): 7,
        ("semipd_kv_cache_usage_ratio", ""): 0.25,
        ("semipd_kv_cache_cached_blocks", ""): 33,
        ("semipd_prefix_cache_queries_total", ""): 90,
        ("semipd_prefix_cache_hits_total", ""): 40,
        ("semipd_prompt_tokens_total", ""): statistics.num_prompt_tokens,
        ("semipd_generation_tokens_total", ""): statistics.num_generation_tokens,
        ("semipd_preemptions_total", ""): 1,
        ("semipd_slo_attainment_ratio", 'slo="all"'): statistics.slo_attainment,
        ("semipd_partition_num_sms", 'phase="prefill"'): 84,
        ("semipd_partition_num_sms", 'phase="decode"'): 48,
        ("semipd_partition_resizes_total", 'cause="work"'): 2,
        ("semipd_partition_resizes_total", 'cause="policy"'): 1,
        ("semipd_step_time_error_ratio", 'quantile="0.5"'): 0.05,
        ("semipd_step_time_error_ratio", 'quantile="0.95"'): 0.12,
    }
    expected |= {
        ("semipd_requests_finished_total", f'reason="{reason}"'): count
        for reason, count in statistics.num_finished.items()
    }
    assert {key: samples[key] for key in expected} == expected


def test_buckets_are_cumulative_and_end_with_all() -> None:
    statistics = busy_statistics()
    _, samples = parse(prometheus_text(statistics))
    histograms = {
        ("semipd_time_to_first_token_seconds", ""): statistics.ttft,
        ("semipd_time_per_output_token_seconds", ""): statistics.tpot,
        ("semipd_inter_token_latency_seconds", ""): statistics.inter_token_latency,
        ("semipd_worst_token_gap_seconds", ""): statistics.worst_gap,
        ("semipd_e2e_request_latency_seconds", ""): statistics.e2e_latency,
        ("semipd_request_queue_time_seconds", ""): statistics.queue_time,
        ("semipd_step_seconds", 'phase="prefill"'): statistics.step_time[Phase.PREFILL],
        ("semipd_step_seconds", 'phase="decode"'): statistics.step_time[Phase.DECODE],
    }
    for (name, labels), histogram in histograms.items():
        prefix = f"{labels}," if labels else ""
        buckets = [samples[f"{name}_bucket", f'{prefix}le="{bound}"'] for bound in (*histogram.bounds, "+Inf")]
        assert buckets == [sum(histogram.counts[: i + 1]) for i in range(len(histogram.counts))]
        assert histogram.count > 0
        assert buckets[-1] == samples[f"{name}_count", labels] == histogram.count
        assert samples[f"{name}_sum", labels] == histogram.total


def test_what_is_not_known_has_no_sample() -> None:
    types, samples = parse(prometheus_text(snapshot(Metrics())))
    unknown = {"semipd_slo_attainment_ratio", "semipd_partition_num_sms", "semipd_step_time_error_ratio"}
    assert unknown <= types.keys()
    assert not unknown & {name for name, _ in samples}

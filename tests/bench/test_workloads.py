"""Length distributions and arrival times: seeded, of the right means, the same at every rate."""

from __future__ import annotations

import numpy as np
import pytest

from semipd.bench.workloads import WORKLOADS, LogNormal, Uniform, arrival_times, parse_workload
from semipd.errors import ConfigError

NUM = 40_000

# (prompt median, prompt bounds, output median, output bounds); the medians are exp(mu)
EXPECTED = {
    "sharegpt": (101, (4, 4096), 257, (4, 1024)),
    "azure-conv": (833, (16, 8192), 129, (4, 1024)),
    "long": (4447, (512, 16384), 148, (16, 512)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_lengths_have_the_medians_and_bounds_of_their_workload(name: str) -> None:
    inputs, outputs = WORKLOADS[name].sample(0, NUM)
    median_in, bounds_in, median_out, bounds_out = EXPECTED[name]
    assert np.median(inputs) == pytest.approx(median_in, rel=0.03)
    assert np.median(outputs) == pytest.approx(median_out, rel=0.03)
    assert inputs.min() >= bounds_in[0] and inputs.max() <= bounds_in[1]
    assert outputs.min() >= bounds_out[0] and outputs.max() <= bounds_out[1]


def test_the_mean_of_sharegpt_is_that_of_its_source() -> None:
    inputs, outputs = WORKLOADS["sharegpt"].sample(3, NUM)
    assert inputs.mean() == pytest.approx(246, rel=0.08)
    assert outputs.mean() == pytest.approx(322, rel=0.04)


def test_one_prompt_in_twenty_of_mixed_long_is_long() -> None:
    inputs, outputs = WORKLOADS["mixed-long"].sample(0, NUM)
    short_inputs, short_outputs = WORKLOADS["sharegpt"].sample(0, NUM)
    is_long = inputs != short_inputs
    assert is_long.mean() == pytest.approx(0.05, rel=0.1)
    assert inputs[is_long].min() >= 6_000 and inputs[is_long].max() <= 10_000
    assert (outputs == short_outputs).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_more_requests_begin_with_the_same_ones(name: str) -> None:
    few, many = WORKLOADS[name].sample(5, 100), WORKLOADS[name].sample(5, 1000)
    assert all((a == b[:100]).all() for a, b in zip(few, many, strict=True))
    assert (WORKLOADS[name].sample(6, 100)[0] != few[0]).any()


def test_clipping_keeps_lengths_inside() -> None:
    lengths = LogNormal(5.0, 3.0, 10, 20).sample(np.random.default_rng(0), 1000)
    assert set(lengths) >= {10, 20} and lengths.min() == 10 and lengths.max() == 20


def test_lengths_can_be_given() -> None:
    workload = parse_workload("lengths:16-64,32")
    assert (workload.inputs, workload.outputs) == (Uniform(16, 64), Uniform(32, 32))
    inputs, outputs = workload.sample(0, 2000)
    assert set(inputs) == set(range(16, 65)) and set(outputs) == {32}


@pytest.mark.parametrize("text", ["sharegtp", "lengths:0,4", "lengths:5-4,4", "lengths:5", "lengths:a,b", ""])
def test_other_workloads_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected one of sharegpt, azure-conv, long, mixed-long, lengths"):
        parse_workload(text)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation(cv: float) -> None:
    times = arrival_times(50.0, 2_000.0, cv=cv, seed=1)
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] < 2_000 and (gaps >= 0).all()
    assert len(times) / 2_000 == pytest.approx(50, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.03 * max(cv, 1))


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(arrival_times(10.0, 5_000.0, cv=1.0, seed=2))
    shares = [(gaps > seconds).mean() for seconds in (0.05, 0.1, 0.3)]
    assert shares == pytest.approx(np.exp([-0.5, -1.0, -3.0]), rel=0.06)


def test_another_rate_stretches_the_same_arrivals() -> None:
    slow, fast = (arrival_times(rate, 1_000.0, cv=2.0, seed=7) for rate in (1.0, 4.0))
    assert fast[: len(slow)] * 4 == pytest.approx(slow)


@pytest.mark.parametrize(("rate", "cv"), [(0.0, 1.0), (float("nan"), 1.0), (1.0, -1.0), (1.0, float("inf"))])
def test_arrivals_need_a_rate_and_a_variation(rate: float, cv: float) -> None:
    with pytest.raises(ConfigError, match="expected"):
        arrival_times(rate, 10.0, cv=cv, seed=0)

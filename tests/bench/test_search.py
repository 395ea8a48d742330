"""Bisection against servers whose goodput is known."""

from __future__ import annotations

import random

import pytest

from semipd.bench.search import bracket, find_goodput


class Server:
    """Attains everything below its capacity, and what the capacity allows above."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.rates: list[float] = []

    def __call__(self, rate: float) -> float:
        self.rates.append(rate)
        return min(1.0, self.capacity / rate)


@pytest.mark.parametrize("capacity", [0.3, 7.0, 40.0, 1000.0])
def test_the_search_finds_the_rate_at_which_attainment_reaches_the_goal(capacity: float) -> None:
    server = Server(capacity)
    found = find_goodput(server, goal=0.9, start=10.0, precision=0.02, max_runs=40)
    assert found.rate is not None and found.failed_rate is not None
    assert found.rate <= capacity / 0.9 < found.failed_rate <= found.rate * 1.02
    assert len(server.rates) == len(set(server.rates)) <= 20


def test_known_rates_are_not_measured_again() -> None:
    server = Server(18.0)
    found = find_goodput(server, goal=0.9, start=1.0, known={8.0: 1.0, 16.0: 1.0, 32.0: 0.56}, precision=0.1)
    assert found.rate is not None and 16 < found.rate <= 20
    assert all(16 < rate < 32 for rate in server.rates) and len(server.rates) <= 4


def test_a_rate_that_passes_above_one_that_failed_does_not_count() -> None:
    found = bracket({4.0: 1.0, 8.0: 0.8, 16.0: 0.95}, 0.9)
    assert (found.rate, found.failed_rate) == (4.0, 8.0)


def test_the_search_ends_after_its_runs_whatever_the_server_says() -> None:
    never, always, noise = Server(1e-9), Server(1e9), random.Random(0)
    assert find_goodput(never, goal=0.9, start=1.0, max_runs=5).rate is None
    assert find_goodput(always, goal=0.9, start=1.0, max_runs=5).failed_rate is None
    assert len(never.rates) == len(always.rates) == 5
    found = find_goodput(lambda rate: noise.random(), goal=0.5, start=1.0, max_runs=20)
    assert found.rate is None or found.failed_rate is None or found.rate < found.failed_rate


def test_no_rate_below_the_lowest_is_tried() -> None:
    server = Server(1e-9)
    assert find_goodput(server, goal=0.9, start=4.0, lowest=1.0).failed_rate == 1.0
    assert server.rates == [4.0, 2.0, 1.0]

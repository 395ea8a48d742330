"""Fleets: processes change nothing, routers route, and a model fitted to a model is that model."""

from __future__ import annotations

import math

import pytest

from benchmarks.simulation.device import DefaultStepTimes
from benchmarks.simulation.engine import EngineShape
from benchmarks.simulation.fleet import EngineSpec, LocalShard, ProcessShard, Served, run_fleet
from benchmarks.simulation.routers import Router
from benchmarks.simulation.scenarios import parse_scenario
from benchmarks.simulation.service_model import ModelShard, ServiceModel, fit
from semipd.bench.engine_arguments import parse_policy_spec
from semipd.bench.schedule import PlannedRequest, Window, parse_source
from semipd.config import SLO
from semipd.errors import ConfigError

MODEL = ServiceModel(
    delay=0.004,
    token=40e-6,
    token_per_decode=0.2e-6,
    step=0.006,
    step_per_decode=30e-6,
    step_per_context=45e-9,
    beside_prompt=0.002,
    beside_prompt_per_decode=10e-6,
    max_decodes=256,
)


def make_spec() -> EngineSpec:
    return EngineSpec(
        shape=EngineShape(),
        policy=parse_policy_spec("static"),
        slo=SLO(ttft=0.5, tpot=0.025),
        times=DefaultStepTimes(132),
        prompt_seed=0,
        run=1,
    )


def planned(workload: str, rate: float, seconds: float) -> list[PlannedRequest]:
    source = parse_source(workload, cv=1.0, seed=0)
    return source.schedule(rate, Window(start=0.0, end=seconds))[0]


@pytest.mark.parametrize("router", ["two-choices", "shortest"])  # which depend on what engines report
def test_worker_processes_serve_exactly_as_this_one_does(router: str) -> None:
    requests = planned("lengths:16-600,4-40", 40.0, 2.0)

    def serve(shards: list[LocalShard | ProcessShard], sizes: list[int]) -> list[Served]:
        return run_fleet(shards, sizes, Router(router, 4, seed=1), requests, staleness=0.05, drain=10.0)

    here = serve([LocalShard(make_spec(), range(4))], [4])
    there = serve([ProcessShard(make_spec(), range(1)), ProcessShard(make_spec(), range(1, 4))], [1, 3])
    assert here == there
    assert len(here) == len(requests) and all(one.last < math.inf for one in here)
    assert {one.engine for one in here} == set(range(4))


def test_routers_choose_as_they_say() -> None:
    def one(index: int, **fields: int) -> PlannedRequest:
        return PlannedRequest(index=index, due=0.0, num_prompt_tokens=10, num_output_tokens=10, **fields)

    router = Router("round-robin", 3)
    assert [router.choose(one(index)) for index in range(5)] == [0, 1, 2, 0, 1]
    router = Router("shortest", 3)
    router.update([50.0, 0.0, 30.0])
    assert [router.choose(one(index)) for index in range(4)] == [1, 1, 2, 1]  # it counts what it sends
    router = Router("prefix-affinity", 8)
    same = {router.choose(one(index, num_shared_tokens=5, prefix_group=3)) for index in range(2)}
    assert len(same) == 1
    router.update([1000.0 if engine in same else 0.0 for engine in range(8)])
    assert router.choose(one(9, num_shared_tokens=5, prefix_group=3)) not in same
    router = Router("two-choices", 50, seed=2)
    counts = [0] * 50
    for index in range(5000):
        counts[router.choose(one(index))] += 1
    assert max(counts) < 110  # random choices give 130 and more
    with pytest.raises(ConfigError, match="expected one of random"):
        Router("best", 2)


def test_a_lone_request_of_the_model_takes_what_the_curves_say() -> None:
    request = PlannedRequest(index=0, due=0.02, num_prompt_tokens=1000, num_output_tokens=101)
    (one,) = run_fleet([ModelShard(MODEL, [0])], [1], Router("random", 1), [request], staleness=0.05, drain=60.0)
    assert one.ttft == pytest.approx(1000 * 40e-6 + 0.004)
    assert one.tpot == pytest.approx(0.006 + 30e-6 + 45e-9 * 1050.5)


def test_a_fit_finds_the_curves_that_made_the_data() -> None:
    shards = [ModelShard(MODEL, range(3))]
    requests = planned("sharegpt", 60.0, 60.0)
    served = run_fleet(shards, [3], Router("round-robin", 3), requests, staleness=0.05, drain=60.0)
    assert len(served) == len(requests)
    model, error = fit(served, max_decodes=256)
    assert error.tpot[0] < 0.02 and error.tpot[1] < 0.06 and error.ttft[0] < 0.005
    assert model.step == pytest.approx(MODEL.step, rel=0.1)
    per_token = [one.token + one.token_per_decode * 40 for one in (model, MODEL)]  # of a run's 40 decodes or so
    assert per_token[0] == pytest.approx(per_token[1], rel=0.15)


@pytest.mark.parametrize("kind", ["bursts", "long-prompts", "drift", "overload", "prefixes"])
def test_scenarios_offer_what_they_promise(kind: str) -> None:
    source = parse_scenario(kind, "sharegpt", cv=1.0, seed=0)
    requests, window = source.schedule(50.0, Window(start=5.0, end=85.0))
    due = [request.due for request in requests]
    assert due == sorted(due) and [request.index for request in requests] == list(range(len(requests)))
    assert due[-1] < window.end
    if kind == "bursts":
        in_burst = sum(5.0 <= time % 20.0 < 6.0 for time in due) / 4
        outside = sum(6.0 <= time % 20.0 for time in due) / (4 * 14)
        assert in_burst / outside == pytest.approx(13.0, rel=0.15)
        assert len(due) / 85.0 == pytest.approx(50.0, rel=0.1)
    elif kind == "long-prompts":
        assert sum(request.num_prompt_tokens == 16_000 for request in requests) == 32
    elif kind == "overload":
        assert window == Window(start=5.0, end=65.0)
        assert sum(window.holds(time) for time in due) / 60.0 == pytest.approx(75.0, rel=0.05)
    elif kind == "prefixes":
        assert all(request.num_shared_tokens == 1024 < request.num_prompt_tokens for request in requests)
    else:
        middle = [request for request in requests if 35 < request.due < 55]
        early = [request for request in requests if request.due < 15]
        assert sum(r.num_prompt_tokens > 1500 for r in middle) / len(middle) > 2 * (
            sum(r.num_prompt_tokens > 1500 for r in early) / len(early)
        )

"""Loads that test stability: what an operator fears, each as a source of the serving benchmark.

A rate means the average one, so a scenario at a rate is as much work as its workload at that rate; `overload` alone
offers more, half as much again for a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from semipd.bench.schedule import PlannedRequest, Window
from semipd.bench.workloads import WORKLOADS, Workload, arrival_times
from semipd.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BURST = 13.0
"""How many times as much arrives in a burst as between bursts."""
OVERLOAD = 1.5
OVERLOAD_SECONDS = 60.0
_BURST_SECONDS, _BURST_PERIOD = 1.0, 20.0
_LONG_PERIOD, _NUM_LONG, _LONG_TOKENS = 10.0, 4, 16_000
_LONG_INSTEAD = 0.1  # of a request that leaves: a long one is about ten times the work of a short one
_GROUP_TOKENS, _NUM_GROUPS = 1024, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A workload under a scenario.

    Attributes:
        kind: which scenario.
        workload: lengths of the requests.
        cv: variation of the gaps between them.
        seed: of everything.
    """

    kind: str
    workload: Workload
    cv: float
    seed: int

    @property
    def name(self) -> str:
        """Scenario and workload."""
        return f"{self.kind}:{self.workload.name}"

    @property
    def own_rate(self) -> float | None:
        """None: a rate must be given."""
        return None

    def is_on(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of results is of its workload alone."""
        return bool(row["workload"] == self.workload.name)

    def schedule(self, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
        return SCENARIOS[self.kind](self, rate, window)


def parse_scenario(kind: str, workload: str, *, cv: float, seed: int) -> Scenario:
    """A scenario by name on a workload by name.

    Raises:
        ConfigError: it is unknown, or the workload is no named one.
    """
    if kind not in SCENARIOS or workload not in WORKLOADS:
        raise ConfigError(
            f"scenario {kind!r} on workload {workload!r}; expected one of {', '.join(SCENARIOS)} on one of "
            f"{', '.join(WORKLOADS)}"
        )
    return Scenario(kind=kind, workload=WORKLOADS[workload], cv=cv, seed=seed)


def _bursts(scenario: Scenario, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
    """In one second of every 20 the rate is 13 times that of the others."""
    quiet = _BURST_PERIOD / (_BURST_PERIOD - _BURST_SECONDS + BURST * _BURST_SECONDS)
    starts = np.arange(window.start, window.end, _BURST_PERIOD)
    edges = np.sort(np.concatenate([[0.0], starts, starts + _BURST_SECONDS, [window.end + _BURST_PERIOD]]))
    is_burst = np.isin(edges[:-1], starts)
    return _plan(scenario, rate, window.end, edges, np.where(is_burst, BURST * quiet, quiet)), window


def _long_prompts(scenario: Scenario, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
    """Every 10 s four prompts of 16,000 tokens arrive at once."""
    requests = _steady(scenario, rate, window.end)
    for start in np.arange(window.start + 1.0, window.end, _LONG_PERIOD).tolist():
        requests += [
            PlannedRequest(index=0, due=start, num_prompt_tokens=_LONG_TOKENS, num_output_tokens=128)
            for _ in range(_NUM_LONG)
        ]
    return _in_order(requests), window


def _drift(scenario: Scenario, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
    """The mix drifts from the workload to long prompts and back; in the middle all are long.

    Each long one comes instead of ten others, so that the work stays about the same.
    """
    requests = _steady(scenario, rate, window.end)
    rng = np.random.default_rng([scenario.seed, 5])
    inputs, outputs = WORKLOADS["long"].sample(scenario.seed, len(requests))
    drifted = []
    for request, num_in, num_out in zip(requests, inputs.tolist(), outputs.tolist(), strict=True):
        progress = min(max((request.due - window.start) / window.seconds, 0.0), 1.0)
        is_long_phase = rng.random() < 1.0 - abs(2.0 * progress - 1.0)
        if not is_long_phase:
            drifted.append(request)
        elif rng.random() < _LONG_INSTEAD:
            drifted.append(replace(request, num_prompt_tokens=num_in, num_output_tokens=num_out))
    return _in_order(drifted), window


def _overload(scenario: Scenario, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
    """The rate until the warm-up is over, then 1.5 times as much for 60 s, then nothing."""
    end = window.start + OVERLOAD_SECONDS
    edges = np.array([0.0, window.start, end])
    return _plan(scenario, rate, end, edges, np.array([1.0, OVERLOAD])), Window(start=window.start, end=end)


def _prefixes(scenario: Scenario, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
    """Each prompt begins with one of 64 prefixes of 1,024 tokens, some far more popular than others."""
    rng = np.random.default_rng([scenario.seed, 6])
    requests = _steady(scenario, rate, window.end)
    popularity = 1.0 / np.arange(1, _NUM_GROUPS + 1)
    groups = rng.choice(_NUM_GROUPS, size=len(requests), p=popularity / popularity.sum()).tolist()
    return [
        replace(
            request,
            num_prompt_tokens=request.num_prompt_tokens + _GROUP_TOKENS,
            num_shared_tokens=_GROUP_TOKENS,
            prefix_group=group,
        )
        for request, group in zip(requests, groups, strict=True)
    ], window


SCENARIOS: dict[str, Callable[[Scenario, float, Window], tuple[list[PlannedRequest], Window]]] = {
    "bursts": _bursts,
    "long-prompts": _long_prompts,
    "drift": _drift,
    "overload": _overload,
    "prefixes": _prefixes,
}


def _steady(scenario: Scenario, rate: float, end: float) -> list[PlannedRequest]:
    return _plan(scenario, rate, end, np.array([0.0, end]), np.array([1.0]))


def _plan(
    scenario: Scenario, rate: float, end: float, edges: NDArray[np.float64], factors: NDArray[np.float64]
) -> list[PlannedRequest]:
    """Requests of the workload until `end`, at `rate` times the factor that holds from edge to edge.

    Times are drawn where the rate is constant, and then each stretch of time is squeezed by its factor.
    """
    squeezed = np.concatenate([[0.0], np.cumsum(np.diff(edges) * factors)])
    times = np.interp(arrival_times(rate, float(squeezed[-1]), cv=scenario.cv, seed=scenario.seed), squeezed, edges)
    times = times[times < end]
    inputs, outputs = scenario.workload.sample(scenario.seed, len(times))
    rows = zip(times.tolist(), inputs.tolist(), outputs.tolist(), strict=True)
    return [
        PlannedRequest(index=index, due=due, num_prompt_tokens=num_in, num_output_tokens=num_out)
        for index, (due, num_in, num_out) in enumerate(rows)
    ]


def _in_order(requests: list[PlannedRequest]) -> list[PlannedRequest]:
    ordered = sorted(requests, key=lambda request: request.due)
    return [replace(request, index=index) for index, request in enumerate(ordered)]

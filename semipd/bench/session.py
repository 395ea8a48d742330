"""The order of measurements: every target serves the same requests at the same rates, then searches its goodput."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol
from zlib import crc32

from semipd.bench.metrics import columns, scale_slo, slo_label, summarise
from semipd.bench.schedule import RequestSource, Stage, Window, plan_stages
from semipd.bench.search import bracket, find_goodput
from semipd.bench.target import Outcome, Run, Target
from semipd.config import SLO
from semipd.errors import ConfigError, SemiPDError

FEWEST_REQUESTS = 5
"""A search tries no rate at which fewer requests than this are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How goodput is searched; see `find_goodput`."""

    goal: float = 0.9
    is_searched: bool = False
    precision: float = 0.05
    max_runs: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        sources: where requests come from.
        rates: requests per second, one run each; empty takes each source's own.
        window: the warm-up ends and the last arrivals come at its ends.
        drain: seconds after the last arrival in which requests may end.
        slos: targets.
        scales: factors of them.
        seed: of arrivals, lengths and prompts.
        search: how goodput is found.
        rates_by_source: rates for sources of these names instead.
        is_staircase: whether the rates of a source rise in one run, each right behind the one before, so that only the
            last one drains.
    """

    sources: Sequence[RequestSource]
    rates: Sequence[float]
    window: Window
    drain: float
    slos: Sequence[SLO]
    scales: Sequence[float]
    seed: int
    search: SearchSettings = SearchSettings()
    rates_by_source: Mapping[str, Sequence[float]] = field(default_factory=dict)
    is_staircase: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.window.start < self.window.end < float("inf"):
            raise ConfigError(
                f"warm-up is {self.window.start:g} s and the window {self.window.seconds:g} s; expected seconds "
                "from 0 and above 0"
            )
        rates = [*self.rates, *chain.from_iterable(self.rates_by_source.values())]
        for name, values in (("rate", rates), ("SLO scale", self.scales)):
            if wrong := [value for value in values if not 0 < value < float("inf")]:
                raise ConfigError(f"{name} is {wrong[0]:g}; expected a number above 0")
        if not 0 < self.search.goal <= 1:
            raise ConfigError(f"the attainment goal is {self.search.goal:g}; expected a share in (0, 1]")
        if self.is_staircase and self.search.is_searched:
            raise ConfigError("a staircase has its rates; goodput is searched by runs of one rate: take one of the two")
        if self.drain < 0:
            raise ConfigError(f"the drain is {self.drain:g} s; expected seconds from 0")
        rateless = [
            source.name
            for source in self.sources
            if source.own_rate is None and source.name not in self.rates_by_source
        ]
        if not self.rates and rateless:
            raise ConfigError(f"{', '.join(rateless)} needs --rates; only a trace has a rate of its own")

    def rates_of(self, source: RequestSource) -> Sequence[float]:
        """The rates to run `source` at."""
        rates = self.rates_by_source.get(source.name, self.rates)
        return list(dict.fromkeys(rates)) or [source.own_rate or 1.0]


class Watcher(Protocol):
    """Is told how a session goes on."""

    def on_run(self, title: str, num_requests: int) -> None:
        """A run starts."""

    def on_ended(self, count: int) -> None:
        """Requests ended; from any thread."""

    def on_result(self, results: Results) -> None:
        """There is something new in the results."""


@dataclass(slots=True)
class Results:
    """What was measured so far, as plain values for JSON."""

    targets: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    goodput: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


class Session:
    """Measures targets one after another.

    Raises:
        ConfigError: there is nothing to measure at one of the rates.
    """

    def __init__(self, settings: Settings, watcher: Watcher) -> None:
        for source in settings.sources:
            for rate in settings.rates_of(source):
                requests, window = source.schedule(rate, settings.window)
                if not any(window.holds(request.due) for request in requests):
                    raise ConfigError(
                        f"{source.name} at {rate:g} requests per second has no request in the {window.seconds:g} s "
                        "that are measured; raise the rate or the duration"
                    )
        self._settings = settings
        self._watcher = watcher
        self.results = Results()

    def measure(self, target: Target) -> None:
        """Serve every source at every rate with one target, and search its goodput if asked to.

        A target that cannot start, or dies, is a failure in the results; the next one can still be measured.
        """
        try:
            self._measure(target)
        except (SemiPDError, RuntimeError, OSError) as error:  # of torch, of processes, of sockets
            self.results.failures.append({"target": target.label, "error": f"{type(error).__name__}: {error}"})
            self._watcher.on_result(self.results)

    def _measure(self, target: Target) -> None:
        with target:
            self.results.targets.append({"label": target.label, **target.description})
            for source in self._settings.sources:
                attained: dict[float, Mapping[tuple[str, float], float]] = {}
                rates = self._settings.rates_of(source)
                for stages in [sorted(rates)] if self._settings.is_staircase else [[rate] for rate in rates]:
                    attained |= self._run(target, source, stages)
                if self._settings.search.is_searched:
                    for slo in self._settings.slos:
                        self._search(target, source, slo_label(slo), attained)
                self._conclude(target, source, attained)

    def _run(
        self, target: Target, source: RequestSource, rates: Sequence[float]
    ) -> dict[float, Mapping[tuple[str, float], float]]:
        """One run of one rate or, as a staircase, of several; attainment by rate, and by SLO and scale."""
        settings = self._settings
        requests, stages = plan_stages(source, rates, settings.window)
        name = f"{source.name} {' '.join(f'{rate:.6g}' for rate in rates)}"
        self._watcher.on_run(
            f"{target.label}, {source.name} at {', '.join(f'{rate:g}' for rate in rates)}/s", len(requests)
        )
        run = Run(
            requests=requests,
            drain=settings.drain,
            prompt_seed=settings.seed,
            number=crc32(name.encode()),  # the same prompts for every target
            on_ended=self._watcher.on_ended,
        )
        outcome = target.run(run)
        attained: dict[float, Mapping[tuple[str, float], float]] = {}
        for stage in stages:
            result = _stage_result(outcome, stage, settings.slos, _scales(settings))
            self.results.runs.append({"target": target.label, "workload": source.name, "rate": stage.rate, **result})
            attained[stage.rate] = {(entry["slo"], entry["scale"]): entry["attained"] for entry in result["attainment"]}
        self._watcher.on_result(self.results)
        return attained

    def _search(
        self,
        target: Target,
        source: RequestSource,
        slo: str,
        attained: dict[float, Mapping[tuple[str, float], float]],
    ) -> None:
        """Bisect for one SLO; what it measures helps the next."""

        def measure(rate: float) -> float:
            attained.update(self._run(target, source, [rate]))
            return attained[rate][slo, 1.0]

        search = self._settings.search
        find_goodput(
            measure,
            goal=search.goal,
            start=self._settings.rates_of(source)[0],
            known={rate: by_slo[slo, 1.0] for rate, by_slo in attained.items()},
            precision=search.precision,
            max_runs=search.max_runs,
            lowest=FEWEST_REQUESTS / self._settings.window.seconds,
        )

    def _conclude(
        self, target: Target, source: RequestSource, attained: Mapping[float, Mapping[tuple[str, float], float]]
    ) -> None:
        """The goodput that the runs so far show, for every SLO and scale."""
        goal = self._settings.search.goal
        for slo in self._settings.slos:
            for scale in _scales(self._settings):
                label = slo_label(slo)
                found = bracket({rate: by_slo[label, scale] for rate, by_slo in attained.items()}, goal)
                scaled = scale_slo(slo, scale)
                self.results.goodput.append(
                    {
                        "target": target.label,
                        "workload": source.name,
                        "slo": label,
                        "scale": scale,
                        "ttft": scaled.ttft,
                        "tpot": scaled.tpot,
                        "gap": scaled.gap,
                        "goal": goal,
                        "rate": found.rate,
                        "failed_rate": found.failed_rate,
                    }
                )
        self._watcher.on_result(self.results)


def _stage_result(outcome: Outcome, stage: Stage, slos: Sequence[SLO], scales: Sequence[float]) -> dict[str, Any]:
    """What results say of a stage, with times from its begin; of the engine's totals only if it is the whole run."""
    records = [record.shifted(-stage.begin) for record in outcome.records] if stage.begin else outcome.records
    mine = records[stage.requests.start : stage.requests.stop]
    beside = [*records[: stage.requests.start], *records[stage.requests.stop :]]
    engine = dict(outcome.engine)
    if beside:
        is_last = stage.requests.stop == len(records)  # which drains
        end = math.inf if is_last else stage.begin + stage.window.end
        parts = (name for name in ("samples", "decisions") if engine.get(name))
        engine = {name: _during(engine[name], stage.begin, end) for name in parts}
    return {
        "window": [stage.window.start, stage.window.end],
        **summarise(mine, stage.window, slos, scales, beside=beside),
        "engine": engine,
        "requests": dict(columns(mine, stage.window)),
    }


def _during(columns: Mapping[str, Sequence[Any]], begin: float, end: float) -> dict[str, list[Any]]:
    """The rows from `begin` to `end`, with times from there; with the row before them, which was still in force."""
    times = columns["time"]
    first = max(bisect_right(times, begin) - 1, 0)
    last = bisect_left(times, end)
    rows = {name: list(column[first:last]) for name, column in columns.items()}
    return rows | {"time": [round(max(time - begin, 0.0), 4) for time in times[first:last]]}


def _scales(settings: Settings) -> Sequence[float]:
    """Those asked for, and 1, which goodput is searched at."""
    return sorted({1.0, *settings.scales})

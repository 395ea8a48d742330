"""The order of runs, the same load for every target, and what the results say; no engine, no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from semipd.bench.metrics import RequestRecord, Status, parse_slo
from semipd.bench.schedule import PlannedRequest, Window, parse_source
from semipd.bench.session import Results, SearchSettings, Session, Settings
from semipd.bench.target import Outcome, Run
from semipd.errors import ConfigError


class Fake:
    """Serves at once up to `capacity` requests per second, and the rest of them a second late."""

    def __init__(self, label: str, capacity: float) -> None:
        self.label = label
        self.capacity = capacity
        self.runs: list[Run] = []
        self.is_open = False

    @property
    def description(self) -> Mapping[str, Any]:
        return {"kind": "fake"}

    def __enter__(self) -> Self:
        self.is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open = False

    def run(self, run: Run) -> Outcome:
        assert self.is_open
        self.runs.append(run)
        rate = len(run.requests) / run.requests[-1].due
        return Outcome(records=[self._serve(request, rate, run) for request in run.requests])

    def _serve(self, request: PlannedRequest, rate: float, run: Run) -> RequestRecord:
        run.on_ended(1)
        is_quick = (request.index % 100) / 100 < self.capacity / rate
        first = request.due + (0.1 if is_quick else 1.1)
        times = [first + 0.01 * step for step in range(request.num_output_tokens)]
        return RequestRecord(
            request=request, sent=request.due, token_times=times, num_output_tokens=len(times), status=Status.OK
        )


class Watched(Fake):
    """Says of a run what an engine says, and keeps its records; the first request ends at 90 s."""

    def run(self, run: Run) -> Outcome:
        first, *others = super().run(run).records
        self.records = [replace(first, token_times=[*first.token_times[:-1], 90.0]), *others]
        times = [20.0 * number for number in range(5)]
        samples = {"time": times, "num_waiting": list(range(5))}
        decisions = {"time": [0.0, 60.0, 86.0], "plan": ["exclusive", "mixed", "split"]}
        engine = {"totals": {"num_decode_steps": 9}, "samples": samples, "decisions": decisions}
        return Outcome(records=self.records, engine=engine)


class Log:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.num_ended = 0
        self.num_results = 0

    def on_run(self, title: str, num_requests: int) -> None:
        self.titles.append(title)

    def on_ended(self, count: int) -> None:
        self.num_ended += count

    def on_result(self, results: Results) -> None:
        self.num_results += 1


def make_settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "sources": [parse_source("lengths:10-20,5", cv=1.0, seed=0)],
        "rates": [5.0, 20.0],
        "window": Window(start=1.0, end=41.0),
        "drain": 5.0,
        "slos": [parse_slo("0.5/25ms"), parse_slo("2/25ms")],
        "scales": [0.1],
        "seed": 0,
    }
    return Settings(**values | changes)


def test_every_target_serves_the_same_requests() -> None:
    first, second, log = Fake("first", 10.0), Fake("second", 2.0), Log()
    session = Session(make_settings(), log)
    for target in (first, second):
        session.measure(target)
        assert not target.is_open
    assert [run.requests for run in first.runs] == [run.requests for run in second.runs]
    assert [run.number for run in first.runs] == [run.number for run in second.runs]
    assert len({run.number for run in first.runs}) == 2, "runs share prompts"
    assert [(run["target"], run["rate"]) for run in session.results.runs] == [
        ("first", 5.0),
        ("first", 20.0),
        ("second", 5.0),
        ("second", 20.0),
    ]
    assert log.titles[0] == "first, lengths:10-20,5 at 5/s"
    assert log.num_ended == sum(len(run.requests) for run in first.runs + second.runs)
    assert log.num_results == 6
    goodput = {
        (entry["target"], entry["slo"], entry["scale"]): (entry["rate"], entry["failed_rate"])
        for entry in session.results.goodput
    }
    assert goodput["first", "0.5/25ms", 1.0] == (5.0, 20.0)
    assert goodput["second", "0.5/25ms", 1.0] == (None, 5.0)
    assert goodput["second", "2/25ms", 1.0] == (20.0, None)
    assert goodput["first", "0.5/25ms", 0.1] == (None, 5.0)


def test_a_staircase_is_one_run_whose_rates_are_judged_apart() -> None:
    target, log = Watched("one", 10.0), Log()
    session = Session(make_settings(rates=[20.0, 5.0], is_staircase=True), log)
    session.measure(target)
    (run,) = target.runs
    assert log.titles == ["one, lengths:10-20,5 at 5, 20/s"]
    assert [request.index for request in run.requests] == list(range(len(run.requests)))
    source, window = parse_source("lengths:10-20,5", cv=1.0, seed=0), Window(start=1.0, end=41.0)
    slow, fast = (source.schedule(rate, window)[0] for rate in (5.0, 20.0))
    assert [request.due for request in run.requests] == [
        *(request.due for request in slow),
        *(41.0 + request.due for request in fast),
    ]
    first, second = session.results.runs
    for result, rate, alone in ((first, 5.0, slow), (second, 20.0, fast)):
        assert (result["rate"], result["window"]) == (rate, [1.0, 41.0])
        assert result["requests"]["due"] == pytest.approx([request.due for request in alone], abs=2e-5)
        assert result["num_requests"] == sum(request.due >= 1 for request in alone)
        assert result["num_requests"] + result["num_warmup_requests"] == len(alone)
        assert result["ttft"]["max"] == pytest.approx(1.1)
        assert result["late"]["max"] == pytest.approx(0.0, abs=1e-6)
        assert "totals" not in result["engine"], "they are of both rates"
    assert first["num_running_at_end"] == _num_running(target.records, 41.0)
    assert second["num_running_at_end"] == _num_running(target.records, 82.0)
    assert first["drained"] == pytest.approx(90.0 - 41.0)
    last = max(record.token_times[-1] for record in target.records[len(slow) :])
    assert second["drained"] == pytest.approx(max(last - 82.0, 0.0))
    # What the first rate left over is served in the second's time: 5 tokens, of which 4 come after 41 s.
    assert first["throughput"]["output_tokens"] + second["throughput"]["output_tokens"] == pytest.approx(
        sum(window.holds(time) or window.holds(time - 41) for record in target.records for time in record.token_times)
        / 40
    )
    assert first["engine"]["samples"] == {"time": [0.0, 20.0, 40.0], "num_waiting": [0, 1, 2]}
    assert second["engine"]["samples"] == {"time": [0.0, 19.0, 39.0], "num_waiting": [2, 3, 4]}
    assert first["engine"]["decisions"] == {"time": [0.0], "plan": ["exclusive"]}
    assert second["engine"]["decisions"] == {"time": [0.0, 19.0, 45.0], "plan": ["exclusive", "mixed", "split"]}
    assert [(entry["rate"], entry["failed_rate"]) for entry in session.results.goodput if entry["slo"] == "2/25ms"][
        -1
    ] == (20.0, None)


def _num_running(records: Sequence[RequestRecord], time: float) -> int:
    return sum(record.sent < time <= record.token_times[-1] for record in records)


def test_a_staircase_measures_the_requests_that_runs_of_its_rates_do(tmp_path: Path) -> None:
    lines = [f'{{"arrival": {number / 10}, "input": 5, "output": 3}}' for number in range(60)]
    (tmp_path / "even.jsonl").write_text("\n".join(lines))
    source = parse_source(f"trace:{tmp_path / 'even.jsonl'}", cv=1.0, seed=0)
    counts = []
    for is_staircase in (False, True):
        settings = make_settings(
            sources=[source], rates=[4.0, 8.0], window=Window(start=2.0, end=3.1), is_staircase=is_staircase
        )
        session = Session(settings, Log())
        session.measure(Fake("one", 10.0))
        counts.append([run["num_requests"] for run in session.results.runs])
        assert all(run["engine"] == {} for run in session.results.runs), "a target that says nothing of itself"
    assert counts[0] == counts[1]


def test_goodput_is_searched_between_the_rates_of_the_sweep() -> None:
    target = Fake("one", 10.0)
    search = SearchSettings(goal=0.8, is_searched=True, precision=0.05, max_runs=6)
    session = Session(make_settings(slos=[parse_slo("0.5/25ms")], search=search), Log())
    session.measure(target)
    (found,) = [entry for entry in session.results.goodput if entry["scale"] == 1]
    assert 10.5 < found["rate"] < 13.5 < 1.2 * found["failed_rate"]
    assert found["failed_rate"] <= found["rate"] * 1.05
    rates = [run["rate"] for run in session.results.runs]
    assert rates[:2] == [5.0, 20.0] and all(5 < rate < 20 for rate in rates[2:])
    assert len(rates) == len(set(rates)) <= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": []}, "lengths:10-20,5 needs --rates; only a trace has a rate of its own"),
        ({"rates": [1.0, 0.0]}, "rate is 0; expected a number above 0"),
        ({"scales": [-1.0]}, "SLO scale is -1; expected a number above 0"),
        ({"window": Window(start=5.0, end=5.0)}, "the window 0 s; expected seconds from 0 and above 0"),
        ({"drain": -1.0}, "the drain is -1 s; expected seconds from 0"),
        ({"is_staircase": True, "search": SearchSettings(is_searched=True)}, "a staircase has its rates; goodput is"),
        ({"search": SearchSettings(goal=1.5)}, r"the attainment goal is 1.5; expected a share in \(0, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_settings(**changes)


def test_a_window_without_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no request in the 40 s that are measured"):
        Session(make_settings(rates=[20.0, 1e-3]), Log())


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("connection refused")])
def test_a_target_that_dies_does_not_keep_others_from_being_measured(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(run: Run) -> Outcome:
        raise error

    dying = Fake("dying", 1.0)
    monkeypatch.setattr(dying, "run", die)
    session = Session(make_settings(), Log())
    session.measure(dying)
    session.measure(Fake("other", 10.0))
    (failure,) = session.results.failures
    assert failure == {"target": "dying", "error": f"{type(error).__name__}: {error}"}
    assert len(session.results.runs) == 2

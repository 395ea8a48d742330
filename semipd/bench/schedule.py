"""What is offered and when: a schedule of requests from a workload at a rate, or from a trace file.

A trace is a file of JSON lines, one request each::

    {"arrival": 0.25, "input": 1024, "output": 128, "shared_prefix": 512, "prefix_group": 3}

`arrival` is in seconds, `input` and `output` in tokens. The first `shared_prefix` tokens of the prompt (0 by default)
are those of every other request of its `prefix_group` (0 by default).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from semipd.bench.workloads import Workload, arrival_times, parse_workload
from semipd.errors import ConfigError

_COUNTS = {"input": 1, "output": 1, "shared_prefix": 0, "prefix_group": 0}  # and the smallest value of each
_DEFAULTS = {"shared_prefix": 0, "prefix_group": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request to send.

    Attributes:
        index: its place in the schedule.
        due: when to send it, in seconds from the start.
        num_prompt_tokens: length of the prompt.
        num_output_tokens: tokens to ask for.
        num_shared_tokens: leading prompt tokens that it shares with its group.
        prefix_group: the group.
    """

    index: int
    due: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared_tokens: int = 0
    prefix_group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The seconds of a run that count: requests due in [start, end) are measured, those before warm up."""

    start: float
    end: float

    def holds(self, time: float) -> bool:
        """Whether a moment is inside."""
        return self.start <= time < self.end

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


class RequestSource(Protocol):
    """Makes schedules."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def own_rate(self) -> float | None:
        """Requests per second when nobody asks for a rate; None if one must be given."""

    def schedule(self, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
        """The requests until the window's end, and the window, cut if they end before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """Random lengths at random times."""

    workload: Workload
    cv: float
    seed: int

    @property
    def name(self) -> str:
        """The workload's."""
        return self.workload.name

    @property
    def own_rate(self) -> float | None:
        """None: a workload has no rate."""
        return None

    def schedule(self, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
        times = arrival_times(rate, window.end, cv=self.cv, seed=self.seed)
        inputs, outputs = self.workload.sample(self.seed, len(times))
        rows = zip(times.tolist(), inputs.tolist(), outputs.tolist(), strict=True)
        requests = [
            PlannedRequest(index=index, due=due, num_prompt_tokens=num_in, num_output_tokens=num_out)
            for index, (due, num_in, num_out) in enumerate(rows)
        ]
        return requests, window


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSource:
    """The requests of a trace, whose clock is stretched to a rate; `requests` are in order and begin at 0."""

    name: str
    requests: Sequence[PlannedRequest]

    @property
    def own_rate(self) -> float:
        """The trace's own rate: of one request, 1."""
        last = self.requests[-1].due
        return (len(self.requests) - 1) / last if last else float(len(self.requests))

    def schedule(self, rate: float, window: Window) -> tuple[list[PlannedRequest], Window]:
        stretch = self.own_rate / rate
        requests = [replace(request, due=request.due * stretch) for request in self.requests]
        end = min(window.end, requests[-1].due + 1 / rate)
        if end <= window.start:
            raise ConfigError(
                f"the trace {self.name} at {rate:g} requests per second lasts {end:.3g} s, which the warm-up of "
                f"{window.start:g} s uses up; shorten the warm-up or lower the rate"
            )
        return [request for request in requests if request.due < end], replace(window, end=end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The part of a run that has one rate.

    Attributes:
        rate: requests per second.
        begin: seconds from the start of the run.
        window: what is measured, in seconds from `begin`.
        requests: which of the run's.
    """

    rate: float
    begin: float
    window: Window
    requests: range


def plan_stages(
    source: RequestSource, rates: Sequence[float], window: Window
) -> tuple[list[PlannedRequest], list[Stage]]:
    """The requests of all rates, each rate's behind those of the one before, and whose is whose.

    Rates share no prefixes.
    """
    requests: list[PlannedRequest] = []
    stages: list[Stage] = []
    begin = 0.0
    for number, rate in enumerate(rates):
        planned, its_window = source.schedule(rate, window)
        first = len(requests)
        requests += [
            replace(
                request,
                index=first + request.index,
                due=begin + request.due,
                prefix_group=request.prefix_group * len(rates) + number,
            )
            for request in planned
        ]
        stages.append(Stage(rate=rate, begin=begin, window=its_window, requests=range(first, len(requests))))
        begin += its_window.end
    return requests, stages


def parse_source(text: str, *, cv: float, seed: int) -> RequestSource:
    """A workload by its name, or `trace:FILE`.

    Raises:
        ConfigError: it is unknown, or the trace cannot be read.
    """
    kind, _, path = text.partition(":")
    if kind == "trace" and path:
        return load_trace(Path(path))
    return WorkloadSource(workload=parse_workload(text), cv=cv, seed=seed)


def load_trace(path: Path) -> TraceSource:
    """The requests of a trace file, in order of arrival, the first at 0.

    Raises:
        ConfigError: the file cannot be read, or a line is malformed; the message names it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}") from error
    rows = [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"the trace {path} is empty; expected JSON lines with arrival, input and output")
    rows.sort(key=lambda row: row["arrival"])
    requests = [
        PlannedRequest(
            index=index,
            due=row["arrival"] - rows[0]["arrival"],
            num_prompt_tokens=row["input"],
            num_output_tokens=row["output"],
            num_shared_tokens=row["shared_prefix"],
            prefix_group=row["prefix_group"],
        )
        for index, row in enumerate(rows)
    ]
    return TraceSource(name=path.stem, requests=requests)


def _parse_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {error} in {line[:80]!r}; expected a JSON object") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: {line[:80]!r}; expected a JSON object with arrival, input and output")
    known = ("arrival", *_COUNTS)
    if unknown := sorted(set(row) - set(known)):
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(known)}")
    row = {**_DEFAULTS, **row}
    if missing := [name for name in known if name not in row]:
        raise ConfigError(f"{where}: no {' and no '.join(missing)} in {line[:80]!r}")
    arrival = row["arrival"]
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < float("inf"):
        raise ConfigError(f"{where}: arrival is {arrival!r}; expected seconds from 0")
    for name, smallest in _COUNTS.items():
        if type(row[name]) is not int or row[name] < smallest:
            raise ConfigError(f"{where}: {name} is {row[name]!r}; expected an integer from {smallest}")
    if row["shared_prefix"] > row["input"]:
        raise ConfigError(f"{where}: shared_prefix is {row['shared_prefix']}, longer than the input {row['input']}")
    return row

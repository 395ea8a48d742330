"""One engine over time, from its trace or from a run of `serve`: split, queue, latencies of requests, step times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from semipd.bench.metrics import parse_slo
from semipd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Line = dict[str, Any]

_QUEUE = ("waiting", "prefilling", "decoding")
_STEPS = {"prefill": "C0", "decode": "C1", "mixed": "C2"}
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT"}
_MOST_TARGETS = 6  # lines in a panel; requests may each bring their own


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of one kind: when each was done, and the seconds it took and was predicted to take."""

    times: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What is drawn of an engine, in seconds from its start or the run's.

    Attributes:
        title: model or workload, and policy.
        end: of the time axis.
        window: what was measured; None for everything.
        plan_times: when each plan came into force.
        plans: which: kind, prefill_sms and decode_sms.
        num_chosen: changes of plan that the policy chose to make; None where that is not known.
        num_forced: those that a kind of work forced that ran out or arrived.
        queue_times: when the queue was looked at.
        queue: by name how many requests waited, prefilled and decoded then.
        latencies: of each request its arrival, and its ttft and tpot by name, or None.
        targets: by the same names what they should stay below.
        steps: by kind.
    """

    title: str
    end: float
    window: tuple[float, float] | None = None
    plan_times: Sequence[float]
    plans: Sequence[tuple[str, int, int]]
    num_chosen: int | None
    num_forced: int | None
    queue_times: Sequence[float]
    queue: Mapping[str, Sequence[int]]
    latencies: Mapping[str, Sequence[tuple[float, float | None]]]
    targets: Mapping[str, Sequence[float]]
    steps: Mapping[str, Steps]


def run_timeline(run: Mapping[str, Any]) -> Timeline:
    """Of a run of `serve`. Step times are those of the first step under each plan."""
    samples = run["engine"].get("samples") or {}
    decisions = run["engine"].get("decisions") or {}
    plans = decisions or samples  # a target without decisions may have samples of its plans
    columns = (plans.get(name, ()) for name in ("time", "plan", "prefill_sms", "decode_sms"))
    rows = zip(*columns, strict=True)
    known = [row for row in rows if row[1] is not None]
    forced = decisions.get("is_forced", ())[1:]  # the first is what the run found
    steps = {kind: Steps() for kind in _STEPS}
    columns = (decisions.get(name, ()) for name in ("time", "step", "measured", "predicted"))
    for time, kind, measured, predicted in zip(*columns, strict=True):
        if measured is not None:
            _add(steps[kind], time, measured, predicted)
    requests = run["requests"]
    slos = [parse_slo(label) for label in dict.fromkeys(entry["slo"] for entry in run["attainment"])]
    return Timeline(
        title=f"{run['workload']}, {run['target']} at {run['rate']:g} req/s",
        end=max([*requests["due"], *samples.get("time", ()), run["window"][1]]),
        window=run["window"],
        plan_times=[row[0] for row in known],
        plans=[row[1:] for row in known],
        num_chosen=len(forced) - sum(forced) if decisions else None,
        num_forced=sum(forced) if decisions else None,
        queue_times=samples.get("time", ()),
        queue={name: samples.get(f"num_{name}", ()) for name in _QUEUE},
        latencies={name: list(zip(requests["due"], requests[name], strict=True)) for name in _LATENCIES},
        targets={name: _targets(getattr(slo, name) for slo in slos) for name in _LATENCIES},
        steps=steps,
    )


def is_trace(path: Path) -> bool:
    """Whether the file begins as a trace does."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("event") == "start"


def load_trace(path: Path) -> Timeline:
    """Of a trace that an engine wrote, or still writes.

    Raises:
        ConfigError: a line of it is damaged.
    """
    events: dict[str, list[Line]] = {name: [] for name in ("start", "decision", "step", "request", "end")}
    for line in _lines(path):
        events[line["event"]].append(line)
    start = events["start"][0]
    origin = start["time"]
    decisions = sorted(events["decision"], key=lambda line: line["number"])
    steps = {kind: Steps() for kind in _STEPS}
    for step in events["step"]:
        if step["seconds"]:
            kind = "prefill" if not step["num_decodes"] else "mixed" if step["num_prompt_tokens"] else "decode"
            _add(steps[kind], step["time"] - origin, step["seconds"], step["predicted"])
    slos = [start["slo"], *(request["slo"] for request in events["request"])]
    targets = {name: _targets(slo[name] for slo in slos if slo is not None) for name in _LATENCIES}
    end = events["end"][0]["error"] if events["end"] else "still open"
    num_forced = sum(decision["is_forced"] for decision in decisions[1:])
    requests = events["request"]
    return Timeline(
        title=f"{start['model']} on {start['device']}, {start['policy']}" + (f" ({end:.80})" if end else ""),
        end=max(line["time"] for lines in events.values() for line in lines) - origin,
        plan_times=[decision["time"] - origin for decision in decisions],
        plans=[
            tuple(decision["after"][name] for name in ("kind", "prefill_sms", "decode_sms")) for decision in decisions
        ],
        num_chosen=max(len(decisions) - 1, 0) - num_forced,
        num_forced=num_forced,
        queue_times=[step["time"] - origin for step in events["step"]],
        queue={name: [step[f"num_{name}"] for step in events["step"]] for name in _QUEUE},
        latencies={name: [(request["arrival"] - origin, request[name]) for request in requests] for name in _LATENCIES},
        targets=targets,
        steps=steps,
    )


def timeline_figure(timeline: Timeline) -> Figure:
    """Who had the device, who waited and ran, TTFT and TPOT of each request, and steps as predicted and measured."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    figure.suptitle(timeline.title)
    plan, queue, ttft, tpot, steps = axes = figure.subplots(5, 1, sharex=True)
    _draw_plans(plan, timeline)
    for name in _QUEUE:
        if timeline.queue_times:
            queue.plot(timeline.queue_times, timeline.queue[name], drawstyle="steps-post", linewidth=1, label=name)
    queue.set_ylabel("requests")
    for axis, (name, title) in zip((ttft, tpot), _LATENCIES.items(), strict=True):
        points = [(x, 1e3 * y) for x, y in timeline.latencies[name] if y is not None]
        axis.scatter([x for x, _ in points], [y for _, y in points], s=8)
        for target in timeline.targets[name]:
            axis.axhline(1e3 * target, color="tab:red", linewidth=0.8, linestyle="--")
        axis.set_ylabel(f"{title}, ms")
    for kind, color in _STEPS.items():
        if (mine := timeline.steps[kind]).times:
            measured, predicted = ([1e3 * value for value in values] for values in (mine.measured, mine.predicted))
            steps.scatter(mine.times, measured, s=6, color=color, alpha=0.6, linewidths=0, label=kind)
            steps.scatter(mine.times, predicted, s=12, color="black", marker="_", linewidths=0.6)
    steps.set_ylabel("steps (-: predicted), ms")
    steps.set_xlabel("seconds; requests at their arrival")
    for axis in (ttft, tpot, steps):
        axis.set_yscale("log")
        label_logarithm(axis.yaxis)
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper right", fontsize="small")
        if timeline.window is not None:
            axis.axvspan(*timeline.window, color="tab:green", alpha=0.06, zorder=0)
        axis.grid(alpha=0.3)
    plan.set_xlim(0, max(timeline.end, 1e-3))
    return figure


def label_logarithm(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_plans(axis: Axes, timeline: Timeline) -> None:
    """The shares of prefill and decode, one upon the other; a MIXED step has the device for both."""
    axis.set_ylabel("SMs (cores)")
    if timeline.num_chosen is not None:
        changes = f"{timeline.num_chosen} changes of plan by choice, {timeline.num_forced} by work that came or went"
        axis.set_title(changes, fontsize="small", loc="left")
    if not timeline.plans:
        return
    plans = [*timeline.plans, timeline.plans[-1]]
    shares = {
        "prefill": [prefill for _, prefill, _ in plans],
        "decode": [0 if kind == "mixed" else decode for kind, _, decode in plans],
        "mixed": [decode if kind == "mixed" else 0 for kind, _, decode in plans],
    }
    times = [*timeline.plan_times, max(timeline.end, timeline.plan_times[-1])]
    used = {name: values for name, values in shares.items() if any(values)}
    colors = [_STEPS[name] for name in used]
    axis.stackplot(times, *used.values(), labels=list(used), colors=colors, step="post", alpha=0.6, linewidth=0)


def _add(steps: Steps, time: float, measured: float, predicted: float) -> None:
    steps.times.append(time)
    steps.measured.append(measured)
    steps.predicted.append(predicted)


def _targets(values: Iterator[float | None]) -> list[float]:
    return list(dict.fromkeys(value for value in values if value is not None))[:_MOST_TARGETS]


def _lines(path: Path) -> Iterator[Line]:
    """The lines; of a trace that an engine still writes, or that it was killed over, the last may be cut."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        try:
            yield json.loads(text)
        except ValueError as error:
            if number < len(lines) or text.endswith("\n"):
                raise ConfigError(f"{path}, line {number} is damaged: {error}") from error

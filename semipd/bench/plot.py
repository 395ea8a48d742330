"""Pictures of results: per workload attainment against rate and latency distributions; of traces and runs over time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from semipd.bench.timeline import is_trace, label_logarithm, load_trace, run_timeline, timeline_figure
from semipd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Mapping[str, Any]

_DISTRIBUTIONS = {"ttft": "TTFT", "tpot": "TPOT", "worst_gap": "worst gap"}
_MARKERS = "osD^vPX*<>"


def draw(
    paths: Sequence[Path], folder: Path, suffix: str, *, rate: float | None = None, has_timelines: bool = False
) -> Iterator[Path]:
    """Draw each trace by itself and the runs of all other files together; yields the pictures' paths.

    Args:
        paths: traces of engines, and JSON files of `serve`.
        folder: where the pictures go; made if it is missing.
        suffix: png or svg.
        rate: which runs the distributions are of; None takes the highest rate that every target ran.
        has_timelines: draw each run over time too.

    Raises:
        ConfigError: a file holds no results, or no run has that rate.
    """
    traces = {path: load_trace(path) for path in paths if is_trace(path)}
    paths = [path for path in paths if path not in traces]
    files = [load_results(path) for path in paths]
    runs = [run for results in files for run in _with_labels(results, paths, files)]
    folder.mkdir(parents=True, exist_ok=True)
    for path, timeline in traces.items():
        yield _save(timeline_figure(timeline), folder, path.stem, suffix)
    goal = files[0]["settings"]["goal"] if files else 0.0
    for workload in dict.fromkeys(run["workload"] for run in runs):
        mine = [run for run in runs if run["workload"] == workload]
        yield _save(workload_figure(workload, mine, goal=goal, rate=rate), folder, workload, suffix)
        for run in mine if has_timelines else ():
            name = f"{workload}-{run['target']}-{run['rate']:g}"
            yield _save(timeline_figure(run_timeline(run)), folder, name, suffix)


def load_results(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; expected a file that serve --json wrote, or a trace"
        ) from error
    if not isinstance(results, dict) or results.get("benchmark") != "serve" or not results.get("runs"):
        raise ConfigError(f"{path} holds no runs; expected a file that serve --json wrote, or a trace")
    if "settings" not in results or any("requests" not in run for run in results["runs"]):
        raise ConfigError(f"{path} has the runs' figures without their requests; expected all that serve --json wrote")
    return results


def workload_figure(workload: str, runs: Sequence[Run], *, goal: float, rate: float | None = None) -> Figure:
    """Above: attainment against rate, a panel per SLO. Below: distributions at one rate, attainment by SLO scale."""
    rate = _common_rate(runs) if rate is None else rate
    at_rate = [run for run in runs if run["rate"] == rate]
    if not at_rate:
        rates = sorted({run["rate"] for run in runs})
        raise ConfigError(f"no run of {workload} at {rate:g} requests per second; there are {rates}")
    slos = list(dict.fromkeys(entry["slo"] for run in runs for entry in run["attainment"]))
    has_scales = len({entry["scale"] for run in runs for entry in run["attainment"]}) > 1
    num_columns = max(len(slos), len(_DISTRIBUTIONS) + has_scales)
    figure = Figure(figsize=(3.6 * num_columns, 7), layout="constrained")
    figure.suptitle(workload)
    colors = {target: f"C{index}" for index, target in enumerate(dict.fromkeys(run["target"] for run in runs))}
    axes = figure.subplots(2, num_columns, squeeze=False)
    for axis, slo in zip(axes[0], slos, strict=False):
        _draw_attainment(axis, runs, slo, goal, colors)
    for axis, (name, title) in zip(axes[1], _DISTRIBUTIONS.items(), strict=False):
        _draw_distribution(axis, at_rate, name, f"{title} at {rate:g} req/s", colors)
    num_below = len(_DISTRIBUTIONS)
    if has_scales:
        _draw_scales(axes[1][num_below], at_rate, slos[0], goal, colors)
        num_below += 1
    for axis in (*axes[0][len(slos) :], *axes[1][num_below:]):
        axis.axis("off")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return figure


def _draw_attainment(axis: Axes, runs: Sequence[Run], slo: str, goal: float, colors: Mapping[str, str]) -> None:
    for index, (target, color) in enumerate(colors.items()):
        points = sorted((run["rate"], _attained(run, slo, 1.0)) for run in runs if run["target"] == target)
        marker = _MARKERS[index % len(_MARKERS)]
        axis.plot(
            [x for x, _ in points], [y for _, y in points], color=color, marker=marker, markersize=4, label=target
        )
    _finish_attainment(axis, goal, f"TTFT / TPOT {slo}", "requests per second")


def _draw_scales(axis: Axes, runs: Sequence[Run], slo: str, goal: float, colors: Mapping[str, str]) -> None:
    for run in runs:
        scales = sorted({entry["scale"] for entry in run["attainment"]})
        shares = [_attained(run, slo, scale) for scale in scales]
        axis.plot(scales, shares, color=colors[run["target"]], marker=".")
    _finish_attainment(axis, goal, f"{slo} at {runs[0]['rate']:g} req/s", "SLO scale")


def _finish_attainment(axis: Axes, goal: float, title: str, x_label: str) -> None:
    axis.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axis.set(title=title, xlabel=x_label, ylabel="attainment", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)


def _draw_distribution(axis: Axes, runs: Sequence[Run], name: str, title: str, colors: Mapping[str, str]) -> None:
    """The share of measured requests below each time; failed ones without a time never get there."""
    for run in runs:
        requests = run["requests"]
        rows = zip(requests[name], requests["status"], requests["is_measured"], strict=True)
        # A request of one token that ended well has no TPOT to judge.
        values = [value for value, status, counts in rows if counts and not (value is None and status == "ok")]
        known = np.sort(np.array([value for value in values if value is not None], dtype=float))
        shares = np.arange(1, len(known) + 1) / max(len(values), 1)
        axis.step(1e3 * known, shares, where="post", color=colors[run["target"]])
    axis.set(title=title, xlabel="ms", ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    label_logarithm(axis.xaxis)
    axis.grid(alpha=0.3)


def _attained(run: Run, slo: str, scale: float) -> float:
    values = (entry["attained"] for entry in run["attainment"] if (entry["slo"], entry["scale"]) == (slo, scale))
    return next(values, float("nan"))


def _common_rate(runs: Sequence[Run]) -> float:
    """The highest rate that every target ran, or the highest of all if they share none."""
    by_target: dict[str, set[float]] = {}
    for run in runs:
        by_target.setdefault(run["target"], set()).add(run["rate"])
    shared = set.intersection(*by_target.values())
    return float(max(shared or {run["rate"] for run in runs}))


def _with_labels(
    results: Mapping[str, Any], paths: Sequence[Path], files: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Its runs; a target that another file has too gets the file's name."""
    position = next(index for index, other in enumerate(files) if other is results)
    others = {run["target"] for other in files if other is not results for run in other["runs"]}
    for run in results["runs"]:
        label = f"{run['target']} ({paths[position].stem})" if run["target"] in others else run["target"]
        yield {**run, "target": label}


def _save(figure: Figure, folder: Path, name: str, suffix: str) -> Path:
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.{suffix}"
    figure.savefig(path, dpi=120)
    return path

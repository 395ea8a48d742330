"""What a person and a program read: tables and a progress bar in the terminal, one JSON file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from semipd.bench.environment import environment
from semipd.bench.session import Results

_PACKAGES = ("semipd", "torch", "triton", "httpx", "numpy")
LATE = 0.01
"""Seconds: a run whose generator was later than this at p99 is marked."""


class Reporter:
    """Shows how a session goes on, and keeps the JSON file complete up to the last run.

    Args:
        path: the file; None for none.
        settings: what was asked for, as plain values.
        program: the module that runs.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, program: str = "semipd.bench") -> None:
        self._path = path
        self._program = program
        self._settings = dict(settings)
        self._environment: dict[str, Any] = {}
        self._num_said = 0
        self._num_failures = 0
        self.console = Console(width=None if sys.stdout.isatty() else 240)
        # Twice a second: drawing takes the interpreter away from an engine in this process.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=2,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_run(self, title: str, num_requests: int) -> None:
        self._progress.reset(self._task, description=title, total=num_requests)

    def on_ended(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def on_result(self, results: Results) -> None:
        if not self._environment:  # now: torch is loaded if anything loads it
            self._environment = environment(self._program, _PACKAGES)
        if self._path is not None:
            save_results(self._path, {**self._environment, "settings": self._settings, **_plain(results)})
        for run in results.runs[self._num_said :]:
            self._say(run)
        self._num_said = len(results.runs)
        for failure in results.failures[self._num_failures :]:
            self._say_error(f"{failure['target']} failed: {failure['error']}")
        self._num_failures = len(results.failures)

    def show(self, results: Results) -> None:
        """Everything, as tables; the progress bar is over."""
        self._progress.stop()
        for workload in dict.fromkeys(run["workload"] for run in results.runs):
            self.console.print(_runs_table([run for run in results.runs if run["workload"] == workload]))
        if results.goodput:
            self.console.print(_goodput_table(results.goodput))
        for run in results.runs:
            for message, count in run["errors"].items():
                self._say_error(f"{run['target']}, {run['workload']} at {run['rate']:g}/s: {count} x {message}")
            if run["num_short_outputs"]:
                self._say_error(
                    f"{run['target']}, {run['workload']} at {run['rate']:g}/s: {run['num_short_outputs']} outputs came "
                    "out shorter than asked for"
                )
        if any(_is_late(run) for run in results.runs):
            self.console.print(
                f"* the generator sent more than {1e3 * LATE:.0f} ms late at p99, so it read clocks late as well: "
                "give it more cores or client processes",
                style="yellow",
            )
        where = self._environment
        if where:
            machine = where["gpu"] or f"{where['cpu']}, {where['num_cores']} cores"
            self.console.print(f"{machine}; commit {where['commit']}", style="dim", highlight=False)

    def _say(self, run: Mapping[str, Any]) -> None:
        shares = ", ".join(f"{entry['slo']} {entry['attained']:.2f}" for entry in _unscaled(run))
        self.console.print(
            f"{run['workload']}  {run['target']}  {run['rate']:g}/s: {run['statuses']['ok']} of {run['num_requests']} "
            f"ok; attained {shares}",
            highlight=False,
        )

    def _say_error(self, text: str) -> None:
        self.console.print(text, style="red", markup=False, highlight=False)


def save_results(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that the file is whole at every moment."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps({"benchmark": "serve", **values}) + "\n")
    partial.replace(path)


def _plain(results: Results) -> dict[str, Any]:
    return {
        "targets": results.targets,
        "failures": results.failures,
        "goodput": results.goodput,
        "runs": results.runs,
    }


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{runs[0]['workload']}: times in ms, p50 / p90 / p99", title_justify="left")
    slos = [entry["slo"] for entry in _unscaled(runs[0])]
    table.add_column("target")
    for name in ("req/s", "ok", "TTFT", "TPOT", "ITL", "worst gap", "tokens/s", "late p99", *slos):
        table.add_column(name, justify="right")
    for run in sorted(runs, key=lambda run: run["rate"]):
        table.add_row(
            run["target"],
            f"{run['rate']:.3g}",
            f"{run['statuses']['ok']}/{run['num_requests']}",
            *(_triple(run[name]) for name in ("ttft", "tpot", "itl", "worst_gap")),
            f"{run['throughput']['output_tokens']:,.0f}",
            f"{1e3 * run['late']['p99']:.1f}{'*' if _is_late(run) else ''}" if run["late"] else "-",
            *(f"{entry['attained']:.2f}" for entry in _unscaled(run)),
        )
    return table


def _goodput_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Requests per second; `>` where no rate that was tried failed."""
    table = Table(title=f"goodput in req/s at {rows[0]['goal']:.0%} attainment", title_justify="left")
    slos = list(dict.fromkeys((row["slo"], row["scale"]) for row in rows))
    for name in ("workload", "target"):
        table.add_column(name)
    for slo, scale in slos:
        table.add_column(slo if scale == 1 else f"{slo} x{scale:g}", justify="right")
    for workload, target in dict.fromkeys((row["workload"], row["target"]) for row in rows):
        mine = {
            (row["slo"], row["scale"]): row for row in rows if (row["workload"], row["target"]) == (workload, target)
        }
        table.add_row(workload, target, *(_goodput(mine[slo]) for slo in slos))
    return table


def _goodput(row: Mapping[str, Any]) -> str:
    if row["rate"] is None:
        return f"< {row['failed_rate']:.3g}"
    return f"{'> ' if row['failed_rate'] is None else ''}{row['rate']:.3g}"


def _unscaled(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in run["attainment"] if entry["scale"] == 1]


def _triple(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "-"
    return " / ".join(_milliseconds(values[name]) for name in ("p50", "p90", "p99"))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _is_late(run: Mapping[str, Any]) -> bool:
    return run["late"] is not None and run["late"]["p99"] > LATE

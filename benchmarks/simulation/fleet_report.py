"""Goodput per engine against the size of a fleet and its router: the search, the table and the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.simulation.fleet import EngineSpec, Served, make_shards, run_fleet
from benchmarks.simulation.routers import Router
from benchmarks.simulation.service_model import FitError, ModelShard, ServiceModel, describe, fit
from semipd.bench.schedule import PlannedRequest, RequestSource, Window
from semipd.bench.search import find_goodput
from semipd.config import SLO

if TYPE_CHECKING:
    from rich.console import Console

_OVERLOADED = 0.5  # attainment up to which a run says little of an engine that works
_WINDOW_ENGINES = 16  # whose window is as long as was asked for
_FIRST_GROWTH, _GROWTH = 1.6, 1.15  # of rates that are tried until one fails; fleets differ little from each other


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStudy:
    """What is measured of fleets.

    Attributes:
        spec: their engines.
        source: of requests.
        window: of time that counts; longer for fewer than 16 engines.
        drain: seconds after the last arrival in which requests may end.
        slo: judges requests.
        goal, precision, max_runs: of the search; see `find_goodput`.
        staleness: of the router's reports, in seconds.
        num_processes: that simulate.
        seed: of routers.
    """

    spec: EngineSpec
    source: RequestSource
    window: Window
    drain: float
    slo: SLO
    goal: float
    precision: float
    max_runs: int
    staleness: float
    num_processes: int
    seed: int

    def serve(
        self, requests: Sequence[PlannedRequest], num_engines: int, router: str, model: ServiceModel | None = None
    ) -> list[Served]:
        """One run of a schedule; engines follow `model` where one is given."""
        if model is None:
            shards = make_shards(self.spec, num_engines, self.num_processes)
            bounds = [num_engines * index // len(shards) for index in range(len(shards) + 1)]
            sizes = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
        else:
            shards, sizes = [ModelShard(model, range(num_engines))], [num_engines]
        chooser = Router(router, num_engines, seed=self.seed)
        return run_fleet(shards, sizes, chooser, requests, staleness=self.staleness, drain=self.drain)

    def _window_of(self, num_engines: int) -> Window:
        """Longer for small fleets, so that they are judged by as many requests."""
        longer = max(1.0, _WINDOW_ENGINES / num_engines)
        return Window(start=self.window.start, end=self.window.start + self.window.seconds * longer)

    def search(
        self,
        num_engines: int,
        router: str,
        start: float,
        *,
        growth: float,
        model: ServiceModel | None = None,
        on_run: Callable[[float, list[Served]], None] = lambda attained, served: None,
    ) -> dict[str, Any]:
        """The goodput per engine of a fleet, as a row of results."""

        def measure(rate: float) -> float:
            requests, window = self.source.schedule(rate * num_engines, self._window_of(num_engines))
            served = self.serve(requests, num_engines, router, model)
            num_measured = sum(window.holds(request.due) for request in requests)
            num_attained = sum(window.holds(one.request.due) and one.attains(self.slo) for one in served)
            attained = num_attained / max(num_measured, 1)  # those that never ended do not attain
            on_run(attained, served)
            return attained

        found = find_goodput(
            measure,
            goal=self.goal,
            start=start,
            precision=self.precision,
            max_runs=self.max_runs,
            growth=growth,
        )
        return {
            "engines": num_engines,
            "router": router,
            "engine": "scheduler" if model is None else "model",
            "goodput_per_engine": found.rate,
            "failed_rate_per_engine": found.failed_rate,
        }


def study_fleets(
    study: FleetStudy,
    sizes: Sequence[int],
    routers: Sequence[str],
    *,
    start: float,
    largest_simulated: int,
    console: Console,
) -> dict[str, Any]:
    """Search every size and router; sizes above `largest_simulated` follow curves fitted to the smaller fleets."""
    rows: list[dict[str, Any]] = []
    samples: list[list[Served]] = []
    best: dict[str, float] = {}  # by router, of the last size
    result: dict[str, Any] = {"rows": rows}

    def keep(attained: float, served: list[Served]) -> None:
        if attained > _OVERLOADED:
            samples.append(served)

    def search(size: int, router: str, model: ServiceModel | None = None) -> None:
        rate = best.get(router) or max(best.values(), default=start)
        growth = _GROWTH if best else _FIRST_GROWTH
        on_run = keep if model is None else (lambda attained, served: None)
        row = study.search(size, router, rate, growth=growth, model=model, on_run=on_run)
        best[router] = row["goodput_per_engine"] or row["failed_rate_per_engine"]
        rows.append(row)
        console.print(f"{size} engines ({row['engine']}), {router}: {_rate(row)} req/s per engine", highlight=False)

    simulated = [
        (size, router)
        for size in sorted(sizes)
        if size <= largest_simulated
        for router in (routers if size > 1 else routers[:1])
    ]
    for size, router in simulated:
        search(size, router)
    if samples:
        model, error = fit_runs(samples, study.spec.shape.max_num_seqs)
        result["model"] = {**describe(model), "ttft_error": error.ttft, "tpot_error": error.tpot}
        console.print(
            f"model of an engine: error of TTFT {1e3 * error.ttft[0]:.0f} ms at the median and "
            f"{1e3 * error.ttft[1]:.0f} at p90; of TPOT {error.tpot[0]:.1%} and {error.tpot[1]:.1%}",
            highlight=False,
        )
        larger = [(size, router) for size in sorted(sizes) if size > largest_simulated for router in routers]
        for size, router in [*simulated, *larger]:  # those that were simulated too, so that the model's errors show
            search(size, router, model)
    return result


def fit_runs(samples: Sequence[Sequence[Served]], max_decodes: int) -> tuple[ServiceModel, FitError]:
    """The curves of several runs; each engine of each run counts as one."""
    renamed = [
        replace(one, engine=1_000_000 * number + one.engine) for number, run in enumerate(samples) for one in run
    ]
    return fit(renamed, max_decodes=max_decodes)


def fleet_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Routers by size."""
    table = Table(title=title, title_justify="left")
    routers = list(dict.fromkeys(row["router"] for row in rows))
    table.add_column("engines", justify="right")
    table.add_column("each is")
    for router in routers:
        table.add_column(router, justify="right")
    for size, kind in dict.fromkeys((row["engines"], row["engine"]) for row in rows):
        mine = {row["router"]: row for row in rows if (row["engines"], row["engine"]) == (size, kind)}
        table.add_row(f"{size:,}", kind, *(_rate(mine[router]) if router in mine else "-" for router in routers))
    return table


def fleet_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Goodput per engine against fleet size, a line a router; dashed where engines follow the model."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, router in enumerate(dict.fromkeys(row["router"] for row in rows)):
        for kind, style in (("scheduler", "o-"), ("model", "s--")):
            points = sorted(
                (row["engines"], row["goodput_per_engine"])
                for row in rows
                if (row["router"], row["engine"]) == (router, kind) and row["goodput_per_engine"] is not None
            )
            label = router if kind == "scheduler" else None
            axis.plot([x for x, _ in points], [y for _, y in points], style, color=f"C{index}", label=label)
    axis.set(title=title, xlabel="engines", ylabel="goodput per engine, req/s", xscale="log", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture."""
    figure.savefig(path, dpi=120)


def _rate(row: Mapping[str, Any]) -> str:
    if row["goodput_per_engine"] is None:
        return f"< {row['failed_rate_per_engine']:.3g}"
    return f"{'> ' if row['failed_rate_per_engine'] is None else ''}{row['goodput_per_engine']:.3g}"

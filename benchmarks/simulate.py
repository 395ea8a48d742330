"""Serve a workload with simulated engines: the real scheduler and policies, step times from a table, no GPU.

  # policies on the same requests, and the highest rate that keeps nine in ten requests inside 0.5 s and 25 ms
  python -m benchmarks.simulate --table benchmarks/results/h100_step_times.json \\
      --policies adaptive static mixed:token_budget=512 --workloads sharegpt long --rates 8 --slo 0.5/25ms --goodput
  # what operators fear, at a rate: bursts, sudden long prompts, a drifting mix, 1.5 times the rate for 60 s
  python -m benchmarks.simulate --policies adaptive --scenarios bursts long-prompts drift overload --rates 12
  # goodput per engine of fleets: up to 32 with the real scheduler, above from a model that is fitted to those
  python -m benchmarks.simulate --workloads long --fleet 1 4 32 1000 --routers random two-choices shortest --rates 2

Results have the form of `python -m semipd.bench serve`, so `python -m semipd.bench plot` draws them; those of fleets
are rows and a picture of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from benchmarks.common import environment, make_parser
from benchmarks.simulation.device import DefaultStepTimes, StepTimes
from benchmarks.simulation.engine import EngineShape
from benchmarks.simulation.fleet import EngineSpec
from benchmarks.simulation.fleet_report import FleetStudy, fleet_figure, fleet_table, save_figure, study_fleets
from benchmarks.simulation.routers import ROUTERS
from benchmarks.simulation.scenario_report import scenario_table
from benchmarks.simulation.scenarios import SCENARIOS, Scenario, parse_scenario
from benchmarks.simulation.target import SimulatedTarget
from benchmarks.step_table import StepTable, TableError
from semipd.bench.cli import add_judgement, add_load, make_settings, recorded
from semipd.bench.engine_arguments import parse_policy_spec, parse_value
from semipd.bench.metrics import parse_slo, slo_label
from semipd.bench.report import Reporter
from semipd.bench.session import Results, SearchSettings, Session, Settings
from semipd.config import SLO
from semipd.errors import ConfigError, SemiPDError

_SCENARIO_DRAIN = 600.0  # seconds; a run ends when it is drained, and that nobody waits for ever has to be seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return _study_fleets(args) if args.fleet else _serve(args)
    except (SemiPDError, TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, has_model=False)
    group = parser.add_argument_group("engines")
    group.add_argument("--table", type=Path, metavar="FILE", help="step times (default: those of the latency model)")
    group.add_argument(
        "--policies", nargs="+", default=["adaptive"], metavar="POLICY", help="as in python -m semipd.bench serve"
    )
    group.add_argument(
        "--engine", nargs="+", default=[], metavar="NAME=VALUE", help="fields of EngineShape: kv_cache_tokens=200000"
    )
    group.add_argument(
        "--engine-slo", metavar="TTFT/TPOT[/GAP]", help="what engines are told, or none (default: the first of --slo)"
    )
    add_load(parser)
    parser.add_argument(
        "--scenarios", nargs="+", default=[], choices=list(SCENARIOS), help="put each workload under each of these"
    )
    parser.add_argument(
        "--load", type=float, default=0.7, help="with --goodput, share of it that scenarios run at (default: 0.7)"
    )
    add_judgement(parser)
    group = parser.add_argument_group("fleets, of the first policy; rates are per engine, the first of each is used")
    group.add_argument("--fleet", nargs="+", type=int, default=[], metavar="ENGINES", help="sizes to search goodput of")
    group.add_argument("--routers", nargs="+", default=["two-choices"], choices=list(ROUTERS))
    group.add_argument(
        "--staleness", type=float, default=0.05, help="seconds by which a router's loads may be old (default: 0.05)"
    )
    group.add_argument(
        "--largest-simulated", type=int, default=32, help="larger fleets follow a fitted model (default: 32)"
    )
    group.add_argument("--processes", type=int, default=1, help="worker processes that simulate (default: 1)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw goodput per engine to this file")
    return parser


def _serve(args: argparse.Namespace) -> int:
    settings = make_settings(args)
    if args.scenarios and settings.is_staircase:
        raise ConfigError("--scenarios takes no --staircase: a scenario is a run of one rate")
    times, source = load_times(args.table)
    shape, slo = make_shape(args.engine), _engine_slo(args)
    targets = [
        SimulatedTarget(policy=policy, shape=shape, slo=slo, times=times, source=source) for policy in args.policies
    ]
    with Reporter(args.json, recorded(args), program="benchmarks.simulate") as reporter:
        session = Session(settings, reporter)
        try:
            for target in targets:
                if args.goodput or not args.scenarios:
                    session.measure(target)
                for scenario in _scenarios(args):
                    _measure_scenario(args, settings, session.results, target, scenario, reporter)
        finally:
            reporter.show(session.results)
            names = {scenario.name for scenario in _scenarios(args)}
            if runs := [run for run in session.results.runs if run["workload"] in names]:
                reporter.console.print(scenario_table(runs))
    return 2 if session.results.failures else 0


def _scenarios(args: argparse.Namespace) -> list[Scenario]:
    return [
        parse_scenario(kind, workload, cv=args.cv, seed=args.seed)
        for workload in args.workloads
        for kind in args.scenarios
    ]


def _measure_scenario(
    args: argparse.Namespace,
    settings: Settings,
    results: Results,
    target: SimulatedTarget,
    scenario: Scenario,
    reporter: Reporter,
) -> None:
    """At the rates given or, where goodput was searched, at a share of the target's own on the workload."""
    rates = settings.rates
    if args.goodput:
        found = next(
            (row["rate"] for row in results.goodput if row["target"] == target.label and scenario.is_on(row)), None
        )
        if found is None:
            return
        rates = [found * (1.0 if scenario.kind == "overload" else args.load)]
    session = Session(
        replace(
            settings,
            sources=[scenario],
            rates=rates,
            drain=max(settings.drain, _SCENARIO_DRAIN),
            search=SearchSettings(goal=settings.search.goal),
        ),
        reporter,
    )
    session.results = results
    session.measure(target)


def _study_fleets(args: argparse.Namespace) -> int:
    settings = make_settings(args)
    times, table = load_times(args.table)
    if settings.scales != [1.0] or len(args.policies) > 1 or settings.is_staircase:
        raise ConfigError("--fleet takes one policy, no --slo-scales and no --staircase")
    source = settings.sources[0]
    if args.scenarios:
        source = parse_scenario(args.scenarios[0], args.workloads[0], cv=args.cv, seed=args.seed)
    study = FleetStudy(
        spec=EngineSpec(
            shape=make_shape(args.engine),
            policy=parse_policy_spec(args.policies[0]),
            slo=_engine_slo(args),
            times=times,
            prompt_seed=args.seed,
            run=0,
        ),
        source=source,
        window=settings.window,
        drain=settings.drain,
        slo=settings.slos[0],
        goal=args.goal,
        precision=args.precision,
        max_runs=args.max_runs,
        staleness=args.staleness,
        num_processes=args.processes,
        seed=args.seed,
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    result = study_fleets(
        study,
        args.fleet,
        args.routers,
        start=settings.rates_of(source)[0],
        largest_simulated=args.largest_simulated,
        console=console,
    )
    title = f"goodput per engine in req/s: {source.name}, {args.policies[0]}, {slo_label(settings.slos[0])}"
    console.print(fleet_table(result["rows"], title))
    if args.plot is not None:
        save_figure(fleet_figure(result["rows"], title), args.plot)
    if args.json is not None:
        shape = asdict(study.spec.shape)
        settings_of_fleet = recorded(args) | {"staleness": args.staleness, "step_times": table, "shape": shape}
        values = {"benchmark": "fleet", **environment(), "settings": settings_of_fleet, **result}
        args.json.write_text(json.dumps(values, indent=1) + "\n")
    return 0


def load_times(path: Path | None) -> tuple[StepTimes, str]:
    """Step times and what results call them."""
    if path is None:
        return DefaultStepTimes(EngineShape().num_sms), "defaults of the latency model"
    try:
        return StepTable.load(path), path.name
    except TableError as error:
        raise ConfigError(f"--table {path}: {error}") from error


def make_shape(items: Sequence[str]) -> EngineShape:
    """The engines' shape, from NAME=VALUE.

    Raises:
        ConfigError: there is no such field.
    """
    values = {}
    for item in items:
        name, has_value, value = item.partition("=")
        if not has_value or name not in EngineShape.__slots__:
            known = ", ".join(EngineShape.__slots__)
            raise ConfigError(f"--engine {item!r}; expected NAME=VALUE with one of {known}")
        values[name] = parse_value(value)
    return EngineShape(**values)  # type: ignore[arg-type]  # as given


def _engine_slo(args: argparse.Namespace) -> SLO | None:
    return None if args.engine_slo == "none" else parse_slo(args.engine_slo or args.slo[0])


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `serve` measures, `plot` draws."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from semipd.config import PolicyName
from semipd.errors import ConfigError, SemiPDError

if TYPE_CHECKING:
    from semipd.bench.session import Settings

_EXTRA = ("httpx", "matplotlib", "numpy", "rich")

_SERVE = """Serve requests at a rate, whatever becomes of them, and report latencies and attained targets.

  # policies of the engine with random weights, on the same requests
  python -m semipd.bench serve --model llama-3-8b --policies static exclusive mixed:token_budget=512 \\
      --workloads sharegpt long --rates 8 16 24 --json results.json
  # the highest rate that keeps nine in ten requests inside 0.5 s and 25 ms, by bisection
  python -m semipd.bench serve --model model.gguf --slo 0.5/25ms --rates 4 --goodput
  # a running server
  python -m semipd.bench serve --url http://localhost:8000/v1 --label other --rates 8 16 24 --json other.json
"""

_PLOT = """Draw results: attainment against rate, distributions of TTFT, TPOT and worst gaps. Draw traces over time.

  python -m semipd.bench plot results.json other.json --out plots
  # what an Engine(trace="trace.jsonl") did: split, queue, TTFT and TPOT of each request, step times
  python -m semipd.bench plot trace.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if no request of some run ended well, 2 for errors."""
    args = make_parser().parse_args(arguments)
    try:
        status: int = args.command(args)
    except (SemiPDError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(f"error: {error}; install it with: pip install 'semipd[bench]'\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return status


def make_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(prog="python -m semipd.bench", description="Serving benchmarks and their plots.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    form = argparse.RawDescriptionHelpFormatter
    serve = commands.add_parser("serve", help="measure", description=_SERVE, formatter_class=form)
    serve.set_defaults(command=_serve)
    _add_targets(serve)
    add_load(serve)
    add_judgement(serve)
    serve.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, after every run")
    plot = commands.add_parser("plot", help="draw", description=_PLOT, formatter_class=form)
    plot.set_defaults(command=_plot)
    plot.add_argument("results", nargs="+", type=Path, help="JSON files of serve, drawn together, or traces")
    plot.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to draw to (default: here)")
    plot.add_argument("--format", choices=("png", "svg"), default="png", help="default: %(default)s")
    plot.add_argument(
        "--rate", type=float, help="rate of the distributions (default: the highest that all targets ran)"
    )
    plot.add_argument("--timelines", action="store_true", help="draw every run over time too")
    return parser


def _add_targets(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("targets, measured one after another")
    group.add_argument(
        "--model", help="hub id, folder, .gguf file, or llama-3-8b or llama-3-70b for its shapes with random weights"
    )
    group.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="an engine each, by the name that Engine takes, with arguments as in mixed:token_budget=512 or "
        "static:prefill_sms=84,decode_sms=48 (default: what Engine takes on the device)",
    )
    group.add_argument(
        "--engine", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of Engine: max_num_seqs=512"
    )
    group.add_argument(
        "--engine-slo", metavar="TTFT/TPOT[/GAP]", help="what the engine is told, or none (default: the first of --slo)"
    )
    group.add_argument("--url", nargs="+", default=[], help="OpenAI-compatible servers: http://localhost:8000/v1")
    group.add_argument("--label", nargs="+", default=[], help="what to call each server (default: host and port)")
    group.add_argument("--served-model", help="model name at the servers (default: the first of /v1/models)")
    group.add_argument("--prompt", choices=("tokens", "text"), default="tokens", help="what servers are sent")
    group.add_argument("--vocab-size", type=int, default=32_000, help="token ids sent to servers are below this")
    group.add_argument(
        "--client-processes", type=int, default=1, help="processes that ask a server; see the late column"
    )
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable with the servers' key")
    group.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of each HTTP request")


def add_load(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is offered, and when."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--workloads",
        nargs="+",
        default=["sharegpt"],
        metavar="WORKLOAD",
        help="sharegpt, azure-conv, long, mixed-long, lengths:INPUT,OUTPUT (numbers or ranges: lengths:16-64,32) or "
        "trace:FILE (default: sharegpt); with rates of its own as in sharegpt@8,16",
    )
    group.add_argument(
        "--rates", nargs="+", type=float, default=[], help="requests per second, a run each (default: a trace's own)"
    )
    group.add_argument(
        "--staircase",
        action="store_true",
        help="all rates of a workload in one run, rising, each right behind the one before: only the last one drains",
    )
    group.add_argument("--cv", type=float, default=1.0, help="variation of the gaps: 1 Poisson (default), 2-4 bursts")
    group.add_argument("--duration", type=float, default=20.0, help="seconds that are measured (default: 20)")
    group.add_argument("--warmup", type=float, default=5.0, help="seconds of load before them (default: 5)")
    group.add_argument(
        "--drain", type=float, default=30.0, help="seconds after the last arrival to end in (default: 30)"
    )
    group.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts")


def add_judgement(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what latencies are good."""
    group = parser.add_argument_group("targets of latency")
    group.add_argument(
        "--slo",
        nargs="+",
        default=["0.5/25ms", "0.3/15ms", "0.5/50ms", "1/50ms", "2/100ms"],
        metavar="TTFT/TPOT[/GAP]",
        help="pairs to judge by; seconds unless a unit is given (default: %(default)s)",
    )
    group.add_argument("--slo-scales", nargs="+", type=float, default=[1.0], help="factors of the targets")
    group.add_argument("--goodput", action="store_true", help="bisect for the highest rate that reaches the goal")
    group.add_argument("--goal", type=float, default=0.9, help="attainment that counts as good (default: 0.9)")
    group.add_argument("--precision", type=float, default=0.05, help="relative width at which bisection stops")
    group.add_argument("--max-runs", type=int, default=8, help="most runs of one search")


def make_settings(args: argparse.Namespace) -> Settings:
    """What the arguments of `add_load` and `add_judgement` mean.

    Raises:
        ConfigError: a value is wrong.
    """
    from semipd.bench.metrics import parse_slo
    from semipd.bench.schedule import Window, parse_source
    from semipd.bench.session import SearchSettings, Settings

    sources, rates_by_source = [], {}
    for item in args.workloads:
        text, at, rates = item.partition("@") if not item.startswith("trace:") else (item, "", "")
        sources.append(parse_source(text, cv=args.cv, seed=args.seed))
        if at:
            rates_by_source[sources[-1].name] = _parse_rates(rates, item)
    return Settings(
        sources=sources,
        rates=args.rates,
        rates_by_source=rates_by_source,
        window=Window(start=args.warmup, end=args.warmup + args.duration),
        drain=args.drain,
        slos=[parse_slo(text) for text in args.slo],
        scales=args.slo_scales,
        seed=args.seed,
        is_staircase=args.staircase,
        search=SearchSettings(
            goal=args.goal, is_searched=args.goodput, precision=args.precision, max_runs=args.max_runs
        ),
    )


def _parse_rates(text: str, item: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"the workload is {item!r}; expected rates behind the @, as in sharegpt@8,16") from error


def _serve(args: argparse.Namespace) -> int:
    from semipd.bench.report import Reporter
    from semipd.bench.session import Session

    settings = make_settings(args)
    targets = list(_targets(args))
    if not targets:
        raise ConfigError("nothing to measure; give --model, --url, or both")
    labels = [target.label for target in targets]
    if args.model is not None and args.policies is None:
        labels += get_args(PolicyName)  # the engine will be called one of them
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"{', '.join(twice)} is there twice; give servers different labels")
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json is {args.json}, but {args.json.parent} is no folder")
    with Reporter(args.json, recorded(args)) as reporter:
        session = Session(settings, reporter)
        try:
            for target in targets:
                session.measure(target)
        finally:  # what was measured before an interrupt or an error counts
            reporter.show(session.results)
    if session.results.failures:
        return 2
    return 0 if all(run["statuses"]["ok"] for run in session.results.runs) else 1


_OWN_OPTIONS = {"policy": "--policies", "slo": "--engine-slo", "model": "--model"}


def _targets(args: argparse.Namespace) -> Iterator[Any]:
    """The targets that the arguments name, checked but not started."""
    if args.model is not None:
        from semipd.bench.engine_arguments import parse_value
        from semipd.bench.engine_target import EngineTarget
        from semipd.bench.metrics import parse_slo

        options = {}
        for item in args.engine:
            name, has_value, value = item.partition("=")
            if not has_value:
                raise ConfigError(f"--engine {item!r}; expected NAME=VALUE")
            if name in _OWN_OPTIONS:
                raise ConfigError(f"--engine {item!r}; use {_OWN_OPTIONS[name]} for the engine's {name}")
            options[name] = parse_value(value)
        policies = args.policies or [None]
        if "trace" in options and len(policies) > 1:
            raise ConfigError("--engine trace=FILE with several policies, each of which would write it anew; give one")
        slo = None if args.engine_slo == "none" else parse_slo(args.engine_slo or args.slo[0])
        for policy in policies:
            yield EngineTarget(args.model, policy=policy, options=options, slo=slo)
    if args.client_processes < 1:
        raise ConfigError(f"--client-processes is {args.client_processes}; expected at least 1")
    if args.label and len(args.label) != len(args.url):
        raise ConfigError(f"{len(args.label)} labels for {len(args.url)} servers; give one each, or none")
    for index, url in enumerate(args.url):
        from semipd.bench.http_target import HttpTarget

        yield HttpTarget(
            url,
            label=args.label[index] if args.label else None,
            model=args.served_model,
            prompt=args.prompt,
            vocab_size=args.vocab_size,
            num_processes=args.client_processes,
            api_key=_api_key(args.api_key_env),
            body=_extra_body(args.extra_body),
        )


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in os.environ:
        raise ConfigError(f"--api-key-env is {name!r}, which is not set")
    return os.environ[name]


def _extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is {text!r}: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"--extra-body is {text!r}; expected a JSON object")
    return body


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The settings beside the results; targets say their own."""
    names = (
        "workloads",
        "rates",
        "staircase",
        "cv",
        "duration",
        "warmup",
        "drain",
        "seed",
        "slo",
        "slo_scales",
        "goal",
        "goodput",
    )
    return {name: getattr(args, name) for name in names} | {
        "workloads": [Path(text).name if text.startswith("trace:") else text for text in args.workloads]
    }


def _plot(args: argparse.Namespace) -> int:
    from semipd.bench.plot import draw

    for path in draw(args.results, args.out, args.format, rate=args.rate, has_timelines=args.timelines):
        sys.stdout.write(f"{path}\n")
    return 0

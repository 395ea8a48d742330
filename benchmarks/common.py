"""What every benchmark prints and writes: the machine, the versions, the commit and the command beside the numbers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from semipd.bench.environment import environment as origin

_PACKAGES = ("semipd", "torch", "triton", "transformers", "tokenizers")


def make_parser(doc: str | None, *, has_model: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if has_model:
        parser.add_argument("model", type=Path, help="folder or .gguf file")
    parser.add_argument("--json", type=Path, help="write the results, with the machine and the commit, to this file")
    return parser


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return origin(f"benchmarks.{Path(sys.argv[0]).stem}", _PACKAGES)


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Print `rows` as a table and, if asked, write them as JSON beside `environment`."""
    info = environment()
    machine = info["gpu"] or f"{info['cpu']}, {info['num_cores']} cores"
    table = Table(title=title, caption=f"{machine}; torch {info['versions']['torch']}; commit {info['commit']}")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if path is not None:
        path.write_text(json.dumps({"title": title, **info, "rows": list(rows)}, indent=1) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

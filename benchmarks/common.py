"""What every benchmark prints and writes: the machine, the versions, the commit and the command beside the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def make_parser(doc: str | None, *, has_model: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if has_model:
        parser.add_argument("model", type=Path, help="folder or .gguf file")
    parser.add_argument("--json", type=Path, help="write the results, with the machine and the commit, to this file")
    return parser


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "command": _command(),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "gpu": _gpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("semipd", "torch", "triton", "transformers", "tokenizers")},
    }


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


def _command() -> str:
    """The command line, with files by their names: where they lie on this machine tells nobody anything."""
    arguments = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])


def _commit() -> str:
    if "GIT_COMMIT" in os.environ:  # where the tree is not a checkout
        return os.environ["GIT_COMMIT"]
    root = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpu_name() -> str | None:
    """The GPU and its driver, if torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[0]
    except (OSError, IndexError):
        driver = "unknown"
    return f"{torch.cuda.get_device_name()} (driver, power limit: {driver}), CUDA {torch.version.cuda}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

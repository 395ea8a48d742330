"""Where numbers come from: the machine, the versions, the commit and the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(program: str, packages: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to know of a result's origin; the GPU only if torch is loaded and sees one.

    Args:
        program: the module that runs, as after `python -m`.
        packages: distributions whose versions matter.
    """
    return {
        "command": _command(program, sys.argv[1:]),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "gpu": _gpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _command(program: str, arguments: list[str]) -> str:
    """The command line, with files by their names: where they lie on this machine tells nobody anything."""
    return shlex.join(["python", "-m", program, *map(_without_folder, arguments)])


def _without_folder(argument: str) -> str:
    for separator in ("=", ":"):  # --model=/a/b, trace:/a/b
        head, found, tail = argument.partition(separator)
        if found and tail.startswith(("/", "./", "../", "~")) and not tail.startswith("//"):
            return f"{head}{separator}{Path(tail).name}"
    return Path(argument).name if Path(argument).is_absolute() or Path(argument).exists() else argument


def _commit() -> str:
    if "GIT_COMMIT" in os.environ:  # where the tree is not a checkout
        return os.environ["GIT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpu_name() -> str | None:
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

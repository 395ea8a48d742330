"""What tests of several ranks share: their processes, and code that is planted in the workers alone."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.fakes import wait_until

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]
_WORKER = "semipd.parallel.worker"


def worker_processes(parent: int | None = None) -> list[psutil.Process]:
    """The workers among the children of a process, this one by default."""
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if child.is_running() and _WORKER in _command_line(child)]


def wait_for_no_workers() -> None:
    """Fail if workers of this process do not end within seconds."""
    wait_until(lambda: not worker_processes())


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Have workers that start from now on run `code` first, with `import_then(module, function)` at its hand.

    `function(module)` is called when `module` has been imported.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_PLANTED.format(code=textwrap.indent(textwrap.dedent(code), "    ")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


_PLANTED = """
import importlib.abc, importlib.util, sys

def import_then(name, function):
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                function(module)
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())

if "semipd.parallel.worker" in sys.orig_argv:
{code}
"""

"""Tuned plans, kept for the next engine on the same kind of device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from semipd.cache_file import read_json, replace_json
from semipd.parallel.plans import Problem
from semipd.parallel.tuner import Tuned

_VERSION = 1  # of the file
_WHAT = "plans"


class PlanStore:
    """Tuned plans by their problems, in a file; see `semipd/cache_file.py` for what may be wrong with it.

    Args:
        path: of the file, which need not exist; None keeps them in memory.
        reads: whether to begin with what the file has.
    """

    def __init__(self, path: Path | None = None, *, reads: bool = True) -> None:
        self._path = path
        self._tuned = _load(path) if path is not None and reads else {}

    def get(self, problem: Problem) -> Tuned | None:
        """What `put` got for it."""
        return self._tuned.get(problem)

    def put(self, problem: Problem, tuned: Tuned) -> None:
        """Remember it."""
        self._tuned[problem] = tuned

    def save(self) -> None:
        """Replace the file."""
        if self._path is None:
            return
        plans = _load(self._path) | self._tuned  # another engine may have saved meanwhile
        entries = [{"problem": asdict(problem), "tuned": tuned.to_json()} for problem, tuned in plans.items()]
        replace_json(self._path, {"version": _VERSION, "plans": entries}, what=_WHAT)


def _load(path: Path) -> dict[Problem, Tuned]:
    return read_json(path, _parse, what=_WHAT) or {}


def _parse(content: Any) -> dict[Problem, Tuned]:
    if content["version"] != _VERSION:
        raise ValueError(f"they are of version {content['version']}, not {_VERSION}")
    return {Problem.from_json(entry["problem"]): Tuned.from_json(entry["tuned"]) for entry in content["plans"]}

"""Tuned plans, kept for the next engine on the same kind of device.

One small JSON file in the user's cache folder. As with step times, nothing that is wrong with it, or with the folder,
keeps an engine from running: it is logged once, and the engine goes on without.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from semipd.parallel.plans import Problem
from semipd.parallel.tuner import Tuned

logger = logging.getLogger(__name__)

_VERSION = 1  # of the file


class PlanStore:
    """Tuned plans by their problems, in a file.

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
        """Replace the file; readers see the old one or the new one."""
        if self._path is None:
            return
        plans = _load(self._path) | self._tuned  # another engine may have saved meanwhile
        entries = [{"problem": asdict(problem), "tuned": tuned.to_json()} for problem, tuned in plans.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with open(file, "w") as stream:
                    json.dump({"version": _VERSION, "plans": entries}, stream, indent=1)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            logger.warning("plans cannot be stored in %s: %s", self._path, error)


def _load(path: Path) -> dict[Problem, Tuned]:
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"they are of version {content['version']}, not {_VERSION}")
        return {Problem.from_json(entry["problem"]): Tuned.from_json(entry["tuned"]) for entry in content["plans"]}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("stored plans in %s are ignored: %s", path, error)
    return {}

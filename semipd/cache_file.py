"""Small JSON files in the user's cache folder: what an engine found out, as a head start for the next one.

Nothing that is wrong with a file, or with the folder, keeps an engine from running: it is logged, and the engine goes
on without.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """`semipd` in `XDG_CACHE_HOME`, or in `~/.cache`; None, with a warning, where a user has no home either."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semipd"
    except RuntimeError as error:
        logger.warning("what this engine learns is not kept: %s Set HOME or XDG_CACHE_HOME", error)
        return None


def read_json(path: Path, parse: Callable[[Any], T], *, what: str) -> T | None:
    """What `parse` makes of a file of `what`; None if there is none, or, with a warning, if it is not as expected."""
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("stored %s in %s are ignored: %s", what, path, error)
        return None


def replace_json(path: Path, content: object, *, what: str) -> None:
    """Write a file of `what`; readers see the old one or the new one. What cannot be written is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(file, "w") as stream:
                json.dump(content, stream, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.warning("%s cannot be stored in %s: %s", what, path, error)

"""What an engine learned of step times, kept for the next one of the same model on the same kind of device.

One small JSON file in the user's cache folder. It is only ever a head start, so nothing that is wrong with it, or with
the folder, keeps an engine from running: it is logged once, and the engine goes on without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semipd.sched.latency import STATE_VERSION, LatencyModel

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where step times are kept: `semipd/latency` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semipd" / "latency"


class LatencyStore:
    """The file for one model on one kind of device.

    Args:
        key: what step times depend on, as values of JSON; an engine that differs in any of them has another file.
        folder: where files are.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path) -> None:
        self._key = json.loads(json.dumps({**key, "version": STATE_VERSION}))
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:24]}.json"

    def load(self, num_sms: int) -> LatencyModel | None:
        """The model that an earlier engine left for a device of `num_sms`; None if there is none that can be used."""
        try:
            content = json.loads(self.path.read_text())
            if not isinstance(content, dict) or content.get("key") != self._key:
                raise ValueError("it is of another model or device")
            model = LatencyModel.from_state(content.get("state"))
            if model.num_sms != num_sms:
                raise ValueError(f"it is of a device of {model.num_sms} SMs, not {num_sms}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("stored step times in %s are ignored: %s", self.path, error)
            return None
        return model

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what is stored; readers see the old file or the new one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with open(file, "w") as stream:
                    json.dump({"key": self._key, "state": state}, stream, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            logger.warning("step times cannot be stored in %s: %s", self.path, error)

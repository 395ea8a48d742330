"""What an engine learned of step times, kept for the next one of the same model on the same kind of device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semipd.cache_file import read_json, replace_json
from semipd.sched.latency import STATE_VERSION, LatencyModel

_WHAT = "step times"


class LatencyStore:
    """The file for one model on one kind of device; see `semipd/cache_file.py` for what may be wrong with it.

    Args:
        key: what step times depend on, as values of JSON; an engine that differs in any of them has another file.
        folder: where files are; None keeps nothing.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None) -> None:
        self._key = json.loads(json.dumps({**key, "version": STATE_VERSION}))
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._path = None if folder is None else folder / f"{digest[:24]}.json"

    def load(self, num_sms: int) -> LatencyModel | None:
        """The model that an earlier engine left for a device of `num_sms`; None if there is none that can be used."""

        def parse(content: Any) -> LatencyModel:
            if not isinstance(content, dict) or content.get("key") != self._key:
                raise ValueError("it is of another model or device")
            model = LatencyModel.from_state(content.get("state"))
            if model.num_sms != num_sms:
                raise ValueError(f"it is of a device of {model.num_sms} SMs, not {num_sms}")
            return model

        return None if self._path is None else read_json(self._path, parse, what=_WHAT)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what is stored."""
        if self._path is not None:
            replace_json(self._path, {"key": self._key, "state": state}, what=_WHAT)

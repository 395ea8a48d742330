"""What an engine did, as a file of JSON lines: its start, every decision, step and request, and its end.

A line is written when what it tells of is complete: a decision once its first step is measured, a request at its end.
Lanes and scheduler only put values into a queue, at 0.1 us each, that nothing changes any more; a thread of the
writer's own makes text of them and waits for the disk.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from semipd.config import EngineConfig
from semipd.engine_thread import EngineThread
from semipd.errors import ConfigError
from semipd.request import Request
from semipd.sched.decisions import Decision, StepRecord
from semipd.sched.events import StepEvents

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0  # without news, after which what is written can be read
_PACKAGES = ("semipd", "torch", "triton")

Record = Decision | StepRecord | StepEvents | Mapping[str, Any]


class TraceWriter:
    """Writes records to a file, from a thread of its own until `close`.

    A disk that fails ends the trace, not the engine: the error is logged at once and kept in `error`.

    Args:
        path: of the file, which is written anew.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._file = Path(path).open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"trace is {os.fspath(path)!r}, which cannot be written: {error}; give a file in a folder that exists"
            ) from error
        self.error: OSError | None = None
        self._path = path
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._thread = EngineThread(self._run, "trace")
        self._thread.start()

    def put(self, record: Record) -> None:
        """Have a record written; returns at once, from any thread. Nothing may change it any more."""
        if self.error is None:
            self._queue.put(record)

    def close(self) -> None:
        """Write what was put and close the file. Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._file:
                while (record := self._next()) is not None:
                    for line in as_json(record):
                        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            self.error = error
            logger.error("the trace %s is not complete: %s", self._path, error)

    def _next(self) -> Record | None:
        try:
            return self._queue.get(timeout=_FLUSH_SECONDS)
        except queue.Empty:
            self._file.flush()
            return self._queue.get()


def start_record(config: EngineConfig, *, num_sms: int, time: float) -> dict[str, Any]:
    """The first line: what engine this is. The model goes by its name alone, without its folder.

    Args:
        config: the engine's.
        num_sms: of its device.
        time: now, by the engine's clock, in seconds; the line has the date too.
    """
    return {
        "event": "start",
        "time": time,
        "date": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "model": Path(config.model).name,
        "device": config.device,
        "num_sms": num_sms,
        "policy": repr(config.policy),
        "slo": None if config.slo is None else asdict(config.slo),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def end_record(error: BaseException | None, *, time: float) -> dict[str, Any]:
    """The last line: that the trace is whole, and what broke the engine, if anything did."""
    return {"event": "end", "time": time, "error": None if error is None else f"{type(error).__name__}: {error}"}


def as_json(record: Record) -> Iterator[Mapping[str, Any]]:
    """The lines of a record."""
    match record:
        case Decision():
            yield _decision(record)
        case StepRecord():
            yield _step(record)
        case StepEvents():
            for request in record.finished:
                yield _request(request, record.time)
        case _:
            yield record


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "event": "decision",
        "number": decision.number,
        "time": _round(decision.time),
        "before": None if decision.before is None else asdict(decision.before),
        "after": asdict(decision.after),
        "reason": decision.reason,
        "is_forced": decision.is_forced,
        "asked": decision.asked,
        "num_waiting": decision.num_waiting,
        "num_prompt_tokens": decision.num_prompt_tokens,
        "num_decodes": decision.num_decodes,
        "context_tokens": decision.context_tokens,
        "work": None if decision.work is None else asdict(decision.work),
        "predicted": _round(decision.predicted),
        "measured": _round(decision.measured),
    }


def _step(step: StepRecord) -> dict[str, Any]:
    return {
        "event": "step",
        "step_id": step.step_id,
        "phase": step.phase,
        "time": _round(step.time),
        "seconds": _round(step.seconds),
        "predicted": _round(step.predicted),
        "num_sms": step.work.num_sms,
        "other_sms": step.work.other_sms,
        "num_prompt_tokens": step.work.num_prompt_tokens,
        "prompt_pairs": step.work.prompt_pairs,
        "num_decodes": step.work.num_decodes,
        "context_tokens": step.work.context_tokens,
        "num_waiting": step.num_waiting,
        "num_prefilling": step.num_prefilling,
        "num_decoding": step.num_decoding,
    }


def _request(request: Request, now: float) -> dict[str, Any]:
    timings = request.timings(now)
    return {
        "event": "request",
        "time": _round(now),
        "request_id": request.request_id,
        "sample_index": request.sample_index,
        "arrival": _round(timings.arrival),
        "num_prompt_tokens": len(request.prompt_token_ids),
        "num_cached_tokens": request.num_cached_tokens,
        "num_output_tokens": len(request.output_token_ids),
        "num_preemptions": request.num_preemptions,
        "queued": _round(timings.queued),
        "ttft": _round(timings.ttft),
        "tpot": _round(timings.tpot),
        "worst_gap": _round(timings.worst_gap),
        "e2e": _round(timings.e2e),
        "finish_reason": request.finish_reason,
        "stop_reason": request.stop_reason,
        "slo": None if request.slo is None else asdict(request.slo),
        "slo_attained": request.is_slo_attained(now),
    }


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""How long a step runs on its stream."""

from __future__ import annotations

import time

import torch


class StepTimer:
    """Times what is launched on the current stream from its making to `stop`; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = _timing_event(), _timing_event()
            self._events[0].record()
        self._started = self._stopped = time.monotonic()

    def stop(self) -> None:
        """The step is launched."""
        self._stopped = time.monotonic()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Once the step has ended."""
        if self._events is None:
            return self._stopped - self._started
        milliseconds: float = self._events[0].elapsed_time(self._events[1])
        return milliseconds * 1e-3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

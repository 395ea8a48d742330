"""How fast prompts are computed at present: what says whether one that waits can still be in time.

The model of step times knows what a prompt takes alone. Under load it shares steps with decodes and stands behind other
prompts, and only full steps, which leave prompt tokens for later, show how much that costs: others were as long for
fewer tokens. Where prompts wait for memory they wait for one another whatever their length: that is its turnover.
"""

from __future__ import annotations

from semipd.sched.in_flight import LaunchedStep
from semipd.sched.latency import LatencyModel, StepWork

_SHARED = 1.5  # what a prompt takes beside decodes, over what it takes alone, before any full step
_KEEP = 0.9  # of sums of seconds and tokens, a full step later
_STEP_KEEP = 0.9  # of the mean time of a step
_TURNOVER_KEEP = 0.95  # of sums of seconds and prompts, a prompt later
_STEPS_TO_TOKEN = 2.0  # those in flight when a prompt is admitted, and the host's part of its last one


class Pace:
    """Learns from committed steps.

    Args:
        latency: what the device takes without load.
        num_sms: of the device.
        num_tokens: of a large step of prompts.
    """

    def __init__(self, latency: LatencyModel, num_sms: int, num_tokens: int) -> None:
        self._latency = latency
        self._alone = StepWork.of(num_sms, chunks=[(0, num_tokens)])
        self._seconds = self._tokens = 0.0
        self._step_seconds = 0.0

    @property
    def seconds_per_token(self) -> float:
        """What a prompt token takes."""
        alone = self._latency.predict(self._alone) / self._alone.num_prompt_tokens
        return max(self._seconds / self._tokens, alone) if self._tokens else _SHARED * alone

    def delay(self, num_tokens: int) -> float:
        """Seconds that pass beside those of a prompt itself, if it is admitted behind so many prompt tokens."""
        return num_tokens * self.seconds_per_token + _STEPS_TO_TOKEN * self._step_seconds

    def observe(self, step: LaunchedStep, seconds: float) -> None:
        """Take a committed step into account."""
        if seconds <= 0:  # the backend has no timers
            return
        self._step_seconds += (seconds - self._step_seconds) * (1 - _STEP_KEEP)
        if step.is_full and step.work.num_prompt_tokens:
            self._seconds = _KEEP * self._seconds + seconds
            self._tokens = _KEEP * self._tokens + step.work.num_prompt_tokens


class Turnover:
    """How often memory comes free while prompts wait for it, whatever their length."""

    def __init__(self) -> None:
        self._since: float | None = None  # when memory was short last
        self._seconds = self._requests = 0.0

    @property
    def seconds_per_request(self) -> float:
        """From one prompt that gets memory to the next; 0 while nobody waits for it."""
        return self._seconds / self._requests if self._since is not None and self._requests else 0.0

    def observe(self, now: float, num_admitted: int, *, is_short: bool) -> None:
        """Take an admission into account.

        Args:
            now: the engine's clock, in seconds.
            num_admitted: prompts that got memory.
            is_short: others did not.
        """
        if self._since is not None:
            keep = _TURNOVER_KEEP**num_admitted
            self._seconds = keep * self._seconds + now - self._since
            self._requests = keep * self._requests + num_admitted
        self._since = now if is_short else None

"""A device whose steps end in virtual time: one queue a lane, and two lanes that slow each other down.

A step has a *duration* for what the other lane runs beside it. When that changes, what is left of the step goes on at
the new rate: a step half done beside a busy lane needs half of its undisturbed duration once that lane rests.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from semipd.config import Phase
from semipd.sched.latency import LatencyModel, StepKind, StepWork


class StepTimes(Protocol):
    """How long steps take."""

    def seconds(self, work: StepWork) -> float:
        """Of a step beside which the other lane is busy on `work.other_sms` all the time."""
        ...


class DefaultStepTimes:
    """Step times of the latency model's defaults, an 8B model on one H100, for want of a measured table."""

    def __init__(self, num_sms: int) -> None:
        self._model = LatencyModel(num_sms)  # never taught

    def seconds(self, work: StepWork) -> float:
        return self._model.predict(work)


class VirtualClock:
    """Seconds of a simulation; callable, as the scheduler wants it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, to: float) -> None:
        """Move on; time never goes back."""
        assert to >= self.now, f"the clock stands at {self.now} and was moved back to {to}"
        self.now = to


@dataclass(slots=True, eq=False)
class DeviceStep:
    """A submitted step.

    Attributes:
        phase: its lane.
        work: as the scheduler saw it at launch.
        factor: of its duration, by noise.
        ready, start, end: in virtual seconds; infinite while unknown. It starts no sooner than it is ready. While it
            runs, `end` is when it ends if the other lane goes on as it does.
    """

    phase: Phase
    work: StepWork
    factor: float
    ready: float
    start: float = math.inf
    end: float = math.inf
    is_done: bool = False
    other_sms: int = -1  # of the other lane, which `_duration` is for
    left: float = 1.0  # share of the step at `since`
    since: float = 0.0
    duration: float = 0.0


class VirtualDevice:
    """Runs steps of both lanes, those of a lane in order; a MIXED step waits for both lanes.

    Args:
        times: how long steps take.
        noise: standard deviation of the logarithm of step times.
        slowdown: of all steps.
        seed: of the noise.
        on_step: called with each step that ended, in order of their ends.
    """

    def __init__(
        self,
        times: StepTimes,
        *,
        noise: float = 0.0,
        slowdown: float = 1.0,
        seed: int = 0,
        on_step: Callable[[DeviceStep], None] | None = None,
    ) -> None:
        self._times = times
        self._noise = noise
        self._slowdown = slowdown
        self._random = random.Random(seed)
        self._on_step = on_step
        self._queued: dict[Phase, deque[DeviceStep]] = {phase: deque() for phase in Phase}
        self._running: dict[Phase, DeviceStep | None] = dict.fromkeys(Phase)

    def submit(self, phase: Phase, work: StepWork, now: float, *, ready: float) -> DeviceStep:
        """Queue a step behind those of its lane, not to start before it is `ready`."""
        factor = self._slowdown * (math.exp(self._random.gauss(0.0, self._noise)) if self._noise else 1.0)
        step = DeviceStep(phase, work, factor, ready)
        self._queued[phase].append(step)
        if self._running[phase] is None:
            self._settle(now)
        return step

    @property
    def next_event(self) -> float:
        """When the next running step ends, or one that nothing else holds is ready; infinite if neither will be."""
        return min(self._next_event(phase) for phase in Phase)

    def advance(self, now: float) -> list[DeviceStep]:
        """End the steps that are due, and start those behind them or ready now."""
        ended = [step for step in self._running.values() if step is not None and step.end <= now]
        for step in ended:
            step.is_done = True
            self._running[step.phase] = None
            if self._on_step is not None:
                self._on_step(step)
        self._settle(now)
        return ended

    def _settle(self, now: float) -> None:
        """Start what can start, and give every running step the rate that it has from now on."""
        running = self._running
        for phase in Phase:
            queued = self._queued[phase]
            if running[phase] is None and queued and queued[0].ready <= now and not self._is_held(phase):
                started = running[phase] = queued.popleft()
                started.start = started.since = now
        for phase in Phase:
            step, other = running[phase], running[phase.other]
            if step is None:
                continue
            other_sms = 0 if other is None else other.work.num_sms
            if step.other_sms != other_sms:
                if step.other_sms >= 0:
                    step.left -= (now - step.since) / step.duration
                work = step.work if step.work.other_sms == other_sms else replace(step.work, other_sms=other_sms)
                step.duration = self._times.seconds(work) * step.factor
                step.other_sms, step.since = other_sms, now
                step.end = now + max(step.left, 0.0) * step.duration

    def _next_event(self, phase: Phase) -> float:
        running, queued = self._running[phase], self._queued[phase]
        if running is not None:
            return running.end
        return queued[0].ready if queued and not self._is_held(phase) else math.inf

    def _is_held(self, phase: Phase) -> bool:
        """A MIXED step starts behind all that the other lane was given; that one is given nothing beside it."""
        if phase is Phase.PREFILL or self._queued[phase][0].work.kind is StepKind.DECODE:
            return False
        return self._running[phase.other] is not None or bool(self._queued[phase.other])

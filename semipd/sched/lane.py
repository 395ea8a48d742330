"""One lane: a thread that schedules, executes and commits the steps of one phase until the engine stops.

Prefill and decode are two instances of this one class; they differ in the queue that the scheduler gives them and in
the stream that the executor picks. A lane stays `steps_ahead` steps ahead of the host: step S+1 is launched before S
is read, so that the device never waits for scheduling, detokenising or delivery.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from semipd.config import Phase
from semipd.device.partition import Completion
from semipd.engine_thread import EngineThread
from semipd.sched.batch import Batch, StepResult
from semipd.sched.scheduler import Scheduler


class Executor(Protocol):
    """Runs batches on a device."""

    def execute(self, batch: Batch) -> Completion[StepResult]:
        """Launch one step and return its completion at once; steps of a phase run in the order of the calls."""
        ...

    def settle(self) -> None:
        """Return once later steps get no faster; while lanes run or before."""
        ...

    def close(self) -> None:
        """Let go of what must be gone before the device's streams are; no step runs any more."""
        ...


class Lane:
    """The persistent loop of one phase.

    Args:
        phase: which queue to serve.
        scheduler: shared with the other lane.
        executor: runs the batches.
        steps_ahead: launched steps that may be unread while the next one is launched.
        on_failure: called once, from the lane's thread, with the exception that ended it.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        scheduler: Scheduler,
        executor: Executor,
        steps_ahead: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._phase = phase
        self._scheduler = scheduler
        self._executor = executor
        self._steps_ahead = steps_ahead
        self._on_failure = on_failure
        self._in_flight: deque[tuple[Batch, Completion[StepResult]]] = deque()
        self._thread = EngineThread(self._run, phase)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread to end; a no-op from the lane itself."""
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._scheduler.is_stopped:
                self.step()
            while self._in_flight:  # nobody reads these any more, but their work must end before its memory goes
                self._in_flight.popleft()[1].wait()
        except BaseException as error:  # whatever it is, the engine must end and say so
            self._on_failure(error)

    def step(self) -> None:
        """Schedule, execute, commit; sleeps when there is neither work to launch nor a step to wait for."""
        batch = self._scheduler.next_batch(self._phase)
        if batch is not None:
            self._in_flight.append((batch, self._executor.execute(batch)))
        if self._in_flight and (batch is None or len(self._in_flight) > self._steps_ahead):
            oldest, completion = self._in_flight.popleft()
            self._scheduler.commit(oldest, completion.wait())
        elif batch is None:
            self._scheduler.wait(self._phase)

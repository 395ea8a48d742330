"""What a benchmark needs of whatever serves: a name, a life, and the records of one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from semipd.bench.metrics import RequestRecord
from semipd.bench.schedule import PlannedRequest

clock = time.monotonic  # one clock for all threads and processes of a machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a schedule.

    Attributes:
        requests: in order of their times.
        drain: seconds after the last arrival in which requests may end.
        prompt_seed: of the prompts.
        number: of the run; each has prompts of its own.
        on_ended: called when requests ended, with how many; from any thread.
    """

    requests: Sequence[PlannedRequest]
    drain: float
    prompt_seed: int
    number: int
    on_ended: Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        records: one per request, in the run's order.
        engine: what the target itself says of the run: totals, samples over time, decisions.
    """

    records: Sequence[RequestRecord]
    engine: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """Something that serves; a context manager that starts it and gives it back.

    Attributes:
        label: what results call it; final once it is entered.
    """

    label: str

    @property
    def description(self) -> Mapping[str, Any]:
        """What results say of it; complete once it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, run: Run) -> Outcome:
        """Send every request when it is due, whatever became of those before, and wait for their ends."""

"""The steps that are launched and not committed: what they hold, and whom.

A request does not know its steps; whoever ends it asks here. So a decode step of 256 requests writes nothing per
request for the sake of the few that end in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from semipd.config import Phase
from semipd.request import Request, RequestStatus
from semipd.sched.latency import StepWork


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """One launched step: its share of the device and its requests, decodes in row order, then prefill entries.

    Attributes:
        work: what it has to do, beside which share of the other lane.
        is_full: whether it left prompt tokens for later steps.
    """

    num_sms: int
    decodes: list[Request]
    prefills: list[Request]
    work: StepWork
    is_full: bool = False


class InFlight:
    """Launched steps by lane. Steps of a lane end in the order of their ids."""

    def __init__(self) -> None:
        self._steps: dict[Phase, dict[int, LaunchedStep]] = {phase: {} for phase in Phase}
        self._next_step_id = 0

    def launch(self, phase: Phase, step: LaunchedStep) -> int:
        """Record `step` and give it its id."""
        step_id = self._next_step_id
        self._next_step_id += 1
        self._steps[phase][step_id] = step
        return step_id

    def done(self, phase: Phase, step_id: int) -> LaunchedStep:
        """Take out a step whose done event fired."""
        return self._steps[phase].pop(step_id)

    def num_sms(self, phase: Phase) -> int:
        """The largest share that a launched step of `phase` holds."""
        return max((step.num_sms for step in self._steps[phase].values()), default=0)

    def works(self, phase: Phase) -> list[StepWork]:
        """What the launched steps of `phase` have to do, the oldest first."""
        return [step.work for step in self._steps[phase].values()]

    def __len__(self) -> int:
        return sum(map(len, self._steps.values()))

    def ending(self, phase: Phase) -> list[Request]:
        """Requests whose prompt ends in a launched step of `phase`, and that did not decode since."""
        prompts = dict.fromkeys(request for step in self._steps[phase].values() for request in step.prefills)
        return [
            request
            for request in prompts
            if request.status is RequestStatus.PREFILLING and request.num_scheduled_tokens == request.num_tokens
        ]

    def is_mixed(self) -> bool:
        """Whether a launched decode step holds prompt chunks."""
        return any(step.prefills for step in self._steps[Phase.DECODE].values())

    def steps_of(self, request: Request) -> list[int]:
        """Ids of the launched steps that hold `request`, ascending: it is in one lane at a time."""
        return sorted(
            step_id
            for steps in self._steps.values()
            for step_id, step in steps.items()
            if request in step.decodes or request in step.prefills
        )

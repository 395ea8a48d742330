"""Which plan followed which, why, and what came of it: the record of a policy's decisions.

A record grows in three moments: the change of plan at a step border, the launch of the first step under the new plan,
whose time is predicted then, and the commit of that step, which measures it. A step costs two look-ups here; all else
happens at a change of plan. The scheduler calls every method under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from semipd.config import Phase, Plan
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policy import Load, Policy

_NUM_RECENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One plan followed another.

    Attributes:
        number: of the decision, from 0; each follows the one before.
        time: of the step border, by the engine's clock, in seconds.
        before: the plan until then; None for an engine's first.
        after: the plan from then on.
        reason: what the policy says, or else which kind of work ran out or arrived.
        is_forced: a kind of work ran out or arrived since the step border before; otherwise the policy chose to change.
        asked: (prefill, decode) shares that a policy wanted before they were rounded to those that the device offers,
            in its units; None from policies that do not round.
        num_waiting: requests that held no memory.
        num_prompt_tokens: tokens of resident prompts that could be scheduled.
        num_decodes: requests that were decoding.
        context_tokens: tokens of their contexts.
        work: of the first step launched under the plan; None until then, and if there was none.
        predicted: seconds that this step was expected to take.
        measured: seconds that it took; None until it is committed, and where the device has no timer.
    """

    number: int
    time: float
    before: Plan | None
    after: Plan
    reason: str
    is_forced: bool
    asked: tuple[float, float] | None
    num_waiting: int
    num_prompt_tokens: int
    num_decodes: int
    context_tokens: int
    work: StepWork | None = None
    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that was committed.

    Attributes:
        step_id: unique and increasing over both lanes.
        phase: the lane that ran it.
        time: when it was done, by the engine's clock, in seconds.
        seconds: how long it ran; 0 where the device has no timer.
        predicted: how long it was expected to run.
        work: what it had to do, and where.
        num_waiting: requests that held no memory at the last step border.
        num_prefilling: requests with memory whose prompt was not computed then.
        num_decoding: requests that were decoding then.
    """

    step_id: int
    phase: Phase
    time: float
    seconds: float
    predicted: float
    work: StepWork
    num_waiting: int
    num_prefilling: int
    num_decoding: int


class DecisionLog:
    """The plan in force, the recent decisions, and their way into a trace.

    Args:
        latency: predicts the first step under a plan.
        trace: takes each decision once it is complete, and each step; must not block. None for no trace.
    """

    def __init__(self, latency: LatencyModel, trace: Callable[[Decision | StepRecord], None] | None = None) -> None:
        self.plan: Plan | None = None
        self._latency = latency
        self._trace = trace
        self._recent: deque[Decision] = deque(maxlen=_NUM_RECENT)
        self._kinds = (False, False)
        self._queue = (0, 0, 0)  # waiting, prefilling, decoding
        self._unlaunched: Decision | None = None
        self._launched: dict[int, Decision] = {}  # by their first step

    def on_choice(self, plan: Plan, load: Load, policy: Policy) -> Decision | None:
        """`policy` chose `plan` for `load`; the decision if it is another plan than before."""
        kinds = load.has_prefill, load.has_decode
        kinds_before, self._kinds = self._kinds, kinds
        if self._trace is not None:
            self._queue = load.num_waiting, len(load.chunks) + load.num_ending, load.num_decodes
        if plan == self.plan:
            return None
        if self._unlaunched is not None:
            self._complete(self._unlaunched)  # nothing ever ran under it
        decision = Decision(
            number=self._recent[-1].number + 1 if self._recent else 0,
            time=load.now,
            before=self.plan,
            after=plan,
            reason=policy.reason or _change(kinds_before, kinds),
            is_forced=kinds != kinds_before,
            asked=policy.asked,
            num_waiting=load.num_waiting,
            num_prompt_tokens=sum(length for _, length in load.chunks),
            num_decodes=load.num_decodes,
            context_tokens=load.context_tokens,
        )
        self.plan = plan
        self._unlaunched = decision
        self._recent.append(decision)
        return decision

    def on_launch(self, step_id: int, work: StepWork) -> None:
        """A step was launched under the plan in force."""
        if self._unlaunched is not None:
            decision = replace(self._unlaunched, work=work, predicted=self._latency.predict(work))
            self._unlaunched = None
            self._launched[step_id] = decision
            self._update(decision)

    def on_commit(self, phase: Phase, step_id: int, work: StepWork, *, time: float, seconds: float) -> None:
        """A step is done; called before the model of step times learns from it."""
        if step_id in self._launched:
            decision = replace(self._launched.pop(step_id), measured=seconds or None)
            self._update(decision)
            self._complete(decision)
        if self._trace is not None:
            num_waiting, num_prefilling, num_decoding = self._queue
            record = StepRecord(
                step_id=step_id,
                phase=phase,
                time=time,
                seconds=seconds,
                predicted=self._latency.predict(work),
                work=work,
                num_waiting=num_waiting,
                num_prefilling=num_prefilling,
                num_decoding=num_decoding,
            )
            self._trace(record)

    def recent(self) -> tuple[Decision, ...]:
        """The last 256 decisions, oldest first; the last ones may have no measured step yet."""
        return tuple(self._recent)

    def end(self) -> None:
        """No step will be committed any more: trace the decisions that wait for one as they are."""
        waiting = [*self._launched.values(), self._unlaunched]
        self._launched.clear()
        self._unlaunched = None
        for decision in waiting:
            if decision is not None:
                self._complete(decision)

    def _update(self, decision: Decision) -> None:
        index = decision.number - self._recent[0].number
        if index >= 0:
            self._recent[index] = decision

    def _complete(self, decision: Decision) -> None:
        if self._trace is not None:
            self._trace(decision)


def _change(before: tuple[bool, bool], now: tuple[bool, bool]) -> str:
    """What came and what went, of (prompts, decodes)."""
    news = [
        f"{name} {'arrived' if present else 'ran out'}"
        for name, was_present, present in zip(("prompts", "decodes"), before, now, strict=True)
        if was_present is not present
    ]
    return ", ".join(news) or "the same kinds of work"

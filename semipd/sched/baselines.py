"""Policies that any engine could have: prefill first, a fixed split, chunked prefill, prefill in turn with decode.

They are what the adaptive ones are measured against, in the same engine.
"""

from __future__ import annotations

from semipd.config import Phase, Plan
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policy import Load, Unobserving
from semipd.sched.sizing import MARGIN, on_grid

_WORTH_A_CHANGE = 1.25
_GRID_BITS = 4  # significant ones of a step's size: rounding takes a ninth at most


class Exclusive(Unobserving):
    """Prefill first on the whole device, then decode: what engines without lanes do."""

    def __init__(self, num_sms: int) -> None:
        self._plans = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}

    def choose(self, load: Load) -> Plan:
        return self._plans[Phase.PREFILL if load.has_prefill else Phase.DECODE]


class Static(Unobserving):
    """A fixed split while both kinds of work wait; the whole device for one kind."""

    def __init__(self, num_sms: int, split: tuple[int, int]) -> None:
        self._alone = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}
        self._split = Plan.split(*split)

    def choose(self, load: Load) -> Plan:
        if load.has_prefill and load.has_decode:
            return self._split
        return self._alone[Phase.PREFILL if load.has_prefill else Phase.DECODE]


class Mixed(Unobserving):
    """Chunked prefill: one lane, each step holds every decode and prompt chunks up to the token budget.

    Prompts always have a share of it: see `Plan.prompt_budget`.
    """

    def __init__(self, num_sms: int, token_budget: int) -> None:
        self._plan = Plan.mixed(token_budget, num_sms)

    def choose(self, load: Load) -> Plan:
        return self._plan


class Cadence(Unobserving):
    """A prefill step on the whole device after every so many decode steps on it."""

    def __init__(self, num_sms: int, decode_steps: int) -> None:
        self._plans = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}
        self._decode_steps = decode_steps

    def choose(self, load: Load) -> Plan:
        is_due = not load.has_decode or load.num_decode_steps >= self._decode_steps
        is_choice = load.has_prefill and load.has_decode
        self.reason = ("prompts are due" if is_due else "decodes have their turn") if is_choice else ""
        return self._plans[Phase.PREFILL if load.has_prefill and is_due else Phase.DECODE]


class ModelledMixed(Unobserving):
    """`Mixed` with the largest budget whose step is predicted to stay within a time.

    The budget keeps to a grid and moves only when it no longer fits or much more would: each change of plan wakes both
    lanes, and each size of step is a CUDA graph. Chunks start small and grow by at most half from one measured step to
    the next: further the model cannot be trusted.

    Args:
        num_sms: of the device.
        max_tokens: of a step.
        limit: seconds that a step with decodes may take.
        latency: predicts; the scheduler has it learn.
    """

    def __init__(self, num_sms: int, max_tokens: int, limit: float, latency: LatencyModel) -> None:
        self._num_sms = num_sms
        self._max_tokens = max_tokens
        self._limit = limit * MARGIN
        self._latency = latency
        self._plan = Plan.mixed(max_tokens, num_sms)

    def choose(self, load: Load) -> Plan:
        if not load.has_decode:
            return self._take(self._max_tokens, "no decodes to keep waiting")
        if not load.has_prefill:
            return self._plan
        work = StepWork.of(self._num_sms, num_decodes=load.num_decodes, context_tokens=load.context_tokens)
        num_tokens = self._latency.max_prompt_tokens(work, self._limit, load.chunks)
        num_tokens = min(num_tokens, self._latency.trusted_prompt_tokens)
        allowed = min(num_tokens + load.num_decodes, self._max_tokens)
        current = self._plan.token_budget
        assert current is not None
        num_waiting = sum(length for _, length in load.chunks)
        if num_waiting <= num_tokens and num_waiting + load.num_decodes <= current:
            return self._plan  # all of it fits
        if current <= allowed <= current * _WORTH_A_CHANGE:
            return self._plan
        reason = "the step would be too long" if allowed < current else "the step has room"
        return self._take(on_grid(allowed, _GRID_BITS), reason)

    def _take(self, token_budget: int, reason: str) -> Plan:
        self.reason = reason
        if token_budget != self._plan.token_budget:
            self._plan = Plan.mixed(token_budget, self._num_sms)
        return self._plan

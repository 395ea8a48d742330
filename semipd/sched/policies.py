"""Which plan the lanes follow next: one protocol, one class per policy.

A policy is a pure function of what waits. It knows neither torch nor threads, so the same object runs in a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from semipd.config import SLO, CadencePolicy, ExclusivePolicy, MixedPolicy, Phase, Plan, PolicyConfig, StaticPolicy
from semipd.errors import ConfigError
from semipd.sched.latency import LatencyModel, StepWork

_GAP_WITHOUT_SLO = 0.1  # seconds
_MARGIN = 0.9  # of a limit: a prediction is off by a few percent, and delivery comes on top
_WORTH_A_CHANGE = 1.25


@dataclass(frozen=True, slots=True)
class Load:
    """What a policy sees at a step border.

    Attributes:
        chunks: what could be scheduled of resident prompts now, the most urgent first: each as (position of its first
            token, tokens).
        num_decodes: requests that are decoding.
        context_tokens: tokens of their contexts.
        num_decode_steps: decode steps launched since the last one with prompt tokens.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    num_decodes: int = 0
    context_tokens: int = 0
    num_decode_steps: int = 0

    @property
    def has_prefill(self) -> bool:
        """A prompt chunk could be scheduled now."""
        return bool(self.chunks)

    @property
    def has_decode(self) -> bool:
        """At least one request is decoding."""
        return self.num_decodes > 0


class Policy(Protocol):
    """Chooses the plan at each step border."""

    def choose(self, load: Load) -> Plan:
        """The plan to take up from the next step on."""
        ...


class Exclusive:
    """Prefill first on the whole device, then decode: what engines without lanes do."""

    def __init__(self, num_sms: int) -> None:
        self._plans = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}

    def choose(self, load: Load) -> Plan:
        return self._plans[Phase.PREFILL if load.has_prefill else Phase.DECODE]


class Static:
    """A fixed split while both kinds of work wait; the whole device for one kind."""

    def __init__(self, num_sms: int, split: tuple[int, int]) -> None:
        self._alone = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}
        self._split = Plan.split(*split)

    def choose(self, load: Load) -> Plan:
        if load.has_prefill and load.has_decode:
            return self._split
        return self._alone[Phase.PREFILL if load.has_prefill else Phase.DECODE]


class Mixed:
    """Chunked prefill: one lane, each step holds every decode and prompt chunks up to the token budget.

    Prompts always have a share of it: see `Plan.prompt_budget`.
    """

    def __init__(self, num_sms: int, token_budget: int) -> None:
        self._plan = Plan.mixed(token_budget, num_sms)

    def choose(self, load: Load) -> Plan:
        return self._plan


class Cadence:
    """A prefill step on the whole device after every so many decode steps on it."""

    def __init__(self, num_sms: int, decode_steps: int) -> None:
        self._plans = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}
        self._decode_steps = decode_steps

    def choose(self, load: Load) -> Plan:
        is_due = not load.has_decode or load.num_decode_steps >= self._decode_steps
        return self._plans[Phase.PREFILL if load.has_prefill and is_due else Phase.DECODE]


class ModelledMixed:
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
        self._limit = limit * _MARGIN
        self._latency = latency
        self._plan = Plan.mixed(max_tokens, num_sms)

    def choose(self, load: Load) -> Plan:
        if not load.has_decode:
            return self._take(self._max_tokens)
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
        return self._take(max(_on_grid(allowed), 1))

    def _take(self, token_budget: int) -> Plan:
        if token_budget != self._plan.token_budget:
            self._plan = Plan.mixed(token_budget, self._num_sms)
        return self._plan


def _on_grid(num_tokens: int) -> int:
    """The next number below with four significant bits: at most a ninth less."""
    spare_bits = max(num_tokens.bit_length() - 4, 0)
    return num_tokens >> spare_bits << spare_bits


def make_policy(
    config: PolicyConfig,
    *,
    num_sms: int,
    splits: Sequence[tuple[int, int]],
    default_split: tuple[int, int] | None,
    max_prefill_tokens: int,
    slo: SLO | None,
    latency: LatencyModel,
) -> Policy:
    """The policy that `config` describes, on a device that offers `splits`.

    A device that cannot be split at all runs `StaticPolicy()` as prefill first.

    Args:
        config: the policy's own arguments.
        num_sms: of the device.
        splits: (prefill, decode) shares that it offers.
        default_split: that of `StaticPolicy()`.
        max_prefill_tokens: most prompt tokens of a step.
        slo: the engine's.
        latency: the model of step times that the scheduler teaches.

    Raises:
        ConfigError: the split asked for is not offered; the message lists those that are.
    """
    match config:
        case ExclusivePolicy():
            return Exclusive(num_sms)
        case CadencePolicy(decode_steps=decode_steps):
            return Cadence(num_sms, decode_steps)
        case MixedPolicy(token_budget=None):
            targets = () if slo is None else (slo.gap, slo.tpot)
            limit = min((target for target in targets if target is not None), default=_GAP_WITHOUT_SLO)
            return ModelledMixed(num_sms, max_prefill_tokens, limit, latency)
        case MixedPolicy(token_budget=int(token_budget)):
            return Mixed(num_sms, token_budget)
        case StaticPolicy(prefill_sms=None):
            return Exclusive(num_sms) if default_split is None else Static(num_sms, default_split)
        case StaticPolicy(prefill_sms=int(prefill_sms), decode_sms=int(decode_sms)):
            split = (prefill_sms, decode_sms)
            if split not in splits:
                offered = ", ".join(map(str, splits)) or "none: the device cannot be split"
                raise ConfigError(f"the split (prefill, decode) is {split}; this device of {num_sms} offers {offered}")
            return Static(num_sms, split)
    raise AssertionError(config)

"""Which plan the lanes follow next: one protocol, one class per policy.

A policy is a pure function of what waits. It knows neither torch nor threads, so the same object runs in a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from semipd.config import ExclusivePolicy, MixedPolicy, Phase, Plan, PolicyConfig, StaticPolicy
from semipd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """What a policy sees at a step border.

    Attributes:
        has_prefill: a prompt chunk could be scheduled now.
        has_decode: at least one request is decoding.
    """

    has_prefill: bool
    has_decode: bool


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


def make_policy(
    config: PolicyConfig, *, num_sms: int, splits: Sequence[tuple[int, int]], default_split: tuple[int, int] | None
) -> Policy:
    """The policy that `config` describes, on a device that offers `splits`.

    A device that cannot be split at all runs `StaticPolicy()` as prefill first.

    Raises:
        ConfigError: the split asked for is not offered; the message lists those that are.
    """
    match config:
        case ExclusivePolicy():
            return Exclusive(num_sms)
        case MixedPolicy(token_budget=token_budget):
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

"""What a policy sees, and what it is: the seam between the scheduler and those that choose plans.

A policy is a function of what waits and of what it was told of finished requests. It knows neither torch, threads nor
clocks, so the same object runs in a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from semipd.config import Plan
from semipd.request import Request, RequestTimings


@dataclass(frozen=True, slots=True)
class Load:
    """What a policy sees at a step border.

    Attributes:
        chunks: what could be scheduled of resident prompts now, the most urgent first: each as (position of its first
            token, tokens).
        num_decodes: requests that are decoding.
        context_tokens: tokens of their contexts.
        num_decode_steps: decode steps launched since the last one with prompt tokens.
        now: the engine's clock, in seconds.
        prompts: the requests of `chunks`.
        decoding: requests that are decoding.
        num_waiting: requests that hold no memory yet.
        num_ending: requests whose last prompt chunk is on its way: they decode soon.
        is_memory_scarce: slots or blocks are about to run out.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    num_decodes: int = 0
    context_tokens: int = 0
    num_decode_steps: int = 0
    now: float = 0.0
    prompts: Sequence[Request] = ()
    decoding: Sequence[Request] = ()
    num_waiting: int = 0
    num_ending: int = 0
    is_memory_scarce: bool = False

    @property
    def has_prefill(self) -> bool:
        """A prompt chunk could be scheduled now."""
        return bool(self.chunks)

    @property
    def has_decode(self) -> bool:
        """At least one request is decoding."""
        return self.num_decodes > 0


class Policy(Protocol):
    """Chooses the plan at each step border.

    Attributes:
        reason: why `choose` gave the plan that it gave last, in a few words; read when that is another one than before.
            Empty: a record of it says which kind of work ran out or arrived.
        asked: the (prefill, decode) shares behind that plan before they were rounded to those that the device offers;
            None from policies that do not round.
    """

    reason: str
    asked: tuple[float, float] | None

    def choose(self, load: Load) -> Plan:
        """The plan to take up from the next step on."""
        ...

    def observe(self, timings: RequestTimings) -> None:
        """A request ended, other than by an abort."""
        ...


class Unobserving:
    """Base of policies that learn nothing from requests that ended; those that say why set `reason`."""

    reason: str = ""
    asked: tuple[float, float] | None = None

    def observe(self, timings: RequestTimings) -> None:
        """Nothing to learn."""

"""Plans drawn at random at the step borders of a running engine: every share, disjoint or not, MIXED and EXCLUSIVE."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semipd.config import Phase, Plan
from semipd.core import EngineCore
from semipd.sched.policy import Load, Unobserving


class RandomPolicy(Unobserving):
    """A policy that draws a plan anew once a step was launched.

    Not at every question: the lanes would be told different plans between two steps, and might both wait for ever.

    Args:
        shares: of each phase, as the scheduler offers them.
        splits: shares that are disjoint.
        token_budgets: of MIXED.
        num_sms: units of the whole device.
        num_launched: how many steps were launched so far.
    """

    def __init__(
        self,
        *,
        shares: Mapping[Phase, Sequence[int]],
        splits: Sequence[tuple[int, int]],
        token_budgets: Sequence[int],
        num_sms: int,
        num_launched: Callable[[], int],
        seed: int,
    ) -> None:
        any_pairs = [(prefill, decode) for prefill in shares[Phase.PREFILL] for decode in shares[Phase.DECODE]]
        self._alone = {phase: Plan.exclusive(phase, num_sms) for phase in Phase}
        self._kinds = [
            [Plan.split(*split) for split in splits or any_pairs],
            [Plan.split(*pair) for pair in any_pairs],  # most of them over-subscribed
            [Plan.mixed(budget, num_sms) for budget in token_budgets],
            [self._alone[Phase.PREFILL]],
        ]
        self._num_launched = num_launched
        self._drawn_at = -1
        self._random = random.Random(seed)
        self._plan = self._kinds[0][0]

    def choose(self, load: Load) -> Plan:
        """Any plan under which what waits can run; in half of the cases the one before. EXCLUSIVE is prefill first."""
        if self._drawn_at != self._num_launched():
            self._drawn_at = self._num_launched()
            if self._random.random() < 0.5:
                self._plan = self._random.choice(self._random.choice(self._kinds))
        if self._plan is self._alone[Phase.PREFILL] and not load.has_prefill:
            return self._alone[Phase.DECODE]
        return self._plan


def draw_plans(core: EngineCore, *, seed: int, token_budgets: Sequence[int]) -> None:
    """Have a core that was not started yet draw its plans at random; budgets are bounded by its own `MixedPolicy`."""
    backend, scheduler = core._backend, core._scheduler
    untyped: Any = scheduler
    untyped._policy = RandomPolicy(
        shares=scheduler._config.shares,
        splits=backend.splits,
        token_budgets=token_budgets,
        num_sms=backend.num_sms,
        num_launched=lambda: scheduler._in_flight._next_step_id,
        seed=seed,
    )

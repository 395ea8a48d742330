"""Who gets the next request: routers in front of a fleet, which see loads that are some time old.

A router adds what it sends itself to the loads that it was told last, as real ones do. Loads are outstanding tokens:
prompts without a first token, and output still to come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np

from semipd.bench.schedule import PlannedRequest
from semipd.errors import ConfigError

_BOUND = 1.5  # times the mean load, above which a prefix's own engine is passed over


class Router:
    """Chooses an engine for each request; `pick` says how.

    Args:
        name: one of `ROUTERS`.
        num_engines: of the fleet.
        seed: of random choices.

    Raises:
        ConfigError: no such router.
    """

    def __init__(self, name: str, num_engines: int, *, seed: int = 0) -> None:
        if name not in ROUTERS:
            raise ConfigError(f"router is {name!r}; expected one of {', '.join(ROUTERS)}")
        self._pick = ROUTERS[name]
        self.num_engines = num_engines
        self.loads = np.zeros(num_engines)
        self.random = random.Random(seed)
        self.num_sent = 0

    def update(self, loads: Sequence[float]) -> None:
        """Take over what engines reported, in their order."""
        self.loads = np.array(loads, dtype=float)

    def choose(self, request: PlannedRequest) -> int:
        """The engine of a request that arrives now."""
        engine = self._pick(self, request)
        self.loads[engine] += request.num_prompt_tokens + request.num_output_tokens
        self.num_sent += 1
        return engine


def _random(router: Router, request: PlannedRequest) -> int:
    return router.random.randrange(router.num_engines)


def _round_robin(router: Router, request: PlannedRequest) -> int:
    return router.num_sent % router.num_engines


def _shortest(router: Router, request: PlannedRequest) -> int:
    return int(router.loads.argmin())


def _two_choices(router: Router, request: PlannedRequest) -> int:
    first, second = (router.random.randrange(router.num_engines) for _ in range(2))
    return first if router.loads[first] <= router.loads[second] else second


def _prefix_affinity(router: Router, request: PlannedRequest) -> int:
    """The engine that its prefix hashes to, unless that has far more to do than the others."""
    if not request.num_shared_tokens:
        return _two_choices(router, request)
    own = crc32(str(request.prefix_group).encode()) % router.num_engines
    size = request.num_prompt_tokens + request.num_output_tokens
    return own if router.loads[own] <= _BOUND * (router.loads.mean() + size) else _two_choices(router, request)


ROUTERS: dict[str, Callable[[Router, PlannedRequest], int]] = {
    "random": _random,
    "round-robin": _round_robin,
    "shortest": _shortest,
    "two-choices": _two_choices,
    "prefix-affinity": _prefix_affinity,
}

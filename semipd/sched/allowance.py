"""How long decodes can wait: what their targets leave to the next step, and what they have saved of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from semipd.config import SLO
from semipd.request import Request
from semipd.sched.sizing import MARGIN

GAP_WITHOUT_TARGET = 0.1
"""Seconds that tokens may be apart where no target says how far."""

_GAPS_PER_TPOT = 2.0  # what the worst gap may be without a target of its own, over that of TPOT
_TPOT_MARGIN = 0.95
_AHEAD = 16  # tokens for which decodes are expected to go on at their pace


@dataclass(frozen=True, slots=True)
class DecodeTargets:
    """What all of some decodes want, in seconds.

    Attributes:
        gap: how far apart tokens may be.
        comfort: how long steps may last for everybody to keep the targets, whatever was before.
        has_tpot: somebody has a TPOT target.
    """

    gap: float
    comfort: float
    has_tpot: bool

    @staticmethod
    def of(decoding: Sequence[Request]) -> DecodeTargets:
        """The tightest ones; most requests share one `SLO`."""
        slos = {id(request.slo): request.slo for request in decoding}.values()
        tpots = [slo.tpot for slo in slos if slo is not None and slo.tpot is not None]
        gap = min(map(_gap_of, slos), default=GAP_WITHOUT_TARGET)
        return DecodeTargets(gap, min([gap, *tpots]), bool(tpots))


def gap_left(decoding: Sequence[Request], now: float) -> float:
    """Seconds until the first of the decodes misses the gap target of all."""
    since = min([r.last_token_time for r in decoding if r.last_token_time is not None], default=now)
    return MARGIN * DecodeTargets.of(decoding).gap - (now - since)


def affordable(decoding: Sequence[Request], now: float, alone: float) -> float:
    """Seconds that the next step may last for the decodes to keep their targets.

    A request has to spend what it was faster than its TPOT so far, and what it will be in its next tokens at the pace
    of all: else one that has just begun would keep everybody to the TPOT. One step is always on its way, so half of it
    is for the next. Those whose TPOT is out of reach do not hold up the others.

    Args:
        decoding: requests that decode.
        now: the engine's clock.
        alone: seconds of a step of all decodes without prompts.
    """
    begun: list[tuple[float, float, int, int]] = []
    for request in decoding:
        if request.slo is None or request.slo.tpot is None or request.first_token_time is None:
            continue
        target, elapsed = _TPOT_MARGIN * request.slo.tpot, now - request.first_token_time
        num_tokens = len(request.output_token_ids)
        num_left = request.max_tokens - num_tokens
        if elapsed + alone * num_left <= target * (request.max_tokens - 1):
            begun.append((target, elapsed, num_tokens, num_left))
    num_gaps = sum([num_tokens - 1 for _, _, num_tokens, _ in begun])
    pace = (_AHEAD * alone + sum([elapsed for _, elapsed, _, _ in begun])) / (_AHEAD + num_gaps)
    limits = [
        (target * (num_tokens + 1) - elapsed + (target - pace) * min(num_left - 1, _AHEAD)) / 2
        for target, elapsed, num_tokens, num_left in begun
    ]
    return min([MARGIN * DecodeTargets.of(decoding).gap, *limits])


def _gap_of(slo: SLO | None) -> float:
    """How far apart tokens may be."""
    if slo is None:
        return GAP_WITHOUT_TARGET
    if slo.gap is not None:
        return slo.gap
    return GAP_WITHOUT_TARGET if slo.tpot is None else _GAPS_PER_TPOT * slo.tpot

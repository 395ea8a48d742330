"""The controller: at each step border the plan that keeps every target, with the shortest steps that do.

MIXED steps of several sizes and the splits of the device are weighed by a model of step times. A step of decodes reads
all weights and leaves the tensor cores idle, a prompt does the opposite, so plans that do both at once do the work of
1.1 to 1.2 seconds in one on an H100.

Two times say how long a step may last. *Comfort* keeps the TPOT and the gap of everybody, step by step. As long as all
prompts will be done in a quarter of their TTFT target, or have none, the plan of most *progress* is taken: work a
second, each kind counted in the seconds that it takes in large steps of its own. Prompts that are later get the most
tokens that comfort allows. Only where that would miss the target, steps may be as long as the decodes can *afford*:
whoever was faster than its TPOT so far has that much time to spend, up to the gap target. And when decodes alone take
all of the time, prompts wait: let in then, they would take everybody over the target.

All predictions come from the latency model; nothing here knows a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from semipd.config import SLO, Phase, Plan, PlanKind
from semipd.request import Request
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policy import Load, Unobserving

GAP_WITHOUT_TARGET = 0.1
"""Seconds that tokens may be apart where no target says how far."""

_GAPS_PER_TPOT = 2.0  # what the worst gap may be without a target of its own, over that of TPOT
_MARGIN = 0.9  # of a limit: a prediction is off by a few percent, and delivery comes on top
_SACRIFICED = 0.1  # of the decodes, those with the least room: goodput asks for nine in ten
_TPOT_MARGIN = 0.95
_SOON = 0.25  # of the TTFT target, in which prompts are done while there is time
_IN_TIME = 0.9  # of the TTFT target, beyond which decodes spend what they can afford
_SMALLEST_CHUNK = 16
_LEAST_SLOWDOWN = 1.25  # of a step of decodes by prompts that do not fit
_ROOM = 1.1  # of a step of decodes, which a limit has to leave before prompts come back
_STEPS_BETWEEN_PROBES = 16  # of decodes alone, when nothing fits beside them
_KEPT_PLAN = 1.4  # what the present plan's merit counts, and below what another one's of its kind does
_KEPT_KIND = 1.25
_TOLERANCE = 1.08  # of a limit for the plan in force: contexts grow with every step
_MOST_SPLITS = 4
_FULL_BATCH = 128  # decodes whose step reads the weights for about as long as it reads contexts

Chunks = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it is predicted to do.

    Attributes:
        plan: what to do.
        seconds: what a step with decodes takes under it.
        speed: of prompts: their exclusive seconds a second; infinite if a step does all that wait.
        progress: exclusive seconds of work a second.
    """

    plan: Plan
    seconds: float
    speed: float
    progress: float


class Adaptive(Unobserving):
    """Weighs MIXED steps of several sizes and the splits that the device offers.

    Args:
        num_sms: of the device.
        splits: (prefill, decode) shares that it offers.
        max_tokens: most prompt tokens of a step.
        latency: predicts; the scheduler has it learn.

    Attributes:
        splits: those that it weighs.
    """

    def __init__(
        self, *, num_sms: int, splits: Sequence[tuple[int, int]], max_tokens: int, latency: LatencyModel
    ) -> None:
        self._num_sms = num_sms
        self._max_tokens = max_tokens
        self._latency = latency
        self.splits = _spread(splits, num_sms)
        self._only_decodes = Plan.exclusive(Phase.DECODE, num_sms)
        self._only_prompts = Plan.mixed(max_tokens, num_sms)
        self._plan = self._only_decodes

    def choose(self, load: Load) -> Plan:
        self.reason = ""
        num_decodes = load.num_decodes + load.num_ending
        if not load.has_prefill:
            if self._plan.kind is PlanKind.SPLIT:  # a MIXED step without prompts is one of decodes
                self._plan = self._only_decodes
        elif num_decodes == 0:
            self._plan = self._only_prompts
        else:
            self._plan = self._share(load, num_decodes)
        return self._plan

    def _share(self, load: Load, num_decodes: int) -> Plan:
        """The plan for both kinds of work."""
        decodes = StepWork.of(self._num_sms, num_decodes=num_decodes, context_tokens=load.context_tokens)
        alone = self._latency.predict(decodes)
        comfort = _MARGIN * min(map(_comfort_of, load.decoding), default=GAP_WITHOUT_TARGET)
        most = max(affordable(load.decoding, load.now, alone), comfort)
        candidates = [*self._mixed(load, decodes, most), *self._split(load, decodes, most)]
        if self._plan == self._only_decodes and alone * _ROOM > most and _has_tpot(load):
            candidates = []  # prompts that were kept out come back when there is room for more than the least
        comfortable = [
            candidate for candidate in candidates if candidate.seconds <= self._stretched(comfort, candidate)
        ]
        soon, needed = self._needed_speed(load, _SOON), self._needed_speed(load, _IN_TIME)
        in_time = [candidate for candidate in comfortable if candidate.speed >= soon]
        plan = self._take("most progress", in_time, lambda candidate: candidate.progress)
        if plan is None:
            is_enough = any(candidate.speed >= needed for candidate in comfortable)
            fastest = comfortable if is_enough else candidates
            plan = self._take("prompts fastest", fastest, lambda candidate: candidate.speed)
        return plan or self._wait(load, alone)

    def _stretched(self, limit: float, candidate: Candidate) -> float:
        """The limit; a little more for the present plan, which was inside when it was chosen."""
        return limit * (_TOLERANCE if candidate.plan == self._plan else 1.0)

    def _take(self, reason: str, candidates: Sequence[Candidate], merit: Callable[[Candidate], float]) -> Plan | None:
        """The best plan, or the present one if it is about as good: each change wakes both lanes.

        A change between MIXED and SPLIT waits for steps of the other kind to end, so it has to be worth more.
        """
        if not candidates:
            return None
        self.reason = reason
        present = self._plan

        def weight(candidate: Candidate) -> float:
            kept = _KEPT_KIND if candidate.plan.kind is present.kind else 1.0
            return merit(candidate) * (_KEPT_PLAN if candidate.plan == present else kept)

        return max(candidates, key=weight).plan

    def _wait(self, load: Load, alone: float) -> Plan:
        """What to do when no prompt fits beside the decodes.

        A TPOT that is at its limit is saved by letting nobody in. A gap target that is missed without prompts too is
        not. Small steps now and then keep prompts from starving, and show the model if it was wrong.
        """
        gap = _MARGIN * min(map(_gap_of, load.decoding), default=GAP_WITHOUT_TARGET)
        if _has_tpot(load) and alone < gap and load.num_decode_steps < _STEPS_BETWEEN_PROBES:
            self.reason = "decodes take all of the time that their TPOT leaves"
            return self._only_decodes
        self.reason = "no prompt fits: a small step"
        num_decodes = load.num_decodes + load.num_ending
        decodes = StepWork.of(self._num_sms, num_decodes=num_decodes, context_tokens=load.context_tokens)
        size = self._latency.max_prompt_tokens(decodes, _LEAST_SLOWDOWN * alone, load.chunks)
        size = min(max(size, 1), 4 * _SMALLEST_CHUNK)
        return Plan.mixed(min(_up_to_grid(size + num_decodes), self._max_tokens), self._num_sms)

    # ---- candidates

    def _mixed(self, load: Load, decodes: StepWork, limit: float) -> Iterator[Candidate]:
        """MIXED steps of growing size, the present one and the largest that fits among them."""
        num_waiting = sum(length for _, length in load.chunks)
        most = min(num_waiting, self._max_tokens)
        fitting = min(self._latency.max_prompt_tokens(decodes, limit, load.chunks), most)
        fitting = min(fitting, self._latency.trusted_prompt_tokens)
        if fitting < min(_SMALLEST_CHUNK, most):
            return
        num_decodes = decodes.num_decodes
        budgets = {_up_to_grid(size + num_decodes) for size in _sizes(fitting)}
        budgets.add((_up_to_grid if fitting == most else _on_grid)(fitting + num_decodes))
        if self._plan.kind is PlanKind.MIXED:
            budgets.add(self._plan.token_budget or 0)
        decode_worth = self._decode_worth(decodes)
        for budget in sorted({min(budget, self._max_tokens) for budget in budgets}):
            plan = Plan.mixed(budget, self._num_sms)
            size = min(plan.prompt_budget(num_decodes), most)
            if size > fitting and plan != self._plan:
                continue
            work = _with_chunks(decodes, load.chunks, size)
            seconds = self._latency.predict(work)
            speed = self._alone(_with_chunks(StepWork(self._num_sms), load.chunks, size)) / seconds
            progress = decode_worth / seconds + speed
            candidate = Candidate(plan, seconds, math.inf if size == num_waiting else speed, progress)
            if seconds <= self._stretched(limit, candidate):
                yield candidate

    def _split(self, load: Load, decodes: StepWork, limit: float) -> Iterator[Candidate]:
        """The splits whose decode steps fit, of those that were measured: others have to load kernels first."""
        decode_worth = self._decode_worth(decodes)
        for prefill_sms, decode_sms in self.splits:
            work = StepWork(decode_sms, prefill_sms, 0, 0, decodes.num_decodes, decodes.context_tokens)
            size = min(sum(length for _, length in load.chunks), self._max_tokens)
            prompts = _with_chunks(StepWork(prefill_sms, decode_sms), load.chunks, size)
            if not (self._latency.has_measured(work) and self._latency.has_measured(prompts)):
                continue
            seconds = self._latency.predict(work)
            if seconds > limit:
                continue
            alone = self._alone(_with_chunks(StepWork(self._num_sms), load.chunks, size))
            speed = alone / self._latency.predict(prompts)
            yield Candidate(Plan.split(prefill_sms, decode_sms), seconds, speed, decode_worth / seconds + speed)

    def _decode_worth(self, decodes: StepWork) -> float:
        """Exclusive seconds of a step of decodes, each counted as in a large one.

        So few decodes count little, and prompts that will decode beside them much.
        """
        num_decodes = max(decodes.num_decodes, _FULL_BATCH)
        context = decodes.context_tokens * num_decodes // decodes.num_decodes
        full = StepWork.of(self._num_sms, num_decodes=num_decodes, context_tokens=context)
        return self._latency.predict(full) * decodes.num_decodes / num_decodes

    def _alone(self, prompts: StepWork) -> float:
        """Exclusive seconds of prompt chunks, each token counted as in a large step."""
        stretch = max(self._max_tokens / max(prompts.num_prompt_tokens, 1), 1.0)
        large = StepWork(self._num_sms, 0, self._max_tokens, int(prompts.prompt_pairs * stretch))
        if stretch == 1.0:
            large = StepWork(self._num_sms, 0, prompts.num_prompt_tokens, prompts.prompt_pairs)
        return self._latency.predict(large) / stretch

    def _needed_speed(self, load: Load, share: float) -> float:
        """The speed that brings every prompt to its first token within a share of its TTFT target.

        Infinite if one is past that. Those that are past the whole target need nothing: they get what is left over.
        """
        work, speed = 0.0, 0.0
        for request, chunk in zip(load.prompts, load.chunks, strict=True):
            work += self._alone(StepWork.of(self._num_sms, chunks=[chunk]))
            ttft = None if request.slo is None else request.slo.ttft
            if ttft is None or load.now > request.arrival_time + ttft:
                continue
            left = request.arrival_time + share * ttft - load.now
            speed = max(speed, work / left) if left > 0 else math.inf
        if load.num_waiting:  # they come when these are done, and are due somewhat later
            speed *= 1.0 + load.num_waiting / (len(load.prompts) + load.num_waiting)
        return speed


def affordable(decoding: Sequence[Request], now: float, alone: float) -> float:
    """Seconds that the next step may last for nine in ten of the decodes to keep their targets.

    A request that was faster than its TPOT so far has that much time to spend; one step is always on its way, so half
    of it is for the next. Those whose TPOT is out of reach do not hold up the others.

    Args:
        decoding: requests that decode.
        now: the engine's clock.
        alone: seconds of a step of all decodes without prompts.
    """
    limits = []
    gap = GAP_WITHOUT_TARGET
    for request in decoding:
        gap = min(gap, _gap_of(request))
        slo = request.slo
        if slo is None or slo.tpot is None or request.first_token_time is None:
            continue
        num_tokens, target = len(request.output_token_ids), slo.tpot * _TPOT_MARGIN
        elapsed = now - request.first_token_time
        if elapsed + alone * (request.max_tokens - num_tokens) > target * (request.max_tokens - 1):
            continue
        limits.append((target * (num_tokens + 1) - elapsed) / 2)
    if not limits:
        return gap * _MARGIN
    limits.sort()
    return min(limits[int(_SACRIFICED * len(limits))], gap * _MARGIN)


def _has_tpot(load: Load) -> bool:
    return any(request.slo is not None and request.slo.tpot is not None for request in load.decoding)


def _comfort_of(request: Request) -> float:
    """How long steps may last for the request to keep its targets whatever it was before."""
    slo = request.slo or SLO()
    return min(_gap_of(request), slo.tpot or GAP_WITHOUT_TARGET)


def _gap_of(request: Request) -> float:
    """How far apart the request's tokens may be."""
    slo = request.slo or SLO()
    if slo.gap is not None:
        return slo.gap
    return GAP_WITHOUT_TARGET if slo.tpot is None else min(_GAPS_PER_TPOT * slo.tpot, GAP_WITHOUT_TARGET)


def _with_chunks(work: StepWork, chunks: Chunks, num_tokens: int) -> StepWork:
    """The work of a step with the first tokens of the chunks added."""
    taken = []
    for start, length in chunks:
        size = min(length, num_tokens)
        if size <= 0:
            break
        taken.append((start, size))
        num_tokens -= size
    return StepWork.of(
        work.num_sms,
        other_sms=work.other_sms,
        chunks=taken,
        num_decodes=work.num_decodes,
        context_tokens=work.context_tokens,
    )


def _sizes(most: int) -> Iterator[int]:
    """Chunk sizes to weigh, by octaves, the larger ones by halves of them."""
    size = _SMALLEST_CHUNK
    while size < most:
        yield size
        if size >= 4 * _SMALLEST_CHUNK:
            yield size + size // 2
        size *= 2


def _on_grid(num_tokens: int) -> int:
    """The next number below with three significant bits."""
    spare_bits = max(num_tokens.bit_length() - 3, 0)
    return max(num_tokens >> spare_bits << spare_bits, 1)


def _up_to_grid(num_tokens: int) -> int:
    below = _on_grid(num_tokens)
    return below if below == num_tokens else below + (1 << max(num_tokens.bit_length() - 3, 0))


def _spread(splits: Sequence[tuple[int, int]], num_sms: int) -> tuple[tuple[int, int], ...]:
    """A few disjoint splits whose decode shares are spread over an eighth to a half of the device."""
    usual = sorted(
        (split for split in splits if sum(split) <= num_sms and num_sms <= 8 * split[1] <= 4 * num_sms),
        key=lambda split: split[1],
    )
    if len(usual) <= _MOST_SPLITS:
        return tuple(usual)
    step = (len(usual) - 1) / (_MOST_SPLITS - 1)
    return tuple(usual[round(index * step)] for index in range(_MOST_SPLITS))

"""The controller: at each step border the plan that keeps every target, as far as predictions go.

MIXED steps of several sizes and the splits of the device are weighed by a model of step times. A step of decodes reads
all weights and leaves the tensor cores idle, a prompt does the opposite, so plans that do both at once do the work of
1.1 to 1.2 seconds in one on an H100.

Two times say how long a step may last. *Comfort* keeps the TPOT and the gap of everybody, step by step. As long as all
prompts will be done in a quarter of their TTFT target, or have none, the plan of most *progress* is taken: work a
second, each kind counted in the seconds that it takes in large steps of its own. Where comfort is too little for that,
prompts go as fast as the decodes can *afford*, up to the gap target: whoever was faster than its TPOT so far, or will
be if decodes go on at their pace, has that much time to spend. It is spent before a target is in danger: who comes next
finds the way free, and nobody knows when. It is not where memory is about to run out: decodes that take longer keep
theirs longer, and it is what the next prompts wait for. There the plan with the shortest steps is taken of those that
have all prompts in time. Where the target is so tight that a prompt has no time for two steps beside the decodes, these
stand still for a step of prompts, if they can afford that. And when decodes alone take all of the time, prompts wait:
let in then, they would take everybody over the target.

All predictions come from the latency model; nothing here knows a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from semipd.config import Phase, Plan, PlanKind
from semipd.sched.allowance import DecodeTargets, affordable, gap_left
from semipd.sched.latency import LatencyModel, StepWork, count_pairs
from semipd.sched.policy import Load, Unobserving
from semipd.sched.sizing import MARGIN, on_grid

_SOON = 0.25  # of the TTFT target, beyond which decodes spend what they can afford
_STEPS_AHEAD = 2  # that run or are launched when a plan is chosen
_SMALLEST_CHUNK = 16
_HASTE = 2.0  # MIXED steps that a prompt must have time for, or it is done alone: who comes next waits for one too
_GRID_BITS = 3  # significant ones of a step's size
_LEAST_SLOWDOWN = 1.25  # of a step of decodes by prompts that do not fit
_ROOM = 1.1  # of a step of decodes, which a limit has to leave before prompts come back
_STEPS_BETWEEN_PROBES = 16  # of decodes alone, when nothing fits beside them
_KEPT_PLAN = 1.4  # what the present plan's merit counts, and below what another one's of its kind does
_KEPT_KIND = 1.25
_TOLERANCE = 1.08  # of a limit for the plan in force: contexts grow with every step
_MOST_SPLITS = 4
_FULL_BATCH = 128  # decodes whose step reads the weights for about as long as it reads contexts

_ALL_AT_ONCE = 1e6  # a speed that is enough for any deadline

Chunks = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it is predicted to do.

    Attributes:
        plan: what to do.
        seconds: what a step with decodes takes under it.
        speed: of prompts: their exclusive seconds a second; `_ALL_AT_ONCE` if a step does all that wait.
        progress: exclusive seconds of work a second.
    """

    plan: Plan
    seconds: float
    speed: float
    progress: float


class Adaptive(Unobserving):
    """Weighs MIXED steps of several sizes, the splits that the device offers, and steps of prompts alone.

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
        self._alone = _Alone()

    def choose(self, load: Load) -> Plan:
        self.reason = ""
        num_decodes = load.num_decodes + load.num_ending
        if not load.has_prefill:
            if self._plan.kind is not PlanKind.MIXED:  # a MIXED step without prompts is one of decodes
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
        targets = DecodeTargets.of(load.decoding)
        comfort = MARGIN * targets.comfort
        if self._plan == self._only_decodes and targets.has_tpot and alone * _ROOM > comfort:
            # prompts that were kept out come back when there is room for more than the least
            if alone * _ROOM > affordable(load.decoding, load.now, alone):
                return self._wait(load, targets, alone)
        if (plan := self._alone_in_time(load, decodes, alone)) is not None:
            return plan
        worth = self._worth(decodes)
        candidates = [*self._mixed(load, decodes, worth, comfort), *self._split(load, decodes, worth, comfort)]
        needed = needed_speed(load, worth)
        in_time = [candidate for candidate in candidates if candidate.speed >= needed]
        if load.is_memory_scarce and needed > 0:
            plan = self._take("memory is short: decodes fastest", in_time, lambda candidate: 1 / candidate.seconds)
        else:
            plan = self._take("most progress", in_time, lambda candidate: candidate.progress)
        if plan is None:
            most = comfort if load.is_memory_scarce else affordable(load.decoding, load.now, alone)
            if most > comfort:
                candidates = [*self._mixed(load, decodes, worth, most), *self._split(load, decodes, worth, most)]
            plan = self._take("prompts fastest", candidates, lambda candidate: candidate.speed)
        return plan or self._wait(load, targets, alone)

    def _alone_in_time(self, load: Load, decodes: StepWork, alone: float) -> Plan | None:
        """A step of all prompts and no decodes, if a prompt is in time so, has no time beside them, and they can wait.

        Steps that have been launched come first, and go on meanwhile.
        """
        num_tokens = sum(length for _, length in load.chunks)
        most = min(self._max_tokens, self._latency.trusted_prompt_tokens)
        if num_tokens > most:
            return None
        seconds = self._latency.predict(_with_chunks(StepWork(self._num_sms), load.chunks, num_tokens))
        begin = max(self._alone.free_from(load), load.now)
        seconds += begin - load.now
        if not self._is_saved(load, decodes, seconds, _STEPS_AHEAD * alone):
            return None
        if seconds + alone > min(affordable(load.decoding, load.now, alone), gap_left(load.decoding, load.now)):
            return None
        self._alone = _Alone(begin, load.now + seconds, load.prompts[0].request_id)
        self.reason = "a prompt has no time for steps beside decodes"
        return Plan.exclusive(Phase.PREFILL, self._num_sms)

    def _is_saved(self, load: Load, decodes: StepWork, seconds: float, launched: float) -> bool:
        """Whether a prompt may be in time in a step of so many seconds, and has no time for MIXED ones up to it.

        Both come behind what was launched, of which some is done.
        """
        num_tokens = 0
        for request, (_, length) in zip(load.prompts, load.chunks, strict=True):
            num_tokens += length
            if request.slo is None or request.slo.ttft is None or request.first_token_time is not None:
                continue
            left = MARGIN * request.slo.ttft - (load.now - request.arrival_time)
            mixed = self._latency.predict(_with_chunks(decodes, load.chunks, num_tokens))
            if seconds <= left < _HASTE * (launched + mixed):
                return True
        return False

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

    def _wait(self, load: Load, targets: DecodeTargets, alone: float) -> Plan:
        """What to do when no prompt fits beside the decodes.

        A TPOT that is at its limit is saved by letting nobody in. A gap target that is missed without prompts too is
        not. Small steps now and then keep prompts from starving, and show the model if it was wrong.
        """
        is_saved = targets.has_tpot and alone < MARGIN * targets.gap
        if is_saved and load.num_decode_steps < _STEPS_BETWEEN_PROBES:
            self.reason = "decodes take all of the time that their TPOT leaves"
            return self._only_decodes
        self.reason = "no prompt fits: a small step"
        num_decodes = load.num_decodes + load.num_ending
        decodes = StepWork.of(self._num_sms, num_decodes=num_decodes, context_tokens=load.context_tokens)
        size = self._latency.max_prompt_tokens(decodes, _LEAST_SLOWDOWN * alone, load.chunks)
        size = min(max(size, 1), 4 * _SMALLEST_CHUNK)
        return Plan.mixed(min(_up_to_grid(size + num_decodes), self._max_tokens), self._num_sms)

    # ---- candidates

    def _mixed(self, load: Load, decodes: StepWork, worth: _Worth, limit: float) -> Iterator[Candidate]:
        """MIXED steps of growing size, the present one and the largest that fits among them."""
        num_waiting = sum(length for _, length in load.chunks)
        most = min(num_waiting, self._max_tokens)
        fitting = min(self._latency.max_prompt_tokens(decodes, limit, load.chunks), most)
        fitting = min(fitting, self._latency.trusted_prompt_tokens)
        if fitting < min(_SMALLEST_CHUNK, most):
            return
        num_decodes = decodes.num_decodes
        budgets = {on_grid(fitting // divisor + num_decodes, _GRID_BITS) for divisor in (1, 2, 3, 4, 6, 8, 16)}
        if fitting == most:
            budgets.add(_up_to_grid(fitting + num_decodes))
        if self._plan.kind is PlanKind.MIXED:
            budgets.add(self._plan.token_budget or 0)
        for budget in sorted({min(budget, self._max_tokens) for budget in budgets}):
            plan = Plan.mixed(budget, self._num_sms)
            size = min(plan.prompt_budget(num_decodes), most)
            if size > fitting and plan != self._plan:
                continue
            work = _with_chunks(decodes, load.chunks, size)
            seconds = self._latency.predict(work)
            if seconds <= limit * (_TOLERANCE if plan == self._plan else 1.0):
                yield worth.candidate(plan, seconds, worth.of_prompts(work) / seconds, does_all=size == num_waiting)

    def _split(self, load: Load, decodes: StepWork, worth: _Worth, limit: float) -> Iterator[Candidate]:
        """The splits whose decode steps fit, of those that were measured: others have to load kernels first."""
        size = min(sum(length for _, length in load.chunks), self._max_tokens)
        for prefill_sms, decode_sms in self.splits:
            work = StepWork(decode_sms, prefill_sms, 0, 0, decodes.num_decodes, decodes.context_tokens)
            prompts = _with_chunks(StepWork(prefill_sms, decode_sms), load.chunks, size)
            if not (self._latency.has_measured(work) and self._latency.has_measured(prompts)):
                continue
            plan, seconds = Plan.split(prefill_sms, decode_sms), self._latency.predict(work)
            if seconds <= limit * (_TOLERANCE if plan == self._plan else 1.0):
                speed = worth.of_prompts(prompts) / self._latency.predict(prompts)
                yield worth.candidate(plan, seconds, speed)

    def _worth(self, decodes: StepWork) -> _Worth:
        """What work is worth in large steps: a small one reads all weights for a few rows.

        So few decodes count little, and prompts that will decode beside them much.
        """
        num_decodes, num_tokens = max(decodes.num_decodes, _FULL_BATCH), self._max_tokens
        context = decodes.context_tokens * num_decodes // decodes.num_decodes
        full = StepWork(self._num_sms, 0, 0, 0, num_decodes, context)
        rows = self._latency.predict(StepWork(self._num_sms, 0, num_tokens))
        with_pairs = self._latency.predict(StepWork(self._num_sms, 0, num_tokens, num_tokens**2))
        return _Worth(
            decodes=self._latency.predict(full) * decodes.num_decodes / num_decodes,
            token=rows / num_tokens,
            pair=(with_pairs - rows) / num_tokens**2,
        )


@dataclass(frozen=True, slots=True)
class _Alone:
    """The step of prompts alone that was chosen last.

    Attributes:
        begin: when it is predicted to begin.
        end: and to end.
        first_id: of its first prompt.
    """

    begin: float = 0.0
    end: float = 0.0
    first_id: str = ""

    def free_from(self, load: Load) -> float:
        """When the next one can begin: behind this one if it was launched, else in its place."""
        if load.num_ending == 0:
            return load.now
        is_waiting = any(request.request_id == self.first_id for request in load.prompts)
        return self.begin if is_waiting else self.end


@dataclass(frozen=True, slots=True)
class _Worth:
    """Exclusive seconds: what work takes in a large step of its own kind, on the whole device.

    Attributes:
        decodes: of a step of all decodes.
        token: of a prompt token, but for its attention.
        pair: of a pair of prompt tokens that attend.
    """

    decodes: float
    token: float
    pair: float

    def of_prompts(self, work: StepWork) -> float:
        """Of the prompt chunks of a step."""
        return self.token * work.num_prompt_tokens + self.pair * work.prompt_pairs

    def candidate(self, plan: Plan, seconds: float, speed: float, *, does_all: bool = False) -> Candidate:
        """A plan with decode steps of so many seconds and prompts at that speed."""
        return Candidate(plan, seconds, _ALL_AT_ONCE if does_all else speed, self.decodes / seconds + speed)


def needed_speed(load: Load, worth: _Worth) -> float:
    """The speed that brings every prompt to its first token within `_SOON` of its TTFT target.

    `_ALL_AT_ONCE` if one is past that. Where memory is what prompts wait for, most of that has gone when they get some,
    so all of the target counts. Those that are past it need nothing: they get what is left over.
    """
    work = speed = 0.0
    soon = MARGIN if load.is_memory_scarce else _SOON
    for request, (start, length) in zip(load.prompts, load.chunks, strict=True):
        work += worth.token * length + worth.pair * count_pairs(start, length)
        ttft = None if request.slo is None else request.slo.ttft
        age = load.now - request.arrival_time
        if ttft is not None and age <= ttft:
            speed = max(speed, work / (soon * ttft - age) if age < soon * ttft else _ALL_AT_ONCE)
    # those without memory come when these are done, and are due somewhat later
    more = load.num_waiting / (len(load.prompts) + load.num_waiting) if load.num_waiting else 0.0
    return speed * (1.0 + more)


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


def _up_to_grid(num_tokens: int) -> int:
    below = on_grid(num_tokens, _GRID_BITS)
    return below if below == num_tokens else below + (1 << max(num_tokens.bit_length() - _GRID_BITS, 0))


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

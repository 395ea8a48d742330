"""The controller: every target is kept with the shortest steps that do, nobody starves, and the plan rests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from semipd.config import SLO, Phase, Plan, PlanKind
from semipd.request import Request, SamplingParams
from semipd.sched.adaptive import Adaptive
from semipd.sched.allowance import GAP_WITHOUT_TARGET
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policy import Load
from tests.sched.oracle import Driver, assert_outputs

NUM_SMS = 8
SPLITS = ((7, 1), (6, 2), (4, 4))
MAX_TOKENS = 2048
ONLY_DECODES = Plan.exclusive(Phase.DECODE, NUM_SMS)

LARGEST_PROBE = 80  # prompt tokens, where none fit

Device = Callable[[StepWork], float]


def _seconds(work: StepWork) -> float:
    """A device that takes 5 ms for the weights and 30 us a row, and reads contexts and pairs at a cost."""
    share = work.num_sms / NUM_SMS
    rows = 30e-6 * (work.num_decodes + work.num_prompt_tokens) / share
    contexts = 40e-9 * work.context_tokens
    return max(5e-3, rows) + (contexts + 0.5e-9 * work.prompt_pairs) / share


def _prompt_rows_start_late(seconds: float) -> Device:
    """A device that takes so long before the first prompt row of a step: long steps pay."""
    return lambda work: _seconds(work) + (seconds if work.num_prompt_tokens else 0.0)


class ExactModel(LatencyModel):
    """Knows the device, and has measured MIXED steps of all sizes and the splits that it is given."""

    def __init__(self, device: Device = _seconds, measured: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(NUM_SMS)
        self.device = device
        self._shares = {*measured, *((decode, prefill) for prefill, decode in measured)}

    @property
    def trusted_prompt_tokens(self) -> int:
        return MAX_TOKENS

    def has_measured(self, work: StepWork) -> bool:
        return (work.num_sms, work.other_sms) in self._shares

    def predict(self, work: StepWork) -> float:
        return self.device(work)

    def max_prompt_tokens(self, work: StepWork, limit: float, chunks: object) -> int:
        assert isinstance(chunks, tuple)
        (start, length), *_ = chunks
        fits = (n for n in range(min(length, MAX_TOKENS), 0, -1) if self.device(_mixed(work, start, n)) <= limit)
        return next(fits, 0)


def _mixed(decodes: StepWork, start: int, num_tokens: int) -> StepWork:
    """The decodes with a chunk added."""
    return StepWork.of(
        decodes.num_sms,
        chunks=[(start, num_tokens)],
        num_decodes=decodes.num_decodes,
        context_tokens=decodes.context_tokens,
    )


def _make(latency: LatencyModel, splits: Sequence[tuple[int, int]] = ()) -> Adaptive:
    return Adaptive(num_sms=NUM_SMS, splits=splits, max_tokens=MAX_TOKENS, latency=latency)


def _request(slo: SLO | None, *, num_tokens: int = 2000, arrival: float = 0.0, max_tokens: int = 500) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=(1,) * num_tokens,
        params=SamplingParams(),
        arrival_time=arrival,
        seed=0,
        max_tokens=max_tokens,
        slo=slo,
    )


def _decoding(slo: SLO | None, *, num_tokens: int = 1, seconds_each: float = 0.0, now: float = 0.0) -> Request:
    """A request that has made so many tokens, the later ones at that pace."""
    request = _request(slo)
    request.output_token_ids = [1] * num_tokens
    request.first_token_time = now - seconds_each * (num_tokens - 1)
    return request


def _load(
    decoding: Sequence[Request],
    prompt: Request | None = None,
    *,
    now: float = 0.0,
    context: int = 500,
    num_decode_steps: int = 0,
    num_waiting: int = 0,
    is_memory_scarce: bool = False,
) -> Load:
    prompts = () if prompt is None else (prompt,)
    return Load(
        chunks=tuple((0, len(request.prompt_token_ids)) for request in prompts),
        num_decodes=len(decoding),
        context_tokens=len(decoding) * context,
        num_decode_steps=num_decode_steps,
        now=now,
        prompts=prompts,
        decoding=decoding,
        num_waiting=num_waiting,
        is_memory_scarce=is_memory_scarce,
    )


def _step_seconds(plan: Plan, load: Load, device: Device = _seconds) -> float:
    """What a step of the decode lane takes under the plan."""
    decodes = StepWork.of(
        plan.decode_sms,
        other_sms=plan.prefill_sms,
        num_decodes=load.num_decodes,
        context_tokens=load.context_tokens,
    )
    if plan.kind is not PlanKind.MIXED:
        return device(decodes)
    start, length = load.chunks[0]
    return device(_mixed(decodes, start, min(length, plan.prompt_budget(load.num_decodes))))


@dataclass
class Done:
    """A request that ended: its times in seconds."""

    ttft: float
    tpot: float


class Server:
    """A closed loop of clients: each has one request, and the next one when that ends. It plays MIXED and EXCLUSIVE."""

    def __init__(
        self, *, num_clients: int, slo: SLO | None, slower: float = 1.0, noise: float = 0.03, num_outputs: int = 100
    ) -> None:
        self.latency = LatencyModel(NUM_SMS)
        self.policy = _make(self.latency)
        self.slower = slower
        self.now = 0.0
        self.num_decode_steps = 0
        self.plans: list[Plan] = []
        self.times: list[float] = []
        self.done: list[Done] = []
        self.longest_wait = 0
        self._slo, self._noise, self._num_outputs = slo, noise, num_outputs
        self._rng = random.Random(0)
        self._prompts = [self._next() for _ in range(num_clients)]
        self._decoding: list[Request] = []

    def _next(self) -> Request:
        num_tokens = round(self._rng.lognormvariate(6.0, 0.7))
        num_outputs = max(2, round(self._num_outputs * self._rng.uniform(0.5, 1.5)))
        return _request(self._slo, num_tokens=num_tokens, arrival=self.now, max_tokens=num_outputs)

    def step(self) -> None:
        """Play one step."""
        prompts, decoding = self._prompts, self._decoding
        load = Load(
            chunks=tuple((r.num_scheduled_tokens, r.num_tokens - r.num_scheduled_tokens) for r in prompts),
            num_decodes=len(decoding),
            context_tokens=sum(r.num_tokens for r in decoding),
            num_decode_steps=self.num_decode_steps,
            now=self.now,
            prompts=tuple(prompts),
            decoding=tuple(decoding),
        )
        plan = self.policy.choose(load)
        self.plans.append(plan)
        budget = plan.prompt_budget(len(decoding)) if plan.kind is PlanKind.MIXED else 0
        chunks = []
        for request in prompts:
            size = min(request.num_tokens - request.num_scheduled_tokens, budget)
            if size:
                chunks.append((request.num_scheduled_tokens, size))
                request.num_scheduled_tokens += size
                budget -= size
        work = StepWork.of(
            NUM_SMS, chunks=chunks, num_decodes=len(decoding), context_tokens=sum(r.num_tokens for r in decoding)
        )
        assert work.num_prompt_tokens or work.num_decodes, "an empty step"
        seconds = self.slower * _seconds(work) * self._rng.lognormvariate(0, self._noise)
        self.latency.observe(work, seconds)
        self.now += seconds
        self.num_decode_steps = 0 if chunks else self.num_decode_steps + 1
        if decoding:
            self.times.append(seconds)
        if prompts:
            self.longest_wait = max(self.longest_wait, self.num_decode_steps)
        self._emit()

    def _emit(self) -> None:
        ready = [r for r in self._prompts if r.num_scheduled_tokens == r.num_tokens]
        self._prompts = [r for r in self._prompts if r not in ready]
        for request in ready:
            request.first_token_time = self.now
        self._decoding += ready
        for request in self._decoding:
            request.output_token_ids.append(1)
        for request in [r for r in self._decoding if len(r.output_token_ids) == r.max_tokens]:
            assert request.first_token_time is not None
            ttft = request.first_token_time - request.arrival_time
            self.done.append(Done(ttft, (self.now - request.first_token_time) / (request.max_tokens - 1)))
            self._decoding.remove(request)
            self._prompts.append(self._next())


# ---- one kind of work, or none


def test_prompts_alone_have_whole_steps() -> None:
    policy = _make(ExactModel(), SPLITS)
    assert policy.choose(_load([], _request(None))) == Plan.mixed(MAX_TOKENS, NUM_SMS)


def test_decodes_alone_have_the_device_and_the_plan_rests() -> None:
    policy = _make(ExactModel(), SPLITS)
    decoding = [_decoding(None)]
    assert policy.choose(_load(decoding)) == ONLY_DECODES
    both = policy.choose(_load(decoding, _request(None)))
    assert both.kind is PlanKind.MIXED
    assert policy.choose(_load(decoding)) is both, "a MIXED step without prompts is one of decodes"
    assert policy.choose(Load()) is both


def test_a_prompt_that_ends_counts_as_a_decode() -> None:
    policy = _make(ExactModel(_prompt_rows_start_late(0.05)))  # 111 ms for a whole step
    load = _load([], _request(None, num_tokens=8000))
    assert policy.choose(load) == Plan.mixed(MAX_TOKENS, NUM_SMS)
    budget = policy.choose(replace(load, num_ending=1)).token_budget
    assert budget is not None and budget < MAX_TOKENS


def test_first_chunks_are_small_until_steps_were_measured() -> None:
    plan = _make(LatencyModel(NUM_SMS)).choose(_load([_decoding(SLO(gap=1.0))], _request(None, num_tokens=8000)))
    assert 0 < plan.prompt_budget(1) <= 64


# ---- how long a step may last


@pytest.mark.parametrize("slower", [0.3, 1.0, 50.0])
@pytest.mark.parametrize(
    ("slo", "limit"),
    [
        (SLO(tpot=0.02), 0.02),
        (SLO(tpot=0.05, gap=0.025), 0.025),
        (SLO(gap=0.04), 0.04),
        (SLO(tpot=0.5), 0.5),
        (SLO(tpot=0.5, gap=0.4), 0.4),
        (None, 0.1),
    ],
)
def test_steps_stay_within_comfort_on_a_device_that_was_learned(slo: SLO | None, limit: float, slower: float) -> None:
    server = Server(num_clients=16, slo=slo, slower=slower)
    for _ in range(150):
        server.step()
    server.times.clear()
    for _ in range(400):
        server.step()
    if slower * 5e-3 < 0.5 * limit:
        assert sum(seconds > limit for seconds in server.times) <= 0.02 * len(server.times)
    assert server.done or slower == 50.0


def test_the_tightest_of_the_decodes_bounds_the_step() -> None:
    device = _prompt_rows_start_late(0.004)
    prompt = _request(SLO(ttft=0.5), num_tokens=8000)  # in time only at the fastest
    lax = [_decoding(SLO(tpot=0.06)) for _ in range(15)]

    def seconds(decoding: Sequence[Request]) -> float:
        load = _load(decoding, prompt)
        return _step_seconds(_make(ExactModel(device)).choose(load), load, device)

    assert seconds([*lax, _decoding(SLO(tpot=0.015))]) <= 2 * 0.015
    assert seconds([*lax, _decoding(SLO(tpot=0.06, gap=0.012))]) <= 0.012
    assert 0.03 < seconds(lax) <= 2 * 0.06


def test_steps_are_only_as_long_as_prompts_need() -> None:
    decoding = [_decoding(SLO(tpot=0.06)) for _ in range(15)]

    def seconds(ttft: float) -> float:
        load = _load(decoding, _request(SLO(ttft=ttft), num_tokens=8000))
        return _step_seconds(_make(ExactModel()).choose(load), load)

    assert seconds(30.0) < 0.01 < 0.03 < seconds(0.5)


def test_a_plan_is_kept_while_contexts_grow_a_little_beyond_the_limit() -> None:
    device, comfort = _prompt_rows_start_late(0.004), 0.9 * 0.03
    policy = _make(ExactModel(device))
    prompt, decoding = _request(SLO(ttft=0.5), num_tokens=8000), [_decoding(SLO(tpot=0.03, gap=0.03))] * 15
    first = policy.choose(_load(decoding, prompt))
    loads = (_load(decoding, prompt, context=context) for context in range(500, 40_000, 100))
    load = next(load for load in loads if policy.choose(load) != first)
    assert comfort < _step_seconds(first, load, device) < 1.12 * comfort


def test_without_targets_steps_make_most_progress_in_100_ms() -> None:
    policy = _make(ExactModel())
    load = _load([_decoding(None) for _ in range(32)], _request(None, num_tokens=8000))
    plan = policy.choose(load)

    def tokens_per_second(budget: int) -> float:
        one = Plan.mixed(budget, NUM_SMS)
        return (one.prompt_budget(32) + 32) / _step_seconds(one, load)

    best = max(map(tokens_per_second, range(64, MAX_TOKENS, 16)))
    assert plan.token_budget is not None and tokens_per_second(plan.token_budget) >= 0.9 * best


def test_without_targets_a_device_that_needs_long_steps_has_100_ms() -> None:
    device = _prompt_rows_start_late(0.05)
    load = _load([_decoding(None) for _ in range(32)], _request(None, num_tokens=8000))
    seconds = _step_seconds(_make(ExactModel(device)).choose(load), load, device)
    assert 0.07 < seconds <= 0.9 * GAP_WITHOUT_TARGET


# ---- time that was saved


def _budget_in_need(decoding: Request, prompt: Request, now: float) -> float:
    load = _load([decoding] * 10, prompt, now=now)
    return _step_seconds(_make(ExactModel()).choose(load), load)


def test_saved_time_is_spent_on_prompts_that_comfort_does_not_have_done_soon() -> None:
    saver = _decoding(SLO(tpot=0.02), num_tokens=200, seconds_each=0.006, now=10.0)
    soon = _request(SLO(ttft=2.0), num_tokens=4000, arrival=10.0)
    in_time = _request(SLO(ttft=0.5), num_tokens=4000, arrival=10.0)
    urgent = _request(SLO(ttft=0.13), num_tokens=4000, arrival=10.0)
    lost = _request(SLO(ttft=0.13), num_tokens=4000, arrival=9.0)
    comfort, gap = 0.9 * 0.02, 0.9 * 0.04
    assert _budget_in_need(saver, soon, 10.0) <= comfort
    assert comfort < _budget_in_need(saver, in_time, 10.0) <= gap, "whoever comes next finds the way free"
    assert comfort < _budget_in_need(saver, urgent, 10.0) <= gap
    assert _budget_in_need(saver, lost, 10.0) <= comfort, "nothing brings that one back"


def test_saved_time_is_kept_where_memory_runs_out() -> None:
    saver = _decoding(SLO(tpot=0.02), num_tokens=200, seconds_each=0.006, now=10.0)
    urgent = _request(SLO(ttft=0.13), num_tokens=4000, arrival=10.0)
    seconds = {}
    for is_scarce in (False, True):
        load = _load([saver] * 10, urgent, now=10.0, is_memory_scarce=is_scarce)
        seconds[is_scarce] = _step_seconds(_make(ExactModel()).choose(load), load)
    assert seconds[True] <= 0.9 * 0.02 < seconds[False]


@pytest.mark.parametrize("age", [0.0, 0.6])
def test_where_memory_runs_out_decodes_are_as_fast_as_prompts_in_time_allow(age: float) -> None:
    decoding = _decoding(SLO(tpot=0.02), num_tokens=200, seconds_each=0.017, now=10.0)
    seconds = {}
    for ttft in (1.0, 0.7):
        for is_scarce in (False, True):
            prompt = _request(SLO(ttft=ttft), num_tokens=4000, arrival=10.0 - age)
            load = _load([decoding] * 10, prompt, now=10.0, is_memory_scarce=is_scarce)
            seconds[ttft, is_scarce] = _step_seconds(_make(ExactModel()).choose(load), load)
    assert seconds[1.0, True] < seconds[1.0, False]
    if age:  # all of the target counts, of which 30 ms are left for 120 ms of work: prompts fastest
        assert seconds[0.7, True] > 1.5 * seconds[1.0, True]


def test_where_memory_runs_out_prompts_that_no_target_hurries_make_progress() -> None:
    for slo in (None, SLO(ttft=0.5)):
        prompt = _request(slo, num_tokens=4000, arrival=9.0)  # the target is past
        loads = [
            _load([_decoding(None)] * 10, prompt, now=10.0, is_memory_scarce=is_scarce) for is_scarce in (False, True)
        ]
        plans = [_make(ExactModel()).choose(load) for load in loads]
        assert plans[0] == plans[1]


def test_who_saved_nothing_has_nothing_to_spend() -> None:
    spent = _decoding(SLO(tpot=0.02), num_tokens=200, seconds_each=0.019, now=10.0)
    urgent = _request(SLO(ttft=0.13), num_tokens=4000, arrival=10.0)
    assert _budget_in_need(spent, urgent, 10.0) <= 0.02


# ---- no prompt fits


def _at_the_limit(tpot: float) -> Load:
    """30 decodes, 5.6 ms a step, that have saved nothing beside a prompt that is due soon."""
    decoding = [_decoding(SLO(tpot=tpot), num_tokens=50, seconds_each=tpot, now=1.0)] * 30
    return _load(decoding, _request(SLO(ttft=0.5), num_tokens=4000, arrival=0.9), now=1.0)


def test_decodes_at_their_tpot_limit_keep_prompts_out_but_for_probes() -> None:
    policy = _make(ExactModel())
    load = _at_the_limit(0.0062)
    plans = [policy.choose(replace(load, num_decode_steps=steps)) for steps in range(17)]
    assert plans[:16] == [ONLY_DECODES] * 16
    assert plans[16].kind is PlanKind.MIXED and 0 < plans[16].prompt_budget(30) <= LARGEST_PROBE


def test_prompts_that_were_kept_out_come_back_when_there_is_room() -> None:
    policy, other = _make(ExactModel()), _make(ExactModel())
    assert policy.choose(_at_the_limit(0.0062)) == ONLY_DECODES
    other.choose(_load([], _request(None)))
    assert policy.choose(_at_the_limit(0.0068)) == ONLY_DECODES, "not for the least room"
    assert other.choose(_at_the_limit(0.0068)).kind is PlanKind.MIXED, "where those that are in stay"
    assert policy.choose(_at_the_limit(0.0075)).kind is PlanKind.MIXED


@pytest.mark.parametrize(
    ("slo", "slower"), [(None, 50.0), (SLO(gap=0.001), 50.0), (SLO(gap=0.008), 1.0)], ids=["slow", "missed", "no room"]
)
def test_without_a_tpot_target_prompts_are_never_kept_out(slo: SLO | None, slower: float) -> None:
    device = _prompt_rows_start_late(0.004)
    policy = _make(ExactModel(lambda work: slower * device(work)))
    load = _load([_decoding(slo)] * 30, _request(None, num_tokens=4000))
    for _ in range(40):
        plan = policy.choose(load)
        assert plan.kind is PlanKind.MIXED and 0 < plan.prompt_budget(30) <= LARGEST_PROBE


def test_no_prompt_starves_beside_decodes_at_their_limit() -> None:
    server = Server(num_clients=24, slo=SLO(ttft=0.3, tpot=0.006), num_outputs=400)
    for _ in range(3000):
        server.step()
    assert ONLY_DECODES in server.plans
    assert 10 < server.longest_wait <= 20, "steps that prompts waited for the next token of one"
    assert len(server.done) > 24


# ---- splits


def _long_mixed_steps(factor: float = 8.0) -> Device:
    """A device on which rows of MIXED steps take that many times as long."""

    def seconds(work: StepWork) -> float:
        if work.num_decodes and work.num_prompt_tokens:
            return _seconds(work) + (factor - 1.0) * 30e-6 * work.num_prompt_tokens
        return _seconds(work)

    return seconds


SPLIT_LOAD = _load([_decoding(SLO(gap=0.015))] * 8, _request(SLO(ttft=0.5), num_tokens=8000))


def test_a_split_is_taken_where_mixed_steps_are_too_long_for_the_gap() -> None:
    policy = _make(ExactModel(_long_mixed_steps(), SPLITS), SPLITS)
    plan = policy.choose(SPLIT_LOAD)
    assert plan.kind is PlanKind.SPLIT
    assert _step_seconds(plan, SPLIT_LOAD) <= 0.9 * 0.015


@pytest.mark.parametrize("measured", [(), ((4, 4),)])
def test_only_measured_splits_are_taken(measured: tuple[tuple[int, int], ...]) -> None:
    policy = _make(ExactModel(_long_mixed_steps(), measured), SPLITS)
    plan = policy.choose(SPLIT_LOAD)
    taken = {(plan.prefill_sms, plan.decode_sms)} if plan.kind is PlanKind.SPLIT else set()
    assert taken == set(measured)


def test_a_split_whose_decodes_are_too_slow_is_not_taken() -> None:
    def slow_splits(work: StepWork) -> float:
        return (4.0 if work.other_sms and work.num_decodes else 1.0) * _long_mixed_steps()(work)

    policy = _make(ExactModel(slow_splits, SPLITS), SPLITS)
    assert policy.choose(SPLIT_LOAD).kind is PlanKind.MIXED


def test_a_split_has_to_be_clearly_better_and_is_kept_until_it_is_clearly_worse() -> None:
    def device(slower: float) -> Device:
        return lambda work: (
            (slower if work.other_sms and work.num_prompt_tokens else 1.0) * _long_mixed_steps(2.0)(work)
        )

    splits = ((6, 2),)
    model = ExactModel(measured=splits)
    policy = _make(model, splits)

    def is_split(slower: float) -> bool:
        model.device = device(slower)
        return policy.choose(SPLIT_LOAD).kind is PlanKind.SPLIT

    factors = [0.5 * 1.05**step for step in range(70)]
    assert not is_split(factors[-1])
    entered = next(factor for factor in reversed(factors) if is_split(factor))
    left = next(factor for factor in factors if factor >= entered and not is_split(factor))
    assert left > 1.5 * entered
    assert not is_split(left / 1.2), "nor taken again at once"


def test_a_split_is_left_when_prompts_or_decodes_run_out() -> None:
    policy = _make(ExactModel(_long_mixed_steps(), SPLITS), SPLITS)
    assert policy.choose(SPLIT_LOAD).kind is PlanKind.SPLIT
    assert policy.choose(_load(SPLIT_LOAD.decoding)) == ONLY_DECODES
    assert policy.choose(SPLIT_LOAD).kind is PlanKind.SPLIT
    assert policy.choose(_load([], SPLIT_LOAD.prompts[0])) == Plan.mixed(MAX_TOKENS, NUM_SMS)


def test_splits_weighed_are_few_and_leave_decodes_an_eighth_to_a_half() -> None:
    splits = [(132 - decode, decode) for decode in range(8, 125, 4)]
    chosen = Adaptive(num_sms=132, splits=splits, max_tokens=64, latency=LatencyModel(132)).splits
    assert len(chosen) == len(set(chosen)) == 4
    assert [chosen[0][1], chosen[-1][1]] == [20, 64]
    assert _make(ExactModel(), [(8, 8), (1, 7)]).splits == (), "neither over-subscribed nor mostly decodes"


# ---- prompts alone


def _tight_load(slo: SLO | None, *prompts: Request, since: float = 0.0) -> Load:
    """128 decodes whose last tokens came so long ago: 7.6 ms, with two steps of them on their way."""
    decoding = _decoding(slo, num_tokens=200, seconds_each=0.006, now=10.0)
    decoding.last_token_time = 10.0 - since
    load = _load([decoding] * 128, now=10.0)
    return replace(load, prompts=prompts, chunks=tuple((0, len(prompt.prompt_token_ids)) for prompt in prompts))


def _tight(ttft: float | None = 0.028, *, age: float = 0.0, num_tokens: int = 200) -> Request:
    """A prompt that takes 6.0 ms alone and 12.4 ms beside the decodes."""
    return _request(None if ttft is None else SLO(ttft=ttft), num_tokens=num_tokens, arrival=10.0 - age)


def test_a_prompt_that_would_be_late_beside_decodes_has_a_step_of_its_own() -> None:
    policy = _make(ExactModel(), SPLITS)
    load = _tight_load(SLO(tpot=0.02), _tight())
    alone = policy.choose(load)
    assert alone == Plan.exclusive(Phase.PREFILL, NUM_SMS)
    assert policy.reason == "a prompt has no time for steps beside decodes"
    waiting = _tight_load(SLO(tpot=0.02), _tight(age=0.012), since=0.003)
    assert policy.choose(waiting) == alone, "while what was launched ends"
    assert policy.choose(replace(load, prompts=(), chunks=())) == ONLY_DECODES, "they go on at once"
    assert policy.choose(_tight_load(None, _tight(0.088, num_tokens=2000))) == alone


def test_a_prompt_whose_next_one_would_be_late_has_a_step_of_its_own_too() -> None:
    load = _tight_load(SLO(tpot=0.02), _tight(0.055))  # 28 ms beside the decodes, and whoever comes then as long again
    for is_scarce in (False, True):
        plan = _make(ExactModel(), SPLITS).choose(replace(load, is_memory_scarce=is_scarce))
        assert plan == Plan.exclusive(Phase.PREFILL, NUM_SMS)


def test_decodes_stand_still_for_several_steps_of_prompts_only_as_long_as_their_gap_allows() -> None:
    policy = _make(ExactModel(), SPLITS)
    prompts = [replace(_tight(), request_id=str(number)) for number in range(9)]
    kinds = []
    for number, prompt in enumerate(prompts):  # each comes when the step of the one before was launched
        load = replace(_tight_load(SLO(tpot=0.02), prompt), num_ending=number)
        kinds.append(policy.choose(load).kind)
        for _ in range(9):
            assert policy.choose(load).kind is kinds[-1], "nothing was launched in between"
    # 6.0 ms each behind those on their way, then 7.6 ms of decodes, in 36 ms; each prompt has 25.2 ms
    assert kinds[:4] == [PlanKind.EXCLUSIVE] * 4 and PlanKind.EXCLUSIVE not in kinds[4:]
    other = replace(_tight(), request_id="other")
    assert policy.choose(_tight_load(SLO(tpot=0.02), other)).kind is PlanKind.EXCLUSIVE, "none is on its way"
    later = replace(_tight_load(SLO(tpot=0.02), _tight()), num_ending=1, now=11.0)
    for request in (*later.prompts, *later.decoding):
        request.arrival_time += 1.0
        request.last_token_time = 11.0
        request.first_token_time = None if request in later.prompts else 11.0 - 0.006 * 199
    assert policy.choose(later).kind is PlanKind.EXCLUSIVE, "those have ended"


def _preempted() -> Request:
    request = _tight()
    request.first_token_time = 9.0
    return request


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(_tight_load(SLO(tpot=0.02), _tight(0.065)), id="in time beside them, and the next one too"),
        pytest.param(_tight_load(SLO(tpot=0.02), _tight(None)), id="no target"),
        pytest.param(_tight_load(SLO(tpot=0.02), _tight(age=0.02)), id="late alone too"),
        pytest.param(_tight_load(SLO(tpot=0.02), _preempted()), id="had its first token"),
        pytest.param(
            _tight_load(SLO(tpot=0.02), _tight(0.055, num_tokens=20), _tight(None)), id="the first is in time"
        ),
        pytest.param(_tight_load(SLO(gap=0.013), _tight()), id="decodes cannot wait"),
        pytest.param(_tight_load(SLO(tpot=0.02), _tight(), since=0.025), id="they have just waited"),
        pytest.param(_tight_load(None, _tight(0.0912, num_tokens=2100)), id="more than a step"),
    ],
)
def test_decodes_do_not_stand_still_in_vain(load: Load) -> None:
    assert _make(ExactModel(), SPLITS).choose(load).kind is PlanKind.MIXED


# ---- steady load


@pytest.mark.parametrize("slower", [1.0, 50.0])
@pytest.mark.parametrize("slo", [SLO(ttft=1.0, tpot=0.03), SLO(ttft=10.0, gap=0.5), None])
def test_the_plan_rests_in_steady_load(slo: SLO | None, slower: float) -> None:
    server = Server(num_clients=24, slo=slo, slower=slower)
    for _ in range(200):
        server.step()
    server.plans.clear()
    for _ in range(600):
        server.step()
    changes = sum(one != other for one, other in zip(server.plans, server.plans[1:], strict=False))
    assert changes <= len(server.plans) / 5


def test_budgets_stay_within_the_largest_step() -> None:
    rng = random.Random(0)
    for max_tokens in (1, 7, 100, 2048):
        policy = Adaptive(num_sms=NUM_SMS, splits=(), max_tokens=max_tokens, latency=LatencyModel(NUM_SMS))
        for _ in range(300):
            slo = rng.choice([None, SLO(tpot=10 ** rng.uniform(-3, 0)), SLO(gap=10 ** rng.uniform(-3, 0))])
            decoding = [_decoding(slo)] * rng.choice([0, 1, 30, 300])
            prompt = _request(SLO(ttft=10 ** rng.uniform(-2, 1)), num_tokens=rng.randint(1, 5000))
            load = _load(decoding, prompt, now=rng.random(), num_decode_steps=rng.randrange(20))
            plan = policy.choose(load)
            if plan.kind is PlanKind.MIXED:
                assert plan.token_budget is not None and 1 <= plan.token_budget <= max_tokens
                assert 1 <= plan.prompt_budget(len(decoding)) <= max_tokens


# ---- in the scheduler


class Recorder(Adaptive):
    """Remembers the kinds of its plans."""

    kinds: set[PlanKind]

    def choose(self, load: Load) -> Plan:
        plan = super().choose(load)
        self.kinds.add(plan.kind)
        return plan


def test_any_schedule_under_it_gives_the_same_tokens() -> None:
    kinds: set[PlanKind] = set()
    num_preemptions = 0
    for seed in range(40):
        rng = random.Random(seed)
        latency = LatencyModel(2)
        if seed % 2:
            for work in (StepWork(1, 1, 8, 36), StepWork(1, 1, 0, 0, 4, 40)):
                latency.calibrate(work, rng.choice([1e-3, 0.01, 0.1]))
        max_tokens = rng.choice([1, 3, 12])
        policy = Recorder(num_sms=2, splits=((1, 1),), max_tokens=max_tokens, latency=latency)
        policy.kinds = kinds
        driver = Driver(
            num_blocks=rng.choice([22, 40]),
            block_size=2,
            max_prefill_tokens=max_tokens,
            policy=policy,
            latency=latency,
            steps_ahead=rng.randint(0, 1),
        )
        for _ in range(8):
            tightness = 10 ** rng.uniform(-3, 1)
            slo = rng.choice([None, SLO(ttft=tightness, tpot=tightness / 10), SLO(tpot=0.011), SLO(gap=tightness)])
            prompt = [rng.randrange(50) for _ in range(rng.randint(1, 24))]
            driver.submit(prompt, rng.randint(1, 12), slo=slo, n=rng.choice([1, 1, 2]))
            driver.random_walk(rng, rng.randint(0, 30), driver.scheduler.check_integrity)
        driver.finish_all()
        assert_outputs(driver)
        driver.assert_clean()
        num_preemptions += sum(request.num_preemptions for request in driver.requests)
    assert kinds == set(PlanKind)
    assert num_preemptions > 0

"""MIXED with a budget by the model of step times: steps stay within the limit, prompts get what it leaves."""

from __future__ import annotations

import random

import pytest

from semipd.config import SLO, MixedPolicy, Plan
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policies import make_policy
from semipd.sched.policy import Load, Policy
from tests.sched.oracle import Driver

NUM_SMS = 4
MAX_TOKENS = 2048


def _make(latency: LatencyModel, slo: SLO | None = None) -> Policy:
    return make_policy(
        MixedPolicy(token_budget=None),
        num_sms=NUM_SMS,
        splits=(),
        default_split=None,
        max_prefill_tokens=MAX_TOKENS,
        slo=slo,
        latency=latency,
    )


def _seconds(work: StepWork, *, slower: float = 1.0) -> float:
    """A device that takes 5 ms for the weights and 30 us a row, and reads contexts and pairs at a cost."""
    num_rows = work.num_decodes + work.num_prompt_tokens
    return slower * (max(5e-3, 30e-6 * num_rows) + 40e-9 * work.context_tokens + 0.5e-9 * work.prompt_pairs)


class Server:
    """Plays steps of a policy: decodes at contexts that grow beside prompts that never end."""

    def __init__(self, slo: SLO | None = None, *, slower: float = 1.0, noise: float = 0.03) -> None:
        self.latency = LatencyModel(NUM_SMS)
        self.policy = _make(self.latency, slo)
        self.slower = slower
        self.plans: list[Plan] = []
        self._noise = noise
        self._rng = random.Random(0)
        self._position = 0

    def step(self, num_decodes: int, context: int = 1000, waiting: int = 8192) -> tuple[int, float]:
        """Prompt tokens and seconds of one step."""
        start = self._position % waiting
        load = Load(
            chunks=((start, waiting - start),) if waiting else (),
            num_decodes=num_decodes,
            context_tokens=num_decodes * context,
        )
        plan = self.policy.choose(load)
        self.plans.append(plan)
        num_tokens = min(plan.prompt_budget(num_decodes), waiting - start)
        self._position += num_tokens
        work = StepWork.of(
            NUM_SMS, chunks=[(start, num_tokens)], num_decodes=num_decodes, context_tokens=num_decodes * context
        )
        seconds = _seconds(work, slower=self.slower) * self._rng.lognormvariate(0, self._noise)
        self.latency.observe(work, seconds)
        return num_tokens, seconds


@pytest.mark.parametrize("slower", [0.3, 1.0, 50.0])
@pytest.mark.parametrize(("slo", "limit"), [(SLO(gap=0.03), 0.03), (SLO(tpot=0.02, gap=0.05), 0.02), (None, 0.1)])
def test_steps_stay_within_the_target_and_use_it(slo: SLO | None, limit: float, slower: float) -> None:
    server = Server(slo, slower=slower)
    for _ in range(40):
        server.step(32)
    steps = [server.step(32) for _ in range(300)]
    times = [seconds for _, seconds in steps]
    floor = _seconds(StepWork.of(NUM_SMS, num_decodes=32, context_tokens=32_000), slower=slower)
    assert sum(seconds > limit for seconds in times) <= 0.02 * len(times) or floor > 0.8 * limit
    assert all(num_tokens > 0 for num_tokens, _ in steps), "prompts progress whatever the target"
    fits = max(
        n
        for n in range(1, MAX_TOKENS)
        if n == 1
        or _seconds(StepWork.of(NUM_SMS, chunks=[(4096, n)], num_decodes=32, context_tokens=32_000), slower=slower)
        < limit
    )
    if fits < MAX_TOKENS - 40:
        assert sum(num_tokens for num_tokens, _ in steps) / len(steps) >= 0.65 * fits


def test_first_chunks_are_small_until_steps_were_measured() -> None:
    server = Server(SLO(gap=1.0))
    tokens = [server.step(8)[0] for _ in range(12)]
    assert tokens[0] <= 64
    assert all(later <= 1.5 * max(64, before) for before, later in zip(tokens, tokens[1:], strict=False))
    assert tokens[-1] > 1000


def test_after_steady_load_a_chunk_is_no_leap() -> None:
    server = Server(SLO(gap=0.03), slower=4.0)
    for _ in range(300):
        server.step(8, waiting=8192)
    usual = server.step(8)[0]
    server.policy.choose(Load(chunks=((0, 30),)))  # without decodes the plan is for whole prompts
    server._position = 0
    assert server.step(8)[0] <= 1.5 * usual + 8


def test_a_slower_device_is_noticed() -> None:
    server = Server(SLO(gap=0.03))
    for _ in range(60):
        server.step(32)
    server.slower = 2.0
    for _ in range(30):
        server.step(32)
    assert sum(server.step(32)[1] > 0.03 for _ in range(100)) <= 5


def test_the_plan_rests_in_steady_load() -> None:
    server = Server(SLO(gap=0.03))
    for _ in range(60):
        server.step(32)
    first = len(server.plans)
    for index in range(400):
        server.step(32, context=1000 + index)
    plans = server.plans[first:]
    assert sum(one != other for one, other in zip(plans, plans[1:], strict=False)) <= len(plans) / 5


def test_without_decodes_prompts_have_whole_steps_and_without_prompts_the_plan_stays() -> None:
    policy = _make(LatencyModel(NUM_SMS))
    assert policy.choose(Load(chunks=((0, 100),))) == Plan.mixed(MAX_TOKENS, NUM_SMS)
    plan = policy.choose(Load(chunks=((0, 4000),), num_decodes=4, context_tokens=400))
    assert plan.token_budget is not None and plan.token_budget <= 68
    assert policy.choose(Load(num_decodes=4, context_tokens=400)) is plan


def test_any_schedule_under_it_gives_the_same_tokens() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        latency = LatencyModel(2)
        policy = make_policy(
            MixedPolicy(token_budget=None),
            num_sms=2,
            splits=(),
            default_split=None,
            max_prefill_tokens=12,
            slo=None,
            latency=latency,
        )
        driver = Driver(num_blocks=30, block_size=2, max_prefill_tokens=12, policy=policy, latency=latency)
        driver.serve_random_load(rng)

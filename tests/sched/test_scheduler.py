"""The scheduler against an integer model that notices every wrong read: any order, any pool, any abort."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.config import SLO, Phase, Plan, PlanKind
from semipd.errors import QueueFull
from semipd.memory.block_allocator import BlockAllocator
from semipd.memory.prefix_cache import block_keys
from semipd.request import FinishReason, Request, RequestStatus
from semipd.sched import residency
from semipd.sched.baselines import Cadence, Exclusive, Mixed, Static
from semipd.sched.policy import Load, Policy, Unobserving
from semipd.sched.waiting import LATE_PATIENCE
from tests.sched.oracle import VOCAB, Driver, assert_outputs, expected_output


class Restless(Unobserving):
    """Any plan at any step border, over-subscribed ones too."""

    def __init__(self) -> None:
        self._rng = random.Random(0)
        self._plans = [Plan.split(1, 1), Plan.split(2, 2), Plan.mixed(5, 2)]
        self._plans += [Plan.exclusive(phase, 2) for phase in Phase]

    def choose(self, load: Load) -> Plan:
        plan = self._rng.choice(self._plans)
        if plan.kind is PlanKind.EXCLUSIVE:  # not of the lane that has nothing to do
            return Plan.exclusive(Phase.PREFILL if load.has_prefill else Phase.DECODE, 2)
        return plan


POLICIES: dict[str, Callable[[], Policy]] = {
    "static": lambda: Static(2, (1, 1)),
    "exclusive": lambda: Exclusive(2),
    "mixed": lambda: Mixed(2, 12),
    "cadence": lambda: Cadence(2, 3),
    "restless": Restless,
}


def _prompt(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block_size", [1, 2, 16])
@given(seed=st.integers(0, 2**32), chunk=st.integers(1, 40), spare=st.integers(0, 60), caching=st.booleans())
def test_any_schedule_gives_the_same_tokens(
    policy: str, block_size: int, seed: int, chunk: int, spare: int, caching: bool
) -> None:
    rng = random.Random(seed)
    num_blocks = -(-(24 + 12) // block_size) + 1 + spare // block_size  # the longest request fits, barely or well
    driver = Driver(
        num_blocks=num_blocks,
        block_size=block_size,
        max_prefill_tokens=chunk,
        max_num_seqs=rng.randint(1, 5),
        steps_ahead=rng.randint(0, 1),
        prefill_steps_ahead=rng.randint(0, 1),
        caching=caching,
        policy=POLICIES[policy](),
    )
    shared = _prompt(rng, 1, 16)
    for _ in range(rng.randint(1, 8)):
        prompt = (
            shared[: rng.randint(1, len(shared))] + _prompt(rng, 0, 8) if rng.random() < 0.6 else _prompt(rng, 1, 24)
        )
        driver.submit(prompt, rng.randint(1, 12), priority=rng.randint(0, 1), n=rng.choice([1, 1, 3]))
        driver.random_walk(rng, rng.randint(0, 30), driver.scheduler.check_integrity)
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()


@pytest.mark.parametrize("block_size", [1, 2, 16])
@given(seed=st.integers(0, 2**32), window=st.integers(1, 20))
def test_sliding_window_frees_what_no_step_reads(block_size: int, seed: int, window: int) -> None:
    rng = random.Random(seed)
    driver = Driver(
        num_blocks=-(-60 // block_size) + 2,
        block_size=block_size,
        window=window,
        max_prefill_tokens=7,
        prefill_steps_ahead=seed % 2,
    )
    for _ in range(4):
        driver.submit(_prompt(rng, 1, 30), rng.randint(1, 20))
        driver.random_walk(rng, 20, driver.scheduler.check_integrity)
    driver.finish_all()
    assert_outputs(driver, window=window)
    driver.assert_clean()


def test_sliding_window_keeps_only_the_window_resident() -> None:
    driver = Driver(num_blocks=40, block_size=2, window=6, max_prefill_tokens=8, caching=False)
    driver.submit(list(range(60)), 10)
    most = 0
    for _ in range(200):
        for phase in Phase:
            driver.launch(phase)
            driver.commit(phase)
        request = driver.requests[0]
        if request.status is RequestStatus.DECODING:
            most = max(most, driver.num_blocks - driver.allocator.num_free_blocks)
    assert driver.requests[0].is_finished
    assert most <= 6 // 2 + 3


@given(seed=st.integers(0, 2**32), policy=st.sampled_from(sorted(POLICIES)))
def test_aborts_anywhere_leak_nothing(seed: int, policy: str) -> None:
    rng = random.Random(seed)
    driver = Driver(num_blocks=24, block_size=2, max_num_seqs=4, policy=POLICIES[policy]())

    def abort_one() -> None:
        driver.scheduler.finish(rng.choice(driver.requests), FinishReason.ABORT)
        driver.scheduler.check_integrity()

    for _ in range(6):
        driver.submit(_prompt(rng, 1, 20), rng.randint(1, 10), n=rng.choice([1, 2]))
        driver.random_walk(rng, 15, abort_one)
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()


@pytest.mark.parametrize("policy", POLICIES)
def test_abort_at_every_step_border_and_inside_every_step(policy: str) -> None:
    prompt = list(range(11))
    for abort_at in range(60):
        driver = Driver(num_blocks=16, block_size=2, max_prefill_tokens=4, policy=POLICIES[policy]())
        victim, other = driver.submit(prompt, 9)[0], driver.submit(prompt[:5], 9)[0]
        actions = [lambda p=p, a=a: a(p) for a in (driver.launch, driver.run, driver.commit) for p in Phase]
        for index in range(60):
            if index == abort_at:
                driver.scheduler.finish(victim, FinishReason.ABORT)
                driver.scheduler.check_integrity()
            actions[index % len(actions)]()
        driver.finish_all()
        assert other.output_token_ids == expected_output(prompt[:5], 9)
        driver.assert_clean()


def test_two_prompts_that_half_fill_the_pool_never_deadlock() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        driver = Driver(num_blocks=13, block_size=2, max_num_seqs=4, max_prefill_tokens=3, caching=bool(seed % 2))
        driver.submit(_prompt(rng, 12, 12), 12)
        driver.submit(_prompt(rng, 12, 12), 12)
        driver.random_walk(rng, 40)
        driver.finish_all()
        assert_outputs(driver)
        driver.assert_clean()


def test_the_oldest_request_is_never_preempted() -> None:
    driver = Driver(num_blocks=14, block_size=1, max_num_seqs=4, caching=False)
    for _ in range(4):
        driver.submit([1, 2], 10)
    driver.finish_all()
    assert driver.requests[0].num_preemptions == 0
    assert sum(r.num_preemptions for r in driver.requests) > 0
    assert_outputs(driver)


def test_a_prompt_is_cut_into_chunks_of_the_budget() -> None:
    driver = Driver(max_prefill_tokens=5)
    driver.submit(list(range(12)), 2)
    sizes = []
    while not driver.requests[0].is_finished:
        if driver.launch(Phase.PREFILL):
            sizes.append(driver.in_flight[Phase.PREFILL][0][0].num_tokens)
        driver.commit(Phase.PREFILL)
        driver.launch(Phase.DECODE)
        driver.commit(Phase.DECODE)
    assert sizes == [5, 5, 2]


def test_a_prefix_hit_shortens_the_prefill_and_always_leaves_a_token() -> None:
    driver = Driver(block_size=4, max_prefill_tokens=64)
    prompt = list(range(16))
    driver.submit(prompt, 1)
    driver.finish_all()
    second = driver.submit(prompt, 1)[0]
    assert driver.launch(Phase.PREFILL)
    (entry,) = driver.in_flight[Phase.PREFILL][0][0].prefill
    assert (entry.start, len(entry.token_ids)) == (12, 4)
    assert second.num_cached_tokens == 12
    driver.finish_all()
    assert_outputs(driver)


def test_samples_of_a_prompt_share_its_prefill() -> None:
    driver = Driver(block_size=4, max_prefill_tokens=64)
    first, *others = driver.submit(list(range(17)), 4, n=3)
    driver.finish_all()
    assert first.num_cached_tokens == 0
    assert [r.num_cached_tokens for r in others] == [16, 16]
    driver.assert_clean()


def test_samples_whose_first_is_aborted_still_run() -> None:
    driver = Driver()
    first, second = driver.submit([1, 2, 3], 4, n=2)
    driver.scheduler.finish(first, FinishReason.ABORT)
    driver.finish_all()
    assert second.output_token_ids == expected_output([1, 2, 3], 4)
    driver.assert_clean()


def test_priority_then_slack_then_arrival_order_prompts() -> None:
    driver = Driver(max_num_seqs=1, max_prefill_tokens=4)
    late = driver.submit([1], 1)[0]
    urgent = driver.submit([2], 1, priority=-1)[0]
    driver.finish_all()
    order = [r for events in driver.events for r in events.finished]
    assert order == [urgent, late]


def test_slack_orders_prompts_by_deadline_less_their_work() -> None:
    driver = Driver(max_num_seqs=1, max_prefill_tokens=64)
    for _ in range(5):
        driver.submit([9] * 64, 1)
        driver.finish_all()  # teaches 0.01 s for 64 tokens
    requests: list[Request] = []
    for prompt, ttft in (([1], 0.5), ([2] * 180, 0.52), ([3], None)):
        request = driver.submit(prompt, 1)[0]
        driver.scheduler.finish(request, FinishReason.ABORT)
        request = Request(
            request_id=f"slo{len(requests)}", prompt_token_ids=tuple(prompt), params=request.params,
            arrival_time=driver.now, seed=0, max_tokens=1, slo=None if ttft is None else SLO(ttft=ttft),
        )  # fmt: skip
        requests.append(request)
        driver.requests.append(request)
    driver.scheduler.add(requests)
    driver.finish_all()
    order = [r.request_id for events in driver.events for r in events.finished if r.request_id.startswith("slo")]
    assert order == ["slo1", "slo0", "slo2"]


def test_a_prompt_of_a_mixed_step_decodes_in_the_next_one_before_the_host_knows_its_token() -> None:
    driver = Driver(policy=Mixed(2, 12))
    driver.submit([1, 2, 3], 3)
    first, last = driver.submit([4], 1)[0], driver.submit([5] * 4, 2)[0]
    assert driver.launch(Phase.DECODE)
    assert driver.launch(Phase.DECODE)
    (prompts, _), (decodes, _) = driver.in_flight[Phase.DECODE]
    assert [entry.samples for entry in prompts.prefill] == [True] * 3
    assert len(decodes.decode_slots) == 2, "of the first and the last; the second wants one token"
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()
    assert last.worst_gap == pytest.approx(0.01)
    assert first.worst_gap is None


def test_a_request_knows_what_of_its_prompt_is_cached_when_it_comes() -> None:
    driver = Driver()
    prompt = list(range(11))
    first = driver.submit(prompt, 1)[0]
    driver.finish_all()
    again, other = driver.submit(prompt, 1)[0], driver.submit([50, *prompt], 1)[0]
    assert [request.num_tokens_to_find for request in (first, again, other)] == [0, 8, 0]
    driver.finish_all()
    assert again.num_cached_tokens == 8
    assert_outputs(driver)
    driver.assert_clean()


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_is_hashed_once_and_outside_the_lock(monkeypatch: pytest.MonkeyPatch, caching: bool) -> None:
    def spy(token_ids: Sequence[int], block_size: int, *, keys: list[bytes], **options: Any) -> None:
        num_before, lock = len(keys), driver.scheduler._changed
        block_keys(token_ids, block_size, keys=keys, **options)
        if is_free := lock.acquire(blocking=False):
            lock.release()
        if len(keys) > num_before:
            hashed.append((len(keys) - num_before, is_free))

    hashed: list[tuple[int, bool]] = []
    driver = Driver(caching=caching, max_queued=4)
    monkeypatch.setattr(residency, "block_keys", spy)
    requests = driver.submit(list(range(18)), 4, n=4)
    assert hashed == ([(4, True)] if caching else [])
    with pytest.raises(QueueFull):
        driver.submit([1] * 9, 1)
    refused = driver.requests.pop()
    driver.finish_all()
    assert [r.num_cached_tokens for r in requests] == ([0, 16, 16, 16] if caching else [0] * 4)
    del hashed[:]
    driver.scheduler.add([refused])  # as the one who waits for space does again and again
    driver.requests.append(refused)
    assert hashed == [] and len(refused.block_keys) == (2 if caching else 0)
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()


def test_samples_own_their_keys() -> None:
    driver = Driver(block_size=2, max_prefill_tokens=64)
    prompt = [1, 2, 3, 4, 5]
    first, second = driver.submit(prompt, 3, n=2)
    driver.scheduler._residency.hash_prompt(first)
    first.block_keys += [b"of its output"]
    assert len(second.block_keys) == 2
    late = Request(
        request_id="late", prompt_token_ids=first.prompt_token_ids, params=first.params, arrival_time=0.0, seed=0,
        max_tokens=1, leader=first,
    )  # fmt: skip
    driver.scheduler._residency.hash_prompt(late)
    assert late.block_keys == second.block_keys, "what its leader generated is no part of its prompt"


def test_a_full_queue_says_so_and_takes_nothing() -> None:
    driver = Driver(max_queued=2)
    driver.submit([1], 1)
    with pytest.raises(QueueFull, match="1 requests wait and max_queued_requests is 2"):
        driver.submit([2], 1, n=2)
    assert driver.scheduler.statistics().num_waiting == 1


def test_one_step_ahead_drops_the_surplus_token() -> None:
    prompt = [5, 6, 7]
    stop = expected_output(prompt, 6)[3]
    driver = Driver(steps_ahead=1)
    request = driver.submit(prompt, 20, stop=[stop])[0]
    driver.finish_all()
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids == expected_output(prompt, 4)
    driver.assert_clean()


@pytest.mark.parametrize(
    ("policy", "shares"),
    [
        (Static(2, (1, 1)), {Phase.PREFILL: {1, 2}, Phase.DECODE: {1, 2}}),
        (Exclusive(2), {Phase.PREFILL: {2}, Phase.DECODE: {2}}),
        (Mixed(2, 8), {Phase.DECODE: {2}}),
    ],
)
def test_plans_are_taken_up_at_step_borders(policy: Policy, shares: dict[Phase, set[int]]) -> None:
    driver = Driver(policy=policy, max_prefill_tokens=4)
    seen: dict[Phase, set[int]] = {}
    driver.submit(list(range(10)), 120)
    for step in range(400):
        if step in (0, 60):
            driver.submit(list(range(20)), 4)
        for phase in Phase:
            if driver.launch(phase):
                seen.setdefault(phase, set()).add(driver.in_flight[phase][-1][0].num_sms)
        driver.commit(Phase.DECODE)
        if step % 3 == 0:
            driver.commit(Phase.PREFILL)
    driver.finish_all()
    assert seen == shares
    assert_outputs(driver)


@pytest.mark.parametrize(("token_budget", "chunk"), [(3, 1), (8, 1), (17, 3)])
def test_a_prompt_progresses_beside_more_decodes_than_the_token_budget(token_budget: int, chunk: int) -> None:
    driver = Driver(policy=Mixed(2, token_budget), num_blocks=400, max_num_seqs=20, steps_ahead=0)
    others = [driver.submit([index], 40)[0] for index in range(17)]
    while any(request.status is not RequestStatus.DECODING for request in others):
        assert driver.launch(Phase.DECODE)
        driver.commit(Phase.DECODE)
    late = driver.submit(list(range(9)), 4)[0]
    sizes = []
    while late.status is not RequestStatus.DECODING:
        assert driver.launch(Phase.DECODE)
        batch = driver.in_flight[Phase.DECODE][0][0]
        assert len(batch.decode_slots) == len(others)
        sizes.append(batch.num_tokens - len(others))
        driver.commit(Phase.DECODE)
    assert sizes == [chunk] * (9 // chunk)
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()


def test_the_oracle_notices_a_stale_block() -> None:
    driver = Driver(block_size=2, caching=False)
    request = driver.submit([1, 2, 3], 8)[0]
    while request.status is not RequestStatus.DECODING:
        driver.launch(Phase.PREFILL)
        driver.commit(Phase.PREFILL)
    driver.pool.tables[0].reverse()  # a planted bug: two rows of the block table swapped
    with pytest.raises(AssertionError):
        driver.finish_all()
        assert_outputs(driver)


def test_a_request_that_returns_to_another_slot_decodes_there() -> None:
    driver = Driver(block_size=1, max_prefill_tokens=16, steps_ahead=0, caching=False)
    victim = driver.submit([1, 2, 3], 12, priority=1)[0]
    while len(victim.output_token_ids) < 6:
        for phase in Phase:
            driver.launch(phase)
            driver.commit(phase)
    first_slot = victim.slot
    driver.scheduler._queues.preempt(victim)  # a full pool does this only in a rare order of events
    driver.submit([4] * 5, 1)  # takes the slot, and ends without a decode step: the next one is the victim's again
    driver.launch(Phase.PREFILL)
    assert victim.slot not in (None, first_slot)
    driver.finish_all()
    assert_outputs(driver)
    driver.assert_clean()


def test_cadence_runs_so_many_decode_steps_between_two_prefill_steps() -> None:
    driver = Driver(num_blocks=64, block_size=4, max_prefill_tokens=4, policy=Cadence(2, 3))
    driver.submit([1, 2, 3], 40)
    driver.submit(list(range(40)), 2)
    launched: list[Phase] = []
    for _ in range(60):
        launched += [phase for phase in Phase if driver.launch(phase)]
        for phase in Phase:
            driver.commit(phase)
    prefills = [index for index, phase in enumerate(launched) if phase is Phase.PREFILL][2:]
    assert len(prefills) > 5
    assert {later - earlier - 1 for earlier, later in zip(prefills, prefills[1:], strict=False)} == {3}
    driver.finish_all()
    assert_outputs(driver)


@pytest.mark.parametrize("slo", [SLO(ttft=0.2), None])
def test_no_resident_prompt_starves_beside_short_ones(slo: SLO | None) -> None:
    driver = Driver(num_blocks=4096, max_num_seqs=8, max_prefill_tokens=16, policy=Mixed(2, 16), caching=False)
    longs = [driver.submit([1] * 2000, 2, slo=slo)[0] for _ in range(6)]
    shorts: list[Request] = []
    while driver.now < 90.0:
        while len(shorts) < 14:
            shorts += driver.submit([len(driver.requests) % 50] * 8, 1, slo=SLO(ttft=5.0))
        for action in (driver.launch, driver.run, driver.commit):
            action(Phase.DECODE)
        shorts = [r for r in shorts if not r.is_finished]
        driver.requests.clear()
    assert all(r.is_finished for r in longs), [r.num_tokens - r.num_scheduled_tokens for r in longs]


def test_late_prompts_that_are_resident_keep_out_nobody_who_is_in_time() -> None:
    driver = Driver(num_blocks=4096, max_num_seqs=8, max_prefill_tokens=16, policy=Mixed(2, 16), caching=False)
    late = [driver.submit([1] * 2000, 2, slo=SLO(ttft=1e-3))[0] for _ in range(4)]
    for action in (driver.launch, driver.run, driver.commit):
        action(Phase.DECODE)
    num_resident = driver.scheduler.statistics().num_running[Phase.PREFILL]
    assert all(r.is_late for r in late if r.status is RequestStatus.PREFILLING) and 0 < num_resident < 4
    in_time = driver.submit([2] * 8, 2, slo=SLO(ttft=5.0))[0]
    driver.launch(Phase.DECODE)
    assert in_time.num_scheduled_tokens == 8, "it passes them at once"
    assert driver.scheduler.statistics().num_running[Phase.PREFILL] == num_resident + 1, "and no late one comes with it"
    driver.finish_all()
    assert_outputs(driver)


def _step(driver: Driver) -> None:
    for action in (driver.launch, driver.run, driver.commit):
        action(Phase.DECODE)


def test_late_prompts_leave_memory_for_those_in_time_until_their_age_has_them_first() -> None:
    driver = Driver(num_blocks=4096, max_num_seqs=8, max_prefill_tokens=16, policy=Mixed(2, 16), caching=False)
    late = [driver.submit([1] * 70, 200, slo=SLO(ttft=1e-3))[0] for _ in range(9)]

    def run(num_steps: int) -> int:
        for _ in range(num_steps):
            _step(driver)
        return sum(r.slot is not None for r in late)

    assert run(40) == 7 and all(r.is_late for r in late)
    in_time = driver.submit([2] * 8, 2, slo=SLO(ttft=driver.now + 5.0))[0]
    assert run(1) == 7 and in_time.slot is not None, "it comes in at once"
    assert run(4) == 7 and in_time.is_finished
    driver.now += LATE_PATIENCE
    assert run(2) == 8, "nobody waits for ever"
    driver.finish_all()
    assert_outputs(driver)


def test_late_prompts_that_are_kept_out_stand_in_nobodys_way() -> None:
    driver = Driver(num_blocks=4096, max_num_seqs=16, max_prefill_tokens=64, policy=Mixed(2, 64), caching=False)
    for index in range(14):
        driver.submit([index] * 4, 400)
    while driver.scheduler.statistics().num_running[Phase.DECODE] < 14:
        _step(driver)
    driver.now += 1.0
    late = driver.submit([20] * 8, 4, slo=SLO(ttft=1e-3))[0]
    _step(driver)
    assert late.is_late and late.slot is None
    other = driver.submit([21] * 8, 2)[0]
    _step(driver)
    assert other.slot is not None and late.slot is None
    driver.finish_all()
    assert_outputs(driver)


def test_late_prompts_leave_an_eighth_of_the_blocks_unless_nothing_runs() -> None:
    driver = Driver(num_blocks=64, max_num_seqs=16, max_prefill_tokens=64, policy=Mixed(2, 64), caching=False)
    alone = driver.submit([1] * 240, 2, slo=SLO(ttft=1e-3))[0]  # 61 blocks
    _step(driver)
    assert alone.is_late and alone.slot is not None
    while not alone.is_finished:
        _step(driver)
    running = driver.submit([2] * 8, 40)[0]
    _step(driver)
    late = driver.submit([3] * 220, 2, slo=SLO(ttft=1e-3))[0]  # 56 blocks of 64
    _step(driver)
    assert running.slot is not None and late.is_late and late.slot is None
    driver.finish_all()
    assert late.is_finished
    assert_outputs(driver)


def test_a_late_request_that_was_preempted_returns_as_soon_as_it_fits() -> None:
    driver = Driver(num_blocks=64, max_num_seqs=8, max_prefill_tokens=256, policy=Mixed(2, 256), caching=False)
    late = driver.submit([3] * 100, 40, slo=SLO(ttft=1e-3))[0]
    _step(driver)
    _step(driver)
    assert late.is_late and late.first_token_time is not None
    driver.submit([4] * 130, 60)
    _step(driver)
    driver.scheduler._queues.preempt(late)
    _step(driver)
    assert late.slot is not None, "26 of 31 free blocks, 8 of which are kept from late ones"
    driver.finish_all()
    assert_outputs(driver)


def test_samples_that_find_their_leaders_blocks_are_not_late() -> None:
    driver = Driver(num_blocks=4096, max_num_seqs=8, max_prefill_tokens=2048, policy=Mixed(2, 2048))
    requests = driver.submit([1] * 1000, 2, n=7, slo=SLO(ttft=0.5))
    driver.finish_all()
    assert not any(request.is_late for request in requests)
    assert [request.num_tokens_to_find for request in requests[1:]] == [996] * 6
    assert_outputs(driver)


def test_a_policy_knows_that_memory_is_scarce() -> None:
    seen: list[bool] = []

    class Seeing(Mixed):
        def choose(self, load: Load) -> Plan:
            seen.append(load.is_memory_scarce)
            return super().choose(load)

    driver = Driver(num_blocks=4096, max_num_seqs=8, policy=Seeing(2, 16), caching=False)
    driver.submit([1] * 4, 4)
    _step(driver)
    assert not any(seen)
    for index in range(6):
        driver.submit([index] * 2, 4)
    _step(driver)
    assert seen[-1]
    driver.finish_all()


def test_memory_is_scarce_with_an_eighth_of_slots_or_blocks() -> None:
    allocator = BlockAllocator(64, 4)
    holder = residency.Residency(allocator, num_slots=16, window=None)
    block_ids = allocator.allocate(55)
    assert block_ids is not None and not holder.is_scarce
    more = allocator.allocate(1)
    assert more is not None and holder.is_scarce
    allocator.free(more)
    requests = [Driver().submit([1], 1)[0] for _ in range(14)]
    for request in requests:
        assert not holder.is_scarce
        allocator.free(block_ids[:4])
        del block_ids[:4]
        assert holder.try_admit(request, reserve=0)
    assert holder.is_scarce, "two of sixteen slots are left"
    for request in requests:
        holder.free_blocks(request, after_step=None)
        holder.free_slot(request)
    assert not holder.is_scarce


def test_a_prompt_in_two_launched_steps_decodes_once_a_step() -> None:
    driver = Driver(max_prefill_tokens=4, policy=Mixed(2, 4), steps_ahead=2)
    driver.submit(range(8), 6)
    assert driver.launch(Phase.DECODE) and driver.launch(Phase.DECODE)  # both halves of the prompt
    driver.launch(Phase.DECODE)
    driver.finish_all()
    assert_outputs(driver)


def test_one_token_steps_admit_one_prompt_at_a_time() -> None:
    driver = Driver(max_prefill_tokens=1, max_num_seqs=8, policy=Mixed(2, 1))
    for _ in range(8):
        driver.submit(range(6), 1)
    driver.launch(Phase.DECODE)
    assert driver.scheduler.statistics().num_running[Phase.PREFILL] <= 2


def test_the_lane_of_prompts_changes_no_plan_in_the_middle_of_a_mixed_step() -> None:
    policy = Restless()
    asked: list[Load] = []

    class Asked(Mixed):
        def choose(self, load: Load) -> Plan:
            asked.append(load)
            return policy.choose(load) if driver.in_flight[Phase.DECODE] else super().choose(load)

    driver = Driver(policy=Asked(2, 12), max_prefill_tokens=8)
    driver.submit(range(30), 3)
    assert driver.launch(Phase.DECODE)
    plan, num_asked = driver.scheduler.statistics().plan, len(asked)
    driver.submit([7] * 5, 2)  # which wakes both lanes
    for _ in range(9):
        assert not driver.launch(Phase.PREFILL)
    assert len(asked) == num_asked and driver.scheduler.statistics().plan == plan
    driver.finish_all()
    assert_outputs(driver)


def test_requests_that_come_in_a_mixed_step_leave_the_queue() -> None:
    driver = Driver(policy=Mixed(2, 12), max_prefill_tokens=64, max_queued=2, max_num_seqs=8, num_blocks=256)
    driver.submit(range(8), 4)
    assert driver.launch(Phase.DECODE)
    for number in range(5):
        driver.submit([number] * 2, 2)
        assert not driver.launch(Phase.PREFILL)
    assert driver.scheduler.statistics().num_waiting == 0
    driver.finish_all()
    assert_outputs(driver)

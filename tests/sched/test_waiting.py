"""Who is next: slack to the TTFT deadline, late requests behind those in time, short prompts before long ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

import pytest

from semipd.config import SLO
from semipd.request import Request, SamplingParams
from semipd.sched.waiting import LATE_PATIENCE, PATIENCE, WaitingQueue, order_prompts

PER_TOKEN = 1e-3  # seconds


def _request(
    name: str, *, arrival: float = 0.0, ttft: float | None = None, num_tokens: int = 1, priority: int = 0
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=(1,) * num_tokens,
        params=SamplingParams(priority=priority),
        arrival_time=arrival,
        seed=0,
        max_tokens=1,
        slo=None if ttft is None else SLO(ttft=ttft),
    )


def _queue(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    queue.seconds_per_token = PER_TOKEN
    for request in requests:
        request.urgency = queue.urgency(request)
        queue.push(request)
    return queue


def _head(queue: WaitingQueue, now: float, *, with_leftover: bool = True) -> Request | None:
    nominee = queue.peek(now, with_leftover=with_leftover)
    return None if nominee is None else nominee.request


def _drain(queue: WaitingQueue, now: float) -> list[str]:
    names = []
    queue.sort_out(now)
    while (nominee := queue.peek(now)) is not None:
        queue.pop(nominee.request)
        names.append(nominee.request.request_id)
    assert len(queue) == 0
    return names


def test_the_latest_start_that_keeps_the_deadline_decides() -> None:
    short = _request("short", ttft=0.5)
    long = _request("long", ttft=0.6, num_tokens=200)
    patient = _request("patient")
    assert _drain(_queue(patient, short, long), now=0.1) == ["long", "short", "patient"]


def test_priority_goes_before_slack() -> None:
    tight = _request("tight", ttft=0.1)
    first = _request("first", priority=-1)
    assert _drain(_queue(tight, first), now=0.0) == ["first", "tight"]


def test_late_requests_go_behind_those_in_time_in_their_order() -> None:
    requests = [_request(f"r{index}", arrival=0.1 * index, ttft=0.5) for index in range(8)]
    assert _drain(_queue(*requests), now=0.74) == ["r3", "r4", "r5", "r6", "r7", "r0", "r1", "r2"]
    assert [request.is_late for request in requests] == [True] * 3 + [False] * 5


def test_a_prompt_that_takes_longer_than_is_left_is_late() -> None:
    long = _request("long", ttft=0.5, num_tokens=400)
    assert _drain(_queue(long, _request("short", ttft=0.5)), now=0.2) == ["short", "long"]


def test_the_longest_yields_to_those_that_it_would_make_late() -> None:
    long = _request("long", ttft=0.5, num_tokens=300)
    shorts = [_request(f"r{index}", arrival=0.01 * index, ttft=0.5, num_tokens=90) for index in range(3)]
    queue = _queue(long, *shorts)
    assert _drain(queue, now=0.03) == ["r0", "r1", "r2", "long"]
    assert not long.is_late, "it is in time if it turns out faster than expected"


def test_who_yielded_is_first_again_if_the_others_are_gone() -> None:
    long = _request("long", ttft=0.5, num_tokens=300)
    shorts = [_request(f"r{index}", arrival=0.01 * index, ttft=0.5, num_tokens=90) for index in range(3)]
    queue = _queue(long, *shorts)
    queue.sort_out(0.03)
    assert _head(queue, 0.03) is shorts[0]
    for short in shorts[:2]:
        queue.discard(short)
    queue.sort_out(0.03)
    assert _head(queue, 0.03) is long
    queue.seconds_per_token *= 20
    queue.sort_out(0.0)
    queue.seconds_per_token /= 20
    assert long.is_late, "it would have taken longer than its target"


def test_nobody_yields_to_one_that_is_late_all_the_same() -> None:
    first = _request("first", ttft=0.5, num_tokens=300, priority=-1)
    long, hopeless = _request("long", ttft=0.6, num_tokens=120), _request("hopeless", ttft=0.3, num_tokens=10)
    queue = _queue(first, long, hopeless)
    assert _drain(queue, now=0.0) == ["first", "long", "hopeless"]


def test_late_ones_are_kept_out_until_they_are_old_but_for_a_lower_priority() -> None:
    late = _request("late", ttft=0.1)
    new = _request("new", arrival=1.0)
    queue = _queue(late)
    queue.sort_out(1.0)
    assert late.is_late and _head(queue, 1.0) is late and _head(queue, 1.0, with_leftover=False) is None
    assert _head(queue, LATE_PATIENCE + 0.1, with_leftover=False) is late
    new.urgency = queue.urgency(new)
    queue.push(new)
    assert _head(queue, 1.0, with_leftover=False) is new, "the late one does not stand in the way"
    behind = _request("behind", arrival=1.0, priority=1)
    queue.discard(new)
    behind.urgency = queue.urgency(behind)
    queue.push(behind)
    assert _head(queue, 1.0, with_leftover=False) is late


def test_late_ones_for_which_there_is_no_use_stand_in_nobodys_way() -> None:
    old, new = _request("old", ttft=0.1, priority=-1), _request("new", arrival=LATE_PATIENCE)
    queue = _queue(old, new)
    queue.sort_out(LATE_PATIENCE + 1.0)
    nominee = queue.peek(LATE_PATIENCE + 1.0, with_late=False)
    assert old.is_late and nominee is not None and nominee.request is new
    queue.discard(new)
    assert queue.peek(LATE_PATIENCE + 1.0, with_late=False) is None


def test_who_yields_goes_before_lower_priorities_and_those_without_a_target() -> None:
    long, short = (_request(f"{size}", ttft=0.5, num_tokens=size, priority=-1) for size in (300, 200))
    lower, patient = _request("lower", ttft=0.5), _request("patient")
    assert _drain(_queue(long, short, lower, patient), now=0.0) == ["200", "300", "lower", "patient"]


def test_a_delay_makes_late_up_to_a_half_of_the_target() -> None:
    for delay, is_late in ((0.2, False), (0.24, True), (9.0, True)):
        request = _request("r", ttft=0.5, num_tokens=220)
        queue = _queue(request)
        queue.sort_out(0.0, delay=delay)
        assert request.is_late is is_late
    younger = _request("younger", ttft=0.5, num_tokens=100)
    queue = _queue(younger)
    queue.sort_out(0.0, delay=9.0)
    assert not younger.is_late, "an estimate that has everybody late is of no use"


def test_a_priority_yields_to_nobody_of_a_lower_one() -> None:
    first = _request("first", ttft=0.5, num_tokens=300, priority=-1)
    long, short = (_request(f"{size}", ttft=0.5, num_tokens=size) for size in (120, 100))
    assert _drain(_queue(short, long, first), now=0.0) == ["first", "100", "120"]


@pytest.mark.parametrize("seed", range(200))
def test_those_that_stay_are_in_time_and_nearly_as_many_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    now, arrivals = 0.25, sorted(rng.uniform(0.0, 0.25) for _ in range(rng.randint(1, 9)))
    requests = [_request(f"{a}", arrival=a, ttft=0.5, num_tokens=rng.randint(1, 250)) for a in arrivals]
    queue = _queue(*requests)
    queue.sort_out(now)
    staying = [request for _, request in queue._in_time if request not in queue._yielding]
    assert _are_in_time(staying, now)
    # the best there is takes the order of deadlines; that of latest starts may cost one of nine
    for others in combinations(requests, len(staying) + 2):
        assert not _are_in_time(others, now)
    first_come: list[Request] = []
    for _, request in sorted((request.urgency, request) for request in requests):
        if _are_in_time([*first_come, request], now):
            first_come.append(request)
    assert len(staying) >= len(first_come)


def _are_in_time(requests: Sequence[Request], now: float) -> bool:
    for request in requests:
        now += PER_TOKEN * request.num_tokens
        if now > request.arrival_time + 0.9 * 0.5:
            return False
    return True


def test_what_the_prefix_cache_has_takes_no_time() -> None:
    cached = _request("cached", ttft=0.5, num_tokens=400)
    cached.num_tokens_to_find = 384
    assert _drain(_queue(cached, _request("short", ttft=0.5, num_tokens=100)), now=0.2) == ["short", "cached"]
    assert not cached.is_late


@pytest.mark.parametrize(("ttft", "patience"), [(0.5, LATE_PATIENCE), (None, PATIENCE)])
def test_age_brings_everybody_to_the_front(ttft: float | None, patience: float) -> None:
    old = _request("old", ttft=ttft)
    queue = _queue(old)
    queue.sort_out(1.0)
    assert _head(queue, 1.0) is old
    for now, expected in ((patience - 2.0, "new"), (patience + 0.1, "old")):
        new = _request("new", arrival=now, ttft=0.5)
        new.urgency = queue.urgency(new)
        queue.push(new)
        queue.sort_out(now)
        head = _head(queue, now)
        assert head is not None
        assert head.request_id == expected
        queue.discard(new)


def test_a_request_that_had_its_first_token_is_never_late() -> None:
    preempted = _request("preempted", ttft=0.5)
    preempted.first_token_time = 0.2
    assert _drain(_queue(preempted, _request("new", arrival=5.0, ttft=0.5)), now=5.1) == ["preempted", "new"]


@pytest.mark.parametrize("ttft", [0.5, None])
def test_what_is_discarded_is_not_shown_and_not_kept(ttft: float | None) -> None:
    requests = [_request(f"r{index}", ttft=ttft) for index in range(10)]
    queue = _queue(*requests)
    for request in requests[:9]:
        queue.discard(request)
    assert list(queue) == requests[9:]
    assert len(queue._in_time) + len(queue._late) + len(queue._others) <= 2
    assert _drain(queue, now=9.0) == ["r9"]


# ---- prompts that hold memory


def _names(prompts: Sequence[Request], now: float) -> list[str]:
    return [request.request_id for request in order_prompts(prompts, now, PER_TOKEN)]


def test_short_prompts_pass_a_long_one_that_keeps_its_deadline() -> None:
    long, short, shorter = (
        _request("long", ttft=0.5, num_tokens=300),
        _request("short", ttft=0.6, num_tokens=50),
        _request("shorter", ttft=0.7, num_tokens=20),
    )
    assert _names([long, short, shorter], now=0.1) == ["shorter", "short", "long"]
    assert _names([long, short, shorter], now=0.15) == ["long", "short", "shorter"], "it would be late by 20 ms"


def test_what_is_left_of_a_prompt_counts() -> None:
    long, short = _request("long", ttft=0.5, num_tokens=300), _request("short", ttft=0.5, num_tokens=50)
    long.num_scheduled_tokens = 280
    assert _names([short, long], now=0.0) == ["long", "short"]


def test_late_prompts_let_the_others_pass_and_resumed_ones_come_first() -> None:
    late, fine = _request("late", ttft=0.1, num_tokens=10), _request("fine", ttft=5.0, num_tokens=90)
    resumed = _request("resumed", ttft=0.1, num_tokens=200)
    resumed.first_token_time = 0.05
    assert _names([late, fine, resumed], now=0.2) == ["resumed", "fine", "late"]


def test_where_not_all_can_be_in_time_the_longest_goes_last() -> None:
    long = _request("long", ttft=0.35, num_tokens=300)
    shorts = [_request(f"r{index}", ttft=0.35 + 0.01 * index, num_tokens=90) for index in range(3)]
    assert _names([long, *shorts], now=0.0) == ["r0", "r1", "r2", "long"]
    old = _request("old", ttft=0.35, num_tokens=300)
    assert _names([old, *shorts], now=LATE_PATIENCE - 0.5) == ["old", "r0", "r1", "r2"], "it let others pass for long"


def test_passing_makes_nobody_late() -> None:
    rng = random.Random(0)
    num_passed = 0
    for _ in range(500):
        prompts = [
            _request(str(index), ttft=rng.uniform(0.05, 1.0), num_tokens=rng.randint(1, 200)) for index in range(5)
        ]
        prompts.sort(key=lambda request: _queue(request).urgency(request))
        order = order_prompts(prompts, 0.0, PER_TOKEN)
        assert sorted(map(id, order)) == sorted(map(id, prompts))
        num_passed += list(order) != prompts
        assert _num_in_time(order) >= _num_in_time(prompts)
    assert num_passed > 50


def _num_in_time(order: Sequence[Request]) -> int:
    now, count = 0.0, 0
    for request in order:
        now += PER_TOKEN * request.num_tokens
        assert request.slo is not None and request.slo.ttft is not None
        count += now <= request.slo.ttft
    return count

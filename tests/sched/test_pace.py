"""How fast prompts are: by the model while nothing is known, by full steps then, never faster than alone."""

from __future__ import annotations

import pytest

from semipd.sched.in_flight import LaunchedStep
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.pace import Pace, Turnover

NUM_SMS = 4
LARGE = StepWork.of(NUM_SMS, chunks=[(0, 2048)])


def _step(num_tokens: int, *, is_full: bool = True, num_decodes: int = 0) -> LaunchedStep:
    work = StepWork.of(NUM_SMS, chunks=[(0, num_tokens)] if num_tokens else [], num_decodes=num_decodes)
    return LaunchedStep(NUM_SMS, [], [], work, is_full)


def _pace() -> tuple[Pace, float]:
    """A pace, and what a prompt token takes alone."""
    latency = LatencyModel(NUM_SMS)
    return Pace(latency, NUM_SMS, LARGE.num_prompt_tokens), latency.predict(LARGE) / LARGE.num_prompt_tokens


def test_before_any_full_step_a_prompt_takes_somewhat_longer_than_alone() -> None:
    pace, alone = _pace()
    assert pace.seconds_per_token == pytest.approx(1.5 * alone)
    pace.observe(_step(10, is_full=False), 1.0)
    pace.observe(_step(0, num_decodes=8), 1.0)
    pace.observe(_step(100), 0.0)
    assert pace.seconds_per_token == pytest.approx(1.5 * alone), "none of these tells how fast prompts can be"


def test_full_steps_say_how_fast_it_goes_weighted_by_their_tokens() -> None:
    pace, alone = _pace()
    pace.observe(_step(100), 100 * 4 * alone)
    assert pace.seconds_per_token == pytest.approx(4 * alone)
    pace.observe(_step(900), 900 * 2 * alone)
    assert pace.seconds_per_token == pytest.approx((90 * 4 + 900 * 2) / 990 * alone)


def test_a_change_of_load_is_learned_in_some_twenty_steps() -> None:
    pace, alone = _pace()
    for _ in range(100):
        pace.observe(_step(500), 500 * 10 * alone)
    for _ in range(25):
        pace.observe(_step(500), 500 * 3 * alone)
    assert pace.seconds_per_token == pytest.approx(3 * alone, rel=0.2)


def test_no_prompt_is_faster_than_alone() -> None:
    pace, alone = _pace()
    pace.observe(_step(500), 500 * 0.1 * alone)
    assert pace.seconds_per_token == pytest.approx(alone)


def test_the_delay_is_that_of_prompts_ahead_and_of_steps_in_flight() -> None:
    pace, _ = _pace()
    assert pace.delay(0) == 0.0
    assert pace.delay(300) == pytest.approx(300 * pace.seconds_per_token)
    for _ in range(100):
        pace.observe(_step(0, num_decodes=8), 0.02)
    assert pace.delay(0) == pytest.approx(2 * 0.02, rel=0.01)
    assert pace.delay(300) - pace.delay(0) == pytest.approx(300 * pace.seconds_per_token)


def test_turnover_is_the_time_between_two_that_get_memory_while_it_is_short() -> None:
    turnover = Turnover()
    turnover.observe(1.0, 5, is_short=False)
    assert turnover.seconds_per_request == 0.0
    turnover.observe(2.0, 1, is_short=True)
    assert turnover.seconds_per_request == 0.0, "nobody got any since it is"
    for step in range(1, 4000):
        turnover.observe(2.0 + 0.02 * step, step % 200 == 0, is_short=True)
    assert turnover.seconds_per_request == pytest.approx(4.0, rel=0.1), "however often it is asked"
    turnover.observe(90.0, 3, is_short=False)
    assert turnover.seconds_per_request == 0.0, "nobody waits for memory any more"

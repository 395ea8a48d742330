"""Records of decisions: forced or chosen, why, and how they are completed by steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from semipd.config import Phase, Plan
from semipd.sched.baselines import Cadence, Exclusive
from semipd.sched.decisions import Decision, DecisionLog, StepRecord
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policy import Load, Policy, Unobserving
from tests.sched.oracle import Driver

NOTHING = Load()
PROMPTS = Load(chunks=((0, 300), (64, 100)), now=1.0, num_waiting=3)
DECODES = Load(num_decodes=5, context_tokens=700, now=2.0)
BOTH = Load(chunks=((0, 300),), num_decodes=5, context_tokens=700, now=3.0)
PLANS = [Plan.split(1, 3), Plan.split(2, 2), Plan.split(3, 1)]
WORK = StepWork.of(2, num_decodes=5, context_tokens=700)


class Telling(Unobserving):
    """Says what it is told to."""

    def choose(self, load: Load) -> Plan:
        raise AssertionError("the tests choose")


class Log:
    """A decision log on a bench, and what it traced."""

    def __init__(self) -> None:
        self.traced: list[Decision | StepRecord] = []
        self.latency = LatencyModel(4)
        self.log = DecisionLog(self.latency, self.traced.append)
        self.policy: Policy = Telling()

    def choose(self, plan: Plan, load: Load) -> Decision | None:
        return self.log.on_choice(plan, load, self.policy)

    def commit(self, step_id: int, seconds: float = 0.5) -> None:
        self.log.on_commit(Phase.DECODE, step_id, WORK, time=9.0, seconds=seconds)

    @property
    def decisions(self) -> list[Decision]:
        return [record for record in self.traced if isinstance(record, Decision)]


def test_a_decision_holds_what_was_seen() -> None:
    log = Log()
    decision = log.choose(PLANS[0], PROMPTS)
    assert decision is not None and log.log.recent() == (decision,)
    assert (decision.number, decision.time, decision.before, decision.after) == (0, 1.0, None, PLANS[0])
    assert (decision.num_waiting, decision.num_prompt_tokens) == (3, 400)
    second = log.choose(PLANS[1], BOTH)
    assert second is not None and (second.number, second.before) == (1, PLANS[0])
    assert (second.num_decodes, second.context_tokens) == (5, 700)


def test_the_same_plan_is_no_decision() -> None:
    log = Log()
    log.choose(PLANS[0], PROMPTS)
    assert log.choose(Plan.split(1, 3), BOTH) is None
    assert len(log.log.recent()) == 1


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        (BOTH, DECODES, "prompts ran out"),
        (BOTH, PROMPTS, "decodes ran out"),
        (DECODES, BOTH, "prompts arrived"),
        (PROMPTS, DECODES, "prompts ran out, decodes arrived"),
        (NOTHING, PROMPTS, "prompts arrived"),
    ],
)
def test_a_kind_of_work_that_comes_or_goes_forces_a_change(before: Load, now: Load, reason: str) -> None:
    log = Log()
    log.choose(PLANS[0], before)
    decision = log.choose(PLANS[1], now)
    assert decision is not None and decision.is_forced and decision.reason == reason


def test_other_changes_are_chosen_and_the_policy_says_why() -> None:
    log = Log()
    log.choose(PLANS[0], DECODES)
    assert log.choose(PLANS[0], BOTH) is None  # the plan could have changed here
    decision = log.choose(PLANS[1], replace(BOTH, num_decodes=9))
    assert decision is not None and not decision.is_forced and decision.reason == "the same kinds of work"
    log.policy.reason, log.policy.asked = "contexts grow", (2.7, 1.3)
    decision = log.choose(PLANS[2], BOTH)
    assert decision is not None and (decision.reason, decision.asked) == ("contexts grow", (2.7, 1.3))
    decision = log.choose(PLANS[1], PROMPTS)
    assert decision is not None and decision.is_forced and decision.reason == "contexts grow"


def test_the_first_step_under_a_plan_is_predicted_and_measured() -> None:
    log = Log()
    log.choose(PLANS[0], BOTH)
    log.log.on_launch(7, WORK)
    log.log.on_launch(8, StepWork.of(4, num_decodes=99))
    (decision,) = log.log.recent()
    predicted = log.latency.predict(WORK)
    assert (decision.work, decision.predicted, decision.measured) == (WORK, predicted, None)
    log.commit(8)
    assert not log.decisions, "another step completed it"
    log.commit(7, 0.25)
    (decision,) = log.log.recent()
    assert (decision.work, decision.predicted, decision.measured) == (WORK, predicted, 0.25)
    assert log.decisions == [decision]


def test_a_step_that_ends_after_the_next_decision_still_completes_its_own() -> None:
    log = Log()
    log.choose(PLANS[0], BOTH)
    log.log.on_launch(0, WORK)
    log.choose(PLANS[1], BOTH)
    log.log.on_launch(1, WORK)
    log.commit(1, 0.1)
    log.commit(0, 0.4)
    assert [decision.measured for decision in log.log.recent()] == [0.4, 0.1]
    assert [decision.number for decision in log.decisions] == [1, 0]


def test_a_plan_that_no_step_ran_under_is_complete_when_the_next_comes() -> None:
    log = Log()
    log.choose(PLANS[0], BOTH)
    log.choose(PLANS[1], BOTH)
    assert [(decision.number, decision.work) for decision in log.decisions] == [(0, None)]
    log.log.on_launch(0, WORK)
    log.choose(PLANS[2], BOTH)
    log.log.end()
    log.log.end()
    assert [decision.number for decision in log.decisions] == [0, 1, 2]
    assert [decision.measured for decision in log.decisions] == [None] * 3


def test_a_device_without_timers_measures_nothing() -> None:
    log = Log()
    log.choose(PLANS[0], BOTH)
    log.log.on_launch(0, WORK)
    log.commit(0, 0.0)
    assert log.decisions[0].measured is None and log.decisions[0].predicted is not None


def test_every_step_is_traced_as_predicted_before_it_taught() -> None:
    log = Log()
    log.choose(PLANS[0], PROMPTS)
    log.commit(3)
    (step,) = log.traced
    assert isinstance(step, StepRecord)
    assert (step.step_id, step.phase, step.time, step.seconds) == (3, Phase.DECODE, 9.0, 0.5)
    assert (step.work, step.predicted) == (WORK, log.latency.predict(WORK))
    assert (step.num_waiting, step.num_prefilling, step.num_decoding) == (3, 2, 0)


def test_the_last_256_are_kept_whatever_is_completed_later() -> None:
    log = Log()
    for number in range(300):
        log.choose(PLANS[number % 2], BOTH)
        log.log.on_launch(number, WORK)
    recent = log.log.recent()
    assert [decision.number for decision in recent] == list(range(44, 300))
    assert all(second.before == first.after for first, second in pairwise(recent))
    log.commit(3)
    log.commit(44, 0.1)
    assert log.log.recent()[0].measured == 0.1
    assert [decision.number for decision in log.decisions] == [3, 44]


@pytest.mark.parametrize(
    ("policy", "all_forced"), [(Exclusive(2), True), (Cadence(2, 2), False)], ids=["exclusive", "cadence"]
)
def test_the_scheduler_counts_and_completes_decisions(policy: Policy, all_forced: bool) -> None:
    driver = Driver(policy=policy, max_prefill_tokens=8)
    for length in (20, 30, 40):
        driver.submit(list(range(length)), 12)
    driver.finish_all()
    statistics = driver.scheduler.statistics()
    decisions = statistics.decisions
    assert decisions[0].before is None and statistics.plan == decisions[-1].after
    assert all(second.before == first.after for first, second in pairwise(decisions))
    assert statistics.num_plan_changes == len(decisions) - 1 > 0
    assert statistics.num_forced_plan_changes == sum(decision.is_forced for decision in decisions[1:])
    assert (statistics.num_forced_plan_changes == statistics.num_plan_changes) is all_forced

"""Plans from made-up curves and measurements."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from semipd.parallel.tuner import (
    MAX_GROUPS,
    SEQUENCE,
    Collective,
    CollectiveCurve,
    Costs,
    GemmCurve,
    Plan,
    PlanStore,
    Problem,
    Tuned,
    best_plans,
    bucket,
    candidates,
    predict,
    tune,
    waves,
)

US = 1e-6
# An all-reduce of two H200 on 16 SMs and on 32.
BESIDE = CollectiveCurve(((1 << 14, 11 * US), (1 << 20, 20 * US), (1 << 24, 86 * US), (1 << 26, 281 * US)))
ALONE = CollectiveCurve(((1 << 14, 9.5 * US), (1 << 20, 17 * US), (1 << 24, 76 * US), (1 << 26, 247 * US)))
COSTS = Costs(88 * US, BESIDE, ALONE)
PROBLEM = Problem(
    device="a GPU",
    num_rows=8192,
    num_outputs=4096,
    num_inputs=7168,
    dtype="bfloat16",
    world_size=2,
    num_sms=132,
    collective=Collective.ALL_REDUCE,
    num_ctas=16,
)


def done_by_hand(problem: Problem, plan: Plan) -> list[int]:
    """The wave behind which each tile and all before it are done: each goes to the program that is free first."""
    tiles = problem.num_blocks * problem.num_columns
    first = problem.num_columns * (plan.ends or (problem.num_blocks,))[0]
    free = [0] * (problem.num_sms - plan.reserved * plan.is_early)
    done: list[int] = []
    for tile in range(tiles):
        takers = len(free) if tile < first else problem.num_sms - plan.reserved
        program = min(range(takers), key=lambda i: free[i])
        free[program] += 1
        done.append(max(free[program], done[-1] if done else 0))
    return done


@pytest.mark.parametrize("num_sms", [7, 60, 132])
@pytest.mark.parametrize("plan", [Plan(), Plan((3, 10), 5), Plan((4, 5, 10), 5, True), Plan((9, 10), 6), Plan((1, 10))])
def test_waves(plan: Plan, num_sms: int) -> None:
    problem = dataclasses.replace(PROBLEM, num_rows=1200, num_outputs=1000, num_sms=num_sms)
    expected = done_by_hand(problem, plan)
    assert [waves(count, problem, plan) for count in range(1, len(expected) + 1)] == expected


def test_the_sequence_is_the_sum() -> None:
    assert predict(PROBLEM, SEQUENCE, COSTS) == pytest.approx(8 * 88 * US + 247 * US, rel=1e-3)


def test_a_plan_hides_what_its_groups_allow() -> None:
    # 6 of 8 waves leave 32 tiles' time to the collective: 210 us beside 176, then 43 and, on more SMs, 43.
    plan = Plan((48, 56, 64), 16)
    assert predict(PROBLEM, plan, COSTS) < 0.92 * predict(PROBLEM, SEQUENCE, COSTS)
    early = dataclasses.replace(plan, is_early=True)
    assert predict(PROBLEM, early, COSTS) > predict(PROBLEM, plan, COSTS)  # 9 waves instead of 8


def test_curves() -> None:
    assert BESIDE.seconds(1) == pytest.approx(11 * US) == BESIDE.seconds(1 << 14)
    assert BESIDE.seconds(1 << 20) == pytest.approx(20 * US)
    assert BESIDE.seconds(1 << 22) == pytest.approx((20 * 86) ** 0.5 * US)
    assert BESIDE.seconds(1 << 28) == pytest.approx(4 * 281 * US)
    curve = GemmCurve.fit([(2048, 26 * US), (4096, 50 * US)])
    assert curve.seconds(8192) == pytest.approx(98 * US)
    assert GemmCurve.fit([(2048, 26 * US)]).seconds(4096) == pytest.approx(52 * US)


def test_candidates_are_plans_of_the_problem() -> None:
    plans = list(candidates(PROBLEM))
    assert len(set(plans)) == len(plans) < 2500
    assert {len(plan.ends) for plan in plans} == set(range(2, MAX_GROUPS + 1))
    for plan in plans:
        assert plan.ends[-1] == 64 and sorted(set(plan.ends)) == list(plan.ends) and plan.reserved == 16
    assert not list(candidates(dataclasses.replace(PROBLEM, num_rows=128)))
    assert not list(candidates(dataclasses.replace(PROBLEM, num_sms=16)))


def test_best_plans_are_those_predicted_to_be() -> None:
    best = best_plans(PROBLEM, COSTS, 3)
    assert [entry.seconds for entry in best[:3]] == sorted(entry.seconds for entry in best[:3])
    assert best[0].seconds == min(predict(PROBLEM, plan, COSTS) for plan in candidates(PROBLEM))
    assert best[3].plan == dataclasses.replace(best[0].plan, is_early=True)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 500, 1024, 7000, 8192, 9000])
def test_row_ends_of_other_rows(num_rows: int) -> None:
    ends = Plan((8, 20, 40, 64), 16).row_ends(num_rows)
    assert ends[-1] == num_rows and sorted(set(ends)) == list(ends) and len(ends) <= 4
    assert all(end % 128 == 0 for end in ends[:-1])
    if num_rows == 8192:
        assert ends == (1024, 2560, 5120, 8192)


def test_buckets_grow_by_a_third_or_a_half() -> None:
    assert [bucket(rows) for rows in (2, 3, 500, 512, 513, 768, 769, 1024, 16384)] == [
        *(2, 3, 512, 512, 768, 768, 1024, 1024, 16384)
    ]


def test_plans_can_be_read() -> None:
    assert str(Plan((8, 20, 64), 16)) == "8+12+44/16"
    assert str(Plan((8, 64), 16, True)) == "8+56/16 early"
    assert str(SEQUENCE) == str(Plan((64,), 16)) == "sequence"


class Ranks:
    """What rank 0 says reaches the others."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def first(self, text: str) -> str:
        self.said.append(text)
        return text

    def other(self, text: str) -> str:
        return self.said.pop(0)


def tune_both(seconds: dict[bool, float]) -> Tuned:
    """Both ranks tune; seconds of plans that overlap, and of the sequence. The second rank knows nothing."""
    ranks = Ranks()
    tried: list[Sequence[Plan]] = []

    def measure(plans: Sequence[Plan]) -> list[float]:
        tried.append(plans)
        return [seconds[plan.overlaps] + i * US for i, plan in enumerate(plans)]

    tuned = tune(PROBLEM, COSTS, measure, ranks.first)
    dull = Costs(1.0, BESIDE, BESIDE)

    def measure_other(plans: Sequence[Plan]) -> list[float]:
        tried.append(plans)
        return [1.0] * len(plans)

    assert tune(PROBLEM, dull, measure_other, ranks.other) == tuned
    assert tried[0] == tried[1] and tried[0][0] == SEQUENCE
    return tuned


def test_the_fastest_measured_wins_on_all_ranks() -> None:
    tuned = tune_both({True: 800 * US, False: 950 * US})
    assert tuned.plan == best_plans(PROBLEM, COSTS, 1)[0].plan
    assert (tuned.sequence, tuned.measured) == (950 * US, 801 * US)
    assert tuned.predicted == pytest.approx(predict(PROBLEM, tuned.plan, COSTS))


def test_the_sequence_stays_unless_it_is_beaten_by_a_margin() -> None:
    tuned = tune_both({True: 949 * US, False: 950 * US})
    assert tuned == Tuned(plan=SEQUENCE, predicted=None, measured=950 * US, sequence=950 * US)


def test_a_store_remembers(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.json"
    store = PlanStore(path)
    assert store.get(PROBLEM) is None
    tuned = Tuned(plan=Plan((8, 64), 16, True), predicted=1e-3, measured=2e-3, sequence=3e-3)
    store.put(PROBLEM, tuned)
    store.put(dataclasses.replace(PROBLEM, num_sms=84), dataclasses.replace(tuned, plan=SEQUENCE))
    store.save()
    again = PlanStore(path)
    assert again.get(PROBLEM) == tuned
    other = again.get(dataclasses.replace(PROBLEM, num_sms=84))
    assert other is not None and other.plan == SEQUENCE
    assert again.get(dataclasses.replace(PROBLEM, collective=Collective.REDUCE_SCATTER)) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 0}', '{"version": 1, "plans": [{"problem": {}}]}'])
def test_a_store_ignores_what_it_cannot_read(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plans.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert PlanStore(path).get(PROBLEM) is None
    assert "ignored" in caplog.text


def test_a_store_that_cannot_write_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = PlanStore(tmp_path / "file" / "plans.json")
    store.save()
    assert "cannot be stored" in caplog.text
    json.dumps(Tuned(plan=SEQUENCE, predicted=None, measured=1.0, sequence=1.0).to_json())

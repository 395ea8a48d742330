"""Plans from made-up curves and measurements."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from semipd.kernels import gemm_signal
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.plans import BLOCK_M, BLOCK_N, MAX_GROUPS, SEQUENCE, Collective, Plan, Problem, bucket
from semipd.parallel.tuner import (
    CollectiveCurve,
    Costs,
    Trial,
    Tuned,
    best_plans,
    candidates,
    predict,
    tune,
    waves,
)

US = 1e-6
# An all-reduce of two H200 by 16, 32 and 8 CTAs.
BESIDE = CollectiveCurve(((1 << 14, 11 * US), (1 << 20, 20 * US), (1 << 24, 86 * US), (1 << 26, 281 * US)))
ALONE = CollectiveCurve(((1 << 14, 9.5 * US), (1 << 20, 17 * US), (1 << 24, 76 * US), (1 << 26, 247 * US)))
NARROW = CollectiveCurve(((1 << 14, 12 * US), (1 << 20, 30 * US), (1 << 24, 126 * US), (1 << 26, 436 * US)))
COSTS = Costs(88 * US, {8: NARROW, 16: BESIDE}, ALONE)
PROBLEM = Problem(
    device="a GPU",
    num_rows=8192,
    num_outputs=4096,
    num_inputs=7168,
    dtype="bfloat16",
    world_size=2,
    num_sms=132,
    collective=Collective.ALL_REDUCE,
    ctas=(8, 16),
)


def done_by_hand(problem: Problem, plan: Plan) -> list[int]:
    """The wave behind which each tile and all before it are done: each goes to the program that is free first."""
    tiles = problem.num_blocks * problem.num_columns
    first = problem.num_columns * (plan.ends or (problem.num_blocks,))[0]
    free = [0] * (problem.num_sms - plan.num_waiting)
    done: list[int] = []
    for tile in range(tiles):
        takers = len(free) if tile < first else len(free) - plan.reserved
        program = min(range(takers), key=lambda i: free[i])
        free[program] += 1
        done.append(max(free[program], done[-1] if done else 0))
    return done


@pytest.mark.parametrize("num_sms", [7, 60, 132])
@pytest.mark.parametrize(
    "plan", [Plan(), Plan((3, 10), 5), Plan((4, 5, 10), 5), Plan((9, 10), 6), Plan((1, 10)), Plan((2, 10), copies=True)]
)
def test_waves(plan: Plan, num_sms: int) -> None:
    problem = dataclasses.replace(PROBLEM, num_rows=1200, num_outputs=1000, num_sms=num_sms)
    expected = done_by_hand(problem, plan)
    assert [waves(count, problem, plan) for count in range(1, len(expected) + 1)] == expected


def test_the_sequence_is_the_sum() -> None:
    assert predict(PROBLEM, SEQUENCE, COSTS) == pytest.approx(8 * 88 * US + 247 * US, rel=1e-3)


def test_a_plan_hides_what_its_groups_allow() -> None:
    # 6 of 8 waves leave 32 tiles' time to the collective: 231 us beside 176, then 47 and, on more SMs, 43.
    assert predict(PROBLEM, Plan((48, 56, 64), 16), COSTS) < 0.94 * predict(PROBLEM, SEQUENCE, COSTS)


def test_a_collective_beside_a_product_is_slower_than_alone() -> None:
    plan = Plan((32, 64), 16)
    quick = dataclasses.replace(COSTS, wave_seconds=1 * US)
    size = PROBLEM.num_bytes(32)
    expected = 4 * US + 1.1 * BESIDE.seconds(size) + ALONE.seconds(size)
    assert predict(PROBLEM, plan, quick) == pytest.approx(expected, rel=0.02)


# Of copy engines of H200: 0.39 TB/s each way, and what came added at 4 TB/s.
COPIES = CollectiveCurve(((1 << 14, 5 * US), (1 << 20, 8 * US), (1 << 24, 49 * US), (1 << 26, 178 * US)))
ADDING = CollectiveCurve(((1 << 14, 2 * US), (1 << 20, 3 * US), (1 << 24, 14 * US), (1 << 26, 50 * US)))
WITH_COPIES = dataclasses.replace(COSTS, copies=COPIES, adding=ADDING)


def test_plans_and_kernels_know_the_same_tiles() -> None:
    config = gemm_signal.GemmSignalConfig()
    assert (config.block_m, config.block_n) == (BLOCK_M, BLOCK_N), "or nothing would overlap"
    assert gemm_signal.MAX_GROUPS == MAX_GROUPS


def test_copies_hide_behind_a_long_product_and_are_added_behind_it() -> None:
    plan = Plan((32, 56, 64), copies=True)  # 56 blocks are there a wave before the end
    expected = 8 * 88 * US + sum(ADDING.seconds(PROBLEM.num_bytes(blocks)) for blocks in (32, 24, 8))
    assert predict(PROBLEM, plan, WITH_COPIES) == pytest.approx(expected, rel=0.01)


def test_a_short_product_hides_behind_its_copies() -> None:
    plan, costs = Plan((8, 32, 64), copies=True), dataclasses.replace(WITH_COPIES, wave_seconds=5 * US)
    sizes = [PROBLEM.num_bytes(blocks) for blocks in (8, 24, 32)]
    expected = 5 * US + sum(map(COPIES.seconds, sizes)) + ADDING.seconds(sizes[-1])
    assert predict(PROBLEM, plan, costs) == pytest.approx(expected, rel=0.03)


def test_copies_are_candidates_where_ranks_have_them() -> None:
    assert not any(plan.copies for plan in candidates(PROBLEM))
    problem = dataclasses.replace(PROBLEM, has_copies=True)
    plans = [plan for plan in candidates(problem) if plan.copies]
    assert {len(plan.ends) for plan in plans} == set(range(1, MAX_GROUPS + 1)) and {
        plan.reserved for plan in plans
    } == {0}
    best = best_plans(problem, WITH_COPIES, 2)
    assert [entry.plan.copies for entry in best] == [True, True, False, False], "both kinds are tried"
    assert best[0].seconds < best[2].seconds


def test_curves() -> None:
    assert BESIDE.seconds(1) == pytest.approx(11 * US) == BESIDE.seconds(1 << 14)
    assert BESIDE.seconds(1 << 20) == pytest.approx(20 * US)
    assert BESIDE.seconds(1 << 22) == pytest.approx((20 * 86) ** 0.5 * US)
    assert BESIDE.seconds(1 << 28) == pytest.approx(4 * 281 * US)


def test_candidates_are_plans_of_the_problem() -> None:
    plans = list(candidates(PROBLEM))
    assert len(set(plans)) == len(plans) < 5000
    assert {len(plan.ends) for plan in plans} == set(range(2, MAX_GROUPS + 1))
    for plan in plans:
        assert plan.ends[-1] == 64 and sorted(set(plan.ends)) == list(plan.ends)
    assert {plan.reserved for plan in plans} == {8, 16}
    assert not list(candidates(dataclasses.replace(PROBLEM, num_rows=128)))
    assert {plan.reserved for plan in candidates(dataclasses.replace(PROBLEM, num_sms=16))} == {8}


def test_best_plans_are_those_predicted_to_be() -> None:
    best = best_plans(PROBLEM, COSTS, 3)
    assert [entry.seconds for entry in best] == sorted(entry.seconds for entry in best) and len(best) == 3
    assert best[0].seconds == min(predict(PROBLEM, plan, COSTS) for plan in candidates(PROBLEM))


def test_a_long_product_leaves_fewer_sms() -> None:
    problem = dataclasses.replace(PROBLEM, num_rows=2048, num_outputs=8192)  # 4 waves on 124 SMs, 5 on 116
    assert best_plans(problem, dataclasses.replace(COSTS, wave_seconds=164 * US), 1)[0].plan.reserved == 8


def test_no_plan_is_tried_that_has_no_hope() -> None:
    problem = dataclasses.replace(PROBLEM, num_rows=2048)  # 2 waves, and 3 with SMs left out
    assert not best_plans(problem, COSTS, 3)

    def measure(plans: Sequence[Plan]) -> list[float]:
        raise AssertionError("nothing is to be measured")

    assert tune(problem, COSTS, measure, lambda text: text) == Tuned(plan=SEQUENCE)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 500, 1024, 7000, 8192, 9000])
def test_row_ends_of_other_rows(num_rows: int) -> None:
    ends = Plan((8, 20, 40, 64), 16).row_ends(num_rows)
    assert ends[-1] == num_rows and sorted(set(ends)) == list(ends) and len(ends) <= 4
    assert all(end % 128 == 0 for end in ends[:-1])
    if num_rows == 8192:
        assert ends == (1024, 2560, 5120, 8192)


def test_buckets_are_near() -> None:
    sizes = {bucket(rows) for rows in range(512, 16385)}
    assert sorted(sizes) == [512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
    assert [bucket(rows) for rows in (512, 600, 700, 2000, 2048, 2112, 2304, 2600)] == [
        *(512, 512, 768, 2048, 2048, 2048, 2048, 3072)
    ]
    assert all(0.8 < bucket(rows) / rows < 1.25 for rows in range(512, 16385))


def test_plans_can_be_read() -> None:
    assert str(Plan((8, 20, 64), 16)) == "8+12+44/16"
    assert str(Plan((8, 64), 8)) == "8+56/8"
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
    dull = Costs(1.0, {8: BESIDE, 16: BESIDE}, BESIDE)

    def measure_other(plans: Sequence[Plan]) -> list[float]:
        tried.append(plans)
        return [1.0] * len(plans)

    assert tune(PROBLEM, dull, measure_other, ranks.other) == tuned
    assert tried[0] == tried[1] and tried[0][0] == SEQUENCE
    return tuned


def test_the_fastest_measured_wins_on_all_ranks() -> None:
    tuned = tune_both({True: 800 * US, False: 950 * US})
    best = best_plans(PROBLEM, COSTS, 3)
    assert tuned.plan == best[0].plan
    assert [trial.plan for trial in tuned.trials] == [SEQUENCE, *(entry.plan for entry in best)]
    assert [trial.measured for trial in tuned.trials[:2]] == [950 * US, 801 * US]
    assert tuned.trials[1].predicted == pytest.approx(predict(PROBLEM, tuned.plan, COSTS))


@pytest.mark.parametrize(("seconds", "is_kept"), [(949 * US, False), (932 * US, False), (929 * US, True)])
def test_the_sequence_stays_unless_it_is_beaten_by_a_margin(seconds: float, is_kept: bool) -> None:
    tuned = tune_both({True: seconds, False: 950 * US})
    assert tuned.plan.overlaps is is_kept


def test_a_store_remembers(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.json"
    store = PlanStore(path)
    assert store.get(PROBLEM) is None
    trial = Trial(plan=Plan((8, 64), 16), predicted=1e-3, measured=2e-3)
    tuned = Tuned(plan=trial.plan, trials=(trial,))
    store.put(PROBLEM, tuned)
    store.put(dataclasses.replace(PROBLEM, num_sms=84), dataclasses.replace(tuned, plan=SEQUENCE))
    store.save()
    again = PlanStore(path)
    assert again.get(PROBLEM) == tuned
    other = again.get(dataclasses.replace(PROBLEM, num_sms=84))
    assert other is not None and other.plan == SEQUENCE
    assert again.get(dataclasses.replace(PROBLEM, collective=Collective.REDUCE_SCATTER)) is None


def test_a_store_that_does_not_read_keeps_what_others_put(tmp_path: Path) -> None:
    path, other = tmp_path / "plans.json", dataclasses.replace(PROBLEM, num_sms=84)
    stores = [PlanStore(path), PlanStore(path, reads=False)]
    for store, problem in zip(stores, (PROBLEM, other), strict=True):
        store.put(problem, Tuned(plan=Plan((8, 64), 16)))
        store.save()
    assert PlanStore(path, reads=False).get(PROBLEM) is None
    assert PlanStore(path).get(PROBLEM) == PlanStore(path).get(other) == Tuned(plan=Plan((8, 64), 16))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"version": 0, "plans": []}', '{"version": VERSION, "plans": [{"problem": {}}]}', "a plan of nothing"],
)
def test_a_store_ignores_what_it_cannot_read(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plans.json"
    store = PlanStore(path)
    store.put(PROBLEM, Tuned(plan=SEQUENCE))
    store.save()
    version = json.loads(path.read_text())["version"]
    if text == "a plan of nothing":
        text = path.read_text().replace('"ends"', '"nothing"')
    path.write_text(text.replace("VERSION", str(version)))
    with caplog.at_level(logging.WARNING):
        assert PlanStore(path).get(PROBLEM) is None
    assert "ignored" in caplog.text


def test_a_store_that_cannot_write_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = PlanStore(tmp_path / "file" / "plans.json")
    store.save()
    assert "cannot be stored" in caplog.text

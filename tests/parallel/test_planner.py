"""Where an engine's plans come from: rank 0's store, or a tuner that all ranks share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semipd.config import Phase, Shard
from semipd.kernels.ops import StepContext, create_ops
from semipd.parallel import planner
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import TensorGroup, host_store, join_store
from semipd.parallel.overlap import Communicators, Release
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.planner import MIN_ROWS, FixedPlans, ProductTuner, WrongPlan, find_plans, problems_of
from semipd.parallel.plans import SEQUENCE, Collective, Plan, Problem, bucket
from semipd.parallel.tuner import Predicted, Tuned
from semipd.parallel.turns import Launch, Turn

PROBLEM = Problem(
    device="a GPU",
    num_rows=1,
    num_outputs=1,
    num_inputs=1,
    dtype="bfloat16",
    world_size=2,
    num_sms=132,
    collective=Collective.ALL_REDUCE,
    ctas=(8, 16),
)
SHAPES = [(4096, 2048), (4096, 7168)]
OVERLAPPED = Plan((4, 16), 16)


@pytest.fixture
def groups() -> Iterator[list[TensorGroup]]:
    store, port = host_store()
    groups = [
        TensorGroup(Shard(rank=0, world_size=2), store),
        TensorGroup(Shard(rank=1, world_size=2), join_store(LOOPBACK, port)),
    ]
    yield groups
    for group in groups:
        group.close()


def test_problems_are_those_of_all_steps() -> None:
    problems = problems_of(PROBLEM, SHAPES, 2304)
    assert {(problem.num_outputs, problem.num_inputs) for problem in problems} == set(SHAPES)
    sizes = {problem.num_rows for problem in problems}
    assert sizes == {bucket(rows) for rows in range(MIN_ROWS, 2305)} == {512, 768, 1024, 1536, 2048}
    assert len(problems) == len(SHAPES) * len(sizes)
    assert not problems_of(PROBLEM, SHAPES, MIN_ROWS - 1)
    assert len(problems_of(PROBLEM, [SHAPES[0], SHAPES[0]], MIN_ROWS)) == 1


def find(groups: list[TensorGroup], path: Path, *, reads: bool = True) -> tuple[dict[Problem, Plan], list[list[int]]]:
    """The plans of both ranks, which are the same, and the rows of what each tuned."""
    problems = problems_of(PROBLEM, SHAPES[:1], 1024)
    tuned: list[list[int]] = [[], []]

    def run(group: TensorGroup) -> dict[Problem, Plan]:
        rank = group.shard.rank

        def tune(problem: Problem) -> Tuned:
            tuned[rank].append(problem.num_rows)
            return Tuned(plan=OVERLAPPED if problem.num_rows == 1024 else SEQUENCE)

        return find_plans(problems, PlanStore(None if rank else path, reads=reads), group.share, tune)

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(run, groups)
    assert first == other and list(first) == problems
    return first, tuned


def test_only_what_rank_0_does_not_know_is_tuned(
    groups: list[TensorGroup], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plans.json"
    known = replace(problems_of(PROBLEM, SHAPES, 1024)[0])
    store = PlanStore(path)
    store.put(known, Tuned(plan=OVERLAPPED))
    store.save()
    plans, tuned = find(groups, path)
    assert tuned == [[768, 512]] * 2 and plans[known] == OVERLAPPED
    assert find(groups, path)[1] == [[], []], "all of it is kept"
    assert find(groups, path, reads=False)[1] == [[1024, 768, 512]] * 2, "as a user asked"
    with caplog.at_level(logging.WARNING):
        path.write_text("")
        assert find(groups, path)[1] == [[1024, 768, 512]] * 2
    assert "ignored" in caplog.text


def test_plans_are_for_steps_that_have_the_device() -> None:
    weight = torch.empty(4096, 2048, device="meta")
    fixed = FixedPlans(132, {(1024, 4096, 2048): OVERLAPPED, (512, 4096, 2048): SEQUENCE})

    def plan(num_rows: int, num_sms: int = 132) -> Plan | None:
        return fixed.plan(num_rows, weight, StepContext(num_sms, None, Phase.DECODE))

    assert plan(1024) == plan(900) == plan(1200) == OVERLAPPED
    assert plan(MIN_ROWS) == plan(600) == SEQUENCE
    assert plan(800) is plan(MIN_ROWS - 1) is plan(1024, 84) is None


def test_plans_by_copies_are_for_steps_that_have_most_of_the_device() -> None:
    by_copies = replace(OVERLAPPED, copies=True, reserved=0)
    fixed = FixedPlans(132, {(1024, 4096, 2048): by_copies})
    for num_sms, expected in ((132, by_copies), (84, by_copies), (76, None), (8, None)):
        assert fixed.plan(1024, torch.empty(4096, 2048, device="meta"), StepContext(num_sms)) == expected


class HostTurns:
    """What `GraphTurns` does, on a CPU: launches are launched, and last as long as is said of their number."""

    def __init__(self, stream: object, meet: Callable[[], None]) -> None:
        self._meet = meet

    def capture(self, launch: Launch, number: int) -> Turn:
        launch(0)

        def turn(repeats: int) -> Callable[[], float]:
            self._meet()
            begin = time.perf_counter()
            for i in range(number):
                launch(i)
            return lambda: (time.perf_counter() - begin) * repeats

        return turn


@pytest.mark.parametrize("is_wrong", [False, True])
def test_ranks_tune_a_product_together(
    groups: list[TensorGroup], monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    monkeypatch.setattr(planner, "GraphTurns", HostTurns)
    monkeypatch.setattr(planner, "_CACHED", 0)
    monkeypatch.setattr(planner, "_CURVE_BYTES", (1 << 10, 1 << 12))
    monkeypatch.setattr("semipd.parallel.tuner.best_plans", lambda *_: [Predicted(Plan((1, 2, 4), 8), 1e-3)])
    problem = replace(PROBLEM, num_rows=512, num_outputs=24, num_inputs=16, num_sms=4)
    if is_wrong:
        summed = TensorGroup.communicator

        def spoiled(group: TensorGroup, phase: Phase, num_ctas: int | None = None) -> Any:
            communicator = summed(group, phase, num_ctas)
            if num_ctas != 8 or group.shard.rank == 0:
                return communicator
            return SimpleNamespace(world_size=2, all_reduce_=lambda tensor: communicator.all_reduce_(tensor.zero_()))

        monkeypatch.setattr(TensorGroup, "communicator", spoiled)
        # Without a GPU, groups are collected by what is there for the last one.
        monkeypatch.setattr(planner, "lane_communicators", _narrow_for_all)

    def run(group: TensorGroup) -> Tuned:
        group.connect(torch.device("cpu"))
        stream: Any = SimpleNamespace(device=torch.device("cpu"))
        tuner = ProductTuner(
            group,
            stream,
            StepContext(4, None, Phase.PREFILL),
            ops=create_ops("reference"),
            dtype=torch.bfloat16,
            sides=SimpleNamespace(),
            release=Release(torch.device("cpu")),
            copies={},
        )
        if is_wrong:
            for wrong in (tuner.tune, lambda problem: tuner.check(problem, Plan((1, 4), 8))):
                with pytest.raises(WrongPlan, match="wrong result"):
                    wrong(problem)
            return Tuned(plan=SEQUENCE)
        tuner.check(problem, Plan((1, 4), 8))
        return tuner.tune(problem)

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(run, groups)
    assert first == other
    if not is_wrong:
        assert [trial.plan for trial in first.trials] == [SEQUENCE, Plan((1, 2, 4), 8)]
        assert all(trial.measured > 0 for trial in first.trials)


def _narrow_for_all(group: TensorGroup, context: StepContext, plan: Plan, copies: object) -> Communicators:
    narrow = group.communicator(context.phase, plan.reserved)
    return Communicators(narrow, narrow)

"""Whether ranks overlap, and what becomes of it when plans cannot be found. Ranks are threads, their GPUs are fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from semipd import build_overlap
from semipd.build_overlap import Overlap, agree_to_overlap, plans_path
from semipd.config import EngineConfig, Phase, Shard
from semipd.errors import RankError
from semipd.kernels.ops import StepContext
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import TensorGroup, host_store, join_store
from semipd.parallel.overlap import BESIDE_CTAS, Release
from semipd.parallel.overlapped_product import OverlappedProducts
from semipd.parallel.planner import WrongPlan
from semipd.parallel.plans import Plan
from tests.test_build_latency import LLAMA_3_8B
from tests.test_cache_file import leave_homeless

T = TypeVar("T")
CONFIG = EngineConfig(model="unused", max_prefill_tokens=2048, max_num_seqs=64, tensor_parallel_size=2)
OWN = LLAMA_3_8B.shard(Shard(world_size=2))
GPU = torch.device("cuda", 0)
PLAN = Plan((4, 8), 16)


class Backend:
    """A device of 132 SMs whose streams are their names."""

    num_sms = 132

    def __init__(self) -> None:
        self.with_sides: set[str] = set()

    def stream(self, phase: Phase, num_sms: int) -> Any:
        return SimpleNamespace(torch_stream=f"{phase} on {num_sms}")

    def capture_stream(self, phase: Phase, num_sms: int) -> Any:
        self.with_sides.add(f"{phase} captured on {num_sms}")

    def beside(self, stream: Any) -> Any:
        self.with_sides.add(stream)


class Ranks:
    """Two groups that are not connected, and a thread for each."""

    def __init__(self) -> None:
        store, port = host_store()
        stores = store, join_store(LOOPBACK, port)
        self.groups = [TensorGroup(Shard(rank=rank, world_size=2), stores[rank]) for rank in range(2)]
        self.backends = [Backend(), Backend()]
        self.pool = ThreadPoolExecutor(2)

    def run(self, call: Callable[[int], T]) -> list[T]:
        return list(self.pool.map(call, range(2), timeout=30))

    def agree(self, rank: int, config: EngineConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Overlap | None:
        backend: Any = self.backends[rank]
        return agree_to_overlap(
            config, OWN, self.groups[rank], Shard(rank=rank, world_size=2), 2112, backend, GPU, dtype
        )


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(build_overlap, "is_hopper", lambda device: True)
    monkeypatch.setattr(build_overlap, "_describe", lambda device: "a GPU")
    monkeypatch.setattr(build_overlap, "Release", lambda device: Release(torch.device("cpu")))
    ranks = Ranks()
    yield ranks
    ranks.run(lambda rank: ranks.groups[rank].close())
    ranks.pool.shutdown()


def test_ranks_overlap_if_all_can_and_may(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(ranks.run(ranks.agree))
    assert not any(ranks.run(lambda rank: ranks.agree(rank, replace(CONFIG, calibrate=False))))
    assert not any(ranks.run(lambda rank: ranks.agree(rank, dtype=torch.float32)))
    assert not any(ranks.run(lambda rank: ranks.agree(rank, dtype=(torch.bfloat16, torch.float32)[rank])))
    monkeypatch.setattr(build_overlap, "is_hopper", lambda device: False)
    assert not any(ranks.run(ranks.agree))


def test_an_abort_releases_the_waits(ranks: Ranks) -> None:
    overlaps = ranks.run(ranks.agree)
    assert overlaps[0] is not None
    overlaps[0].release.check()
    ranks.groups[0].abort()
    with pytest.raises(RankError):
        overlaps[0].release.check()


class Copies:
    """One lane's."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_copies_of_both_lanes_are_a_choice_on_one_host(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect_one(*args: object, **options: Any) -> Copies:
        asked.append(options)
        return Copies()

    monkeypatch.setattr(build_overlap, "connect_copies", connect_one)
    beside: list[tuple[int, ...]] = []
    monkeypatch.setattr(TensorGroup, "connect", lambda *args, **options: beside.append(options["beside_ctas"]))
    monkeypatch.setattr(Overlap, "_find_plans", lambda overlap: {})

    def connect(rank: int, local_size: int) -> Overlap:
        backend: Any = ranks.backends[rank]
        local = Shard(rank=rank % local_size, world_size=local_size)
        overlap = agree_to_overlap(CONFIG, OWN, ranks.groups[rank], local, 2112, backend, GPU, torch.bfloat16)
        assert overlap is not None
        overlap.connect()
        return overlap

    for overlap in ranks.run(lambda rank: connect(rank, 2)):
        assert all(problem.has_copies and not problem.ctas for problem in overlap._problems())
        copies = list(overlap._copies.values())
        assert len(copies) == len(Phase)
        overlap.close()
        assert all(one.is_closed for one in copies)  # type: ignore[attr-defined]
    assert {(options["dim"], options["max_rows"]) for options in asked} == {(4096, 2112)}
    asked.clear()
    for overlap in ranks.run(lambda rank: connect(rank, 1)):
        assert all(not problem.has_copies and problem.ctas == BESIDE_CTAS for problem in overlap._problems())
    assert not asked and beside == [(), (), BESIDE_CTAS, BESIDE_CTAS], "one kind is enough"


def plan_of(products: OverlappedProducts) -> Plan | None:
    """For a step of 1,000 rows of the largest product."""
    weight = torch.empty(OWN.hidden_size, OWN.intermediate_size, device="meta")
    return products._planner.plan(1000, weight, StepContext(132))


@pytest.mark.parametrize("is_wrong", [False, True])
def test_without_a_right_plan_nothing_overlaps(
    ranks: Ranks, is_wrong: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find(overlap: Overlap) -> dict[Any, Plan]:
        problems = overlap._problems()
        assert {problem.num_rows for problem in problems} == {512, 768, 1024, 1536, 2048}
        assert {(problem.num_outputs, problem.num_inputs) for problem in problems} == {(4096, 2048), (4096, 7168)}
        if is_wrong:  # which all ranks are told
            raise WrongPlan("a wrong result")
        return dict.fromkeys(problems, PLAN)

    monkeypatch.setattr(Overlap, "_find_plans", find)

    def make(rank: int) -> Plan | None:
        overlap = ranks.agree(rank)
        assert overlap is not None
        return plan_of(overlap.make_products())

    assert ranks.run(make) == [None if is_wrong else PLAN] * 2
    assert ("a wrong result" in caplog.text) == is_wrong
    for backend in ranks.backends:
        assert len(backend.with_sides) == 4, "before a step is captured"


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_ends_the_start_of_all(
    ranks: Ranks, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(overlap: Overlap) -> dict[Any, Plan]:
        if overlap._group.shard.rank == failing:
            raise ValueError("no kernel")
        overlap._group.exchange(0)
        return {}

    monkeypatch.setattr(Overlap, "_find_plans", find)

    overlaps = ranks.run(ranks.agree)

    def make(rank: int) -> None:
        overlap = overlaps[rank]
        assert overlap is not None
        try:
            with pytest.raises((ValueError, RankError)) as caught:
                overlap.make_products()
        finally:
            for group in ranks.groups:  # as the ranks' processes do for each other
                group.abort()
        assert isinstance(caught.value, ValueError if rank == failing else RankError)
        assert any("calibrate=False" in note for note in caught.value.__notes__)

    ranks.run(make)


def test_copies_of_one_lane_alone_are_given_back(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Copies] = []

    def connect_one(*args: object, **options: Any) -> Copies | None:
        if made:
            return None
        made.append(Copies())
        return made[0]

    monkeypatch.setattr(build_overlap, "connect_copies", connect_one)
    overlap = ranks.run(ranks.agree)[0]
    assert overlap is not None
    overlap._connect_copies()
    assert made[0].is_closed and not overlap._copies


def test_a_user_without_a_home_keeps_no_plans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans_path() == tmp_path / "semipd" / "overlap" / "plans.json"
    leave_homeless(monkeypatch)
    assert plans_path() is None and len(caplog.records) == 1


def test_ranks_that_no_longer_compute_together_do_not_go_on(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(overlap: Overlap) -> dict[Any, Plan]:
        overlap._group.abort()
        overlap._group.share("")
        return {}

    monkeypatch.setattr(Overlap, "_find_plans", find)

    def make(rank: int) -> None:
        overlap = ranks.agree(rank)
        assert overlap is not None
        with pytest.raises(RankError):
            overlap.make_products()

    ranks.run(make)

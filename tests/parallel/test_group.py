"""Collectives and agreements of two and three gloo ranks, each a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.errors import RankError
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import MAX_CTAS, TensorGroup, host_store, join_store

T = TypeVar("T")
CPU = torch.device("cpu")
GROUP = "semipd.parallel.group"


class Ranks:
    """Groups of all ranks, connected or not, and a thread for each."""

    def __init__(self, world_size: int) -> None:
        store, port = host_store()
        stores = [store, *(join_store(LOOPBACK, port) for _ in range(1, world_size))]
        self.groups = [
            TensorGroup(Shard(rank=rank, world_size=world_size), store, timeout=timedelta(seconds=20))
            for rank, store in enumerate(stores)
        ]
        self.pool = ThreadPoolExecutor(2 * world_size)

    def run(self, call: Callable[[TensorGroup], T]) -> list[T]:
        """What every rank's call returns."""
        return list(self.pool.map(call, self.groups, timeout=30))

    def close(self) -> None:
        self.run(TensorGroup.close)
        self.pool.shutdown()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.fixture
def connected(ranks: Ranks) -> Ranks:
    ranks.run(lambda group: group.connect(CPU))
    return ranks


def rows(rank: int, num_rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Different on every rank and in every place."""
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_reduce_leaves_the_same_sum_everywhere(connected: Ranks, dtype: torch.dtype) -> None:
    def reduce(group: TensorGroup) -> Tensor:
        tensor = rows(group.shard.rank, 5, dtype)
        group.communicator(Phase.DECODE).all_reduce_(tensor)
        return tensor

    sums = connected.run(reduce)
    expected = sum(rows(rank, 5, dtype).double() for rank in range(len(sums)))
    torch.testing.assert_close(sums[0].double(), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-2)
    assert all(torch.equal(sums[0], other) for other in sums)


def test_all_gather_puts_the_ranks_in_order(connected: Ranks) -> None:
    world_size = len(connected.groups)

    def gather(group: TensorGroup) -> Tensor:
        out = torch.full((2 * world_size, 3), torch.nan, dtype=torch.float64)
        group.communicator(Phase.PREFILL).all_gather(out, rows(group.shard.rank, 2))
        return out

    expected = torch.cat([rows(rank, 2) for rank in range(world_size)])
    assert all(torch.equal(out, expected) for out in connected.run(gather))


def test_reduce_scatter_may_write_into_its_own_chunk(connected: Ranks) -> None:
    world_size = len(connected.groups)

    def scatter(group: TensorGroup) -> Tensor:
        tensor = rows(group.shard.rank, 2 * world_size)
        chunk = tensor.chunk(world_size)[group.shard.rank]
        group.communicator(Phase.DECODE).reduce_scatter(chunk, tensor)
        return chunk

    total = torch.stack([rows(rank, 2 * world_size) for rank in range(world_size)]).sum(0)
    torch.testing.assert_close(torch.cat(connected.run(scatter)), total)


def test_all_to_all_sends_uneven_rows(connected: Ranks) -> None:
    world_size = len(connected.groups)

    def swap(group: TensorGroup) -> Tensor:
        rank = group.shard.rank  # which sends r + 1 rows to each rank r
        tensor = rows(rank, sum(range(world_size + 1)))
        out = torch.empty(world_size * (rank + 1), 3, dtype=torch.float64)
        group.communicator(Phase.DECODE).all_to_all(out, tensor, [rank + 1] * world_size, range(1, world_size + 1))
        return out

    for rank, out in enumerate(connected.run(swap)):
        first = sum(range(rank + 1))
        sent = [rows(peer, sum(range(world_size + 1)))[first : first + rank + 1] for peer in range(world_size)]
        assert torch.equal(out, torch.cat(sent))


def test_two_lanes_collect_at_once_in_any_order(connected: Ranks) -> None:
    def collect(group: TensorGroup) -> list[Tensor]:
        def lane(phase: Phase) -> Tensor:
            total = torch.zeros(4)
            for step in range(20):
                time.sleep(1e-3 * ((step * 7 + group.shard.rank * 3 + len(phase)) % 5))
                tensor = torch.full((4,), float(step))
                group.communicator(phase).all_reduce_(tensor)
                total += tensor
            return total

        with ThreadPoolExecutor(2) as lanes:
            return list(lanes.map(lane, Phase))

    expected = torch.full((4,), float(sum(range(20)) * len(connected.groups)))
    assert all(torch.equal(total, expected) for totals in connected.run(collect) for total in totals)


def test_a_rank_may_come_late(connected: Ranks) -> None:
    def reduce(group: TensorGroup) -> float:
        time.sleep(0.7 * group.shard.rank)  # longer than between two looks for an abort
        tensor = torch.ones(1)
        group.communicator(Phase.DECODE).all_reduce_(tensor)
        return tensor.item()

    assert set(connected.run(reduce)) == {float(len(connected.groups))}


def test_ranks_agree_on_the_smallest_value_each_time(ranks: Ranks) -> None:
    assert set(ranks.run(lambda group: group.agree_min(10 + group.shard.rank))) == {10}
    assert set(ranks.run(lambda group: group.agree_min(-group.shard.rank))) == {1 - len(ranks.groups)}


def test_ranks_share_what_the_first_says(ranks: Ranks) -> None:
    for text in ("one", "", '{"two": 2}'):

        def share(group: TensorGroup, text: str = text) -> str:
            return group.share(text if group.shard.rank == 0 else "no")

        assert set(ranks.run(share)) == {text}
        assert set(ranks.run(lambda group: group.agree_min(group.shard.rank))) == {0}, "rounds of both kinds mix"


def test_one_width_is_as_good_as_another_on_a_cpu(connected: Ranks) -> None:
    group = connected.groups[0]
    for phase in Phase:
        assert group.communicator(phase, 16) is group.communicator(phase)


class FakeNccl:
    """Communicators that only say what becomes of them."""

    def __init__(self, prefix: object, shard: Shard, timeout: timedelta, num_ctas: int, *, is_clustered: bool) -> None:
        self.num_ctas, self.is_clustered = num_ctas, is_clustered
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


def test_lanes_have_communicators_of_several_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROUP + ".make_nccl", FakeNccl)
    monkeypatch.setattr(GROUP + ".warm_up", lambda communicator, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    store, _ = host_store()
    group = TensorGroup(Shard(), store)
    group.connect(torch.device("cuda", 0), beside_ctas=(8, 16), alone_ctas=(32,))
    found: dict[tuple[Phase, int | None], Any] = {
        (phase, number): group.communicator(phase, number) for phase in Phase for number in (None, 8, 16, 32, 0, 24)
    }
    made = {key: communicator._process_group.num_ctas for key, communicator in found.items()}
    for phase, usual in MAX_CTAS.items():
        assert {number: made[phase, number] for number in (8, 16, 32)} == {8: 8, 16: 16, 32: 32}
        assert made[phase, None] == made[phase, 0] == made[phase, 24] == usual
        assert [found[phase, number]._process_group.is_clustered for number in (None, 8, 16, 32)] == [
            *(True, False, False, True)
        ]
    assert len(set(map(id, found.values()))) == 8, "lanes share none"
    with group.quiet(Phase.PREFILL):
        assert all(found[key].lock.locked() == (key[0] is Phase.PREFILL) for key in found)
    assert not any(communicator.lock.locked() for communicator in found.values())
    group.close()
    assert all(communicator._process_group.is_aborted for communicator in found.values())


@pytest.mark.parametrize("waits", ["collective", "agreement", "text", "connection"])
def test_abort_releases_who_waits_and_all_that_come_later(ranks: Ranks, waits: str) -> None:
    group = ranks.groups[0]
    if waits == "collective":
        ranks.run(lambda group: group.connect(CPU))
    call: Callable[[], object] = {
        "collective": lambda: group.communicator(Phase.DECODE).all_reduce_(torch.ones(3)),
        "agreement": lambda: group.agree_min(3),
        "text": lambda: ranks.groups[1].share(""),
        "connection": lambda: group.connect(CPU),
    }[waits]
    waiting = ranks.pool.submit(call)
    time.sleep(0.1)
    assert not waiting.done()
    ranks.groups[waits == "text"].abort()
    with pytest.raises(RankError, match="no longer compute together"):
        waiting.result(5)
    if waits == "collective":
        for phase in Phase:
            with pytest.raises(RankError):
                group.communicator(phase).all_reduce_(torch.ones(3))
        # The others' part ends what gloo itself still waits for, as their end would.
        for other in ranks.groups[1:]:
            ranks.pool.submit(other.communicator(Phase.DECODE).all_reduce_, torch.ones(3))


def test_groups_leave_no_global_process_group(connected: Ranks) -> None:
    assert not torch.distributed.is_initialized()  # noqa: TID251
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("semipd-")]


def test_a_rank_that_gave_up_says_nothing_that_others_could_take_for_an_answer(ranks: Ranks) -> None:
    gone, waiting = ranks.groups[-1], ranks.groups[0]
    told: list[str] = []
    gone.call_on_abort(lambda: told.append("before"))
    gone.abort()
    gone.call_on_abort(lambda: told.append("behind"))
    assert told == ["before", "behind"]
    with pytest.raises(RankError):
        gone.exchange(0)
    with pytest.raises(RankError, match=r"did not come within 0\.1 s"):
        waiting.exchange(5, timeout=0.1)

"""Products with their collectives, group by group: on a CPU, and the launches of a GPU in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.errors import RankError
from semipd.kernels.ops import StepContext, create_ops
from semipd.kernels.triton_util import is_interpreted
from semipd.parallel.communicator import LOOPBACK, Communicator
from semipd.parallel.group import TensorGroup, host_store, join_store
from semipd.parallel.overlap import (
    ALONE_CTAS,
    Communicators,
    OverlappedLinear,
    Release,
    all_gather,
    owned_rows,
)
from semipd.parallel.overlapped_product import OverlappedProducts
from semipd.parallel.plans import SEQUENCE, Plan

NUM_INPUTS, NUM_OUTPUTS, NUM_ROWS = 8, 6, 500
NORM = create_ops("reference").pack_rms_norm(torch.linspace(1, 2, NUM_OUTPUTS, dtype=torch.float64), 1e-5)
PLANS = [SEQUENCE, Plan((1, 4), 2), Plan((1, 2, 3, 4), 2), Plan((4, 12, 16), 2)]
CPU = torch.device("cpu")


class Ranks:
    """Gloo ranks as threads, each with its inputs of one weight."""

    def __init__(self, world_size: int) -> None:
        store, port = host_store()
        stores = [store, *(join_store(LOOPBACK, port) for _ in range(1, world_size))]
        shards = [Shard(rank=rank, world_size=world_size) for rank in range(world_size)]
        self.groups = [TensorGroup(*pair) for pair in zip(shards, stores, strict=True)]
        self.pool = ThreadPoolExecutor(world_size)
        list(self.pool.map(lambda group: group.connect(CPU), self.groups))
        generator = torch.Generator().manual_seed(world_size)
        self.x, self.weight, self.residual = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((NUM_ROWS, NUM_INPUTS), (NUM_OUTPUTS, NUM_INPUTS), (NUM_ROWS, NUM_OUTPUTS))
        )
        self.bias = torch.randn(NUM_OUTPUTS, generator=generator, dtype=torch.float64)

    @property
    def world_size(self) -> int:
        return len(self.groups)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's inputs."""
        return whole.chunk(self.world_size, 1)[rank].contiguous()

    def run(self, call: Callable[[int, OverlappedLinear, Tensor, Communicators], Tensor]) -> list[Tensor]:
        """What each rank's call gives for its number, weight, inputs and communicators."""

        def one(group: TensorGroup) -> Tensor:
            rank = group.shard.rank
            bias = self.bias if rank == 0 else None
            linear = OverlappedLinear(self.part(self.weight, rank), bias, ops=create_ops("reference"), adds=rank == 0)
            pair = Communicators(group.communicator(Phase.DECODE), group.communicator(Phase.PREFILL))
            return call(rank, linear, self.part(self.x, rank), pair)

        return list(self.pool.map(one, self.groups, timeout=30))


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    list(ranks.pool.map(TensorGroup.close, ranks.groups))
    ranks.pool.shutdown()


def context() -> StepContext:
    return StepContext(8, None, Phase.PREFILL)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_all_reduce_adds_all_products_to_the_first_rank_s_residual(ranks: Ranks, plan: Plan) -> None:
    def reduce(rank: int, linear: OverlappedLinear, x: Tensor, pair: Communicators) -> Tensor:
        residual = ranks.residual.clone() if rank == 0 else torch.full_like(ranks.residual, torch.nan)
        linear.all_reduce_(residual, x, pair, plan, context())
        return residual

    results = ranks.run(reduce)
    torch.testing.assert_close(results[0], ranks.residual + ranks.x @ ranks.weight.T + ranks.bias)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_reduce_scatter_and_all_gather_give_every_row_back(ranks: Ranks, plan: Plan) -> None:
    expected = ranks.x @ ranks.weight.T + ranks.bias
    ends = plan.row_ends(NUM_ROWS) if plan.overlaps else (NUM_ROWS,)

    def scatter(rank: int, linear: OverlappedLinear, x: Tensor, pair: Communicators) -> Tensor:
        own = torch.full((NUM_ROWS // ranks.world_size, NUM_OUTPUTS), torch.nan, dtype=torch.float64)
        linear.reduce_scatter(own, x, pair, plan, context())
        rows = [row for part in owned_rows(ends, rank, ranks.world_size) for row in part]
        torch.testing.assert_close(own, expected[rows])
        whole = torch.full_like(expected, torch.nan)
        all_gather(whole, own, ends, pair.alone)
        return whole

    for whole in ranks.run(scatter):
        torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_all_to_all_sends_rows_to_their_ranks(ranks: Ranks, plan: Plan) -> None:
    ends = plan.row_ends(NUM_ROWS) if plan.overlaps else (NUM_ROWS,)

    def send(rank: int, linear: OverlappedLinear, x: Tensor, pair: Communicators) -> Tensor:
        out = torch.full((NUM_ROWS, NUM_OUTPUTS), torch.nan, dtype=torch.float64)
        linear.all_to_all(out, x, pair, plan, context())
        return out

    products = [ranks.part(ranks.x, rank) @ ranks.part(ranks.weight, rank).T for rank in range(ranks.world_size)]
    products[0] += ranks.bias
    for rank, out in enumerate(ranks.run(send)):
        parts = owned_rows(ends, rank, ranks.world_size)
        torch.testing.assert_close(out, torch.cat([product[list(part)] for part in parts for product in products]))


def test_owned_rows_are_a_partition() -> None:
    owned = [[row for part in owned_rows((128, 384, 500), rank, 4) for row in part] for rank in range(4)]
    assert sorted(sum(owned, [])) == list(range(500))
    assert owned[1] == [*range(32, 64), *range(192, 256), *range(413, 442)]


class Log:
    """What would be launched on a GPU, in order, with the stream that it is launched on."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.stream = "main"

    def __call__(self, text: str) -> None:
        self.entries.append(f"{self.stream}: {text}")


class Stream:
    """A CUDA stream that only says what happens on it."""

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log
        self.num_events = 0

    def record_event(self) -> str:
        self.num_events += 1
        self.log.entries.append(f"{self.name}: event {self.num_events}")
        return f"{self.name}'s event {self.num_events}"

    def wait_event(self, event: str) -> None:
        self.log.entries.append(f"{self.name}: wait for {event}")

    def wait_stream(self, stream: Stream) -> None:
        self.log.entries.append(f"{self.name}: wait for {stream.name}")

    def beside(self, stream: object) -> Any:
        return Stream("side", self.log)

    def __enter__(self) -> Stream:
        self.log.stream = self.name
        return self

    def __exit__(self, *args: object) -> None:
        self.log.stream = "main"


class Lonely:
    """The communicator of one rank."""

    rank, world_size = 0, 1

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def all_reduce_(self, tensor: Tensor) -> None:
        assert not tensor.isnan().any(), "rows that are not there yet"
        self.log(f"{self.name} all-reduce of {len(tensor)}")


def log_launches(monkeypatch: pytest.MonkeyPatch, log: Log, *, adds: bool) -> tuple[OverlappedLinear, Tensor, Tensor]:
    """A product of 300 x 16 inputs on streams that log, with its inputs and weight."""
    from semipd.kernels import gemm_signal, stream_wait

    main = Stream("main", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    config = gemm_signal.GemmSignalConfig(block_n=16, block_k=16, uses_hopper=False)
    monkeypatch.setattr(gemm_signal, "config_for", lambda *tensors: config)
    monkeypatch.setattr("semipd.parallel.overlap._Signals.config", lambda *tensors: config)
    product, wait = gemm_signal.gemm_signal, stream_wait.stream_wait

    def logged_product(*args: Any, **options: Any) -> None:
        log(f"product on {options['num_sms']}, {options['num_reserved']} of them leave")
        product(*args, **options)

    def logged_wait(counter: Tensor, target: int, flag: Tensor, **options: Any) -> None:
        log(f"wait for {target}")
        wait(counter, target, flag, **options)

    monkeypatch.setattr(gemm_signal, "gemm_signal", logged_product)
    monkeypatch.setattr(stream_wait, "stream_wait", logged_wait)
    x, weight = torch.randn(300, 16), torch.randn(20, 16)
    release = Release(CPU)
    linear = OverlappedLinear(weight, ops=create_ops("reference"), adds=adds, sides=main, release=release)
    return linear, x, weight


@pytest.mark.skipif(not is_interpreted(), reason="what runs here is memory of the CPU")
@pytest.mark.parametrize("adds", [True, False])
def test_what_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, adds: bool) -> None:
    log = Log()
    linear, x, weight = log_launches(monkeypatch, log, adds=adds)
    residual = torch.randn(300, 20)
    communicators: list[Communicator] = [Lonely(name, log) for name in ("narrow", "wide")]  # type: ignore[misc]
    out = residual.clone() if adds else torch.full_like(residual, torch.nan)
    memory: dict[str, Tensor] = {}

    class Memory:
        def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            assert not log.entries, "memory is made before a step can be captured"
            return memory.setdefault(name, torch.zeros(shape, dtype=dtype))

    linear.all_reduce_(
        out, x, Communicators(communicators[0], communicators[1]), Plan((1, 2, 3), 2), StepContext(4, Memory())
    )
    torch.testing.assert_close(out, x @ weight.T + (residual if adds else 0), rtol=1e-5, atol=1e-5)
    assert log.entries == [
        "main: event 1",
        "side: wait for main's event 1",
        "main: product on 4, 2 of them leave",
        "main: event 2",
        "side: wait for 4",
        "side: narrow all-reduce of 128",
        "side: event 1",
        "side: wait for 4",
        "side: narrow all-reduce of 128",
        "side: event 2",
        "side: wait for main's event 2",
        "side: wide all-reduce of 44",
        "side: event 3",
        "main: wait for side's event 3",
    ]
    assert not memory["overlap_counters"].any(), "for the next product"


class LoggedCopies:
    """Copies that only say what is asked of them; the other rank's rows are ones."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def begin(self) -> None:
        self.log("begin")

    def send(self, rows: Tensor, first_row: int, group: int) -> None:
        assert not rows.isnan().any(), "rows that are not there yet"
        self.log(f"send {len(rows)} to {first_row} as {group}")

    def receive(self, num_rows: int, first_row: int, group: int) -> Tensor:
        self.log(f"receive {num_rows} at {first_row} as {group}")
        return torch.ones(num_rows, 20)


@pytest.mark.skipif(not is_interpreted(), reason="what runs here is memory of the CPU")
def test_what_a_gpu_is_told_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    linear, x, weight = log_launches(monkeypatch, log, adds=False)
    out = torch.full((300, 20), torch.nan)
    alone: Any = Lonely("wide", log)
    communicators = Communicators(alone, alone, LoggedCopies(log))  # type: ignore[arg-type]
    linear.all_reduce_(out, x, communicators, Plan((1, 2, 3), copies=True), StepContext(4))
    torch.testing.assert_close(out, x @ weight.T + 1, rtol=1e-5, atol=1e-5)
    assert log.entries == [
        "main: event 1",
        "side: wait for main's event 1",
        "main: product on 3, 0 of them leave",
        "main: event 2",
        "side: begin",
        "side: wait for 4",
        "side: send 128 to 0 as 0",
        "side: event 1",
        "side: wait for 4",
        "side: send 128 to 128 as 1",
        "side: event 2",
        "side: wait for main's event 2",
        "side: send 44 to 256 as 2",
        "side: event 3",
        "main: wait for side's event 1",
        "main: receive 128 at 0 as 0",
        "main: wait for side's event 2",
        "main: receive 128 at 128 as 1",
        "main: wait for side's event 3",
        "main: receive 44 at 256 as 2",
    ]


def test_a_release_is_for_good() -> None:
    with torch.inference_mode():  # as an engine is built; whoever releases knows nothing of that
        release = Release(CPU)
    release.check()
    release.set()
    assert release.is_set
    with pytest.raises(RankError):
        release.check()


class OnePlan:
    """A planner that knows one plan, for steps on 8 SMs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, num_rows: int, weight_OI: Tensor, context: StepContext) -> Plan | None:
        assert num_rows == NUM_ROWS
        return self._plan if context.num_sms == 8 else None


class Widths:
    """A rank's group that notes which communicators are asked for."""

    def __init__(self, group: TensorGroup) -> None:
        self.shard = group.shard
        self.asked: list[tuple[Phase, int | None]] = []
        self._group = group

    def communicator(self, phase: Phase, num_ctas: int | None = None) -> Communicator:
        self.asked.append((phase, num_ctas))
        return self._group.communicator(phase, num_ctas)


@pytest.mark.parametrize(
    ("plan", "num_sms", "expected"),
    [(PLANS[1], 8, {2, ALONE_CTAS}), (SEQUENCE, 8, {0, ALONE_CTAS}), (PLANS[1], 4, {None})],
    ids=["overlapped", "sequence", "beside the other lane"],
)
def test_products_of_layers_take_the_planner_s_plan(
    ranks: Ranks, plan: Plan, num_sms: int, expected: set[int | None]
) -> None:
    groups = [Widths(group) for group in ranks.groups]

    def reduce(rank: int, linear: OverlappedLinear, x: Tensor, pair: Communicators) -> Tensor:
        make = OverlappedProducts(OnePlan(plan), None, None)
        group: Any = groups[rank]
        product = make(ranks.part(ranks.weight, rank), None, ops=create_ops("reference"), group=group)
        residual, alone = ranks.residual.clone(), torch.empty_like(ranks.residual)
        step = StepContext(num_sms, None, Phase.PREFILL)
        normed = product.add_norm(residual, x, NORM, step)
        torch.testing.assert_close(normed, NORM(residual, step))
        product.write_(alone, x, step)
        torch.testing.assert_close(alone, x @ ranks.part(ranks.weight, rank).T)
        return residual

    for result in ranks.run(reduce):
        torch.testing.assert_close(result, ranks.residual + ranks.x @ ranks.weight.T)
    assert all(set(group.asked) == {(Phase.PREFILL, num_ctas) for num_ctas in expected} for group in groups)

"""Many engines behind one router, in windows of time.

At the start of a window every engine reports its load; all arrivals of the window are routed by those reports, so a
router's knowledge is up to one window old. Within a window engines know nothing of each other: they run in any order,
or in worker processes, and the result is the same.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.simulation.device import StepTimes
from benchmarks.simulation.engine import EngineShape
from benchmarks.simulation.routers import Router
from benchmarks.simulation.target import VOCAB_SIZE, Flights
from semipd.bench.metrics import RequestRecord, Status
from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest
from semipd.config import SLO, PolicyConfig

Arrivals = Sequence[tuple[int, PlannedRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of a request of a fleet; times are seconds from the start, infinite for what never came."""

    engine: int
    request: PlannedRequest
    first: float
    last: float
    worst_gap: float | None

    @property
    def ttft(self) -> float:
        """Due to first token."""
        return self.first - self.request.due

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first; None for one token."""
        num_gaps = self.request.num_output_tokens - 1
        return (self.last - self.first) / num_gaps if num_gaps > 0 and self.last < math.inf else None

    def attains(self, slo: SLO) -> bool:
        """Whether it ended within its targets."""
        is_ended = self.last < math.inf
        return is_ended and slo.is_attained(ttft=self.ttft, tpot=self.tpot, worst_gap=self.worst_gap)


class Shard(Protocol):
    """Some engines of a fleet, by their numbers in it."""

    def begin(self, until: float, arrivals: Arrivals) -> None:
        """Start to let these requests arrive and everything happen up to `until`."""
        ...

    def loads(self) -> Sequence[float]:
        """Outstanding tokens of its engines, once they are there."""
        ...

    def close(self) -> Sequence[Served]:
        """Give up what is still open; everything that was served."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What the engines of a fleet have in common."""

    shape: EngineShape
    policy: PolicyConfig
    slo: SLO | None
    times: StepTimes
    prompt_seed: int
    run: int


class LocalShard:
    """Engines with the real scheduler in this process."""

    def __init__(self, spec: EngineSpec, numbers: Sequence[int]) -> None:
        maker = PromptMaker(vocab_size=VOCAB_SIZE, seed=spec.prompt_seed, run=spec.run)
        self._flights = {
            number: Flights(
                spec.shape,
                policy=spec.policy,
                slo=spec.slo,
                times=spec.times,
                maker=maker,
                seed=spec.prompt_seed + 1_000_003 * (number + 1),
            )
            for number in numbers
        }

    def begin(self, until: float, arrivals: Arrivals) -> None:
        for number, request in arrivals:
            self._flights[number].send(request)
        for flights in self._flights.values():
            flights.engine.advance(until)

    def loads(self) -> Sequence[float]:
        return [flights.outstanding_tokens() for flights in self._flights.values()]

    def close(self) -> Sequence[Served]:
        served = []
        for number, flights in self._flights.items():
            flights.give_up()
            flights.engine.advance(flights.engine.clock.now + 60.0)
            flights.engine.check_integrity()
            served += [_served(number, record) for record in flights.records()]
        return served


def _served(engine: int, record: RequestRecord) -> Served:
    is_ended = record.status is Status.OK
    return Served(
        engine=engine,
        request=record.request,
        first=record.token_times[0] if record.token_times else math.inf,
        last=record.token_times[-1] if is_ended else math.inf,
        worst_gap=record.worst_gap,
    )


class ProcessShard:
    """A `LocalShard` in a worker process. An error there is raised here, by the next call."""

    def __init__(self, spec: EngineSpec, numbers: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, spec, tuple(numbers)), daemon=True)
        self._process.start()
        other.close()

    def begin(self, until: float, arrivals: Arrivals) -> None:
        self._connection.send((until, arrivals))

    def loads(self) -> Sequence[float]:
        loads: Sequence[float] = self._receive()
        return loads

    def close(self) -> Sequence[Served]:
        self._connection.send(None)
        served: Sequence[Served] = self._receive()
        self._process.join()
        self._connection.close()
        return served

    def _receive(self) -> Any:
        """The worker's next answer."""
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _work(connection: Connection, spec: EngineSpec, numbers: Sequence[int]) -> None:
    """The worker's life: windows, then the end."""
    try:
        shard = LocalShard(spec, numbers)
        while (window := connection.recv()) is not None:
            shard.begin(*window)
            connection.send(shard.loads())
        connection.send(shard.close())
    except EOFError:  # the other end is gone
        return
    except BaseException as error:
        connection.send(error)


def make_shards(spec: EngineSpec, num_engines: int, num_processes: int) -> list[Shard]:
    """The fleet's engines, dealt to so many worker processes; all here for one."""
    if num_processes <= 1 or num_engines == 1:
        return [LocalShard(spec, range(num_engines))]
    num_shards = min(num_processes, num_engines)
    bounds = [num_engines * index // num_shards for index in range(num_shards + 1)]
    return [ProcessShard(spec, range(first, last)) for first, last in itertools.pairwise(bounds)]


def run_fleet(
    shards: Sequence[Shard],
    sizes: Sequence[int],
    router: Router,
    requests: Sequence[PlannedRequest],
    *,
    staleness: float,
    drain: float,
    on_window: Callable[[int], None] = lambda count: None,
) -> list[Served]:
    """Route the requests and serve them.

    Args:
        shards: the engines, in order of their numbers.
        sizes: engines of each shard.
        router: chooses.
        requests: in order of their times.
        staleness: seconds of a window.
        drain: seconds after the last arrival in which requests may end.
        on_window: called after each window with the number of its arrivals.
    """
    owner = [index for index, size in enumerate(sizes) for _ in range(size)]
    next_request = 0
    for number in itertools.count(1):
        end = number * staleness
        first = next_request
        dealt: list[list[tuple[int, PlannedRequest]]] = [[] for _ in shards]
        while next_request < len(requests) and requests[next_request].due < end:
            engine = router.choose(requests[next_request])
            dealt[owner[engine]].append((engine, requests[next_request]))
            next_request += 1
        for shard, arrivals in zip(shards, dealt, strict=True):
            shard.begin(end, arrivals)
        router.update([load for shard in shards for load in shard.loads()])
        on_window(next_request - first)
        if next_request == len(requests) and (not router.loads.any() or end > requests[-1].due + drain):
            break
    served = [served for shard in shards for served in shard.close()]
    return sorted(served, key=lambda one: one.request.index)

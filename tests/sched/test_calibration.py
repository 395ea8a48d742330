"""Calibration: it runs when nothing else does, leaves no trace, gives way within a step, and teaches the model."""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.step_table import StepTable
from semipd.config import Phase
from semipd.latency_figures import H100_LLAMA_3_8B, stored_state
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import Metrics
from semipd.request import Request, SamplingParams
from semipd.sched.adaptive import Adaptive
from semipd.sched.batch import Batch, StepResult
from semipd.sched.calibration import LIMIT, Calibrator, usual_trials
from semipd.sched.events import StepEvents
from semipd.sched.latency import LatencyModel, StepKind, StepWork
from semipd.sched.scheduler import Scheduler, SchedulerConfig
from semipd.sched.sizing import on_grid

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "h100_step_times.json"
NUM_SMS = 132
SPLITS = [(NUM_SMS - 8 * groups, 8 * groups) for groups in range(1, 15)]


def h100(work: StepWork) -> float:
    """About an H100 with Llama-3-8B, not in the model's form."""
    share, other = work.num_sms / NUM_SMS, work.other_sms / NUM_SMS
    memory, compute = (share + 0.1) / (1.1 * share) * (1.0 + 0.6 * other), math.pow(share, -0.8) * (1.0 + 1.3 * other)
    rows = work.num_decodes + work.num_prompt_tokens
    products = math.hypot(5.9e-3 * memory, 23e-6 * compute * rows) + (rows > 64) * 0.5e-3 * memory
    return products + 44e-9 * memory * work.context_tokens + 0.6e-9 * compute * work.prompt_pairs


class Simulation:
    """The real scheduler with a device of step times under a virtual clock, and no threads."""

    def __init__(
        self,
        seconds: Callable[[StepWork], float] = h100,
        *,
        latency: LatencyModel | None = None,
        num_blocks: int = 6000,
        block_size: int = 64,
        max_model_len: int = 8192,
        max_num_seqs: int = 256,
        is_usual: Callable[[Batch], bool] = lambda batch: True,
    ) -> None:
        self.now = 0.0
        self.latency = latency or LatencyModel(NUM_SMS)
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.events: list[StepEvents] = []
        self.num_done = 0
        self.launched: list[tuple[Batch, StepWork, float]] = []  # and when it began
        self._seconds, self._is_usual = seconds, is_usual
        self._rng = random.Random(0)
        self._queued: dict[Phase, deque[tuple[Batch, float, float]]] = {phase: deque() for phase in Phase}
        policy = Adaptive(num_sms=NUM_SMS, splits=SPLITS, max_tokens=2048, latency=self.latency)
        self.calibrator = Calibrator(
            tuple(usual_trials(NUM_SMS, policy.splits)),
            num_sms=NUM_SMS,
            num_slots=max_num_seqs,
            max_tokens=max_model_len,
            max_chunk=2048,
            vocab_size=1000,
            latency=self.latency,
            allocator=self.allocator,
            on_done=self._count,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_prefill_tokens=2048,
                num_sms=NUM_SMS,
                shares={
                    phase: tuple(sorted({split[index] for split in SPLITS} | {NUM_SMS}))
                    for index, phase in enumerate(Phase)
                },
            ),
            allocator=self.allocator,
            policy=policy,
            latency=self.latency,
            metrics=Metrics(),
            emit=self.events.append,
            clock=lambda: self.now,
            calibrator=self.calibrator,
        )

    def _count(self) -> None:
        self.num_done += 1

    def submit(self, num_tokens: int = 200, max_tokens: int = 3, token: int = 1) -> Request:
        request = Request(
            request_id="r",
            prompt_token_ids=(token,) * num_tokens,
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            arrival_time=self.now,
            seed=0,
            max_tokens=max_tokens,
        )
        self.scheduler.add([request])
        return request

    def step(self) -> bool:
        """Launch what may be launched, then let the step end that ends first; False when there is none."""
        for phase, queued in self._queued.items():
            while len(queued) < 2 and (batch := self.scheduler.next_batch(phase)) is not None:
                work = self.scheduler._in_flight.works(phase)[-1]
                seconds = self._seconds(work) * self._rng.lognormvariate(0.0, 0.02)
                start = max(self.now, queued[-1][1]) if queued else self.now
                queued.append((batch, start + seconds, seconds))
                self.launched.append((batch, work, start))
        first = min((queue for queue in self._queued.values() if queue), key=lambda queue: queue[0][1], default=None)
        if first is None:
            return False
        batch, self.now, seconds = first.popleft()
        tokens = [1] * (len(batch.decode_slots) + sum(entry.samples for entry in batch.prefill))
        self.scheduler.commit(batch, StepResult(tokens, self.now, seconds, is_usual=self._is_usual(batch)))
        if len(self.launched) % 16 == 0:
            self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        while self.step():
            assert len(self.launched) < 20_000, "it never ends"

    def run_until_done(self, request: Request) -> None:
        while not request.is_finished:
            assert self.step()


def test_it_waits_for_the_first_token_and_ends_within_seconds() -> None:
    simulation = Simulation()
    simulation.run()
    assert not simulation.launched
    simulation.run_until_done(simulation.submit())
    start, num_steps = simulation.now, len(simulation.launched)
    simulation.run()
    assert simulation.num_done == 1 and simulation.latency.is_calibrated
    assert len(simulation.launched) > num_steps and simulation.now - start < 4.0


def test_nothing_of_it_is_seen() -> None:
    simulation = Simulation()
    request = simulation.submit()
    simulation.run_until_done(request)
    seen = []
    while simulation.step():
        seen.append(simulation.scheduler.statistics())
    reference = Simulation()
    reference.calibrator._trials.clear()
    reference.run_until_done(reference.submit())
    reference.run()
    end = reference.scheduler.statistics()
    assert len(seen) > 100
    assert seen[-1] == seen[0]
    for name in ("num_prompt_tokens", "num_generation_tokens", "kv_cache_usage", "num_cached_blocks", "num_waiting"):
        assert getattr(seen[-1], name) == getattr(end, name), name
    assert seen[-1].step_time == end.step_time
    assert len(simulation.events) == len(reference.events)


def test_the_prefix_cache_stays_as_it_was() -> None:
    simulation = Simulation(num_blocks=200, max_num_seqs=8)
    prompts = [simulation.submit(64 * 20, token=token) for token in range(5)]
    for prompt in prompts:
        simulation.run_until_done(prompt)
    cached = simulation.allocator.statistics().num_cached_blocks
    assert cached >= 100
    simulation.run()
    statistics_after = simulation.allocator.statistics()
    assert simulation.num_done == 1
    assert (statistics_after.num_cached_blocks, statistics_after.num_evictions) == (cached, 0)
    again = simulation.submit(64 * 20, token=2)
    simulation.run_until_done(again)
    assert again.num_cached_tokens == 64 * 19


def test_a_pool_that_is_all_cache_is_left_alone() -> None:
    simulation = Simulation(num_blocks=20, max_num_seqs=2)
    simulation.run_until_done(simulation.submit(64 * 20 - 1, max_tokens=1))
    simulation.allocator._free.clear()  # as if the last block held something, too
    num_launched = len(simulation.launched)
    while simulation.num_done == 0:
        simulation.step()
    assert len(simulation.launched) == num_launched
    assert not simulation.latency.is_calibrated


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30, 100, 200])
def test_a_request_waits_for_a_step_at_most_and_calibration_goes_on_behind_it(num_steps: int) -> None:
    simulation = Simulation()
    simulation.run_until_done(simulation.submit())
    for _ in range(num_steps):
        simulation.step()
    num_launched = len(simulation.launched)
    request = simulation.submit(max_tokens=20)
    simulation.run_until_done(request)
    assert request.first_scheduled_time is not None
    assert request.first_scheduled_time - request.arrival_time < 1.2 * LIMIT  # it is what was predicted
    mine = simulation.launched[num_launched:]
    assert len(mine) == 20 and all(start >= request.first_scheduled_time for _, _, start in mine)
    simulation.run()
    assert simulation.num_done == 1


def test_its_steps_are_short_and_its_blocks_nobodys() -> None:
    simulation = Simulation()
    request = simulation.submit(max_tokens=1)
    simulation.run_until_done(request)
    num_launched = len(simulation.launched)
    unused = set(simulation.allocator.unused_blocks())
    simulation.run()
    for batch, work, _ in simulation.launched[num_launched:]:
        assert h100(work) < 1.3 * LIMIT and work.num_prompt_tokens <= 512
        blocks = [block for update in batch.block_updates for block in update.block_ids]
        assert len(set(blocks)) == len(blocks) and unused.issuperset(blocks)


def test_steps_before_their_graph_teach_nothing() -> None:
    simulation = Simulation(is_usual=lambda batch: False)
    simulation.run_until_done(simulation.submit())
    simulation.run()
    assert simulation.num_done == 1
    assert not simulation.latency.to_state()["measured"]


def test_steps_that_get_their_graph_late_are_measured_then() -> None:
    simulation = Simulation(is_usual=lambda batch: len(simulation.launched) > 150)
    simulation.run_until_done(simulation.submit())
    simulation.run()
    reference = Simulation()
    reference.run_until_done(reference.submit())
    reference.run()
    assert len(simulation.latency.to_state()["measured"]) == len(reference.latency.to_state()["measured"])


@pytest.mark.parametrize(("num_blocks", "block_size", "max_num_seqs"), [(1, 4, 1), (20, 4, 2), (60, 16, 3)])
def test_a_pool_too_small_for_it_does_no_harm(num_blocks: int, block_size: int, max_num_seqs: int) -> None:
    simulation = Simulation(num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=60)
    simulation.run_until_done(simulation.submit(2, max_tokens=1))
    simulation.run()
    assert simulation.num_done == 1
    for batch, _, _ in simulation.launched:
        for entry in batch.prefill:
            assert entry.slot < max_num_seqs


def test_a_larger_mixed_step_is_trusted_at_once() -> None:
    simulation = Simulation()
    assert simulation.latency.trusted_prompt_tokens < 100
    simulation.run_until_done(simulation.submit())
    simulation.run()
    assert simulation.latency.trusted_prompt_tokens >= 256


def model_errors(model: LatencyModel, table: StepTable, seen: set[StepWork]) -> dict[str, tuple[float, float]]:
    """Median and p95 of |predicted / measured - 1| at the table's own points, by kind, but for those `seen`."""
    found: dict[str, list[float]] = {}
    for work, seconds in table.points:
        is_asked_for = work.num_sms == NUM_SMS if work.other_sms == 0 else work.num_sms + work.other_sms == NUM_SMS
        if is_asked_for and work not in seen:
            error = abs(model.predict(work) / seconds - 1.0)
            found.setdefault(str(work.kind), []).append(error)
            found.setdefault("all", []).append(error)
    return {kind: (statistics.median(v), sorted(v)[int(0.95 * (len(v) - 1))]) for kind, v in sorted(found.items())}


def slower_device() -> LatencyModel:
    """The stored figures of a device with half the H100's compute and two thirds of its bandwidth, wrongly told so."""
    state = stored_state(H100_LLAMA_3_8B, NUM_SMS)
    for cell in state["given"]:
        cell[3] = [value * factor for value, factor in zip(cell[3], (0.6, 2.0, 1.5, 2.0), strict=True)]
    return LatencyModel.from_state(state)


@pytest.mark.skipif(not TABLE.is_file(), reason="benchmarks/results is not here")
@pytest.mark.parametrize(
    ("start", "of_kinds"),
    [
        pytest.param(lambda: LatencyModel(NUM_SMS), 0.1, id="nothing"),
        pytest.param(lambda: LatencyModel.from_state(stored_state(H100_LLAMA_3_8B, NUM_SMS)), 0.06, id="stored"),
        pytest.param(slower_device, 0.06, id="another_device"),
    ],
)
def test_what_it_teaches_holds_where_it_never_was(start: Callable[[], LatencyModel], of_kinds: float) -> None:
    table = StepTable.load(TABLE)
    simulation = Simulation(table.seconds, latency=start())
    simulation.run_until_done(simulation.submit())
    simulation.run()
    errors = model_errors(simulation.latency, table, {work for _, work, _ in simulation.launched})
    assert errors["all"][0] < 0.05 and errors["all"][1] < 0.16
    for kind in StepKind:
        assert errors[str(kind)][0] < of_kinds, kind


def test_mixed_steps_have_sizes_that_policies_choose() -> None:
    mixed = [trial for trial in usual_trials(NUM_SMS, ()) if trial.num_decodes and trial.chunk]
    sizes = [trial.num_decodes + trial.chunk for trial in mixed]
    assert len(sizes) >= 4 and sizes == [on_grid(size, 3) for size in sizes]

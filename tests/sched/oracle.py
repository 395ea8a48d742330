"""A model made of integers: it checks that every step reads exactly the tokens it should, through real block tables.

The pool stores token ids where a real one stores keys and values. A step fails at once when a row would read a block
that was not written, was reused, or belongs to somebody else. The next token is a hash of everything that the row may
read, so greedy results depend on the prompt alone and any two schedules must agree to the token.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from semipd.config import SLO, Phase
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import Metrics
from semipd.request import FinishReason, Request, RequestStatus, SamplingParams
from semipd.sched.baselines import Static
from semipd.sched.batch import Batch, StepResult
from semipd.sched.events import StepEvents
from semipd.sched.latency import LatencyModel
from semipd.sched.policy import Policy
from semipd.sched.scheduler import Scheduler, SchedulerConfig

VOCAB = 97


def next_token(tokens: Sequence[int]) -> int:
    """The oracle's greedy choice after `tokens`."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def expected_output(prompt: Sequence[int], num_tokens: int, window: int | None = None) -> list[int]:
    """What a request must generate, however it is scheduled."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens[-window:] if window else tokens))
    return tokens[len(prompt) :]


class OraclePool:
    """Device state: a pool of token ids, and per slot a block table, a length and the last token."""

    def __init__(self, num_blocks: int, block_size: int, window: int | None = None) -> None:
        self._block_size = block_size
        self._window = window
        self._pool: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def run(self, batch: Batch) -> list[int]:
        """Execute a step; returns the tokens of its sampled rows."""
        for update in batch.block_updates:
            table = self.tables.setdefault(update.slot, [])
            assert update.index <= len(table)
            table[update.index :] = update.block_ids
        sampled = []
        assert len(set(batch.decode_slots)) == len(batch.decode_slots), "two rows of a step decode the same request"
        for slot in batch.decode_slots:
            position = self._lengths[slot]
            self._write(slot, position, self._last[slot])
            self._lengths[slot] = position + 1
            sampled.append(self._sample(slot, position))
        for entry in batch.prefill:
            assert entry.admit is not None or self._lengths[entry.slot] == entry.start, (
                "a chunk does not follow its last"
            )
            for position, token in enumerate(entry.token_ids, start=entry.start):
                self._write(entry.slot, position, token)
            self._lengths[entry.slot] = entry.start + len(entry.token_ids)
            if entry.samples:
                sampled.append(self._sample(entry.slot, self._lengths[entry.slot] - 1))
        return sampled

    def _write(self, slot: int, position: int, token: int) -> None:
        block = self.tables[slot][position // self._block_size]
        self._pool[block][position % self._block_size] = token

    def _sample(self, slot: int, position: int) -> int:
        first = 0 if self._window is None else max(0, position + 1 - self._window)
        tokens = []
        for index in range(first, position + 1):
            token = self._pool[self.tables[slot][index // self._block_size]][index % self._block_size]
            assert token is not None, f"slot {slot} reads position {index}, which was never written"
            tokens.append(token)
        self._last[slot] = next_token(tokens)
        return self._last[slot]


@dataclass
class Driver:
    """Drives the real scheduler without threads: launches, runs and commits steps in any legal order."""

    num_blocks: int = 64
    block_size: int = 4
    max_num_seqs: int = 8
    max_prefill_tokens: int = 16
    num_sms: int = 2
    steps_ahead: int = 1
    prefill_steps_ahead: int = 0
    window: int | None = None
    caching: bool = True
    max_queued: int | None = None
    policy: Policy = field(default_factory=lambda: Static(2, (1, 1)))
    latency: LatencyModel = field(default_factory=lambda: LatencyModel(2))
    now: float = 0.0

    def __post_init__(self) -> None:
        self.allocator = BlockAllocator(self.num_blocks, self.block_size, enable_prefix_caching=self.caching)
        self.metrics = Metrics()
        self.events: list[StepEvents] = []
        self.pool = OraclePool(self.num_blocks, self.block_size, self.window)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_prefill_tokens=self.max_prefill_tokens,
                num_sms=self.num_sms,
                shares=dict.fromkeys(Phase, (1, self.num_sms)),
                window=self.window,
                max_queued_requests=self.max_queued,
            ),
            allocator=self.allocator,
            policy=self.policy,
            latency=self.latency,
            metrics=self.metrics,
            emit=self.events.append,
            clock=lambda: self.now,
        )
        self.in_flight: dict[Phase, deque[tuple[Batch, list[int] | None]]] = {phase: deque() for phase in Phase}
        self.requests: list[Request] = []

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        priority: int = 0,
        stop: Sequence[int] = (),
        n: int = 1,
        slo: SLO | None = None,
    ) -> list[Request]:
        """Queue `n` samples of a prompt."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, priority=priority)
        requests: list[Request] = []
        for index in range(n):
            request = Request(
                request_id=f"r{len(self.requests)}",
                prompt_token_ids=tuple(prompt),
                params=params,
                arrival_time=self.now,
                seed=0,
                max_tokens=max_tokens,
                stop_token_ids=frozenset(stop),
                sample_index=index,
                slo=slo,
                leader=requests[0] if requests else None,
            )
            requests.append(request)
            self.requests.append(request)
        self.scheduler.add(requests)
        return requests

    def launch(self, phase: Phase) -> bool:
        """Launch one step of `phase` as its lane would; False when the lane may not or has nothing."""
        ahead = self.steps_ahead if phase is Phase.DECODE else self.prefill_steps_ahead
        if len(self.in_flight[phase]) > ahead:
            return False
        batch = self.scheduler.next_batch(phase)
        if batch is None:
            return False
        assert batch.num_tokens > 0
        held = max((b.num_sms for b, _ in self.in_flight[phase.other]), default=0)
        plan = self.scheduler.statistics().plan
        assert plan is not None
        is_over_subscribed = plan.prefill_sms + plan.decode_sms > self.num_sms
        assert held + batch.num_sms <= self.num_sms or is_over_subscribed, "both lanes hold the same SMs"
        self.in_flight[phase].append((batch, None))
        return True

    def run(self, phase: Phase) -> bool:
        """Execute the oldest launched step of `phase` that has not run."""
        for index, (batch, result) in enumerate(self.in_flight[phase]):
            if result is None:
                self.in_flight[phase][index] = (batch, self.pool.run(batch))
                return True
        return False

    def commit(self, phase: Phase) -> bool:
        """Commit the oldest step of `phase`, running it first if it has not."""
        if not self.in_flight[phase]:
            return False
        batch, result = self.in_flight[phase].popleft()
        self.now += 0.01
        self.scheduler.commit(batch, StepResult(result if result is not None else self.pool.run(batch), self.now, 0.01))
        return True

    def finish_all(self, limit: int = 20_000) -> None:
        """Run to the end; fails when nothing can move while requests are open."""
        num_idle = 0  # rounds; a policy that changes its mind may park both lanes for some
        for _ in range(limit):
            moved = [action(phase) for action in (self.launch, self.run, self.commit) for phase in Phase]
            num_idle = 0 if any(moved) else num_idle + 1
            if num_idle == 50:
                break
        stuck = [r.request_id for r in self.requests if not r.is_finished]
        assert not stuck, f"nothing moves, but these wait: {stuck}; {self.scheduler.statistics()}"

    def random_walk(self, rng: random.Random, num_actions: int, extra: Callable[[], object] | None = None) -> None:
        """Launch, run and commit in random order."""
        actions = (self.launch, self.run, self.commit)
        for _ in range(num_actions):
            rng.choice(actions)(rng.choice(list(Phase)))
            if extra is not None and rng.random() < 0.1:
                extra()

    def serve_random_load(self, rng: random.Random) -> None:
        """Requests at random moments between random actions, to their end; every token is checked."""
        for _ in range(8):
            self.submit([rng.randrange(50) for _ in range(rng.randint(1, 24))], rng.randint(1, 12))
            self.random_walk(rng, rng.randint(0, 30), self.scheduler.check_integrity)
        self.finish_all()
        assert_outputs(self)
        self.assert_clean()

    def assert_clean(self) -> None:
        """Nothing is held once every request has ended."""
        statistics = self.scheduler.statistics()
        assert statistics.num_waiting == 0 and not any(statistics.num_running.values())
        assert self.allocator.num_deferred_blocks == 0
        assert self.allocator.num_free_blocks == self.num_blocks
        self.scheduler.check_integrity()


def assert_outputs(driver: Driver, *, window: int | None = None) -> None:
    """Every request that was not aborted generated exactly what the oracle says."""
    for request in driver.requests:
        expected = expected_output(request.prompt_token_ids, request.max_tokens, window)
        if request.finish_reason is FinishReason.ABORT:
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            continue
        assert request.status is RequestStatus.FINISHED
        if request.finish_reason is FinishReason.STOP:
            expected = expected[: len(request.output_token_ids)]
            assert expected[-1] in request.stop_token_ids
            assert not request.stop_token_ids & set(expected[:-1])
        assert request.output_token_ids == expected, request.request_id

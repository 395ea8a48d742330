"""Which requests each step of each lane computes.

One scheduler serves both lanes under one lock, held for microseconds and never across device work. It decides in plain
integers: it knows the allocator and the policy, but neither tensors nor devices, so the same code runs in a simulator.
The one-writer rule: every `Request` that was added, the allocator and the queues change only under this lock. Who gets
memory stands in `admission.py`, what a finished step changes in `commit.py`, the ways of a request from queue to queue
in `queues.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from semipd.config import Phase, Plan, PlanKind
from semipd.errors import QueueFull
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import EngineStatistics, Metrics
from semipd.request import FinishReason, Request, RequestStatus
from semipd.sched.admission import Admission
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, StepResult
from semipd.sched.calibration import Calibrator
from semipd.sched.commit import Committer
from semipd.sched.decisions import Decision, DecisionLog, StepRecord
from semipd.sched.events import StepEvents
from semipd.sched.in_flight import InFlight, LaunchedStep
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.pace import Pace
from semipd.sched.policy import Load, Policy
from semipd.sched.queues import Queues
from semipd.sched.residency import Residency
from semipd.sched.staging import BatchStager, prefill_entry, sampling_features, stage_blocks
from semipd.sched.waiting import order_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits that the scheduler keeps, and the shares that the device offers.

    Attributes:
        max_num_seqs: requests that hold a slot at the same time.
        max_prefill_tokens: most prompt tokens in a step of the prefill lane.
        num_sms: units of the whole device.
        shares: per phase, the shares that have a stream, the whole device among them.
        window: sliding window behind which blocks are freed; None keeps all.
        max_queued_requests: bound of the waiting queue; None for none.
    """

    max_num_seqs: int
    max_prefill_tokens: int
    num_sms: int
    shares: dict[Phase, tuple[int, ...]]
    window: int | None = None
    max_queued_requests: int | None = None


class Scheduler:
    """Schedules and commits the steps of both lanes. Every public method takes the lock itself."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        allocator: BlockAllocator,
        policy: Policy,
        latency: LatencyModel,
        metrics: Metrics,
        emit: Callable[[StepEvents], None],
        clock: Callable[[], float],
        calibrator: Calibrator | None = None,
        trace: Callable[[Decision | StepRecord], None] | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._latency = latency
        self._metrics = metrics
        self._emit = emit
        self._clock = clock
        self._calibrator = calibrator
        self._changed = threading.Condition(threading.Lock())
        self._version = 0
        self._seen = dict.fromkeys(Phase, -1)
        self._is_stopped = False

        self._allocator = allocator
        self._residency = Residency(allocator, num_slots=config.max_num_seqs, window=config.window)
        self._in_flight = InFlight()
        self._queues = Queues(self._residency, self._in_flight)
        self._committer = Committer(self._queues, self._residency, metrics)
        self._stager = BatchStager()
        self._decisions = DecisionLog(latency, trace)
        self._pace = Pace(latency, config.num_sms, config.max_prefill_tokens)
        self._admission = Admission(
            self._queues, self._residency, self._pace, metrics, step_tokens=config.max_prefill_tokens
        )
        self._num_decode_steps = 0  # since the last step with prompt tokens

    # ---- requests come and go

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the samples of one prompt, all or none.

        Raises:
            QueueFull: they do not fit `max_queued_requests`.
        """
        for request in requests:  # nobody else sees them yet, so the lanes need not wait for it
            self._residency.hash_prompt(request)
            request.features = int(sampling_features(request))
        with self._changed:
            num_waiting, bound = self._queues.num_waiting, self._config.max_queued_requests
            if bound is not None and num_waiting + len(requests) > bound:
                raise QueueFull(
                    f"{num_waiting} requests wait and max_queued_requests is {bound}; retry later, raise the bound, or "
                    f"submit with wait=True"
                )
            for request in requests:
                request.num_tokens_to_find = self._residency.count_cached_tokens(request)
                request.urgency = self._queues.waiting.urgency(request)
                self._queues.add(request)
            self._notify()

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End `request` now; a step in flight that still holds it runs to its end before the blocks are free."""
        with self._changed:
            if not request.is_finished:
                events = StepEvents(self._clock())
                self._committer.finish(request, reason, stop_reason, events)
                if reason is not FinishReason.ABORT:
                    self._policy.observe(request.timings(events.time))
                self._emit(events)
                self._notify()

    def stop(self) -> None:
        """No further step is scheduled; lanes and waiters wake up."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def end_trace(self) -> None:
        """Trace what waits for a step; after `stop`, once no step will be committed."""
        with self._changed:
            self._decisions.end()

    # ---- the lanes

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopped

    def next_batch(self, phase: Phase) -> Batch | None:
        """The next step of `phase` under the present plan; None when it has nothing to do, or no share to do it on."""
        with self._changed:
            self._seen[phase] = self._version
            if self._is_stopped:
                return None
            if (calibrator := self._calibrator) is not None:
                is_idle = self._queues.is_empty and len(self._in_flight) == calibrator.num_launched
                batch = calibrator.next_batch(phase, self._in_flight, is_idle=is_idle)
                if batch is not None or calibrator.num_launched:
                    return batch  # a request that came waits for what is launched
            if self._admission.admit(self._clock()):
                self._stager.forget_slots()
            if phase is Phase.PREFILL and self._in_flight.is_mixed():
                return None  # the next chunks must neither run nor end before those of that step
            prompts = self._prompts_in_order()
            plan = self._choose_plan(prompts)
            num_sms = self._available_share(phase, plan)
            if num_sms == 0:
                return None
            updates: list[BlockUpdate] = []
            decodes = self._schedule_decodes(updates) if phase is Phase.DECODE else []
            budget = self._prefill_budget(phase, plan, num_sms, len(decodes))
            prefills, entries = self._schedule_prefills(prompts, budget, updates)
            if not decodes and not prefills:
                return None
            work = StepWork.of(
                num_sms,
                other_sms=self._in_flight.num_sms(phase.other),
                chunks=[(entry.start, len(entry.token_ids)) for entry in entries],
                num_decodes=len(decodes),
                context_tokens=_context_tokens(decodes),
            )
            is_full = any(request.num_scheduled_tokens < request.num_tokens for request in prompts)
            step = LaunchedStep(num_sms, decodes, prefills, work, is_full)
            return self._launch(phase, step, entries, tuple(updates))

    def commit(self, batch: Batch, result: StepResult) -> None:
        """Take over what a step computed: the only way in which requests advance."""
        with self._changed:
            if self._calibrator is not None and self._calibrator.commit(batch, result, self._in_flight):
                self._notify()
                return
            step = self._in_flight.done(batch.phase, batch.step_id)
            self._allocator.step_done(batch.step_id)
            self._decisions.on_commit(
                batch.phase, batch.step_id, step.work, time=result.done_time, seconds=result.seconds
            )
            self._pace.observe(step, result.seconds)
            if result.is_usual:
                self._latency.observe(step.work, result.seconds)
            events = self._committer.commit(step, batch.prefill, result)
            self._observe(batch, result, len(events.requests))
            for request in events.finished:
                self._policy.observe(request.timings(events.time))
            if events:
                self._emit(events)
            self._notify()

    def wait(self, phase: Phase) -> None:
        """Sleep until something changed since the last `next_batch(phase)`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._version != self._seen[phase])

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    # ---- observation

    def statistics(self) -> EngineStatistics:
        """A snapshot of counters and gauges."""
        with self._changed:
            queues, allocator = self._queues, self._allocator.statistics()
            return self._metrics.snapshot(
                num_running={Phase.PREFILL: len(queues.prefilling), Phase.DECODE: len(queues.decoding)},
                num_waiting=queues.num_waiting,
                kv_cache_usage=allocator.usage,
                num_cached_blocks=allocator.num_cached_blocks,
                plan=self._decisions.plan,
                decisions=self._decisions.recent(),
                step_time_error=self._latency.error(),
            )

    def latency_state(self) -> dict[str, Any]:
        """What the latency model has learned, see `LatencyModel.to_state`."""
        with self._changed:
            return self._latency.to_state()

    def reset_prefix_cache(self) -> None:
        """Have no later prompt match a block that is computed now; running requests keep theirs."""
        with self._changed:
            self._allocator.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert that requests, slots and blocks agree; callable at any time.

        Raises:
            AssertionError: they do not; the message says where.
        """
        with self._changed:
            running = self._queues.prefilling + self._queues.decoding
            self._residency.check_integrity(running)
            for request in running:
                request.check(len(self._in_flight.steps_of(request)))
            for request in self._queues.waiting:
                assert not request.block_ids and request.slot is None, (
                    f"waiting request {request.request_id} holds memory"
                )

    # ---- plans

    def _choose_plan(self, prompts: Sequence[Request]) -> Plan:
        decoding = self._queues.decoding
        load = Load(
            chunks=tuple([(r.num_scheduled_tokens, r.num_tokens - r.num_scheduled_tokens) for r in prompts]),
            num_decodes=len(decoding),
            context_tokens=_context_tokens(decoding),
            num_decode_steps=self._num_decode_steps,
            now=self._clock(),
            prompts=prompts,
            decoding=decoding,
            num_waiting=self._queues.num_waiting,
            num_ending=len(self._queues.prefilling) - len(prompts),
            is_memory_scarce=self._residency.is_scarce,
        )
        plan = self._policy.choose(load)
        decision = self._decisions.on_choice(plan, load, self._policy)
        if decision is not None:
            if decision.before is not None:
                self._metrics.on_plan_change(is_forced=decision.is_forced)
            self._notify()  # what the last plan kept the other lane from may be allowed now
        return plan

    def _available_share(self, phase: Phase, plan: Plan) -> int:
        """Shrink first: `phase` grows only into what the other lane's launched steps leave; 0 parks it."""
        wanted = plan.num_sms(phase)
        if plan.prefill_sms + plan.decode_sms <= self._config.num_sms:  # else it is over-subscribed on purpose
            wanted = min(wanted, self._config.num_sms - self._in_flight.num_sms(phase.other))
        return max((share for share in self._config.shares[phase] if share <= wanted), default=0)

    def _prefill_budget(self, phase: Phase, plan: Plan, num_sms: int, num_decodes: int) -> int:
        if phase is Phase.PREFILL:
            return self._config.max_prefill_tokens
        if plan.kind is PlanKind.MIXED and num_sms == self._config.num_sms:
            return plan.prompt_budget(num_decodes)
        return 0

    # ---- schedule

    def _prompts_in_order(self) -> Sequence[Request]:
        """Resident prompts of which something is left to schedule."""
        prompts = [r for r in self._queues.prefilling if r.num_scheduled_tokens < r.num_tokens]
        return order_prompts(prompts, self._clock(), self._pace.seconds_per_token)

    def _schedule_decodes(self, updates: list[BlockUpdate]) -> list[Request]:
        """Every decoding request that has a token left to make and a block to put it in.

        So has one whose prompt ends in a launched step of this lane: behind that step the device knows its first token.
        """
        block_size = self._allocator.block_size
        scheduled: list[Request] = []
        for request in (*self._queues.decoding, *self._in_flight.ending(Phase.DECODE)):
            position = request.num_scheduled_tokens
            if position >= request.end_position:
                continue  # its last token is on the way
            if position % block_size == 0:
                if request.status is RequestStatus.WAITING:
                    continue  # preempted, to position 0, for an earlier one in this very loop
                if position == len(request.block_ids) * block_size:
                    if not self._grow(request):
                        continue
                    updates.append(stage_blocks(request))
            request.num_scheduled_tokens = position + 1
            scheduled.append(request)
        return scheduled

    def _grow(self, request: Request) -> bool:
        """One more block for `request`, preempting the least urgent running request while none is free.

        False when there is none in this step: it was the least urgent itself, or freed blocks still wait for their
            step.
        """
        while (fresh := self._allocator.allocate(1)) is None:
            if self._allocator.num_deferred_blocks:
                return False
            victim = self._queues.least_urgent
            self._queues.preempt(victim)
            self._metrics.on_preemption()
            if victim is request:
                return False
        request.block_ids += fresh
        return True

    def _schedule_prefills(
        self, prompts: Sequence[Request], budget: int, updates: list[BlockUpdate]
    ) -> tuple[list[Request], tuple[PrefillEntry, ...]]:
        """Chunks of the first prompts, `budget` tokens in all."""
        scheduled: list[Request] = []
        entries: list[PrefillEntry] = []
        for request in prompts:
            start, end = request.num_scheduled_tokens, request.num_tokens
            if budget <= 0:
                break
            if request.status is not RequestStatus.PREFILLING:
                continue  # preempted for a decode of this step
            stop = min(end, start + budget)
            budget -= stop - start
            is_first = request.num_staged_blocks == 0
            if is_first:
                updates.append(stage_blocks(request))
            entries.append(prefill_entry(request, start, stop, is_first=is_first))
            request.num_scheduled_tokens = stop
            scheduled.append(request)
        return scheduled, tuple(entries)

    def _launch(
        self, phase: Phase, step: LaunchedStep, entries: tuple[PrefillEntry, ...], updates: tuple[BlockUpdate, ...]
    ) -> Batch:
        """Record the step as in flight and freeze it into a batch."""
        step_id = self._in_flight.launch(phase, step)
        self._decisions.on_launch(step_id, step.work)
        self._num_decode_steps = 0 if step.prefills else self._num_decode_steps + 1
        self._allocator.step_launched(step_id)
        for request in step.prefills:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._clock()
        if self._config.window is not None:
            for request in (*step.decodes, *step.prefills):
                self._residency.free_behind_window(request, step_id)
        return self._stager.freeze(phase, step_id, step, entries, updates)

    def _observe(self, batch: Batch, result: StepResult, num_new_tokens: int) -> None:
        """Count the step."""
        num_prefill_tokens = batch.num_tokens - len(batch.decode_slots)
        self._metrics.on_step(batch.phase, num_prefill_tokens, num_new_tokens, result.seconds)


def _context_tokens(decodes: Sequence[Request]) -> int:
    """Tokens that the next or the scheduled step of these reads."""
    return sum([request.num_scheduled_tokens for request in decodes])

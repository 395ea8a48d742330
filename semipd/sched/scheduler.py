"""The queues of both lanes: which requests each step computes, and what a finished step changes.

One scheduler serves both lanes under one lock, held for microseconds and never across device work. It decides in plain
integers: it knows the allocator and the policy, but neither tensors nor devices, so the same code runs in a simulator.
The one-writer rule: every `Request`, the allocator and the queues change only in here.

A request's way: WAITING -> (admit: a slot, blocks for the whole prompt) -> PREFILLING -> (last chunk committed) ->
DECODING -> FINISHED. Preemption returns it to WAITING and frees its blocks behind its last launched step.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from semipd.config import Phase, Plan, PlanKind
from semipd.errors import QueueFull
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import EngineStatistics, Metrics
from semipd.request import FinishReason, Request, RequestStatus
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, StepResult, TokenLogprobs
from semipd.sched.events import StepEvents
from semipd.sched.in_flight import InFlight, LaunchedStep
from semipd.sched.policies import Load, Policy
from semipd.sched.residency import Residency
from semipd.sched.staging import prefill_entry, sampling_features, stage_blocks
from semipd.sched.waiting import Urgency, WaitingQueue


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


class _DecodeRows:
    """What a batch says of its decoding requests; kept from step to step, as they are mostly the same ones."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.slots = tuple(map(_slot_of, requests))
        self.features = 0
        for request in requests:
            self.features |= request.features
        self.num_logprobs = max((request.params.logprobs or 0 for request in requests), default=0)


class Scheduler:
    """Schedules and commits the steps of both lanes. Every public method takes the lock itself."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        allocator: BlockAllocator,
        policy: Policy,
        metrics: Metrics,
        emit: Callable[[StepEvents], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._policy = policy
        self._metrics = metrics
        self._emit = emit
        self._clock = clock
        self._changed = threading.Condition(threading.Lock())
        self._version = 0
        self._seen = dict.fromkeys(Phase, -1)
        self._is_stopped = False

        self._allocator = allocator
        self._residency = Residency(allocator, num_slots=config.max_num_seqs, window=config.window)
        self._waiting = WaitingQueue()
        self._refused: tuple[Request | None, int, int] | None = None
        self._followers: dict[Request, list[Request]] = {}
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._in_flight = InFlight()
        self._decode_rows = _DecodeRows([])
        self._plan: Plan | None = None
        self._seconds_per_token = 0.0
        self._num_prefix_query_tokens = 0
        self._num_prefix_hit_tokens = 0

    # ---- requests come and go

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the samples of one prompt, all or none.

        Raises:
            QueueFull: they do not fit `max_queued_requests`.
        """
        with self._changed:
            if not self._has_space(len(requests)):
                raise QueueFull(
                    f"{self._num_queued()} requests wait and max_queued_requests is "
                    f"{self._config.max_queued_requests}; retry later, raise the bound, or submit with wait=True"
                )
            for request in requests:
                request.urgency = self._waiting.urgency(request, self._seconds_per_token)
                request.features = int(sampling_features(request))
                if request.leader is None or not self._allocator.enable_prefix_caching:
                    self._waiting.push(request)
                else:  # queued when the leader's prompt is computed, to share its blocks
                    self._followers.setdefault(request.leader, []).append(request)
            self._notify()

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End `request` now; a step in flight that still holds it runs to its end before the blocks are free."""
        with self._changed:
            if not request.is_finished:
                events = StepEvents(self._clock())
                self._finish(request, reason, stop_reason, events)
                self._emit(events)
                self._notify()

    def stop(self) -> None:
        """No further step is scheduled; lanes and waiters wake up."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

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
            self._admit()
            plan = self._choose_plan()
            num_sms = self._available_share(phase, plan)
            if num_sms == 0:
                return None
            updates: list[BlockUpdate] = []
            decodes = self._schedule_decodes(updates) if phase is Phase.DECODE else []
            budget = self._prefill_budget(phase, plan, num_sms, len(decodes))
            prefills, entries = self._schedule_prefills(budget, updates)
            if not decodes and not prefills:
                return None
            return self._launch(phase, LaunchedStep(num_sms, decodes, prefills), entries, tuple(updates))

    def commit(self, batch: Batch, result: StepResult) -> None:
        """Take over what a step computed: the only place where requests advance and their blocks become free."""
        with self._changed:
            step = self._in_flight.done(batch.phase, batch.step_id)
            self._allocator.step_done(batch.step_id)
            events = StepEvents(result.done_time, logprobs=None if result.logprobs is None else [])
            self._commit_decodes(step, result, events)
            self._commit_prefills(step, batch.prefill, result, events)
            self._observe(batch, result, len(events.requests))
            if events:
                self._emit(events)
            self._notify()

    def wait(self, phase: Phase) -> None:
        """Sleep until something changed since the last `next_batch(phase)`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._version != self._seen[phase])

    # ---- observation

    def statistics(self) -> EngineStatistics:
        """A snapshot of counters and gauges."""
        with self._changed:
            allocator = self._allocator.statistics()
            return self._metrics.snapshot(
                num_running={Phase.PREFILL: len(self._prefilling), Phase.DECODE: len(self._decoding)},
                num_waiting=self._num_queued(),
                kv_cache_usage=allocator.usage,
                num_cached_blocks=allocator.num_cached_blocks,
                num_prefix_query_tokens=self._num_prefix_query_tokens,
                num_prefix_hit_tokens=self._num_prefix_hit_tokens,
                plan=self._plan,
            )

    def counts(self) -> tuple[int, int, int]:
        """Requests waiting, prefilling and decoding."""
        with self._changed:
            return self._num_queued(), len(self._prefilling), len(self._decoding)

    def check_integrity(self) -> None:
        """Assert that requests, slots and blocks agree; callable at any time.

        Raises:
            AssertionError: they do not; the message says where.
        """
        with self._changed:
            running = self._prefilling + self._decoding
            self._residency.check_integrity(running)
            for request in running:
                request.check(len(self._in_flight.steps_of(request)))
            for request in self._waiting:
                assert not request.block_ids and request.slot is None, (
                    f"waiting request {request.request_id} holds memory"
                )

    # ---- admission and plans

    def _num_queued(self) -> int:
        return len(self._waiting) + sum(map(len, self._followers.values()))

    def _has_space(self, num_requests: int) -> bool:
        bound = self._config.max_queued_requests
        return bound is None or self._num_queued() + num_requests <= bound

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _admit(self) -> None:
        """Give slots and blocks to the most urgent prompts, until a step's worth of prompt tokens is resident.

        Strictly in order: a prompt that does not fit is not passed by a smaller one, or it might wait for ever.
        """
        backlog = sum(r.num_tokens - r.num_scheduled_tokens for r in self._prefilling)
        while backlog < self._config.max_prefill_tokens and self._residency.has_free_slot:
            request = self._waiting.peek()
            num_running = len(self._prefilling) + len(self._decoding)
            attempt = (request, num_running, self._allocator.num_free_blocks)
            if request is None or attempt == self._refused:
                return  # nothing changed since it did not fit: matching 8k tokens again would cost 0.3 ms a step
            if not self._residency.try_admit(request, reserve=num_running):
                self._refused = attempt
                return
            self._waiting.pop()
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_scheduled_tokens
                self._num_prefix_query_tokens += len(request.prompt_token_ids)
                self._num_prefix_hit_tokens += request.num_cached_tokens
            request.status = RequestStatus.PREFILLING
            insort(self._prefilling, request, key=_urgency)
            backlog += request.num_tokens - request.num_scheduled_tokens

    def _choose_plan(self) -> Plan:
        has_prefill = any(r.num_scheduled_tokens < r.num_tokens for r in self._prefilling)
        plan = self._policy.choose(Load(has_prefill=has_prefill, has_decode=bool(self._decoding)))
        if plan != self._plan:
            if self._plan is not None:
                self._metrics.on_plan_change()
            self._plan = plan
            self._notify()  # what the last plan kept the other lane from may be allowed now
        return plan

    def _available_share(self, phase: Phase, plan: Plan) -> int:
        """Shrink first: `phase` grows only into what the other lane's launched steps leave; 0 parks it."""
        if phase is Phase.PREFILL and self._in_flight.is_mixed():
            return 0  # even if over-subscribed: the next chunks must neither run nor end before those of that step
        wanted = plan.num_sms(phase)
        if plan.prefill_sms + plan.decode_sms <= self._config.num_sms:  # else it is over-subscribed on purpose
            wanted = min(wanted, self._config.num_sms - self._in_flight.num_sms(phase.other))
        return max((share for share in self._config.shares[phase] if share <= wanted), default=0)

    def _prefill_budget(self, phase: Phase, plan: Plan, num_sms: int, num_decodes: int) -> int:
        if phase is Phase.PREFILL:
            return self._config.max_prefill_tokens
        if plan.kind is PlanKind.MIXED and num_sms == self._config.num_sms:
            assert plan.token_budget is not None
            return plan.token_budget - num_decodes
        return 0

    # ---- schedule

    def _schedule_decodes(self, updates: list[BlockUpdate]) -> list[Request]:
        """Every decoding request that has a token left to make and a block to put it in."""
        block_size = self._allocator.block_size
        scheduled: list[Request] = []
        for request in tuple(self._decoding):
            position = request.num_scheduled_tokens
            if position >= request.end_position:
                continue  # its last token is on the way
            if position % block_size == 0:
                if request.status is not RequestStatus.DECODING:
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
            victim = max(self._prefilling[-1:] + self._decoding[-1:], key=_urgency)
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += fresh
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the queue; its blocks are free behind its last step, and all of it will be computed again."""
        (self._decoding if request.status is RequestStatus.DECODING else self._prefilling).remove(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._metrics.on_preemption()
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        self._free(request)

    def _schedule_prefills(
        self, budget: int, updates: list[BlockUpdate]
    ) -> tuple[list[Request], tuple[PrefillEntry, ...]]:
        """Chunks of the most urgent resident prompts, `budget` tokens in all."""
        scheduled: list[Request] = []
        entries: list[PrefillEntry] = []
        for request in self._prefilling:
            start, end = request.num_scheduled_tokens, request.num_tokens
            if budget <= 0:
                break
            if start == end:
                continue  # its last chunk is in flight
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
        self._allocator.step_launched(step_id)
        if step.decodes and step.decodes != self._decode_rows.requests:
            self._decode_rows = _DecodeRows(step.decodes)
        features = self._decode_rows.features if step.decodes else 0
        num_logprobs = self._decode_rows.num_logprobs if step.decodes else 0
        for request in step.prefills:
            features |= request.features
            num_logprobs = max(num_logprobs, request.params.logprobs or 0)
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._clock()
        if self._config.window is not None:
            for request in (*step.decodes, *step.prefills):
                self._residency.free_behind_window(request, step_id)
        return Batch(
            step_id=step_id,
            phase=phase,
            num_sms=step.num_sms,
            decode_slots=self._decode_rows.slots if step.decodes else (),
            prefill=entries,
            block_updates=updates,
            features=SamplingFeature(features),
            num_logprobs=num_logprobs,
        )

    # ---- commit

    def _observe(self, batch: Batch, result: StepResult, num_new_tokens: int) -> None:
        """Count the step; a slow average of prefill steps predicts the work of prompts that will wait."""
        num_prefill_tokens = batch.num_tokens - len(batch.decode_slots)
        self._metrics.on_step(batch.phase, num_prefill_tokens, num_new_tokens, result.seconds)
        if batch.phase is Phase.PREFILL:
            weight = 0.1 if self._seconds_per_token else 1.0
            self._seconds_per_token += (result.seconds / num_prefill_tokens - self._seconds_per_token) * weight

    def _commit_decodes(self, step: LaunchedStep, result: StepResult, events: StepEvents) -> None:
        for row, request in enumerate(step.decodes):
            if request.status is RequestStatus.DECODING:
                request.num_computed_tokens += 1
                self._take_token(request, row, result, events)
            else:
                self._drain(request, row, result, events)

    def _commit_prefills(
        self, step: LaunchedStep, entries: tuple[PrefillEntry, ...], result: StepResult, events: StepEvents
    ) -> None:
        row = len(step.decodes)
        for index, (request, entry) in enumerate(zip(step.prefills, entries, strict=True)):
            sampled_row = row if entry.samples else None
            row += entry.samples
            if result.prompt_logprobs is not None and index in result.prompt_logprobs and not request.is_finished:
                self._take_prompt_logprobs(request, entry.start, result.prompt_logprobs[index], events)
            if request.status is not RequestStatus.PREFILLING:
                self._drain(request, sampled_row, result, events)
                continue
            request.num_computed_tokens = entry.start + len(entry.token_ids)
            self._residency.publish(request)
            if sampled_row is not None:  # the hand-over: a change of status and nothing else
                self._prefilling.remove(request)
                request.status = RequestStatus.DECODING
                insort(self._decoding, request, key=_urgency)
                self._decode_rows = _DecodeRows([])  # it may be a request that was there before, on another slot
                self._release_followers(request)
                self._take_token(request, sampled_row, result, events)

    def _take_token(self, request: Request, row: int, result: StepResult, events: StepEvents) -> None:
        """Append the sampled token of `row`, stamp it, and end the request if it was the last one."""
        token_id = result.token_ids[row]
        now = result.done_time
        outputs = request.output_token_ids
        outputs.append(token_id)
        if request.last_token_time is None:
            request.first_token_time = now
        else:
            gap = now - request.last_token_time
            if request.worst_gap is None or gap > request.worst_gap:
                request.worst_gap = gap
        request.last_token_time = now
        if request.num_computed_tokens % self._allocator.block_size == 0:
            self._residency.publish(request)
        events.requests.append(request)
        events.token_ids.append(token_id)
        if events.logprobs is not None:
            assert result.logprobs is not None
            events.logprobs.append(result.logprobs[row] if request.features & SamplingFeature.LOGPROBS else None)
        if token_id in request.stop_token_ids and len(outputs) >= request.params.min_tokens:
            stop_reason = token_id if token_id in request.params.stop_token_ids else None
            self._finish(request, FinishReason.STOP, stop_reason, events)
        elif len(outputs) >= request.max_tokens:
            self._finish(request, FinishReason.LENGTH, None, events)

    def _take_prompt_logprobs(
        self, request: Request, start: int, items: tuple[TokenLogprobs, ...], events: StepEvents
    ) -> None:
        """Pass on the positions not seen yet: after a preemption the prompt is computed, and scored, again."""
        end = len(request.prompt_token_ids) - 1 - start  # past it the "prompt" is output computed again
        fresh = items[max(0, request.num_prompt_logprobs - start) : max(0, end)]
        if fresh:
            request.num_prompt_logprobs += len(fresh)
            events.prompt_logprobs.append((request, fresh))

    def _drain(self, request: Request, row: int | None, result: StepResult, events: StepEvents) -> None:
        """A request that ended or was preempted while this step ran: keep a preempted one's token, then let it go."""
        if row is not None and request.status is RequestStatus.WAITING:
            self._take_token(request, row, result, events)
        if not self._in_flight.steps_of(request):
            self._release(request)

    def _finish(
        self, request: Request, reason: FinishReason, stop_reason: str | int | None, events: StepEvents
    ) -> None:
        match request.status:
            case RequestStatus.DECODING:
                self._decoding.remove(request)
            case RequestStatus.PREFILLING:
                self._prefilling.remove(request)
            case _:
                self._waiting.discard(request)
                if request.leader in self._followers and request in self._followers[request.leader]:
                    self._followers[request.leader].remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self._metrics.on_finish(
            request.timings(events.time), reason, len(request.output_token_ids), request.is_slo_attained(events.time)
        )
        self._free(request)
        self._release_followers(request)
        events.finished.append(request)

    def _free(self, request: Request) -> None:
        """Give back what it holds: blocks behind its last launched step, the slot once no step holds it."""
        step_ids = self._in_flight.steps_of(request)
        self._residency.free_blocks(request, after_step=step_ids[-1] if step_ids else None)
        if not step_ids:
            self._release(request)

    def _release(self, request: Request) -> None:
        """No launched step holds it any more: its slot is free, and a preempted request queues again."""
        self._residency.free_slot(request)
        if request.status is RequestStatus.WAITING:
            self._waiting.push(request)

    def _release_followers(self, leader: Request) -> None:
        for follower in self._followers.pop(leader, ()):
            self._waiting.push(follower)


def _slot_of(request: Request) -> int:
    assert request.slot is not None, f"{request.request_id} decodes without a slot"
    return request.slot


def _urgency(request: Request) -> Urgency:
    return request.urgency

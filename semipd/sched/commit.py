"""What a finished step changes: tokens, counters, published blocks, and the requests that it ends.

The results of a step become the progress of its requests here and nowhere else. Rows follow the batch: the decodes in
order, then each prompt chunk that samples. Called only under the scheduler's lock.
"""

from __future__ import annotations

from semipd.metrics import Metrics
from semipd.request import FinishReason, Request, RequestStatus
from semipd.sched.batch import PrefillEntry, SamplingFeature, StepResult, TokenLogprobs
from semipd.sched.events import StepEvents
from semipd.sched.in_flight import LaunchedStep
from semipd.sched.queues import Queues
from semipd.sched.residency import Residency


class Committer:
    """Advances and ends requests. It keeps no state of its own."""

    def __init__(self, queues: Queues, residency: Residency, metrics: Metrics) -> None:
        self._queues = queues
        self._residency = residency
        self._metrics = metrics
        self._block_size = residency.allocator.block_size

    def commit(self, step: LaunchedStep, entries: tuple[PrefillEntry, ...], result: StepResult) -> StepEvents:
        """Take over what a step, in flight no longer, computed; `entries` are its batch's prompt chunks."""
        events = StepEvents(result.done_time, logprobs=None if result.logprobs is None else [])
        self._commit_decodes(step, result, events)
        self._commit_prefills(step, entries, result, events)
        return events

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None, events: StepEvents) -> None:
        """End a request that has not ended, at the events' time."""
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self._metrics.on_finish(
            request.timings(events.time), reason, len(request.output_token_ids), request.is_slo_attained(events.time)
        )
        self._queues.finish(request)
        events.finished.append(request)

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
            if sampled_row is not None:
                self._queues.hand_over(request)
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
        if request.num_computed_tokens % self._block_size == 0:
            self._residency.publish(request)
        events.requests.append(request)
        events.token_ids.append(token_id)
        if events.logprobs is not None:
            assert result.logprobs is not None
            events.logprobs.append(result.logprobs[row] if request.features & SamplingFeature.LOGPROBS else None)
        if token_id in request.stop_token_ids and len(outputs) >= request.params.min_tokens:
            stop_reason = token_id if token_id in (request.params.stop_token_ids or ()) else None
            self.finish(request, FinishReason.STOP, stop_reason, events)
        elif len(outputs) >= request.max_tokens:
            self.finish(request, FinishReason.LENGTH, None, events)

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
        self._queues.release(request)

"""Who gets memory next: waiting prompts become resident ones as far as there is use for them.

Called only under the scheduler's lock.
"""

from __future__ import annotations

from semipd.metrics import Metrics
from semipd.request import Request
from semipd.sched.pace import Pace
from semipd.sched.queues import Queues
from semipd.sched.residency import Residency


class Admission:
    """Admits prompts from the waiting queue.

    Args:
        queues: where requests stand.
        residency: has slots and blocks.
        pace: what prompt tokens take at present.
        metrics: counts those that are admitted.
        step_tokens: prompt tokens that are a step's worth.
    """

    def __init__(self, queues: Queues, residency: Residency, pace: Pace, metrics: Metrics, *, step_tokens: int) -> None:
        self._queues = queues
        self._residency = residency
        self._pace = pace
        self._metrics = metrics
        self._step_tokens = step_tokens
        self._refused: tuple[Request | None, int, int] | None = None

    def admit(self, now: float) -> bool:
        """Give slots and blocks to the most urgent prompts, until a step's worth of prompt tokens is resident.

        One long prompt is half of that, so that short ones may pass it. Those in time pass late ones, so these keep
        only each other out: two long ones would hold up everybody until they are done, and have them late too.
        They leave some slots and blocks free as well, until their age has them most urgent: where memory is full, those
        in time would wait for decodes to end. Strictly in order: a prompt that does not fit is not passed by a smaller
        one, or it might wait for ever.

        Args:
            now: the engine's clock, in seconds.

        Returns:
            Whether one that was preempted is among them: it has another slot than before.
        """
        enough, queues, pace = self._step_tokens, self._queues, self._pace
        most, waiting, has_returned = max(enough // 2, 1), queues.waiting, False
        left = [(max(r.num_tokens - r.num_scheduled_tokens, 0), r.is_late) for r in queues.prefilling]
        backlog = [sum([min(num_tokens, most) for num_tokens, late in left if late is kind]) for kind in (False, True)]
        delay = pace.delay(sum([num_tokens for num_tokens, is_late in left if not is_late]))
        waiting.seconds_per_token, waiting.delay = pace.seconds_per_token, delay
        waiting.let_longest_yield(now)
        while backlog[False] < enough and self._residency.has_free_slot:
            request = waiting.peek()
            attempt = (request, queues.num_running, self._residency.allocator.num_free_blocks)
            if request is None or attempt == self._refused:
                break  # nothing changed since it did not fit: matching 8k tokens again would cost 0.3 ms a step
            if request.is_late and (sum(backlog) >= enough or self._is_kept_out(request, now)):
                break
            if not queues.try_admit(request):
                self._refused = attempt
                break
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_scheduled_tokens
                self._metrics.on_first_admission(len(request.prompt_token_ids), request.num_cached_tokens)
            else:
                has_returned = True
            num_tokens = request.num_tokens - request.num_scheduled_tokens
            waiting.delay += num_tokens * pace.seconds_per_token
            backlog[request.is_late] += min(num_tokens, most)
        return has_returned

    def _is_kept_out(self, request: Request, now: float) -> bool:
        """Whether what is left of memory is kept for others than this late request."""
        _, latest_start, _ = request.urgency
        return self._residency.is_scarce and now < latest_start

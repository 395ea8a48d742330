"""Who gets memory next: waiting prompts become resident ones as far as there is use for them.

Called only under the scheduler's lock.
"""

from __future__ import annotations

from semipd.metrics import Metrics
from semipd.request import Request
from semipd.sched.pace import Pace, Turnover
from semipd.sched.queues import Queues
from semipd.sched.residency import Residency
from semipd.sched.waiting import Nominee


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
        self._turnover = Turnover()
        self._refused: tuple[Nominee, int, int] | None = None

    def admit(self, now: float) -> bool:
        """Give slots and blocks to the most urgent prompts, until a step's worth of prompt tokens is resident.

        One long prompt is half of that, so that short ones may pass it. Those in time pass late ones, so these keep
        only each other out: two long ones would hold up everybody until they are done, and have them late too. Until
        their age has them most urgent they also leave an eighth of slots and blocks: where memory is full, those in
        time would wait for decodes to end. Else strictly in order: a prompt that does not fit is not passed by a
        smaller one, or it might wait for ever.

        Args:
            now: the engine's clock, in seconds.

        Returns:
            Whether one that was preempted is among them: it has another slot than before.
        """
        waiting, backlog = self._queues.waiting, self._backlog()
        has_returned, num_admitted = False, 0
        waiting.seconds_per_token = self._pace.seconds_per_token  # new ones are ranked by it too
        if backlog[False] < self._step_tokens and self._residency.has_free_slot:
            waiting.sort_out(now, delay=self._delay(), seconds_per_request=self._turnover.seconds_per_request)
        while (nominee := self._next(backlog, now)) is not None and self._try_admit(nominee):
            request = nominee.request
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_scheduled_tokens
                self._metrics.on_first_admission(len(request.prompt_token_ids), request.num_cached_tokens)
            else:
                has_returned = True
            backlog[request.is_late] += self._counted(request)
            num_admitted += 1
        is_short = backlog[False] < self._step_tokens and waiting.has_any_in_time
        self._turnover.observe(now, num_admitted, is_short=is_short)
        return has_returned

    def _backlog(self) -> list[int]:
        """Prompt tokens of resident prompts, by whether these are late."""
        backlog = [0, 0]
        for request in self._queues.prefilling:
            backlog[request.is_late] += self._counted(request)
        return backlog

    def _counted(self, request: Request) -> int:
        """What is left of a prompt, of a long one half a step's worth."""
        return min(_num_left(request), max(self._step_tokens // 2, 1))

    def _delay(self) -> float:
        """Seconds until a prompt that is admitted now is begun, and from its last step to the host."""
        return self._pace.delay(sum([_num_left(r) for r in self._queues.prefilling if not r.is_late]))

    def _next(self, backlog: list[int], now: float) -> Nominee | None:
        """Who gets memory next, if there is use for one more and a slot."""
        if backlog[False] >= self._step_tokens or not self._residency.has_free_slot:
            return None
        return self._queues.waiting.peek(
            now,
            with_late=backlog[True] < self._step_tokens,
            with_leftover=sum(backlog) < self._step_tokens and not self._residency.is_scarce,
        )

    def _try_admit(self, nominee: Nominee) -> bool:
        """Give it a slot and blocks, unless nothing changed since it did not fit: to match 8k tokens takes 0.3 ms."""
        attempt = (nominee, self._queues.num_running, self._residency.allocator.num_free_blocks)
        if attempt == self._refused:
            return False
        if self._queues.try_admit(nominee.request, leaves_spare=nominee.is_leftover):
            return True
        self._refused = attempt
        return False


def _num_left(request: Request) -> int:
    """Prompt tokens that no step has taken."""
    return max(request.num_tokens - request.num_scheduled_tokens, 0)

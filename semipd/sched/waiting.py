"""Who is next: the waiting queue, and the order of prompts that are being computed.

Requests wait by the slack to their TTFT deadline, within a priority. One that can no longer meet it goes behind those
that can: serving it first would take the next one over its deadline too, and under overload all of them. It keeps what
capacity is left over, and its age raises its rank until it is the most urgent. So does that of a request without a
target. Nobody starves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count

from semipd.request import Request

PATIENCE = 30.0
"""Seconds that a request without a target waits behind tight ones at most."""

LATE_PATIENCE = 60.0
"""The same for a request that missed its target, which nothing can bring back."""

_LONGEST_DELAY = 0.5  # of a TTFT target
_CLOSE = 0.9  # of a TTFT target, from which a request counts as late

Urgency = tuple[int, float, int]


class WaitingQueue:
    """Waiting requests by (priority, latest start that keeps the deadline, order of arrival); smaller is sooner.

    Attributes:
        seconds_per_token: what a prompt token takes at present.
        delay: seconds until a prompt that is admitted now is begun, and from its last step to the host.

    The latest start is the deadline less what the prompt takes.
    """

    def __init__(self) -> None:
        self.seconds_per_token = self.delay = 0.0
        self._heap: list[tuple[Urgency, Request]] = []
        self._members: set[Request] = set()
        self._order = count()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def urgency(self, request: Request) -> Urgency:
        """The rank that `request` has until it is late; call once, at submit."""
        return (request.params.priority, self._latest_start(request), next(self._order))

    def push(self, request: Request) -> None:
        """Queue `request` at its urgency."""
        heapq.heappush(self._heap, (request.urgency, request))
        self._members.add(request)

    def peek(self, now: float) -> Request | None:
        """The most urgent waiting request, left in place."""
        while self._heap:
            request = self._heap[0][1]
            if request not in self._members:
                heapq.heappop(self._heap)
            elif not request.is_late and self._is_out_of_reach(request, now):
                heapq.heappop(self._heap)
                request.is_late = True
                request.urgency = (request.params.priority, self._latest_start(request), request.urgency[2])
                heapq.heappush(self._heap, (request.urgency, request))
            else:
                return request
        return None

    def pop(self) -> Request:
        """Take the request that `peek` showed."""
        request = heapq.heappop(self._heap)[1]
        self._members.remove(request)
        return request

    def discard(self, request: Request) -> None:
        """Drop `request` if it is queued; rebuilds when half of the heap is dead, so that aborts hold no memory."""
        self._members.discard(request)
        if len(self._heap) > 2 * len(self._members):
            self._heap = [item for item in self._heap if item[1] in self._members]
            heapq.heapify(self._heap)

    def _is_out_of_reach(self, request: Request, now: float) -> bool:
        """Whether it has a TTFT target that it will miss; a little early, or those that get in just miss it all.

        Where even a prompt that has just come seems late, the estimate is of no use, and younger ones go first.
        """
        if request.slo is None or request.slo.ttft is None or request.first_token_time is not None:
            return False
        ttft = request.slo.ttft
        takes = min(self.delay, _LONGEST_DELAY * ttft) + self._seconds_of(request)
        return now + takes > request.arrival_time + _CLOSE * ttft

    def _latest_start(self, request: Request) -> float:
        return deadline(request) - self._seconds_of(request)

    def _seconds_of(self, request: Request) -> float:
        """What the prompt takes, but for what the prefix cache has of it."""
        return self.seconds_per_token * (len(request.prompt_token_ids) - request.num_tokens_to_find)


def deadline(request: Request) -> float:
    """When the first token is due, by the target or by what stands in for one."""
    if request.is_late:
        return request.arrival_time + LATE_PATIENCE
    target = None if request.slo is None else request.slo.ttft
    return request.arrival_time + (PATIENCE if target is None else target)


def order_prompts(prompts: Sequence[Request], now: float, seconds_per_token: float) -> Sequence[Request]:
    """Short prompts first, if the longer ones that they pass keep their deadlines; else in the order given.

    That lowers the mean TTFT and costs nobody the target. Requests that had their first token, and lost their memory to
    others, go before all, and those that are late behind.

    Args:
        prompts: prompts that hold memory, the most urgent first.
        now: the engine's clock.
        seconds_per_token: what a prompt token takes at present.
    """
    if len(prompts) < 2:
        return prompts

    def rank(request: Request) -> tuple[int, bool, bool, int]:
        num_left = _num_left(request)
        is_late = now + seconds_per_token * num_left > deadline(request)
        return request.params.priority, request.first_token_time is None, is_late, num_left

    ranked = sorted(((rank(request), index) for index, request in enumerate(prompts)))
    num_ahead = 0
    for (_, is_waiting, is_late, num_left), index in ranked:
        num_ahead += num_left
        due = deadline(prompts[index])
        if is_late:  # it let those in time pass, and not for ever
            due = max(due, prompts[index].arrival_time + LATE_PATIENCE)
        if is_waiting and now + seconds_per_token * num_ahead > due:
            return prompts
    return [prompts[index] for _, index in ranked]


def _num_left(request: Request) -> int:
    return request.num_tokens - request.num_scheduled_tokens

"""Who is next: the waiting queue, and the order of prompts that are being computed.

Requests wait by the slack to their TTFT deadline, within a priority. Where not all can meet it the longest go behind
those that can: serving them first would take more of the others over their deadlines, and under overload all. They keep
what capacity is left over, and their age raises their rank until they are the most urgent. So does that of a request
without a target. Nobody starves.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import count
from operator import itemgetter

from semipd.request import Request

PATIENCE = 30.0
"""Seconds that a request without a target waits behind tight ones at most."""

LATE_PATIENCE = 60.0
"""The same for a request that misses its target."""

_LONGEST_DELAY = 0.5  # of a TTFT target
_CLOSE = 0.9  # of a TTFT target, which a prompt has to be done in to count as in time

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
        self._in_time: list[tuple[Urgency, Request]] = []  # sorted: those that have a target within reach
        self._others: list[tuple[Urgency, Request]] = []  # a heap, members and some that were discarded
        self._members: set[Request] = set()
        self._order = count()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    @property
    def has_any_in_time(self) -> bool:
        """Whether somebody waits whose target is within reach."""
        return bool(self._in_time)

    def urgency(self, request: Request) -> Urgency:
        """The rank that `request` has until it is late; call once, at submit."""
        return (request.params.priority, self._latest_start(request), next(self._order))

    def push(self, request: Request) -> None:
        """Queue `request` at its urgency."""
        item = (request.urgency, request)
        has_target = request.slo is not None and request.slo.ttft is not None
        if has_target and not request.is_late and request.first_token_time is None:
            insort(self._in_time, item)
        else:
            heapq.heappush(self._others, item)
        self._members.add(request)

    def peek(self) -> Request | None:
        """The most urgent waiting request, left in place."""
        while self._others and self._others[0][1] not in self._members:
            heapq.heappop(self._others)
        first = min(self._in_time[:1] + self._others[:1], default=None)
        return None if first is None else first[1]

    def pop(self) -> Request:
        """Take the request that `peek` showed."""
        if self._in_time and self._in_time[0][1] is self.peek():
            _, request = self._in_time.pop(0)
        else:
            _, request = heapq.heappop(self._others)
        self._members.remove(request)
        return request

    def discard(self, request: Request) -> None:
        """Drop `request` if it is queued; rebuilds when half of the heap is dead, so that aborts hold no memory."""
        self._members.discard(request)
        place = bisect_left(self._in_time, request.urgency, key=itemgetter(0))
        if self._in_time[place : place + 1] == [(request.urgency, request)]:
            del self._in_time[place]
        if len(self._others) > 2 * len(self._members):
            self._others = [item for item in self._others if item[1] in self._members]
            heapq.heapify(self._others)

    def let_longest_yield(self, now: float) -> None:
        """Where not all can be in time, have those that take longest go behind the others.

        In the order of the queue: if one would be late, the longest up to it yields, if that helps, or else itself.
        Moore's rule (Management Science 15, 1968), with which one machine has as few late jobs as can be. A priority
        yields to nobody of a lower one.

        Args:
            now: the engine's clock, in seconds.
        """
        staying: list[tuple[int, float, int]] = []  # a heap: the last priority first, and its longest
        yielding: set[int] = set()
        start = now
        for place, (_, request) in enumerate(self._in_time):
            seconds = self._seconds_of(request)
            item = (-request.params.priority, -seconds, place)
            latest_start = self._due(request) - seconds
            if start <= latest_start:
                heapq.heappush(staying, item)
                start += seconds
            elif staying and staying[0] < item and start + staying[0][1] <= latest_start:
                _, less, longest = heapq.heapreplace(staying, item)
                start += less + seconds
                yielding.add(longest)
            else:
                yielding.add(place)
        if yielding:
            late = [self._in_time[place][1] for place in yielding]
            self._in_time = [item for place, item in enumerate(self._in_time) if place not in yielding]
            for request in late:
                request.is_late = True
                request.urgency = (request.params.priority, self._latest_start(request), request.urgency[2])
                heapq.heappush(self._others, (request.urgency, request))

    def _due(self, request: Request) -> float:
        """When the prompt has to be done to be in time; a little early, or those that get in just miss it all.

        Where even a prompt that has just come seems late, the estimate is of no use, and younger ones go first.
        """
        assert request.slo is not None and request.slo.ttft is not None
        ttft = request.slo.ttft
        return request.arrival_time + _CLOSE * ttft - min(self.delay, _LONGEST_DELAY * ttft)

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

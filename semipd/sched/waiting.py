"""Who is next: the waiting queue, and the order of prompts that are being computed.

Requests wait by the slack to their TTFT deadline, within a priority. Where not all can meet it the longest go behind
those that can: serving them first would take more of the others over their deadlines, and under overload all. Those
that are late already get what capacity is left over, and their age raises their rank until they are the most urgent. So
does that of a request without a target. Nobody starves.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from operator import itemgetter
from typing import NamedTuple

from semipd.request import Request

PATIENCE = 30.0
"""Seconds that a request without a target waits behind tight ones at most."""

LATE_PATIENCE = 60.0
"""The same for a request that misses its target."""

_LONGEST_DELAY = 0.5  # of a TTFT target
_CLOSE = 0.9  # of a TTFT target, which a prompt has to be done in to count as in time

_MOST_SEEN = 128  # requests that are looked at: 0.1 to 0.2 ms, and more than get in at once

Urgency = tuple[int, float, int]
_Item = tuple[Urgency, Request]


@dataclass(frozen=True, slots=True)
class Nominee:
    """Who may be admitted, and whether only to what memory the others leave."""

    request: Request
    is_leftover: bool = False


class WaitingQueue:
    """Waiting requests by (priority, latest start that keeps the deadline, order of arrival); smaller is sooner.

    Attributes:
        seconds_per_token: what a prompt token takes at present.

    The latest start is the deadline less what the prompt takes.
    """

    def __init__(self) -> None:
        self.seconds_per_token = 0.0
        self._in_time: list[_Item] = []  # sorted: those that have a target within reach
        self._yielding: set[Request] = set()  # of these, the ones that go behind the others
        self._late: list[_Item] = []  # a heap, as is the next, with some that were discarded
        self._others: list[_Item] = []
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
        if request.first_token_time is not None or request.slo is None or request.slo.ttft is None:
            heapq.heappush(self._others, item)
        elif request.is_late:
            heapq.heappush(self._late, item)
        else:
            insort(self._in_time, item)
        self._members.add(request)

    def peek(self, now: float, *, with_late: bool = True, with_leftover: bool = True) -> Nominee | None:
        """The one to admit next, left in place.

        Args:
            now: the engine's clock, in seconds.
            with_late: whether late ones are, which come first if they are old or of a higher priority than the others.
            with_leftover: whether they are if there are no others.
        """
        first = self._first_other()
        late = self._first_of(self._late) if with_late else None
        if late is None:
            return None if first is None else Nominee(first[1])
        (priority, latest_start, _), _ = late
        if now >= latest_start or (first is not None and priority < first[0][0]):
            return Nominee(late[1] if first is None else min(first, late)[1])
        if first is not None:
            return Nominee(first[1])
        return Nominee(late[1], is_leftover=True) if with_leftover else None

    def _first_other(self) -> _Item | None:
        """The first of those that are not late; one that yields goes before lower priorities and before no target."""
        seen = self._in_time[:_MOST_SEEN]
        stays = next((item for item in seen if item[1] not in self._yielding), None)
        yields = next((item for item in seen if item[1] in self._yielding), None)
        if yields is not None and stays is not None and yields[0][0] >= stays[0][0]:
            yields = None
        found = [item for item in (stays, yields, self._first_of(self._others)) if item is not None]
        return min(found, default=None)

    def _first_of(self, heap: list[_Item]) -> _Item | None:
        while heap and heap[0][1] not in self._members:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def pop(self, request: Request) -> None:
        """Take the request that `peek` showed."""
        for heap in (self._late, self._others):
            if heap and heap[0][1] is request:
                heapq.heappop(heap)
        self.discard(request)

    def discard(self, request: Request) -> None:
        """Drop `request` if it is queued; rebuilds when half of a heap is dead, so that aborts hold no memory."""
        self._members.discard(request)
        place = bisect_left(self._in_time, request.urgency, key=itemgetter(0))
        if self._in_time[place : place + 1] == [(request.urgency, request)]:
            del self._in_time[place]
            self._yielding.discard(request)
        num_alive = len(self._members) - len(self._in_time)
        if len(self._late) + len(self._others) > 2 * num_alive:
            self._late = self._alive(self._late)
            self._others = self._alive(self._others)

    def sort_out(self, now: float, *, delay: float = 0.0, seconds_per_request: float = 0.0) -> None:
        """Find who is late, and who has to go behind others for more of them to be in time.

        Who yields may still be in time: it is asked anew whenever prompts are admitted.

        Args:
            now: the engine's clock, in seconds.
            delay: seconds until a prompt that is admitted now is begun, and from its last step to the host.
            seconds_per_request: what lies between two prompts that get memory, if that is short.
        """
        late, jobs = [], []
        for _, request in islice(self._in_time, _MOST_SEEN):
            seconds = self._seconds_of(request)
            latest_start = _due(request, delay) - seconds
            if now > latest_start:
                late.append(request)
            else:
                jobs.append(_Job(request, max(seconds, seconds_per_request), latest_start))
        self._yielding = who_yields(jobs, now)
        for request in late:
            self.discard(request)
            request.is_late = True
            request.urgency = (request.params.priority, self._latest_start(request), request.urgency[2])
            self.push(request)

    def _alive(self, heap: list[_Item]) -> list[_Item]:
        heap = [item for item in heap if item[1] in self._members]
        heapq.heapify(heap)
        return heap

    def _latest_start(self, request: Request) -> float:
        return deadline(request) - self._seconds_of(request)

    def _seconds_of(self, request: Request) -> float:
        """What the prompt takes, but for what the prefix cache has of it."""
        return self.seconds_per_token * (len(request.prompt_token_ids) - request.num_tokens_to_find)


def _due(request: Request, delay: float) -> float:
    """When the prompt has to be done to be in time; a little early, or those that get in just miss it all.

    Where even a prompt that has just come seems late, the estimate is of no use, and younger ones go first.
    """
    assert request.slo is not None and request.slo.ttft is not None
    ttft = request.slo.ttft
    return request.arrival_time + _CLOSE * ttft - min(delay, _LONGEST_DELAY * ttft)


def deadline(request: Request) -> float:
    """When the first token is due, by the target or by what stands in for one."""
    if request.is_late:
        return request.arrival_time + LATE_PATIENCE
    target = None if request.slo is None else request.slo.ttft
    return request.arrival_time + (PATIENCE if target is None else target)


class _Job(NamedTuple):  # cheaper to make than a frozen dataclass
    """A prompt, the seconds that it takes, and when it has to be begun."""

    request: Request
    seconds: float
    latest_start: float


def who_yields(jobs: Sequence[_Job], now: float) -> set[Request]:
    """Who has to go behind the others for more of them to be in time, of prompts that all are if they are first.

    In their order: if one would be late, the longest up to it yields, if that helps, or else itself. That is Moore's
    rule (Management Science 15, 1968), the best there is for one machine and the order of deadlines. Of equals the
    oldest yields, for the younger ones are in time even if all take longer than expected. A priority yields to nobody
    of a lower one.

    Args:
        jobs: in the order in which they would be done.
        now: the engine's clock, in seconds.
    """
    staying: list[tuple[int, float, int]] = []  # a heap: the last priority first, and its longest
    yielding: set[Request] = set()
    start = now
    for place, job in enumerate(jobs):
        item = (-job.request.params.priority, -job.seconds, place)
        if start <= job.latest_start:
            heapq.heappush(staying, item)
            start += job.seconds
        elif staying and staying[0] < item and start + staying[0][1] <= job.latest_start:
            _, less, longest = heapq.heapreplace(staying, item)
            start += less + job.seconds
            yielding.add(jobs[longest].request)
        else:
            yielding.add(job.request)
    return yielding


def order_prompts(prompts: Sequence[Request], now: float, seconds_per_token: float) -> Sequence[Request]:
    """Short prompts first, if the longer ones that they pass keep their deadlines; else in the order given.

    That lowers the mean TTFT and costs nobody the target. Requests that had their first token, and lost their memory to
    others, go before all, those that are late behind, and if not all can be in time, the longest too.

    Args:
        prompts: prompts that hold memory, the most urgent first.
        now: the engine's clock.
        seconds_per_token: what a prompt token takes at present.
    """
    if len(prompts) < 2:
        return prompts
    jobs = [_job_of(request, seconds_per_token) for request in prompts]
    is_late = [now > job.latest_start for job in jobs]

    def rank(place: int) -> tuple[int, bool, bool, float]:
        request = prompts[place]
        return request.params.priority, request.first_token_time is None, is_late[place], jobs[place].seconds

    ranked = sorted(range(len(prompts)), key=rank)
    if _keep_deadlines([jobs[place] for place in ranked], now):
        return [prompts[place] for place in ranked]
    in_time = [
        job for job, late in zip(jobs, is_late, strict=True) if not late and job.request.first_token_time is None
    ]
    behind = who_yields(in_time, now)
    behind |= {job.request for job, late in zip(jobs, is_late, strict=True) if late and _can_be_last(job, jobs, now)}
    return sorted(prompts, key=lambda r: (r.params.priority, r.first_token_time is None, r in behind))


def _job_of(request: Request, seconds_per_token: float) -> _Job:
    """What is left of a prompt that holds memory."""
    seconds = seconds_per_token * (request.num_tokens - request.num_scheduled_tokens)
    return _Job(request, seconds, deadline(request) - seconds)


def _keep_deadlines(jobs: Sequence[_Job], now: float) -> bool:
    """Whether jobs in this order are all in time; those that are late in any order only have to be done some day."""
    start = now
    for job in jobs:
        latest_start = job.latest_start if now <= job.latest_start else _last_due(job.request) - job.seconds
        if start > latest_start and job.request.first_token_time is None:
            return False
        start += job.seconds
    return True


def _can_be_last(job: _Job, jobs: Sequence[_Job], now: float) -> bool:
    """Whether a late one may still let all others of its priority, or a higher one, pass."""
    priority = job.request.params.priority
    end = now + sum([other.seconds for other in jobs if other.request.params.priority <= priority])
    return end <= _last_due(job.request)


def _last_due(request: Request) -> float:
    """When a late prompt is due: it lets those in time pass, and not for ever."""
    return max(deadline(request), request.arrival_time + LATE_PATIENCE)

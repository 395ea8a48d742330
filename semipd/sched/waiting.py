"""The waiting queue: the most urgent request first.

Urgency is the slack to the TTFT deadline, within a priority. A request without a target is given `PATIENCE` seconds, so
that it ages past those that keep arriving with tight targets and nobody starves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from semipd.request import Request

PATIENCE = 30.0

Urgency = tuple[int, float, int]


class WaitingQueue:
    """Waiting requests by (priority, latest start that keeps the deadline, order of arrival); smaller is sooner."""

    def __init__(self) -> None:
        self._heap: list[tuple[Urgency, Request]] = []
        self._members: set[Request] = set()
        self._order = count()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def urgency(self, request: Request, seconds_per_token: float) -> Urgency:
        """The rank that `request` keeps for its whole life; call once, at submit.

        The latest start is the deadline less the predicted prefill time of the prompt.
        """
        target = None if request.slo is None else request.slo.ttft
        deadline = request.arrival_time + (PATIENCE if target is None else target)
        work = seconds_per_token * len(request.prompt_token_ids)
        return (request.params.priority, deadline - work, next(self._order))

    def push(self, request: Request) -> None:
        """Queue `request` at its urgency."""
        heapq.heappush(self._heap, (request.urgency, request))
        self._members.add(request)

    def peek(self) -> Request | None:
        """The most urgent waiting request, left in place."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

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

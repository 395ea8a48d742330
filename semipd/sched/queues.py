"""Where each request stands, and the ways from one place to the next.

    WAITING -- try_admit -> PREFILLING -- hand_over -> DECODING        and from each of them -- finish -> FINISHED
       ^                        |                         |
       +------- preempt --------+-------------------------+

A request that leaves the running ones gives its blocks back behind its last launched step, and its slot once no
launched step holds it (`release`): the device may still write for it until then.

Called only under the scheduler's lock. Whom to admit, to preempt and to finish is decided by the callers.
"""

from __future__ import annotations

from bisect import insort

from semipd.request import Request, RequestStatus
from semipd.sched.in_flight import InFlight
from semipd.sched.residency import Residency
from semipd.sched.waiting import Urgency, WaitingQueue


class Queues:
    """The requests of an engine by status.

    Attributes:
        waiting: those that need a slot and blocks to go on.
        prefilling: those whose known tokens are not all computed, the most urgent first.
        decoding: those that make a token a step, the most urgent first.
    """

    def __init__(self, residency: Residency, in_flight: InFlight) -> None:
        self.waiting = WaitingQueue()
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._followers: dict[Request, list[Request]] = {}  # behind the leader whose blocks they will share
        self._residency = residency
        self._in_flight = in_flight

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing yet, those behind their leader among them."""
        return len(self.waiting) + sum(map(len, self._followers.values()))

    @property
    def is_empty(self) -> bool:
        """No request waits or runs."""
        return not (self.prefilling or self.decoding or self.num_waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and blocks."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def least_urgent(self) -> Request:
        """The running request that the others go before."""
        return max(self.prefilling[-1:] + self.decoding[-1:], key=_urgency)

    def add(self, request: Request) -> None:
        """Let a new request wait: for its leader's prompt to be computed, if it can then share the blocks."""
        if request.leader is None or not self._residency.allocator.enable_prefix_caching:
            self.waiting.push(request)
        else:
            self._followers.setdefault(request.leader, []).append(request)

    def try_admit(self, request: Request, *, leaves_spare: bool) -> bool:
        """Have the request that `waiting.peek` showed prefill; False, with no change, when its blocks do not fit.

        `leaves_spare`: beside running ones it fits only if the spare blocks stay free.
        """
        reserve = self.num_running
        if leaves_spare and reserve:
            reserve += self._residency.num_spare_blocks
        if not self._residency.try_admit(request, reserve=reserve):
            return False
        self.waiting.pop(request)
        request.status = RequestStatus.PREFILLING
        insort(self.prefilling, request, key=_urgency)
        return True

    def hand_over(self, request: Request) -> None:
        """All of its known tokens are computed: it decodes now, a change of status and nothing else."""
        self.prefilling.remove(request)
        request.status = RequestStatus.DECODING
        insort(self.decoding, request, key=_urgency)
        self._release_followers(request)

    def preempt(self, request: Request) -> None:
        """Let a running request wait again, without its blocks: all of it will be computed again."""
        self._leave(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        self._free(request)

    def finish(self, request: Request) -> None:
        """Take a request out for good, wherever it stands."""
        self._leave(request)
        request.status = RequestStatus.FINISHED
        self._free(request)
        self._release_followers(request)

    def release(self, request: Request) -> None:
        """Once no launched step holds a request that left, its slot is free, and a preempted one queues again."""
        if self._in_flight.steps_of(request):
            return
        self._residency.free_slot(request)
        if request.status is RequestStatus.WAITING:
            self.waiting.push(request)

    def _leave(self, request: Request) -> None:
        match request.status:
            case RequestStatus.DECODING:
                self.decoding.remove(request)
            case RequestStatus.PREFILLING:
                self.prefilling.remove(request)
            case _:
                self.waiting.discard(request)
                if request.leader in self._followers and request in self._followers[request.leader]:
                    self._followers[request.leader].remove(request)

    def _free(self, request: Request) -> None:
        """Give back what it holds: blocks behind its last launched step, the slot once no step holds it."""
        step_ids = self._in_flight.steps_of(request)
        self._residency.free_blocks(request, after_step=step_ids[-1] if step_ids else None)
        self.release(request)

    def _release_followers(self, leader: Request) -> None:
        for follower in self._followers.pop(leader, ()):
            follower.num_tokens_to_find = self._residency.count_cached_tokens(follower)
            self.waiting.push(follower)


def _urgency(request: Request) -> Urgency:
    return request.urgency

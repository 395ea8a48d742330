"""How a device is shared between the lanes: streams on disjoint parts of it, and the events that order them.

A backend offers a list of splits that it can really keep apart. A stream runs the work given to it in order; `submit`
returns at once with a `Completion`, as launching a CUDA graph does. One stream belongs to one (phase, share); a
resize is "use the other stream from the next step on".

Work is a function that launches and returns another one that reads: on a GPU the first enqueues kernels, and the second
fetches their results once they have run; on a CPU the first does the work itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from semipd.config import Phase

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Completion(Protocol[T_co]):
    """The done event of submitted work, and its result."""

    def is_done(self) -> bool:
        """Whether the work has ended, well or not; never waits."""
        ...

    def wait(self) -> T_co:
        """The work's result, once it has ended; raises what the work raised."""
        ...


class Stream(Protocol):
    """An ordered queue of work on one partition."""

    @property
    def num_sms(self) -> int:
        """SMs (cores on a CPU) that its work runs on."""
        ...

    def submit(self, launch: Callable[[], Callable[[], T]], after: Sequence[Completion[object]] = ()) -> Completion[T]:
        """Run the work of `launch` behind all that was submitted so far and behind `after`, of other streams too.

        What `launch` returns gives the result on the host; it is called once, when the work is done.
        """
        ...


class PartitionBackend(Protocol):
    """The shares that a device offers and a stream for each."""

    @property
    def num_sms(self) -> int:
        """Units of the whole device: SMs on a GPU, cores on a CPU."""
        ...

    @property
    def splits(self) -> Sequence[tuple[int, int]]:
        """(prefill, decode) shares that are disjoint, by growing decode share; empty when it cannot be split."""
        ...

    @property
    def default_split(self) -> tuple[int, int] | None:
        """The split of `StaticPolicy()`; None when there is none."""
        ...

    def stream(self, phase: Phase, num_sms: int) -> Stream:
        """The stream of `phase` on `num_sms`: the whole device, or a share named in `splits`.

        Raises:
            PartitionUnavailable: no such share is offered; the message lists those that are.
        """
        ...

    def close(self) -> None:
        """End all streams after their queued work."""
        ...

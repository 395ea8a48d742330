"""Python's thread switch interval, while engines want another one.

The interval is the interpreter's, one for all engines of a process. So who wants which is recorded once for the process
too: no engine by itself can know whether another still wants its own, and what stood before both.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class _SwitchInterval:
    """The smallest interval that is wanted; what stood before comes back with the last one who wants another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[float] = []
        self._before = self._ours = 0.0

    @contextmanager
    def hold(self, seconds: float | None) -> Iterator[None]:
        if seconds is None:
            yield
            return
        with self._lock:
            present = sys.getswitchinterval()
            if not self._wanted or present != self._ours:
                self._before = present
            self._wanted.append(seconds)
            self._set(min(self._wanted))
        try:
            yield
        finally:
            with self._lock:
                self._wanted.remove(seconds)
                if sys.getswitchinterval() == self._ours:  # else somebody else chose one since, and it stays
                    self._set(min(self._wanted, default=self._before))

    def _set(self, seconds: float) -> None:
        sys.setswitchinterval(seconds)
        self._ours = sys.getswitchinterval()  # as kept, in whole microseconds


_PROCESS = _SwitchInterval()


def hold_switch_interval(seconds: float | None) -> AbstractContextManager[None]:
    """Have Python switch threads at least every `seconds` for as long as the context is entered; None wants nothing.

    Only for an engine's own threads. A finaliser that runs in here may close another engine, whose end has to come by
    here too, and a close from any other thread would wait for that end.
    """
    return _PROCESS.hold(seconds)

"""Python's cyclic garbage collector, kept off what a process loaded before it serves.

A full collection visits every container of the process with all threads stopped: 36 ms with torch and Triton loaded,
more in a larger application, and each is a gap in every stream. Objects that are frozen are not visited. The collector
is the interpreter's, one for all engines of a process, so who wants it is recorded once for the process too.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class _FrozenHeap:
    """Frozen while anybody wants it; what the application itself froze before stays so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0
        self._is_foreign = False

    @contextmanager
    def hold(self, is_wanted: bool) -> Iterator[None]:
        if not is_wanted:
            yield
            return
        gc.collect()  # what is garbage by now would stay; outside of the lock, since finalisers run in here
        with self._lock:
            if self._num_holders == 0:
                self._is_foreign = gc.get_freeze_count() > 0
            self._num_holders += 1
            gc.freeze()
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if self._num_holders == 0 and not self._is_foreign:
                    gc.unfreeze()


_PROCESS = _FrozenHeap()


def hold_frozen_heap(is_wanted: bool) -> AbstractContextManager[None]:
    """Have full collections pass over all objects of now for as long as the context is entered, if `is_wanted`.

    Objects of now that become cyclic garbage meanwhile are collected after it. Only for an engine's own threads, for
    the reason given at `hold_switch_interval`.
    """
    return _PROCESS.hold(is_wanted)

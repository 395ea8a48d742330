"""The threads of engines, which can be told from those of the application."""

from __future__ import annotations

import threading
from collections.abc import Callable


class EngineThread(threading.Thread):
    """A daemon thread for whose end the closing of an engine waits.

    The garbage collector may run a finaliser in it, and so may a dropped reference; what those do must not wait for the
    engine.

    Args:
        target: runs in it.
        name: what it is for.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=f"semipd-{name}", daemon=True)

    @staticmethod
    def is_current() -> bool:
        """Whether the caller runs in such a thread, of whichever engine."""
        return isinstance(threading.current_thread(), EngineThread)

"""The stream of one request for event loops, and the one way from the engine's threads into them.

Nothing here runs a task: a reader that waits is woken by the delivery thread, through the loop's own thread-safe call.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint, current_token

from semipd.request import Request, RequestOutput
from semipd.streams import RequestStream, Waker
from semipd.tokenizer import Tokenizer


class _Loop:
    """The way into one event loop: one call into it a step, however many of its tasks have news.

    anyio's own crossing waits for the loop (50-93 ms when user code holds it for 50 ms); both loops have one that does
    not, at 2 us (asyncio) and 4 us (trio).
    """

    def __init__(self, native: Any) -> None:
        self.native = native
        self._call_soon: Callable[..., object] = getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe
        self._events: deque[anyio.Event] = deque()
        self._is_called = False

    def wake(self, event: anyio.Event) -> None:
        """Set `event` soon; from one thread at a time, other than the loop's. Never waits."""
        self._events.append(event)
        if not self._is_called:
            self._is_called = True
            try:
                self._call_soon(self._set_all)
            except RuntimeError:  # the loop is closed (trio: RunFinishedError), so nobody waits there
                self._is_called = False
                self._events.clear()

    def _set_all(self) -> None:
        self._is_called = False  # first: what comes from here on calls again
        while self._events:
            self._events.popleft().set()


Loops = weakref.WeakValueDictionary[object, _Loop]


class AsyncStream(RequestStream):
    """The stream of one request, for event loops.

    `async for` gives deltas, `await` gives the final result. Leaving it early aborts the request: at once when it is
    used as an asynchronous context manager or a task that waits for it is cancelled, otherwise when the last reference
    to it goes.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        prompt: str | None,
        tokenizer: Tokenizer,
        abort: Callable[[tuple[Request, ...]], None],
        loops: Loops,
    ) -> None:
        super().__init__(requests, prompt=prompt, tokenizer=tokenizer, abort=abort)
        self._loops = loops
        self._loop: _Loop | None = None

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            await self._sleep(self.call_when_ready)
            is_ended = self.is_ended  # read first: what came before the end, its error too, is then in `poll`
            if (delta := self.poll()) is not None:
                return delta
            if is_ended:
                raise StopAsyncIteration

    def __await__(self) -> Generator[Any, Any, RequestOutput]:
        return self._result().__await__()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.abort()

    async def _result(self) -> RequestOutput:
        await self._sleep(self.call_when_ended)
        return self.final()

    async def _sleep(self, arm: Callable[[Waker], bool]) -> None:
        """Wait to be woken by the delivery thread, or let others run once; a cancelled wait aborts."""
        event = anyio.Event()
        waker = partial(self._current_loop().wake, event)
        try:
            if arm(waker):
                await event.wait()
            else:
                await checkpoint()
        except BaseException:
            self.disarm(waker)
            self.abort()
            raise

    def _current_loop(self) -> _Loop:
        native = current_token().native_token
        if self._loop is None or self._loop.native is not native:
            self._loop = self._loops.get(native) or self._loops.setdefault(native, _Loop(native))
        return self._loop

"""From step events to text: detokenises, finds stop strings, and fills the streams that users read.

One thread drains the outbox, so that nothing here ever sits between two steps of a lane. It is also the one that ends
things for others, aborted requests and the engine itself: leaving a stream may happen in a finaliser, and that runs in
any thread, one that holds the scheduler's lock included. So others only ever post a call, and what this thread knows
needs no lock. But for the backlog, which callers have to see at once: they append to it and look whether it is empty,
and this thread alone takes from it.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from semipd.core import EngineCore, EngineEnd
from semipd.engine_thread import EngineThread
from semipd.errors import EngineClosed, EngineDead, QueueFull
from semipd.frozen_heap import hold_frozen_heap
from semipd.request import CompletionOutput, FinishReason, Request
from semipd.sched.events import StepEvents
from semipd.streams import RequestStream
from semipd.switch_interval import hold_switch_interval
from semipd.tokenizer import StopMatcher

if TYPE_CHECKING:
    from semipd.tokenizer import Detokenizer, Tokenizer


@dataclass(slots=True)
class _Decoding:
    """The state of one sample. Its stream is held by its readers alone, so that it can be dropped and abort."""

    stream: weakref.ref[RequestStream]
    index: int
    detokenizer: Detokenizer
    matcher: StopMatcher | None
    num_tokens: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Backlogged:
    """Requests that came while the queue was full, and whom to tell once they are in it."""

    requests: tuple[Request, ...]
    on_queued: Callable[[], None]


class Delivery:
    """The thread that turns step events into streams, and the engine's life as its users see it.

    Args:
        core: whose outbox to drain; told of stop strings, aborts and the close.
        tokenizer: makes the detokenisers.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._outbox = core.outbox
        self._decodings: dict[Request, _Decoding] = {}
        self._backlog: deque[_Backlogged] = deque()
        self._is_running = threading.Event()
        self._thread = EngineThread(self._run, "delivery")

    # ---- any thread

    def start(self) -> None:
        """Start the core and the thread; both end at `close`, a failure, or the interpreter's exit."""
        self._thread.start()
        atexit.register(self.close)  # a lane that still computed while the interpreter goes away would crash it
        try:
            self._is_running.wait()
            self._core.start()
        except BaseException:
            self.close()
            raise

    def close_soon(self) -> None:
        """Have the core closed; returns at once, and may be called from a finaliser."""
        self._outbox.put(self._core.close)

    def close(self) -> None:
        """Close the core and wait until it is; open streams raise `EngineClosed`. Idempotent.

        A callback or a finaliser that runs in an engine's own thread does not wait: the closing waits for those.
        """
        self.close_soon()
        if not EngineThread.is_current():
            self._thread.join()

    def serve(self, stream: RequestStream, *, on_queued: Callable[[], None] | None = None) -> None:
        """Queue a stream's requests, whose output then comes to the stream until it is dropped.

        Args:
            stream: a fresh one.
            on_queued: called once they are queued, or have ended before. While the queue is full they wait for space,
                first come, first served; None has a full queue raise instead. For whoever comes while others wait for
                space the queue is full.

        Raises:
            QueueFull: the queue is full and there is no `on_queued`.
            RequestError: there are more of them than the queue ever holds.
            EngineClosed, EngineDead: the engine ended.
        """
        # Posted before the requests are queued, so ahead of their first token.
        decodings = {request: self._decoding(stream, request) for request in stream.requests}
        self._outbox.put(partial(self._decodings.update, decodings))
        try:
            self._submit(stream.requests)
        except QueueFull:
            if on_queued is None:
                self._forget(stream)
                raise
            self._backlog.append(_Backlogged(stream.requests, on_queued))
            self._outbox.put(self._submit_backlog)  # space may have come just before
        except BaseException:
            self._forget(stream)
            raise
        else:
            if on_queued is not None:
                on_queued()
        stream.served()
        self._core.raise_if_ended()  # then what was posted last may have come too late to be seen

    def _submit(self, requests: tuple[Request, ...]) -> None:
        """Queue a newcomer's requests, unless others wait for space: they would never get any for two at once."""
        bound = self._core.config.max_queued_requests
        if self._backlog and bound is not None and len(requests) <= bound:  # else the core refuses them for good
            self._core.raise_if_ended()
            raise QueueFull(
                f"other requests wait for space in the queue, whose max_queued_requests is {bound}; retry later, raise "
                f"the bound, or submit with wait=True to wait behind them"
            )
        self._core.submit(requests)

    def abort(self, requests: tuple[Request, ...]) -> None:
        """End requests that are served; returns at once, and may be called from a finaliser."""
        self._outbox.put(partial(self._abort, requests))

    def _forget(self, stream: RequestStream) -> None:
        self._outbox.put(partial(self._remove, stream.requests))

    def _decoding(self, stream: RequestStream, request: Request) -> _Decoding:
        params = request.params
        return _Decoding(
            stream=weakref.ref(stream),
            index=request.sample_index,
            detokenizer=self._tokenizer.detokenizer(
                skip_special_tokens=params.skip_special_tokens, continues_text=True
            ),
            matcher=StopMatcher(tuple(params.stop), params.include_stop_str_in_output) if params.stop else None,
        )

    # ---- the delivery thread

    def _run(self) -> None:
        config = self._core.config
        with hold_switch_interval(config.switch_interval), hold_frozen_heap(config.freeze_gc):
            self._is_running.set()
            while (end := self._handle_next()) is None:
                pass
            self._end_all(end)
            try:
                self._core.close()
            finally:
                atexit.unregister(self.close)

    def _handle_next(self) -> EngineEnd | None:
        """Take one item off the outbox; nothing of it stays behind in the thread's frames."""
        item = self._outbox.get()
        if isinstance(item, EngineEnd):
            return item
        try:
            if isinstance(item, StepEvents):
                self._deliver(item)
                self._submit_backlog()
            else:
                item()
        except BaseException as error:  # whatever it is, no reader may be left waiting
            self._core.fail(error)
        return None

    def _deliver(self, events: StepEvents) -> None:
        """Everything of one step: prompt scores, tokens, ends; then each stream is woken once."""
        touched: dict[RequestStream, None] = {}
        for request, items in events.prompt_logprobs:
            decoding = self._decodings.get(request)
            if decoding is not None and (stream := decoding.stream()) is not None:
                stream.put_prompt_logprobs(items)
        ending = set(events.finished)
        logprobs = events.logprobs
        for position, (request, token_id) in enumerate(zip(events.requests, events.token_ids, strict=True)):
            decoding = self._decodings.get(request)
            if decoding is None or decoding.stop is not None or (stream := decoding.stream()) is None:
                continue  # surplus of a request that ended on a stop string, or whose reader has gone
            item = None if logprobs is None else logprobs[position]
            if decoding.matcher is None and request not in ending:
                text = decoding.detokenizer.push(token_id)
            else:
                text = self._decode(request, decoding, token_id, is_last=request in ending)
            stream.put_token(decoding.index, text, token_id, item)
            touched[stream] = None
        for request in events.finished:
            decoding = self._decodings.pop(request, None)
            if decoding is not None and (stream := decoding.stream()) is not None:
                stream.put_end(decoding.index, *self._end(request, decoding, events.time))
                touched[stream] = None
        for stream in touched:
            stream.wake()

    def _decode(self, request: Request, decoding: _Decoding, token_id: int, *, is_last: bool) -> str:
        """The text that a token makes final if it may be a stop id, or complete a stop string."""
        decoding.num_tokens += 1
        is_stop_token = is_last and request.finish_reason is FinishReason.STOP
        if is_stop_token and not request.params.include_stop_str_in_output:
            return ""  # an EOS or stop id ends the text without being part of it
        text = decoding.detokenizer.push(token_id)
        if decoding.matcher is not None:
            is_armed = decoding.num_tokens >= request.params.min_tokens
            text, decoding.stop = decoding.matcher.push(text, armed=is_armed)
            if decoding.stop is not None:
                self._core.finish(request, FinishReason.STOP, decoding.stop)
        return text

    def _end(self, request: Request, decoding: _Decoding, now: float) -> tuple[str, CompletionOutput]:
        """The held-back rest of the text, then why and when it ended."""
        text = ""
        if decoding.stop is None:
            text = decoding.detokenizer.flush()
            if decoding.matcher is not None:
                text, decoding.stop = decoding.matcher.push(text)
                text += "" if decoding.stop is not None else decoding.matcher.flush()
        is_stopped = decoding.stop is not None
        finished = CompletionOutput(
            index=decoding.index,
            text="",
            token_ids=(),
            finish_reason=FinishReason.STOP if is_stopped else request.finish_reason,
            stop_reason=decoding.stop if is_stopped else request.stop_reason,
            timings=request.timings(now),
            slo_attained=request.is_slo_attained(now),
        )
        return text, finished

    def _submit_backlog(self) -> None:
        """Queue as many as fit. Space comes with an admission or an end, and both are followed by step events."""
        while self._backlog:
            try:
                self._core.submit(self._backlog[0].requests)
            except (QueueFull, EngineClosed, EngineDead):
                return
            self._backlog.popleft().on_queued()

    def _abort(self, requests: tuple[Request, ...]) -> None:
        for waiting in self._backlog.copy():  # others append to it meanwhile
            if waiting.requests is requests:
                self._backlog.remove(waiting)
                waiting.on_queued()
        for request in requests:
            self._core.finish(request, FinishReason.ABORT)

    def _remove(self, requests: tuple[Request, ...]) -> None:
        for request in requests:
            self._decodings.pop(request, None)

    def _end_all(self, end: EngineEnd) -> None:
        """Every open stream raises why the engine ended."""
        streams = {decoding.stream(): None for decoding in self._decodings.values()}
        for stream in streams:
            if stream is not None:
                stream.fail(end)
        for stream in streams:
            if stream is not None:
                stream.wake()
        while self._backlog:
            self._backlog.popleft().on_queued()
        self._decodings.clear()

"""What a reader holds of a request: new output as it comes, or all of it at the end.

The delivery thread puts raw deltas in; the reader's own thread makes `RequestOutput` of them. Between the two there is
no lock, so a reader who never reads, or is stopped in the middle of reading, delays nobody.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from semipd.core import EngineEnd
from semipd.request import CompletionOutput, Logprob, Request, RequestOutput
from semipd.sched.batch import TokenLogprobs

if TYPE_CHECKING:
    from semipd.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Waker = Callable[[], None]


# News of one sample: its index, final text, then a token with its log-probabilities, or its end. A plain tuple: one
# is made for each token of each request, in a third of a dataclass's time, and the garbage collector stops following
# it.
_Delta = tuple[int, str, int | None, TokenLogprobs | None, CompletionOutput | None]


class RequestStream:
    """What one request has produced and its reader has not taken yet. Any thread may read, several at once too.

    A request is aborted when its stream is left early: at once by `abort` and as a context manager, otherwise when the
    last reference to the stream goes.

    Args:
        requests: the samples of one prompt.
        prompt: its text, if it was one.
        tokenizer: gives log-probabilities the texts of their tokens.
        abort: ends requests soon, from any thread and from a finaliser.
    """

    _is_served = False

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        prompt: str | None,
        tokenizer: Tokenizer,
        abort: Callable[[tuple[Request, ...]], None],
    ) -> None:
        self.requests = tuple(requests)
        self.request_id = requests[0].request_id
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._abort = abort
        self._deltas: deque[_Delta] = deque()
        self._scores: list[TokenLogprobs] = []
        self._num_open = len(requests)
        self._end: EngineEnd | None = None
        self._ready_wakers: deque[Waker] = deque()
        self._end_wakers: deque[Waker] = deque()
        self._reading = threading.Lock()  # between readers only
        self._samples = [_Sample(index, requests[0].params.logprobs or 0) for index in range(len(requests))]
        self._gave_prompt_logprobs = False

    # ---- the engine's side

    def served(self) -> None:
        """From now on the requests are queued, or will be: there is something to abort."""
        self._is_served = True

    def put_token(self, index: int, text: str, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a token of sample `index`, and the text that it makes final; `wake` follows once per step."""
        self._deltas.append((index, text, token_id, logprobs, None))

    def put_end(self, index: int, text: str, finished: CompletionOutput) -> None:
        """Append the rest of the text of sample `index`, and how it ended."""
        self._deltas.append((index, text, None, None, finished))
        self._num_open -= 1

    def put_prompt_logprobs(self, items: Sequence[TokenLogprobs]) -> None:
        """Append scored prompt positions; they arrive before the first token."""
        self._scores += items

    def fail(self, end: EngineEnd) -> None:
        """End the stream with an error that its readers raise after what it already has."""
        self._end = end

    def wake(self) -> None:
        """Call whoever waits, each once."""
        if self._ready_wakers:
            self._call(self._ready_wakers)
        if self._end_wakers and self.is_ended:
            self._call(self._end_wakers)

    def _call(self, wakers: deque[Waker]) -> None:
        for _ in range(len(wakers)):  # not those that arm themselves again while they are called
            try:
                waker = wakers.popleft()
            except IndexError:  # its reader has just given up waiting
                return
            try:
                waker()
            except BaseException:  # even SystemExit: the thread serves others too
                logger.exception("the callback of request %s failed", self.request_id)

    # ---- the readers' side

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will be put in."""
        return self._num_open == 0 or self._end is not None

    def poll(self) -> RequestOutput | None:
        """What is new, without waiting; None when nothing is.

        Raises:
            EngineDead, EngineClosed: the engine ended before the request did, and everything else was taken.
        """
        with self._reading:
            deltas = [self._deltas.popleft() for _ in range(len(self._deltas))]
            if deltas:
                return self._output(self._take(deltas), is_delta=True)
        if self._end is not None:
            raise self._end.make_error()
        return None

    def call_when_ready(self, waker: Waker) -> bool:
        """Have `waker` called, once, from the delivery thread, when `poll` has something; False if it already has."""
        return _arm(self._ready_wakers, waker, lambda: bool(self._deltas) or self.is_ended)

    def call_when_ended(self, waker: Waker) -> bool:
        """The same for the end of the stream, so that a reader of the result is not woken for each token."""
        return _arm(self._end_wakers, waker, lambda: self.is_ended)

    def disarm(self, waker: Waker) -> None:
        """Forget a waker that nobody waits for any more."""
        for wakers in (self._ready_wakers, self._end_wakers):
            _remove(wakers, waker)

    def final(self) -> RequestOutput:
        """Everything, once the stream has ended.

        Raises:
            EngineDead, EngineClosed: the engine ended before the request did.
        """
        while self.poll() is not None:
            pass
        with self._reading:
            return self._output([sample.whole() for sample in self._samples], is_delta=False)

    def abort(self) -> bool:
        """End the request soon; False if it has ended already. Its readers get finish reason "abort"."""
        if not self._is_served or self.is_ended:
            return False
        self._abort(self.requests)
        return True

    def __del__(self) -> None:
        self.abort()

    def _take(self, deltas: list[_Delta]) -> list[CompletionOutput]:
        """One output for each sample that has news, in their order."""
        if len(self._samples) == 1:
            return [self._samples[0].take(deltas, self._tokenizer)]
        of_samples: dict[int, list[_Delta]] = {}
        for delta in deltas:
            of_samples.setdefault(delta[0], []).append(delta)
        return [self._samples[index].take(own, self._tokenizer) for index, own in sorted(of_samples.items())]

    def _output(self, outputs: Sequence[CompletionOutput], *, is_delta: bool) -> RequestOutput:
        leader = self.requests[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=leader.prompt_token_ids,
            outputs=tuple(outputs),
            prompt_logprobs=self._prompt_logprobs(is_delta=is_delta),
            num_cached_tokens=leader.num_cached_tokens,
            finished=all(sample.is_finished for sample in self._samples),
            is_delta=is_delta,
        )

    def _prompt_logprobs(self, *, is_delta: bool) -> tuple[Mapping[int, Logprob] | None, ...] | None:
        """Those of all prompt tokens; in one of the deltas, the first unless another sample was quicker."""
        num_top = self.requests[0].params.prompt_logprobs
        targets = self.requests[0].prompt_token_ids[1:]
        if num_top is None:
            return None
        if is_delta:
            if self._gave_prompt_logprobs or len(self._scores) < len(targets):
                return None
            self._gave_prompt_logprobs = True
        scored = zip(self._scores, targets, strict=False)
        return (None, *(_logprobs(item, token, num_top, self._tokenizer) for item, token in scored))


class Stream(RequestStream):
    """The stream of one request, for threads: a context manager and an iterator of deltas.

    Leaving the block aborts the request if it still runs::

        with engine.stream("Once upon a time") as stream:
            for delta in stream:
                print(delta.outputs[0].text, end="")
    """

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abort()

    def __iter__(self) -> Iterator[RequestOutput]:
        while (delta := self._next()) is not None:
            yield delta

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end and give everything, deltas already read included.

        Raises:
            TimeoutError: it did not end within `timeout` seconds; it goes on.
            EngineDead, EngineClosed: the engine ended before the request did.
        """
        ended = threading.Event()
        waker = ended.set
        if self.call_when_ended(waker) and not ended.wait(timeout):
            self.disarm(waker)
            raise TimeoutError(f"request {self.request_id} did not end within {timeout} s; wait longer or abort it")
        return self.final()

    def _next(self) -> RequestOutput | None:
        while True:
            is_ended = self.is_ended  # read first: what came before the end, its error too, is then in `poll`
            if (delta := self.poll()) is not None or is_ended:
                return delta
            ready = threading.Event()
            if self.call_when_ready(ready.set):
                ready.wait()


class _Sample:
    """Accumulates one sample of a request on the reader's side."""

    def __init__(self, index: int, num_logprobs: int) -> None:
        self._index = index
        self._num_logprobs = num_logprobs
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Mapping[int, Logprob]] = []
        self._finished: CompletionOutput | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its end was taken."""
        return self._finished is not None

    def take(self, deltas: Sequence[_Delta], tokenizer: Tokenizer) -> CompletionOutput:
        """Add `deltas` and give them as one output."""
        texts, token_ids, logprobs = [], [], []
        for _, text, token_id, item, finished in deltas:
            texts.append(text)
            if token_id is not None:
                token_ids.append(token_id)
                if item is not None:
                    logprobs.append(_logprobs(item, token_id, self._num_logprobs, tokenizer))
            if finished is not None:
                self._finished = finished
        self._texts += texts
        self._token_ids += token_ids
        self._logprobs += logprobs
        return self._output("".join(texts), token_ids, logprobs)

    def whole(self) -> CompletionOutput:
        """All of it so far."""
        return self._output("".join(self._texts), self._token_ids, self._logprobs)

    def _output(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]
    ) -> CompletionOutput:
        end = self._finished
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs) if logprobs else None,
            finish_reason=None if end is None else end.finish_reason,
            stop_reason=None if end is None else end.stop_reason,
            timings=None if end is None else end.timings,
            slo_attained=None if end is None else end.slo_attained,
        )


def _arm(wakers: deque[Waker], waker: Waker, is_ready: Callable[[], bool]) -> bool:
    """Add `waker` unless what it waits for is there already.

    Without a lock, because a finaliser may run in here: the reader adds, then looks; the delivery thread puts, then
    calls. So at least one of the two sees the other.
    """
    wakers.append(waker)
    return not is_ready() or not _remove(wakers, waker)  # gone already: then it was called


def _remove(wakers: deque[Waker], waker: Waker) -> bool:
    while True:
        try:
            wakers.remove(waker)
            return True
        except ValueError:
            return False
        except IndexError:  # the delivery thread took one out meanwhile
            continue


def _logprobs(item: TokenLogprobs, token_id: int, num_top: int, tokenizer: Tokenizer) -> Mapping[int, Logprob]:
    """The most likely tokens and the chosen one, by id, as vLLM gives them."""
    logprobs = {
        top_id: Logprob(logprob=logprob, rank=rank, decoded_token=tokenizer.token_text(top_id))
        for rank, (top_id, logprob) in enumerate(
            zip(item.top_token_ids[:num_top], item.top_logprobs[:num_top], strict=True), start=1
        )
    }
    logprobs.setdefault(
        token_id, Logprob(logprob=item.logprob, rank=item.rank, decoded_token=tokenizer.token_text(token_id))
    )
    return logprobs

"""Scheduler, lanes and outbox of one engine, and their life: start, submit, finish, fail, close.

`EngineCore` takes requests in and puts step events out; it waits for nobody and knows no text. `build.py` makes one
from an `EngineConfig`; tests and simulators make theirs from a scripted executor.
"""

from __future__ import annotations

import itertools
import logging
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from semipd.config import SLO, EngineConfig, Phase, StaticPolicy
from semipd.errors import EngineClosed, EngineDead, PromptTooLong, RequestError
from semipd.latency_store import LatencyStore
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import EngineStatistics, Metrics
from semipd.request import FinishReason, Request, SamplingParams
from semipd.sched.calibration import Calibrator, usual_trials
from semipd.sched.events import StepEvents
from semipd.sched.lane import Executor, Lane
from semipd.sched.latency import LatencyModel
from semipd.sched.policies import make_policy, predicted_splits
from semipd.sched.policy import Policy
from semipd.sched.scheduler import Scheduler, SchedulerConfig
from semipd.trace import TraceWriter, end_record, start_record

if TYPE_CHECKING:
    from semipd.device.partition import PartitionBackend

logger = logging.getLogger(__name__)

_DECODE_STEPS_AHEAD = 1


@dataclass(frozen=True, slots=True)
class EngineEnd:
    """The last item of an outbox: why nothing more will come."""

    error: EngineDead | EngineClosed

    def make_error(self) -> EngineDead | EngineClosed:
        """A fresh exception for one reader, with the same cause: two threads never share a traceback."""
        error = type(self.error)(*self.error.args)
        error.__cause__ = self.error.__cause__
        return error


# Step events, what other threads ask of the one that drains it, and last why nothing more comes.
Outbox = queue.SimpleQueue[StepEvents | Callable[[], None] | EngineEnd]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What a request is checked against before it is queued."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


class EngineCore:
    """Scheduler, lanes and outbox of one engine.

    Args:
        config: the engine's arguments; policy, SLO, seed and limits of the queue are read here.
        limits: what requests are checked against.
        executor: runs batches.
        backend: the device's partitions.
        allocator: the pool of blocks.
        max_prefill_tokens: most prompt tokens in a step of the prefill lane.
        window: sliding window behind which blocks are freed; None keeps all.
        prefill_steps_ahead: prefill steps that may be unread while the next one is launched. One hides the host's work
            between them and keeps the lane's share of the device for a step longer when the plan changes.
        clock: seconds, monotonic; the executor stamps its results with the same one.
        latency: what is known of step times; None for nothing.
        latency_store: keeps what is learned of them; None keeps nothing.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        limits: RequestLimits,
        executor: Executor,
        backend: PartitionBackend,
        allocator: BlockAllocator,
        max_prefill_tokens: int,
        window: int | None = None,
        prefill_steps_ahead: int = 0,
        clock: Callable[[], float] = time.monotonic,
        latency: LatencyModel | None = None,
        latency_store: LatencyStore | None = None,
    ) -> None:
        self.config = config
        self.limits = limits
        self.outbox: Outbox = queue.SimpleQueue()
        self._backend = backend
        self._executor: Executor | None = executor
        self._clock = clock
        self._random = random.Random(config.seed)
        self._ids = itertools.count()
        self._state_lock = threading.Lock()
        self._end: EngineEnd | None = None
        shares = {
            Phase.PREFILL: tuple(sorted({split[0] for split in backend.splits} | {backend.num_sms})),
            Phase.DECODE: tuple(sorted({split[1] for split in backend.splits} | {backend.num_sms})),
        }
        latency = latency or LatencyModel(backend.num_sms)
        self._latency_store, self._latency_state = latency_store, latency.to_state()
        policy = make_policy(
            config.policy or StaticPolicy(),
            num_sms=backend.num_sms,
            splits=backend.splits,
            default_split=backend.default_split,
            max_prefill_tokens=max_prefill_tokens,
            slo=config.slo,
            latency=latency,
        )
        self._trace = trace = None if config.trace is None else TraceWriter(config.trace)
        if trace is not None:
            trace.put(start_record(config, num_sms=backend.num_sms, time=clock()))
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_prefill_tokens=max_prefill_tokens,
                num_sms=backend.num_sms,
                shares=shares,
                window=window,
                max_queued_requests=config.max_queued_requests,
            ),
            allocator=allocator,
            policy=policy,
            latency=latency,
            metrics=Metrics(),
            emit=self.outbox.put if trace is None else partial(_emit_and_trace, self.outbox, trace),
            clock=clock,
            calibrator=self._make_calibrator(policy, latency, allocator, max_prefill_tokens),
            trace=None if trace is None else trace.put,
        )
        self._lanes = [
            Lane(
                phase,
                scheduler=self._scheduler,
                executor=executor,
                steps_ahead=_DECODE_STEPS_AHEAD if phase is Phase.DECODE else prefill_steps_ahead,
                on_failure=self.fail,
            )
            for phase in Phase
        ]

    def _make_calibrator(
        self, policy: Policy, latency: LatencyModel, allocator: BlockAllocator, max_prefill_tokens: int
    ) -> Calibrator | None:
        """None where nobody asks the model, or where it knows enough: unless a user insists."""
        splits, asked = predicted_splits(policy), self.config.calibrate
        if splits is None or asked is False or self.config.device == "cpu":
            return None
        if asked is None and (self._latency_store is None or latency.is_calibrated):
            return None
        return Calibrator(
            tuple(usual_trials(latency.num_sms, splits)),
            num_sms=latency.num_sms,
            num_slots=self.config.max_num_seqs,
            max_tokens=self.limits.max_model_len,
            max_chunk=max_prefill_tokens,
            vocab_size=self.limits.vocab_size,
            latency=latency,
            allocator=allocator,
            on_done=lambda: self.outbox.put(self._store_latency),
        )

    def start(self) -> None:
        """Start both lanes."""
        for lane in self._lanes:
            lane.start()

    def settle(self) -> None:
        """Return once steps get no faster for want of preparation.

        Raises:
            EngineClosed, EngineDead: the engine ended.
        """
        self.raise_if_ended()
        executor = self._executor
        if executor is not None:
            try:
                executor.settle()
            except Exception:
                self.raise_if_ended()  # that was why
                raise

    def make_requests(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
        slo: SLO | None = None,
        cache_salt: str | None = None,
    ) -> list[Request]:
        """The `n` samples of one prompt, checked against the model and the pool.

        Raises:
            PromptTooLong: the prompt leaves no room for a token.
            RequestError: the prompt is empty, or an id is outside the vocabulary.
        """
        prompt = tuple(prompt_token_ids)
        self._check_token_ids(prompt, params, bad_word_ids)
        room = self.limits.max_model_len - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and max_model_len is {self.limits.max_model_len}, prompt and "
                f"output together; shorten the prompt, or make the engine with a larger max_model_len or KV pool"
            )
        if params.min_tokens > room:
            raise PromptTooLong(
                f"min_tokens is {params.min_tokens}, but a prompt of {len(prompt)} tokens leaves {room} of "
                f"max_model_len {self.limits.max_model_len}; shorten the prompt or lower min_tokens"
            )
        eos = frozenset() if params.ignore_eos else self.limits.eos_token_ids
        stop_token_ids = eos | frozenset(params.stop_token_ids or ())
        if params.min_tokens and params.allowed_token_ids and stop_token_ids.issuperset(params.allowed_token_ids):
            raise RequestError(
                f"allowed_token_ids {list(params.allowed_token_ids)} all end the output, but min_tokens is "
                f"{params.min_tokens}, so nothing could be generated; allow another id or drop min_tokens"
            )
        now = self._clock()
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        name = f"semipd-{next(self._ids)}" if request_id is None else request_id
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                request_id=name,
                prompt_token_ids=prompt,
                params=params,
                arrival_time=now,
                seed=seed,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                stop_token_ids=stop_token_ids,
                bad_word_ids=bad_word_ids,
                sample_index=index,
                slo=self.config.slo if slo is None else slo,
                cache_salt=cache_salt,
                leader=requests[0] if requests else None,
            )
            requests.append(request)
        return requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue the samples of one prompt.

        Raises:
            QueueFull: the queue is at its bound.
            EngineClosed, EngineDead: the engine ended.
        """
        bound = self.config.max_queued_requests
        if bound is not None and len(requests) > bound:
            raise RequestError(f"n is {len(requests)}, above max_queued_requests {bound}; lower n or raise the bound")
        self.raise_if_ended()
        self._scheduler.add(requests)
        self.raise_if_ended()  # it may have ended in between: then nobody would ever run them

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a request from outside: an abort, or a stop string found in its text.

        Safe from any thread, but not from a finaliser: it may run in one that holds the scheduler's lock. Nor while
        `submit` runs.
        """
        self._scheduler.finish(request, reason, stop_reason)

    @property
    def is_ended(self) -> bool:
        """Whether it was closed or has failed."""
        return self._end is not None

    def raise_if_ended(self) -> None:
        """Raise what open streams raise once the engine has ended."""
        if self._end is not None:
            raise self._end.make_error()

    def statistics(self) -> EngineStatistics:
        """A snapshot of counters and gauges."""
        return self._scheduler.statistics()

    def reset_prefix_cache(self) -> None:
        """Have no later prompt match a block that is computed now."""
        self._scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert that requests, slots and blocks agree; callable in production.

        Raises:
            AssertionError: they do not; the message says where.
        """
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Stop the lanes after their launched steps, end the outbox, let go of the executor and all that it holds.

        Idempotent, also after a failure; one call at a time, and not from a lane.
        """
        self._finish_with(EngineClosed("the engine was closed; make a new one"))
        lanes, self._lanes = self._lanes, []
        while lanes:
            lanes.pop().join()
        assert self._end is not None
        self._store_latency()
        if (trace := self._trace) is not None:
            self._scheduler.end_trace()
            trace.put(end_record(self._end.error.__cause__, time=self._clock()))
            trace.close()
        cause = self._end.error.__cause__
        while cause is not None:  # the frames of a failed step would keep weights and KV cache alive
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        if self._executor is not None:
            executor, self._executor = self._executor, None
            executor.close()
            del executor  # and with it the weights: then the backend can give their memory back to the system
            self._backend.close()

    def raise_trace_error(self) -> None:
        """Raise, once, what kept the trace from being complete.

        Raises:
            OSError: the disk was full, say.
        """
        trace = self._trace
        if trace is not None and trace.error is not None:
            self._trace = None
            raise trace.error

    def fail(self, error: BaseException) -> None:
        """End the engine because `error` broke it: every open stream and later call raises `EngineDead` from it."""
        dead = EngineDead(f"the engine failed with {type(error).__name__}: {error}; make a new engine")
        dead.__cause__ = error
        if self._finish_with(dead):
            logger.error("the engine ends", exc_info=error)

    def _finish_with(self, error: EngineDead | EngineClosed) -> bool:
        """End the engine because of `error`, unless it has ended before."""
        with self._state_lock:
            if self._end is not None:
                return False
            self._end = EngineEnd(error)
        self._scheduler.stop()
        self.outbox.put(self._end)
        return True

    def _store_latency(self) -> None:
        """Keep what was learned since it was last kept."""
        state = self._scheduler.latency_state()
        if self._latency_store is not None and state != self._latency_state:
            self._latency_state = state
            self._latency_store.save(state)

    def _check_token_ids(
        self, prompt: tuple[int, ...], params: SamplingParams, bad_word_ids: tuple[tuple[int, ...], ...]
    ) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        named = {
            "the prompt": prompt,
            "stop_token_ids": params.stop_token_ids or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": tuple(params.logit_bias or ()),
            "bad_words, as encoded,": tuple(itertools.chain.from_iterable(bad_word_ids)),
        }
        vocab_size = self.limits.vocab_size
        for name, token_ids in named.items():
            for token_id in token_ids:
                if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                    raise RequestError(f"{name} holds {token_id!r}; expected token ids from 0 to {vocab_size - 1}")


def _emit_and_trace(outbox: Outbox, trace: TraceWriter, events: StepEvents) -> None:
    outbox.put(events)
    if events.finished:
        trace.put(events)

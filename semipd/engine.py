"""The door: one `Engine` that serves a model from the caller's own process.

It waits and turns text into requests; it decides nothing. Every public method may be called from any thread, and the
asynchronous ones from any event loop that anyio knows.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, Unpack

from semipd.arguments import (
    EngineOptions,
    Messages,
    Params,
    Prompt,
    as_config,
    as_name,
    as_params_per_prompt,
    as_prompts,
    as_sampling_params,
    as_slo,
    as_token_ids,
)
from semipd.async_stream import AsyncStream, Loops
from semipd.build import build_core
from semipd.config import SLO, EngineConfig
from semipd.core import EngineCore
from semipd.delivery import Delivery
from semipd.errors import RequestError
from semipd.metrics import EngineStatistics
from semipd.request import RequestOutput
from semipd.streams import RequestStream, Stream
from semipd.tokenizer import Tokenizer

S = TypeVar("S", bound=RequestStream)


class Engine:
    """Serves one language model in this process: prompts in, text out, from any number of threads and tasks at once.

    Prefill and decode run as two lanes on disjoint parts of the device, over one copy of the weights and one pool of KV
    blocks. It installs no signal handler, and starts no child process but the ranks of tensor parallelism. Use it as a
    context manager, or call `close`.

    Args:
        model: a hub id, a local folder (config.json and safetensors) or one .gguf file.
        tokenizer: where the tokenizer comes from, if not from the model.
        revision: branch, tag or commit of a hub model.
        load_format: "auto", "safetensors", "gguf", or "dummy" for random weights from a config alone.
        device: "auto" (a GPU if there is one), "cuda", "cuda:<index>" or "cpu".
        dtype: of weights and KV cache; "auto" takes the checkpoint's.
        seed: of everything random that a request does not seed itself.
        max_model_len: longest request, prompt and output together, in tokens; None takes what model and pool allow.
        max_num_seqs: most requests that run at the same time.
        max_prefill_tokens: most prompt tokens in one step of the prefill lane; longer prompts are cut. None: by device.
        max_queued_requests: bound of the waiting queue (`QueueFull`); None for none.
        block_size: tokens in a KV block. None: 16 on a CPU, 64 on a GPU.
        kv_cache_bytes: size of the KV pool in bytes, of each rank; or
        kv_cache_tokens: in tokens; or
        kv_cache_fraction: as a share of the memory that is free when the engine starts, on each rank.
        enable_prefix_caching: keep the KV blocks of finished prompts for later ones that begin alike.
        policy: who computes when, by name or as a policy object with its arguments: "adaptive", "static", "mixed",
            "exclusive", "cadence", "semi-pd", "semi-pd-released". None: "adaptive" on a GPU, "static" on a CPU.
        slo: latency targets of requests that bring none.
        switch_interval: Python's thread switch interval while the engine lives, in seconds; `close` undoes it. 0.0005
            keeps steps even when other threads of the process burn CPU in Python. None leaves it alone but for moments
            of the first seconds. Of several engines' the smallest counts.
        freeze_gc: while the engine lives, full collections of Python's garbage collector leave out what the process had
            loaded before; each would halt all streams for tens of milliseconds. `close` undoes it.
        calibrate: policies that predict step times, "adaptive" and `MixedPolicy(token_budget=None)`, have them measured
            for some seconds on a GPU, while the engine is idle after its first request, and kept in the user's cache
            folder for the next engine. None: unless they are kept already; True: anew; False: never, nor is anything
            kept or read. The same goes for how several Hopper GPUs overlap products with their sums, which about ten
            seconds of the first start measure; with False they do not.
        trace: a file that is written while the engine runs, as JSON lines: its decisions, steps and ended requests.
        tensor_parallel_size: GPUs of this host that share every layer, from `device` on; each but the first has a
            process of its own.

    Raises:
        ConfigError: an argument cannot work.
        WeightsError: the checkpoint is missing, malformed or unsupported.
        RankError: another rank ended while it started.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> None:
        built = build_core(as_config(model, options))
        self._start(built.core, built.tokenizer)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer) -> Engine:
        """An engine around a core made elsewhere: a scripted executor, another device."""
        engine = cls.__new__(cls)
        engine._start(core, tokenizer)
        return engine

    def _start(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._live: weakref.WeakValueDictionary[str, RequestStream] = weakref.WeakValueDictionary()
        self._live_lock = threading.RLock()  # a finaliser that names a request may run inside
        self._loops: Loops = weakref.WeakValueDictionary()
        self._delivery = Delivery(core, tokenizer)
        self._delivery.start()

    # ---- text in, text out

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] = None,
        *,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        show_progress: bool = False,
    ) -> list[RequestOutput]:
        """Serve one or many prompts and wait for all; waits for a full queue too.

        Args:
            prompts: text or token ids, or a sequence of either.
            params: one for all, or one per prompt.
            slo: latency targets, instead of the engine's.
            cache_salt: prompts share cached KV blocks only with prompts of the same salt, such as a tenant's name.
            show_progress: draw a progress bar on stderr.

        Returns:
            One output per prompt, in order; a list of one for a single prompt.

        Raises:
            RequestError: a prompt or field cannot be served; nothing is left running.
            EngineDead, EngineClosed: the engine ended.
        """
        batch = as_prompts(prompts)
        streams: list[Stream] = []
        try:
            for prompt, one in zip(batch, as_params_per_prompt(params, len(batch)), strict=True):
                streams.append(self.stream(prompt, one, slo=slo, cache_salt=cache_salt, wait=True))
            return [stream.result() for stream in _progress(streams, enabled=show_progress)]
        except BaseException:
            for stream in streams:
                stream.abort()
            raise

    def stream(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        wait: bool = False,
    ) -> Stream:
        """Serve one prompt as a stream of deltas; leaving the stream's `with` block aborts it.

        Args:
            prompt: text or token ids.
            params: how to choose the tokens.
            request_id: a name of yours, unique among live requests.
            slo: latency targets, instead of the engine's.
            cache_salt: prompts share cached KV blocks only with prompts of the same salt, such as a tenant's name.
            wait: wait while the queue is full instead of raising.

        Raises:
            QueueFull: the queue is at `max_queued_requests`, or others wait for space in it.
            RequestError: the prompt or a field cannot be served.
            EngineDead, EngineClosed: the engine ended.
        """
        stream = self._make_stream(Stream, prompt, params, request_id, slo, cache_salt)
        if not wait:
            self._open(stream)
            return stream
        queued = threading.Event()
        try:
            self._open(stream, on_queued=queued.set)
            queued.wait()
        except BaseException:  # an interrupt, whose traceback may keep the stream
            stream.abort()
            raise
        self._core.raise_if_ended()
        return stream

    def agenerate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        wait: bool = False,
    ) -> AsyncStream:
        """Serve one prompt from an event loop (asyncio or trio): `async for` gives deltas, `await` the final result.

        Arguments and errors are those of `stream`, but for:

        Args:
            wait: queue it as soon as the queue has space, instead of raising; the call itself never waits.
        """
        kind = partial(AsyncStream, loops=self._loops)
        stream = self._make_stream(kind, prompt, params, request_id, slo, cache_salt)
        self._open(stream, on_queued=_nothing if wait else None)
        return stream

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params | Sequence[Params] = None,
        *,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        show_progress: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Serve one conversation, or many, through the model's chat template; otherwise as `generate`.

        Args:
            messages: dicts with "role" and "content", or a sequence of such conversations.
            template_options: passed to the template, such as `add_generation_prompt`, `tools`, `enable_thinking`.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.apply_chat_template(one, **template_options) for one in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params, slo=slo, cache_salt=cache_salt, show_progress=show_progress)

    def apply_chat_template(self, messages: Messages, **template_options: Any) -> list[int]:
        """The token ids that the model's template makes of a conversation, to stream or submit.

        Raises:
            RequestError: the model has no template, or it refuses the messages.
        """
        return self._tokenizer.apply_chat_template(messages, **template_options)

    # ---- for backends of one's own

    def submit(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        wait: bool = False,
        on_ready: Callable[[], None] | None = None,
    ) -> Stream:
        """Queue a prompt without waiting for it: `poll` the stream, or be called when it has something.

        Keep the stream: when the last reference to it goes, the request is aborted. Arguments and errors are those of
        `stream`, and:

        Args:
            on_ready: called once when `poll` has something, from the delivery thread, or here if it has already; arm it
                again with `stream.call_when_ready`. It must not block.
        """
        stream = self.stream(prompt, params, request_id=request_id, slo=slo, cache_salt=cache_salt, wait=wait)
        if on_ready is not None and not stream.call_when_ready(on_ready):
            on_ready()
        return stream

    def abort(self, request_id: str) -> bool:
        """End a request by its id, soon; False when none of that id is live. Its readers get finish reason "abort"."""
        stream = self._live.get(request_id)
        return stream is not None and stream.abort()

    # ---- the engine itself

    @property
    def config(self) -> EngineConfig:
        """The engine's arguments, with `max_model_len` as resolved."""
        return self._core.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def statistics(self) -> EngineStatistics:
        """Counters, gauges and latency distributions up to now; works on a closed engine too."""
        return self._core.statistics()

    def settle(self) -> None:
        """Return once the usual steps take no longer than they will later: some seconds after the start on a GPU.

        Nobody has to call it. Without it the first requests are served at once, and their steps launched one kernel at
        a time, while graphs of the usual ones are captured beside them.

        Raises:
            EngineClosed, EngineDead: the engine ended.
        """
        self._core.settle()

    def reset_prefix_cache(self) -> None:
        """Forget the KV blocks of earlier prompts, as before a measurement; running requests keep theirs."""
        self._core.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Assert that requests, slots and KV blocks agree; for tests, and for moments in which nobody waits.

        Both lanes stand still meanwhile: 4 to 6 ms for 6,000 blocks.

        Raises:
            AssertionError: they do not.
        """
        self._core.check_integrity()

    def close(self) -> None:
        """Stop the lanes and give the memory back; open streams raise `EngineClosed`. Idempotent.

        Called from a callback of the engine it does not wait for its end.

        Raises:
            OSError: the trace could not be written to its end; the engine is closed, and served all the same.
        """
        self._delivery.close()
        self._core.raise_trace_error()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        delivery = getattr(self, "_delivery", None)  # none if the engine could not be made
        if delivery is not None and not self._core.is_ended:
            delivery.close_soon()
            message = "an Engine was dropped without close(); use it as a context manager"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _make_stream(
        self,
        kind: Callable[..., S],
        prompt: Prompt,
        params: Params,
        request_id: str | None,
        slo: SLO | None,
        cache_salt: str | None,
    ) -> S:
        """A stream of checked requests that nothing serves yet."""
        self._core.raise_if_ended()
        sampling = as_sampling_params(params)
        requests = self._core.make_requests(
            self._tokenizer.encode(prompt) if isinstance(prompt, str) else as_token_ids(prompt),
            sampling,
            request_id=as_name(request_id, "request_id"),
            bad_word_ids=self._tokenizer.encode_bad_words(sampling.bad_words or ()),
            slo=as_slo(slo),
            cache_salt=as_name(cache_salt, "cache_salt"),
        )
        text = prompt if isinstance(prompt, str) else None
        return kind(requests, prompt=text, tokenizer=self._tokenizer, abort=self._delivery.abort)

    def _open(self, stream: RequestStream, *, on_queued: Callable[[], None] | None = None) -> None:
        """Have a stream served, or raise and leave nothing behind; see `Delivery.serve`."""
        with self._live_lock:
            other = self._live.get(stream.request_id)
            if other is not None and not other.is_ended:
                raise RequestError(f"request_id {stream.request_id!r} is live already; give another, or none")
            self._live[stream.request_id] = stream
        try:
            self._delivery.serve(stream, on_queued=on_queued)
        except BaseException:
            self._live.pop(stream.request_id, None)
            raise


def _nothing() -> None:
    return


def _progress(streams: Sequence[Stream], *, enabled: bool) -> Iterable[Stream]:
    """The streams in order, behind a progress bar if asked for."""
    if not enabled:
        return streams
    from tqdm.auto import tqdm

    bar: Iterable[Stream] = tqdm(streams, desc="prompts", unit="prompt")
    return bar

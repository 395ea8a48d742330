"""What a user asks for, what one running generation knows of itself, and what comes back.

`Request` is written only under the scheduler's lock. It stores the fewest integers and derives the rest; the order
that always holds is asserted in `Request.check`:

    0 <= num_computed_tokens <= num_scheduled_tokens <= num_tokens + launched steps
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from typing import Any, TypeVar

from semipd.config import SLO
from semipd.errors import RequestError

DEFAULT_MAX_TOKENS = 256
MAX_LOGPROBS = 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request. Names and meanings are vLLM's.

    None for `stop`, `stop_token_ids` or `bad_words` is stored as an empty tuple.

    Attributes:
        n: number of independent outputs for the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: smallest set of most likely tokens whose probability reaches this share.
        top_k: number of most likely tokens kept; 0 or -1 keeps all.
        min_p: tokens below this share of the most likely token's probability are dropped.
        seed: makes the output repeatable; None draws one from the engine's seed.
        max_tokens: most tokens to generate; None for what the prompt leaves of `max_model_len`.
        min_tokens: EOS, stop ids and stop strings are ignored before this many tokens.
        stop: strings that end the output; matched on text, cut off unless `include_stop_str_in_output`.
        stop_token_ids: ids that end the output, beside the model's EOS ids.
        ignore_eos: go on past EOS.
        presence_penalty: subtracted once from the logit of every generated token.
        frequency_penalty: subtracted per occurrence in the output.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id to value added to its logit.
        bad_words: words that may not be generated.
        allowed_token_ids: if given, only these may be generated.
        logprobs: None for none, otherwise the sampled token's and that many of the most likely ones, per token.
        prompt_logprobs: the same for every prompt token but the first.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
        priority: requests of a smaller number are scheduled first and preempted last.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = ()
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen: the only writes are these normalisations
        set_(self, "stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        set_(self, "bad_words", _strings("bad_words", self.bad_words))
        set_(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            set_(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty, so no token could be generated; give ids or None")
        _require_int("n", self.n, 1)
        _require_int("top_k", self.top_k, -1)
        set_(self, "top_k", max(self.top_k, 0))
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1)
        _require_int("min_tokens", self.min_tokens, 0)
        _require_int("priority", self.priority, -(2**31), 2**31 - 1)
        _require_float("temperature", self.temperature, 0.0, math.inf)
        _require_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logit_bias is not None:
            set_(self, "logit_bias", _bias(self.logit_bias))
        self._require_consistent()

    def _require_consistent(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(
                f"n is {self.n} with temperature 0: greedy outputs would be equal; set n=1 or a temperature"
            )
        if self.min_tokens and self.allowed_token_ids and set(self.allowed_token_ids) <= set(self.stop_token_ids or ()):
            raise RequestError(
                f"allowed_token_ids is {self.allowed_token_ids!r}, all of them in stop_token_ids, so no token could be "
                f"generated before min_tokens {self.min_tokens}; allow another id or set min_tokens=0"
            )

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters from plain values.

        Raises:
            RequestError: a name is unknown or a value is out of range.
        """
        known = {f.name for f in fields(SamplingParams)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RequestError(f"unknown sampling field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return SamplingParams(**values)


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RequestStatus(Enum):
    """Where a request stands; the hand-over from prefill to decode is PREFILLING to DECODING."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimings:
    """When things happened to one output, in seconds; intervals are from arrival unless said otherwise.

    Attributes:
        arrival: monotonic clock at the call.
        queued: arrival to the first step that computed any of it; None if none did.
        ttft: arrival to the first token; None if none came.
        tpot: mean time per token after the first; None below two tokens.
        worst_gap: largest time between two tokens; None below two tokens.
        e2e: arrival to the end.
    """

    arrival: float
    queued: float | None
    ttft: float | None
    tpot: float | None
    worst_gap: float | None
    e2e: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Log-probability of one token under the raw logits, and its rank (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the `n` outputs of a request, whole or a delta (see `RequestOutput.is_delta`).

    Attributes:
        index: which of the `n` outputs.
        text: generated text.
        token_ids: generated ids, those of special tokens and of the stop included.
        logprobs: per token, id to `Logprob`; None unless asked for.
        finish_reason: None while it runs.
        stop_reason: the stop string or stop id that ended it; None for EOS and other ends.
        timings: None while it runs.
        slo_attained: whether the request's SLO was met; None without an SLO or while it runs.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timings: RequestTimings | None = None
    slo_attained: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a request has produced: everything (`generate`), or what is new since the last one (`stream`).

    Attributes:
        request_id: the id given at submit, or one made there.
        prompt: the prompt's text; None when token ids were given.
        prompt_token_ids: the prompt as the model saw it.
        outputs: one `CompletionOutput` per sample; in a delta only the samples that moved.
        prompt_logprobs: per prompt token, None for the first; None unless asked for.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        finished: no further output will come.
        is_delta: `outputs` holds only what is new.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[Mapping[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
    is_delta: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One running generation: one sample of one prompt. Once it is added it is written only under the scheduler's lock.

    Attributes:
        request_id: the user's name of the prompt; its samples share it.
        sample_index: which of the prompt's `n` samples; part of the random key.
        seed: the resolved seed.
        max_tokens: params.max_tokens, cut to what the model's context leaves; all of that for None.
        stop_token_ids: ids that end it: EOS ids unless ignored, and the params' own.
        cache_salt: it shares cached blocks with requests of the same one only.
        leader: the sample whose prefill this one waits for, to share its blocks; None for the first.
        urgency: rank among requests, smaller is sooner; also decides who is preempted.
        num_computed_tokens: tokens whose KV is known to be written (committed).
        num_scheduled_tokens: tokens whose KV is written once every launched step is done.
        num_freed_blocks: leading blocks that fell out of the sliding window.
        num_staged_blocks: blocks that the device's table already holds.
        num_published_blocks: leading blocks offered to the prefix cache.
        num_prompt_logprobs: prompt positions whose log-probabilities were passed on.
        num_tokens_to_find: prompt tokens that were in the prefix cache when it came.
        is_late: its TTFT target was out of reach before it was admitted, if it had been the next.
        features: bits of `SamplingFeature`.
        end_position: decode steps compute the positions before this one; the last token's KV is never needed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    sample_index: int = 0
    slo: SLO | None = None
    cache_salt: str | None = None
    leader: Request | None = None
    urgency: tuple[int, float, int] = (0, 0.0, 0)

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    slot: int | None = None
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_freed_blocks: int = 0
    num_staged_blocks: int = 0
    num_published_blocks: int = 0
    num_prompt_logprobs: int = 0
    features: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    worst_gap: float | None = None
    is_late: bool = False
    num_tokens_to_find: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    end_position: int = field(init=False)

    def __post_init__(self) -> None:
        self.end_position = len(self.prompt_token_ids) + self.max_tokens - 1

    @property
    def num_tokens(self) -> int:
        """Prompt and committed output tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def known_token_ids(self) -> tuple[int, ...]:
        """Prompt and committed output: what a prefill after an admission computes."""
        return (*self.prompt_token_ids, *self.output_token_ids) if self.output_token_ids else self.prompt_token_ids

    def token_ids_from(self, start: int) -> Sequence[int]:
        """The known tokens from position `start` on, without a copy of those before it if it is in the output."""
        num_prompt_tokens = len(self.prompt_token_ids)
        if start >= num_prompt_tokens:
            return self.output_token_ids[start - num_prompt_tokens :]
        return self.known_token_ids[start:]

    @property
    def num_prompt_logprobs_wanted(self) -> int | None:
        """How many log-probabilities to give with each prompt token; the first sample scores the prompt for all."""
        return self.params.prompt_logprobs if self.sample_index == 0 else None

    @property
    def is_finished(self) -> bool:
        """Whether it has ended for whatever reason."""
        return self.status is RequestStatus.FINISHED

    def timings(self, now: float) -> RequestTimings:
        """The request's intervals so far; `now` ends the end-to-end time."""
        num_gaps = len(self.output_token_ids) - 1
        tpot = None
        if num_gaps > 0 and self.first_token_time is not None and self.last_token_time is not None:
            tpot = (self.last_token_time - self.first_token_time) / num_gaps
        return RequestTimings(
            arrival=self.arrival_time,
            queued=None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time,
            ttft=None if self.first_token_time is None else self.first_token_time - self.arrival_time,
            tpot=tpot,
            worst_gap=self.worst_gap,
            e2e=now - self.arrival_time,
        )

    def is_slo_attained(self, now: float) -> bool | None:
        """Whether its targets are met by the times so far; None without an SLO."""
        if self.slo is None:
            return None
        timings = self.timings(now)
        return self.slo.is_attained(ttft=timings.ttft, tpot=timings.tpot, worst_gap=timings.worst_gap)

    def check(self, num_launched_steps: int) -> None:
        """Assert the order of the counters, with that many uncommitted steps holding the request."""
        assert 0 <= self.num_computed_tokens <= self.num_scheduled_tokens
        assert self.num_scheduled_tokens <= self.num_tokens + num_launched_steps


def _strings(name: str, values: Iterable[str] | None) -> tuple[str, ...]:
    strings = _tuple(name, values, "strings")
    if isinstance(values, str) or not all(isinstance(v, str) and v for v in strings):
        raise RequestError(f"{name} is {values!r}; expected non-empty strings")
    return strings


def _token_ids(name: str, values: Iterable[int] | None) -> tuple[int, ...]:
    token_ids = _tuple(name, values, "token ids")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in token_ids):
        raise RequestError(f"{name} is {values!r}; expected token ids (integers from 0)")
    return token_ids


def _tuple(name: str, values: Iterable[T] | None, what: str) -> tuple[T, ...]:
    if values is None:  # dicts from JSON have nulls
        return ()
    if not isinstance(values, Iterable):
        raise RequestError(f"{name} is {values!r}; expected a sequence of {what}")
    return tuple(values)  # before any check: an iterator can be read once


def _bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}; expected a mapping of token id to number")
    _token_ids("logit_bias", tuple(bias))
    for token_id, value in bias.items():
        _require_float(f"logit_bias[{token_id}]", value, -100.0, 100.0)
    return dict(bias)


def _require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"from {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(f"{name} is {value!r}; expected an integer {bound}")


def _require_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # abs instead of math.isfinite, which fails for integers above the range of floats
    is_number = is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    if not is_number or value < low or value > high or (low_open and value == low):  # type: ignore[operator]
        bound = f"{'above' if low_open else 'from'} {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        raise RequestError(f"{name} is {value!r}; expected a finite number {bound}")

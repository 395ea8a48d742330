"""An engine without a model: the real core, lanes and delivery around the integer oracle and a tokenizer of letters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from semipd.config import EngineConfig, Phase
from semipd.core import EngineCore, RequestLimits
from semipd.device.partition import Completion, Stream
from semipd.engine import Engine
from semipd.errors import RequestError
from semipd.latency_store import LatencyStore
from semipd.memory.block_allocator import BlockAllocator
from semipd.model.graphs import GraphKey
from semipd.sched.batch import Batch, SamplingFeature, StepResult, TokenLogprobs
from semipd.sched.latency import LatencyModel
from tests.sched.oracle import VOCAB, OraclePool, expected_output

ALPHABET = "".join(chr(33 + index) for index in range(VOCAB - 3)) + " \né"


def expected_text(prompt: str, num_tokens: int) -> str:
    """What the oracle writes after `prompt`."""
    tokenizer = LetterTokenizer()
    return tokenizer.decode(expected_output(tokenizer.encode(prompt), num_tokens))


class LetterDetokenizer:
    """One letter a token, nothing held back."""

    def push(self, token_id: int) -> str:
        return ALPHABET[token_id]

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    """One token a letter."""

    vocab_size = VOCAB
    bos_token_id = None
    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(ALPHABET[token_id] for token_id in token_ids)

    def token_text(self, token_id: int) -> str:
        return ALPHABET[token_id]

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> LetterDetokenizer:
        return LetterDetokenizer()

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self.encode(word)) for word in words)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        return "".join(str(message["content"]) for message in messages)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        return self.encode(self.render_chat(messages))


class Done:
    """A completion that has its result, or its error, from the start."""

    def __init__(self, run: Callable[[], StepResult]) -> None:
        self._run = run

    def is_done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        return self._run()


class FakeBackend:
    """Two cores that can be split in one way; gives out no streams."""

    num_sms = 2
    splits = ((1, 1),)
    default_split = (1, 1)

    def __init__(self) -> None:
        self.is_closed = False

    def stream(self, phase: Phase, num_sms: int) -> Stream:
        raise AssertionError("the oracle needs no stream")

    def close(self) -> None:
        self.is_closed = True


class EagerGraphs:
    """No graphs: every step launches its kernels."""

    def run(self, key: GraphKey, launch: Callable[[], None]) -> bool:
        launch()
        return True

    def request(self, key: GraphKey, launch: Callable[[], None], *, is_urgent: bool = True) -> None:
        pass

    def reserve(self, num_graphs: int, num_kernels: int) -> None:
        pass

    def wait_until_captured(self) -> None:
        pass

    def captured(self, phase: Phase, num_sms: int) -> Sequence[Hashable]:
        return ()

    def close(self) -> None:
        pass


def score(token: int, num_top: int) -> TokenLogprobs:
    """Made-up log-probabilities: `token` is the first to third most likely one, and each rank costs 1."""
    rank = token % 3 + 1
    top = tuple((token + index + 1 - rank) % VOCAB for index in range(num_top))
    return TokenLogprobs(-float(rank), rank, top, tuple(-float(index + 1) for index in range(num_top)))


class OracleExecutor:
    """Runs steps on the oracle pool in the lane's own thread.

    Args:
        pool: the device's state.
        step_seconds: how long a step takes.
        fail_at: raise inside the step of this id.

    No step ends while `gate` is cleared.
    """

    def __init__(self, pool: OraclePool, *, step_seconds: float = 0.0, fail_at: int | None = None) -> None:
        self._pool = pool
        self._step_seconds = step_seconds
        self._fail_at = fail_at
        self._lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def execute(self, batch: Batch) -> Completion[StepResult]:
        if batch.step_id == self._fail_at:
            raise RuntimeError("planted failure")
        with self._lock:
            tokens = self._pool.run(batch)

        def finish() -> StepResult:
            self.gate.wait()
            if self._step_seconds:
                time.sleep(self._step_seconds)
            return StepResult(
                tokens,
                time.monotonic(),
                self._step_seconds,
                logprobs=self._logprobs(batch, tokens),
                prompt_logprobs=self._prompt_logprobs(batch),
            )

        return Done(finish)

    @staticmethod
    def _logprobs(batch: Batch, tokens: Sequence[int]) -> dict[int, TokenLogprobs] | None:
        if not batch.features & SamplingFeature.LOGPROBS:
            return None
        return {row: score(token, batch.num_logprobs) for row, token in enumerate(tokens)}

    @staticmethod
    def _prompt_logprobs(batch: Batch) -> dict[int, tuple[TokenLogprobs, ...]] | None:
        scores = {}
        for index, entry in enumerate(batch.prefill):
            if (num_top := entry.num_prompt_logprobs) is not None:
                following = () if entry.next_token_id is None else (entry.next_token_id,)
                scores[index] = tuple(score(token, num_top) for token in (*entry.token_ids[1:], *following))
        return scores or None


def make_engine(
    *,
    num_blocks: int = 256,
    block_size: int = 4,
    max_model_len: int = 200,
    step_seconds: float = 0.0,
    fail_at: int | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
    executor: OracleExecutor | None = None,
    tokenizer: LetterTokenizer | None = None,
    clock: Callable[[], float] = time.monotonic,
    latency: LatencyModel | None = None,
    latency_store: LatencyStore | None = None,
    **options: Any,
) -> Engine:
    """An engine that serves the oracle; a pool of an `executor` given must have `num_blocks` of `block_size`."""
    if executor is None:
        executor = OracleExecutor(OraclePool(num_blocks, block_size), step_seconds=step_seconds, fail_at=fail_at)
    config = EngineConfig(
        model="oracle", block_size=block_size, max_num_seqs=options.pop("max_num_seqs", 16), **options
    )
    core = EngineCore(
        config=config,
        limits=RequestLimits(vocab_size=VOCAB, max_model_len=max_model_len, eos_token_ids=eos_token_ids),
        executor=executor,
        backend=FakeBackend(),
        allocator=BlockAllocator(num_blocks, block_size, enable_prefix_caching=config.enable_prefix_caching),
        max_prefill_tokens=16,
        clock=clock,
        latency=latency,
        latency_store=latency_store,
    )
    return Engine.from_core(core, tokenizer or LetterTokenizer())


# Of a step whose request must not end before it is left: 190 of them take two seconds.
SLOW = 0.01


def make_executor(**options: Any) -> OracleExecutor:
    """An executor for `make_engine` as it comes, to hold its gate."""
    return OracleExecutor(OraclePool(256, 4), **options)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what other threads do soon and nobody can be woken for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.001)


def wait_until_idle(engine: Engine) -> None:
    """Wait until no request waits or runs, and check that nothing is held."""
    wait_until(lambda: engine.statistics().num_waiting == 0 and not any(engine.statistics().num_running.values()))
    engine.check_integrity()
    wait_until(lambda: engine.statistics().kv_cache_usage == 0.0)

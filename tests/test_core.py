"""The engine's core by itself: what it refuses, how it names and seeds requests, how it ends."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from typing import Any

import pytest

from semipd import SLO, EngineClosed, EngineDead, FinishReason, PromptTooLong, QueueFull, RequestError, SamplingParams
from semipd.config import EngineConfig, ExclusivePolicy, StaticPolicy
from semipd.core import EngineCore, EngineEnd, RequestLimits
from semipd.errors import ConfigError
from semipd.memory.block_allocator import BlockAllocator
from semipd.sched.events import StepEvents
from tests.fakes import FakeBackend, OracleExecutor, make_executor
from tests.sched.oracle import VOCAB, expected_output

PARAMS = SamplingParams(temperature=0.0, max_tokens=4)


def make_core(
    *, executor: OracleExecutor | None = None, backend: FakeBackend | None = None, **options: Any
) -> EngineCore:
    options.setdefault("max_num_seqs", 4)
    config = EngineConfig(model="oracle", block_size=4, **options)
    return EngineCore(
        config=config,
        limits=RequestLimits(vocab_size=VOCAB, max_model_len=20, eos_token_ids=frozenset({7})),
        executor=executor or make_executor(),
        backend=backend or FakeBackend(),
        allocator=BlockAllocator(256, 4),
        max_prefill_tokens=16,
    )


def events_until_end(core: EngineCore) -> tuple[list[StepEvents], EngineEnd]:
    events = []
    while not isinstance(item := core.outbox.get(timeout=30), EngineEnd):
        assert isinstance(item, StepEvents)
        events.append(item)
    return events, item


# ---- what is asked for


def test_a_prompt_must_leave_room_for_a_token() -> None:
    core = make_core()
    assert core.make_requests([1] * 19, PARAMS)[0].max_tokens == 1
    with pytest.raises(PromptTooLong, match="the prompt has 20 tokens and max_model_len is 20, .*; shorten the prompt"):
        core.make_requests([1] * 20, PARAMS)


def test_max_tokens_is_cut_to_the_room_and_min_tokens_is_not() -> None:
    core = make_core()
    assert core.make_requests([1] * 15, SamplingParams(max_tokens=9))[0].max_tokens == 5
    with pytest.raises(PromptTooLong, match="min_tokens is 6, but a prompt of 15 tokens leaves 5 of max_model_len 20"):
        core.make_requests([1] * 15, SamplingParams(max_tokens=9, min_tokens=6))


def test_without_max_tokens_a_request_has_what_the_context_leaves() -> None:
    core = make_core()
    assert core.make_requests([1] * 15, SamplingParams(max_tokens=None))[0].max_tokens == 5
    assert core.make_requests([1] * 15, SamplingParams(max_tokens=None, min_tokens=5))[0].max_tokens == 5
    with pytest.raises(PromptTooLong, match="min_tokens is 6, but a prompt of 15 tokens leaves 5 of max_model_len 20"):
        core.make_requests([1] * 15, SamplingParams(max_tokens=None, min_tokens=6))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ([1, VOCAB], {}, "the prompt holds 97; expected token ids from 0 to 96"),
        ([1, -1], {}, "the prompt holds -1; expected token ids from 0 to 96"),
        ([1, "a"], {}, "the prompt holds 'a'; expected token ids from 0 to 96"),
        ([True], {}, "the prompt holds True; expected token ids"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids holds 97; expected token ids from 0 to 96"),
        ([1], {"allowed_token_ids": [200]}, "allowed_token_ids holds 200; expected token ids from 0 to 96"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias holds 97; expected token ids from 0 to 96"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prompt: list[int], params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_core().make_requests(prompt, SamplingParams(**params))


@pytest.mark.parametrize("bad_word_ids", [((VOCAB,),), ((3,), (4, VOCAB)), ((VOCAB, 4),)])
def test_bad_words_outside_the_vocabulary_are_refused(bad_word_ids: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(RequestError, match="bad_words, as encoded, holds 97; expected token ids from 0 to 96"):
        make_core().make_requests([1], PARAMS, bad_word_ids=bad_word_ids)


def test_samples_share_a_name_a_seed_and_a_leader() -> None:
    requests = make_core().make_requests([1, 2], SamplingParams(n=3), request_id="mine", slo=SLO(ttft=1.0))
    assert [request.sample_index for request in requests] == [0, 1, 2]
    assert [request.leader for request in requests] == [None, requests[0], requests[0]]
    assert {request.request_id for request in requests} == {"mine"}
    assert len({request.seed for request in requests}) == 1
    assert {request.slo for request in requests} == {SLO(ttft=1.0)}


def test_names_and_seeds_are_made_up_when_none_are_given() -> None:
    names, seeds = set(), set()
    core = make_core(slo=SLO(tpot=1.0))
    for _ in range(100):
        (request,) = core.make_requests([1], PARAMS)
        names.add(request.request_id)
        seeds.add(request.seed)
        assert request.slo == SLO(tpot=1.0)
    assert len(names) == len(seeds) == 100
    assert core.make_requests([1], SamplingParams(seed=5))[0].seed == 5


def test_seeds_follow_the_engine_s_seed() -> None:
    def seeds(seed: int) -> list[int]:
        core = make_core(seed=seed)
        return [core.make_requests([1], PARAMS)[0].seed for _ in range(5)]

    assert seeds(3) == seeds(3) != seeds(4)


def test_stop_ids_are_the_model_s_and_the_request_s() -> None:
    core = make_core()
    assert core.make_requests([1], SamplingParams(stop_token_ids=[3]))[0].stop_token_ids == {3, 7}
    assert core.make_requests([1], SamplingParams(stop_token_ids=[3], ignore_eos=True))[0].stop_token_ids == {3}


def test_a_split_that_the_device_does_not_offer_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"the split \(prefill, decode\) is \(3, 4\); this device of 2 offers \(1, 1\)"
    ):
        make_core(policy=StaticPolicy(prefill_sms=3, decode_sms=4))
    make_core(policy=StaticPolicy(prefill_sms=1, decode_sms=1))


# ---- from start to end


@pytest.mark.parametrize("policy", [StaticPolicy(), ExclusivePolicy()])
def test_requests_go_in_and_events_come_out(policy: StaticPolicy | ExclusivePolicy) -> None:
    core = make_core(policy=policy)
    requests = core.make_requests([1, 2, 3], PARAMS)
    core.start()
    core.submit(requests)
    tokens: list[int] = []
    while not requests[0].is_finished or len(tokens) < 4:
        item = core.outbox.get(timeout=30)
        assert isinstance(item, StepEvents)
        tokens += item.token_ids
    assert tokens == expected_output([1, 2, 3], 4)
    core.close()
    core.check_integrity()
    assert core.statistics().num_finished[FinishReason.LENGTH] == 1


def test_a_queue_has_a_bound() -> None:
    core = make_core(max_queued_requests=2)
    core.submit(core.make_requests([1], SamplingParams(n=2)))
    with pytest.raises(QueueFull):
        core.submit(core.make_requests([1], PARAMS))
    with pytest.raises(RequestError, match="n is 3, above max_queued_requests 2; lower n or raise the bound"):
        core.submit(core.make_requests([1], SamplingParams(n=3)))
    core.close()


def test_a_request_may_be_finished_before_and_after_its_time() -> None:
    core = make_core()
    waiting, never = (core.make_requests([1], PARAMS)[0] for _ in range(2))
    core.submit([waiting])
    for request in (waiting, never, waiting):
        core.finish(request, FinishReason.ABORT)
    assert waiting.finish_reason is never.finish_reason is FinishReason.ABORT
    assert core.statistics().num_finished[FinishReason.ABORT] == 2
    core.check_integrity()
    core.close()


def test_close_ends_the_lanes_the_backend_and_the_outbox() -> None:
    backend = FakeBackend()
    core = make_core(backend=backend)
    core.start()
    core.close()
    core.close()
    assert core.is_ended
    assert backend.is_closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("semipd-")]
    events, end = events_until_end(core)
    assert events == []
    assert isinstance(end.error, EngineClosed)
    with pytest.raises(queue.Empty):
        core.outbox.get_nowait()
    with pytest.raises(EngineClosed, match="the engine was closed; make a new one"):
        core.submit(core.make_requests([1], PARAMS))


def test_a_core_that_never_started_can_be_closed() -> None:
    backend = FakeBackend()
    core = make_core(backend=backend)
    core.close()
    assert backend.is_closed


def test_the_first_failure_is_the_cause() -> None:
    core = make_core()
    core.start()
    first = RuntimeError("first")
    core.fail(first)
    core.fail(RuntimeError("second"))
    core.close()
    events, end = events_until_end(core)
    errors = [end.make_error() for _ in range(2)]
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, EngineDead)
        assert str(error) == "the engine failed with RuntimeError: first; make a new engine"
        assert error.__cause__ is first
    with pytest.raises(EngineDead):
        core.raise_if_ended()


@pytest.mark.parametrize("fail_at", [None, 0])
def test_a_closed_core_lets_go_of_its_executor(fail_at: int | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")  # a log record would keep the frames of the failure
    executor = make_executor(fail_at=fail_at)
    weak = weakref.ref(executor)
    core = make_core(executor=executor)
    del executor
    core.start()
    core.submit(core.make_requests([1], PARAMS))
    if fail_at is not None:
        _, end = events_until_end(core)
        assert end.error.__cause__ is not None
    core.close()
    gc.collect()
    assert weak() is None

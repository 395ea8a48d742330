"""The synchronous engine, without a model: results, streams, queueing, aborts, callbacks."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from semipd import SLO, Engine, EngineClosed, FinishReason, QueueFull, RequestError, RequestOutput, SamplingParams
from tests.fakes import (
    SLOW,
    LetterTokenizer,
    OracleExecutor,
    expected_text,
    make_engine,
    make_executor,
    wait_until,
    wait_until_idle,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=190)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine
        wait_until_idle(engine)


@pytest.fixture
def executor() -> OracleExecutor:
    return make_executor()


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    prompts = [letter * (1 + 7 * index) for index, letter in enumerate("abcdefgh")]
    outputs = engine.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    assert [output.outputs[0].text for output in outputs] == [expected_text(prompt, 12) for prompt in prompts]
    for output in outputs:
        assert output.finished
        assert not output.is_delta
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
        assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)


def test_text_and_token_ids_are_the_same_prompt(engine: Engine) -> None:
    token_ids = engine.tokenizer.encode("hello")
    forms: list[Any] = ["hello", ["hello"], token_ids, tuple(token_ids), np.array(token_ids), [token_ids]]
    for index, prompt in enumerate(forms):
        (output,) = engine.generate(prompt, GREEDY)
        assert output.outputs[0].text == expected_text("hello", 12)
        assert output.prompt_token_ids == tuple(token_ids)
        assert output.prompt == ("hello" if index < 2 else None)


def test_no_prompts_give_no_outputs(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert engine.generate(()) == []


def test_each_prompt_may_have_its_own_params(engine: Engine) -> None:
    outputs = engine.generate(["a", "b"], [GREEDY, {"temperature": 0.0, "max_tokens": 3}])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 3]


@pytest.mark.parametrize("bad", [[], [1, 96, 97], "x" * 200, None])
def test_a_prompt_that_cannot_be_served_leaves_nothing_running(bad: Any) -> None:
    executor = make_executor()
    executor.gate.clear()
    with make_engine(executor=executor) as engine:
        with pytest.raises(RequestError):
            engine.generate(["a", "b", bad, "d", "e"], ENDLESS)
        wait_until(lambda: engine.statistics().num_finished[FinishReason.ABORT] == 2)
        executor.gate.set()
        wait_until_idle(engine)
        assert engine.statistics().num_finished[FinishReason.LENGTH] == 0


def test_deltas_join_to_the_result(engine: Engine) -> None:
    with engine.stream("hello", GREEDY) as stream:
        deltas = list(stream)
    result = stream.result()
    assert "".join(delta.outputs[0].text for delta in deltas) == result.outputs[0].text == expected_text("hello", 12)
    assert tuple(i for delta in deltas for i in delta.outputs[0].token_ids) == result.outputs[0].token_ids
    assert all(delta.is_delta for delta in deltas)
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason is FinishReason.LENGTH
    assert list(stream) == []
    assert stream.poll() is None
    assert stream.result() == result


def test_the_samples_of_a_prompt_share_one_stream(engine: Engine) -> None:
    params = SamplingParams(n=3, max_tokens=7)
    with engine.stream("hello there, you", params) as stream:
        texts = ["", "", ""]
        for delta in stream:
            for output in delta.outputs:
                texts[output.index] += output.text
            finished = delta.finished
    assert finished
    result = stream.result()
    assert texts == [output.text for output in result.outputs] == [expected_text("hello there, you", 7)] * 3
    assert [output.index for output in result.outputs] == [0, 1, 2]


def test_many_threads_may_wait_for_one_result(executor: OracleExecutor) -> None:
    executor.gate.clear()
    with make_engine(executor=executor) as engine, ThreadPoolExecutor(4) as pool:
        stream = engine.stream("hello", GREEDY)
        results = [pool.submit(stream.result) for _ in range(4)]
        executor.gate.set()
        assert {result.result(30).outputs[0].text for result in results} == {expected_text("hello", 12)}


def test_threads_that_share_a_stream_share_its_deltas(engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            stream = engine.stream("hello", ENDLESS)
            parts = [pool.submit(lambda stream: list(stream), stream) for _ in range(3)]
            assert len(stream.result(30).outputs[0].text) == 190
            taken = [i for part in parts for delta in part.result(30) for i in delta.outputs[0].token_ids]
            assert len(taken) <= 190
            assert stream.result().outputs[0].text == expected_text("hello", 190)


def test_a_result_that_takes_too_long_goes_on(executor: OracleExecutor) -> None:
    executor.gate.clear()
    with make_engine(executor=executor) as engine:
        stream = engine.stream("hello", GREEDY)
        for timeout in (0.0, 0.001):
            with pytest.raises(TimeoutError, match="request semipd-0 did not end within .* s; wait longer or abort it"):
                stream.result(timeout)
        executor.gate.set()
        assert stream.result(30).outputs[0].text == expected_text("hello", 12)


def test_leaving_the_block_aborts() -> None:
    with make_engine(step_seconds=SLOW) as engine:
        with engine.stream("hello", ENDLESS) as stream:
            next(iter(stream))
        output = stream.result(30).outputs[0]
        assert output.finish_reason is FinishReason.ABORT
        assert output.text == expected_text("hello", len(output.token_ids))
        wait_until_idle(engine)


def test_a_dropped_stream_aborts() -> None:
    with make_engine(step_seconds=SLOW) as engine:
        engine.submit("hello", ENDLESS)
        for _ in engine.stream("hello", ENDLESS):
            break
        wait_until_idle(engine)
        assert engine.statistics().num_finished[FinishReason.ABORT] == 2


def test_smaller_priorities_run_first(executor: OracleExecutor) -> None:
    executor.gate.clear()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    with make_engine(executor=executor, max_num_seqs=1) as engine:
        streams = []
        for name, priority in (("first", 9), ("low", 5), ("high", -1), ("middle", 0)):
            stream = engine.stream("a", {"temperature": 0.0, "priority": priority}, request_id=name)
            stream.call_when_ended(partial(ended.put, name))
            streams.append(stream)
            if name == "first":
                wait_until(lambda: engine.statistics().num_waiting == 0)
        executor.gate.set()
        assert [ended.get(timeout=30) for _ in streams] == ["first", "high", "middle", "low"]


def test_a_full_queue_raises_unless_asked_to_wait(executor: OracleExecutor) -> None:
    executor.gate.clear()
    with make_engine(executor=executor, max_num_seqs=1, max_queued_requests=2) as engine:
        running = engine.stream("a", GREEDY)
        wait_until(lambda: engine.statistics().num_waiting == 0)
        waiting = [engine.stream("b", GREEDY, request_id=name) for name in "xy"]
        with pytest.raises(QueueFull, match="2 requests wait and max_queued_requests is 2; retry later") as caught:
            engine.stream("c", GREEDY, request_id="z")
        with pytest.raises(RequestError, match="n is 3, above max_queued_requests 2"):
            engine.stream("c", {"n": 3}, wait=True)
        assert not engine.abort("z")
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(engine.stream, "c", GREEDY, request_id="z", wait=True)
            wait_until(lambda: engine.abort("z"))
            assert patient.result(30).result(30).outputs[0].finish_reason is FinishReason.ABORT
            patient = pool.submit(engine.stream, "c", GREEDY, request_id="z", wait=True)
            executor.gate.set()
            assert patient.result(30).result(30).outputs[0].text == expected_text("c", 12)
        assert [stream.result(30).finished for stream in (running, *waiting)] == [True] * 3
        del caught  # whose traceback held the refused stream, which did not keep its name
        wait_until_idle(engine)
        assert not engine._delivery._decodings
        assert engine.statistics().num_finished == {
            FinishReason.STOP: 0,
            FinishReason.LENGTH: 4,
            FinishReason.ABORT: 1,
        }


@pytest.fixture
def crowded(executor: OracleExecutor) -> Iterator[Engine]:
    """An engine that computes nothing yet: "running" has the only slot, "x" and "y" are all that the queue holds."""
    executor.gate.clear()
    with make_engine(executor=executor, max_num_seqs=1, max_queued_requests=2) as engine:
        streams = [engine.stream("a", GREEDY, request_id="running")]
        wait_until(lambda: engine.statistics().num_waiting == 0)
        streams += [engine.stream("b", GREEDY, request_id=name) for name in "xy"]
        yield engine
        executor.gate.set()
        del streams
        wait_until(lambda: not engine._delivery._decodings)
        assert not engine._delivery._backlog
        engine.check_integrity()


def abort_and_wait(engine: Engine, request_id: str, *, num_waiting: int) -> None:
    assert engine.abort(request_id)
    wait_until(lambda: engine.statistics().num_waiting == num_waiting)


def test_newcomers_go_behind_those_that_wait_for_space(crowded: Engine, executor: OracleExecutor) -> None:
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    pair = crowded.agenerate("c", {"n": 2, "max_tokens": 12}, request_id="pair", wait=True)
    abort_and_wait(crowded, "x", num_waiting=1)
    with pytest.raises(QueueFull, match="other requests wait for space .* max_queued_requests is 2; retry later"):
        crowded.stream("d", GREEDY)
    with pytest.raises(RequestError, match="n is 3, above max_queued_requests 2"):
        crowded.agenerate("d", {"n": 3}, wait=True)
    late = [crowded.agenerate("d", GREEDY, request_id=name, wait=True) for name in ("late", "later")]
    assert crowded.statistics().num_waiting == 1
    for stream in (pair, *late):
        stream.call_when_ended(partial(ended.put, stream.request_id))
    abort_and_wait(crowded, "y", num_waiting=2)
    executor.gate.set()
    assert [ended.get(timeout=30) for _ in range(3)] == ["pair", "late", "later"]
    assert [output.text for output in pair.final().outputs] == [expected_text("c", 12)] * 2
    crowded.stream("d", GREEDY).result(30)


def test_many_that_wait_for_space_are_served_in_their_order() -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    with make_engine(max_num_seqs=1, max_queued_requests=2, step_seconds=1e-4) as engine:
        streams = []
        for index in range(60):
            streams.append(engine.agenerate("a", {"n": index % 2 + 1, "max_tokens": 2}, wait=True))
            streams[-1].call_when_ended(partial(ended.put, index))
        assert [ended.get(timeout=30) for _ in streams] == list(range(60))
        wait_until_idle(engine)


def leave_by_abort(engine: Engine) -> None:
    stream = engine.agenerate("c", {"n": 2}, wait=True)
    assert stream.abort()


def leave_by_drop(engine: Engine) -> None:
    engine.agenerate("c", {"n": 2}, wait=True)


@pytest.mark.parametrize("leave", [leave_by_abort, leave_by_drop])
def test_whoever_waits_for_space_and_leaves_keeps_nobody_out(crowded: Engine, leave: Callable[[Engine], None]) -> None:
    abort_and_wait(crowded, "x", num_waiting=1)
    stays = crowded.agenerate("c", {"n": 2}, request_id="stays", wait=True)
    leave(crowded)
    wait_until(lambda: len(crowded._delivery._backlog) == 1)
    with pytest.raises(QueueFull):
        crowded.stream("d", GREEDY)
    stays.abort()
    wait_until(lambda: not crowded._delivery._backlog)
    crowded.stream("d", GREEDY, request_id="d")
    with pytest.raises(QueueFull, match="2 requests wait"):
        crowded.stream("d", GREEDY)


def test_an_engine_that_closes_leaves_nobody_waiting_for_space(crowded: Engine, executor: OracleExecutor) -> None:
    streams = [crowded.agenerate("c", GREEDY, wait=True) for _ in range(3)]
    executor.gate.set()
    crowded.close()
    assert all(stream.is_ended for stream in streams) and not crowded._delivery._backlog
    with pytest.raises(EngineClosed):
        crowded.agenerate("c", GREEDY, wait=True)


def test_generate_takes_more_prompts_than_the_queue_holds() -> None:
    with make_engine(max_num_seqs=2, max_queued_requests=1) as engine:
        outputs = engine.generate(["abc"] * 50, GREEDY)
        assert {output.outputs[0].text for output in outputs} == {expected_text("abc", 12)}
        wait_until_idle(engine)


def test_a_request_id_is_unique_while_it_is_live(executor: OracleExecutor) -> None:
    executor.gate.clear()
    with make_engine(executor=executor) as engine:
        stream = engine.stream("a", GREEDY, request_id="mine")
        with pytest.raises(RequestError, match="request_id 'mine' is live already; give another, or none"):
            engine.stream("b", GREEDY, request_id="mine")
        executor.gate.set()
        assert stream.result(30).request_id == "mine"
        assert engine.stream("b", GREEDY, request_id="mine").result(30).outputs[0].text == expected_text("b", 12)


def test_a_request_can_be_aborted_by_its_id_from_any_thread() -> None:
    with make_engine(step_seconds=SLOW) as engine, ThreadPoolExecutor(1) as pool:
        stream = engine.stream("a", ENDLESS, request_id="mine")
        assert pool.submit(engine.abort, "mine").result(30)
        result = stream.result(30)
        assert result.finished
        assert result.outputs[0].finish_reason is FinishReason.ABORT
        assert not engine.abort("mine")
        assert not engine.abort("nobody")


def test_conversations_go_through_the_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
    (one,) = engine.chat(messages, GREEDY)
    assert one.outputs[0].text == expected_text("hiyou", 12)
    both = engine.chat([messages, messages[:1]], GREEDY)
    assert [output.outputs[0].text for output in both] == [expected_text("hiyou", 12), expected_text("hi", 12)]
    assert engine.apply_chat_template(messages) == engine.tokenizer.encode("hiyou")
    assert engine.chat([], GREEDY) == []


def test_the_progress_bar_goes_to_stderr(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    engine.generate(["a"] * 3, GREEDY)
    assert capfd.readouterr() == ("", "")
    engine.generate(["a"] * 3, GREEDY, show_progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err


def test_a_callback_comes_once_for_each_time_it_is_armed(engine: Engine) -> None:
    calls: queue.SimpleQueue[None] = queue.SimpleQueue()

    def on_ready() -> None:
        calls.put(None)

    stream = engine.submit("hello", ENDLESS, on_ready=on_ready)
    text, is_finished = "", False
    while not is_finished:
        calls.get(timeout=30)
        delta = stream.poll()
        assert delta is not None
        text += delta.outputs[0].text
        is_finished = delta.finished
        assert calls.empty()
        if not stream.call_when_ready(on_ready):
            on_ready()
    assert text == expected_text("hello", 190)


def test_a_callback_that_is_ready_at_once_is_not_called_again(engine: Engine) -> None:
    stream = engine.stream("hello", GREEDY)
    stream.result(30)
    assert not stream.call_when_ended(lambda: pytest.fail("called"))
    assert not stream.call_when_ready(lambda: pytest.fail("called"))
    stream.wake()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_callback_that_raises_hurts_nobody(
    executor: OracleExecutor, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("planted")

    executor.gate.clear()
    with make_engine(executor=executor) as engine:
        stream = engine.submit("hello", GREEDY, on_ready=fail)
        executor.gate.set()
        assert stream.result(30).outputs[0].text == expected_text("hello", 12)
        assert "the callback of request semipd-0 failed" in caplog.text
        assert engine.generate("hello", GREEDY)[0].finished


def test_one_reader_who_never_reads_stalls_nobody(engine: Engine) -> None:
    silent = engine.stream("silent", ENDLESS)
    assert engine.generate("hello", ENDLESS)[0].outputs[0].text == expected_text("hello", 190)
    assert silent.result(30).outputs[0].text == expected_text("silent", 190)


def test_targets_are_judged_per_request() -> None:
    with make_engine(slo=SLO(ttft=1e-9)) as engine:
        assert engine.generate("a", GREEDY)[0].outputs[0].slo_attained is False
        assert engine.generate("a", GREEDY, slo=SLO(ttft=100.0))[0].outputs[0].slo_attained is True
        with pytest.raises(RequestError, match="slo is 5; expected an SLO"):
            engine.generate("a", GREEDY, slo=5)  # type: ignore[arg-type]
        wait_until_idle(engine)


def test_cached_prompt_tokens_are_reported(engine: Engine) -> None:
    assert engine.generate("a" * 10, GREEDY)[0].num_cached_tokens == 0
    assert engine.generate("a" * 10, GREEDY)[0].num_cached_tokens == 8


def test_prompts_share_blocks_only_under_one_salt(engine: Engine) -> None:
    def num_cached(cache_salt: str | None) -> int:
        (output,) = engine.generate("a" * 10, GREEDY, cache_salt=cache_salt)
        assert output.outputs[0].text == expected_text("a" * 10, 12)
        return output.num_cached_tokens

    salts = [None, "tenant a", "tenant b"]
    assert [num_cached(salt) for salt in salts] == [0, 0, 0]
    assert [num_cached(salt) for salt in salts] == [8, 8, 8]


def test_every_call_takes_a_salt(engine: Engine) -> None:
    prompt, messages = "a" * 10, [{"role": "user", "content": "a" * 10}]
    calls: list[Callable[..., RequestOutput]] = [
        lambda **options: engine.generate(prompt, GREEDY, **options)[0],
        lambda **options: engine.chat(messages, GREEDY, **options)[0],
        lambda **options: engine.stream(prompt, GREEDY, **options).result(30),
        lambda **options: engine.submit(prompt, GREEDY, **options).result(30),
    ]
    for index, call in enumerate(calls):
        assert [call(cache_salt=f"tenant {index}").num_cached_tokens for _ in range(2)] == [0, 8]
        with pytest.raises(RequestError, match="cache_salt is ''; expected a string that is not empty, or None"):
            call(cache_salt="")


def test_a_reset_prefix_cache_is_empty_and_leaves_running_requests_alone(engine: Engine) -> None:
    running = engine.stream("a" * 10, ENDLESS)
    next(iter(running))
    engine.reset_prefix_cache()
    assert engine.generate("a" * 10, GREEDY)[0].num_cached_tokens == 0
    assert engine.generate("a" * 10, GREEDY)[0].num_cached_tokens == 8
    assert running.result(30).outputs[0].text == expected_text("a" * 10, 190)
    wait_until_idle(engine)
    engine.reset_prefix_cache()
    assert engine.statistics().num_cached_blocks == 0
    engine.check_integrity()


def test_without_max_tokens_a_request_fills_the_context(engine: Engine) -> None:
    (output,) = engine.generate("hello", {"temperature": 0.0, "max_tokens": None, "stop": None})
    assert output.outputs[0].text == expected_text("hello", 195)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_bad_words_are_encoded(engine: Engine) -> None:
    stream = engine.stream("a", {"temperature": 0.0, "bad_words": ["no", "x"]})
    assert stream.requests[0].bad_word_ids == LetterTokenizer().encode_bad_words(["no", "x"])

"""What readers see of tokens: stop strings and ids, log-probabilities, ends; and the order of things in a stream."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from semipd import Engine, EngineClosed, FinishReason, Logprob, RequestOutput, SamplingParams
from semipd.core import EngineEnd
from semipd.streams import RequestStream
from tests.fakes import (
    ALPHABET,
    SLOW,
    LetterDetokenizer,
    LetterTokenizer,
    expected_text,
    make_engine,
    make_executor,
    score,
    wait_until,
    wait_until_idle,
)
from tests.sched.oracle import expected_output

TEXT = expected_text("hello", 40)
TOKENS = expected_output(LetterTokenizer().encode("hello"), 40)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine
        wait_until_idle(engine)


def result(engine: Engine, **params: Any) -> RequestOutput:
    """Of "hello", greedily; what was streamed is what is given at the end."""
    with engine.stream("hello", {"temperature": 0.0, "max_tokens": 40, **params}) as stream:
        deltas = list(stream)
    output = stream.result()
    assert "".join(delta.outputs[0].text for delta in deltas) == output.outputs[0].text
    assert sum((delta.outputs[0].token_ids for delta in deltas), ()) == output.outputs[0].token_ids
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return output


# ---- stops


class HoldingTokenizer(LetterTokenizer):
    """Shows a letter when the next one comes, as at the border of a character of several tokens."""

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> LetterDetokenizer:
        class Holding(LetterDetokenizer):
            held = ""

            def push(self, token_id: int) -> str:
                shown, self.held = self.held, ALPHABET[token_id]
                return shown

            def flush(self) -> str:
                return self.held

        return Holding()


def test_what_the_detokeniser_holds_back_is_given_at_the_end() -> None:
    with make_engine(tokenizer=HoldingTokenizer()) as engine:
        assert result(engine).outputs[0].text == TEXT
        assert result(engine, stop="never ~").outputs[0].text == TEXT
        stopped = result(engine, stop=TEXT[37:40]).outputs[0]
        assert stopped.text == TEXT[:37]
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.stop_reason == TEXT[37:40]
        end = TOKENS.index(TOKENS[20])
        assert result(engine, stop_token_ids=[TOKENS[20]]).outputs[0].text == TEXT[:end]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_text_before_it(engine: Engine, length: int) -> None:
    stop = TEXT[20 : 20 + length]
    end = TEXT.index(stop)
    output = result(engine, stop=["nowhere to be found", stop]).outputs[0]
    assert output.text == TEXT[:end]
    assert output.token_ids == tuple(TOKENS[: end + length])
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason == stop


def test_a_stop_string_can_stay(engine: Engine) -> None:
    output = result(engine, stop=TEXT[20:23], include_stop_str_in_output=True).outputs[0]
    assert output.text == TEXT[:23]
    assert output.stop_reason == TEXT[20:23]


def test_a_stop_string_counts_from_min_tokens_on(engine: Engine) -> None:
    stop = TEXT[9:11]
    assert TEXT.count(stop) == 1
    output = result(engine, stop=stop, min_tokens=11).outputs[0]
    assert output.text == TEXT[:9]
    output = result(engine, stop=stop, min_tokens=12).outputs[0]
    assert output.text == TEXT
    assert output.finish_reason is FinishReason.LENGTH
    assert output.stop_reason is None


def test_the_beginning_of_a_stop_string_is_held_back_and_given_at_the_end(engine: Engine) -> None:
    output = result(engine, stop=TEXT[36:40] + "~never", max_tokens=40).outputs[0]
    assert output.text == TEXT
    assert output.finish_reason is FinishReason.LENGTH


def test_a_stop_string_on_the_very_last_token_is_a_stop(engine: Engine) -> None:
    output = result(engine, stop=TEXT[37:40], max_tokens=40).outputs[0]
    assert output.text == TEXT[:37]
    assert output.finish_reason is FinishReason.STOP


def test_nothing_runs_on_after_a_stop_string() -> None:
    with make_engine(step_seconds=SLOW) as engine:
        outputs = engine.generate(["hello"] * 5, {"temperature": 0.0, "max_tokens": 190, "stop": TEXT[3:6]})
        assert {output.outputs[0].text for output in outputs} == {TEXT[:3]}
        wait_until_idle(engine)
        assert engine.statistics().num_finished[FinishReason.STOP] == 5


def test_each_sample_stops_for_itself(engine: Engine) -> None:
    stream = engine.stream("hello", {"n": 3, "max_tokens": 40, "stop": TEXT[20:22]})
    assert [output.text for output in stream.result(30).outputs] == [TEXT[:20]] * 3
    assert [output.stop_reason for output in stream.result().outputs] == [TEXT[20:22]] * 3


def test_a_stop_id_ends_the_text_and_is_in_the_ids(engine: Engine) -> None:
    stop = TOKENS[20]
    end = TOKENS.index(stop)
    output = result(engine, stop_token_ids=[stop]).outputs[0]
    assert output.text == TEXT[:end]
    assert output.token_ids == tuple(TOKENS[: end + 1])
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason == stop
    kept = result(engine, stop_token_ids=[stop], include_stop_str_in_output=True).outputs[0]
    assert kept.text == TEXT[: end + 1]


def test_eos_ends_the_text_without_a_reason_of_its_own() -> None:
    end = TOKENS.index(TOKENS[20])
    with make_engine(eos_token_ids=frozenset({TOKENS[20]})) as engine:
        output = result(engine).outputs[0]
        assert output.text == TEXT[:end]
        assert output.token_ids == tuple(TOKENS[: end + 1])
        assert output.finish_reason is FinishReason.STOP
        assert output.stop_reason is None
        assert result(engine, ignore_eos=True).outputs[0].text == TEXT
        assert result(engine, stop_token_ids=[TOKENS[20]]).outputs[0].stop_reason == TOKENS[20]
        late = result(engine, min_tokens=end + 2).outputs[0]
        assert len(late.token_ids) > end + 1
        wait_until_idle(engine)


def test_what_is_held_back_is_given_before_an_eos() -> None:
    end = TOKENS.index(TOKENS[20])
    with make_engine(eos_token_ids=frozenset({TOKENS[20]})) as engine:
        output = result(engine, stop=TEXT[end - 1] + "~never").outputs[0]
        assert output.text == TEXT[:end]


def test_timings_and_reasons_are_given_with_the_end(engine: Engine) -> None:
    with engine.stream("hello", {"temperature": 0.0, "max_tokens": 5}) as stream:
        deltas = list(stream)
    assert all(delta.outputs[0].timings is None for delta in deltas[:-1])
    timings = deltas[-1].outputs[0].timings
    assert timings is not None
    assert timings.queued is not None and timings.ttft is not None and timings.tpot is not None
    assert 0 <= timings.queued <= timings.ttft <= timings.e2e


# ---- log-probabilities


def expected_logprobs(token: int, num_top: int) -> dict[int, Logprob]:
    item = score(token, num_top)
    logprobs = {
        top: Logprob(logprob=-float(index + 1), rank=index + 1, decoded_token=ALPHABET[top])
        for index, top in enumerate(item.top_token_ids)
    }
    chosen = Logprob(logprob=item.logprob, rank=item.rank, decoded_token=ALPHABET[token])
    assert logprobs.get(token, chosen) == chosen
    return {**logprobs, token: chosen}


@pytest.mark.parametrize("num_top", [0, 1, 2, 5])
def test_logprobs_name_the_most_likely_tokens_and_the_chosen_one(engine: Engine, num_top: int) -> None:
    output = result(engine, logprobs=num_top).outputs[0]
    assert output.logprobs == tuple(expected_logprobs(token, num_top) for token in TOKENS)


def test_each_request_gets_as_many_logprobs_as_it_asked_for() -> None:
    executor = make_executor()
    executor.gate.clear()
    with make_engine(executor=executor) as engine:
        asked = [None, 0, 7, 2, None]
        streams = [
            engine.stream("hello", {"temperature": 0.0, "max_tokens": 40, "logprobs": num_top}) for num_top in asked
        ]
        executor.gate.set()
        for num_top, stream in zip(asked, streams, strict=True):
            logprobs = stream.result(30).outputs[0].logprobs
            if num_top is None:
                assert logprobs is None
            else:
                assert logprobs == tuple(expected_logprobs(token, num_top) for token in TOKENS)


def test_logprobs_come_with_their_tokens(engine: Engine) -> None:
    with engine.stream("hello", {"temperature": 0.0, "max_tokens": 40, "logprobs": 1, "stop": TEXT[30:32]}) as stream:
        for delta in stream:
            output = delta.outputs[0]
            assert len(output.logprobs or ()) == len(output.token_ids)
            for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=True):
                assert token in logprobs
    assert len(stream.result().outputs[0].logprobs or ()) == 32


@pytest.mark.parametrize("num_top", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 90])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_prompt_logprobs_have_an_item_for_every_prompt_token(
    length: int, num_top: int, num_samples: int, caching: bool
) -> None:
    with make_engine(enable_prefix_caching=caching) as engine:
        prompt = LetterTokenizer().encode("the quick brown fox jumps over the lazy dog. " * 2)[:length]
        stream = engine.stream(prompt, {"prompt_logprobs": num_top, "max_tokens": 9, "n": num_samples})
        deltas = list(stream)
        expected = (None, *(expected_logprobs(token, num_top) for token in prompt[1:]))
        assert stream.result().prompt_logprobs == expected
        assert [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None] == [expected]
        assert len(stream._scores) == length - 1
        if num_samples == 1:
            assert deltas[0].prompt_logprobs == expected


def test_prompt_logprobs_are_none_unless_asked_for(engine: Engine) -> None:
    assert result(engine, logprobs=2).prompt_logprobs is None


def test_prompt_logprobs_survive_an_abort() -> None:
    executor = make_executor()
    with make_engine(executor=executor) as engine:
        executor.gate.clear()
        stream = engine.stream("hello", {"prompt_logprobs": 0})
        stream.abort()
        wait_until(lambda: stream.is_ended)
        executor.gate.set()
        assert stream.result(30).prompt_logprobs == (None,)


# ---- streams by themselves


def make_stream(engine: Engine, n: int = 1) -> RequestStream:
    requests = engine._core.make_requests([1, 2], SamplingParams(n=n))
    return RequestStream(requests, prompt=None, tokenizer=engine.tokenizer, abort=lambda requests: None)


def test_a_waker_is_called_once_and_never_without_news(engine: Engine) -> None:
    stream = make_stream(engine)
    calls: list[str] = []
    assert stream.call_when_ready(lambda: calls.append("ready"))
    assert stream.call_when_ready(lambda: calls.append("ready too"))
    assert stream.call_when_ended(lambda: calls.append("ended"))
    stream.put_token(0, "a", 1)
    assert calls == []
    stream.wake()
    assert calls == ["ready", "ready too"]
    stream.put_token(0, "b", 2)
    stream.wake()
    assert len(calls) == 2
    assert not stream.call_when_ready(lambda: calls.append("late"))
    assert (delta := stream.poll()) is not None and delta.outputs[0].text == "ab"
    stream.wake()
    assert len(calls) == 2


def test_a_waker_that_arms_itself_again_is_not_called_twice(engine: Engine) -> None:
    stream = make_stream(engine)
    calls: list[RequestOutput | None] = []

    def waker() -> None:
        calls.append(stream.poll())
        assert stream.call_when_ready(waker)

    assert stream.call_when_ready(waker)
    stream.put_token(0, "a", 1)
    stream.wake()
    assert len(calls) == 1


def test_a_disarmed_waker_is_not_called(engine: Engine) -> None:
    stream = make_stream(engine)
    wakers = [lambda: pytest.fail("called") for _ in range(2)]
    assert stream.call_when_ready(wakers[0])
    assert stream.call_when_ended(wakers[1])
    for waker in wakers:
        stream.disarm(waker)
        stream.disarm(waker)
    stream.put_token(0, "a", 1)
    stream.wake()


def test_a_stream_that_nobody_serves_has_nothing_to_abort(engine: Engine) -> None:
    aborted: list[object] = []
    requests = engine._core.make_requests([1, 2], SamplingParams())
    stream = RequestStream(requests, prompt=None, tokenizer=engine.tokenizer, abort=aborted.append)
    assert not stream.abort()
    del stream
    stream = RequestStream(requests, prompt=None, tokenizer=engine.tokenizer, abort=aborted.append)
    stream.served()
    assert stream.abort()
    del stream
    gc.collect()
    assert aborted == [tuple(requests)] * 2


def test_a_stream_that_failed_is_not_finished(engine: Engine) -> None:
    stream = make_stream(engine)
    stream.put_token(0, "a", 1)
    stream.fail(EngineEnd(EngineClosed("closed")))
    assert stream.is_ended
    assert (delta := stream.poll()) is not None and not delta.finished
    with pytest.raises(EngineClosed):
        stream.final()


def test_a_reader_waits_for_another_in_the_middle_of_reading(engine: Engine) -> None:
    class SlowTokenizer(LetterTokenizer):
        def token_text(self, token_id: int) -> str:
            is_reading.set()
            assert may_go_on.wait(30)
            return super().token_text(token_id)

    is_reading, may_go_on = threading.Event(), threading.Event()
    requests = engine._core.make_requests([1, 2], SamplingParams(logprobs=0))
    stream = RequestStream(requests, prompt=None, tokenizer=SlowTokenizer(), abort=lambda requests: None)
    stream.put_token(0, "a", 1, score(1, 0))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stream.poll)
        assert is_reading.wait(30)
        whole = pool.submit(stream.final)
        assert wait([whole], timeout=0.05).not_done
        may_go_on.set()
        assert first.result(30) is not None
        assert whole.result(30).outputs[0].text == "a"


def test_a_delta_holds_only_the_samples_that_moved(engine: Engine) -> None:
    stream = make_stream(engine, n=3)
    stream.put_token(2, "x", 1)
    stream.put_token(0, "a", 1)
    stream.put_token(2, "y", 2)
    delta = stream.poll()
    assert delta is not None
    assert [(output.index, output.text) for output in delta.outputs] == [(0, "a"), (2, "xy")]
    assert not delta.finished

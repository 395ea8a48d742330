"""How an engine ends: close, failure, dropping, finalisers in any thread, and what the process sees of it."""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from semipd import Engine, EngineClosed, EngineDead, FinishReason, QueueFull, SamplingParams
from semipd.core import EngineCore
from tests.fakes import (
    SLOW,
    LetterDetokenizer,
    LetterTokenizer,
    expected_text,
    make_engine,
    make_executor,
    wait_until,
    wait_until_idle,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=190)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("semipd-")]


def wait_for_no_threads() -> None:
    wait_until(lambda: not engine_threads())


def all_calls(engine: Engine) -> list[Callable[[], object]]:
    return [
        lambda: engine.generate("a"),
        lambda: engine.chat([{"role": "user", "content": "a"}]),
        lambda: engine.stream("a"),
        lambda: engine.stream("a", wait=True),
        lambda: engine.submit("a"),
        lambda: engine.agenerate("a"),
        lambda: engine.agenerate("a", wait=True),
    ]


def test_close_ends_threads_and_open_streams_and_every_later_call() -> None:
    engine = make_engine(step_seconds=SLOW)
    done = engine.stream("done", GREEDY)
    done.result(30)
    read, unread = (engine.stream("hello", ENDLESS) for _ in range(2))
    first = next(iter(read))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read.result)
        engine.close()
        with pytest.raises(EngineClosed, match="the engine was closed; make a new one"):
            waiting.result(30)
    assert not engine_threads()
    assert first.outputs[0].text
    for stream in (read, unread):
        reads: list[Callable[[], object]] = [stream.result, stream.poll, partial(list, stream)]
        for call in reads:
            with pytest.raises(EngineClosed):
                call()
        assert not stream.abort()
    for call in all_calls(engine):
        with pytest.raises(EngineClosed):
            call()
    assert done.result().outputs[0].text == expected_text("done", 12)
    assert engine.statistics().num_finished[FinishReason.LENGTH] == 1
    engine.check_integrity()
    engine.close()


def test_what_came_before_the_close_can_be_read() -> None:
    engine = make_engine(step_seconds=SLOW)
    stream = engine.stream("hello", ENDLESS)
    text = next(iter(stream)).outputs[0].text
    engine.close()
    with pytest.raises(EngineClosed) as caught:
        for delta in stream:
            assert not delta.finished
            text += delta.outputs[0].text
    assert text == expected_text("hello", len(text))
    with pytest.raises(EngineClosed) as again:
        stream.poll()
    assert again.value is not caught.value  # or its traceback would grow with each reader


def test_close_ends_a_call_that_waits_for_space() -> None:
    engine = make_engine(step_seconds=SLOW, max_num_seqs=1, max_queued_requests=1)
    with ThreadPoolExecutor(1) as pool:
        streams = [engine.stream("hello", ENDLESS, wait=True) for _ in range(2)]
        waiting = pool.submit(engine.stream, "hello", ENDLESS, wait=True, request_id="mine")
        wait_until(lambda: "mine" in engine._live)
        engine.close()
        with pytest.raises(EngineClosed):
            waiting.result(30)
    assert all(stream.is_ended for stream in streams)


def test_a_call_that_would_wait_for_an_engine_just_closed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def close_and_refuse(requests: object) -> None:
        engine.close()
        raise QueueFull("planted")

    monkeypatch.setattr(engine._core, "submit", close_and_refuse)
    with pytest.raises(EngineClosed):
        engine.stream("hello", wait=True)


def test_several_threads_may_close_at_once() -> None:
    engine = make_engine(step_seconds=SLOW)
    engine.submit("hello", ENDLESS)
    with ThreadPoolExecutor(4) as pool:
        for closed in [pool.submit(engine.close) for _ in range(4)]:
            closed.result(30)
            assert not engine_threads()


def test_a_callback_may_close_the_engine() -> None:
    executor = make_executor(step_seconds=SLOW)
    executor.gate.clear()
    engine = make_engine(executor=executor)
    stream = engine.submit("hello", ENDLESS, on_ready=lambda: engine.close())
    executor.gate.set()
    with pytest.raises(EngineClosed):
        stream.result(30)
    wait_for_no_threads()
    engine.close()


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_a_failing_lane_ends_everything_with_its_cause(fail_at: int, caplog: pytest.LogCaptureFixture) -> None:
    executor = make_executor(fail_at=fail_at)
    with make_engine(executor=executor) as engine:
        executor.gate.clear()
        streams = [engine.stream("hello", ENDLESS) for _ in range(3 if fail_at else 1)]
        executor.gate.set()
        for stream in streams:
            with pytest.raises(EngineDead, match="failed with RuntimeError: planted failure; make a new") as caught:
                stream.result(30)
            assert isinstance(caught.value.__cause__, RuntimeError)
        for call in all_calls(engine):
            with pytest.raises(EngineDead) as caught:
                call()
            assert isinstance(caught.value.__cause__, RuntimeError)
        wait_for_no_threads()
        engine.statistics()
    assert "planted failure" in caplog.text


class BrokenTokenizer(LetterTokenizer):
    """Fails on the third token of an output."""

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> LetterDetokenizer:
        class Broken(LetterDetokenizer):
            num_left = 3

            def push(self, token_id: int) -> str:
                self.num_left -= 1
                if not self.num_left:
                    raise ZeroDivisionError("planted")
                return super().push(token_id)

        return Broken()


def test_a_failing_delivery_ends_everything_with_its_cause() -> None:
    with make_engine(tokenizer=BrokenTokenizer(), step_seconds=SLOW) as engine:
        streams = [engine.stream("hello", ENDLESS) for _ in range(3)]
        for stream in streams:
            with pytest.raises(EngineDead, match="the engine failed with ZeroDivisionError: planted") as caught:
                stream.result(30)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(EngineDead):
            engine.generate("hello")
        wait_for_no_threads()


@pytest.mark.parametrize("fail_at", [None, 3])
def test_an_ended_engine_holds_neither_model_nor_streams(fail_at: int | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # a log record keeps the exception, as its reader may
    executor = make_executor(fail_at=fail_at)
    weak = weakref.ref(executor)
    engine = make_engine(executor=executor)
    del executor
    stream = engine.stream("hello", ENDLESS if fail_at else GREEDY)
    error: BaseException | None = None
    try:
        stream.result(30)
    except EngineDead as dead:
        error = dead
    assert (error is None) == (fail_at is None)
    if fail_at is None:
        engine.close()
    wait_for_no_threads()
    gc.collect()
    assert weak() is None
    weak_stream = weakref.ref(stream)
    del stream, error
    gc.collect()
    assert weak_stream() is None
    engine.close()


def test_a_dropped_engine_warns_and_ends() -> None:
    engine = make_engine(step_seconds=SLOW)
    stream = engine.stream("hello", ENDLESS)
    with pytest.warns(ResourceWarning, match=r"an Engine was dropped without close\(\); use it as a context manager"):
        del engine
        gc.collect()
    with pytest.raises(EngineClosed):
        stream.result(30)
    wait_for_no_threads()


def test_an_engine_that_failed_or_could_not_be_made_drops_silently() -> None:
    engine = make_engine(fail_at=0)
    with pytest.raises(EngineDead):
        engine.generate("a")
    del engine
    del_only = Engine.__new__(Engine)
    del del_only
    gc.collect()
    wait_for_no_threads()


class FinaliserClock:
    """Runs a call once where the scheduler reads the time: under its lock, as the collector may."""

    def __init__(self) -> None:
        self.call: Callable[[], object] | None = None
        self.has_run = threading.Event()

    def __call__(self) -> float:
        if self.call is not None and threading.current_thread().name in ("semipd-prefill", "semipd-decode"):
            call, self.call = self.call, None
            call()
            self.has_run.set()
        return time.monotonic()


def leave_generator(engine: Engine, holder: list[Any]) -> None:
    def texts() -> Iterator[str]:
        with engine.stream("hello", ENDLESS) as stream:
            for delta in stream:
                yield delta.outputs[0].text

    holder.append(texts())
    next(holder[0])


def leave_stream(engine: Engine, holder: list[Any]) -> None:
    holder.append(engine.stream("hello", ENDLESS))


def leave_waiting_coroutine(engine: Engine, holder: list[Any]) -> None:
    stream = engine.agenerate("hello", ENDLESS)

    async def start() -> None:
        holder.append(read())
        holder[0].send(None)

    async def read() -> None:
        await stream

    anyio.run(start)


@pytest.mark.parametrize("leave", [leave_generator, leave_stream, leave_waiting_coroutine])
def test_a_stream_may_be_finalised_under_the_scheduler_s_lock(leave: Callable[[Engine, list[Any]], None]) -> None:
    clock = FinaliserClock()
    with make_engine(clock=clock, step_seconds=SLOW) as engine:
        holder: list[Any] = []
        leave(engine, holder)
        clock.call = holder.clear
        engine.generate("other", GREEDY)
        assert clock.has_run.is_set()
        wait_until_idle(engine)
        assert engine.statistics().num_finished[FinishReason.ABORT] == 1


def test_an_engine_may_be_closed_by_a_finaliser_under_the_scheduler_s_lock() -> None:
    def main() -> Iterator[Engine]:
        with make_engine(clock=clock, step_seconds=SLOW) as engine:
            yield engine

    clock = FinaliserClock()
    holder = [main()]
    engine = next(holder[0])
    clock.call = holder.clear  # runs Engine.__exit__ in a lane
    with pytest.raises(EngineClosed):
        engine.generate("hello", ENDLESS)
    assert clock.has_run.is_set()
    wait_for_no_threads()


def test_an_engine_may_be_dropped_under_the_scheduler_s_lock() -> None:
    clock = FinaliserClock()
    holder = [make_engine(clock=clock, step_seconds=SLOW)]
    core = holder[0]._core
    stream = holder[0].submit("hello", ENDLESS)
    next(iter(stream))
    with pytest.warns(ResourceWarning, match="dropped without close"):
        clock.call = holder.clear  # runs Engine.__del__ in a lane
        core.submit(core.make_requests([1, 2, 3], GREEDY))
        assert clock.has_run.wait(30)
    with pytest.raises(EngineClosed):
        stream.result(30)
    wait_for_no_threads()


def test_two_engines_live_side_by_side() -> None:
    with make_engine() as one, make_engine(max_num_seqs=2, block_size=8) as other:
        streams = [engine.stream("hello", GREEDY, request_id="same") for engine in (one, other)]
        assert {stream.result(30).outputs[0].text for stream in streams} == {expected_text("hello", 12)}
        one.close()
        with pytest.raises(EngineClosed):
            one.generate("hello")
        assert other.generate("hello", GREEDY)[0].finished


def test_the_switch_interval_lasts_as_long_as_the_engine() -> None:
    before = sys.getswitchinterval()
    with make_engine():
        assert sys.getswitchinterval() == before
    with make_engine(switch_interval=0.0005):
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == before
    with make_engine(switch_interval=0.0005):
        sys.setswitchinterval(0.002)  # somebody else's choice stays
    assert sys.getswitchinterval() == pytest.approx(0.002)
    sys.setswitchinterval(before)


@pytest.mark.parametrize("is_first_closed_first", [True, False])
def test_the_switch_interval_lasts_as_long_as_the_last_of_two_engines(is_first_closed_first: bool) -> None:
    before = sys.getswitchinterval()
    with make_engine(switch_interval=0.001) as one, make_engine(switch_interval=0.0005) as other:
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        (one if is_first_closed_first else other).close()
        assert sys.getswitchinterval() == pytest.approx(0.0005 if is_first_closed_first else 0.001)
    assert sys.getswitchinterval() == before


def test_a_switch_interval_chosen_between_two_engines_comes_back() -> None:
    before = sys.getswitchinterval()
    with make_engine(switch_interval=0.001):
        sys.setswitchinterval(0.002)
        with make_engine(switch_interval=0.0005):
            assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.001)
    assert sys.getswitchinterval() == pytest.approx(0.002)
    sys.setswitchinterval(before)


@pytest.mark.parametrize("is_first_closed_first", [True, False])
def test_the_heap_is_frozen_until_the_last_engine_that_wants_it_closes(is_first_closed_first: bool) -> None:
    assert gc.get_freeze_count() == 0
    with make_engine(), make_engine(freeze_gc=True) as one, make_engine(freeze_gc=True) as other:
        assert gc.get_freeze_count() > 10_000
        (one if is_first_closed_first else other).close()
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


def test_what_the_application_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with make_engine(freeze_gc=True):
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_an_engine_changes_nothing_else_of_the_process() -> None:
    signals = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    handlers = logging.getLogger("semipd").handlers[:]
    children = psutil.Process().children(recursive=True)  # of other tests: multiprocessing keeps one
    with make_engine() as engine:
        engine.generate("hello", GREEDY)
        assert [signal.getsignal(number) for number in sorted(signal.valid_signals())] == signals
        assert psutil.Process().children(recursive=True) == children
    assert logging.getLogger("semipd").handlers == handlers


def test_an_engine_left_open_lets_the_interpreter_exit() -> None:
    code = """
from tests.fakes import make_engine
engine = make_engine(step_seconds=0.001)
stream = engine.submit("hello", {"temperature": 0.0, "max_tokens": 190})
next(iter(stream))
engine._core._backend.close = lambda: print("closed")
print("bye")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\nclosed\n", "")


def test_a_core_that_cannot_start_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: EngineCore) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(EngineCore, "start", fail)
    with pytest.raises(RuntimeError, match="can't start"):
        make_engine()
    wait_for_no_threads()

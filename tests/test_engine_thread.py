"""Which threads are an engine's own, and who waits for a close."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from semipd import Engine, SamplingParams
from semipd.engine_thread import EngineThread
from tests.fakes import SLOW, make_engine, wait_until
from tests.tiny import save_tiny_model

ENDLESS = SamplingParams(temperature=0.0, max_tokens=190)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, EngineThread)]


@pytest.mark.parametrize("name", ["semipd-foo", "semipd-delivery", "main"])
def test_close_waits_in_a_thread_of_the_application_whatever_its_name(name: str) -> None:
    def close() -> None:
        engine.close()
        left.append(own_threads())

    left: list[list[threading.Thread]] = []
    engine = make_engine(step_seconds=SLOW)
    engine.submit("hello", ENDLESS)
    thread = threading.Thread(target=close, name=name)
    thread.start()
    thread.join()
    assert left == [[]]


def test_close_does_not_wait_in_an_engine_s_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def close() -> None:
        thread.join()  # as the closing of a core does with its lanes
        close_core()

    engine = make_engine()
    close_core = engine._core.close
    monkeypatch.setattr(engine._core, "close", close)
    thread = EngineThread(engine.close, "other")
    thread.start()
    wait_until(lambda: not own_threads())


def test_all_threads_of_an_engine_are_its_own(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    before = set(threading.enumerate())
    with Engine(str(tmp_path), device="cpu", kv_cache_tokens=64, trace=str(tmp_path / "trace.jsonl")) as engine:
        engine.generate([[1, 2, 3]] * 3, {"max_tokens": 4})
        threads = set(threading.enumerate()) - before
        assert {"semipd-delivery", "semipd-prefill", "semipd-decode", "semipd-trace"} < {one.name for one in threads}
        assert all(isinstance(thread, EngineThread) and thread.daemon for thread in threads)

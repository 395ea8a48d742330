"""Graphs by key: eager first, captured beside it, the oldest dropped; with captures that only count."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch

from semipd.config import Phase
from semipd.model.graphs import GraphCache, GraphKey, _Graph

MIB = 1 << 20


class Recording:
    """A captured graph of one MiB that counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Event:
    """Fires when told."""

    made: list[Event] = []

    def __init__(self) -> None:
        self.has_fired = False
        Event.made.append(self)

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.has_fired


class Streams:
    """A backend whose streams are names."""

    def stream(self, phase: Phase, num_sms: int) -> Any:
        class Stream:
            torch_stream = f"{phase} {num_sms}"

        return Stream()

    def capture_stream(self, phase: Phase, num_sms: int) -> Any:
        raise AssertionError("captures are replaced")


class CountingCache(GraphCache):
    """Captures are recordings."""

    num_attempts = 0

    def _capture(self, key: GraphKey, launch: Callable[[], None]) -> _Graph:
        self.num_attempts += 1
        if key.shape == "broken" or (key.shape == "disturbed" and self.num_attempts == 1):
            raise RuntimeError("operation not permitted when stream is capturing")
        return _Graph(Recording(), MIB)  # type: ignore[arg-type]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingCache]:
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    cache = CountingCache(Streams(), torch.device("cpu"), max_bytes=2 * MIB)
    yield cache
    cache.close()


def key(shape: str) -> GraphKey:
    return GraphKey(Phase.DECODE, 48, shape)


def test_the_first_launch_is_eager_and_later_ones_replay(cache: CountingCache) -> None:
    launched: list[str] = []
    assert not cache.run(key("a"), lambda: launched.append("a"))
    cache.wait_until_captured()
    for _ in range(3):
        assert cache.run(key("a"), lambda: launched.append("again"))
    assert launched == ["a"]
    graph: Any = cache._graphs[key("a")].graph
    assert graph.replays == 3


def test_what_is_asked_for_is_captured_without_a_launch(cache: CountingCache) -> None:
    launched: list[str] = []
    for _ in range(2):
        cache.request(key("a"), lambda: launched.append("a"))
    cache.wait_until_captured()
    cache.run(key("a"), lambda: launched.append("a"))
    assert not launched
    assert cache.num_attempts == 1
    assert list(cache.captured(Phase.DECODE, 48)) == ["a"]
    assert list(cache.captured(Phase.PREFILL, 48)) == []


def test_others_get_their_turn_while_it_captures(cache: CountingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    before, intervals = sys.getswitchinterval(), list[float]()
    capture = cache._capture

    def measured(key: GraphKey, launch: Callable[[], None]) -> _Graph:
        intervals.append(sys.getswitchinterval())
        return capture(key, launch)

    monkeypatch.setattr(cache, "_capture", measured)
    cache.request(key("a"), lambda: None)
    cache.wait_until_captured()
    assert intervals == [pytest.approx(0.0005)]
    assert sys.getswitchinterval() == before


def test_what_a_lane_needs_goes_before_what_is_usual(cache: CountingCache) -> None:
    gate, order = threading.Event(), list[Hashable]()
    capture = cache._capture

    def slow(key: GraphKey, launch: Callable[[], None]) -> _Graph:
        gate.wait()
        order.append(key.shape)
        return capture(key, launch)

    cache._capture = slow  # type: ignore[method-assign]
    cache._max_bytes = 10 * MIB
    for shape in "abc":
        cache.request(key(shape), lambda: None, is_urgent=False)
    for shape in ("c", "d", "c"):
        cache.run(key(shape), lambda: None)
    gate.set()
    cache.wait_until_captured()
    assert order[0] in ("a", "c")  # what the thread had begun with
    assert [shape for shape in order if shape != "a"] == ["c", "d", "b"]


def test_nobody_waits_for_a_cache_that_is_closed(cache: CountingCache) -> None:
    gate = threading.Event()
    capture = cache._capture

    def slow(key: GraphKey, launch: Callable[[], None]) -> _Graph:
        gate.wait()
        return capture(key, launch)

    cache._capture = slow  # type: ignore[method-assign]
    cache.request(key("a"), lambda: None)
    waiter = threading.Thread(target=cache.wait_until_captured, daemon=True)
    waiter.start()
    closer = threading.Thread(target=cache.close, daemon=True)
    closer.start()
    gate.set()
    for thread in (closer, waiter):
        thread.join(10.0)
        assert not thread.is_alive()
    cache.wait_until_captured()


def test_what_cannot_be_captured_stays_eager(cache: CountingCache, caplog: pytest.LogCaptureFixture) -> None:
    launched: list[int] = []
    for index in range(5):
        cache.run(key("broken"), lambda index=index: launched.append(index))  # type: ignore[misc]
        cache.wait_until_captured()
    assert launched == [0, 1, 2, 3, 4]
    assert cache.num_attempts == 3
    assert caplog.text.count("no graph for") == 1


def test_a_capture_that_another_thread_broke_is_tried_again(
    cache: CountingCache, caplog: pytest.LogCaptureFixture
) -> None:
    launched: list[int] = []
    for index in range(4):
        cache.run(key("disturbed"), lambda index=index: launched.append(index))  # type: ignore[misc]
        cache.wait_until_captured()
    assert launched == [0, 1]
    assert "no graph for" not in caplog.text


def test_lanes_do_not_wait_for_graphs_that_are_destroyed(cache: CountingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    was_locked: list[bool] = []

    class Mortal(Recording):
        def __del__(self) -> None:
            was_locked.append(cache._lock.locked())

    monkeypatch.setattr(cache, "_capture", lambda key, launch: _Graph(Mortal(), MIB))  # type: ignore[arg-type]
    for shape in "abcde":
        cache.run(key(shape), lambda: None)
        cache.wait_until_captured()
        for event in Event.made:
            event.has_fired = True
    assert was_locked == [False], "a is gone; b drains and c was dropped just now"


def test_what_is_reserved_is_part_of_the_memory_of_all_graphs(
    cache: CountingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later graphs take it, and are measured as that much smaller."""
    captured: list[int] = []
    free = iter((5 * MIB, 4 * MIB))

    class Graph:
        alive: ClassVar[list[bool]] = []

        def capture_begin(self, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            captured.append(0)

        def capture_end(self) -> None:
            self.alive.append(True)

        def __del__(self) -> None:
            assert len(self.alive) == 3, "what the first had would be the second's"

    class Count:
        def add_(self, value: int) -> None:
            if captured:
                captured[-1] += value

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 * MIB))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch, "zeros", lambda size, device: Count())
    cache.reserve(3, 20)
    assert captured == [20, 20, 20]
    for shape in "ab":
        cache.run(key(shape), lambda: None)
        cache.wait_until_captured()
    assert set(cache._graphs) == {key("b")}, "one of the two MiB is left"


def test_the_least_recently_used_goes_once_nothing_runs_it(cache: CountingCache) -> None:
    def use(shape: str) -> None:
        cache.run(key(shape), lambda: None)
        cache.wait_until_captured()

    use("a")
    use("b")
    use("a")  # now b is the oldest
    use("c")
    assert set(cache._graphs) == {key("a"), key("c")}
    assert set(cache.captured(Phase.DECODE, 48)) == {"a", "c"}
    assert [item[0] for item in cache._dropped] == [key("b")]
    use("d")  # drops a, and puts an event behind the last replay of b
    (event,) = Event.made
    assert event.stream == "decode 48"
    assert len(cache._draining) == 1
    event.has_fired = True
    use("e")
    draining: list[Any] = [item[1] for item in cache._draining]
    assert draining == Event.made[1:]
    launched: list[str] = []
    cache.run(key("b"), lambda: launched.append("b"))  # as if it had never been
    assert launched == ["b"]

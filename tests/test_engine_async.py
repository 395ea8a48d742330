"""The engine from event loops: asyncio, uvloop and trio; and several of them at once."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import anyio
import pytest

from semipd import Engine, EngineClosed, EngineDead, FinishReason, QueueFull, RequestError, SamplingParams
from tests.fakes import SLOW, OracleExecutor, expected_text, make_engine, make_executor, wait_until, wait_until_idle

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=190)
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


class Run(Protocol):
    """Runs a coroutine function in a fresh event loop."""

    def __call__(self, main: Callable[[], Awaitable[T]]) -> T: ...


def run_in(loop: str, main: Callable[[], Awaitable[T]]) -> T:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    backend, options = LOOPS[loop]
    return anyio.run(main, backend=backend, backend_options=options)


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return lambda main: run_in(request.param, main)


@pytest.fixture
def executor() -> OracleExecutor:
    return make_executor()


@pytest.fixture
def engine(executor: OracleExecutor) -> Iterator[Engine]:
    with make_engine(executor=executor) as engine:
        yield engine
        executor.gate.set()
        wait_until_idle(engine)


def num_aborted(engine: Engine) -> int:
    return engine.statistics().num_finished[FinishReason.ABORT]


def test_await_gives_the_result(engine: Engine, run: Run) -> None:
    async def main() -> None:
        stream = engine.agenerate("hello", GREEDY)
        assert (await stream).outputs[0].text == expected_text("hello", 12)
        assert await stream == await stream

    run(main)


def test_a_salt_keeps_prompts_apart(engine: Engine, run: Run) -> None:
    async def main() -> None:
        salts = ["tenant a", "tenant b", None] * 2
        outputs = [await engine.agenerate("a" * 10, GREEDY, cache_salt=salt) for salt in salts]
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 8, 8, 8]

    run(main)


def test_async_for_gives_deltas(engine: Engine, run: Run) -> None:
    async def main() -> None:
        stream = engine.agenerate("hello", ENDLESS)
        deltas = [delta async for delta in stream]
        assert "".join(delta.outputs[0].text for delta in deltas) == expected_text("hello", 190)
        assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert [delta async for delta in stream] == []
        assert (await stream).outputs[0].text == expected_text("hello", 190)

    run(main)


def test_many_tasks_keep_their_own_output(engine: Engine, run: Run) -> None:
    async def one(index: int) -> None:
        text = ""
        async with engine.agenerate("a" * (index % 7 + 1), GREEDY) as stream:
            async for delta in stream:
                text += delta.outputs[0].text
        assert text == expected_text("a" * (index % 7 + 1), 12)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for index in range(100):
                tasks.start_soon(one, index)

    run(main)


def test_several_tasks_may_wait_for_one_result(engine: Engine, run: Run) -> None:
    async def main() -> None:
        stream = engine.agenerate("hello", GREEDY)
        texts = []

        async def one() -> None:
            texts.append((await stream).outputs[0].text)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(one)
        assert texts == [expected_text("hello", 12)] * 3

    run(main)


async def leave_by_context(engine: Engine) -> None:
    async with engine.agenerate("hello", ENDLESS) as stream:
        await anext(aiter(stream))


async def leave_by_exception_in_the_block(engine: Engine) -> None:
    with pytest.raises(KeyError):
        async with engine.agenerate("hello", ENDLESS) as stream:
            async for _ in stream:
                raise KeyError


async def leave_by_break(engine: Engine) -> None:
    async for _ in engine.agenerate("hello", ENDLESS):
        break


async def leave_by_exception(engine: Engine) -> None:
    try:
        async for _ in engine.agenerate("hello", ENDLESS):
            raise KeyError
    except KeyError:
        pass


async def leave_by_cancel_of_iteration(engine: Engine) -> None:
    async def read() -> None:
        async for _ in engine.agenerate("hello", ENDLESS):
            started.set()

    started = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await started.wait()
        tasks.cancel_scope.cancel()


async def leave_by_cancel_of_await(engine: Engine) -> None:
    stream = engine.agenerate("hello", ENDLESS)  # kept, so it is the cancelled wait that aborts
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for, stream)
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert (await stream).outputs[0].finish_reason is FinishReason.ABORT


async def wait_for(stream: Awaitable[T]) -> None:
    await stream


async def leave_by_collector(engine: Engine) -> None:
    cycle: list[Any] = [engine.agenerate("hello", ENDLESS)]
    cycle.append(cycle)
    await anext(aiter(cycle[0]))
    del cycle
    gc.collect()


async def leave_by_id(engine: Engine) -> None:
    stream = engine.agenerate("hello", ENDLESS, request_id="mine")
    thread = threading.Thread(target=engine.abort, args=("mine",))
    thread.start()
    assert (await stream).outputs[0].finish_reason is FinishReason.ABORT
    thread.join()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_context,
        leave_by_exception_in_the_block,
        leave_by_break,
        leave_by_exception,
        leave_by_cancel_of_iteration,
        leave_by_cancel_of_await,
        leave_by_collector,
        leave_by_id,
    ],
)
def test_leaving_early_aborts(run: Run, leave: Callable[[Engine], Awaitable[None]]) -> None:
    with make_engine(step_seconds=SLOW) as engine:
        run(lambda: leave(engine))
        wait_until_idle(engine)
        assert num_aborted(engine) == 1


def test_a_stream_nobody_awaits_aborts(engine: Engine, executor: OracleExecutor, run: Run) -> None:
    async def main() -> None:
        executor.gate.clear()
        engine.agenerate("hello", ENDLESS)
        wait_until(lambda: num_aborted(engine) == 1)

    run(main)


def test_wrong_requests_raise_at_the_call(engine: Engine) -> None:
    with pytest.raises(RequestError, match="unknown sampling field"):
        engine.agenerate("hello", {"tempo": 1})
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.agenerate("")


def test_waiting_for_a_full_queue_holds_no_thread(run: Run, executor: OracleExecutor) -> None:
    async def main(engine: Engine) -> None:
        executor.gate.clear()
        streams = [engine.agenerate("a", GREEDY)]
        wait_until(lambda: engine.statistics().num_waiting == 0)
        streams.append(engine.agenerate("a", GREEDY))
        with pytest.raises(QueueFull):
            engine.agenerate("a", GREEDY)
        num_threads = threading.active_count()
        streams += [engine.agenerate("a", GREEDY, request_id=f"{i}", wait=True) for i in range(100)]
        streams[50].abort()
        assert (await streams[50]).outputs[0].finish_reason is FinishReason.ABORT
        assert engine.abort("97")
        del streams[60]
        assert threading.active_count() == num_threads
        executor.gate.set()
        texts = [(await stream).outputs[0].text for stream in streams]
        assert texts.count(expected_text("a", 12)) == 99
        assert texts.count("") == 2

    with make_engine(executor=executor, max_num_seqs=1, max_queued_requests=1) as engine:
        run(lambda: main(engine))
        wait_until_idle(engine)
        assert num_aborted(engine) == 3
        assert engine.statistics().num_finished[FinishReason.LENGTH] == 99


def test_closing_the_engine_ends_streams_that_wait(run: Run) -> None:
    async def main() -> None:
        with make_engine(max_num_seqs=1, max_queued_requests=1, step_seconds=SLOW) as engine:
            first = engine.agenerate("hello", ENDLESS)
            streams = [engine.agenerate("hello", ENDLESS, wait=True) for _ in range(5)]
            await anext(aiter(first))
        for stream in (first, *streams):
            with pytest.raises(EngineClosed, match="the engine was closed"):
                await stream
            with pytest.raises(EngineClosed):
                async for _ in stream:
                    pass
        with pytest.raises(EngineClosed):
            engine.agenerate("hello", ENDLESS, wait=True)

    run(main)


def test_a_failed_engine_ends_streams_that_wait(run: Run) -> None:
    async def main() -> None:
        with make_engine(fail_at=20) as engine:
            stream = engine.agenerate("hello", ENDLESS)
            with pytest.raises(EngineDead, match="planted failure") as caught:
                await stream
            assert isinstance(caught.value.__cause__, RuntimeError)

    run(main)


def test_the_synchronous_calls_work_inside_a_running_loop(engine: Engine, run: Run) -> None:
    async def main() -> None:
        assert engine.generate("hello", GREEDY)[0].outputs[0].text == expected_text("hello", 12)
        assert [delta.finished for delta in engine.stream("hello", GREEDY)][-1]
        assert (await engine.agenerate("hello", GREEDY)).outputs[0].text == expected_text("hello", 12)

    run(main)


def test_an_engine_may_be_made_inside_a_loop_or_a_worker_thread(run: Run) -> None:
    async def main() -> None:
        with make_engine() as engine:
            await engine.agenerate("hello", GREEDY)
        other = await anyio.to_thread.run_sync(make_engine)
        assert (await other.agenerate("hello", GREEDY)).finished
        await anyio.to_thread.run_sync(other.close)

    run(main)


def test_a_loop_that_is_busy_delays_nobody_else(engine: Engine) -> None:
    """While one loop hogs its thread, its own stream fills up, and another loop reads to the end."""
    is_hogging, is_done = threading.Event(), threading.Event()

    async def hog() -> str:
        stream = engine.agenerate("hog", ENDLESS)
        await anext(aiter(stream))
        is_hogging.set()
        assert is_done.wait(30)  # the thread of the loop, not a task of it
        assert stream.is_ended
        return (await stream).outputs[0].text

    async def other() -> str:
        return (await engine.agenerate("other", ENDLESS)).outputs[0].text

    with ThreadPoolExecutor(1) as pool:
        hogged = pool.submit(run_in, "asyncio", hog)
        assert is_hogging.wait(30)
        for loop in LOOPS:
            assert run_in(loop, other) == expected_text("other", 190)
        wait_until_idle(engine)
        is_done.set()
        assert hogged.result(30) == expected_text("hog", 190)


def test_a_quick_engine_leaves_its_reader_s_loop_to_others(engine: Engine, run: Run) -> None:
    async def main() -> None:
        stream = engine.agenerate("hello", ENDLESS)
        wait_until(lambda: stream.is_ended)
        turns = []

        async def other() -> None:
            turns.append("other")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            turns += ["delta" async for _ in stream]
        assert sorted(turns) == ["delta", "other"]
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream
        assert scope.cancelled_caught

    run(main)


def test_a_loop_that_has_gone_hurts_nobody(engine: Engine, executor: OracleExecutor) -> None:
    loop = asyncio.new_event_loop()
    executor.gate.clear()
    streams = []

    async def start() -> None:
        stream = engine.agenerate("hello", ENDLESS)
        streams.append(stream)
        task = asyncio.ensure_future(wait_for(stream))
        await asyncio.sleep(0)
        tasks.append(task)

    tasks: list[asyncio.Future[None]] = []
    loop.run_until_complete(start())
    loop.close()
    executor.gate.set()
    assert engine.generate("hello", GREEDY)[0].outputs[0].text == expected_text("hello", 12)
    wait_until(lambda: streams[0].is_ended)
    tasks[0]._log_destroy_pending = False  # type: ignore[attr-defined]  # it is, on purpose


def test_an_async_generator_of_the_user_aborts_when_it_is_closed(engine: Engine, run: Run) -> None:
    async def texts() -> AsyncIterator[str]:
        async with engine.agenerate("hello", ENDLESS) as stream:
            async for delta in stream:
                yield delta.outputs[0].text

    async def main() -> None:
        generator = texts()
        await anext(generator)
        await generator.aclose()  # type: ignore[attr-defined]

    run(main)
    wait_until_idle(engine)

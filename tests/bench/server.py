"""A small OpenAI-compatible server on the loopback, as good or bad as a test wants it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

Body = dict[str, Any]
Handler = Callable[["Answer", Body], Awaitable[None]]


class Answer:
    """The way back to one client."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def plain(self, status: int, text: str) -> None:
        """A whole answer."""
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
        self._writer.write((head + text).encode())
        await self._writer.drain()

    async def start(self) -> None:
        """The head of an event stream."""
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        self._writer.write(f"{head}Connection: close\r\n\r\n".encode())
        await self._writer.drain()

    async def event(self, data: object) -> None:
        """One event: JSON of `data`, or the text itself."""
        text = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
        self._writer.write(f"{len(text):x}\r\n{text}\r\n".encode())
        await self._writer.drain()

    async def token(self, text: str = "a", *, finish_reason: str | None = None) -> None:
        """One token of a completion."""
        await self.event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})

    async def end(self) -> None:
        """The end of an event stream."""
        await self.event("[DONE]")
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def break_off(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()


async def complete(answer: Answer, body: Body, *, interval: float = 0.005) -> None:
    """The tokens that were asked for, one at a time, and how many they were."""
    await answer.start()
    for index in range(body["max_tokens"]):
        await asyncio.sleep(interval)
        await answer.token(finish_reason="length" if index == body["max_tokens"] - 1 else None)
    await answer.event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}})
    await answer.end()


class CompletionServer:
    """Serves in a thread of its own, as a context manager.

    Args:
        handler: answers one completion; requests count from 0 in `bodies`.
    """

    def __init__(self, handler: Handler = complete) -> None:
        self._handler = handler
        self._port = 0
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="completion-server")
        self.bodies: list[Body] = []
        self.heads: list[str] = []

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> CompletionServer:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Drop all connections and be gone. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        await self._stopped.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lengths = [line for line in head.splitlines() if line.lower().startswith("content-length:")]
            content = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
            answer = Answer(writer)
            if "GET /v1/models " in head:
                await answer.plain(200, json.dumps({"data": [{"id": "tiny"}]}))
            elif "POST /v1/completions " in head:
                self.heads.append(head)
                self.bodies.append(json.loads(content))
                await self._handler(answer, self.bodies[-1])
            else:
                await answer.plain(404, "no such page")
        except (ConnectionError, asyncio.IncompleteReadError):  # the client has gone
            pass
        finally:
            writer.close()

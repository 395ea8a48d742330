"""One process's share of a run against an OpenAI-compatible server: streaming completions over HTTP.

Each request is a task that is started when it is due. A loop that is too busy to start tasks in time is also too busy
to stamp tokens in time, so the lateness of the sends, at random moments, tells how late the stamps are.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal

import httpx

from semipd.bench.metrics import RequestRecord, Status
from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import clock

CONNECT_TIMEOUT = 10.0
NUM_POOLS = 16
"""Connection pools of a process. At every request a pool looks at each of its connections: 0.9 ms for 150 of them."""
REJECTIONS = (429, 503)
"""HTTP statuses by which servers say that they have too much to do."""

PromptKind = Literal["tokens", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: the server's base, up to and including /v1.
        model: the name that the server gives its model.
        prompt: send token ids, or text of about as many tokens.
        headers: sent along, for keys.
        body: further fields of each request.
    """

    url: str
    model: str
    prompt: PromptKind
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    def content(self, request: PlannedRequest, maker: PromptMaker) -> bytes:
        """The JSON body of a request."""
        fields = {
            "model": self.model,
            "prompt": maker.token_ids(request).tolist() if self.prompt == "tokens" else maker.text(request),
            "max_tokens": request.num_output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }
        return json.dumps(fields).encode()


@dataclass(slots=True)
class _Answer:
    """What came back so far."""

    times: array[float] = field(default_factory=lambda: array("d"))
    num_tokens: int | None = None  # as the server counts them
    is_finished: bool = False


class _BadAnswer(Exception):
    """The server answered something that is no stream of completions."""


async def serve_share(
    endpoint: Endpoint,
    requests: Sequence[PlannedRequest],
    contents: Sequence[bytes],
    *,
    start: float,
    deadline: float,
    on_ended: Callable[[int], None],
) -> list[RequestRecord]:
    """Send each request when it is due and follow all of them to their ends, at most until `deadline`.

    Args:
        endpoint: whom to ask.
        requests: in order of their times.
        contents: their bodies.
        start: the clock's time at which the run starts.
        deadline: the clock's time at which open requests are given up.
        on_ended: called with 1 for each request that ended.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT)
    context = httpx.create_ssl_context()
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(limits=limits, timeout=timeout, headers=dict(endpoint.headers), verify=context)
            )
            for _ in range(NUM_POOLS)
        ]
        tasks = []
        for request, content, client in zip(requests, contents, cycle(clients), strict=False):
            if (delay := start + request.due - clock()) > 0:
                await asyncio.sleep(delay)
            task = asyncio.create_task(_send(client, endpoint, request, content, start))
            task.add_done_callback(lambda _: on_ended(1))
            tasks.append(task)
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=max(0.0, deadline - clock()))
            for task in unfinished:
                task.cancel()
        return await asyncio.gather(*tasks)


async def _send(
    client: httpx.AsyncClient, endpoint: Endpoint, request: PlannedRequest, content: bytes, start: float
) -> RequestRecord:
    sent = clock() - start
    answer, status, error = _Answer(), Status.UNFINISHED, None
    with suppress(asyncio.CancelledError):  # the drain is over; nobody else cancels these tasks
        status, error = await _follow(client, endpoint, content, start, answer)
    return RequestRecord(
        request=request,
        sent=sent,
        token_times=answer.times,
        num_output_tokens=len(answer.times) if answer.num_tokens is None else answer.num_tokens,
        status=status,
        error=error,
    )


async def _follow(
    client: httpx.AsyncClient, endpoint: Endpoint, content: bytes, start: float, answer: _Answer
) -> tuple[Status, str | None]:
    """Read an answer to its end; how it ended, and what went wrong."""
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream("POST", f"{endpoint.url}/completions", content=content, headers=headers) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace").strip()
                status = Status.REJECTED if response.status_code in REJECTIONS else Status.ERROR
                return status, f"HTTP {response.status_code}: {text}"[:200]
            async for line in response.aiter_lines():
                _read_line(line, clock() - start, answer)
    except httpx.HTTPError as error:
        return Status.ERROR, f"{type(error).__name__}: {error}"[:200]
    except _BadAnswer as error:
        return Status.ERROR, str(error)[:200]
    if not answer.is_finished:
        return Status.ERROR, "the stream ended without a finish reason"
    if not answer.times:
        return Status.ERROR, "the stream ended without a token"
    return Status.OK, None


def _read_line(line: str, now: float, answer: _Answer) -> None:
    """One line of an event stream. An empty text with a finish reason is an end, not a token."""
    name, _, data = line.partition(":")
    data = data.strip()
    if name != "data" or data == "[DONE]":  # empty lines, comments, other fields
        return
    try:
        event = json.loads(data)
        if error := event.get("error"):
            raise _BadAnswer(f"the server sent an error: {error}")
        for choice in event.get("choices") or ():
            is_end = choice.get("finish_reason") is not None
            if choice["text"] or not is_end:
                answer.times.append(now)
            answer.is_finished = answer.is_finished or is_end
        if usage := event.get("usage"):
            answer.num_tokens = int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _BadAnswer(f"malformed event ({type(error).__name__}: {error}): {data}") from error

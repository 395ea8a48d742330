"""Any OpenAI-compatible server as a target, asked by one or several processes of ours.

One process follows about as many tokens per second as one core can parse; the shares of several run beside each other
on the machine's one monotonic clock.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import resource
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from semipd.bench.http_client import CONNECT_TIMEOUT, Endpoint, PromptKind, serve_share
from semipd.bench.metrics import RequestRecord
from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import Outcome, Run, clock
from semipd.errors import ConfigError

HEAD_START = 0.5
"""Seconds from the moment that all processes are ready to the first possible arrival; making clients takes 0.1 s."""
OPEN_FILES = 65_536
"""Open files that a client process allows itself, where the system lets it."""


class HttpTarget:
    """A server with /v1/models and streaming /v1/completions.

    Args:
        url: its address; /v1 is added to one without a path.
        label: what results call it; None takes host and port.
        model: the served model's name; None asks for the first of /v1/models.
        prompt: send token ids, or text of about as many tokens.
        vocab_size: token ids are below it.
        num_processes: how many of our processes ask.
        api_key: sent as a bearer token.
        body: further fields of each request.
    """

    def __init__(
        self,
        url: str,
        *,
        label: str | None = None,
        model: str | None = None,
        prompt: PromptKind = "tokens",
        vocab_size: int = 32_000,
        num_processes: int = 1,
        api_key: str | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"the URL is {url!r}; expected one such as http://localhost:8000/v1")
        self.label = label or parts.netloc
        self._url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._model = model
        self._prompt: PromptKind = prompt
        self._vocab_size = vocab_size
        self._num_processes = num_processes
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._body = dict(body or {})
        self._endpoint: Endpoint | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        """The model, and how it is asked."""
        return {
            "kind": "http",
            "model": self._model,
            "prompt": self._prompt,
            "num_client_processes": self._num_processes,
            "body": self._body,
        }

    def __enter__(self) -> Self:
        self._model = self._model or self._first_model()
        self._endpoint = Endpoint(
            url=self._url, model=self._model, prompt=self._prompt, headers=self._headers, body=self._body
        )
        _raise_open_files()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._endpoint = None

    def run(self, run: Run) -> Outcome:
        assert self._endpoint is not None, "enter the target first"
        maker = PromptMaker(vocab_size=self._vocab_size, seed=run.prompt_seed, run=run.number)
        serve = _serve_here if self._num_processes == 1 else partial(_serve_in_processes, count=self._num_processes)
        records = serve(self._endpoint, maker, run)
        return Outcome(records=sorted(records, key=lambda record: record.request.index))

    def _first_model(self) -> str:
        try:
            response = httpx.get(f"{self._url}/models", headers=self._headers, timeout=CONNECT_TIMEOUT)
            response.raise_for_status()
            name = response.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"no model at {self._url}/models ({type(error).__name__}: {error}); expected a running "
                "OpenAI-compatible server, or the model's name"
            ) from error
        return str(name)


def _serve_here(endpoint: Endpoint, maker: PromptMaker, run: Run) -> list[RequestRecord]:
    contents = [endpoint.content(request, maker) for request in run.requests]
    gc.collect()
    start = clock() + HEAD_START
    return asyncio.run(
        serve_share(
            endpoint,
            run.requests,
            contents,
            start=start,
            deadline=start + _last_due(run.requests) + run.drain,
            on_ended=run.on_ended,
        )
    )


def _serve_in_processes(endpoint: Endpoint, maker: PromptMaker, run: Run, *, count: int) -> list[RequestRecord]:
    """Deal the requests out to processes, start all at once, and gather what they say."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for index in range(count):
            ours, theirs = context.Pipe()
            share = run.requests[index::count]
            process = context.Process(target=_serve_in_child, args=(theirs, endpoint, maker, share))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for pipe in pipes:
            _receive(pipe)  # it has made its prompts
        start = clock() + HEAD_START
        for pipe in pipes:
            pipe.send((start, start + _last_due(run.requests) + run.drain))
        return _gather(pipes, run)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for pipe in pipes:
            pipe.close()


def _gather(pipes: Sequence[Connection], run: Run) -> list[RequestRecord]:
    """Messages until each process has sent its records: a number of requests that ended, or the records."""
    records: list[RequestRecord] = []
    still_open = list(pipes)
    while still_open:
        for pipe in wait(still_open):
            assert isinstance(pipe, Connection)
            message = _receive(pipe)
            if isinstance(message, int):
                run.on_ended(message)
            else:
                records += message
                still_open.remove(pipe)
    return records


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a client process died; what it printed says why") from None


def _serve_in_child(
    pipe: Connection, endpoint: Endpoint, maker: PromptMaker, requests: Sequence[PlannedRequest]
) -> None:
    """The body of a client process."""
    _raise_open_files()
    contents = [endpoint.content(request, maker) for request in requests]
    gc.collect()
    pipe.send("ready")
    start, deadline = pipe.recv()
    share = serve_share(endpoint, requests, contents, start=start, deadline=deadline, on_ended=pipe.send)
    pipe.send(asyncio.run(share))


def _last_due(requests: Sequence[PlannedRequest]) -> float:
    return requests[-1].due if requests else 0.0


def _raise_open_files() -> None:
    """Allow more connections than the usual 1,024: under overload there is one per waiting request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Servers over HTTP: good ones, busy ones, broken ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from semipd.bench.http_target import HttpTarget
from semipd.bench.metrics import RequestRecord, Status
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import Run
from semipd.errors import ConfigError
from tests.bench.server import Answer, Body, CompletionServer, Handler, complete


def plan(count: int, *, num_output_tokens: int = 4, interval: float = 0.01) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            index=index, due=index * interval, num_prompt_tokens=10 + index, num_output_tokens=num_output_tokens
        )
        for index in range(count)
    ]


def serve(
    server: CompletionServer, requests: Sequence[PlannedRequest], *, drain: float = 20.0, **options: Any
) -> Sequence[RequestRecord]:
    ended: list[int] = []
    with HttpTarget(server.url, **options) as target:
        outcome = target.run(Run(requests=requests, drain=drain, prompt_seed=0, number=1, on_ended=ended.append))
    assert sum(ended) == len(requests)
    assert [record.request for record in outcome.records] == list(requests)
    return outcome.records


def serve_one(handler: Handler, **options: Any) -> RequestRecord:
    with CompletionServer(handler) as server:
        (record,) = serve(server, plan(1), **options)
    return record


def test_every_token_of_a_stream_is_stamped() -> None:
    requests = plan(10)
    with CompletionServer() as server:
        records = serve(server, requests)
    assert {record.status for record in records} == {Status.OK}
    for record in records:
        assert record.num_output_tokens == len(record.token_times) == 4
        assert record.ttft is not None and record.ttft >= 0.005 and record.late >= 0
    body = max(server.bodies, key=lambda body: len(body["prompt"]))
    assert len(body["prompt"]) == 19 and max(body["prompt"]) < 32_000
    assert {name: body[name] for name in ("model", "max_tokens", "stream", "ignore_eos", "temperature")} == {
        "model": "tiny",
        "max_tokens": 4,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0.0,
    }


def test_processes_share_the_load() -> None:
    with CompletionServer() as server:
        records = serve(server, plan(9, interval=0.02), num_processes=2)
        assert len(server.bodies) == 9
    assert {record.status for record in records} == {Status.OK}


def test_the_generator_does_not_wait_for_answers() -> None:
    """The server answers nobody before it has heard from everybody."""
    everybody = asyncio.Event()

    async def answer_late(answer: Answer, body: Body) -> None:
        if len(server.bodies) == 20:
            everybody.set()
        await everybody.wait()
        await complete(answer, body)

    with CompletionServer(answer_late) as server:
        records = serve(server, plan(20))
    assert {record.status for record in records} == {Status.OK}
    assert min(record.token_times[0] for record in records) > max(record.sent for record in records)


def test_text_and_further_fields_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with CompletionServer() as server:
        serve(server, plan(1), prompt="text", model="mine", body={"ignore_eos": False, "user": "x"}, api_key="sesame")
    (body,) = server.bodies
    assert len(body["prompt"].split()) == 10
    assert (body["model"], body["ignore_eos"], body["user"]) == ("mine", False, "x")
    assert "authorization: bearer sesame" in server.heads[0].lower()


def test_the_servers_own_count_of_tokens_is_taken() -> None:
    async def two_at_once(answer: Answer, body: Body) -> None:
        await answer.start()
        await answer.token("a b")
        await answer.token("c d", finish_reason="length")
        await answer.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 4}})
        await answer.end()

    record = serve_one(two_at_once)
    assert (record.status, record.num_output_tokens, len(record.token_times)) == (Status.OK, 4, 2)


def test_an_empty_text_that_ends_a_stream_is_no_token() -> None:
    async def end_apart(answer: Answer, body: Body) -> None:
        await answer.start()
        await answer.token("a")
        await answer.token("")  # half a character
        await answer.token("", finish_reason="stop")
        await answer.end()

    record = serve_one(end_apart)
    assert (record.status, record.num_output_tokens) == (Status.OK, 2)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_rejects(status: int) -> None:
    record = serve_one(lambda answer, _: answer.plain(status, "come back later"))
    assert (record.status, record.error) == (Status.REJECTED, f"HTTP {status}: come back later")
    assert record.ttft is None


def test_other_answers_are_errors() -> None:
    record = serve_one(lambda answer, _: answer.plain(400, "no such model"))
    assert (record.status, record.error) == (Status.ERROR, "HTTP 400: no such model")


async def _break_off(answer: Answer, body: Body) -> None:
    await answer.start()
    await answer.token()
    answer.break_off()


async def _send_event(answer: Answer, body: Body, *, event: object) -> None:
    await answer.start()
    await answer.event(event)
    await answer.end()


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_break_off, "Error: "),
        (partial(_send_event, event="{half"), "malformed event (JSONDecodeError"),
        (partial(_send_event, event="[1]"), "malformed event ("),
        (partial(_send_event, event={"choices": [{}]}), "malformed event (KeyError"),
        (partial(_send_event, event={"error": {"message": "out of memory"}}), "the server sent an error: "),
        (partial(_send_event, event={"choices": [{"text": "a"}]}), "the stream ended without a finish reason"),
        (
            partial(_send_event, event={"choices": [{"text": "", "finish_reason": "stop"}]}),
            "the stream ended without a token",
        ),
    ],
)
def test_broken_streams_are_errors(handler: Handler, message: str) -> None:
    record = serve_one(handler)
    assert record.status is Status.ERROR
    assert record.error is not None and message in record.error


def test_a_server_that_dies_is_counted_and_not_hidden() -> None:
    with CompletionServer() as server, HttpTarget(server.url) as target:
        server.stop()
        run = Run(requests=plan(3), drain=5.0, prompt_seed=0, number=1, on_ended=lambda _: None)
        records = target.run(run).records
    assert [record.status for record in records] == [Status.ERROR] * 3
    assert records[0].error is not None and records[0].error.startswith("ConnectError: ")


def test_what_has_not_ended_when_the_drain_is_over_is_unfinished() -> None:
    with CompletionServer(partial(complete, interval=0.05)) as server:
        records = serve(server, plan(2, num_output_tokens=1000), drain=1.0)
    assert [record.status for record in records] == [Status.UNFINISHED] * 2
    assert all(record.error is None and record.num_output_tokens >= 1 for record in records)


def test_an_absent_server_is_a_clear_mistake() -> None:
    with pytest.raises(ConfigError, match="no model at http://127.0.0.1:9/v1/models .*expected a running"):
        HttpTarget("http://127.0.0.1:9").__enter__()
    with pytest.raises(ConfigError, match="expected one such as http://localhost:8000/v1"):
        HttpTarget("localhost:8000")

"""The trace of a real engine around a scripted executor: every line, after a close, a failure and on a full disk."""

from __future__ import annotations

import json
import logging
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from semipd import SLO, Engine, EngineDead, FinishReason, SamplingParams
from semipd.config import CadencePolicy, ExclusivePolicy
from semipd.errors import ConfigError
from semipd.trace import TraceWriter
from tests.fakes import SLOW, make_engine, make_executor, wait_until, wait_until_idle

FULL_DISK = Path("/dev/full")
STEP = 0.002


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines by event; the first is the start and, unless the disk failed, the last is the end."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["event"] == "start" and lines[-1]["event"] == "end"
    events: dict[str, list[dict[str, Any]]] = {name: [] for name in ("start", "decision", "step", "request", "end")}
    for line in lines:
        events[line["event"]].append(line)
    assert len(events["start"]) == len(events["end"]) == 1
    return events


def serve(engine: Engine, num_requests: int = 6) -> None:
    prompts = ["abcdefgh" * (1 + index) for index in range(num_requests)]
    engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8))
    wait_until_idle(engine)


def test_a_closed_engine_leaves_every_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with make_engine(trace=path, step_seconds=STEP, policy=ExclusivePolicy(), slo=SLO(ttft=5.0)) as engine:
        serve(engine)
        statistics = engine.statistics()
    events = read(path)
    (start,) = events["start"]
    assert (start["model"], start["num_sms"], start["policy"]) == ("oracle", 2, "ExclusivePolicy()")
    assert start["slo"] == {"ttft": 5.0, "tpot": None, "gap": None}
    assert events["end"][0]["error"] is None

    assert len(events["request"]) == 6
    for request in events["request"]:
        assert request["num_output_tokens"] == 8 and request["finish_reason"] == FinishReason.LENGTH
        assert 0 <= request["queued"] <= request["ttft"] <= request["e2e"] and request["tpot"] > 0
        assert request["slo"]["ttft"] == 5.0 and request["slo_attained"] is True
        assert start["time"] <= request["arrival"] < request["time"] <= events["end"][0]["time"]

    assert len(events["step"]) == sum(histogram.count for histogram in statistics.step_time.values())
    assert sum(step["num_prompt_tokens"] for step in events["step"]) == statistics.num_prompt_tokens
    assert all(step["seconds"] == STEP and step["predicted"] > 0 for step in events["step"])
    assert {step["phase"] for step in events["step"]} == {"prefill", "decode"}


def test_decisions_follow_one_another_and_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with make_engine(trace=path, step_seconds=STEP, policy=CadencePolicy(decode_steps=2)) as engine:
        serve(engine, num_requests=12)
        statistics = engine.statistics()
    events = read(path)
    decisions = sorted(events["decision"], key=lambda decision: decision["number"])
    assert [decision["number"] for decision in decisions] == list(range(len(decisions)))
    assert decisions[0]["before"] is None
    for first, second in pairwise(decisions):
        assert second["before"] == first["after"] != second["after"]
        assert first["time"] <= second["time"]
    changes = decisions[1:]
    assert statistics.num_plan_changes == len(changes)
    assert statistics.num_forced_plan_changes == sum(change["is_forced"] for change in changes)
    assert 0 < statistics.num_forced_plan_changes < statistics.num_plan_changes
    assert {change["reason"] for change in changes if not change["is_forced"]} == {
        "prompts are due",
        "decodes have their turn",
    }
    steps = {(step["num_sms"], step["num_prompt_tokens"], step["context_tokens"]) for step in events["step"]}
    measured = [decision for decision in decisions if decision["work"] is not None]
    assert len(measured) > len(decisions) / 2
    for decision in measured:
        work = decision["work"]
        assert decision["measured"] == STEP and decision["predicted"] > 0
        assert (work["num_sms"], work["num_prompt_tokens"], work["context_tokens"]) in steps
    assert [decision.number for decision in statistics.decisions] == list(range(len(decisions)))[-256:]


def test_a_failure_leaves_what_was_seen_until_then(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with make_engine(trace=path, step_seconds=STEP, fail_at=5) as engine:
        with pytest.raises(EngineDead):
            engine.generate("abcdefgh", SamplingParams(temperature=0.0, max_tokens=100))
        wait_until(lambda: not [one for one in threading.enumerate() if one.name == "semipd-trace"])
        events = read(path)  # before anybody closes it
    assert events["end"][0]["error"] == "RuntimeError: planted failure"
    assert 0 < len(events["step"]) <= 5
    assert [decision["after"] for decision in events["decision"]]


def test_a_decision_whose_step_never_ends_is_there_without_a_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    executor = make_executor()
    executor.gate.clear()
    engine = make_engine(trace=path, executor=executor)
    stream = engine.stream("abcdefgh")
    wait_until(lambda: any(one.work is not None for one in engine.statistics().decisions))
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._core.is_ended)
    executor.gate.set()
    closing.join()
    stream.abort()
    launched = [decision for decision in read(path)["decision"] if decision["work"] is not None]
    assert launched and all(one["predicted"] > 0 and one["measured"] is None for one in launched)


def test_samples_and_aborts_have_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with make_engine(trace=path, step_seconds=SLOW) as engine:
        engine.generate("abc", SamplingParams(n=2, max_tokens=3, seed=1))
        stream = engine.stream("abcdefgh", SamplingParams(max_tokens=190), request_id="left")
        stream.abort()
        wait_until_idle(engine)
    requests = read(path)["request"]
    assert sorted(request["sample_index"] for request in requests[:2]) == [0, 1]
    assert (requests[2]["request_id"], requests[2]["finish_reason"]) == ("left", "abort")


def test_what_is_written_can_be_read_while_the_engine_idles(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with make_engine(trace=path) as engine:
        serve(engine, num_requests=1)
        wait_until(lambda: '"event":"request"' in path.read_text())


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace is '.*missing/trace.jsonl', which cannot be written: .*No such file"):
        make_engine(trace=tmp_path / "missing" / "trace.jsonl")


@pytest.mark.parametrize("trace", ["", 3, True])
def test_what_is_no_path_is_refused(trace: object) -> None:
    with pytest.raises(ConfigError, match="expected the path of a file to write, or None"):
        make_engine(trace=trace)


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_trace_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(trace=FULL_DISK)
    serve(engine)
    wait_until(lambda: engine._core._trace is not None and engine._core._trace.error is not None)
    serve(engine)
    with pytest.raises(OSError, match="No space left"):
        engine.close()
    engine.close()
    logged = [record for record in caplog.records if record.name == "semipd.trace"]
    assert [record.levelno for record in logged] == [logging.ERROR]
    assert logged[0].getMessage().startswith("the trace /dev/full is not complete: [Errno 28]")


def test_records_are_written_in_order_and_closing_twice_is_fine(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.jsonl")
    for index in range(1000):
        writer.put({"event": "test", "number": index})
    writer.close()
    writer.close()
    numbers = [json.loads(line)["number"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert numbers == list(range(1000))

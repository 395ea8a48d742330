"""From decisions to a picture: runs of `serve`, traces of engines that ended, failed or still run, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semipd import SLO, EngineDead, SamplingParams
from semipd.bench.cli import main
from semipd.bench.engine_target import decision_columns
from semipd.bench.timeline import Timeline, is_trace, load_trace, run_timeline, timeline_figure
from semipd.config import CadencePolicy, MixedPolicy, Plan, StaticPolicy
from semipd.errors import ConfigError
from semipd.sched.decisions import Decision
from semipd.sched.latency import StepWork
from tests.fakes import make_engine, wait_until_idle


def write_trace(path: Path, **options: Any) -> Path:
    with make_engine(trace=path, step_seconds=0.001, **options) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=6)
        engine.generate(["abcdefgh" * (index + 1) for index in range(8)], params)
        engine.generate("abc", params, slo=SLO(tpot=0.25))
        wait_until_idle(engine)
    return path


def make_decision(number: int, time: float, plan: Plan, *, is_forced: bool, **changes: Any) -> Decision:
    return Decision(
        number=number,
        time=time,
        before=None,
        after=plan,
        reason="a test",
        is_forced=is_forced,
        asked=None,
        num_waiting=2,
        num_prompt_tokens=300,
        num_decodes=4,
        context_tokens=900,
        **changes,
    )


def make_run(engine: dict[str, Any]) -> dict[str, Any]:
    return {
        "workload": "long",
        "target": "static",
        "rate": 4.0,
        "window": [1.0, 5.0],
        "attainment": [{"slo": "0.5/25ms"}, {"slo": "0.5/25ms"}, {"slo": "1/50ms"}],
        "requests": {"due": [0.5, 2.0, 7.0], "ttft": [0.1, None, 0.4], "tpot": [None, None, 0.02]},
        "engine": engine,
    }


def drawn_texts(timeline: Timeline) -> list[str]:
    figure = timeline_figure(timeline)
    figure.canvas.draw()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    legends = [text.get_text() for axis in figure.axes if (legend := axis.get_legend()) for text in legend.get_texts()]
    return [*titles, *legends]


def test_a_trace_becomes_a_timeline(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl", policy=CadencePolicy(decode_steps=2), slo=SLO(ttft=0.5, tpot=0.1))
    assert is_trace(path)
    timeline = load_trace(path)
    assert timeline.title == "oracle on auto, CadencePolicy(decode_steps=2)"
    assert timeline.num_chosen is not None and timeline.num_forced is not None
    assert len(timeline.plans) == len(timeline.plan_times) == 1 + timeline.num_chosen + timeline.num_forced
    assert list(timeline.plan_times) == sorted(timeline.plan_times)
    assert {plan[0] for plan in timeline.plans} == {"exclusive"}
    assert timeline.targets == {"ttft": [0.5], "tpot": [0.1, 0.25]}
    assert len(timeline.latencies["ttft"]) == 9
    assert all(0 <= x <= timeline.end and y is not None and y > 0 for x, y in timeline.latencies["ttft"])
    assert max(timeline.queue["decoding"]) > 1
    num_steps = {kind: len(steps.times) for kind, steps in timeline.steps.items()}
    assert num_steps["prefill"] > 0 and num_steps["decode"] > 0 and num_steps["mixed"] == 0
    texts = drawn_texts(timeline)
    changes = f"{timeline.num_chosen} changes of plan by choice, {timeline.num_forced} by work that came or went"
    assert changes in texts and {"prefill", "decode", "waiting"} <= set(texts)


@pytest.mark.parametrize("policy", [StaticPolicy(), MixedPolicy(token_budget=12)], ids=["static", "mixed"])
def test_a_trace_is_drawn(tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "my trace.jsonl", policy=policy)
    assert main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    picture = tmp_path / "plots" / "my-trace.png"
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ("mixed" in drawn_texts(load_trace(path))) is isinstance(policy, MixedPolicy)


def test_a_failed_engine_says_so_in_the_title(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        write_trace(tmp_path / "trace.jsonl", fail_at=3)
    timeline = load_trace(tmp_path / "trace.jsonl")
    assert timeline.title.endswith("(RuntimeError: planted failure)")
    timeline_figure(timeline)


def test_a_trace_that_is_still_written_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl")
    whole = load_trace(path)
    text = path.read_text()
    path.write_text(text[: text.index('{"event":"end"') - 20])
    cut = load_trace(path)
    assert cut.title == f"{whole.title} (still open)"
    path.write_text(text.splitlines()[0] + "\n")
    nothing = load_trace(path)
    assert not nothing.plans and nothing.num_chosen == 0
    timeline_figure(nothing)


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    with pytest.raises(ConfigError, match=r"trace.jsonl, line 4 is damaged"):
        load_trace(path)


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"event": "step"}\n', '{"benchmark": "serve"}\n'])
def test_other_files_are_no_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert not is_trace(path)
    assert not is_trace(tmp_path / "missing")


def test_decisions_of_a_run_begin_with_the_plan_that_it_found() -> None:
    work = StepWork.of(2, num_decodes=4, context_tokens=900)
    decisions = [
        make_decision(0, 3.0, Plan.split(1, 1), is_forced=True),
        make_decision(1, 8.0, Plan.mixed(64, 2), is_forced=False),
        make_decision(2, 11.5, Plan.split(1, 1), is_forced=True, work=work, predicted=0.02, measured=0.03),
        make_decision(3, 12.0, Plan.mixed(32, 2), is_forced=False),
    ]
    columns = decision_columns(decisions, 10.0)
    assert columns["time"] == [0.0, 1.5, 2.0]
    assert columns["plan"] == ["mixed", "split", "mixed"]
    assert columns["token_budget"] == [64, None, 32]
    assert columns["measured"] == [None, 0.03, None]
    assert json.loads(json.dumps(columns)) == columns
    assert all(not column for column in decision_columns([], 10.0).values())

    samples = {"time": [0.1], "plan": ["mixed"], "prefill_sms": [0], "decode_sms": [2]}
    samples |= {f"num_{name}": [1] for name in ("waiting", "prefilling", "decoding")}
    timeline = run_timeline(make_run({"samples": samples, "decisions": columns}))
    assert timeline.plans == [("mixed", 0, 2), ("split", 1, 1), ("mixed", 0, 2)]
    assert (timeline.num_chosen, timeline.num_forced) == (1, 1)
    assert timeline.steps["decode"].measured == [0.03] and timeline.steps["decode"].predicted == [0.02]
    assert timeline.targets == {"ttft": [0.5, 1.0], "tpot": [0.025, 0.05]}
    assert timeline.end == 7.0
    timeline_figure(timeline)


def test_a_run_without_decisions_is_drawn_from_its_samples_or_without_any() -> None:
    samples = {"time": [0.1, 0.2], "plan": [None, "split"], "prefill_sms": [None, 1], "decode_sms": [None, 1]}
    samples |= {f"num_{name}": [1, 2] for name in ("waiting", "prefilling", "decoding")}
    timeline = run_timeline(make_run({"samples": samples}))
    assert (timeline.plan_times, timeline.plans, timeline.num_chosen) == ([0.2], [("split", 1, 1)], None)
    timeline_figure(timeline)
    timeline_figure(run_timeline(make_run({})))

"""Schedules of workloads and traces, malformed traces, and the prompts that they lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest, TraceSource, Window, load_trace, parse_source, plan_stages
from semipd.errors import ConfigError

GOOD = '{"arrival": 0.5, "input": 8, "output": 4}'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "day.jsonl"
    path.write_text(
        '{"arrival": 12.0, "input": 30, "output": 3, "shared_prefix": 20, "prefix_group": 1}\n'
        "\n"
        '{"arrival": 10, "input": 10, "output": 1}\n'
        '{"arrival": 11, "input": 25, "output": 2, "shared_prefix": 20, "prefix_group": 1}\n'
    )
    return path


def test_a_schedule_takes_lengths_and_times_from_its_workload() -> None:
    source = parse_source("lengths:4-9,2", cv=1.0, seed=3)
    window = Window(start=2.0, end=10.0)
    requests, same_window = source.schedule(20.0, window)
    assert same_window == window and source.own_rate is None
    assert [request.index for request in requests] == list(range(len(requests)))
    assert all(a.due <= b.due < 10 for a, b in zip(requests, requests[1:], strict=False))
    assert {request.num_prompt_tokens for request in requests} == set(range(4, 10))
    faster, _ = source.schedule(40.0, window)
    lengths = [[request.num_prompt_tokens for request in some] for some in (requests, faster)]
    assert lengths[1][: len(requests)] == lengths[0]


def test_a_trace_is_read_in_order_of_arrival(trace: Path) -> None:
    source = parse_source(f"trace:{trace}", cv=1.0, seed=0)
    assert isinstance(source, TraceSource)
    assert (source.name, source.own_rate) == ("day", 1.0)
    assert source.requests == [
        PlannedRequest(index=0, due=0.0, num_prompt_tokens=10, num_output_tokens=1),
        PlannedRequest(
            index=1, due=1.0, num_prompt_tokens=25, num_output_tokens=2, num_shared_tokens=20, prefix_group=1
        ),
        PlannedRequest(
            index=2, due=2.0, num_prompt_tokens=30, num_output_tokens=3, num_shared_tokens=20, prefix_group=1
        ),
    ]


def test_a_rate_stretches_a_trace_and_its_end_cuts_the_window(trace: Path) -> None:
    source = load_trace(trace)
    requests, window = source.schedule(0.5, Window(start=1.0, end=100.0))
    assert [request.due for request in requests] == [0.0, 2.0, 4.0]
    assert window == Window(start=1.0, end=6.0)
    requests, window = source.schedule(1.0, Window(start=0.0, end=1.5))
    assert [request.due for request in requests] == [0.0, 1.0] and window.end == 1.5


def test_a_warm_up_longer_than_the_trace_is_refused(trace: Path) -> None:
    with pytest.raises(ConfigError, match=r"lasts 3 s, which the warm-up of 5 s uses up"):
        load_trace(trace).schedule(1.0, Window(start=5.0, end=25.0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"arrival": 0.5, "input": 8', "line 3: .*Expecting.* expected a JSON object"),
        ("[1, 2]", "line 3: .*expected a JSON object with arrival"),
        ('{"arrival": 0.5, "input": 8}', "line 3: no output in"),
        ('{"arrival": 0.5, "input": 8, "output": 0}', "line 3: output is 0; expected an integer from 1"),
        ('{"arrival": 0.5, "input": 8.5, "output": 1}', "line 3: input is 8.5; expected an integer from 1"),
        ('{"arrival": 0.5, "input": true, "output": 1}', "line 3: input is True; expected an integer from 1"),
        ('{"arrival": "now", "input": 8, "output": 1}', "line 3: arrival is 'now'; expected seconds from 0"),
        ('{"arrival": NaN, "input": 8, "output": 1}', "line 3: arrival is nan; expected seconds from 0"),
        ('{"arrival": 1, "input": 8, "output": 1, "shared": 2}', "line 3: unknown field shared; known are arrival"),
        (
            '{"arrival": 1, "input": 8, "output": 1, "shared_prefix": 9}',
            "line 3: shared_prefix is 9, longer than the input 8",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ConfigError, match=message):
        load_trace(path)


def test_a_trace_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="is empty; expected JSON lines"):
        load_trace(tmp_path / "empty.jsonl")


def test_prompts_share_what_their_group_shares_and_nothing_else() -> None:
    a, b, c = (
        PlannedRequest(
            index=index, due=0.0, num_prompt_tokens=40, num_output_tokens=1, num_shared_tokens=30, prefix_group=group
        )
        for index, group in ((0, 5), (1, 5), (2, 6))
    )
    maker = PromptMaker(vocab_size=50_000, seed=1, run=2)
    prompts = [maker.token_ids(request).tolist() for request in (a, b, c)]
    assert [len(prompt) for prompt in prompts] == [40, 40, 40]
    assert prompts[0][:30] == prompts[1][:30] and prompts[0][30:] != prompts[1][30:]
    assert prompts[2][:30] != prompts[0][:30]
    assert maker.token_ids(a).tolist() == prompts[0], "prompts are not seeded"
    assert PromptMaker(vocab_size=50_000, seed=1, run=3).token_ids(a).tolist()[:30] != prompts[0][:30]
    assert max(max(prompt) for prompt in prompts) < 50_000


def test_text_prompts_have_a_word_per_token() -> None:
    request = PlannedRequest(index=0, due=0.0, num_prompt_tokens=25, num_output_tokens=1, num_shared_tokens=5)
    text = PromptMaker(vocab_size=10, seed=0, run=0).text(request)
    assert len(text.split(" ")) == 25


def test_rates_of_a_staircase_follow_each_other_and_share_no_prefix(trace: Path) -> None:
    requests, (slow, fast) = plan_stages(load_trace(trace), [0.5, 1.0], Window(start=1.0, end=100.0))
    assert [request.due for request in requests] == [0.0, 2.0, 4.0, 6.0, 7.0, 8.0]
    assert [request.index for request in requests] == list(range(6))
    assert (slow.begin, slow.window, slow.requests) == (0.0, Window(start=1.0, end=6.0), range(3))
    assert (fast.begin, fast.window, fast.requests) == (6.0, Window(start=1.0, end=3.0), range(3, 6))
    groups = [{requests[index].prefix_group for index in stage.requests} for stage in (slow, fast)]
    assert len(groups[0]) == len(groups[1]) == 2 and not groups[0] & groups[1]

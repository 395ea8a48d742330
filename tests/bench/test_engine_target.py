"""An engine in this process: what it is told, what is stamped, and what becomes of requests that fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from semipd.bench.engine_arguments import SHAPES, parse_policy_spec, parse_value, save_shapes
from semipd.bench.engine_target import EngineTarget
from semipd.bench.metrics import Status, parse_slo
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import Outcome, Run
from semipd.config import ExclusivePolicy, MixedPolicy, StaticPolicy
from semipd.errors import ConfigError, EngineDead
from semipd.model.loader import load_spec, resolve_model


def make_target(folder: Path, *, policy: str = "exclusive", **options: Any) -> EngineTarget:
    options = {"load_format": "dummy", "device": "cpu", "kv_cache_tokens": 4096, **options}
    return EngineTarget(str(folder), policy=policy, options=options, slo=parse_slo("0.5/25ms"))


def plan(lengths: Sequence[tuple[int, int]], *, interval: float = 0.01) -> list[PlannedRequest]:
    return [
        PlannedRequest(index=index, due=index * interval, num_prompt_tokens=num_in, num_output_tokens=num_out)
        for index, (num_in, num_out) in enumerate(lengths)
    ]


def serve(target: EngineTarget, requests: Sequence[PlannedRequest], *, drain: float = 30.0) -> Outcome:
    ended: list[int] = []
    with target:
        outcome = target.run(Run(requests=requests, drain=drain, prompt_seed=0, number=1, on_ended=ended.append))
    assert sum(ended) == len(requests)
    return outcome


@pytest.mark.parametrize("policy", ["exclusive", "static", "mixed:token_budget=32"])
def test_every_token_is_stamped(tiny_folder: Path, policy: str) -> None:
    requests = plan([(5 + 7 * index, 1 + index) for index in range(12)])
    target = make_target(tiny_folder, policy=policy)
    outcome = serve(target, requests)
    assert target.description["policy"] == repr(parse_policy_spec(policy))
    for request, record in zip(requests, outcome.records, strict=True):
        assert record.request is request and record.status is Status.OK and record.error is None
        assert record.num_output_tokens == len(record.token_times) == request.num_output_tokens
        assert list(record.token_times) == sorted(record.token_times)
        assert record.late >= 0 and record.queued is not None and record.ttft is not None
        assert 0 <= record.queued <= record.ttft
    totals = outcome.engine["totals"]
    assert totals["num_generation_tokens"] == sum(request.num_output_tokens for request in requests)
    assert totals["num_prefix_hit_tokens"] == 0


def test_a_full_queue_rejects_and_the_generator_goes_on(tiny_folder: Path) -> None:
    target = make_target(tiny_folder, max_num_seqs=1, max_queued_requests=1)
    outcome = serve(target, plan([(20, 200)] * 12, interval=0.0))
    statuses = [record.status for record in outcome.records]
    assert statuses[0] is Status.OK and statuses.count(Status.REJECTED) >= 8
    rejected = next(record for record in outcome.records if record.status is Status.REJECTED)
    assert rejected.error is not None and rejected.error.startswith("QueueFull: ")
    assert rejected.num_output_tokens == 0


def test_a_prompt_that_is_too_long_is_an_error_of_its_own(tiny_folder: Path) -> None:
    outcome = serve(make_target(tiny_folder), plan([(20, 4), (300, 4), (20, 4)]))
    assert [record.status for record in outcome.records] == [Status.OK, Status.ERROR, Status.OK]
    assert outcome.records[1].error is not None and outcome.records[1].error.startswith("PromptTooLong: ")


def test_what_has_not_ended_when_the_drain_is_over_is_unfinished(tiny_folder: Path) -> None:
    target = make_target(tiny_folder, max_num_seqs=1)
    outcome = serve(target, plan([(10, 200)] * 40, interval=0.0), drain=0.05)
    statuses = [record.status for record in outcome.records]
    assert statuses[-1] is Status.UNFINISHED
    assert set(statuses) <= {Status.OK, Status.UNFINISHED}


def test_a_dead_engine_fails_its_requests(tiny_folder: Path) -> None:
    target = make_target(tiny_folder)
    with target:
        assert target._engine is not None
        target._engine._core.fail(ZeroDivisionError("a lane broke"))
        run = Run(requests=plan([(5, 5)] * 3), drain=5.0, prompt_seed=0, number=1, on_ended=lambda _: None)
        outcome = target.run(run)
        with pytest.raises(EngineDead):  # a further run would only take time
            target.run(run)
    assert [record.status for record in outcome.records] == [Status.ERROR] * 3
    assert outcome.records[0].error is not None and "EngineDead" in outcome.records[0].error


def test_shared_prefixes_hit_the_prefix_cache(tiny_folder: Path) -> None:
    requests = [
        PlannedRequest(index=index, due=0.2 * index, num_prompt_tokens=80, num_output_tokens=2, num_shared_tokens=64)
        for index in range(3)
    ]
    outcome = serve(make_target(tiny_folder), requests)
    assert outcome.engine["totals"]["num_prefix_hit_tokens"] == 2 * 64


def test_policies_are_named_with_their_arguments() -> None:
    assert parse_policy_spec("exclusive") == ExclusivePolicy()
    assert parse_policy_spec("mixed:token_budget=64") == MixedPolicy(token_budget=64)
    static = parse_policy_spec("static:prefill_sms=84,decode_sms=48")
    assert static == StaticPolicy(prefill_sms=84, decode_sms=48)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastest", "policy is 'fastest'; expected one of .*exclusive, static, mixed"),
        ("mixed:budget=3", "'budget=3' is no argument of 'mixed', which takes token_budget, each as NAME=VALUE"),
        ("mixed:token_budget", "'token_budget' is no argument of 'mixed'"),
        ("exclusive:a=1", "'a=1' is no argument of 'exclusive', which takes no arguments"),
        ("mixed:token_budget=many", "MixedPolicy.token_budget is 'many'"),
    ],
)
def test_other_policies_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_policy_spec(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("0.5", 0.5), ("true", True), ("False", False), ("none", None), ("cuda:0", "cuda:0"), ("", "")],
)
def test_values_are_read_as_python_or_text(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_an_unknown_engine_argument_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine argument max_seqs"), make_target(tiny_folder, max_seqs=3):
        pass


@pytest.mark.parametrize(("name", "num_layers", "num_heads"), [("llama-3-8b", 32, 32), ("llama-3-70b", 80, 64)])
def test_known_shapes_are_a_model(tmp_path: Path, name: str, num_layers: int, num_heads: int) -> None:
    spec = load_spec(resolve_model(str(save_shapes(name, tmp_path)), load_format="dummy"))
    assert (spec.num_layers, spec.vocab_size, spec.num_heads) == (num_layers, 128256, num_heads)
    assert spec.hidden_size == num_heads * spec.head_dim and name in SHAPES

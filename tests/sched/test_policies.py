"""Each policy's plan for each load, and the splits that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from semipd.config import (
    SLO,
    CadencePolicy,
    ExclusivePolicy,
    MixedPolicy,
    Phase,
    Plan,
    PolicyConfig,
    StaticPolicy,
    parse_policy,
)
from semipd.errors import ConfigError
from semipd.sched.latency import LatencyModel
from semipd.sched.policies import make_policy
from semipd.sched.policy import Load, Policy

SPLITS = ((1, 3), (2, 2), (3, 1))
ONLY_PREFILL = Load(chunks=((0, 10),))
ONLY_DECODE = Load(num_decodes=1, context_tokens=20)
BOTH = Load(chunks=((0, 10),), num_decodes=1, context_tokens=20)
PREFILL_ALONE = Plan.exclusive(Phase.PREFILL, 4)
DECODE_ALONE = Plan.exclusive(Phase.DECODE, 4)


def _make(
    config: PolicyConfig,
    *,
    num_sms: int = 4,
    splits: Sequence[tuple[int, int]] = SPLITS,
    slo: SLO | None = None,
    latency: LatencyModel | None = None,
) -> Policy:
    return make_policy(
        config,
        num_sms=num_sms,
        splits=splits,
        default_split=(2, 2) if splits else None,
        max_prefill_tokens=2048,
        slo=slo,
        latency=latency or LatencyModel(num_sms),
    )


@pytest.mark.parametrize(
    ("config", "load", "plan"),
    [
        (ExclusivePolicy(), ONLY_PREFILL, PREFILL_ALONE),
        (ExclusivePolicy(), ONLY_DECODE, DECODE_ALONE),
        (ExclusivePolicy(), BOTH, PREFILL_ALONE),
        (StaticPolicy(), ONLY_PREFILL, PREFILL_ALONE),
        (StaticPolicy(), ONLY_DECODE, DECODE_ALONE),
        (StaticPolicy(), BOTH, Plan.split(2, 2)),
        (StaticPolicy(prefill_sms=3, decode_sms=1), BOTH, Plan.split(3, 1)),
        (CadencePolicy(decode_steps=2), ONLY_PREFILL, PREFILL_ALONE),
        (CadencePolicy(decode_steps=2), ONLY_DECODE, DECODE_ALONE),
        (CadencePolicy(decode_steps=2), replace(BOTH, num_decode_steps=1), DECODE_ALONE),
        (CadencePolicy(decode_steps=2), replace(BOTH, num_decode_steps=2), PREFILL_ALONE),
        (CadencePolicy(decode_steps=2), replace(ONLY_DECODE, num_decode_steps=9), DECODE_ALONE),
        (MixedPolicy(token_budget=64), ONLY_PREFILL, Plan.mixed(64, 4)),
        (MixedPolicy(token_budget=64), BOTH, Plan.mixed(64, 4)),
    ],
)
def test_plan_of_each_load(config: PolicyConfig, load: Load, plan: Plan) -> None:
    assert _make(config).choose(load) == plan


def test_a_split_that_is_not_offered_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"is \(5, 1\); this device of 4 offers \(1, 3\), \(2, 2\), \(3, 1\)"):
        _make(StaticPolicy(prefill_sms=5, decode_sms=1))


def test_a_device_that_cannot_be_split_runs_prefill_first() -> None:
    policy = _make(StaticPolicy(), num_sms=1, splits=())
    assert policy.choose(BOTH) == Plan.exclusive(Phase.PREFILL, 1)
    with pytest.raises(ConfigError, match="cannot be split"):
        _make(StaticPolicy(prefill_sms=1, decode_sms=1), num_sms=1, splits=())


def test_policy_names() -> None:
    assert parse_policy("exclusive") == ExclusivePolicy()
    assert parse_policy("static") == StaticPolicy()
    assert parse_policy("mixed") == MixedPolicy()
    assert parse_policy("cadence") == CadencePolicy()
    with pytest.raises(ConfigError, match="policy is 'fastest'; expected one of adaptive, exclusive"):
        parse_policy("fastest")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"prefill_sms": 1}, {"decode_sms": 1}, {"prefill_sms": 0, "decode_sms": 1}])
def test_a_static_policy_needs_two_positive_shares(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        StaticPolicy(**arguments)


def test_a_mixed_policy_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match="token_budget is 0"):
        MixedPolicy(token_budget=0)

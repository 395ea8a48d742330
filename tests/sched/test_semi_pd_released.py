"""The rules of semi-PD's released code, its polynomials and what is odd about them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from semipd.bench.engine_arguments import parse_policy_spec
from semipd.config import SLO, Phase, Plan, ReleasedSemiPDPolicy, parse_policy
from semipd.errors import ConfigError
from semipd.request import RequestTimings
from semipd.sched import semi_pd_released
from semipd.sched.latency import LatencyModel
from semipd.sched.policies import make_policy
from semipd.sched.policy import Load
from semipd.sched.semi_pd import Shares, SplitReason
from semipd.sched.semi_pd_released import WINDOW, ReleasedSemiPD, prefill_factor, tpot_factor, waiting_factor
from tests.sched.oracle import Driver

H100 = tuple((132 - 8 * k, 8 * k) for k in range(1, 15))
BOTH = Load(chunks=((0, 9),), num_decodes=2)


def ended(ttft: float | None, waiting: float | None, tpot: float | None) -> RequestTimings:
    """A request that ended."""
    return RequestTimings(arrival=0.0, queued=waiting, ttft=ttft, tpot=tpot, worst_gap=tpot, e2e=9.0)


def policy(percents: tuple[float, float] = (100, 100), splits: Sequence[tuple[int, int]] = H100) -> ReleasedSemiPD:
    """On an H100 with the targets of the released code."""
    made = ReleasedSemiPD(Shares(132, splits), ttft=0.5, tpot=0.1)
    made._percents = percents
    return made


def window(made: ReleasedSemiPD, *, ttft: float, waiting: float, tpot: float) -> tuple[float, float]:
    """The percentages after a window of equal requests."""
    for _ in range(WINDOW):
        made.observe(ended(ttft, waiting, tpot))
    assert made.last_decision is not None
    return made.last_decision.asked


def test_plans() -> None:
    made = policy()
    assert made.choose(BOTH) == Plan.split(132, 132)
    assert made.choose(Load(chunks=((0, 9),))) == Plan.exclusive(Phase.PREFILL, 132)
    assert made.choose(Load(num_decodes=2)) == Plan.exclusive(Phase.DECODE, 132)
    assert window(made, ttft=0.4, waiting=0.1, tpot=0.2) == (94, 100)
    assert made.choose(BOTH) == Plan.split(124, 132)
    assert made.reason == "TPOT fails" and made.asked == pytest.approx((124.08, 132))


@pytest.mark.parametrize("factor", [tpot_factor, prefill_factor, waiting_factor])
def test_factors_are_1_on_the_whole_device(factor: object) -> None:
    assert callable(factor) and factor(100) == 1


@pytest.mark.parametrize(
    ("percent", "factor"), [(98, 1.112), (90, 1.097), (80, 1.119), (60, 1.51), (40, 3.75), (100 / 1.125, 1.0970)]
)
def test_the_parabola_of_waiting_is_not_monotonic(percent: float, factor: float) -> None:
    assert waiting_factor(percent) == pytest.approx(factor, abs=5e-3)


def test_the_other_factors() -> None:
    assert tpot_factor(80) == pytest.approx(1.25 * 0.60992 + 0.41531)
    assert prefill_factor(80) == pytest.approx(1.25 * 0.73244 + 0.31853)


def test_decisions_come_after_400_tpots() -> None:
    made = policy()
    for _ in range(WINDOW - 1):
        made.observe(ended(9.0, 8.0, 0.02))
        made.observe(ended(9.0, 8.0, None))  # of one token
        made.observe(ended(None, None, None))  # of none
    assert made.last_decision is None
    made.observe(ended(9.0, 8.0, 0.02))
    first = made.last_decision
    assert first is not None and first.reason is SplitReason.TTFT_FAILS
    for _ in range(WINDOW - 1):
        made.observe(ended(0.1, 0.0, 0.02))
    assert made.last_decision is first
    made.observe(ended(0.1, 0.0, 0.02))
    assert made.last_decision.reason is SplitReason.BOTH_HOLD, "both windows began anew"


def test_the_percentile_is_the_362nd_of_400_and_waiting_is_that_requests() -> None:
    made = policy()
    order = list(range(1, WINDOW + 1))
    random.Random(0).shuffle(order)
    for rank in order:
        made.observe(ended(rank / 1000, rank / 4000, rank / 10_000))
    assert made.last_decision is not None and made.last_decision.observed == (0.362, 0.0362)


def test_the_percentile_of_few_values_is_bounded() -> None:
    assert semi_pd_released._p90([3.0, 1.0, 2.0]) == 3.0
    assert semi_pd_released._p90([float(value) for value in range(11)]) == 10.0


@pytest.mark.parametrize(
    ("before", "observed", "after", "why"),
    [
        ((90, 90), (0.4, 0.1, 0.05), (90, 90), "both hold: nothing is given back"),
        ((90, 94), (0.6, 0.1, 0.2), (100, 100), "both fail"),
        ((100, 90), (0.6, 0.1, 0.2), (100, 90), "both fail and one has the whole device"),
        ((80, 100), (0.6, 0.1, 0.2), (80, 100), "the same of the other"),
        ((90, 80), (0.4, 0.1, 0.2), (90, 86), "decode rises by at most 3 steps"),
        ((90, 98), (0.4, 0.1, 0.2), (90, 100), "up to the whole device"),
        ((90, 80), (0.4, 0.1, 0.1), (90, 82), "0.11 was to hold, the first step is predicted to make it 0.098"),
        ((90, 80), (0.4, 0.1, 0.09091), (90, 82), "the margin: 0.1000010 fails"),
        ((90, 80), (0.4, 0.1, 0.0909), (90, 80), "and 0.09999 holds"),
        ((100, 100), (0.46, 0.0, 0.2), (96, 100), "predicted are 0.490, 0.497 and, at 94, 0.505"),
        ((100, 100), (0.49, 0.0, 0.2), (100, 100), "the first step is predicted to pass the target"),
        ((100, 100), (0.2, 0.0, 0.2), (94, 100), "by at most 3 steps"),
        ((82, 100), (0.2, 0.0, 0.2), (80, 100), "not below 80"),
        ((80, 100), (0.2, 0.0, 0.2), (80, 100), "at the floor"),
        ((80, 90), (0.7, 0.0, 0.05), (86, 90), "prefill rises"),
        ((80, 90), (0.505, 0.0, 0.05), (82, 90), "until it is predicted to hold"),
        ((100, 100), (0.6, 0.0, 0.085), (100, 94), "decode gives: 0.085 * 1.0642 at 94"),
        ((100, 82), (0.6, 0.0, 0.0909), (100, 80), "to the floor: the margin covers 3 steps"),
        ((94, 100), (0.46, 0.46, 0.2), (88, 100), "less waiting is predicted with fewer SMs"),
    ],
)
def test_rules(
    before: tuple[float, float], observed: tuple[float, float, float], after: tuple[float, float], why: str
) -> None:
    ttft, waiting, tpot = observed
    assert window(policy(before), ttft=ttft, waiting=waiting, tpot=tpot) == after, why


def test_predictions_are_of_the_split_that_was_chosen() -> None:
    made = policy((90, 80))
    window(made, ttft=0.4, waiting=0.1, tpot=0.2)
    decision = made.last_decision
    assert decision is not None and decision.given == (116, 112) and decision.asked == (90, 86)
    factor = (100 / 86 * 0.60992 + 0.41531) / (100 / 80 * 0.60992 + 0.41531)
    assert decision.predicted == pytest.approx((0.4, 0.2 * factor))
    made = policy((100, 100))
    window(made, ttft=0.3, waiting=0.1, tpot=0.2)
    assert made.last_decision is not None and made.last_decision.asked == (94, 100)
    ttft = 0.1 * waiting_factor(94) + 0.2 * prefill_factor(94)
    assert made.last_decision.predicted[0] == pytest.approx(ttft)


def test_it_stays_within_80_and_100_and_no_plan_is_illegal() -> None:
    for num_sms, splits in ((132, H100), (2, ((1, 1),)), (1, ())):
        rng = random.Random(num_sms)
        made = ReleasedSemiPD(Shares(num_sms, splits), ttft=0.5, tpot=0.1)
        asked = set()
        for _ in range(100):
            ttft, tpot = rng.uniform(0.3, 0.6), rng.uniform(0.07, 0.11)
            asked.add(window(made, ttft=ttft, waiting=rng.uniform(0, ttft), tpot=tpot))
            plan = made.choose(BOTH)
            for side, phase in enumerate(Phase):
                assert plan.num_sms(phase) in {split[side] for split in splits} | {num_sms}
        assert all(80 <= percent <= 100 for pair in asked for percent in pair) and len(asked) > 5


def test_any_schedule_under_it_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_pd_released, "WINDOW", 2)
    num_decisions = 0
    for seed in range(20):
        rng = random.Random(seed)
        made = make_policy(
            ReleasedSemiPDPolicy(),
            num_sms=2,
            splits=((1, 1),),
            default_split=(1, 1),
            max_prefill_tokens=12,
            slo=SLO(ttft=0.1, tpot=0.015),
            latency=LatencyModel(2),
        )
        assert isinstance(made, ReleasedSemiPD)
        driver = Driver(num_blocks=30, block_size=2, max_prefill_tokens=12, policy=made)
        driver.serve_random_load(rng)
        num_decisions += made.last_decision is not None
    assert num_decisions > 15


def test_it_is_named_and_has_no_arguments() -> None:
    assert parse_policy("semi-pd-released") == ReleasedSemiPDPolicy()
    assert parse_policy_spec("semi-pd-released") == ReleasedSemiPDPolicy()
    with pytest.raises(ConfigError, match="takes no arguments"):
        parse_policy_spec("semi-pd-released:step=2")

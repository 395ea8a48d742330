"""Algorithm 1 of the semi-PD paper: its windows, its rules, its model, and the shares that come of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from semipd.bench.engine_arguments import parse_policy_spec
from semipd.config import SLO, Phase, Plan, SemiPDPolicy, parse_policy
from semipd.errors import ConfigError
from semipd.request import Request, RequestTimings, SamplingParams
from semipd.sched.latency import LatencyModel
from semipd.sched.policies import make_policy
from semipd.sched.policy import Load
from semipd.sched.semi_pd import SemiPD, ShareModel, Shares, SplitReason, percentile
from tests.sched.oracle import Driver

H100 = tuple((132 - 8 * k, 8 * k) for k in range(1, 15))
TTFT, TPOT = 0.5, 0.1
GRID = [index / 50 for index in range(49)]
TTFT_SHAPE, TPOT_SHAPE = (0.6809, 0.022), (0.6284, 0.3818)  # of the paper's figure 10


def ended(now: float, ttft: float | None, tpot: float | None = None) -> RequestTimings:
    """A request that just had its first token, and ended."""
    return RequestTimings(arrival=now - (ttft or 0.0), queued=0.0, ttft=ttft, tpot=tpot, worst_gap=tpot, e2e=1.0)


def running(arrival: float, first_token: float | None) -> Request:
    """A request that decodes."""
    request = Request(
        request_id="r",
        prompt_token_ids=(1, 2),
        params=SamplingParams(),
        arrival_time=arrival,
        seed=0,
        max_tokens=8,
    )
    request.first_token_time = first_token
    return request


class Steps:
    """Step borders of a policy, each 20 ms after the one before."""

    def __init__(self, config: SemiPDPolicy, splits: Sequence[tuple[int, int]] = H100, num_sms: int = 132) -> None:
        self.shares = Shares(num_sms, splits)
        self.policy = SemiPD(self.shares, config, ttft=TTFT, tpot=TPOT)
        self.num_decode_steps = 0
        self.now = 1.0
        self.plan: Plan | None = None

    def decode(self, decoding: Sequence[Request] = ()) -> Plan:
        """A step border behind a decode step."""
        self.num_decode_steps += 1
        return self.border(decoding)

    def border(self, decoding: Sequence[Request] = ()) -> Plan:
        """A step border while both kinds of work wait."""
        self.now += 0.02
        self.plan = self.policy.choose(
            Load(
                chunks=((0, 9),),
                num_decodes=3,
                num_decode_steps=self.num_decode_steps,
                now=self.now,
                decoding=decoding,
            )
        )
        return self.plan

    def window(self, ttft: float | None, tpot: float | None = None) -> Plan:
        """A window of one step in which one request ended."""
        self.policy.observe(ended(self.now + 0.01, ttft, tpot))
        return self.decode()

    def observed(self) -> Sequence[object]:
        """(TTFT, TPOT) of the last window."""
        assert self.policy.last_decision is not None
        return self.policy.last_decision.observed


def one(**arguments: float) -> Steps:
    """A policy that decides after each decode step."""
    return Steps(SemiPDPolicy(window_size=1, **arguments))  # type: ignore[arg-type]


# ---- plans


def test_one_kind_of_work_has_the_whole_device_and_both_have_it_at_first() -> None:
    policy = one().policy
    assert policy.choose(Load(chunks=((0, 9),))) == Plan.exclusive(Phase.PREFILL, 132)
    assert policy.choose(Load(num_decodes=2)) == Plan.exclusive(Phase.DECODE, 132)
    assert policy.asked is None
    assert policy.choose(Load(chunks=((0, 9),), num_decodes=2)) == Plan.split(132, 132)
    assert policy.asked == (132, 132) and policy.reason == ""


@pytest.mark.parametrize(
    ("percents", "given"),
    [
        ((100, 100), (132, 132)),
        ((94, 94), (124, 132)),  # 124.08: prefill has 124, decode nothing between 112 and 132
        ((92, 92), (124, 112)),
        ((80, 80), (108, 104)),
        ((100, 56), (132, 72)),
        ((100, 1), (132, 8)),
        ((50, 50), (68, 64)),  # up to 100 in all, shares stay disjoint
        ((97, 3), (124, 8)),
        ((30, 30), (68, 64)),
        ((1, 99), (20, 112)),
    ],
)
def test_percentages_become_whole_groups_of_8_sms(percents: tuple[float, float], given: tuple[int, int]) -> None:
    assert Shares(132, H100).round(percents) == given


@pytest.mark.parametrize(
    ("percents", "given"), [((100, 100), (2, 2)), ((100, 76), (2, 2)), ((100, 74), (2, 1)), ((50, 50), (1, 1))]
)
def test_two_cores_have_one_split(percents: tuple[float, float], given: tuple[int, int]) -> None:
    assert Shares(2, ((1, 1),)).round(percents) == given


def test_a_device_that_cannot_be_split_is_shared() -> None:
    assert Shares(132, ()).round((10, 20)) == (132, 132)


def test_a_tie_gives_the_larger_share() -> None:
    assert Shares(16, ((8, 8),)).round((75, 75)) == (16, 16)


# ---- the rules; one observation leaves the paper's curve through it, which makes predictions a matter of arithmetic


def test_ttft_fails_so_decode_gives_until_ttft_is_predicted_to_hold() -> None:
    steps = one()
    assert steps.window(0.6, 0.05) == Plan.split(132, 112)
    decision = steps.policy.last_decision
    assert decision is not None and decision.reason is SplitReason.TTFT_FAILS
    assert decision.asked == (100, 92) and decision.given == (132, 112)  # 98, 96 and 94 still round to 132
    assert decision.observed == (0.6, 0.05)
    ttft = 0.6 * (0.6809 / (132 / 244 - 0.3) + 0.022) / (0.6809 / (0.5 - 0.3) + 0.022)
    tpot = 0.05 * (0.6284 / (112 / 244) + 0.3818) / (0.6284 / 0.5 + 0.3818)
    assert decision.predicted == pytest.approx((ttft, tpot))
    assert ttft == pytest.approx(0.4986, abs=1e-4)
    assert steps.policy.reason == "TTFT fails" and steps.policy.asked == pytest.approx((132, 121.44))
    steps.border()
    assert steps.policy.reason == "", "only the first plan of a new split is explained"


@pytest.mark.parametrize(("max_step", "percent", "given"), [(1, 98, 132), (5, 90, 116), (50, 54, 68)])
def test_tpot_fails_so_prefill_gives_up_to_max_step(max_step: int, percent: float, given: int) -> None:
    steps = one(max_step=max_step)
    assert steps.window(0.1, 0.12) == Plan.split(given, 132)
    decision = steps.policy.last_decision
    assert decision is not None and decision.asked == (percent, 100) and decision.reason is SplitReason.TPOT_FAILS
    tpot = 0.12 * (0.6284 / (132 / (132 + given)) + 0.3818) / (0.6284 / 0.5 + 0.3818)
    assert decision.predicted[1] == pytest.approx(tpot)
    assert (tpot <= TPOT) == (max_step == 50)


def test_the_failing_side_is_raised_before_the_other_is_lowered() -> None:
    steps = one(prefill_percent=60, decode_percent=92, max_step=2)
    steps.window(9.0, 0.05)
    assert steps.policy.last_decision is not None and steps.policy.last_decision.asked == (64, 92)
    steps = one(prefill_percent=60, decode_percent=99, step_size=0.5, max_step=4)
    steps.window(0.1, 9.0)
    assert steps.policy.last_decision is not None and steps.policy.last_decision.asked == (59, 100)


@pytest.mark.parametrize(
    ("ttft", "tpot", "reason"),
    [(0.6, 0.2, SplitReason.BOTH_FAIL), (0.4, 0.05, SplitReason.BOTH_HOLD), (0.5, 0.1, SplitReason.BOTH_HOLD)],
)
def test_nothing_changes_when_both_fail_or_both_hold(ttft: float, tpot: float, reason: SplitReason) -> None:
    steps = one(prefill_percent=80, decode_percent=70)
    assert steps.window(ttft, tpot) == Plan.split(108, 96)
    decision = steps.policy.last_decision
    assert decision is not None and decision.reason is reason and decision.asked == (80, 70)


def test_a_side_keeps_its_smallest_share() -> None:
    steps = one(decode_percent=8, step_size=1)
    for _ in range(3):
        assert steps.window(90.0, 0.05) == Plan.split(132, 8)
        assert steps.policy.last_decision is not None
        assert steps.policy.last_decision.asked == (100, 7)  # 6 % are less than 8 of 132


def test_a_device_that_cannot_be_split_keeps_its_percentages() -> None:
    steps = Steps(SemiPDPolicy(window_size=1), splits=(), num_sms=1)
    assert steps.window(9.0, 0.05) == Plan.split(1, 1)
    assert steps.policy.last_decision is not None and steps.policy.last_decision.asked == (100, 100)


# ---- windows


def test_a_window_is_so_many_decode_steps() -> None:
    steps = Steps(SemiPDPolicy(window_size=3))
    for _ in range(2):
        steps.policy.observe(ended(steps.now + 0.01, 0.6, 0.05))
        steps.border()  # the other lane asks, or this one again
        steps.num_decode_steps = 0  # a step with prompt tokens
        steps.border()
        steps.decode()
    assert steps.policy.last_decision is None
    assert steps.decode() == Plan.split(132, 112)
    for _ in range(2):
        steps.decode()
    before = steps.policy.last_decision
    steps.decode()
    assert steps.policy.last_decision is not before


def test_without_measurements_targets_hold_and_nothing_is_predicted() -> None:
    steps = one()
    steps.decode()
    decision = steps.policy.last_decision
    assert decision is not None and decision.reason is SplitReason.BOTH_HOLD
    assert decision.observed == (None, None) and decision.predicted == (None, None)
    steps.window(0.6)
    assert steps.policy.last_decision is not None
    assert steps.policy.last_decision.reason is SplitReason.TTFT_FAILS
    assert steps.policy.last_decision.predicted[1] is None


def test_each_first_token_counts_in_its_own_window() -> None:
    steps = Steps(SemiPDPolicy(window_size=2, percentile=100))
    request = running(arrival=0.0, first_token=steps.now + 0.03)
    steps.decode([request])
    steps.decode([request, running(arrival=0.9, first_token=None)])
    assert steps.observed() == (pytest.approx(1.03), None)
    timings = RequestTimings(arrival=0.0, queued=0.0, ttft=1.03, tpot=0.04, worst_gap=0.1, e2e=2.0)
    steps.policy.observe(timings)  # it ended in the next window
    steps.policy.observe(ended(steps.now + 0.01, 0.2))  # and another began and ended there
    steps.decode()
    steps.decode()
    assert steps.observed() == (0.2, 0.04)
    steps.decode()
    steps.decode()
    assert steps.observed() == (None, None)


def test_percentiles() -> None:
    values = [float(value) for value in range(10, 0, -1)]
    assert percentile(values, 90) == 9
    assert percentile(values, 91) == 10
    assert percentile(values, 100) == 10
    assert percentile(values, 0.1) == 1
    assert percentile([7.0], 50) == 7
    assert percentile([], 50) is None


# ---- the model


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize(("a", "b", "pole"), [(0.05, 0.04, 0.3), (0.1, 0.02, 0.1), (0.05, 0.05, 0.16), (0.1, 0.1, 0.0)])
def test_the_fit_of_ttft_recovers_its_coefficients(a: float, b: float, pole: float, noise: float) -> None:
    rng = random.Random(0)
    model = ShareModel(TTFT_SHAPE, GRID)
    first = max(0.2, pole + 0.06)
    for _ in range(150):
        share = rng.uniform(first, 0.9)
        model.observe(share, (a / (share - pole) + b) * rng.lognormvariate(0, noise))
    assert model.coefficients is not None
    fit_a, fit_b, fit_pole = model.coefficients
    assert fit_pole == pytest.approx(pole, abs=0.02 + noise)
    assert fit_a == pytest.approx(a, rel=0.15 + 4 * noise)
    assert fit_b == pytest.approx(b, abs=0.02 + noise)
    for index in range(8):
        share = first + index * (0.9 - first) / 7
        assert model.predict(share) == pytest.approx(a / (share - pole) + b, rel=0.02 + noise)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_fit_of_tpot_recovers_its_coefficients(noise: float) -> None:
    rng = random.Random(0)
    model = ShareModel(TPOT_SHAPE, (0.0,))
    for _ in range(150):
        share = rng.uniform(0.1, 0.7)
        model.observe(share, (0.004 / share + 0.012) * rng.lognormvariate(0, noise))
    assert model.coefficients == pytest.approx((0.004, 0.012, 0.0), rel=0.02 + 2 * noise)


def test_an_unvaried_share_keeps_the_shape_of_the_paper() -> None:
    rng = random.Random(0)
    model = ShareModel(TTFT_SHAPE, GRID)
    assert model.predict(0.5) is None
    for _ in range(1000):
        model.observe(0.5, 0.4 * rng.lognormvariate(0, 0.05))
    shape = (0.6809 / 0.3 + 0.022) / (0.6809 / 0.2 + 0.022)
    assert model.predict(0.5) == pytest.approx(0.4, rel=0.05)
    assert model.predict(0.6) == pytest.approx(0.4 * shape, rel=0.1)


def test_a_new_load_is_learned_and_more_sms_never_predict_longer_times() -> None:
    rng = random.Random(0)
    for shape, grid in ((TTFT_SHAPE, GRID), (TPOT_SHAPE, [0.0])):
        model = ShareModel(shape, grid)
        for level in (0.1, 3.0, 0.02):
            for _ in range(100):
                model.observe(rng.uniform(0.1, 0.9), level * rng.lognormvariate(0, 0.2))
                assert model.coefficients is not None and min(model.coefficients) >= 0
                curve = [model.predict(share / 20) or 0.0 for share in range(1, 21)]
                assert curve == sorted(curve, reverse=True) and curve[-1] > 0
            assert model.predict(0.5) == pytest.approx(level, rel=0.3)


def test_a_jump_of_the_load_is_learned_in_two_windows() -> None:
    model = ShareModel(TTFT_SHAPE, GRID)
    for level in (0.03, 3.0, 0.05):
        for _ in range(60):
            model.observe(0.5, level)
        model.observe(0.5, 20 * level)
        model.observe(0.5, 20 * level)
        assert model.predict(0.5) == pytest.approx(20 * level, rel=0.1)


def test_times_that_are_not_positive_teach_nothing() -> None:
    model = ShareModel(TTFT_SHAPE, GRID)
    model.observe(0.5, 0.0)
    assert model.coefficients is None


# ---- closed loops


class Plant:
    """Answers a split with TTFT(x') and TPOT(y')."""

    def __init__(self, ttft: Callable[[float], float], tpot: Callable[[float], float], *, seed: int = 0) -> None:
        self.steps = Steps(SemiPDPolicy(window_size=10))
        self._ttft, self._tpot = ttft, tpot
        self._rng = random.Random(seed)

    def window(self) -> Plan:
        """Ten decode steps, in each of which four requests end."""
        for _ in range(10):
            plan = self.steps.decode()
            share = plan.prefill_sms / (plan.prefill_sms + plan.decode_sms)
            for _ in range(4):
                noise = self._rng.lognormvariate(0, 0.05)
                tpot = self._tpot(1 - share) * self._rng.lognormvariate(0, 0.05)
                self.steps.policy.observe(ended(self.steps.now + 0.01, self._ttft(share) * noise, tpot))
        return plan


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ttft", "tpot"),
    [
        (lambda x: 0.05 / max(x - 0.2, 0.02) + 0.04, lambda y: 0.04 / y + 0.03),  # decode needs more
        (lambda x: 0.08 / max(x - 0.4, 0.02) + 0.1, lambda y: 0.015 / y + 0.03),  # prefill needs more
    ],
)
def test_a_loop_settles_where_both_targets_hold(
    ttft: Callable[[float], float], tpot: Callable[[float], float], seed: int
) -> None:
    plant = Plant(ttft, tpot, seed=seed)
    plans = [plant.window() for _ in range(50)]
    assert len(set(plans[15:])) == 1 and plans[0] != plans[-1], "it moves, then rests"
    share = plans[-1].prefill_sms / (plans[-1].prefill_sms + plans[-1].decode_sms)
    p90 = 1.0662  # of the noise
    assert ttft(share) * p90 <= TTFT and tpot(1 - share) * p90 <= TPOT


def test_a_loop_whose_targets_cannot_be_met_stays_within_the_device() -> None:
    plant = Plant(lambda x: 0.08 / max(x - 0.4, 0.02) + 0.1, lambda y: 0.06 / y + 0.03)
    assert {plant.window() for _ in range(30)} == {Plan.split(132, 132)}


@pytest.mark.parametrize(
    ("num_sms", "splits"), [(132, H100), (2, ((1, 1),)), (3, ((2, 1), (1, 2))), (1, ()), (132, ((84, 48),))]
)
def test_no_plan_is_illegal_whatever_is_observed(num_sms: int, splits: Sequence[tuple[int, int]]) -> None:
    rng = random.Random(num_sms)
    offered = {phase: {split[side] for split in splits} | {num_sms} for side, phase in enumerate(Phase)}
    seen = set()
    for _ in range(40):
        config = SemiPDPolicy(
            window_size=rng.randint(1, 3),
            step_size=rng.choice([0.5, 2, 7.3, 100]),
            max_step=rng.randint(1, 9),
            percentile=rng.choice([1, 50, 90, 100]),
            prefill_percent=rng.choice([100, rng.uniform(1, 100)]),
            decode_percent=rng.choice([100, rng.uniform(1, 100)]),
        )
        steps = Steps(config, splits, num_sms)
        for _ in range(60):
            plan = steps.window(rng.lognormvariate(-0.7, 1), rng.lognormvariate(-2.3, 1))
            assert all(plan.num_sms(phase) in offered[phase] for phase in Phase)
            decision = steps.policy.last_decision
            if decision is not None:
                assert all(0 < percent <= 100 for percent in decision.asked)
                if splits and sum(decision.asked) <= 100:
                    assert decision.given in splits
            seen.add(plan)
    assert len(seen) >= min(len(splits), 2) + 1


@pytest.mark.parametrize("slo", [None, SLO(ttft=1e-6, tpot=1.0), SLO(ttft=9.0, tpot=1e-6), SLO(ttft=0.2, tpot=0.02)])
def test_any_schedule_under_it_gives_the_same_tokens(slo: SLO | None) -> None:
    splits_seen = set()
    for seed in range(20):
        rng = random.Random(seed)
        policy = make_policy(
            SemiPDPolicy(window_size=2, step_size=20),
            num_sms=2,
            splits=((1, 1),),
            default_split=(1, 1),
            max_prefill_tokens=12,
            slo=slo,
            latency=LatencyModel(2),
        )
        assert isinstance(policy, SemiPD)
        driver = Driver(num_blocks=30, block_size=2, max_prefill_tokens=12, policy=policy)
        driver.serve_random_load(rng)
        assert policy.last_decision is not None
        splits_seen.add(policy.last_decision.given)
    if slo is not None and slo.ttft == 1e-6:
        assert (2, 1) in splits_seen
    if slo is not None and slo.tpot == 1e-6:
        assert (1, 2) in splits_seen


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, "window_size is 0; expected a positive integer"),
        ({"max_step": 1.5}, "max_step is 1.5; expected a positive integer"),
        ({"step_size": 0}, "step_size is 0; expected a percentage above 0 and up to 100"),
        ({"percentile": 101}, "percentile is 101"),
        ({"prefill_percent": "80"}, "prefill_percent is '80'"),
        ({"decode_percent": float("nan")}, "decode_percent is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SemiPDPolicy(**arguments)  # type: ignore[arg-type]


def test_it_is_named_and_takes_arguments_in_a_benchmark() -> None:
    assert parse_policy("semi-pd") == SemiPDPolicy()
    spec = "semi-pd:window_size=50,percentile=99"
    assert parse_policy_spec(spec) == SemiPDPolicy(window_size=50, percentile=99)


@pytest.mark.parametrize(
    ("slo", "targets"),
    [
        (None, (0.5, 0.1)),
        (SLO(gap=0.05), (0.5, 0.1)),
        (SLO(ttft=0.3), (0.3, 0.1)),
        (SLO(ttft=1, tpot=0.02), (1, 0.02)),
    ],
)
def test_targets_are_the_engines_or_the_released_ones(slo: SLO | None, targets: tuple[float, float]) -> None:
    for factor, reason in ((0.999, SplitReason.BOTH_HOLD), (1.001, SplitReason.BOTH_FAIL)):
        policy = make_policy(
            SemiPDPolicy(window_size=1),
            num_sms=132,
            splits=H100,
            default_split=(84, 48),
            max_prefill_tokens=2048,
            slo=slo,
            latency=LatencyModel(132),
        )
        assert isinstance(policy, SemiPD)
        policy.observe(ended(1.0, factor * targets[0], factor * targets[1]))
        policy.choose(Load(num_decodes=1, num_decode_steps=1, now=1.0))
        assert policy.last_decision is not None and policy.last_decision.reason is reason

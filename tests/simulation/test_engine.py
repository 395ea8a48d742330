"""The simulated engine: closed forms, the rules of plans, and that nothing is lost."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from benchmarks.simulation.device import DefaultStepTimes, DeviceStep, StepTimes, VirtualClock, VirtualDevice
from benchmarks.simulation.engine import EngineShape, SimulatedEngine
from semipd.bench.engine_arguments import parse_policy_spec
from semipd.config import SLO, Phase, PlanKind, PolicyConfig
from semipd.request import FinishReason
from semipd.sched.events import StepEvents
from semipd.sched.latency import StepKind, StepWork

POLICIES = [
    "static",
    "static:prefill_sms=100,decode_sms=32",
    "exclusive",
    "mixed",
    "mixed:token_budget=none",
    "cadence",
]


class ConstantTimes:
    """A step of each kind takes its own time, and `beside` times as long beside the other lane."""

    def __init__(self, prefill: float = 0.1, decode: float = 0.01, mixed: float = 0.05, beside: float = 1.0) -> None:
        self._seconds = {StepKind.PREFILL: prefill, StepKind.DECODE: decode, StepKind.MIXED: mixed}
        self._beside = beside

    def seconds(self, work: StepWork) -> float:
        return self._seconds[work.kind] * (self._beside if work.other_sms else 1.0)


class Run:
    """An engine with what it said and did."""

    def __init__(
        self, policy: PolicyConfig, *, slo: SLO | None = None, times: StepTimes | None = None, **options: float
    ) -> None:
        self.steps: list[DeviceStep] = []
        self.tokens: dict[str, list[float]] = {}
        self.ended: list[str] = []
        shape = EngineShape(**{"noise": 0.0, "slowdown": 1.0, "host_delay": 0.0, "launch_delay": 0.0, **options})  # type: ignore[arg-type]
        self.engine = SimulatedEngine(
            shape,
            policy=policy,
            slo=slo,
            times=times or ConstantTimes(),
            emit=self._on_events,
            on_step=self.steps.append,
        )

    def _on_events(self, events: StepEvents) -> None:
        for request in events.requests:
            self.tokens.setdefault(request.request_id, []).append(self.engine.clock.now)
        self.ended += [request.request_id for request in events.finished]


def drive(run: Run, seed: int, num_requests: int) -> None:
    """Random requests at random times, a few of them aborted; then everything ends."""
    rng = random.Random(seed)
    now = 0.0
    requests = []
    for index in range(num_requests):
        now += rng.expovariate(20.0)
        run.engine.advance(now)
        prompt = [index % 50, *([3] * rng.choice([5, 100, 700, 5000]))]
        requests.append(run.engine.submit(prompt, rng.randrange(1, 200)))
        if rng.random() < 0.1:
            run.engine.abort(rng.choice(requests))
    run.engine.advance(now + 600.0)


def test_times_of_a_lone_request_are_those_of_its_steps() -> None:
    run = Run(parse_policy_spec("exclusive"))
    run.engine.advance(1.0)
    request = run.engine.submit([1] * 5000, 11)  # prefill steps of 2048, 2048 and 904 tokens
    run.engine.advance(10.0)
    times = run.tokens[request.request_id]
    assert times[0] == pytest.approx(1.0 + 3 * 0.1)
    assert [b - a for a, b in pairwise(times)] == pytest.approx([0.01] * 10)
    timings = request.timings(times[-1])
    assert timings.ttft == pytest.approx(0.3) and timings.tpot == pytest.approx(0.01)


def test_one_step_ahead_hides_the_host_within_a_lane() -> None:
    run = Run(parse_policy_spec("exclusive"), host_delay=0.002)
    request = run.engine.submit([1] * 5000, 11)
    run.engine.advance(10.0)
    times = run.tokens[request.request_id]
    assert times[0] == pytest.approx(0.002 + 3 * 0.1 + 0.002)  # waking up, three steps, and reading the last
    assert times[1] - times[0] == pytest.approx(0.002 + 0.01 + 0.002)  # the decode lane wakes up, steps and reads
    assert [b - a for a, b in pairwise(times[1:])] == pytest.approx([0.01] * 9)


def test_not_ahead_the_host_shows_in_each_step() -> None:
    run = Run(parse_policy_spec("exclusive"), host_delay=0.002, decode_steps_ahead=0)
    request = run.engine.submit([1] * 64, 11)
    run.engine.advance(10.0)
    times = run.tokens[request.request_id]
    assert [b - a for a, b in pairwise(times[1:])] == pytest.approx([0.012] * 9)


def test_a_launch_shows_where_no_step_hides_it() -> None:
    run = Run(parse_policy_spec("exclusive"), launch_delay=0.004)
    request = run.engine.submit([1] * 5000, 11)
    run.engine.advance(10.0)
    times = run.tokens[request.request_id]
    assert times[0] == pytest.approx(0.004 + 3 * 0.1)
    assert times[1] - times[0] == pytest.approx(0.004 + 0.01)  # decode begins when the prompt's token is there
    assert [b - a for a, b in pairwise(times[1:])] == pytest.approx([0.01] * 9)


def test_a_lane_commits_nothing_while_it_launches() -> None:
    run = Run(parse_policy_spec("exclusive"), launch_delay=0.03)  # three times as long as a step of decodes
    request = run.engine.submit([1] * 64, 11)
    run.engine.advance(10.0)
    times = run.tokens[request.request_id]
    assert (times[-1] - times[0]) / 10 == pytest.approx(0.03, abs=0.005)


def test_a_step_that_is_not_launched_yet_holds_nobody_up() -> None:
    device = VirtualDevice(ConstantTimes(prefill=1.0, decode=0.2, beside=1.0))
    prefill = device.submit(Phase.PREFILL, StepWork(84, num_prompt_tokens=8, prompt_pairs=36), 0.0, ready=0.5)
    decode = device.submit(Phase.DECODE, StepWork(48, num_decodes=1), 0.1, ready=0.1)
    ended: list[DeviceStep] = []
    while device.next_event < math.inf:
        ended += device.advance(device.next_event)
    assert ended == [decode, prefill]
    assert (prefill.start, prefill.end) == (0.5, 1.5)
    assert decode.start == 0.1 and decode.end == pytest.approx(0.3)


def test_the_rest_of_a_step_goes_on_at_the_rate_beside_the_other_lane() -> None:
    ended: list[DeviceStep] = []
    device = VirtualDevice(ConstantTimes(prefill=1.0, decode=0.2, beside=2.0), on_step=ended.append)
    device.submit(Phase.PREFILL, StepWork(84, num_prompt_tokens=8, prompt_pairs=36), 0.0, ready=0.0)
    device.advance(0.0)
    device.submit(Phase.DECODE, StepWork(48, num_decodes=1), 0.5, ready=0.5)  # half of the prefill step is done
    assert device.next_event == pytest.approx(0.9)  # 0.4 s beside it, in which prefill does 0.2 of its step
    device.advance(device.next_event)
    assert device.next_event == pytest.approx(0.9 + 0.3)
    device.advance(device.next_event)
    assert [(step.phase, round(step.end, 6)) for step in ended] == [(Phase.DECODE, 0.9), (Phase.PREFILL, 1.2)]


def test_noise_has_the_spread_asked_for() -> None:
    run = Run(parse_policy_spec("exclusive"), noise=0.1)
    run.engine.submit([1], 2000)
    run.engine.advance(100.0)
    seconds = [step.end - step.start for step in run.steps if step.phase is Phase.DECODE]
    assert len(set(seconds)) > 1900
    assert sum(0.009 < s < 0.0111 for s in seconds) / len(seconds) == pytest.approx(0.68, abs=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_nothing_is_held(policy: str) -> None:
    run = Run(
        parse_policy_spec(policy),
        slo=SLO(ttft=0.5, tpot=0.025),
        times=DefaultStepTimes(132),
        noise=0.05,
        host_delay=2e-4,
        kv_cache_tokens=5_600,  # preempts
        block_size=16,
        max_num_seqs=12,
    )
    drive(run, seed=1, num_requests=150)
    statistics = run.engine.statistics()
    assert len(set(run.ended)) == len(run.ended) == 150
    assert sum(statistics.num_finished.values()) == 150 and statistics.num_finished[FinishReason.ABORT] > 0
    assert statistics.num_preemptions > 0
    assert statistics.num_waiting == 0 and statistics.kv_cache_usage == 0.0
    assert run.engine.allocator.num_deferred_blocks == 0
    assert run.engine.next_event == float("inf")
    run.engine.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_lanes_never_hold_the_same_sms_and_steps_of_a_lane_follow_each_other(policy: str) -> None:
    run = Run(parse_policy_spec(policy), times=DefaultStepTimes(132), noise=0.05, host_delay=2e-4)
    drive(run, seed=2, num_requests=100)
    ends = [step.end for step in run.steps]
    assert ends == sorted(ends)
    for phase in Phase:
        for before, after in pairwise(step for step in run.steps if step.phase is phase):
            assert before.start < before.end <= after.start
    by_start = sorted(run.steps, key=lambda step: step.start)
    prefills = [step for step in by_start if step.phase is Phase.PREFILL]
    decodes = [step for step in by_start if step.phase is Phase.DECODE]
    num_beside = 0
    for prefill in prefills:
        for decode in decodes:
            if decode.start < prefill.end and prefill.start < decode.end:
                num_beside += 1
                assert prefill.work.num_sms + decode.work.num_sms <= 132  # shrink first
    assert (num_beside > 0) == policy.startswith("static")
    kinds = {step.work.kind for step in run.steps}
    assert (StepKind.MIXED in kinds) == policy.startswith("mixed")
    plan = run.engine.statistics().plan
    assert plan is not None
    assert plan.kind is (PlanKind.MIXED if policy.startswith("mixed") else PlanKind.EXCLUSIVE)


def test_a_split_is_what_was_asked_for() -> None:
    run = Run(parse_policy_spec("static:prefill_sms=100,decode_sms=32"), times=ConstantTimes(decode=0.03))
    run.engine.submit([1] * 100, 200)
    run.engine.advance(1.0)
    run.engine.submit([2] * 20_000, 2)
    run.engine.advance(1.5)
    assert {step.work.num_sms for step in run.steps if step.start > 1.1 and step.phase is Phase.PREFILL} == {100}
    assert {step.work.num_sms for step in run.steps if step.start > 1.1 and step.phase is Phase.DECODE} == {32}


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    runs = [Run(parse_policy_spec("static"), noise=0.05, host_delay=2e-4) for _ in range(2)]
    for run in runs:
        drive(run, seed=3, num_requests=40)
    assert runs[0].tokens == runs[1].tokens
    assert [(s.start, s.end, s.work) for s in runs[0].steps] == [(s.start, s.end, s.work) for s in runs[1].steps]
    other = Run(parse_policy_spec("static"), noise=0.05, host_delay=2e-4)
    drive(other, seed=4, num_requests=40)
    assert other.tokens != runs[0].tokens


def test_the_clock_never_goes_back() -> None:
    clock = VirtualClock()
    clock.advance(2.0)
    with pytest.raises(AssertionError, match="moved back"):
        clock.advance(1.0)


def test_a_mixed_step_may_be_larger_than_those_of_the_prefill_lane() -> None:
    run = Run(parse_policy_spec("mixed:token_budget=4096"))
    run.engine.submit([3] * 4000, 2)
    run.engine.advance(10.0)
    assert [step.work.num_prompt_tokens for step in run.steps][0] >= 4000


def test_the_default_shape_is_that_of_an_h100() -> None:
    shape = EngineShape()
    assert shape.splits[0] == (124, 8) and shape.splits[-1] == (20, 112) and len(shape.splits) == 14
    assert shape.default_split == (84, 48)

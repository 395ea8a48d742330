"""The latency model: true on an H100's steps, quick to learn, slow to be fooled, and never implausible."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.sched.latency import LatencyModel, StepKind, StepWork, count_pairs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NUM_SMS = 132
DECODES = 64  # of the co-runs measured
PROMPT = 2048  # tokens of their prefill steps

Table = list[tuple[StepWork, float]]

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="benchmarks/results is not here")


def _decode(num_decodes: int, context: int, num_sms: int = NUM_SMS, other_sms: int = 0) -> StepWork:
    return StepWork.of(num_sms, other_sms=other_sms, num_decodes=num_decodes, context_tokens=num_decodes * context)


def _prefill(length: int, num_sms: int = NUM_SMS, other_sms: int = 0, start: int = 0) -> StepWork:
    return StepWork.of(num_sms, other_sms=other_sms, chunks=[(start, length)])


def _rows(part: str) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = json.loads((RESULTS / f"h100_lanes_{part}.json").read_text())["rows"]
    return rows


def _h100() -> Table:
    """Steps of Llama-3-8B that benchmarks/lanes.py measured."""
    table: Table = []
    for row in _rows("decode"):
        if row["sampling"] == "greedy":
            table.append((_decode(int(row["rows"]), 1024), float(row["step_ms"]) * 1e-3))
    for row in _rows("prefill"):
        table.append((_prefill(int(row["tokens"])), float(row["gpu_ms"]) * 1e-3))
    for row in _rows("corun_1k") + _rows("corun_4k"):
        kind, argument = str(row["plan"]).split()
        context, step = int(row["context"]), float(row["tpot_ms"]) * 1e-3
        if kind == "mixed":
            chunk = int(argument) - DECODES
            starts = range(0, PROMPT - chunk + 1, chunk)
            pairs = sum(count_pairs(start, chunk) for start in starts) // len(starts)
            table.append((StepWork(NUM_SMS, 0, chunk, pairs, DECODES, DECODES * context), step))
            continue
        prefill, decode = map(int, argument.split("/"))
        table += [
            (_decode(DECODES, context, decode, prefill), step),
            (_decode(DECODES, context, decode), float(row["alone_ms"]) * 1e-3),
            (_prefill(PROMPT, prefill, decode), PROMPT / float(row["prefill_tok_s"])),
            (_prefill(PROMPT, prefill), PROMPT / float(row["alone_tok_s"])),
        ]
    return table


def _fit(table: Sequence[tuple[StepWork, float]], noise: float = 0.03, passes: int = 30) -> LatencyModel:
    model, rng, table = LatencyModel(NUM_SMS), random.Random(0), list(table)
    for _ in range(passes):
        rng.shuffle(table)
        for work, seconds in table:
            model.observe(work, seconds * rng.lognormvariate(0.0, noise))
    return model


def _errors(model: LatencyModel, table: Sequence[tuple[StepWork, float]]) -> list[float]:
    return sorted(abs(model.predict(work) / seconds - 1.0) for work, seconds in table)


def _disjoint(table: Table) -> Table:
    return [step for step in table if step[0].num_sms + step[0].other_sms <= NUM_SMS]


def _true(work: StepWork, scale: float = 1.0) -> float:
    """A device of our own: of the model's form, with other numbers."""
    rows = work.num_decodes + work.num_prompt_tokens
    products = math.hypot(2e-3, 60e-6 * rows * NUM_SMS / work.num_sms)
    return scale * (products + 8e-9 * work.context_tokens + 2e-9 * work.prompt_pairs)


def _varied(rng: random.Random) -> StepWork:
    decodes = rng.choice([0, 1, 7, 40, 200])
    chunks = [(rng.randrange(4000), rng.randrange(1, 2000))] if not decodes or rng.random() < 0.5 else []
    return StepWork.of(NUM_SMS, chunks=chunks, num_decodes=decodes, context_tokens=decodes * rng.randrange(1, 8000))


def test_work_of_chunks_counts_every_pair() -> None:
    work = StepWork.of(8, other_sms=4, chunks=[(3, 2), (0, 4)], num_decodes=2, context_tokens=20)
    assert work == StepWork(8, 4, 6, sum([4, 5]) + sum([1, 2, 3, 4]), 2, 20)


def test_kind_follows_from_the_work() -> None:
    assert _decode(1, 1).kind is StepKind.DECODE
    assert _prefill(1).kind is StepKind.PREFILL
    assert StepWork(8, 0, 1, 1, 1, 1).kind is StepKind.MIXED


def test_h100_all_steps_are_fitted() -> None:
    """Disjoint shares within 6 %: prefill depends on decode's contexts, which it cannot see, by up to 12 %."""
    table = _h100()
    model = _fit(table, passes=8)
    assert _errors(model, _disjoint(table))[-1] < 0.06
    assert statistics.median(_errors(model, table)) < 0.02


def test_h100_steps_held_out() -> None:
    """A third of the rows, six times, noise of 3 % on the others.

    Lanes that overlap have two rows each, and persistent kernels take SMs from each other in ways that it has no terms
    for: what is left out of those is known roughly.
    """
    table, rng, errors, disjoint = _h100(), random.Random(3), list[float](), list[float]()
    for _ in range(6):
        rng.shuffle(table)
        third = len(table) // 3
        model = _fit(table[third:])
        errors += _errors(model, table[:third])
        disjoint += _errors(model, _disjoint(table[:third]))
    assert statistics.median(errors) < 0.08
    assert sorted(errors)[int(0.90 * len(errors))] < 0.30
    assert max(errors) < 0.50
    assert statistics.median(disjoint) < 0.05
    assert sorted(disjoint)[int(0.95 * len(disjoint))] < 0.15


def test_h100_mixed_steps_follow_from_the_others() -> None:
    table = _h100()
    mixed = [step for step in table if step[0].kind is StepKind.MIXED]
    errors = _errors(_fit([step for step in table if step not in mixed]), mixed)
    assert errors[-1] < 0.10


@pytest.mark.parametrize("share", [48, 56])
def test_h100_a_split_follows_from_its_neighbours(share: int) -> None:
    table = _h100()
    unseen = [step for step in table if step[0].num_sms in (share, NUM_SMS - share)]
    errors = _errors(_fit([step for step in table if step not in unseen]), unseen)
    assert errors[-1] < 0.10


def test_h100_the_whole_device_says_roughly_what_shares_give() -> None:
    table = _h100()
    whole = [step for step in table if step[0].num_sms == NUM_SMS and not step[0].other_sms]
    errors = _errors(_fit(whole), table)
    assert errors[-1] < 0.60 and errors[int(0.95 * len(errors))] < 0.25


def test_converges_under_noise() -> None:
    rng, model = random.Random(1), LatencyModel(NUM_SMS)
    for _ in range(600):
        work = _varied(rng)
        model.observe(work, _true(work) * rng.lognormvariate(0.0, 0.1))
    table = [(work, _true(work)) for work in (_varied(rng) for _ in range(300))]
    errors = _errors(model, table)
    assert statistics.median(errors) < 0.05
    assert errors[int(0.95 * len(errors))] < 0.15


def test_a_drift_is_followed() -> None:
    """The device becomes half as fast over 100 steps."""
    rng, model = random.Random(2), LatencyModel(NUM_SMS)
    for step in range(500):
        work = _varied(rng)
        model.observe(work, _true(work, 1.0 + min(max(step - 300, 0), 100) / 100) * rng.lognormvariate(0.0, 0.02))
    table = [(work, _true(work, 2.0)) for work in (_varied(rng) for _ in range(200))]
    assert statistics.median(_errors(model, table)) < 0.04


@pytest.mark.parametrize("scale", [0.2, 1.3, 5.0])
def test_a_new_level_is_learned_within_ten_steps(scale: float) -> None:
    rng, model, work = random.Random(3), LatencyModel(NUM_SMS), _decode(64, 1000)
    for _ in range(1000):
        model.observe(work, _true(work) * rng.lognormvariate(0.0, 0.02))
    for _ in range(10):
        model.observe(work, _true(work, scale) * rng.lognormvariate(0.0, 0.02))
    assert model.predict(work) == pytest.approx(_true(work, scale), rel=0.06)


def test_long_steady_load_leaves_it_calm_and_awake() -> None:
    rng, model, steady = random.Random(4), LatencyModel(NUM_SMS), _decode(64, 1000)
    for _ in range(20_000):
        model.observe(steady, _true(steady) * rng.lognormvariate(0.0, 0.05))
    (cell,) = model._cells.values()
    assert all(abs(value) < 0.5 for line in cell._covariance for value in line)
    assert model.predict(steady) == pytest.approx(_true(steady), rel=0.05)
    other = _decode(64, 8000)
    for _ in range(20):
        model.observe(other, _true(other) * rng.lognormvariate(0.0, 0.05))
    assert model.predict(other) == pytest.approx(_true(other), rel=0.08)
    assert model.predict(steady) == pytest.approx(_true(steady), rel=0.20)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_outliers_are_set_aside(outlier: float, seed: int) -> None:
    rng, model, work = random.Random(seed), LatencyModel(NUM_SMS), _decode(64, 1000)
    for _ in range(200):
        model.observe(work, _true(work) * rng.lognormvariate(0.0, 0.03))
    before = model.predict(work)
    for _ in range(2):
        model.observe(work, outlier * _true(work))
        model.observe(work, _true(work))
    assert model.predict(work) == pytest.approx(before, rel=0.10)


@pytest.mark.parametrize("factor", [1000.0, 10.0, 3.0, 0.1])
def test_a_first_step_that_compiled_does_not_stay(factor: float) -> None:
    model = LatencyModel(NUM_SMS)
    for work in (_decode(64, 1000), _prefill(500), _decode(64, 1000, 48, 84)):
        model.observe(work, factor * _true(work))
        for _ in range(6):
            model.observe(work, _true(work))
        assert model.predict(work) == pytest.approx(_true(work), rel=0.05)


def test_steps_of_two_speeds_end_between_them() -> None:
    rng, model, work = random.Random(5), LatencyModel(NUM_SMS), _decode(64, 1000)
    for _ in range(300):
        model.observe(work, _true(work) * rng.choice([1.0, 2.0]))
    assert 0.9 * _true(work) < model.predict(work) < 2.1 * _true(work)


_works = st.builds(
    StepWork.of,
    st.integers(1, NUM_SMS),
    other_sms=st.integers(0, NUM_SMS),
    chunks=st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 16_384)), max_size=3),
    num_decodes=st.integers(0, 1024),
    context_tokens=st.integers(0, 10_000_000),
)


@given(st.lists(st.tuples(_works, st.floats(1e-6, 1e3)), max_size=40), _works, st.integers(1, 5000))
def test_predictions_rise_with_work_whatever_was_seen(seen: Table, work: StepWork, more: int) -> None:
    model = LatencyModel(NUM_SMS)
    for step, seconds in seen:
        model.observe(step, seconds)
    share = {"num_sms": work.num_sms, "other_sms": work.other_sms}
    tokens, pairs = work.num_prompt_tokens, work.prompt_pairs
    decodes, contexts = work.num_decodes, work.context_tokens
    prompt, decode = {"num_prompt_tokens": tokens + 1}, {"num_decodes": decodes + 1}
    smaller = StepWork(**share, **prompt, **decode, prompt_pairs=pairs, context_tokens=contexts)
    larger = [
        StepWork(**share, num_prompt_tokens=tokens + 1 + more, **decode, prompt_pairs=pairs, context_tokens=contexts),
        StepWork(**share, **prompt, num_decodes=decodes + 1 + more, prompt_pairs=pairs, context_tokens=contexts),
        StepWork(**share, **prompt, **decode, prompt_pairs=pairs + more, context_tokens=contexts),
        StepWork(**share, **prompt, **decode, prompt_pairs=pairs, context_tokens=contexts + more),
    ]
    seconds = model.predict(smaller)
    assert 0.0 < seconds < math.inf
    assert all(model.predict(each) >= seconds for each in larger)


@given(st.integers(8, NUM_SMS), st.integers(0, NUM_SMS))
def test_an_unseen_share_is_plausible(num_sms: int, other_sms: int) -> None:
    """Fewer SMs are slower, about in proportion at most; a busy other lane makes it slower, 2.5 times at most."""
    rng, model = random.Random(6), LatencyModel(NUM_SMS)
    for _ in range(100):
        work = _varied(rng)
        model.observe(work, _true(work))
    for whole, share, shared in (
        (_decode(64, 1000), _decode(64, 1000, num_sms), _decode(64, 1000, num_sms, other_sms)),
        (_prefill(1000), _prefill(1000, num_sms), _prefill(1000, num_sms, other_sms)),
    ):
        alone = model.predict(share)
        assert 0.99 <= alone / model.predict(whole) <= 1.1 * NUM_SMS / num_sms
        assert 0.99 <= model.predict(shared) / alone <= 2.5


def test_an_unseen_kind_takes_each_term_from_the_kind_that_knows_it() -> None:
    """On a device whose ratios are not those that a model starts from."""
    rng, model = random.Random(9), LatencyModel(NUM_SMS)
    for _ in range(100):
        for work in (_decode(rng.choice([1, 2, 4]), rng.randrange(1, 99_000)), _prefill(rng.randrange(300, 4000))):
            model.observe(work, _true(work))
    for length in (10, 100, 1000):
        mixed = StepWork.of(NUM_SMS, chunks=[(2000, length)], num_decodes=32, context_tokens=100_000)
        assert model.predict(mixed) == pytest.approx(_true(mixed), rel=0.10)


def test_a_nearer_share_becomes_the_lender() -> None:
    model, unseen = LatencyModel(NUM_SMS), _decode(64, 1000, 48)
    model.observe(_decode(64, 1000), 0.010)
    far = model.predict(unseen)
    model.observe(_decode(64, 1000, 40), 3.0 * far)
    assert model.predict(unseen) > 2.0 * far


def test_an_unseen_share_follows_its_lender() -> None:
    model = LatencyModel(NUM_SMS)
    seen, unseen = _decode(64, 1000, 48, 84), _decode(64, 1000, 40, 92)
    model.observe(seen, 0.010)
    before = model.predict(unseen)
    for _ in range(10):
        model.observe(seen, 0.020)
    assert model.predict(unseen) == pytest.approx(2.0 * before, rel=0.1)


def test_errors_are_those_before_learning() -> None:
    rng, model, errors = random.Random(7), LatencyModel(NUM_SMS), list[float]()
    assert model.error() is None
    for _ in range(100):
        work = _decode(rng.randrange(1, 100), 1000)
        seconds = _true(work) * rng.lognormvariate(0.0, 0.1)
        errors.append(abs(model.predict(work) / seconds - 1.0))
        model.observe(work, seconds)
    assert model.error() == (statistics.median_high(errors), sorted(errors)[94])


def test_errors_are_recent() -> None:
    model, work = LatencyModel(NUM_SMS), _decode(64, 1000)
    for _ in range(2000):
        model.observe(work, 0.010)
    error = model.error()
    assert error is not None and error[1] < 0.001


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_step_without_a_time_teaches_nothing(seconds: float) -> None:
    model = LatencyModel(NUM_SMS)
    model.observe(_decode(1, 1), seconds)
    assert model.error() is None
    assert model.predict(_decode(1, 1)) == LatencyModel(NUM_SMS).predict(_decode(1, 1))


_chunks = st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 4000)), max_size=5)


@given(st.integers(0, 200), st.integers(0, 8000), st.floats(0.0, 0.2), st.floats(0.0, 0.1), _chunks)
def test_max_prompt_tokens_is_the_largest_that_fits(
    decodes: int, context: int, limit: float, more: float, chunks: list[tuple[int, int]]
) -> None:
    model, work = LatencyModel(NUM_SMS), _decode(decodes, context)
    for step, seconds in ((_decode(64, 1000), 0.009), (_prefill(2000), 0.048)):
        model.observe(step, seconds)

    def seconds_of(num_tokens: int) -> float:
        taken = []
        for start, length in chunks:
            taken.append((start, min(length, num_tokens)))
            num_tokens -= taken[-1][1]
        contexts = work.context_tokens
        return model.predict(StepWork.of(NUM_SMS, chunks=taken, num_decodes=decodes, context_tokens=contexts))

    most = model.max_prompt_tokens(work, limit, chunks)
    total = sum(length for _, length in chunks)
    assert 0 <= most <= total
    assert most == 0 or seconds_of(most) <= limit * (1 + 1e-9)
    assert most == total or seconds_of(most + 1) > limit * (1 - 1e-9)
    assert model.max_prompt_tokens(work, limit + more, chunks) >= most


def test_max_prompt_tokens_adds_to_chunks_already_taken() -> None:
    model = LatencyModel(NUM_SMS)
    first = StepWork.of(NUM_SMS, chunks=[(0, 300)], num_decodes=16, context_tokens=16_000)
    rest = model.max_prompt_tokens(first, 0.020, [(500, 4000)])
    whole = model.max_prompt_tokens(_decode(16, 1000), 0.020, [(0, 300), (500, 4000)])
    assert 0 < rest == whole - 300


# ---- states


def _learned() -> LatencyModel:
    rng, model = random.Random(3), LatencyModel(NUM_SMS)
    for work, seconds in rng.sample(_h100(), len(_h100())) * 3:
        model.observe(work, seconds)
    return model


def test_a_state_is_json_and_predicts_the_same() -> None:
    model = _learned()
    model.is_calibrated = True
    state = json.loads(json.dumps(model.to_state()))
    copy = LatencyModel.from_state(state)
    for work, _ in _h100():
        assert copy.predict(work) == model.predict(work)
    unseen = _prefill(500, num_sms=60, other_sms=72)
    assert copy.predict(unseen) == pytest.approx(model.predict(unseen))
    assert copy.is_calibrated and copy.error() is None
    assert copy.to_state() == state


def test_a_model_from_a_state_relearns_a_changed_device_at_once() -> None:
    model = LatencyModel.from_state(_learned().to_state())
    work = _decode(64, 1000)
    slow = 2.0 * model.predict(work)
    for _ in range(3):
        model.observe(work, slow)
    assert model.predict(work) == pytest.approx(slow, rel=0.02)


def test_what_is_given_is_scaled_by_what_is_measured() -> None:
    learned = _learned().to_state()
    model = LatencyModel.from_state(learned | {"given": learned["measured"], "measured": []})
    works = [_decode(64, 1000), _decode(64, 1000, 48, 84), _decode(64, 1000, 32, 100), _decode(16, 2000, 56, 76)]
    given = [model.predict(work) for work in works]
    for _ in range(3):
        model.observe(works[0], 2.0 * given[0])
    for work, seconds in zip(works, given, strict=True):
        assert model.predict(work) == pytest.approx(2.0 * seconds, rel=0.15)


def test_chunks_of_a_state_are_trusted_at_once_and_for_good() -> None:
    model = LatencyModel(NUM_SMS)
    model.observe(StepWork.of(NUM_SMS, chunks=[(0, 700)], num_decodes=8, context_tokens=8000), 0.03)
    assert model.trusted_prompt_tokens == 1050
    model = LatencyModel.from_state(model.to_state())
    assert model.trusted_prompt_tokens == 700
    model.calibrate(StepWork.of(NUM_SMS, chunks=[(0, 800)], num_decodes=8, context_tokens=8000), 0.03)
    for _ in range(500):
        model.observe(StepWork.of(NUM_SMS, chunks=[(0, 20)], num_decodes=8, context_tokens=8000), 0.01)
    assert model.trusted_prompt_tokens == 800


def test_calibration_does_not_count_as_an_error() -> None:
    model = LatencyModel(NUM_SMS)
    model.calibrate(_decode(64, 1000), 1.0)
    assert model.error() is None and model.predict(_decode(64, 1000)) > 0.5


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "version of a latency model's state is 'NoneType'; expected 1"),
        ({}, "is None; expected 1"),
        ({"version": 2}, "is 2; expected 1"),
        ({"version": 1}, "damaged: KeyError"),
        ({"num_sms": 0}, "damaged: ValueError.*integer from 1"),
        ({"num_sms": True}, "integer from 1"),
        ({"prompt_tokens": -1}, "integer from 0"),
        ({"measured": [["decode", 132, 0, [1.0, 1.0, 1.0]]]}, "4 positive numbers"),
        ({"measured": [["decode", 132, 0, [1.0, 1.0, 1.0, -1.0]]]}, "4 positive numbers"),
        ({"measured": [["decode", 132, 0, [1.0, 1.0, 1.0, math.nan]]]}, "4 positive numbers"),
        ({"measured": [["idle", 132, 0, [1.0, 1.0, 1.0, 1.0]]]}, "'idle' is not a valid StepKind"),
        ({"given": [["decode", 132.5, 0, [1.0, 1.0, 1.0, 1.0]]]}, "integer from 1"),
        ({"given": [5]}, "damaged: TypeError"),
    ],
)
def test_a_state_that_is_none_is_refused(state: object, message: str) -> None:
    if isinstance(state, dict) and state and "version" not in state:
        state = LatencyModel(NUM_SMS).to_state() | state
    with pytest.raises(ValueError, match=message):
        LatencyModel.from_state(state)

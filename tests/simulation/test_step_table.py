"""The table of step times: true at its points, rising with the work between them, sensible beyond them."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.step_table import Point, StepTable, TableError, errors
from benchmarks.step_times import make_trials, save
from semipd.sched.latency import StepKind, StepWork

NUM_SMS = 132
SPLITS = [(NUM_SMS - 8 * groups, 8 * groups) for groups in range(1, 15)]


def true_seconds(work: StepWork) -> float:
    """A device that the table's form does not hold: rows in tiles of 64, another product above 64 rows, a clock that
    heavy work lowers, contexts that are read better the more there are."""
    share, other = work.num_sms / NUM_SMS, work.other_sms / NUM_SMS
    memory, compute = (share + 0.1) / (1.1 * share) * (1.0 + 0.6 * other), math.pow(share, -0.8) * (1.0 + 1.3 * other)
    rows = work.num_decodes + work.num_prompt_tokens
    tiles = 64.0 * math.ceil(rows / 64) if rows > 64 else rows
    products = math.hypot(5.9e-3 * memory, 22e-6 * compute * tiles) + (rows > 64) * 0.5e-3 * memory
    contexts = 43e-9 * memory * work.context_tokens * (1.0 + 0.25 * math.exp(-work.context_tokens / 60e3))
    pairs = 0.35e-9 * compute * work.prompt_pairs
    return (products + contexts + pairs) * (1.0 + 0.08 * min(rows, 512) / 512)


def make_points(noise: float = 0.0) -> list[Point]:
    """What the trials of an H100 would measure on it."""
    rng = random.Random(0)
    points = []
    for trial in make_trials(NUM_SMS, SPLITS):
        for step, other in zip(trial, (0,) if len(trial) == 1 else [step.num_sms for step in trial[::-1]], strict=True):
            work = StepWork.of(
                step.num_sms,
                other_sms=other,
                chunks=[(step.start, step.chunk)] if step.chunk else [],
                num_decodes=step.rows,
                context_tokens=step.rows * (step.context + rng.randrange(30)),
            )
            points.append(Point(work, true_seconds(work) * rng.lognormvariate(0.0, noise)))
    return points


@pytest.fixture(scope="module")
def table() -> StepTable:
    return StepTable(make_points(), NUM_SMS, SPLITS)


def test_the_points_are_what_was_measured(table: StepTable) -> None:
    own = sorted(abs(table.seconds(work) / seconds - 1.0) for work, seconds in table.points)
    assert own[int(0.95 * len(own))] < 1e-3
    assert own[-1] < 0.02


def test_noise_that_points_contradict_each_other_by_is_split_between_them() -> None:
    noisy = StepTable(make_points(noise=0.02), NUM_SMS)
    own = sorted(abs(noisy.seconds(work) / seconds - 1.0) for work, seconds in noisy.points)
    assert own[-1] < 0.06


def test_steps_between_the_points(table: StepTable) -> None:
    rng = random.Random(1)
    found = []
    for _ in range(1000):
        num_decodes = rng.choice([0, rng.randrange(1, 257)])
        has_prompt = not num_decodes or rng.random() < 0.5
        work = StepWork.of(
            NUM_SMS,
            chunks=[(rng.randrange(8000), rng.randrange(1, 2049))] if has_prompt else [],
            num_decodes=num_decodes,
            context_tokens=num_decodes * rng.randrange(64, 300_000 // max(num_decodes, 64)),
        )
        found.append(abs(table.seconds(work) / true_seconds(work) - 1.0))
    assert statistics.median(found) < 0.04
    assert sorted(found)[950] < 0.12


works = st.builds(
    StepWork.of,
    st.sampled_from([132, 100, 76, 48, 40, 32]),
    other_sms=st.sampled_from([0, 0, 32, 56, 100, 132]),
    chunks=st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 4_000)), max_size=2),
    num_decodes=st.integers(0, 400),
    context_tokens=st.integers(0, 2_000_000),
).map(lambda work: work if work.num_decodes else replace(work, context_tokens=0))


@given(works, st.integers(0, 300), st.integers(0, 200_000), st.integers(0, 2_000), st.integers(0, 10_000_000))
def test_more_work_never_takes_less_time(
    table: StepTable, work: StepWork, decodes: int, contexts: int, tokens: int, pairs: int
) -> None:
    more = StepWork(
        work.num_sms,
        work.other_sms,
        work.num_prompt_tokens + (tokens if work.num_prompt_tokens else 0),
        work.prompt_pairs + (pairs if work.num_prompt_tokens else 0),
        work.num_decodes + (decodes if work.num_decodes else 0),
        work.context_tokens + (contexts if work.num_decodes else 0),
    )
    assert more.kind is work.kind
    assert 0.0 < table.seconds(work) <= table.seconds(more) * (1.0 + 1e-9) < math.inf


def test_far_beyond_the_points_time_goes_on_with_the_work(table: StepTable) -> None:
    for work in (
        StepWork.of(NUM_SMS, chunks=[(0, 16_384)]),
        StepWork.of(NUM_SMS, chunks=[(65_536, 2048)]),
        StepWork.of(NUM_SMS, num_decodes=512, context_tokens=2**20),
    ):
        assert table.seconds(work) == pytest.approx(true_seconds(work), rel=0.25)


@pytest.mark.parametrize(("num_sms", "other_sms"), [(40, 0), (40, 92), (64, 0), (64, 68), (24, 0)])
def test_shares_that_were_not_measured(table: StepTable, num_sms: int, other_sms: int) -> None:
    for work in (
        StepWork.of(num_sms, other_sms=other_sms, num_decodes=64, context_tokens=2**16),
        StepWork.of(NUM_SMS - num_sms, other_sms=other_sms and num_sms, chunks=[(0, 2048)]),
    ):
        assert table.seconds(work) == pytest.approx(true_seconds(work), rel=0.12)


def test_a_share_takes_its_neighbours_curve_where_only_one_cell_is_known() -> None:
    alone = StepTable([Point(StepWork(NUM_SMS, 0, 0, 0, 64, 2**16), 9e-3)], NUM_SMS)
    assert 9e-3 < alone.seconds(StepWork(48, 0, 0, 0, 64, 2**16)) < alone.seconds(StepWork(48, 84, 0, 0, 64, 2**16))


def test_points_of_the_same_work_are_averaged() -> None:
    work = StepWork.of(100, other_sms=32, chunks=[(0, 2048)])
    assert StepTable([Point(work, 0.08), Point(work, 0.125)], NUM_SMS).seconds(work) == pytest.approx(0.1)


def test_points_held_out_are_foretold() -> None:
    small = StepTable([point for point in make_points(0.01) if point.work.num_sms == NUM_SMS], NUM_SMS)
    found = errors(small)
    assert found.keys() == set(small.keys())
    left_out = [held_out for pairs in found.values() for _, held_out in pairs]
    assert statistics.median(left_out) < 0.04


def test_a_kind_that_was_not_measured_is_named() -> None:
    alone = StepTable([Point(StepWork(NUM_SMS, 0, 0, 0, 64, 2**16), 9e-3)], NUM_SMS)
    with pytest.raises(TableError, match=r"a mixed step was asked for, and the table has only decode"):
        alone.seconds(StepWork(NUM_SMS, 0, 64, 2080, 64, 2**16))


# ---- files


def write(path: Path, points: list[Point], **head: object) -> Path:
    rows = [{**asdict(work), "seconds": seconds, "spread": 0.0, "count": 7} for work, seconds in points]
    save(path, {"title": "step times", "num_sms": NUM_SMS, "splits": SPLITS, **head, "points": rows})
    return path


def test_what_was_written_is_loaded(table: StepTable, tmp_path: Path) -> None:
    loaded = StepTable.load(write(tmp_path / "times.json", list(table.points)))
    assert (loaded.num_sms, loaded.splits) == (NUM_SMS, tuple(SPLITS))
    assert [loaded.seconds(work) for work, _ in table.points] == [table.seconds(work) for work, _ in table.points]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("a table", "is no JSON"),
        ('{"title": "both lanes", "rows": []}', "has no 'points' and 'num_sms'"),
        ("[]", "has no 'points' and 'num_sms'"),
        ('{"num_sms": 132, "points": []}', "was cut off before its first trial ended"),
        ('{"num_sms": 132, "points": [{"num_sms": 132, "seconds": 1.0}]}', "point 0 .* is incomplete .*other_sms"),
    ],
)
def test_other_files_are_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TableError, match=problem) as raised:
        StepTable.load(path)
    assert "python -m benchmarks.step_times" in str(raised.value)


@pytest.mark.parametrize("change", [{"seconds": 0.0}, {"seconds": float("nan")}, {"num_sms": 0}])
def test_points_that_cannot_be_are_refused(change: Mapping[str, float], tmp_path: Path) -> None:
    point = {**asdict(StepWork(132, 0, 0, 0, 1, 1)), "seconds": 1.0, **change}
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"num_sms": NUM_SMS, "points": [point]}))
    with pytest.raises(TableError, match="point 0"):
        StepTable.load(path)


def test_every_kind_is_among_the_trials(table: StepTable) -> None:
    assert {kind for kind, _, _ in table.keys()} == set(StepKind)

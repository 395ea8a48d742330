"""The sizes that steps are rounded up to, and those that have graphs before they come."""

from __future__ import annotations

import random

import pytest

from semipd.config import Phase, Plan
from semipd.model.step_inputs import Buckets, StepShape
from semipd.sched.batch import Batch, PrefillEntry, SamplingFeature
from semipd.sched.sizing import on_grid

MAX_SEQS = 512


def _batch(phase: Phase, num_decodes: int, num_prompt_tokens: int, num_chunks: int = 1) -> Batch:
    lengths = [num_prompt_tokens // num_chunks] * (num_chunks - 1)
    lengths += [num_prompt_tokens - sum(lengths)] if num_prompt_tokens else []
    entries = [PrefillEntry(index, 0, (0,) * length, samples=True) for index, length in enumerate(lengths)]
    return Batch(0, phase, 132, tuple(range(num_decodes)), tuple(entries), (), SamplingFeature.NONE)


@pytest.mark.parametrize("max_prompt_rows", [1, 20, 512, 2048])
def test_all_steps_of_chunks_that_are_not_short_have_a_graph_from_the_start(max_prompt_rows: int) -> None:
    buckets = Buckets(MAX_SEQS, max_prompt_rows)
    rng = random.Random(0)
    for phase in Phase:
        usual = set(buckets.usual(phase))
        for _ in range(2000):
            num_decodes = rng.choice((0, 1, rng.randint(1, MAX_SEQS - 1))) if phase is Phase.DECODE else 0
            most = max_prompt_rows
            if phase is Phase.DECODE:
                most = Plan.mixed(max_prompt_rows, 132).prompt_budget(num_decodes)
            num_tokens = rng.choice((1, most, rng.randint(1, most)))
            num_chunks = rng.randint(1, max(1, num_tokens // 16))
            shape = buckets.shape_of(_batch(phase, num_decodes, num_tokens, num_chunks))
            assert shape in usual
            assert shape.num_rows >= num_decodes + num_tokens and shape.max_chunks >= num_chunks
            assert phase is Phase.PREFILL or shape.max_decodes >= num_decodes


def test_few_graphs_pad_little() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    assert len(buckets.usual(Phase.DECODE)) == 69
    assert len(buckets.usual(Phase.PREFILL)) == 50
    for num_rows in range(1, MAX_SEQS + 2048 + 1):
        num_decodes = min(num_rows - 1, MAX_SEQS)
        padded = buckets.padded_rows(num_decodes, num_rows - num_decodes)
        assert padded >= num_rows and padded % 16 == 0
        assert num_rows <= 128 or num_rows > 256 or padded <= 1.125 * num_rows
        assert num_rows < 512 or padded <= 1.06 * num_rows


def test_rows_are_rounded_up_to_sizes_that_take_no_longer_than_larger_ones() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    for num_decodes, num_prompt_rows in ((0, 300), (299, 1), (300, 0)):
        assert buckets.padded_rows(num_decodes, num_prompt_rows) == 320
    assert {buckets.padded_rows(0, rows) for rows in range(257, 513)} == {320, 384, 512}
    assert {buckets.padded_rows(rows, 0) for rows in range(257, 513)} == {320, 384, 512}


def test_steps_of_sizes_that_policies_choose_are_not_padded() -> None:
    buckets = Buckets(MAX_SEQS, 8192)
    for num_rows in {on_grid(size, 4) for size in (*range(128, 257), *range(512, 8193))}:
        assert buckets.padded_rows(0, num_rows) == num_rows
    assert {buckets.padded_rows(0, rows) % 64 for rows in range(1100, 3400)} == {0}, "rounder ones between them"
    assert {buckets.padded_rows(0, rows) % 128 for rows in range(3400, 8193)} == {0}


def test_short_chunks_have_room_too() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    usual = buckets.shape_of(_batch(Phase.PREFILL, 0, 400, 20))
    assert buckets.shape_of(_batch(Phase.PREFILL, 0, 400, 200)).max_chunks == MAX_SEQS > usual.max_chunks
    assert usual.num_rows == buckets.shape_of(_batch(Phase.PREFILL, 0, 400, 200)).num_rows


def test_decodes_have_a_graph_of_every_size_they_are_rounded_to() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    usual = set(buckets.usual(Phase.DECODE))
    shapes = {buckets.shape_of(_batch(Phase.DECODE, size, 0)) for size in range(1, MAX_SEQS + 1)}
    assert shapes <= usual
    assert {shape.num_rows for shape in shapes} == {buckets.padded_rows(size, 0) for size in range(1, MAX_SEQS + 1)}
    assert {shape.num_rows for shape in shapes} == set(buckets.heads)


def test_a_lane_without_prompts_has_only_graphs_of_decodes() -> None:
    assert all(shape.max_chunks == 0 for shape in Buckets(MAX_SEQS, 0).usual(Phase.DECODE))


@pytest.mark.parametrize("phase", Phase)
def test_the_first_graphs_stand_in_for_all_others(phase: Phase) -> None:
    usual = [shape for shape in Buckets(MAX_SEQS, 2048).usual(phase) if shape.max_chunks]
    for shape in usual:
        assert min(other.num_rows for other in usual[:7] if other.covers(shape)) <= shape.num_rows + 1024


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("max_decodes", "max_prompt_rows"), [(1, 1), (5, 24), (512, 2048), (300, 1000)])
def test_what_the_warm_up_runs_covers_all(phase: Phase, max_decodes: int, max_prompt_rows: int) -> None:
    buckets = Buckets(max_decodes, max_prompt_rows)
    samples = list(buckets.samples(phase))
    assert all(samples[0].covers(shape) for shape in (*samples, *buckets.usual(phase)))
    assert phase is Phase.PREFILL or all(buckets.largest.covers(shape) for shape in samples)
    assert buckets.sample_heads()[0] == buckets.heads[-1] == max_decodes


def test_a_shape_covers_only_smaller_ones_of_its_kind() -> None:
    mixed = StepShape(num_rows=128, max_decodes=MAX_SEQS, max_chunks=16)
    larger = StepShape(num_rows=576, max_decodes=MAX_SEQS, max_chunks=36)
    decodes = StepShape(num_rows=512, max_decodes=512, max_chunks=0)
    assert larger.covers(mixed) and not mixed.covers(larger)
    assert not decodes.covers(mixed)

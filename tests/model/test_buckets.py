"""The sizes that steps are rounded up to, and those that have graphs before they come."""

from __future__ import annotations

import random

import pytest

from semipd.config import Phase
from semipd.model.gpu_runner import _FREE_ROWS, _MAX_PADDING
from semipd.model.step_inputs import Buckets
from semipd.sched.batch import Batch, PrefillEntry, SamplingFeature

MAX_SEQS = 512


def _batch(phase: Phase, num_decodes: int, num_prompt_tokens: int, num_chunks: int = 1) -> Batch:
    lengths = [num_prompt_tokens // num_chunks] * (num_chunks - 1)
    lengths += [num_prompt_tokens - sum(lengths)] if num_prompt_tokens else []
    entries = [PrefillEntry(index, 0, (0,) * length, samples=True) for index, length in enumerate(lengths)]
    return Batch(0, phase, 132, tuple(range(num_decodes)), tuple(entries), (), SamplingFeature.NONE)


@pytest.mark.parametrize("num_prompt_rows", [512, 2048])
def test_prompts_have_a_graph_of_not_many_more_rows_from_the_start(num_prompt_rows: int) -> None:
    buckets = Buckets(MAX_SEQS, num_prompt_rows)
    rng = random.Random(0)
    for phase in Phase:
        usual = list(buckets.usual(phase))
        for _ in range(500):
            num_decodes = rng.choice((0, 1, rng.randint(1, MAX_SEQS - 16))) if phase is Phase.DECODE else 0
            num_tokens = rng.choice((rng.randint(16, 64), rng.randint(16, num_prompt_rows)))
            shape = buckets.shape_of(_batch(phase, num_decodes, num_tokens, rng.randint(1, 16)))
            best = min(other.num_rows for other in usual if other.covers(shape))
            # between 128 and 512 decodes there is no graph, so prompts that are few beside them may have none in reach
            assert best <= max(_MAX_PADDING * shape.num_rows, _FREE_ROWS) or num_decodes > 128


def test_decodes_have_a_graph_of_every_size_they_are_rounded_to() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    usual = set(buckets.usual(Phase.DECODE))
    assert {buckets.shape_of(_batch(Phase.DECODE, size, 0)) for size in range(1, MAX_SEQS + 1)} <= usual


def test_a_lane_without_prompts_has_only_graphs_of_decodes() -> None:
    assert all(shape.num_prompt_rows == 0 for shape in Buckets(MAX_SEQS, 0).usual(Phase.DECODE))


def test_a_shape_covers_only_smaller_ones_of_its_kind() -> None:
    buckets = Buckets(MAX_SEQS, 2048)
    mixed, prompts = buckets.shape_of(_batch(Phase.DECODE, 16, 100)), buckets.shape_of(_batch(Phase.DECODE, 0, 100))
    larger = buckets.shape_of(_batch(Phase.DECODE, 64, 512, 16))
    assert larger.covers(mixed)
    assert not mixed.covers(larger)
    assert not larger.covers(prompts)

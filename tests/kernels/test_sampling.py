"""The sampling kernels against their specification, `semipd/model/sampling_ops.py`: equal logits, equal tokens.

Tiles are made small, so that small vocabularies take the way of lists that do not fit in one. Scratch is garbage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from semipd.kernels import sampling as kernels
from semipd.kernels.penalties import apply_penalties, apply_penalties_reference
from semipd.kernels.triton_util import is_interpreted
from semipd.model import sampling_ops as ops

DEVICE = "cpu" if is_interpreted() else "cuda"
UNTOUCHED = -77

tiles = pytest.mark.parametrize("tile_blocks", [2, 64])


@dataclass(frozen=True)
class Params:
    """Sampling parameters of a row."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_outputs: int = 0


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Rows in turn: smooth, full of ties, and half of it forbidden."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 2
    logits[1::3] = (logits[1::3] * 2).round() / 2
    logits[2::3, ::2] = -math.inf
    return logits


def specified_tokens(logits_RV: Tensor, rows: list[Params]) -> list[int]:
    """Tokens that `sampling_ops` gives, on the host."""
    logits_RV = logits_RV.float().cpu()
    token_ids = ops.argmax(logits_RV)
    for index, row in enumerate(rows):
        if row.temperature > 0:
            params = ops.DrawParams(
                torch.tensor([row.temperature], dtype=torch.float64),
                torch.tensor([row.top_p], dtype=torch.float64),
                torch.tensor([row.top_k]),
                torch.tensor([row.min_p], dtype=torch.float64),
                ops.uniform(ops.stream_key(row.seed, 0).view(1), torch.tensor([row.num_outputs])),
            )
            token_ids[index] = ops.draw_truncated(logits_RV[index : index + 1], params)
    return token_ids.tolist()


@dataclass
class Tables:
    """What the kernels read and write of the slots; row i of a batch has slot 2 * i + 1."""

    params_PF: Tensor
    last_token_P: Tensor
    num_outputs_P: Tensor

    @staticmethod
    def of(rows: list[Params]) -> Tables:
        num_slots = 2 * len(rows) + 2  # with the null slot
        params_PF = torch.zeros(num_slots, kernels.NUM_PARAMS, dtype=torch.int64)
        floats_PF = params_PF.view(torch.float64)
        num_outputs_P = torch.full((num_slots,), UNTOUCHED)
        for index, row in enumerate(rows):
            slot = 2 * index + 1
            params_PF[slot, kernels.KEY.value] = ops.stream_key(row.seed, 0)
            params_PF[slot, kernels.TOP_K.value] = row.top_k
            floats_PF[slot, kernels.TEMPERATURE.value] = row.temperature
            floats_PF[slot, kernels.TOP_P.value] = row.top_p
            floats_PF[slot, kernels.MIN_P.value] = row.min_p
            num_outputs_P[slot] = row.num_outputs
        last_token_P = torch.full_like(num_outputs_P, UNTOUCHED)
        return Tables(params_PF.to(DEVICE), last_token_P.to(DEVICE), num_outputs_P.to(DEVICE))

    def sample(self, logits_RV: Tensor, slots: list[int], tile_blocks: int) -> list[int]:
        num_rows, vocab_size = logits_RV.shape
        scratch = kernels.SamplingScratch.make(num_rows + 1, vocab_size, DEVICE, tile_blocks=tile_blocks)
        scratch.maxima_RM.fill_(2**31 - 1)
        scratch.work_RW.fill_(2**62)
        slots_R = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        token_ids = torch.full((num_rows + 1,), UNTOUCHED, device=DEVICE)
        kernels.sample(
            logits_RV.to(DEVICE),
            slots_R,
            self.params_PF,
            self.last_token_P,
            self.num_outputs_P,
            token_ids[:num_rows],
            scratch,
        )
        assert token_ids[num_rows] == UNTOUCHED
        return token_ids[:num_rows].tolist()


def assert_as_specified(logits_RV: Tensor, rows: list[Params], tile_blocks: int) -> None:
    tables = Tables.of(rows)
    slots = [2 * index + 1 for index in range(len(rows))]
    expected = specified_tokens(logits_RV, rows)
    assert tables.sample(logits_RV, slots, tile_blocks) == expected
    assert tables.last_token_P.tolist() == [
        expected[slot // 2] if slot in slots else UNTOUCHED for slot in range(2 * len(rows) + 2)
    ]
    assert tables.num_outputs_P[1::2].tolist() == [*(row.num_outputs + 1 for row in rows), UNTOUCHED]


@tiles
@pytest.mark.parametrize("vocab_size", [5, 64, 65, 300, 600])
def test_greedy_and_random_rows_mix(vocab_size: int, tile_blocks: int) -> None:
    rows = [
        Params(temperature=0),
        Params(),
        Params(top_p=0.7, num_outputs=3),
        Params(top_k=50, top_p=0.95, seed=-1),
        Params(temperature=0, top_k=3, top_p=0.1),
        Params(temperature=1e-6, top_p=0.5),
        Params(top_k=vocab_size, min_p=0.2, seed=2**63),
        Params(temperature=3.0, top_k=vocab_size + 9, top_p=0.3),
    ]
    assert_as_specified(random_logits(len(rows), vocab_size), rows, tile_blocks)


@tiles
@pytest.mark.parametrize("top_k", [1, 50, 64, 65, 299])
def test_limits_combine(top_k: int, tile_blocks: int) -> None:
    limits = [(0.1, 0.0), (0.95, 0.0), (1.0, 0.05), (0.95, 0.05)]
    rows = [Params(top_k=top_k, top_p=top_p, min_p=min_p, seed=top_k) for top_p, min_p in limits]
    assert_as_specified(random_logits(len(rows), 300, seed=top_k), rows, tile_blocks)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 5.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9999])
def test_wide_nuclei_are_cut_exactly(spread: float, top_p: float) -> None:
    """Nuclei of more tokens than a tile holds, with ties at the border that are cut by id."""
    logits = torch.randn(2, 700, generator=torch.Generator().manual_seed(1)) * spread
    logits[1] = (logits[1] * 4).round() / 4
    assert_as_specified(logits, [Params(temperature=0.9, top_p=top_p, seed=seed) for seed in range(2)], 4)


@tiles
@pytest.mark.parametrize("top_k", [1, 3, 65, 200])
def test_ties_at_the_limit_go_to_the_smaller_ids(top_k: int, tile_blocks: int) -> None:
    """Equal logits throughout, and of the blocks' maxima, so that ids alone decide what is kept.

    The random number is near 1, so that the token is one of the last that are.
    """
    logits = torch.zeros(3, 300)
    logits[1, ::3] = 0.5
    logits[2] = -0.0
    logits[2, ::2] = 0.0
    seed = next(seed for seed in range(1000) if ops.uniform(ops.stream_key(seed, 0), torch.tensor(0)) > 0.99)
    rows = [Params(temperature=2.0, top_k=top_k, top_p=top_p, seed=seed) for top_p in (0.9, 1.0, 1.0)]
    assert_as_specified(logits, rows, tile_blocks)


def test_narrow_and_strided_logits_are_read_as_float32() -> None:
    buffer = torch.full((3, 400), math.nan, dtype=torch.bfloat16)
    logits = buffer[:, 7:340]
    logits.copy_(random_logits(3, 333))
    assert_as_specified(logits, [Params(temperature=0), Params(top_k=20), Params(top_p=0.9)], 64)


@tiles
def test_rows_without_a_token_give_one_of_the_vocabulary(tile_blocks: int) -> None:
    logits = torch.full((6, 333), -math.inf)
    logits[3:] = random_logits(3, 333)
    logits[3:, 5] = math.nan
    rows = [Params(temperature=0), Params(), Params(top_k=5, top_p=0.5)] * 2
    token_ids = Tables.of(rows).sample(logits, [1, 3, 5, 7, 9, 11], tile_blocks)
    assert token_ids[:3] == [0, 0, 0]
    assert all(0 <= token_id < 333 for token_id in token_ids[3:])


def test_padding_rows_change_nothing() -> None:
    rows = [Params(), Params(top_k=9)]
    tables, logits = Tables.of(rows), random_logits(4, 200)
    null_slot = len(tables.last_token_P) - 1
    token_ids = tables.sample(logits, [1, null_slot, 3, null_slot], 64)
    assert [token_ids[0], token_ids[2]] == specified_tokens(logits[::2], rows)
    assert tables.last_token_P.tolist() == [UNTOUCHED, token_ids[0], UNTOUCHED, token_ids[2], UNTOUCHED, UNTOUCHED]
    assert tables.num_outputs_P.tolist() == [UNTOUCHED, 1, UNTOUCHED, 1, UNTOUCHED, UNTOUCHED]


def test_draws_follow_the_token_index() -> None:
    """The same row again: its next random number."""
    rows, logits = [Params(temperature=1.5, seed=seed) for seed in (3, 4)], random_logits(2, 130)
    tables = Tables.of(rows)
    for num_outputs in range(4):
        expected = specified_tokens(logits, [Params(1.5, seed=row.seed, num_outputs=num_outputs) for row in rows])
        assert tables.sample(logits, [1, 3], 64) == expected


def test_huge_vocabularies_are_refused() -> None:
    vocab_size = ops.MAX_VOCAB_SIZE + 1
    with pytest.raises(AssertionError):
        Tables.of([Params()]).sample(torch.empty(1, vocab_size), [1], 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_are_as_the_reference_says(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 1003, generator=generator).to(dtype)
    logits[0, :4] = torch.tensor([-math.inf, 0.0, -0.0, 3.0])
    seen = torch.randint(0, 7, (4, 1003), generator=generator, dtype=torch.int32)
    params = torch.zeros(4, kernels.NUM_PARAMS + 1, dtype=torch.int64)
    floats = params.view(torch.float64)
    floats[:, kernels.REPETITION.value] = torch.tensor([1.3, 0.7, 1.0, 1e6])
    floats[:, kernels.FREQUENCY.value] = torch.tensor([0.1, -0.3, 0.0, 0.2])
    floats[:, kernels.PRESENCE.value] = torch.tensor([0.7, -1.1, 0.0, 0.3])
    slots = torch.tensor([2, 0, 1])
    logits_RV, slots_R, params_PF, seen_PV = (tensor.to(DEVICE) for tensor in (logits, slots, params, seen))
    actual, expected = (torch.full((5, 1003), float(UNTOUCHED), device=DEVICE) for _ in range(2))
    apply_penalties(logits_RV, slots_R, params_PF, seen_PV, actual[1:4])
    apply_penalties_reference(logits_RV, slots_R, params_PF, seen_PV, expected[1:4])
    assert torch.equal(actual, expected)
    assert torch.equal(actual[1].cpu(), logits[0].float())  # slot 2 is neutral

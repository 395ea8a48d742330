"""Sums through inboxes: one rank among messages that are there already, then ranks as processes that share memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semipd.kernels.peer_all_reduce import (
    EMPTY,
    PeerInboxes,
    PeerSumConfig,
    config_for,
    half_words,
    max_peer_rows,
    peer_add_norm,
    peer_add_norm_reference,
)

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ONE_SHOT = PeerSumConfig(has_two_shots=False, block_rows=1, num_sources=2)
SHAPES = [(1, 64, 0, 2), (5, 24, 1, 2), (7, 72, 2, 4), (3, 48, 7, 8)]  # rows, dim, rank, ranks
CONFIGS = [ONE_SHOT, replace(ONE_SHOT, block_rows=2), replace(ONE_SHOT, block_rows=4, num_sources=1)]

configs = pytest.mark.parametrize("config", [replace(c, has_two_shots=two) for c in CONFIGS for two in (False, True)])


@dataclass
class Case:
    """One sum, with what every rank brings."""

    residual_TD: Tensor
    partials: list[Tensor]
    weight_D: Tensor

    @classmethod
    def make(cls, num_rows: int, dim: int, world_size: int, dtype: torch.dtype, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        partials = [rows(num_rows, dim) for _ in range(world_size)]
        for partial_TD in partials:
            partial_TD[:, :4] = -0.0  # a pair of which must not look like no message
        partials[0][-1, 4:8] = torch.nan  # a row's own trouble
        return cls(rows(num_rows, dim), partials, rows(dim))

    def expected(self) -> tuple[Tensor, Tensor]:
        """The residual and the normed rows behind the sum."""
        residual_TD, out_TD = self.residual_TD.clone(), torch.empty_like(self.residual_TD)
        peer_add_norm_reference(residual_TD, self.partials, self.weight_D, EPS, out_TD)
        return residual_TD, out_TD

    def check(self, residual_TD: Tensor, out_TD: Tensor, owned: slice = slice(None)) -> None:
        """See that a rank has the expected sums of the rows that it owns, the others as they were, and all normed."""
        expected_residual_TD, expected_TD = self.expected()
        tolerance = TOLERANCE[out_TD.dtype]
        left_TD = self.residual_TD.clone()
        left_TD[owned] = expected_residual_TD[owned]
        torch.testing.assert_close(residual_TD, left_TD, rtol=tolerance, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(out_TD, expected_TD, rtol=tolerance, atol=tolerance, equal_nan=True)


def words_of(rows_TD: Tensor) -> Tensor:
    """As they are sent."""
    words = rows_TD.contiguous().view(torch.int32)
    return torch.where(words == EMPTY, 0, words)


def owned_rows(num_rows: int, rank: int, world_size: int, config: PeerSumConfig) -> slice:
    share = -(-num_rows // world_size)
    return slice(rank * share, min((rank + 1) * share, num_rows)) if config.has_two_shots else slice(None)


class Inboxes:
    """Those of all ranks, in this process."""

    def __init__(self, world_size: int, num_words: int) -> None:
        self.memory = torch.full((world_size, 2 * num_words + 8), EMPTY, dtype=torch.int32)
        self.memory[:, -8:] = 7  # which is not theirs
        self.addresses_W = torch.tensor([row.data_ptr() for row in self.memory])
        self.num_words = num_words
        self.stop = torch.zeros(1, dtype=torch.int32)

    def of(self, rank: int) -> PeerInboxes:
        return PeerInboxes(rank=rank, addresses_W=self.addresses_W, half_words=self.num_words, stop=self.stop)

    def half(self, rank: int, half: int) -> Tensor:
        return self.memory[rank, half * self.num_words :][: self.num_words]


@pytest.mark.parametrize(("num_rows", "dim", "rank", "world_size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@configs
def test_a_rank_sums_what_is_there_and_sends_its_part(
    num_rows: int, dim: int, rank: int, world_size: int, dtype: torch.dtype, config: PeerSumConfig
) -> None:
    case = Case.make(num_rows, dim, world_size, dtype)
    half, share = 1, -(-num_rows // world_size)
    _, normed_TD = case.expected()
    inboxes = Inboxes(world_size, 64 * dim)
    own_rows = owned_rows(num_rows, rank, world_size, config)

    def parts(memory: Tensor) -> tuple[Tensor, Tensor]:
        """Where the ranks' rows come in, and where normed rows do."""
        row_words = words_of(case.weight_D).numel()
        num_in = world_size * (share if config.has_two_shots else num_rows) * row_words
        normed = memory[num_in : num_in + num_rows * row_words].view(num_rows, row_words)
        return memory[:num_in].view(world_size, -1, row_words), normed

    received, normed = parts(inboxes.half(rank, half))
    for other in range(world_size):
        if other != rank:
            rows = words_of(case.partials[other])[own_rows]
            received[other, : len(rows)] = rows
            if config.has_two_shots:
                others_rows = owned_rows(num_rows, other, world_size, config)
                normed[others_rows] = words_of(normed_TD)[others_rows]
    residual_TD, out_TD = case.residual_TD.clone(), torch.full_like(case.residual_TD, torch.nan)
    peer_add_norm(
        residual_TD,
        case.partials[rank].clone(),
        case.weight_D,
        EPS,
        out_TD,
        inboxes.of(rank),
        half=half,
        num_ctas=2,
        config=config,
    )

    case.check(residual_TD, out_TD, own_rows)
    assert (inboxes.half(rank, half) == EMPTY).all(), "what was read is empty again"
    for other in range(world_size):
        assert (inboxes.half(other, 1 - half) == EMPTY).all() and (inboxes.memory[other, -8:] == 7).all()
        if other != rank:
            received, normed = parts(inboxes.half(other, half))
            sent = words_of(case.partials[rank])[owned_rows(num_rows, other, world_size, config)]
            assert torch.equal(received[rank, : len(sent)], sent)
            received[rank, : len(sent)] = EMPTY
            if config.has_two_shots:
                assert torch.equal(normed[own_rows], words_of(out_TD)[own_rows])
                normed[own_rows] = EMPTY
            assert (inboxes.half(other, half) == EMPTY).all(), "nothing else was sent"
    assert inboxes.stop.item() == 0


@pytest.mark.parametrize("has_two_shots", [False, True])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_wait_ends_when_it_is_stopped_or_has_lasted_too_long(has_two_shots: bool, is_stopped: bool) -> None:
    case = Case.make(3, 16, 2, torch.float32)
    inboxes = Inboxes(2, 256)
    inboxes.stop.fill_(is_stopped)
    peer_add_norm(
        case.residual_TD,
        case.partials[0],
        case.weight_D,
        EPS,
        torch.empty_like(case.residual_TD),
        inboxes.of(0),
        half=0,
        num_ctas=1,
        config=replace(ONE_SHOT, has_two_shots=has_two_shots, block_rows=4),
        max_polls=1 << 30 if is_stopped else 3,
    )
    assert inboxes.stop.item() == 1


def test_sums_depend_neither_on_the_batch_nor_on_the_grid() -> None:
    case = Case.make(6, 72, 1, torch.bfloat16)
    inboxes = Inboxes(1, 512)
    results = []
    for num_rows, num_ctas, block_rows in ((6, 1, 4), (6, 5, 2), (1, 1, 1)):
        out_TD = torch.empty_like(case.residual_TD[:num_rows])
        peer_add_norm(
            case.residual_TD[:num_rows].clone(),
            case.partials[0][:num_rows],
            case.weight_D,
            EPS,
            out_TD,
            inboxes.of(0),
            half=0,
            num_ctas=num_ctas,
            config=PeerSumConfig(has_two_shots=False, block_rows=block_rows, num_sources=1),
        )
        results.append(words_of(out_TD)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 576, 4096, 5120, 8192, 16384])
def test_inboxes_suit_all_sizes_that_are_taken(dim: int, dtype: torch.dtype, world_size: int) -> None:
    largest = max_peer_rows(dim, dtype, world_size)
    assert 0 < largest * dim * dtype.itemsize <= 4 << 20
    words = half_words(largest, dim, dtype, world_size)
    kinds = set()
    for num_rows in {*range(1, 70), *range(1, largest, 1 + largest // 50), largest}:
        if num_rows <= largest:
            config = config_for(num_rows, dim, dtype, world_size, num_ctas=16)
            share = -(-num_rows // world_size)
            rows = 2 * world_size * share if config.has_two_shots else world_size * num_rows
            assert rows * dim * dtype.itemsize <= 4 * words
            assert world_size % config.num_sources == 0
            kinds.add(config.has_two_shots)
    assert kinds == {False, True}


@pytest.mark.parametrize(
    ("dim", "dtype", "world_size"),
    [(4096, torch.bfloat16, 3), (4096, torch.float64, 2), (4100, torch.bfloat16, 2), (1 << 17, torch.bfloat16, 2)],
)
def test_other_sums_are_left_to_nccl(dim: int, dtype: torch.dtype, world_size: int) -> None:
    assert max_peer_rows(dim, dtype, world_size) == 0


# ---- ranks as processes

WORLD_SIZE, NUM_WORDS = 2, 2000
NUM_STEPS = 16


def step_of(number: int) -> tuple[Case, PeerSumConfig]:
    """In both manners, for both halves."""
    case = Case.make(1 + number % 5, 40, WORLD_SIZE, DTYPES[number % 3], seed=number)
    config = PeerSumConfig(has_two_shots=number % 4 > 1, block_rows=1 + number % 2, num_sources=1 + number // 8)
    return case, config


def test_processes_that_share_memory_sum_again_and_again(tmp_path: Path) -> None:
    """Through both halves, which are used a dozen times, in both manners and without anything else between them."""
    for rank in range(WORLD_SIZE):
        _mapped(tmp_path, rank).fill_(EMPTY)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_peer_all_reduce", str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(WORLD_SIZE)]
    try:
        assert [process.wait(40) for process in processes] == [0] * WORLD_SIZE
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for number in range(NUM_STEPS):
        case, config = step_of(number)
        outs = []
        for rank in range(WORLD_SIZE):
            residual_TD, out_TD = torch.load(tmp_path / f"{rank}-{number}")
            case.check(residual_TD, out_TD, owned_rows(len(out_TD), rank, WORLD_SIZE, config))
            outs.append(words_of(out_TD))
        assert all(torch.equal(out, outs[0]) for out in outs)
    for rank in range(WORLD_SIZE):
        assert (_mapped(tmp_path, rank) == EMPTY).all()


def _mapped(folder: Path, rank: int) -> Tensor:
    return torch.from_file(str(folder / f"inbox-{rank}"), shared=True, size=2 * NUM_WORDS, dtype=torch.int32)


def _run_rank(folder: Path, rank: int) -> None:
    memories = [_mapped(folder, peer) for peer in range(WORLD_SIZE)]
    inboxes = PeerInboxes(
        rank=rank,
        addresses_W=torch.tensor([memory.data_ptr() for memory in memories]),
        half_words=NUM_WORDS,
        stop=torch.zeros(1, dtype=torch.int32),
    )
    for number in range(NUM_STEPS):
        case, config = step_of(number)
        out_TD = torch.empty_like(case.residual_TD)
        peer_add_norm(
            case.residual_TD,
            case.partials[rank],
            case.weight_D,
            EPS,
            out_TD,
            inboxes,
            half=number % 2,
            num_ctas=1 if config.has_two_shots else 1 + number % 3,  # which the interpreter runs one after another
            config=config,
        )
        torch.save((case.residual_TD, out_TD), folder / f"{rank}-{number}")


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), int(sys.argv[2]))

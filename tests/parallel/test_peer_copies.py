"""Copies between two ranks: threads, with memory of the CPU in place of the GPUs', and a wait of Python."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.device.peer_memory import PeerMemoryUnavailable
from semipd.kernels import triton_util
from semipd.kernels.ops import StepContext, create_ops
from semipd.kernels.rms_norm import rms_norm_reference
from semipd.parallel import peer_copies
from semipd.parallel.overlap import Communicators, OverlappedLinear, owned_rows
from semipd.parallel.peer_copies import PeerCopies, connect_copies
from semipd.parallel.plans import Plan

DIM, MAX_ROWS, NUM_INPUTS = 6, 500, 8
PLANS = [Plan((4,), copies=True), Plan((1, 4), copies=True), Plan((1, 2, 3, 4), copies=True)]
CPU = torch.device("cpu")


class Memory:
    """A rank's memory; an address has the rank in its high bits."""

    def __init__(self, num_bytes: int, all_memory: list[Tensor]) -> None:
        self._own, self._all = torch.zeros(num_bytes, dtype=torch.uint8), all_memory
        self.is_free = False

    def tensor(self, first_byte: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._own[first_byte : first_byte + num_bytes].view(dtype).view(shape)

    def copy_to(self, address: int, source: Tensor, stream: int) -> None:
        first = address % (1 << 40)
        self._all[address >> 40][first : first + source.nbytes] = source.flatten().view(torch.uint8)

    def unmap(self) -> None: ...

    def free(self) -> None:
        self.is_free = True


def wait(counter: Tensor, target: int, flag: Tensor, *, limit: float) -> None:
    """What `stream_wait` does, of one thread among others."""
    while not flag.item():
        if counter.item() >= target:
            counter.zero_()
            return
        time.sleep(1e-5)


class Pair:
    """Two ranks that share memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(peer_copies, "share_memory", self._share)
        self.all_memory: list[Tensor] = []
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.barrier = threading.Barrier(2)
        self.ranks = [self._connect(rank) for rank in range(2)]

    def _connect(self, rank: int) -> PeerCopies:
        copies = connect_copies(
            Shard(rank=rank, world_size=2),
            lambda value, timeout=0.0: [self.barrier.wait(20)],
            CPU,
            self.flag,
            dim=DIM,
            dtype=torch.float64,
            max_rows=MAX_ROWS,
        )
        assert copies is not None
        copies._wait, copies._add_norm = wait, rms_norm_reference
        return copies

    def _share(self, shard: Shard, exchange: object, num_bytes: int, word: int) -> tuple[Any, list[int]]:
        assert word == 0
        memory = Memory(num_bytes, self.all_memory)
        self.all_memory.append(memory._own)
        return memory, [0 << 40, 1 << 40]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair(monkeypatch)
    yield pair
    pair.flag.fill_(1)


def linear_of(rank: int, weights: Tensor) -> OverlappedLinear:
    return OverlappedLinear(weights[rank], None, ops=create_ops("reference"), adds=rank == 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", ["sum", "norm", "scatter"])
def test_products_one_behind_the_other(pair: Pair, plan: Plan, kind: str) -> None:
    weights = torch.randn(2, DIM, NUM_INPUTS, dtype=torch.float64)
    norm = create_ops("reference").pack_rms_norm(torch.linspace(1, 2, DIM, dtype=torch.float64), 1e-5)
    context = StepContext(8, None, Phase.DECODE)

    def run(rank: int) -> list[Tensor]:
        rng, results = random.Random(rank), []
        generator = torch.Generator().manual_seed(1)
        alone: Any = SimpleNamespace(rank=rank, world_size=2)
        communicators = Communicators(alone, alone, pair.ranks[rank])
        for _ in range(12):
            num_rows = 2 * int(torch.randint(1, MAX_ROWS // 2, (), generator=generator))
            xs = torch.randn(2, num_rows, NUM_INPUTS, dtype=torch.float64, generator=generator)
            residual = torch.randn(num_rows, DIM, dtype=torch.float64, generator=generator)
            total = xs[0] @ weights[0].T + xs[1] @ weights[1].T
            out = residual.clone() if rank == 0 else torch.full_like(residual, torch.nan)
            time.sleep(rng.choice((0, 0, 0.003)))  # either may be ahead of the other
            if kind == "scatter":
                own = torch.full((num_rows // 2, DIM), torch.nan, dtype=torch.float64)
                linear_of(rank, weights).reduce_scatter(own, xs[rank], communicators, plan, context)
                rows = [row for part in owned_rows(plan.row_ends(num_rows), rank, 2) for row in part]
                torch.testing.assert_close(own, total[rows])
                continue
            if kind == "norm":
                normed = linear_of(rank, weights).add_norm(out, xs[rank], norm, communicators, plan, context)
                torch.testing.assert_close(normed, norm(residual + total, context))
            else:
                linear_of(rank, weights).all_reduce_(out, xs[rank], communicators, plan, context)
            torch.testing.assert_close(out, residual + total)
            results.append(out)
        return results

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(run, range(2), timeout=60)
    assert len(first) == (0 if kind == "scatter" else 12) and all(map(torch.equal, first, other)), "the same bits"


def test_an_abort_releases_who_waits(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(pair.ranks[0].begin)
        time.sleep(0.05)
        assert not begun.done(), "the other rank has not begun"
        pair.flag.fill_(1)
        begun.result(10)


def test_nothing_is_copied_while_launches_only_compile(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = pair.ranks[0]
    copies._is_compiling_only = lambda: True
    copies.send(torch.ones(3, DIM, dtype=torch.float64), 0, 1)
    assert not pair.all_memory[1].any(), "nobody would wait for it"
    assert not triton_util.is_compiling_only()
    copies._is_compiling_only = triton_util.is_compiling_only
    copies.send(torch.ones(3, DIM, dtype=torch.float64), 5, 1)
    other = pair.ranks[1]
    assert other.receive(3, 5, 1).eq(1).all()
    assert not other._words.any(), "the word is for the next group"


def test_rows_that_do_not_fit_are_our_bug(pair: Pair) -> None:
    with pytest.raises(AssertionError):
        pair.ranks[0].send(torch.ones(2, DIM, dtype=torch.float64), MAX_ROWS - 1, 0)


def test_what_is_timed_tells_nobody(pair: Pair) -> None:
    values = torch.ones(10, dtype=torch.float64)
    pair.ranks[0].try_sending(values)
    pair.ranks[1].try_adding(values)
    assert values.eq(2).all()
    assert not pair.ranks[1]._words[:-1].any()


def test_memory_is_given_back_by_both(pair: Pair) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(PeerCopies.close, pair.ranks, timeout=30))
    assert all(copies._memory.is_free for copies in pair.ranks)  # type: ignore[attr-defined]


def test_others_have_collectives(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def connect(world_size: int) -> PeerCopies | None:
        shard, flag = Shard(world_size=world_size), torch.zeros(1, dtype=torch.int32)
        return connect_copies(
            shard, lambda value, timeout=0.0: [value], CPU, flag, dim=DIM, dtype=torch.bfloat16, max_rows=4
        )

    def refuse(*args: object) -> None:
        raise PeerMemoryUnavailable("no link")

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(peer_copies, "share_memory", refuse)
    assert connect(4) is None and not caplog.text
    assert connect(2) is None and "no link" in caplog.text

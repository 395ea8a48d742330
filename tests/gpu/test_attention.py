"""The Hopper kernel of prefill attention against the reference; its protocol alone is tested on CPUs too.

Pools are NaN where nobody should read, and so is what nobody should write. Whole file: half a
minute, most of it compilation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semipd.kernels.prefill_attention import (
    prefill_attention,
    prefill_attention_reference,
    prefill_config,
    prefill_tiles,
)
from semipd.kernels.triton_util import is_hopper
from tests.kernels.contexts import Contexts, Heads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs a GPU of the Hopper generation")]

HEADS = Heads(num_heads=8, num_kv_heads=2, head_dim=128, block_size=64, dtype=torch.bfloat16)
NARROW = Heads(num_heads=8, num_kv_heads=2, head_dim=64, block_size=128, dtype=torch.float16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of |out - reference| / |reference|
# By (length, rows of the chunk): first and later chunks, whole tiles and single rows, ragged and even ends.
SIZES = ((1, 1), (300, 300), (206, 129), (1001, 1), (768, 128), (64, 64), (2332, 333), (7644, 1500), (384, 256))
NUM_SMS = 132


class Step:
    """A step of all chunks of some contexts."""

    def __init__(self, heads: Heads, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
        self.heads, self.scale = heads, 1 / math.sqrt(heads.head_dim)
        self.contexts = Contexts(heads, sizes, None)
        self.q, _ = self.contexts.queries(num_padding=3)
        self.config = prefill_config(heads.head_dim, heads.block_size, heads.dtype, has_tma=True, is_hopper=True)
        assert self.config.use_hopper_kernel
        self.chunks, row = [], 0
        for slot, (length, num_rows) in zip(self.contexts.slots, sizes, strict=True):
            self.chunks.append((slot, row, num_rows, length - num_rows))
            row += num_rows

    def tiles(self, chunks: Sequence[tuple[int, int, int, int]], num_unused: int = 5) -> Tensor:
        tiles = prefill_tiles(chunks, self.config.block_m) + [(0, 0, 0, 0)] * num_unused
        return torch.tensor(tiles, dtype=torch.int32, device="cuda")

    def empty(self) -> Tensor:
        return self.contexts.queries(num_padding=3)[1]

    def run(self, num_sms: int = NUM_SMS, tiles: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        out = self.empty() if out is None else out
        prefill_attention(
            self.q,
            self.contexts.kv_R2KH,
            self.contexts.block_table_XN,
            self.tiles(self.chunks) if tiles is None else tiles,
            out,
            block_size=self.heads.block_size,
            scale=self.scale,
            config=self.config,
            num_sms=num_sms,
        )
        return out

    def check(self, out: Tensor) -> None:
        expected = torch.full(out.shape, math.nan, device="cuda")
        kv_R2KH, table_XN = self.contexts.kv_R2KH.float(), self.contexts.block_table_XN
        prefill_attention_reference(
            self.q.float(),
            kv_R2KH,
            table_XN,
            self.tiles(self.chunks),
            expected,
            block_size=self.heads.block_size,
            scale=self.scale,
        )
        self.contexts.check_untouched(out)
        num_rows = len(out) - 3
        error = (out[:num_rows].float() - expected[:num_rows]).norm() / expected[:num_rows].norm()
        assert error <= TOLERANCE[self.heads.dtype], f"error {error:g}"  # not so if it is NaN


def is_same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(
    "heads",
    [
        HEADS,
        NARROW,
        Heads(num_heads=9, num_kv_heads=3, head_dim=64, block_size=64, dtype=torch.bfloat16),
        Heads(num_heads=4, num_kv_heads=4, head_dim=128, block_size=128, dtype=torch.float16),
        Heads(num_heads=7, num_kv_heads=1, head_dim=128, block_size=192, dtype=torch.bfloat16),
    ],
)
def test_odd_chunks_in_a_pool_of_nan(heads: Heads) -> None:
    step = Step(heads)
    step.check(step.run())


@pytest.mark.parametrize("heads", [HEADS, NARROW])
def test_any_number_of_programs_gives_the_same_bits(heads: Heads) -> None:
    step = Step(heads)
    first = step.run()
    step.check(first)
    for num_sms in (132, 132, 100, 13, 1):
        assert is_same(step.run(num_sms), first), f"on {num_sms} programs"


def test_a_few_tiles_on_many_programs() -> None:
    step = Step(HEADS, ((5, 5), (130, 3)))
    step.check(step.run())
    out = step.run(tiles=step.tiles([]))
    assert out.isnan().all()


@pytest.mark.parametrize("cut", [1, 64, 100, 128, 299])
def test_a_row_depends_on_its_context_alone(cut: int) -> None:
    """Bit for bit: not on how its prompt was cut into chunks, nor on the step's other rows."""
    step = Step(HEADS, ((300, 300), (206, 129)))
    whole, parts = step.run(), step.empty()
    slot = step.chunks[0][0]
    for first, end in ((0, cut), (cut, 300)):
        step.run(tiles=step.tiles([(slot, first, end - first, first)]), out=parts)
    assert is_same(parts[:300], whole[:300]) and parts[300:].isnan().all()


def test_a_graph_serves_other_tiles() -> None:
    """As many, some of no rows; the launch is captured, so it neither allocates nor waits."""
    step = Step(HEADS)
    expected, tiles, out = step.run(), step.tiles(step.chunks), step.empty()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(tiles=tiles, out=out)
    few = step.tiles(step.chunks[:2], num_unused=0)
    tiles.zero_()[: len(few)] = few
    graph.replay()
    assert is_same(out[:301], expected[:301]) and out[301:].isnan().all()
    tiles.copy_(step.tiles(step.chunks))
    graph.replay()
    assert is_same(out, expected)


def test_beside_other_work() -> None:
    """Whose kernels come and go on the same SMs."""
    step = Step(HEADS)
    expected, tiles, outputs = step.run(), step.tiles(step.chunks), [step.empty() for _ in range(20)]
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    torch.mm(matrix, matrix)  # loads what it needs
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for _ in range(50):
            torch.mm(matrix, matrix)
    for out in outputs:
        step.run(tiles=tiles, out=out)
    torch.cuda.synchronize()
    assert all(is_same(out, expected) for out in outputs)

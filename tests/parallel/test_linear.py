"""The parts of a decoder that lie on several ranks, against the whole in float64. Ranks are threads, data is random."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from semipd.config import Phase
from semipd.kernels.ops import Ops, RMSNorm, StepContext, create_ops
from semipd.model.lane_memory import LaneBuffers
from semipd.parallel.linear import (
    RowParallelLinear,
    RowParallelProducts,
    SequentialProduct,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from tests.parallel.thread_group import ThreadGroup, ThreadPeerSums, run_ranks

if TYPE_CHECKING:
    from semipd.parallel.group import TensorGroup

CONTEXT = StepContext(num_sms=3)
NUM_INPUTS, NUM_OUTPUTS, DIM, VOCAB = 64, 24, 16, 61
TABLES = [("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}  # in units of the largest value

world_sizes = pytest.mark.parametrize("world_size", [1, 2, 4])
tables = pytest.mark.parametrize(("table", "dtype"), TABLES)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def assert_all_near(results: list[Tensor], expected: Tensor, dtype: torch.dtype) -> None:
    """See that all ranks have the same bits, and that these are near what is expected."""
    assert results[0].shape == expected.shape
    error = (results[0].double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max(), f"error {error:g}"
    assert all(torch.equal(result, results[0]) for result in results)


@world_sizes
@tables
@pytest.mark.parametrize("num_rows", [1, 5, 67])  # the latter by cuBLAS
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_residual_rides_along(
    generator: torch.Generator, world_size: int, table: str, dtype: torch.dtype, num_rows: int, has_bias: bool
) -> None:
    check_row_parallel(generator, world_size, table, dtype, num_rows, has_bias=has_bias)


class GroupedProduct:
    """The product in groups of rows, each summed over the ranks as it is done."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, ops: Ops, group: TensorGroup) -> None:
        self._sequential = SequentialProduct(weight_OI, bias_O, ops=ops, group=group)

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        groups = zip(torch.split(residual_TO, 2), torch.split(x_TI, 2), strict=True)
        return torch.cat([self._sequential.add_norm(residual, x, norm, context) for residual, x in groups])

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        self._sequential.write_(out_TO, x_TI, context)


@world_sizes
@tables
def test_another_product_may_sum_group_by_group(
    generator: torch.Generator, world_size: int, table: str, dtype: torch.dtype
) -> None:
    check_row_parallel(generator, world_size, table, dtype, 5, has_bias=True, make_product=GroupedProduct)


def check_row_parallel(
    generator: torch.Generator,
    world_size: int,
    table: str,
    dtype: torch.dtype,
    num_rows: int,
    *,
    has_bias: bool,
    make_product: RowParallelProducts = SequentialProduct,
) -> None:
    weight_OI = randn(NUM_OUTPUTS, NUM_INPUTS, dtype=dtype, generator=generator)
    bias_O = randn(NUM_OUTPUTS, dtype=dtype, generator=generator) if has_bias else None
    residual_TO = randn(num_rows, NUM_OUTPUTS, dtype=dtype, generator=generator)
    x_TI = randn(num_rows, NUM_INPUTS, dtype=dtype, generator=generator)
    ops = create_ops(table)

    def body(group: TensorGroup) -> Tensor:
        rank = group.shard.rank
        weight, x = (tensor.chunk(world_size, 1)[rank].contiguous() for tensor in (weight_OI, x_TI))
        bias = None if rank else bias_O
        linear = RowParallelLinear(weight, bias, ops=ops, group=group, make_product=make_product)
        residual = residual_TO.clone() if rank == 0 else torch.full_like(residual_TO, math.nan)
        normed = linear.add_norm(residual, x, ops.pack_rms_norm(torch.ones(NUM_OUTPUTS, dtype=dtype), 1e-5), CONTEXT)
        scale = (residual.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_all_near([(normed.double() * scale).to(dtype)], residual.double(), dtype)
        return residual

    expected = residual_TO.double() + x_TI.double() @ weight_OI.double().T
    if bias_O is not None:
        expected += bias_O.double()
    assert_all_near(run_ranks(world_size, body), expected, dtype)


@world_sizes
@tables
@pytest.mark.parametrize("num_rows", [3, 5])
def test_peers_sum_few_rows_with_the_norm(
    generator: torch.Generator, world_size: int, table: str, dtype: torch.dtype, num_rows: int
) -> None:
    weight_OI = randn(NUM_OUTPUTS, NUM_INPUTS, dtype=dtype, generator=generator)
    bias_O, norm_O = (randn(NUM_OUTPUTS, dtype=dtype, generator=generator) for _ in range(2))
    residual_TO = randn(num_rows, NUM_OUTPUTS, dtype=dtype, generator=generator)
    x_TI = randn(num_rows, NUM_INPUTS, dtype=dtype, generator=generator)
    ops = create_ops(table)

    def body(group: TensorGroup) -> tuple[Tensor, Tensor]:
        assert isinstance(group, ThreadGroup)
        rank = group.shard.rank
        weight, x = (tensor.chunk(world_size, 1)[rank].contiguous() for tensor in (weight_OI, x_TI))
        linear = RowParallelLinear(weight, None if rank else bias_O, ops=ops, group=group, half=1)
        communicator = group.communicator(Phase.DECODE)
        peers = ThreadPeerSums(communicator, max_rows=3)
        residual = residual_TO.clone()
        normed = linear.add_norm(residual, x, ops.pack_rms_norm(norm_O, 1e-5), replace(CONTEXT, peers=peers))
        assert (peers.halves, communicator.num_calls["all_reduce_"]) == (([1], 0) if num_rows == 3 else ([], 1))
        return residual, normed

    residuals, normed = zip(*run_ranks(world_size, body), strict=True)
    expected = residual_TO.double() + x_TI.double() @ weight_OI.double().T + bias_O.double()
    assert_all_near(list(residuals), expected, dtype)
    scale = torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-5)
    assert_all_near(list(normed), expected * scale * norm_O.double(), dtype)


def test_a_bias_on_every_rank_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="the bias is added once"):
        run_ranks(
            2,
            lambda group: RowParallelLinear(torch.ones(3, 4), torch.ones(3), ops=create_ops("reference"), group=group),
        )


@pytest.mark.parametrize("phase", Phase)
def test_each_lane_has_its_communicator(phase: Phase) -> None:
    ops, ones = create_ops("reference"), torch.ones(8, 8)
    context = StepContext(num_sms=1, phase=phase)

    def body(group: TensorGroup) -> list[int]:
        assert isinstance(group, ThreadGroup)
        norm = ops.pack_rms_norm(ones[0], 1e-5)
        RowParallelLinear(ones, ops=ops, group=group).add_norm(ones.clone(), ones, norm, context)
        VocabParallelEmbedding(ones, ops=ops, group=group)(torch.tensor([2]), context)
        VocabParallelHead(ops.pack_head(ones, is_shared=True), 16, group=group)(ones, context)
        return [sum(group.communicator(lane).num_calls.values()) for lane in (phase, phase.other)]

    assert run_ranks(2, body) == [[3, 0], [3, 0]]


def part_of_table(table_VD: Tensor, group: TensorGroup) -> Tensor:
    """A rank's rows, padded."""
    size = -(-len(table_VD) // group.shard.world_size)
    part = table_VD[group.shard.rank * size :][:size]
    return torch.cat((part, part.new_zeros(size - len(part), part.shape[1])))


@world_sizes
@tables
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_embedding_is_exact(
    generator: torch.Generator, world_size: int, table: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    table_VD = randn(VOCAB, DIM, dtype=dtype, generator=generator)
    token_ids_T = torch.tensor([0, VOCAB - 1, 15, 16, 30, 31, 47, 48, 3, 3], dtype=index_dtype)

    def body(group: TensorGroup) -> Tensor:
        embedding = VocabParallelEmbedding(part_of_table(table_VD, group), ops=create_ops(table), group=group)
        return embedding(token_ids_T, CONTEXT)

    for rows_TD in run_ranks(world_size, body):
        assert torch.equal(rows_TD, table_VD[token_ids_T])


@world_sizes
@tables
@pytest.mark.parametrize("num_rows", [1, 5, 67])
def test_logits_are_those_of_the_whole_vocabulary(
    generator: torch.Generator, world_size: int, table: str, dtype: torch.dtype, num_rows: int
) -> None:
    table_VD, x_RD = (randn(rows, DIM, dtype=dtype, generator=generator) for rows in (VOCAB, num_rows))
    ops = create_ops(table)

    def body(group: TensorGroup) -> Tensor:
        head = ops.pack_head(part_of_table(table_VD, group), is_shared=False)
        return VocabParallelHead(head, VOCAB, group=group)(x_RD, CONTEXT)

    assert_all_near(run_ranks(world_size, body), x_RD.double() @ table_VD.double().T, dtype)


def test_results_stay_in_the_memory_of_the_lane(generator: torch.Generator) -> None:
    dtype, ops = torch.float32, create_ops("triton")
    table_VD, x_RD = (randn(rows, DIM, dtype=dtype, generator=generator) for rows in (VOCAB, 5))
    token_ids_T = torch.tensor([3, 60, 31, 0, 8], dtype=torch.int32)

    def body(group: TensorGroup) -> list[tuple[int, int]]:
        context = StepContext(num_sms=2, buffers=LaneBuffers(torch.device("cpu")))
        part = part_of_table(table_VD, group)
        embed = partial(VocabParallelEmbedding(part, ops=ops, group=group), context=context)
        head = partial(VocabParallelHead(ops.pack_head(part, is_shared=True), VOCAB, group=group), context=context)
        places = []
        for num_rows in (5, 3, 5):
            rows_TD, logits_RV = embed(token_ids_T[:num_rows]), head(x_RD[:num_rows])
            assert torch.equal(rows_TD, table_VD[token_ids_T[:num_rows]])
            places.append((rows_TD.data_ptr(), logits_RV.data_ptr()))
            torch.testing.assert_close(logits_RV, x_RD[:num_rows] @ table_VD.T)
        return places

    for places in run_ranks(2, body):
        assert len(set(places)) == 1

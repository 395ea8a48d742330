"""One of two ranks that compare overlapped products with plain ones and NCCL; writes the largest error of all.

Random data, sizes that no tile divides, every collective, launched and replayed, with SMs reserved for both widths; and
sums by copies.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.device.green_context import PlainStreamBackend
from semipd.kernels.ops import StepContext, create_ops
from semipd.model.lane_memory import LaneBuffers
from semipd.parallel.group import TensorGroup, join_store
from semipd.parallel.overlap import (
    ALONE_CTAS,
    BESIDE_CTAS,
    OverlappedLinear,
    Release,
    all_gather,
    owned_rows,
)
from semipd.parallel.overlapped_product import lane_communicators
from semipd.parallel.peer_copies import PeerCopies, connect_copies
from semipd.parallel.plans import Plan

SHAPES = [(1001, 1000, 520), (2048, 4096, 2048), (700, 8192, 1536)]
"""Rows, outputs, inputs of a rank; of odd rows only the all-reduce is computed."""
REPLAYS = 20


class Case:
    """One product of random operands; its results are left in memory of its own."""

    def __init__(
        self,
        group: TensorGroup,
        backend: PlainStreamBackend,
        context: StepContext,
        release: Release,
        shape: tuple[int, int, int],
        plan: Plan,
        copies: PeerCopies | None,
    ) -> None:
        num_rows, num_outputs, num_inputs = shape
        self.rank = group.shard.rank
        self.plan, self.context = plan, context
        self.pair = lane_communicators(group, context, plan, {} if copies is None else {context.phase: copies})
        weight = randn(num_outputs, num_inputs) * num_inputs**-0.5
        bias = randn(num_outputs) if self.rank == 0 else None
        self.x, self.residual = randn(num_rows, num_inputs), randn(num_rows, num_outputs)
        self.product = torch.nn.functional.linear(self.x, weight, bias).float()
        ops = create_ops("triton")
        self.linear = OverlappedLinear(weight, bias, ops=ops, adds=self.rank == 0, sides=backend, release=release)
        self.norm = ops.pack_rms_norm(randn(num_outputs), 1e-5)
        self.ends = plan.row_ends(num_rows)
        self.out = torch.empty_like(self.residual)
        self.own = torch.empty_like(self.residual[: num_rows // 2])

    def reduce(self) -> Tensor:
        """The all-reduce, which the first rank's residual rides along."""
        self.out.copy_(self.residual)
        self.linear.all_reduce_(self.out, self.x, self.pair, self.plan, self.context)
        return self.out

    def reduce_and_norm(self) -> Tensor:
        """The same, normed."""
        self.out.copy_(self.residual)
        return self.linear.add_norm(self.out, self.x, self.norm, self.pair, self.plan, self.context)

    def expect_normed(self) -> Tensor:
        """The same, one after the other, in float32."""
        total = self.expect_reduced()
        return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.norm.eps) * self.norm.weight_D.float()

    def expect_reduced(self) -> Tensor:
        """The same, one after the other, in float32."""
        total = self.product + self.residual.float() if self.rank == 0 else self.product.clone()
        self.pair.alone.all_reduce_(total)
        return total

    def scatter(self) -> Tensor:
        """Reduce-scatter, and all rows back."""
        self.linear.reduce_scatter(self.own, self.x, self.pair, self.plan, self.context)
        all_gather(self.out, self.own, self.ends, self.pair.alone)
        return self.out

    def expect_scattered(self) -> Tensor:
        """The sum."""
        total = self.product.clone()
        self.pair.alone.all_reduce_(total)
        return total

    def send(self) -> Tensor:
        """The all-to-all."""
        self.linear.all_to_all(self.out, self.x, self.pair, self.plan, self.context)
        return self.out

    def expect_sent(self) -> Tensor:
        """This rank's rows of both products."""
        both = torch.empty(2, *self.product.shape, device=self.product.device)
        self.pair.alone.all_gather(both.flatten(0, 1), self.product)
        parts = owned_rows(self.ends, self.rank, 2)
        return torch.cat([each[list(part)] for part in parts for each in both])


def check(run: Callable[[], Tensor], expected: Tensor, release: Release) -> list[float]:
    """Errors of results that are launched, and of a graph's replays."""
    errors = [error_of(run(), expected) for _ in range(3)]
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        out = run()
    finally:
        graph.capture_end()
    for _ in range(REPLAYS):
        out.fill_(math.nan)
        graph.replay()
        errors.append(error_of(out, expected))
    release.check()
    return errors


def error_of(out: Tensor, expected: Tensor) -> float:
    """Of the norm."""
    error = float((out.float() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    host, port, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    backend = PlainStreamBackend(rank)
    shard = Shard(rank=rank, world_size=2)
    group = TensorGroup(shard, join_store(host, port))
    group.connect(device, beside_ctas=BESIDE_CTAS, alone_ctas=(ALONE_CTAS,))
    release = Release(device, limit=5.0)
    context = StepContext(backend.num_sms, LaneBuffers(device), Phase.PREFILL)
    torch.manual_seed(rank)
    errors = []
    with torch.inference_mode(), torch.cuda.stream(backend.stream(Phase.PREFILL, backend.num_sms).torch_stream):
        for shape in SHAPES:
            blocks = -(-shape[0] // 128)
            cuts = [(1, blocks), (2, 3, blocks - 1, blocks)]
            copies = connect_copies(
                shard,
                group.exchange,
                device,
                release.flag,
                dim=shape[1],
                dtype=torch.bfloat16,
                max_rows=shape[0],
            )
            assert copies is not None
            by_nccl = [Plan(ends, num_ctas) for ends, num_ctas in zip(cuts, BESIDE_CTAS, strict=True)]
            for plan in (*by_nccl, *(Plan(ends, copies=True) for ends in (*cuts, (blocks,)))):
                case = Case(group, backend, context, release, shape, plan, copies)
                errors += check(case.reduce, case.expect_reduced(), release)
                errors += check(case.reduce_and_norm, case.expect_normed(), release)
                if shape[0] % 2 == 0:
                    errors += check(case.scatter, case.expect_scattered(), release)
                if shape[0] % 2 == 0 and not plan.copies:
                    errors += check(case.send, case.expect_sent(), release)
            torch.cuda.synchronize()
            copies.close()
        torch.cuda.synchronize()
    sys.stdout.write(json.dumps(max(errors)) + "\n")
    sys.stdout.flush()
    group.close()
    backend.close()


if __name__ == "__main__":
    main()

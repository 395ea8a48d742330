"""What the products of a layer take by rows: which numbers of rows are worth a CUDA graph.

    python -m benchmarks.rows [--largest 2048] [--step 16] [--sms 132] [--json FILE]

The four products of a layer of Llama-3-8B, in bfloat16 on random data, as a step of prompt chunks and decodes has them:
four layers in one CUDA graph, whose weights are far larger than the L2 cache. `us` is the engine's choice of kernels,
beside cuBLAS for all; sizes and ways come in a shuffled order, as a GPU at its power limit gets slower while it works.
Both compute tiles, so time rises in stairs. `wasted` is what a size takes longer than the fastest larger one: steps are
better padded to that.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import make_parser, report
from benchmarks.decode_gemm import MATRICES, Matrix
from benchmarks.kernels import multiply, randn, run
from benchmarks.partition import Partition
from semipd.kernels.ops import PackedLinear, StepContext
from semipd.kernels.triton_ops import TritonOps
from semipd.kernels.triton_util import num_device_sms
from semipd.model.lane_memory import LaneBuffers

NUM_LAYERS = 4
NUM_RUNS = 3


def layer_seconds(sizes: Sequence[int], num_sms: int) -> dict[tuple[int, str], float]:
    """Of the products of one layer, by rows and "engine" or "cuBLAS": medians of runs in a shuffled order."""
    partition = Partition(num_sms)
    context = StepContext(partition.num_sms, LaneBuffers(torch.device("cuda")))
    largest = max(sizes)
    weights = [[randn(matrix.num_outputs, matrix.num_inputs) / 64 for matrix in MATRICES] for _ in range(NUM_LAYERS)]
    linears = [[TritonOps().pack_linear(weight, None) for weight in layer] for layer in weights]
    inputs = [randn(largest, matrix.num_inputs) for matrix in MATRICES]
    outputs = [randn(largest, matrix.num_outputs) for matrix in MATRICES]

    def multiply_by_engine(matrix: Matrix, x: Tensor, linear: PackedLinear, out: Tensor) -> None:
        if matrix.adds:
            linear.add_(out, x, context)
        else:
            linear.write_(out, x, context)

    ways: dict[str, tuple[Callable[..., None], Sequence[Sequence[Any]]]] = {
        "engine": (multiply_by_engine, linears),
        "cuBLAS": (multiply, weights),
    }
    runs = [(num_rows, way) for num_rows in sizes for way in ways] * NUM_RUNS
    seconds: dict[tuple[int, str], list[float]] = {}
    for num_rows, name in random.Random(0).sample(runs, len(runs)):
        way, layers = ways[name]
        launches = [
            partial(way, matrix, x[:num_rows], product, out[:num_rows])
            for layer in layers
            for matrix, x, product, out in zip(MATRICES, inputs, layer, outputs, strict=True)
        ]
        seconds.setdefault((num_rows, name), []).append(partition.seconds(partial(run, launches)) / NUM_LAYERS)
    return {run: statistics.median(times) for run, times in seconds.items()}


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--largest", type=int, default=2048, help="rows (default: 2048)")
    parser.add_argument("--step", type=int, default=16, help="rows between two sizes (default: 16)")
    parser.add_argument("--sms", type=int, help="SMs of the partition (default: all)")
    args = parser.parse_args()
    sizes = list(range(args.step, args.largest + 1, args.step))
    seconds = layer_seconds(sizes, args.sms or num_device_sms())
    rows = []
    best = float("inf")
    for num_rows in reversed(sizes):
        us, cublas_us = (1e6 * seconds[num_rows, way] for way in ("engine", "cuBLAS"))
        wasted = max(us / best - 1, 0.0)
        rows.append({"rows": num_rows, "us": us, "cublas_us": cublas_us, "us_a_row": us / num_rows, "wasted": wasted})
        best = min(best, us)
    report("the products of a layer", rows[::-1], args.json)


if __name__ == "__main__":
    main()

"""What the products of a layer take by rows: which numbers of rows are worth a CUDA graph.

    python -m benchmarks.rows [--largest 2048] [--step 16] [--json FILE]

The four products of a layer of Llama-3-8B by cuBLAS, in bfloat16 on random data, as a step of prompt chunks and decodes
has them: four layers in one CUDA graph, whose weights are far larger than the L2 cache. cuBLAS computes tiles, so time
rises in stairs. `wasted` is what a size takes longer than the fastest larger one: steps are better padded to that.
"""

from __future__ import annotations

import random
from functools import partial

import torch

from benchmarks.common import make_parser, report
from benchmarks.decode_gemm import MATRICES
from benchmarks.kernels import multiply, randn, run
from benchmarks.partition import Partition

NUM_LAYERS = 4


def layer_seconds(sizes: list[int]) -> dict[int, float]:
    """Of the products of one layer at so many rows each, measured in a shuffled order."""
    partition = Partition(torch.cuda.get_device_properties(0).multi_processor_count)
    largest = max(sizes)
    weights = [[randn(matrix.num_outputs, matrix.num_inputs) / 64 for matrix in MATRICES] for _ in range(NUM_LAYERS)]
    inputs = [randn(largest, matrix.num_inputs) for matrix in MATRICES]
    outputs = [randn(largest, matrix.num_outputs) for matrix in MATRICES]
    seconds = {}
    for num_rows in random.Random(0).sample(sizes, len(sizes)):
        launches = [
            partial(multiply, matrix, x[:num_rows], weight, out[:num_rows])
            for layer in weights
            for matrix, x, weight, out in zip(MATRICES, inputs, layer, outputs, strict=True)
        ]
        seconds[num_rows] = partition.seconds(partial(run, launches)) / NUM_LAYERS
    return seconds


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--largest", type=int, default=2048, help="rows (default: 2048)")
    parser.add_argument("--step", type=int, default=16, help="rows between two sizes (default: 16)")
    args = parser.parse_args()
    sizes = list(range(args.step, args.largest + 1, args.step))
    seconds = layer_seconds(sizes)
    rows = []
    best = float("inf")
    for num_rows in reversed(sizes):
        us = 1e6 * seconds[num_rows]
        rows.append({"rows": num_rows, "us": us, "us_a_row": us / num_rows, "wasted": max(us / best - 1, 0.0)})
        best = min(best, us)
    report("the products of a layer", rows[::-1], args.json)


if __name__ == "__main__":
    main()

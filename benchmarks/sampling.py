"""What choosing the next tokens costs on a GPU: the captured core of the sampler, in microseconds a step.

    python -m benchmarks.sampling [--vocab 128256] [--dtype bfloat16] [--rows 1 64 256] [--json FILE]

Each number is the median over replays of a graph that samples from several sets of random logits in turn, more than the
L2 cache holds. Logits are normal; their standard deviation says how peaked rows are: with 1 a nucleus of 0.95 is two
thirds of the vocabulary, as in a model of random weights, with 4 it is a hundred tokens, as in a trained one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from semipd.model.cuda_sampler import CudaSampler
from semipd.sched.batch import SlotSampling

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k + top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "temperature": {"temperature": 0.8},
}
_NUM_REPLAYS = 50
_SETS_BYTES = 128 << 20  # of logits, two and a half times the L2 cache of an H100


def sampling_launches(
    num_rows: int,
    vocab_size: int,
    *,
    spread: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    **params: Any,
) -> list[Callable[[], None]]:
    """Launches that sample from one set of logits each, with `params` of `SlotSampling` in all rows."""
    sampler = CudaSampler(max_slots=num_rows, vocab_size=vocab_size, device="cuda")
    for slot in range(num_rows):
        sampler.admit(slot, SlotSampling(seed=slot, sample_index=0, prompt_token_ids=(0,), **params))
    num_sets = min(max(2, _SETS_BYTES // (num_rows * vocab_size * dtype.itemsize)), 32)
    sets = [(torch.randn(num_rows, vocab_size, device="cuda") * spread).to(dtype) for _ in range(num_sets)]
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    token_ids = torch.empty(num_rows, dtype=torch.int64, device="cuda")
    scratch = sampler.make_scratch(num_rows)
    return [partial(sampler.sample_into, logits, slots, token_ids, scratch) for logits in sets]


def time_sampling(num_rows: int, vocab_size: int, **options: Any) -> float:
    """Seconds of one step's sampling on the current GPU; `options` are those of `sampling_launches`."""
    launches = sampling_launches(num_rows, vocab_size, **options)
    launches[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(_NUM_REPLAYS + 1)
    ]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
    return float(statistics.median(times)) * 1e-3 / len(launches)


def main() -> None:
    """Time all kinds of requests at several batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--json", type=Path, help="write the results, with the machine and the commit, to this file")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    rows = []
    for spread in (1.0, 4.0):
        for num_rows in args.rows:
            times = {
                f"{kind}, us": time_sampling(num_rows, args.vocab, spread=spread, dtype=dtype, **params) * 1e6
                for kind, params in KINDS.items()
            }
            rows.append({"rows": num_rows, "deviation": spread, **times})
    title = f"Sampling from {args.vocab:,} {args.dtype} logits a row, {torch.cuda.get_device_name()}"
    report(title, rows, args.json)


if __name__ == "__main__":
    main()

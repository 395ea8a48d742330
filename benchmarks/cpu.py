"""Speed on a CPU beside `transformers.generate`: same weights, dtype and cores, in one run.

    python -m benchmarks.cpu MODEL.gguf [--dtypes float32 bfloat16] [--tokens 64] [--concurrent 16] [--json FILE]

Three comparisons, greedy, from random prompts: one stream; many requests at once against the same ones one after
another; and one stream while other processes keep all cores busy. Prefill is included everywhere. Each side has a
process of its own, as the OpenMP teams of both in one would slow each other (libgomp stops spinning when a process has
more of its threads than cores), and they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from benchmarks.common import make_parser, report
from semipd import Engine, SamplingParams
from semipd.config import DType

Generate = Callable[[Sequence[list[int]], int], None]


SPAWN = multiprocessing.get_context("spawn")


class Side:
    """One side of the comparison, in a process of its own that measures itself."""

    def __init__(self, make: Callable[[Path, str], Generate], model: Path, dtype: str) -> None:
        self._connection, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(make, model, dtype, other), daemon=True)
        self._process.start()

    def tokens_per_second(self, prompts: Sequence[list[int]], num_tokens: int) -> float:
        """Generated tokens over wall time, prefill included."""
        self._connection.send((prompts, num_tokens))
        return cast("float", self._connection.recv())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(make: Callable[[Path, str], Generate], model: Path, dtype: str, connection: Connection) -> None:
    generate = make(model, dtype)
    while True:
        prompts, num_tokens = connection.recv()
        started = time.perf_counter()
        generate(prompts, num_tokens)
        connection.send(len(prompts) * num_tokens / (time.perf_counter() - started))


def load_semipd(model: Path, dtype: str) -> Generate:
    """An engine that gets all prompts at once."""
    engine = Engine(str(model), dtype=cast("DType", dtype), enable_prefix_caching=False, max_model_len=2048)

    def generate(prompts: Sequence[list[int]], num_tokens: int) -> None:
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))

    return generate


def load_transformers(model: Path, dtype: str) -> Generate:
    """`transformers.generate`, one prompt after another."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).to(getattr(torch, dtype))

    def generate(prompts: Sequence[list[int]], num_tokens: int) -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )

    return generate


@contextlib.contextmanager
def busy_cores(num_cores: int) -> Iterator[None]:
    """Other processes that spin, one for each core."""
    spinners = [SPAWN.Process(target=_spin, daemon=True) for _ in range(num_cores)]
    for spinner in spinners:
        spinner.start()
    time.sleep(2.0)  # until they spin
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.join()


def _spin() -> None:
    while True:
        pass


def measure(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """The three comparisons at one dtype."""
    rng = random.Random(0)
    prompts = [rng.choices(range(100, 40_000), k=32) for _ in range(args.concurrent)]
    ours, theirs = Side(load_semipd, args.model, dtype), Side(load_transformers, args.model, dtype)
    rows: list[dict[str, Any]] = []

    def compare(case: str, chosen: Sequence[list[int]], num_tokens: int) -> None:
        # In turns, and the best of each: other tenants of the machine come and go.
        rounds = [
            (ours.tokens_per_second(chosen, num_tokens), theirs.tokens_per_second(chosen, num_tokens))
            for _ in range(args.rounds)
        ]
        best, reference = (max(column) for column in zip(*rounds, strict=True))
        speeds = {"semipd_tok_s": best, "transformers_tok_s": reference, "ratio": best / reference}
        rows.append({"dtype": dtype, "case": case, **speeds})

    try:
        for side in (ours, theirs):
            side.tokens_per_second(prompts[:1], 8)  # warm up
        compare("one stream", prompts[:1], args.tokens)
        compare(f"{args.concurrent} at once / one after another", prompts, args.tokens)
        with busy_cores(len(os.sched_getaffinity(0))):
            compare("one stream, cores busy", prompts[:1], args.busy_tokens)
    finally:
        ours.close()
        theirs.close()
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--busy-tokens", type=int, default=24)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = [row for dtype in args.dtypes for row in measure(args, dtype)]
    report("semipd beside transformers.generate on the same cores", rows, args.json)


if __name__ == "__main__":
    main()

"""Speed on a CPU beside `transformers.generate`: same weights, dtype and cores, in one run.

    python -m benchmarks.cpu MODEL.gguf [--dtypes float32 bfloat16] [--tokens 64] [--concurrent 16] [--json FILE]

Three comparisons, greedy, from random prompts: one stream; many requests at once against the same ones one after
another; and one stream while another process keeps all cores busy. Prefill is included everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import transformers

from benchmarks.common import make_parser, report
from semipd import Engine, SamplingParams
from semipd.config import DType

Generate = Callable[[Sequence[list[int]], int], None]


def tokens_per_second(generate: Generate, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """Generated tokens over wall time, prefill included."""
    started = time.perf_counter()
    generate(prompts, num_tokens)
    return len(prompts) * num_tokens / (time.perf_counter() - started)


@contextlib.contextmanager
def busy_cores(num_cores: int) -> Iterator[None]:
    """Other processes that spin, one for each core."""
    context = multiprocessing.get_context("spawn")
    spinners = [context.Process(target=_spin, daemon=True) for _ in range(num_cores)]
    for spinner in spinners:
        spinner.start()
    time.sleep(1.0)  # until they spin
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.join()


def _spin() -> None:
    while True:
        pass


def load_transformers(args: argparse.Namespace, dtype: str) -> Generate:
    """`transformers.generate`, one prompt after another."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model.parent, gguf_file=args.model.name, dtype=torch.float32
    ).to(getattr(torch, dtype))

    def generate(prompts: Sequence[list[int]], num_tokens: int) -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )

    return generate


def measure(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """The three comparisons at one dtype."""
    rng = random.Random(0)
    prompts = [rng.choices(range(100, 40_000), k=32) for _ in range(args.concurrent)]
    reference = load_transformers(args, dtype)
    with Engine(str(args.model), dtype=cast("DType", dtype), enable_prefix_caching=False, max_model_len=2048) as engine:

        def together(prompts: Sequence[list[int]], num_tokens: int) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            engine.generate(prompts, params)

        def one_by_one(prompts: Sequence[list[int]], num_tokens: int) -> None:
            for prompt in prompts:
                together([prompt], num_tokens)

        for generate in (together, reference):
            generate(prompts[:1], 8)  # warm up
        rows = []

        def compare(name: str, ours: Generate, num_prompts: int, num_tokens: int, target: float) -> None:
            chosen = prompts[:num_prompts]
            # Interleaved and the best of each, as other tenants of the machine come and go.
            rounds = [
                (tokens_per_second(ours, chosen, num_tokens), tokens_per_second(reference, chosen, num_tokens))
                for _ in range(args.rounds)
            ]
            ours_best, reference_best = (max(column) for column in zip(*rounds, strict=True))
            rows.append(
                {
                    "dtype": dtype,
                    "case": name,
                    "semipd_tok_s": ours_best,
                    "transformers_tok_s": reference_best,
                    "ratio": ours_best / reference_best,
                    "target": target,
                }
            )

        compare("one stream", together, 1, args.tokens, 1.5)
        compare(f"{args.concurrent} at once / one after another", together, args.concurrent, args.tokens, 10.0)
        with busy_cores(len(os.sched_getaffinity(0))):
            compare("one stream, cores busy", one_by_one, 1, args.busy_tokens, 1.5)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--busy-tokens", type=int, default=16)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows = [row for dtype in args.dtypes for row in measure(args, dtype)]
    report("semipd beside transformers.generate on the same cores", rows, args.json)


if __name__ == "__main__":
    main()

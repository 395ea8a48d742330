"""A hundred thousand steps under plans drawn at random, with every token judged.

    python -m benchmarks.soak [--steps 100000] [--seconds 420] [--block-sizes 16 64] [--device cuda] [--json FILE]

A small random model in bfloat16 serves random prompts with shared beginnings. A plan is drawn at every step border: any
two shares, disjoint or not, MIXED, EXCLUSIVE. The pool is too small for those that run, so requests are preempted, and
some are aborted at any moment. Each greedy token, of aborted requests too, is scored by a float32 pass of plain torch
over its request: it may lie below the best logit by twice the largest error of a logit of plain torch in bfloat16. At
the end one block of a cached prompt is replaced by another's, which the check must notice. In the table `worst` and
`planted` are the largest shortfalls before and after that, in units of the bound.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_parser, report
from semipd import Engine, EngineStatistics, SamplingParams
from semipd.build import BuiltEngine, build_core
from semipd.config import EngineConfig, MixedPolicy
from semipd.memory.prefix_cache import block_keys
from semipd.request import FinishReason
from semipd.streams import Stream
from tests.gpu.judge import SMALL, Finished, Judge, batch_shortfalls, save_config
from tests.gpu.random_plans import draw_plans

VOCAB = 2048
MODEL = {**SMALL, "num_hidden_layers": 2, "intermediate_size": 1024, "head_dim": 128, "vocab_size": VOCAB}
MAX_MODEL_LEN = 1000
POOL_TOKENS = 2560  # 24 requests of twice that would run
TOKEN_BUDGETS = (40, 100, 256)
OPEN_REQUESTS = 40  # more than run at the same time
JUDGED_AT_ONCE = 256  # requests, in passes of a quarter of them by length
CALIBRATED_ON = 512  # requests
STALLED = 60.0  # seconds in which no request ends


class Traffic:
    """Draws requests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._beginnings = [self.tokens(200) for _ in range(12)]

    def prompt(self) -> list[int]:
        """A prompt of 1 to 500 tokens, mostly short; some begin like others."""
        rng = self._random
        shared = rng.choice(self._beginnings)[: rng.randrange(200)] if rng.random() < 0.5 else []
        return shared + self.tokens(rng.randrange(1, 300 if rng.random() < 0.2 else 60))

    def greedy(self) -> SamplingParams:
        """Every token can be judged."""
        longest = 450 if self.is_one_in(4) else 120
        return SamplingParams(temperature=0.0, max_tokens=self._random.randrange(1, longest), ignore_eos=True)

    def noise(self) -> SamplingParams:
        """Parameters that must not reach the next request of the slot. Too long to end before it is aborted."""
        rng = self._random
        return SamplingParams(
            temperature=rng.choice((0.7, 1.5)),
            top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.8)),
            repetition_penalty=rng.choice((1.0, 1.4)),
            logit_bias={rng.randrange(VOCAB): 5.0} if rng.random() < 0.3 else None,
            logprobs=rng.choice((None, 2)),
            max_tokens=450,
            ignore_eos=True,
        )

    def is_one_in(self, count: int) -> bool:
        """True at random."""
        return self._random.randrange(count) == 0

    def delay(self) -> int:
        """How many other requests end before a doomed one is aborted."""
        return self._random.choice((0, 1, 5, 20, 30, 40))

    def tokens(self, count: int) -> list[int]:
        """So many of the vocabulary."""
        return self._random.choices(range(VOCAB), k=count)


class Checker:
    """Judges what ended, many requests at a time; the first ones also tell the error of bfloat16."""

    def __init__(self, folder: Path, device: str) -> None:
        self._exact, self._half = (
            Judge(folder, dtype, drawn_in=torch.bfloat16, device=device) for dtype in (torch.float32, torch.bfloat16)
        )
        self._waiting: list[tuple[Finished, str]] = []
        self.bound = 0.0
        self.worst = 0.0
        self.num_tokens = 0
        self.seconds = 0.0

    def add(self, finished: Finished, story: str) -> None:
        """Judge it some time; `story` is told if it is wrong."""
        self._waiting.append((finished, story))
        if len(self._waiting) >= (JUDGED_AT_ONCE if self.bound else CALIBRATED_ON):
            self.flush()

    def flush(self) -> None:
        """Judge what waits."""
        started = time.monotonic()
        waiting = sorted(self._waiting, key=lambda item: sum(map(len, item[0])))
        self._waiting = []
        size = max(1, JUDGED_AT_ONCE // 4)
        batches = [waiting[first : first + size] for first in range(0, len(waiting), size)]
        if not self.bound:
            self.bound = 2 * max(self._error([finished for finished, _ in batch]) for batch in batches)
        for batch in batches:
            self._judge(batch)
        self.seconds += time.monotonic() - started

    def worst_of(self, batch: list[Finished]) -> float:
        """The largest shortfall in units of the bound."""
        return float(batch_shortfalls(self._exact, batch).max()) / self.bound

    def _judge(self, batch: list[tuple[Finished, str]]) -> None:
        shortfalls = batch_shortfalls(self._exact, [finished for finished, _ in batch]) / self.bound
        self.num_tokens += len(shortfalls)
        self.worst = max(self.worst, float(shortfalls.max()))
        if bool((shortfalls <= 1).all()):  # false for NaN too
            return
        values = iter(shortfalls.tolist())
        for (prompt, output), story in batch:
            here = enumerate(islice(values, len(output)))
            wrong = [(index, round(value, 2)) for index, value in here if not value <= 1]
            if wrong:
                print(f"WRONG: prompt of {len(prompt)}, {len(output)} tokens, {story}; (index, bounds) {wrong[:5]}")
        raise SystemExit("tokens are further below the best than bfloat16 explains")

    def _error(self, batch: list[Finished]) -> float:
        return float((self._exact.output_logits(batch) - self._half.output_logits(batch)).abs().max())


@dataclass
class Open:
    """A request under way."""

    prompt: list[int]
    params: SamplingParams
    stream: Stream
    submitted_at: int  # step


@dataclass
class Soak:
    """One engine, its traffic, and what came of it."""

    engine: Engine
    checker: Checker
    traffic: Traffic
    num_steps: int
    deadline: float
    started: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._open: dict[int, Open] = {}
        self._doomed: dict[int, int] = {}  # request to the number of ends at which it is aborted
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._next_key = 0
        self._step = 0

    def run(self) -> None:
        """Serve until the steps are done or the time is up, then let all requests end."""
        next_report = time.monotonic() + 10
        while True:
            while len(self._open) < OPEN_REQUESTS and not self._is_over():
                self._submit()
            if not self._open:
                break
            self._take(self._next_end())
            for key in [key for key, due in self._doomed.items() if due <= self.counts["ended"]]:
                del self._doomed[key]
                self._open[key].stream.abort()
            if self.counts["ended"] % 16 == 0:
                self._step = steps_of(self.engine.statistics())
            if time.monotonic() > next_report:
                next_report += 10
                self._report()
                self.engine.check_integrity()
        self.checker.flush()
        self.engine.check_integrity()
        num_tokens = self.checker.num_tokens + self.counts["sampled tokens"]
        assert num_tokens == self.engine.statistics().num_generation_tokens, "some tokens reached nobody"

    def _next_end(self) -> int:
        try:
            return self._ended.get(timeout=STALLED)
        except queue.Empty:
            self._report()
            print(f"no request ended in {STALLED:.0f} s", flush=True)
            faulthandler.dump_traceback()
            os._exit(1)  # a lane that hangs would not let the engine close

    def _is_over(self) -> bool:
        return self._step >= self.num_steps or time.monotonic() > self.deadline

    def _submit(self) -> None:
        traffic, key = self.traffic, self._next_key
        self._next_key += 1
        is_doomed = traffic.is_one_in(6)
        params = traffic.noise() if is_doomed and traffic.is_one_in(4) else traffic.greedy()
        prompt = traffic.prompt()
        stream = self.engine.submit(prompt, params)
        self._open[key] = Open(prompt, params, stream, self._step)
        if is_doomed:
            self._doomed[key] = self.counts["ended"] + traffic.delay()
        if not stream.call_when_ended(partial(self._ended.put, key)):
            self._ended.put(key)

    def _take(self, key: int) -> None:
        """Count a request that ended, and have its tokens judged."""
        request = self._open.pop(key)
        self._doomed.pop(key, None)
        result = request.stream.result()
        (output,) = result.outputs
        self.counts["ended"] += 1
        self.counts["aborted"] += output.finish_reason is FinishReason.ABORT
        if request.params.temperature > 0:
            self.counts["sampled tokens"] += len(output.token_ids)
            return
        if output.finish_reason is not FinishReason.ABORT:
            assert len(output.token_ids) == request.params.max_tokens, "a request ended early"
        if output.token_ids:
            preemptions = request.stream.requests[0].num_preemptions
            story = (
                f"steps {request.submitted_at} to {self._step}, {preemptions} preemptions, "
                f"{result.num_cached_tokens} cached"
            )
            self.checker.add((request.prompt, output.token_ids), story)

    def _report(self) -> None:
        statistics = self.engine.statistics()
        seconds, step = time.monotonic() - self.started, steps_of(statistics)
        print(
            f"{seconds:4.0f} s  {step:6d} steps, {step / seconds:5.0f}/s  "
            f"{statistics.num_generation_tokens:8d} tokens, {self.checker.num_tokens:8d} checked, "
            f"worst {self.checker.worst:.2f}  {statistics.num_preemptions} preemptions, "
            f"{self.counts['aborted']} aborts, {statistics.num_plan_changes} plan changes",
            flush=True,
        )


def steps_of(statistics: EngineStatistics) -> int:
    """Steps that were committed, of both lanes."""
    return sum(histogram.count for histogram in statistics.step_time.values())


def build(folder: Path, device: str, block_size: int, world_size: int) -> BuiltEngine:
    """An engine over a small pool of NaN, whose plans are drawn."""
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        device=device,
        tensor_parallel_size=world_size,
        dtype="bfloat16",
        policy=MixedPolicy(token_budget=max(TOKEN_BUDGETS)),
        block_size=block_size,
        max_num_seqs=24,
        max_prefill_tokens=256,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_tokens=POOL_TOKENS,
    )
    built = build_core(config)
    with torch.inference_mode():
        built.kv_cache.fill_(float("nan"))
    if device != "cpu":
        torch.cuda.synchronize()
    draw_plans(built.core, seed=block_size, token_budgets=TOKEN_BUDGETS)
    return built


def plant(engine: Engine, built: BuiltEngine, checker: Checker, traffic: Traffic) -> float:
    """The shortfall, in bounds, once a cached block holds what is another's; nothing may run."""
    prompts = [traffic.tokens(300) for _ in range(2)]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    engine.generate(prompts, params)
    block_size = built.kv_cache.block_size
    allocator = built.core._scheduler._allocator
    blocks = []
    for prompt in prompts:
        keys: list[bytes] = []
        block_keys(prompt, block_size, cache_salt=None, keys=keys)
        cached = allocator.match(keys[: (len(prompt) - 1) // block_size])
        allocator.free(cached)
        blocks.append(cached[len(cached) // 2])
    with torch.inference_mode():
        built.kv_cache.kv_LPS2KH[:, blocks[0]] = built.kv_cache.kv_LPS2KH[:, blocks[1]]
    if built.kv_cache.kv_LPS2KH.is_cuda:
        torch.cuda.current_stream().synchronize()
    (result,) = engine.generate([prompts[0]], params)
    assert result.num_cached_tokens > 0, "the planted block was not used"
    return checker.worst_of([(prompts[0], result.outputs[0].token_ids)])


def soak(
    folder: Path, device: str, block_size: int, num_steps: int, deadline: float, world_size: int
) -> dict[str, Any]:
    """Run one engine; a row of results."""
    print(f"blocks of {block_size} tokens", flush=True)
    checker, traffic = Checker(folder, device), Traffic(block_size)
    built = build(folder, device, block_size, world_size)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        run = Soak(engine, checker, traffic, num_steps, deadline)
        run.run()
        seconds = time.monotonic() - run.started
        statistics = engine.statistics()
        planted = plant(engine, built, checker, traffic)
    assert planted > 1, f"a planted stale block was not noticed: {planted:.2f} of the bound"
    return {
        "block_size": block_size,
        "steps": steps_of(statistics),
        "seconds": seconds,
        "steps_per_s": steps_of(statistics) / seconds,
        "judging_s": checker.seconds,
        "requests": run.counts["ended"],
        "aborts": run.counts["aborted"],
        "preemptions": statistics.num_preemptions,
        "plan_changes": statistics.num_plan_changes,
        "cached": statistics.num_prefix_hit_tokens,
        "tokens": statistics.num_generation_tokens,
        "checked": checker.num_tokens,
        "sampled": run.counts["sampled tokens"],
        "worst": checker.worst,
        "bound": checker.bound,
        "planted": planted,
    }


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=420.0, help="end earlier when these are over")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="devices that share the model")
    args = parser.parse_args()
    started, num_engines = time.monotonic(), len(args.block_sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = save_config(Path(name), MODEL)
        rows = [
            soak(
                folder,
                args.device,
                block_size,
                args.steps // num_engines,
                started + args.seconds * (index + 1) / num_engines,
                args.tensor_parallel_size,
            )
            for index, block_size in enumerate(args.block_sizes)
        ]
    print(f"{sum(row['steps'] for row in rows)} steps in all")
    report("soak: random plans, aborts and preemptions, every token judged", rows, args.json)


if __name__ == "__main__":
    main()

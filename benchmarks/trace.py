"""Where the time of steps goes on one GPU: a table of kernels, and the idle time between them and between steps.

    python -m benchmarks.trace [--decodes 64] [--prefill 2048] [--context 1024] [--sms N] [--steps 20] [--json FILE]
    python -m benchmarks.trace --streams 64 [--context 1024] [--readers threads tasks] [--json FILE]

Llama-3-8B shapes, bfloat16, random weights and tokens, from captured graphs. The first form runs the engine's own
runner, one step ahead. A kernel's time is what it adds: from its start, or the end of what began before it, to its end.
The second form is the whole engine: streams decode, their text is made from a byte-level vocabulary of random words and
read by threads or by the tasks of an event loop. Idle is from the end of a step's last kernel to the start of the next
step's first.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import string
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from benchmarks.common import make_parser, percentile, report
from benchmarks.gpu import LLAMA_3_8B, StepDriver, device_events, run_steps, save_config
from semipd import Engine, SamplingParams
from semipd.streams import RequestStream

PARTS = {
    "products": ("gemm", "nvjet", "cutlass", "splitK"),
    "attention": ("attention", "_plan_kernel"),
    "norms": ("rms_norm",),
    "rotary, KV write": ("rotary",),
    "gate": ("silu_mul",),
    "sampling": ("_block_maxima", "_sample_rows"),
    "inputs": ("_inputs_kernel", "gather_rows", "block_updates"),
    "copies": ("Memcpy", "Memset"),
}
"""What steps are made of, by parts of kernels' names."""

Row = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel or a copy; times in microseconds."""

    start: float
    end: float
    name: str

    @property
    def is_copy(self) -> bool:
        return self.name.startswith(("Memcpy", "Memset"))


def traced(run: Callable[[], object]) -> list[Kernel]:
    """What the device did while `run` ran, in order of start."""
    return [
        Kernel(float(event["ts"]), float(event["ts"]) + float(event["dur"]), str(event["name"]))
        for event in device_events(run)
    ]


# ---- steps of the runner


def part_of(kernel: Kernel, before: Kernel | None) -> str:
    """The part of a step that `kernel` is; the map to logits is the product behind the gathering of rows."""
    part = next((part for part, words in PARTS.items() if any(word in kernel.name for word in words)), "other")
    return "logits" if part == "products" and before is not None and "gather_rows" in before.name else part


def breakdown(kernels: Sequence[Kernel], num_steps: int) -> list[Row]:
    """Time per step by kernel, then what is between kernels."""
    added: dict[tuple[str, str], list[float]] = defaultdict(list)
    idle, busy_until, before = 0.0, kernels[0].start, None
    for kernel in kernels:
        idle += max(0.0, kernel.start - busy_until)
        name = kernel.name.split("(")[0].removeprefix("void ")[:48]
        added[part_of(kernel, before), name].append(max(0.0, kernel.end - max(kernel.start, busy_until)))
        busy_until = max(busy_until, kernel.end)
        before = kernel
    span = busy_until - kernels[0].start
    times = [(part, name, len(values), sum(values)) for (part, name), values in added.items()]
    times = [*sorted(times, key=lambda item: -item[3]), ("nothing", "", num_steps, idle), ("step", "", num_steps, span)]
    return [
        {
            "part": part,
            "kernel": name,
            "per_step": count / num_steps,
            "us_each": total / count,
            "us_per_step": total / num_steps,
            "share": total / span,
        }
        for part, name, count, total in times
    ]


def by_part(rows: Sequence[Row]) -> list[Row]:
    """The same with the kernels of a part together."""
    totals: dict[str, Row] = {}
    for row in rows:
        total = totals.setdefault(row["part"], {"part": row["part"], "per_step": 0.0, "us_per_step": 0.0, "share": 0.0})
        for name in ("per_step", "us_per_step", "share"):
            total[name] += row[name]
    return sorted(totals.values(), key=lambda row: (row["part"] == "step", -float(row["us_per_step"])))


def measure_decodes(sizes: Sequence[int], context: int, num_sms: int | None, num_steps: int) -> dict[str, list[Row]]:
    """Breakdowns of decode steps of so many rows."""
    longest = context + 256
    driver = StepDriver(max_num_seqs=max(sizes), max_context=longest, max_model_len=longest)
    results = {}
    for size in sizes:
        driver.fill(dict.fromkeys(range(size), context))
        launch = partial(driver.decode, list(range(size)), num_sms)
        results[f"decode, {size} rows"] = measure_steps(driver, launch, num_steps)
    driver.close()
    return results


def measure_prefill(lengths: Sequence[int], num_sms: int | None, num_steps: int) -> dict[str, list[Row]]:
    """Breakdowns of prompts of so many tokens, in one step each."""
    longest = max(lengths)
    driver = StepDriver(max_num_seqs=8, max_context=longest, max_model_len=longest, max_prefill_tokens=longest)
    results = {}
    for length in lengths:
        launch = partial(driver.prefill, [(0, 0, length)], num_sms, samples=True)
        results[f"prefill, {length} tokens"] = measure_steps(driver, launch, num_steps)
    driver.close()
    return results


def measure_steps(driver: StepDriver, launch: Callable[[], Any], num_steps: int) -> list[Row]:
    for _ in range(3):
        launch().wait()
        driver.wait_for_graphs()
    return breakdown(traced(partial(run_steps, launch, num_steps)), num_steps)


# ---- streams of the engine


def save_words(folder: Path, size: int) -> None:
    """A byte-level vocabulary: all bytes, then random words with the space before them."""
    rng = random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < size:
        words["Ġ" + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))] = None
    tokenizer = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


class Readers:
    """Reads streams of text, each by a thread or by a task of one event loop, until `stop`."""

    def __init__(self, engine: Engine, prompts: Sequence[list[int]], kind: str) -> None:
        self._engine = engine
        self._params = SamplingParams(temperature=0.0, max_tokens=2**20, ignore_eos=True)
        self._streams: list[RequestStream] = []
        self.num_tokens = [0] * len(prompts)
        self.num_characters = [0] * len(prompts)
        if kind == "tasks":
            self._threads = [threading.Thread(target=lambda: asyncio.run(self._read_all(prompts)))]
        else:
            self._threads = [threading.Thread(target=self._read, args=item) for item in enumerate(prompts)]
        for thread in self._threads:
            thread.start()

    def wait(self, num_tokens: int) -> None:
        """Return once every stream has so many."""
        while min(self.num_tokens) < num_tokens:
            assert all(thread.is_alive() for thread in self._threads), "a stream ended early"
            time.sleep(0.01)

    def stop(self) -> None:
        for stream in self._streams:
            stream.abort()
        for thread in self._threads:
            thread.join()

    def totals(self) -> tuple[int, int]:
        """Tokens and characters that were read."""
        return sum(self.num_tokens), sum(self.num_characters)

    def _take(self, index: int, output: Any) -> None:
        self.num_tokens[index] += len(output.outputs[0].token_ids)
        self.num_characters[index] += len(output.outputs[0].text)

    def _read(self, index: int, prompt: list[int]) -> None:
        stream = self._engine.stream(prompt, self._params)
        self._streams.append(stream)
        for delta in stream:
            self._take(index, delta)

    async def _read_all(self, prompts: Sequence[list[int]]) -> None:
        await asyncio.gather(*(self._read_as_task(*item) for item in enumerate(prompts)))

    async def _read_as_task(self, index: int, prompt: list[int]) -> None:
        stream = self._engine.agenerate(prompt, self._params)
        self._streams.append(stream)
        async for delta in stream:
            self._take(index, delta)


def measure_streams(num_streams: int, context: int, kinds: Sequence[str], seconds: float) -> list[Row]:
    """Idle time between decode steps of the whole engine, by who reads the text."""
    folder = save_config(LLAMA_3_8B)
    save_words(folder, int(str(LLAMA_3_8B["vocab_size"])))
    rng = random.Random(1)
    rows = []
    with Engine(str(folder), load_format="dummy", max_num_seqs=num_streams, max_model_len=context + 4096) as engine:
        for kind in kinds:
            prompts = [rng.choices(range(engine.tokenizer.vocab_size), k=context) for _ in range(num_streams)]
            readers = Readers(engine, prompts, kind)
            readers.wait(64)  # all of them decode, and their step is captured
            first, started = readers.totals(), time.perf_counter()
            time.sleep(seconds)
            last, elapsed = readers.totals(), time.perf_counter() - started
            kernels = traced(partial(time.sleep, seconds / 2))
            readers.stop()
            step = elapsed * num_streams / (last[0] - first[0])
            untraced = {"step_ms": 1e3 * step, "characters_s": (last[1] - first[1]) / elapsed}
            rows.append({"readers": kind, "streams": num_streams, **untraced, **idle_between(kernels)})
    return rows


def idle_between(kernels: Sequence[Kernel]) -> Row:
    """Idle time at the borders of steps: each step ends with the one copy of its tokens to the host."""
    computing = [kernel for kernel in kernels if not kernel.is_copy]
    starts = [kernel.start for kernel in computing]
    ends = list(accumulate((kernel.end for kernel in computing), max))  # of all up to here
    borders = []
    for copy in kernels:
        if copy.name.startswith("Memcpy DtoH"):
            following = bisect_left(starts, copy.start)
            if 0 < following < len(starts):
                borders.append((ends[following - 1], starts[following]))
    idle = [start - end for end, start in borders]
    steps = [later[1] - earlier[1] for earlier, later in zip(borders, borders[1:], strict=False)]
    return {
        "traced_steps": len(steps),
        "traced_step_ms": 1e-3 * statistics.median(steps),
        "idle_p50_us": statistics.median(idle),
        "idle_p99_us": percentile(idle, 0.99),
        "idle_worst_us": max(idle),
        "idle_share": sum(idle[1:]) / sum(steps),
    }


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--decodes", type=int, nargs="*", default=[], help="rows of decode steps")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="tokens of prompts")
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=("threads", "tasks"), default=["threads", "tasks"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sms", type=int, default=None)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if args.streams:
        rows = measure_streams(args.streams, args.context, args.readers, seconds=1.0)
        report("idle between the steps of streams that deliver text", rows, args.json)
        return
    results: dict[str, list[Row]] = {}
    if args.decodes:
        results |= measure_decodes(args.decodes, args.context, args.sms, args.steps)
    if args.prefill:
        results |= measure_prefill(args.prefill, args.sms, args.steps)
    if not results:
        parser.error("give --decodes, --prefill or --streams")
    for name, rows in results.items():
        report(name, by_part(rows), None)
    report("kernels", [{"step": name, **row} for name, rows in results.items() for row in rows], args.json)


if __name__ == "__main__":
    main()

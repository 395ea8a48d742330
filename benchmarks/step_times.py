"""How long the engine's steps take on one GPU: a table of measured steps, which `benchmarks.step_table` reads.

    python -m benchmarks.step_times [--seconds 90] [--json FILE]

Llama-3-8B shapes, bfloat16, random weights and tokens: steps of the engine's own runner, from captured graphs, one
ahead of the host, sampling included. A trial repeats one step on one lane, or one on each lane at the same time. Each
becomes a point: the work as `StepWork` has it and the time on its stream; contexts grow while a trial runs, and a
point has their mean. Prompt chunks end their prompt, so that prefill steps have a head too.

The file is written anew behind each trial, so that a run that is cut off leaves what it has. Trials are in two passes:
the first one alone covers every kind of step on every share.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import environment, make_parser
from benchmarks.gpu import StepDriver
from semipd.config import MixedPolicy, Phase
from semipd.device.partition import Completion
from semipd.sched.batch import BlockUpdate, StepResult
from semipd.sched.latency import StepWork

MAX_ROWS = 448
MAX_CHUNK = 2048
PROMPT_SLOTS = 2  # behind those of decodes: one is staged while the other one runs
_LENGTHS = (0.7, 1.3, 0.85, 1.15)  # of contexts around their mean
_GROWTH = 512  # tokens that contexts may grow by while a trial runs
_MAX_FAILURES = 8  # in a row: more than one share has trials, so the device is lost

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a lane repeats: `rows` decodes of contexts around `context`, and `chunk` tokens of a prompt from `start`."""

    num_sms: int
    rows: int = 0
    context: int = 0
    chunk: int = 0
    start: int = 0

    @property
    def phase(self) -> Phase:
        """The lane that runs it."""
        return Phase.DECODE if self.rows else Phase.PREFILL

    def __str__(self) -> str:
        parts = [f"{self.rows} x {self.context}"] * bool(self.rows)
        parts += [f"{self.chunk} @ {self.start}"] * bool(self.chunk)
        return f"{' + '.join(parts)} on {self.num_sms}"


Trial = tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a trial runs: `lead` seconds in which power and clock settle and nothing counts, half of it without a
    prompt; then until each lane had `steps` in `shortest` seconds or more, and `longest` at most."""

    lead: float = 0.2
    steps: int = 7
    shortest: float = 0.1
    longest: float = 0.5  # still 4 of the slowest steps, 2,048 tokens beside decodes on all SMs


class TableDriver(StepDriver):
    """A driver whose slots get other blocks for each trial: no pool holds 448 contexts as long as the longest."""

    @classmethod
    def start(cls) -> TableDriver:
        """On the GPU, with every kernel of every share loaded."""
        driver = cls(
            max_num_seqs=MAX_ROWS + PROMPT_SLOTS,
            max_context=64,
            max_model_len=20480,
            max_prefill_tokens=MAX_CHUNK,
            kv_cache_fraction=0.9,  # the rest is for the graphs of all these shapes and the streams of all shares
            policy=MixedPolicy(token_budget=MAX_CHUNK),
        )
        driver.fill(dict.fromkeys(range(MAX_ROWS + PROMPT_SLOTS), 1))
        return driver

    @property
    def decode_slots(self) -> int:
        """Slots for decodes; those for prompts follow."""
        return len(self.runner._lengths_X) - 1 - PROMPT_SLOTS

    def place(self, sizes: Mapping[int, int]) -> None:
        """Give each slot blocks of its own for so many tokens, whatever they hold, in place of those that it had.

        Raises:
            ValueError: the pool has not so many.
        """
        kv_cache = self.model.kv_cache
        counts = {slot: -(-size // kv_cache.block_size) for slot, size in sizes.items()}
        if (total := sum(counts.values())) > kv_cache.num_blocks:
            raise ValueError(f"the trial needs {total} KV blocks, and the pool has {kv_cache.num_blocks}")
        updates, first = [], 0
        for slot, count in counts.items():
            updates.append(BlockUpdate(slot, 0, tuple(range(first, first + count))))
            first += count
        carrier = self.decode_slots  # a step has to bring them: one token of a prompt
        entry = self._entry(carrier, 0, 1, samples=False)
        batch = self._batch(Phase.PREFILL, None, (), (entry,), [carrier])
        self.model.executor.execute(replace(batch, block_updates=tuple(updates))).wait()


# ---- a trial


class Sample(NamedTuple):
    """A step that ended."""

    number: int
    end: float
    seconds: float


class Lane:
    """Repeats a step, one ahead of the host."""

    def __init__(self, driver: TableDriver, step: Step) -> None:
        self.step = step
        self._driver = driver
        # Exact in the mean: a cycle of lengths sums up to 4, and what is left of it is at the mean.
        cycles = step.rows - step.rows % len(_LENGTHS)
        shares = [_LENGTHS[slot % len(_LENGTHS)] if slot < cycles else 1.0 for slot in range(step.rows)]
        self.lengths = {slot: max(1, round(step.context * share)) for slot, share in enumerate(shares)}
        self.num_launched = 0
        self.samples: list[Sample] = []

    def sizes(self) -> dict[int, int]:
        """Tokens that its slots need room for."""
        sizes = {slot: length + _GROWTH for slot, length in self.lengths.items()}
        if self.step.chunk:
            first = self._driver.decode_slots
            sizes |= dict.fromkeys(range(first, first + PROMPT_SLOTS), self.step.start + self.step.chunk)
        return sizes

    def launch(self) -> Completion[StepResult]:
        """The step once more."""
        step, driver = self.step, self._driver
        slot = driver.decode_slots + self.num_launched % PROMPT_SLOTS
        self.num_launched += 1
        chunks = [(slot, step.start, step.chunk)] if step.chunk else []
        if step.phase is Phase.PREFILL:
            return driver.prefill(chunks, step.num_sms, samples=True)
        return driver.decode(list(self.lengths), step.num_sms, chunks=chunks)

    def reset(self) -> None:
        """Start over with contexts of the first lengths."""
        if self.lengths:
            self._driver.set_lengths(self.lengths)
        self.num_launched = 0
        self.samples = []

    def run(self, is_over: Callable[[], bool]) -> None:
        """Until told; the last step has ended then, too."""
        pending = self.launch()
        while not is_over() and self.num_launched < _GROWTH - 2:
            following = self.launch()
            seconds = pending.wait().seconds
            self.samples.append(Sample(len(self.samples), time.perf_counter(), seconds))
            pending = following
        pending.wait()

    def point(self, other: Lane | None, since: float, until: float) -> Row:
        """What it measured from one time to another."""
        samples = [sample for sample in self.samples if since <= sample.end <= until]
        if not samples:
            raise RuntimeError(f"no step of {self.step} ended in time")
        times = sorted(sample.seconds for sample in samples)
        median = statistics.median(times)
        grown = statistics.mean(sample.number for sample in samples) + 1  # a row attends to its own token too
        step = self.step
        work = StepWork.of(
            step.num_sms,
            other_sms=0 if other is None else other.step.num_sms,
            chunks=[(step.start, step.chunk)] if step.chunk else [],
            num_decodes=step.rows,
            context_tokens=round(sum(self.lengths.values()) + grown * step.rows),
        )
        return {
            **asdict(work),
            "seconds": median,
            "spread": (times[int(0.84 * (len(times) - 1))] - times[int(0.16 * (len(times) - 1))]) / 2 / median,
            "count": len(times),
            "mean": statistics.mean(times),
            "interval": (samples[-1].end - samples[0].end) / (len(samples) - 1) if len(samples) > 1 else None,
            "beside": None if other is None else str(other.step),
        }


def measure(driver: TableDriver, trial: Trial, timing: Timing) -> list[Row]:
    """The point of each step of a trial.

    Raises:
        ValueError: the pool does not hold the contexts.
    """
    lanes = [Lane(driver, step) for step in trial]
    driver.place({slot: size for lane in lanes for slot, size in lane.sizes().items()})
    for lane in lanes:
        lane.reset()
        lane.launch().wait()  # eagerly; has graphs captured
    driver.wait_for_graphs()
    for lane in lanes:
        lane.reset()
    since = time.perf_counter() + timing.lead * (1.0 if any(step.chunk for step in trial) else 0.5)
    ends: list[float] = []

    def is_over() -> bool:
        now = time.perf_counter()
        counts = [sum(sample.end >= since for sample in lane.samples[-timing.steps :]) for lane in lanes]
        if now - since >= timing.longest or (now - since >= timing.shortest and min(counts) >= timing.steps):
            ends.append(now)
        return bool(ends)

    with ThreadPoolExecutor(len(lanes)) as pool:
        runs = [pool.submit(lane.run, is_over) for lane in lanes]
        for run in runs:
            run.result()
    until = min(ends, default=time.perf_counter())
    others: list[Lane | None] = [None] if len(lanes) == 1 else [lanes[1], lanes[0]]
    return [lane.point(other, since, until) for lane, other in zip(lanes, others, strict=True)]


# ---- the trials


def make_trials(num_sms: int, splits: Sequence[tuple[int, int]]) -> list[Trial]:
    """All of an H100's, each as far as the device offers its shares; heavy ones behind heavy ones."""
    prefill_sms = [share for share in (116, 100, 84, 76) if any(share == prefill for prefill, _ in splits)]
    decode_sms = [share for share in (56, 48, 32) if any(share == decode for _, decode in splits)]
    usual = [split for split in ((100, 32), (84, 48), (76, 56)) if split in splits]
    odd = ([(116, num_sms)] * (116 in prefill_sms) + [(num_sms, num_sms)], [(116, 16)] * ((116, 16) in splits))
    trials: list[Trial] = []
    for turn in range(2):
        trials += _alone(num_sms, _DECODES[turn], _PREFILLS[turn])
        trials += [
            (Step(num_sms=num_sms, rows=rows, context=context, chunk=chunk, start=start),)
            for rows, context, chunk, start in _MIXED[turn]
        ]
        for share in decode_sms:
            trials += _alone(share, _SHARED_DECODES[turn], [])
        for share in prefill_sms:
            trials += _alone(share, [], _SHARED_PREFILLS[turn])
        for split in usual:
            trials += _corun(split, _CORUNS[turn])
        for split in odd[turn]:
            trials += _corun(split, _CORUNS[0][:2])
    return trials


def _alone(num_sms: int, decodes: Sequence[tuple[int, int]], prefills: Sequence[tuple[int, int]]) -> list[Trial]:
    trials = [(Step(num_sms=num_sms, rows=rows, context=context),) for rows, context in decodes]
    return [*trials, *((Step(num_sms=num_sms, chunk=chunk, start=start),) for chunk, start in prefills)]


def _corun(split: tuple[int, int], works: Sequence[tuple[int, int, int, int]]) -> list[Trial]:
    prefill, decode = split
    return [
        (Step(num_sms=decode, rows=rows, context=context), Step(num_sms=prefill, chunk=chunk, start=start))
        for rows, context, chunk, start in works
    ]


# Of each the first pass and the second. Rows x contexts end where the pool of an 80 GB device does.
_DECODES = (
    [(1, 1024), (8, 1024), (32, 1024), (64, 256), (64, 1024), (64, 4096), (128, 1024), (128, 2560), (256, 1024)],
    [
        (1, 256),
        (1, 4096),
        (8, 4096),
        (16, 1024),
        (32, 4096),
        (96, 1024),
        (128, 256),
        (192, 1024),
        (256, 256),
        (384, 384),
        (448, 384),
    ],
)
_SHARED_DECODES = (
    [(8, 1024), (64, 256), (64, 1024), (64, 4096), (128, 1024)],
    [(1, 1024), (32, 1024), (256, 256)],
)
_PREFILLS = (
    [(64, 0), (128, 0), (256, 0), (512, 0), (1024, 0), (2048, 0), (2048, 8192)],
    [(64, 8192), (256, 4096), (512, 8192), (1024, 4096), (2048, 2048), (2048, 16384)],
)
_SHARED_PREFILLS = (
    [(64, 0), (256, 0), (512, 0), (2048, 0)],
    [(1024, 0), (512, 8192), (2048, 16384)],
)
_MIXED = (
    [
        *[(64, 1024, 64, 0), (64, 1024, 128, 0), (64, 1024, 256, 4096), (64, 1024, 512, 0), (64, 1024, 1024, 0)],
        *[(64, 1024, 2048, 0), (64, 4096, 256, 0), (64, 4096, 1024, 4096), (16, 1024, 128, 0), (16, 4096, 512, 0)],
        *[(16, 256, 2048, 4096), (1, 1024, 256, 0), (1, 1024, 1024, 4096), (128, 256, 128, 4096), (128, 1024, 256, 0)],
        *[(128, 2048, 512, 0), (128, 1024, 2048, 0), (256, 256, 64, 0), (256, 1024, 512, 4096), (256, 1024, 1024, 0)],
    ],
    [
        *[(64, 1024, 192, 0), (64, 256, 256, 0), (64, 4096, 64, 4096), (64, 4096, 512, 0), (64, 1024, 768, 4096)],
        *[(16, 256, 64, 0), (16, 1024, 1024, 0), (1, 4096, 512, 4096), (128, 1024, 64, 0), (128, 256, 1024, 4096)],
        *[(256, 256, 256, 4096), (256, 1024, 128, 0), (256, 256, 2048, 0), (32, 1024, 512, 0)],
        # Steps of 512 to 1,024 rows, which policies choose.
        *[(64, 1024, 448, 0), (128, 512, 384, 0), (256, 384, 256, 0), (384, 384, 128, 0), (448, 384, 64, 0)],
        *[(64, 1024, 576, 0), (256, 384, 384, 0), (384, 384, 256, 0), (448, 384, 192, 0)],
        *[(128, 512, 640, 0), (384, 384, 384, 0), (448, 384, 320, 0), (64, 1024, 960, 0), (384, 384, 640, 0)],
    ],
)
_CORUNS = (
    [(64, 1024, 2048, 0), (64, 4096, 2048, 0), (16, 1024, 2048, 0), (128, 1024, 2048, 0), (64, 1024, 512, 0)],
    [(64, 512, 2048, 0), (64, 1024, 2048, 8192)],
)


# ---- all of them


def run_trials(
    driver: TableDriver, trials: Sequence[Trial], timing: Timing, *, deadline: float, path: Path | None, info: Row
) -> Row:
    """Measure until `deadline` of `time.perf_counter`; a trial that fails is noted and passed over.

    Returns what is in the file, too: `info`, the device, its points and what failed.
    """
    backend, kv_cache = driver.model.backend, driver.model.kv_cache
    points: list[Row] = []
    failed: list[Row] = []
    result = info | {
        "num_sms": backend.num_sms,
        "splits": [list(split) for split in backend.splits],
        "pool_tokens": kv_cache.num_blocks * kv_cache.block_size,
        "num_trials": len(trials),
        "failed": failed,
        "points": points,
    }
    num_failures = 0
    for index, trial in enumerate(track(trials, "trials", console=Console(stderr=True))):
        if time.perf_counter() > deadline or num_failures >= _MAX_FAILURES:
            failed.append({"trial": "all others", "error": f"{len(trials) - index} trials left out"})
            break
        try:
            points += measure(driver, trial, timing)
            num_failures = 0
        except Exception as error:
            num_failures += not isinstance(error, ValueError)
            failed.append({"trial": " beside ".join(map(str, trial)), "error": f"{type(error).__name__}: {error}"})
        if path is not None:
            save(path, result)
    if path is not None:
        save(path, result)
    return result


def save(path: Path, result: Row) -> None:
    """Write it whole or not at all, one point a line."""
    head = {name: value for name, value in result.items() if name != "points"}
    points = ",\n".join(json.dumps(point) for point in result["points"])
    new = path.with_name(path.name + ".new")
    new.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "points": [\n{points}\n]}}\n')
    new.replace(path)


def summary(result: Row) -> Table:
    """What was measured, by kind of step and shares."""
    table = Table(title=f"{len(result['points'])} points of {result['num_trials']} trials")
    for name in ("kind", "SMs", "other lane", "points", "ms", "median spread, %", "steps"):
        table.add_column(name, justify="right")
    cells: dict[tuple[str, int, int], list[Row]] = {}
    for point in result["points"]:
        kind = "decode" if not point["num_prompt_tokens"] else "mixed" if point["num_decodes"] else "prefill"
        cells.setdefault((kind, point["num_sms"], point["other_sms"]), []).append(point)
    for (kind, num_sms, other_sms), points in cells.items():
        times = [1e3 * point["seconds"] for point in points]
        spread = statistics.median(100.0 * point["spread"] for point in points)
        steps = sum(point["count"] for point in points)
        span = f"{min(times):.1f} to {max(times):.1f}"
        table.add_row(kind, str(num_sms), str(other_sms), str(len(points)), span, f"{spread:.1f}", str(steps))
    return table


def main() -> None:
    started = time.perf_counter()
    logging.basicConfig(level=logging.WARNING)
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--seconds", type=float, default=90.0, help="for all, the engine's start included")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.seconds + 60.0, exit=True)  # a step that never ends must not hold the device
    driver = TableDriver.start()
    num_sms, splits = driver.num_sms, driver.model.backend.splits
    shares = {decode for _, decode in splits if decode in (16, 32, 48, 56)}
    driver.runner.warm_up({Phase.PREFILL: [], Phase.DECODE: sorted(shares)})  # compiles side by side what these need
    ready = time.perf_counter() - started
    info = {"title": "step times", **environment(), "model": "llama-3-8b", "start_seconds": ready}
    trials = make_trials(num_sms, splits)
    result = run_trials(driver, trials, Timing(), deadline=started + args.seconds - 2.0, path=args.json, info=info)
    console = Console(width=120)
    console.print(summary(result))
    console.print(f"ready after {ready:.1f} s, all after {time.perf_counter() - started:.1f} s")
    for error, count in Counter(item["error"][:100] for item in result["failed"]).most_common(5):
        console.print(f"left out, {count} times: {error}", markup=False)
    driver.close()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

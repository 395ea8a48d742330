"""What a change of split costs running streams, and the host: the whole engine on one GPU under random splits.

    python -m benchmarks.resize [--changes 1000] [--decode-sms 32 40 48 56 64 80] [--layers 32] [--json FILE]

Llama-3-8B shapes, bfloat16, random weights and tokens. 64 streams decode beside prompts of 2,048 tokens without end, in
steps of 512; every two to four decode steps another of the splits is drawn. Each lane takes up its new share at a step
border of its own, and grows when the other one has shrunk. All times are of decode steps of 64 rows:

- gap: from the end of a step to the end of the next one, by events on the streams. `extra` is what it exceeds the plan
  in force by: the median of the gaps nearby between two steps on the same share as this one
- between: from the end of a step to the start of the next one; on another stream, that is to wait for an event
- host: the time to launch a step in the lane's thread, and what of it the thread was running

Steps on the same share as the step before show what neither has to do with a change.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common import make_parser, percentile, report
from benchmarks.gpu import LLAMA_3_8B, save_config
from semipd import Engine, SamplingParams
from semipd.build import build_core
from semipd.config import EngineConfig, Phase, Plan
from semipd.core import EngineCore
from semipd.device.partition import Completion
from semipd.model.gpu_runner import GpuRunner
from semipd.sched.batch import Batch, StepResult
from semipd.sched.policy import Load, Unobserving

NUM_STREAMS = 64
STREAM_PROMPT = 256
PROMPT = 2048
NUM_QUEUED = 4  # prompts
NEARBY = 150  # steps before and after, over which contexts grow by as many tokens
MIN_NEARBY = 5  # gaps that make a median
STEPS_PER_PLAN = (2, 3, 4)

Row = dict[str, Any]


@dataclass(slots=True, eq=False)
class Step:
    """A launched decode step; times in seconds."""

    num_sms: int
    num_rows: int
    host: float
    running: float
    end: torch.cuda.Event
    seconds: float = 0.0


class Observed:
    """The completion of a step that notes how long it ran."""

    def __init__(self, completion: Completion[StepResult], step: Step) -> None:
        self._completion = completion
        self._step = step

    def is_done(self) -> bool:
        return self._completion.is_done()

    def wait(self) -> StepResult:
        result = self._completion.wait()
        self._step.seconds = result.seconds
        return result


class Observer:
    """Executes batches by another executor and keeps what decode steps took."""

    def __init__(self, core: EngineCore, max_seconds: float) -> None:
        assert isinstance(core._executor, GpuRunner)
        self._core = core
        self._max_seconds = max_seconds
        self._runner = core._executor
        self._backend: Any = core._backend
        self.steps: list[Step] = []
        self.num_changes = 0
        self.num_launched: Counter[tuple[Phase, int]] = Counter()
        for lane in core._lanes:
            lane._executor = self

    def execute(self, batch: Batch) -> Completion[StepResult]:
        host, running = time.perf_counter(), time.thread_time()
        completion = self._runner.execute(batch)
        host, running = time.perf_counter() - host, time.thread_time() - running
        self.num_launched[batch.phase, batch.num_sms] += 1
        if batch.phase is Phase.PREFILL:
            return completion
        if self.steps and self.steps[-1].num_sms != batch.num_sms:
            self.num_changes += 1
        step = Step(batch.num_sms, len(batch.decode_slots), host, running, self._mark(batch))
        self.steps.append(step)
        return Observed(completion, step)

    def settle(self) -> None:
        self._runner.settle()

    def close(self) -> None:
        self._runner.close()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return once something is so."""
        end = time.monotonic() + self._max_seconds
        while not is_so():
            self._core.raise_if_ended()
            assert time.monotonic() < end, f"it was not to be in {self._max_seconds:g} s"
            time.sleep(0.05)

    def has_launched(self, share: tuple[Phase, int], count: int) -> bool:
        """Whether so many steps ran, or run, on a share of a phase."""
        return self.num_launched[share] >= count

    def wait_for_graphs(self) -> None:
        """Return once all that was launched is captured."""
        self._runner._graphs.wait_until_captured()

    def warm_up(self, decode_sms: Sequence[int]) -> None:
        """Compile side by side what these shares need."""
        self._runner.warm_up({Phase.PREFILL: [], Phase.DECODE: list(decode_sms)})

    def _mark(self, batch: Batch) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._backend.stream(batch.phase, batch.num_sms).torch_stream)
        return event


class RandomSplits(Unobserving):
    """One of some splits; once `draws` is set, another one every few decode steps."""

    def __init__(self, splits: Sequence[tuple[int, int]], num_steps: Callable[[], int]) -> None:
        self.plans = [Plan.split(*split) for split in splits]
        self.plan = self.plans[0]
        self.draws = False
        self._num_steps = num_steps
        self._next_change = 0
        self._random = random.Random(0)

    def choose(self, load: Load) -> Plan:
        if self.draws and self._num_steps() >= self._next_change:
            self.plan = self._random.choice([plan for plan in self.plans if plan is not self.plan])
            self._next_change = self._num_steps() + self._random.choice(STEPS_PER_PLAN)
        return self.plan


class Prompts(threading.Thread):
    """Keeps some prompts in the queue; the same few in turn, which nobody shares the blocks of."""

    def __init__(self, engine: Engine, token_ids: Sequence[list[int]]) -> None:
        super().__init__()
        self._engine = engine
        self._token_ids = token_ids
        self._stop_event = threading.Event()

    def run(self) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        streams = []
        for index in range(2**31):
            streams.append(self._engine.stream(self._token_ids[index % len(self._token_ids)], params))
            if len(streams) >= NUM_QUEUED:
                streams.pop(0).result()
            if self._stop_event.is_set():
                break
        for stream in streams:
            stream.result()

    def stop(self) -> None:
        self._stop_event.set()
        self.join()


def measure(
    num_changes: int, decode_sms: Sequence[int], num_layers: int, prompt_step: int, max_seconds: float
) -> list[Row]:
    """Run until decode changed its share so often, and sum up."""
    config = EngineConfig(
        model=str(save_config({**LLAMA_3_8B, "num_hidden_layers": num_layers})),
        load_format="dummy",
        device="cuda:0",
        max_num_seqs=NUM_STREAMS + 2 * NUM_QUEUED,
        max_prefill_tokens=prompt_step,
        max_model_len=8192,
        enable_prefix_caching=False,
    )
    built = build_core(config)
    splits = [split for split in built.core._backend.splits if split[1] in decode_sms]
    observer = Observer(built.core, max_seconds)
    policy = RandomSplits(splits, lambda: len(observer.steps))
    scheduler: Any = built.core._scheduler
    scheduler._policy = policy
    observer.warm_up([split[1] for split in splits])
    rng = random.Random(1)
    draw = range(int(str(LLAMA_3_8B["vocab_size"])))
    params = SamplingParams(temperature=0.0, max_tokens=2**20, ignore_eos=True)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        streams = [engine.stream(rng.choices(draw, k=STREAM_PROMPT), params) for _ in range(NUM_STREAMS)]
        prompts = Prompts(engine, [rng.choices(draw, k=PROMPT) for _ in range(16)])
        prompts.start()
        observer.wait_until(lambda: bool(observer.steps) and observer.steps[-1].num_rows == NUM_STREAMS)
        for plan in policy.plans:
            policy.plan = plan
            prime(observer, plan, 2 * PROMPT // prompt_step)
        first, last_change = len(observer.steps), observer.num_changes + num_changes
        policy.draws, started = True, time.perf_counter()
        observer.wait_until(lambda: observer.num_changes >= last_change)
        policy.draws, elapsed = False, time.perf_counter() - started
        steps = observer.steps[first:]
        prompts.stop()
        num_plan_changes = engine.statistics().num_plan_changes
        for stream in streams:
            stream.abort()
        observer.wait_until(lambda: not any(engine.statistics().num_running.values()))
        torch.cuda.synchronize()
        rows = summary(steps)
    print(f"{num_plan_changes} plans, {len(steps)} decode steps in {elapsed:.1f} s")
    return rows


def prime(observer: Observer, plan: Plan, num_steps: int) -> None:
    """Under a plan in force, let both lanes run all their kinds of steps on its shares, and have these captured."""
    shares = [(phase, plan.num_sms(phase)) for phase in Phase]
    for _ in range(2):  # launches that have graphs captured, and replays
        for share in shares:
            target = observer.num_launched[share] + num_steps
            observer.wait_until(partial(observer.has_launched, share, target))
        observer.wait_for_graphs()


# ---- sum up


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """Between two successive decode steps; times in seconds, of the second step."""

    index: int
    num_sms: int
    is_change: bool
    gap: float
    between: float
    host: float
    running: float


def find_borders(steps: Sequence[Step]) -> list[Border]:
    """The borders between steps of all streams."""
    borders = []
    for index, (before, step) in enumerate(pairwise(steps)):
        if before.num_rows == step.num_rows == NUM_STREAMS:
            gap = before.end.elapsed_time(step.end) * 1e-3
            borders.append(
                Border(
                    index=index,
                    num_sms=step.num_sms,
                    is_change=before.num_sms != step.num_sms,
                    gap=gap,
                    between=gap - step.seconds,
                    host=step.host,
                    running=step.running,
                )
            )
    return borders


def find_extras(borders: Sequence[Border]) -> dict[Border, float]:
    """How much longer each gap is than the median of those on its share nearby that are no change."""
    indices: dict[int, list[int]] = defaultdict(list)
    gaps: dict[int, list[float]] = defaultdict(list)
    for border in borders:
        if not border.is_change:
            indices[border.num_sms].append(border.index)
            gaps[border.num_sms].append(border.gap)
    extras = {}
    for border in borders:
        own = indices[border.num_sms]
        near = slice(bisect_left(own, border.index - NEARBY), bisect_right(own, border.index + NEARBY))
        if near.stop - near.start >= MIN_NEARBY:
            extras[border] = border.gap - statistics.median(gaps[border.num_sms][near])
    return extras


def summary(steps: Sequence[Step]) -> list[Row]:
    """Changes beside steps on the same share as the one before, and how much more the former cost."""
    borders = find_borders(steps)
    extras = find_extras(borders)
    rows: list[Row] = []
    for name, is_change in ("changed", True), ("unchanged", False):
        own = [border for border in borders if border.is_change is is_change]
        row: Row = {"share": name, "count": len(own)}
        own_extras = [extras[border] * 1e3 for border in own if border in extras]
        row |= spread("extra", "ms", own_extras)
        row |= spread("between", "us", [border.between * 1e6 for border in own])
        row |= spread("host", "us", [border.host * 1e6 for border in own])
        rows.append(row | {"running_p50_us": statistics.median(border.running * 1e6 for border in own)})
    difference = {name: value - rows[1][name] for name, value in rows[0].items() if isinstance(value, float)}
    return [*rows, {"share": "difference", "count": "", **difference}]


def spread(name: str, unit: str, values: Sequence[float]) -> Row:
    return {
        f"{name}_p50_{unit}": statistics.median(values),
        f"{name}_p99_{unit}": percentile(values, 0.99),
        f"{name}_worst_{unit}": max(values),
    }


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--decode-sms", type=int, nargs="+", default=[32, 40, 48, 56, 64, 80])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt-step", type=int, default=512, help="prompt tokens of a step")
    parser.add_argument("--max-seconds", type=float, default=120.0, help="that anything may take")
    args = parser.parse_args()
    rows = measure(args.changes, args.decode_sms, args.layers, args.prompt_step, args.max_seconds)
    report(f"{args.changes} changes of split while {NUM_STREAMS} streams decode", rows, args.json)


if __name__ == "__main__":
    main()

"""A rank of an engine that `benchmarks/tensor_parallel.py` measures: rank 0 answers by JSON lines, the others serve it.

All wait for a line before they begin, so that many can start early: their imports take seconds.
"""

from __future__ import annotations

import faulthandler
import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import StepDriver, intervals, read_bandwidth, run_ahead
from semipd.build_latency import step_costs
from semipd.config import Phase, Shard, StaticPolicy
from semipd.device.cuda_driver import raise_max_connections
from semipd.device.green_context import GpuStream
from semipd.device.partition import Completion
from semipd.device.peer_memory import PeerMemory, PeerMemoryUnavailable
from semipd.kernels.ops import StepContext
from semipd.model.gpu_runner import GpuRunner
from semipd.parallel.launched import Launch, mark_launched, say_end
from semipd.parallel.linear import RowParallelLinear
from semipd.parallel.overlapped_product import OverlappedProduct
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.plans import SEQUENCE, Problem
from semipd.parallel.tuner import Tuned
from semipd.parallel.worker import serve_launched
from semipd.sched.batch import StepResult

GROWTH = 256
"""Tokens that a context may grow by while a decode step is timed."""

_FEWEST, _MOST = 3, GROWTH - 16  # steps of which the median is taken
_SETTLING = 0.3  # share of the steps that is not counted: power settles
_MAX_ATTEMPTS = 4  # to have a step from a graph
_DUMP = 0.9  # of the seconds in which this process is killed, which began with the line: it then says where it is

Launcher = Callable[[], Completion[StepResult]]
Row = dict[str, Any]


class SequencePlans(PlanStore):
    """A store by which no product overlaps; collectives have as many CTAs as that of an overlapped product's end."""

    def get(self, problem: Problem) -> Tuned:
        """The sequence."""
        return Tuned(plan=SEQUENCE)


class Steps:
    """The steps of one engine."""

    def __init__(self, options: Mapping[str, Any], world_size: int) -> None:
        self._rows: list[int] = options["rows"]
        self._decode_rows: list[int] = options["decode_rows"]
        self._prompt_tokens: int = options["prompt_tokens"]
        self._seconds: float = options["seconds"]
        self._is_cuda = options["device"] != "cpu"
        self._num_slots: int = options["slots"]
        max_context = self._prompt_tokens + GROWTH
        began = time.perf_counter()
        self.driver = driver = StepDriver(
            options["config"],
            max_context=max_context,
            device=options["device"],
            dtype="auto" if self._is_cuda else "float32",
            tensor_parallel_size=world_size,
            policy=StaticPolicy(),  # whose split is ready at the start
            calibrate=False if options["engine"] == "sequence" else None,
            max_num_seqs=self._num_slots,
            max_model_len=max_context,
            max_prefill_tokens=max(self._rows),
            kv_cache_tokens=self._num_slots * -(-max_context // 64) * 64,
        )
        self._own_spec = driver.spec.shard(Shard(world_size=world_size))
        self._start_seconds = time.perf_counter() - began
        split = driver.model.backend.default_split if options["split"] else None
        self._shares: dict[Phase, list[int]] = {phase: [driver.num_sms] for phase in Phase}
        for phase, num_sms in zip(Phase, split or (), strict=False):
            self._shares[phase].append(num_sms)
        self._slots = cycle(range(self._num_slots))
        driver.prefill([(slot, 0, 1) for slot in range(self._num_slots)]).wait()  # all have blocks and parameters

    def measure(self) -> Iterator[Row]:
        """Rows: of the engine, its prompt steps, and its decode steps."""
        runner = self.driver.model.executor
        yield {
            "kind": "engine",
            "start_s": self._start_seconds,
            "num_sms": self.driver.num_sms,
            "has_fused_sums": isinstance(runner, GpuRunner) and bool(runner._peers),
        }
        for num_sms in self._shares[Phase.PREFILL]:
            for num_rows in self._rows:
                timing = self._time(partial(self._prepare_prompts, num_rows, num_sms))
                yield {"kind": "prompt", "sms": num_sms, "rows": num_rows, **timing, **self._plans(num_rows, num_sms)}
        for num_sms in self._shares[Phase.DECODE]:
            bandwidth = self._bandwidth(num_sms) if self._decode_rows else None
            for num_rows in self._decode_rows:
                yield self._time_decode(num_rows, num_sms, bandwidth)

    def _prepare_prompts(self, num_rows: int, num_sms: int) -> Launcher:
        """Prompts that make up so many rows, in slots whose contexts they become."""
        starts = range(0, num_rows, self._prompt_tokens)
        chunks = [(next(self._slots), 0, min(self._prompt_tokens, num_rows - start)) for start in starts]
        return self.driver.prepare_prefill(chunks, num_sms)

    def _time_decode(self, num_rows: int, num_sms: int, bandwidth: float | None) -> Row:
        driver, context = self.driver, self._prompt_tokens
        driver.prefill([(slot, context - 1, 1) for slot in range(self._num_slots)]).wait()  # lengths, on all ranks
        timing = self._time(lambda: partial(driver.decode, range(num_rows), num_sms))
        row = {"kind": "decode", "sms": num_sms, "rows": num_rows, "context": context, **timing}
        if bandwidth is not None:
            costs = step_costs(self._own_spec, torch.bfloat16, torch.cuda.get_device_properties(0))
            row["bytes"] = costs.weight_bytes + num_rows * (context + timing["count"] // 2) * costs.context_bytes
            row["plain_read_ms"] = 1e3 * row["bytes"] / bandwidth
        return row

    def _time(self, prepare: Callable[[], Launcher]) -> Row:
        """Medians of steps that are launched one ahead of the host, from their graphs."""
        for _ in range(_MAX_ATTEMPTS):
            began = time.perf_counter()
            is_usual = prepare()().wait().is_usual
            once = time.perf_counter() - began
            if is_usual:
                break
            self.driver.wait_for_graphs()
        count = min(_MOST, max(_FEWEST, math.ceil(self._seconds / once)))
        launches = deque(prepare() for _ in range(count + 2))
        host: list[float] = []

        def launch() -> Completion[StepResult]:
            began = time.perf_counter()
            completion = launches.popleft()()
            host.append(time.perf_counter() - began)
            return completion

        times = intervals(run_ahead(launch, math.inf, lambda: not launches))
        times = times[int(_SETTLING * len(times)) :]
        return {
            "ms": 1e3 * statistics.median(times),
            "least_ms": 1e3 * min(times),
            "most_ms": 1e3 * max(times),
            "host_ms": 1e3 * statistics.median(host),
            "count": count,
            "has_graph": is_usual,
        }

    def _plans(self, num_rows: int, num_sms: int) -> Row:
        """The rows that such a step computes, padding included, and the plans of its row-parallel products."""
        runner = self.driver.model.executor
        if not isinstance(runner, GpuRunner):
            return {"computed_rows": num_rows, "plans": "-"}
        computed = runner._lanes[Phase.PREFILL].buckets.padded_rows(0, num_rows)
        context = StepContext(num_sms, phase=Phase.PREFILL)
        layer = runner._decoder._layers[0]
        plans = [plan_of(linear, computed, context) for linear in (layer.o, layer.down)]
        return {"computed_rows": computed, "plans": ", ".join(plans)}

    def _bandwidth(self, num_sms: int) -> float | None:
        """What a plain read reaches on a share of decode."""
        stream = self.driver.model.backend.stream(Phase.DECODE, num_sms)
        return read_bandwidth(stream.torch_stream, num_sms) if isinstance(stream, GpuStream) else None


def plan_of(linear: object, num_rows: int, context: StepContext) -> str:
    """The plan of a row-parallel layer for so many rows; "-" for the product and the lane's usual collective."""
    product = linear._product if isinstance(linear, RowParallelLinear) else None
    plan = None
    if isinstance(product, OverlappedProduct):
        plan = product._planner.plan(num_rows, product._weight_OI, context)
    return "-" if plan is None else str(plan)


def measure(options: Mapping[str, Any], world_size: int) -> None:
    """Print the rows of the engine, as they come."""
    steps = Steps(options, world_size)
    for row in steps.measure():
        print(json.dumps(row), flush=True)
    steps.driver.close()


def patches(engine: str) -> ExitStack:
    """What makes this rank one of a measured engine on GPUs; the same on all ranks.

    Each step that is measured has its graph. Those of the hundred others, which an engine captures beside its first
    steps, would take longer than the measurement.
    """
    stack = ExitStack()
    stack.enter_context(patch.object(GpuRunner, "_request_usual_graphs", lambda self: None))
    if engine == "sequence":  # takes what ranks do that cannot map each other's memory
        error = PeerMemoryUnavailable("this benchmark compares them")
        stack.enter_context(patch.object(PeerMemory, "__init__", side_effect=error))
    if engine == "wide":
        stack.enter_context(patch("semipd.build_overlap.PlanStore", SequencePlans))
    return stack


def main() -> None:
    options = json.loads(sys.argv[1])
    if not sys.stdin.readline():
        return
    faulthandler.dump_traceback_later(_DUMP * options["limit"], exit=True)
    launch = Launch()
    if options["device"] != "cpu":
        raise_max_connections()  # before anything starts CUDA
    with patches(options["engine"]):
        if launch.shard.rank > 0:
            serve_launched(launch)
            return
        mark_launched()
        try:
            measure(options, launch.shard.world_size)
        finally:
            say_end(launch)


if __name__ == "__main__":
    main()

"""What the GPU benchmarks share: model shapes, the roofs of the machine, and steps without a scheduler."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch.profiler import ProfilerActivity, profile

from semipd.bench.engine_arguments import SHAPES
from semipd.build_model import BuiltModel, build_model
from semipd.build_ranks import build_on_ranks
from semipd.config import EngineConfig, Phase
from semipd.device.partition import Completion
from semipd.model.gpu_runner import GpuRunner
from semipd.model.loader import load_spec, resolve_model
from semipd.model.spec import ModelSpec
from semipd.parallel.executor import RankedExecutor
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling, StepResult
from semipd.sched.lane import Executor

LLAMA_3_8B = SHAPES["llama-3-8b"]
"""The shapes of Llama-3-8B, with room for contexts of 32k tokens."""


def save_config(config: Mapping[str, object]) -> Path:
    """A folder with this config.json, for `load_format="dummy"`."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


class StepDriver:
    """Runs steps of chosen shapes on the engine's own runner, with block tables made up front.

    Slots have `blocks_per_slot` blocks of their own each. With `tensor_parallel_size` the steps run on so many ranks;
    `fill` and `set_lengths` are for one.
    """

    _ranked: RankedExecutor | None = None

    def __init__(
        self, config: Mapping[str, object] = LLAMA_3_8B, *, max_context: int = 2048, **options: object
    ) -> None:
        options = {"device": "cuda:0", "max_prefill_tokens": 2048, **options}
        arguments = EngineConfig(
            model=str(save_config(config)),
            load_format="dummy",
            block_size=64,
            **options,  # type: ignore[arg-type]
        )
        source = resolve_model(arguments.model, load_format="dummy")
        self.spec: ModelSpec = load_spec(source)
        self.model: BuiltModel
        if arguments.tensor_parallel_size == 1:
            self.model = build_model(arguments, source, self.spec)
        else:
            self.model, self._ranked = build_on_ranks(arguments, source, self.spec)
        self.blocks_per_slot = -(-max_context // 64)
        num_blocks = self.model.kv_cache.num_blocks
        assert arguments.max_num_seqs * self.blocks_per_slot <= num_blocks, f"the pool has only {num_blocks} blocks"
        self._rng = random.Random(0)
        self._step_id = 0
        self._staged: set[int] = set()

    @property
    def num_sms(self) -> int:
        """SMs of the device."""
        return self.model.backend.num_sms

    @property
    def executor(self) -> Executor:
        """What launches the steps, on all ranks."""
        return self._ranked or self.model.executor

    @property
    def runner(self) -> GpuRunner:
        """What runs the steps on this rank."""
        assert isinstance(self.model.executor, GpuRunner)
        return self.model.executor

    def prefill(
        self, chunks: Sequence[tuple[int, int, int]], num_sms: int | None = None, *, samples: bool = False
    ) -> Completion[StepResult]:
        """A prefill step of chunks (slot, start, tokens) of random tokens."""
        return self.prepare_prefill(chunks, num_sms, samples=samples)()

    def prepare_prefill(
        self, chunks: Sequence[tuple[int, int, int]], num_sms: int | None = None, *, samples: bool = False
    ) -> Callable[[], Completion[StepResult]]:
        """What launches such a step, whose tokens are drawn now."""
        entries = tuple(self._entry(slot, start, count, samples=samples) for slot, start, count in chunks)
        batch = self._batch(Phase.PREFILL, num_sms, (), entries, [slot for slot, _, _ in chunks])
        return partial(self.executor.execute, batch)

    def decode(
        self,
        slots: Sequence[int],
        num_sms: int | None = None,
        *,
        chunks: Sequence[tuple[int, int, int]] = (),
        features: SamplingFeature = SamplingFeature.NONE,
    ) -> Completion[StepResult]:
        """A decode step; with chunks a MIXED one."""
        entries = tuple(self._entry(slot, start, count, samples=False) for slot, start, count in chunks)
        batch = self._batch(Phase.DECODE, num_sms, tuple(slots), entries, [slot for slot, _, _ in chunks], features)
        return self.executor.execute(batch)

    def fill(self, lengths: Mapping[int, int], sampling: Mapping[str, float] | None = None) -> None:
        """Contexts of these lengths in slots, each with a first token.

        All but that token's K and V are normal numbers: computing 64 contexts of 4k tokens would take 7 s.
        """
        entries = tuple(self._entry(slot, 0, 1, samples=True, sampling=sampling) for slot in lengths)
        self.runner.execute(self._batch(Phase.PREFILL, None, (), entries, list(lengths))).wait()
        self.wait_for_graphs()  # torch draws no numbers while it captures
        with torch.inference_mode():
            for kv in self.model.kv_cache.kv_LPS2KH:
                kv.normal_()
        self.set_lengths(lengths)

    def set_lengths(self, lengths: Mapping[int, int]) -> None:
        """Have contexts go on from these lengths, over whatever their blocks hold."""
        lengths_X = self.runner._lengths_X
        lengths_X[list(lengths)] = torch.tensor(list(lengths.values()), dtype=lengths_X.dtype, device=lengths_X.device)
        torch.cuda.current_stream().synchronize()

    def wait_for_graphs(self) -> None:
        """Return once all that ran is captured, on all ranks."""
        self.executor.settle()

    def close(self) -> None:
        """Give everything back."""
        self.executor.close()
        self.model.backend.close()

    def _entry(
        self, slot: int, start: int, count: int, *, samples: bool, sampling: Mapping[str, float] | None = None
    ) -> PrefillEntry:
        admit = None
        if start == 0:
            values = {"temperature": 0.0, **(sampling or {})}
            admit = SlotSampling(seed=slot, sample_index=0, prompt_token_ids=(), **values)  # type: ignore[arg-type]
        token_ids = tuple(self._rng.choices(range(self.spec.vocab_size), k=count))
        return PrefillEntry(slot, start, token_ids, samples, admit)

    def _batch(
        self,
        phase: Phase,
        num_sms: int | None,
        decode_slots: tuple[int, ...],
        entries: tuple[PrefillEntry, ...],
        new_slots: Sequence[int],
        features: SamplingFeature = SamplingFeature.NONE,
    ) -> Batch:
        updates = []
        for slot in new_slots:
            if slot not in self._staged:
                self._staged.add(slot)
                first = slot * self.blocks_per_slot
                updates.append(BlockUpdate(slot, 0, tuple(range(first, first + self.blocks_per_slot))))
        self._step_id += 1
        return Batch(
            step_id=self._step_id,
            phase=phase,
            num_sms=num_sms or self.num_sms,
            decode_slots=decode_slots,
            prefill=entries,
            block_updates=tuple(updates),
            features=features,
        )


def run_ahead(launch: Callable[[], Completion[StepResult]], seconds: float, until: Callable[[], bool]) -> list[float]:
    """Launch steps one ahead of the host for so long, or until told; returns when each was done."""
    ends: list[float] = []
    pending = launch()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not until():
        following = launch()
        pending.wait()
        ends.append(time.perf_counter())
        pending = following
    pending.wait()
    return ends


def intervals(ends: Sequence[float]) -> list[float]:
    """Seconds from done to done."""
    return [end - start for start, end in pairwise(ends)]


def run_steps(launch: Callable[[], Completion[StepResult]], count: int) -> None:
    """Launch so many steps, one ahead of the host."""
    pending = launch()
    for _ in range(count - 1):
        following = launch()
        pending.wait()
        pending = following
    pending.wait()


@triton.jit
def _read_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, size: int, BLOCK: tl.constexpr) -> None:
    cta = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for start in tl.range(cta * BLOCK, size, tl.num_programs(0) * BLOCK, num_stages=4):
        total += tl.load(x_ptr + start + offsets, eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + cta, tl.sum(total, 0))


def read_bandwidth(stream: torch.cuda.Stream, num_sms: int, num_bytes: int = 2 << 30) -> float:
    """Bytes per second that a plain read of a large tensor reaches on the SMs of `stream`: a decode step's roof."""
    x = torch.randn(num_bytes // 2, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(1 << 12, device="cuda")
    best = 0.0
    with torch.cuda.stream(stream):
        for block, warps, per_sm in ((4096, 8, 2), (8192, 16, 2)):
            grid = num_sms * per_sm

            def read(grid: int = grid, block: int = block, warps: int = warps) -> None:
                _read_kernel[(grid,)](x, out, x.numel(), BLOCK=block, num_warps=warps)

            best = max(best, num_bytes / event_time(read, 6))
    return best


def event_time(launch: Callable[[], None], count: int) -> float:
    """Seconds of one of `count` launches on the current stream, after two to warm up."""
    for _ in range(2):
        launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    start, end = events
    start.record()
    for _ in range(count):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


def device_events(run: Callable[[], object]) -> list[dict[str, Any]]:
    """Kernels, copies and fills of the device while `run` runs, as the profiler's trace has them, in order of start."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # it waits for the device when it ends
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((event for event in events if event.get("cat") in kinds), key=lambda event: float(event["ts"]))

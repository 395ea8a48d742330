"""What the GPU benchmarks share: model shapes, the roofs of the machine, and steps without a scheduler."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from semipd.build_model import BuiltModel, build_gpu_model
from semipd.config import EngineConfig, Phase
from semipd.device.partition import Completion
from semipd.model.loader import load_spec, resolve_model
from semipd.model.spec import ModelSpec
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling, StepResult

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
"""The shapes of Llama-3-8B, with room for contexts of 32k tokens."""


def save_config(config: dict[str, object]) -> Path:
    """A folder with this config.json, for `load_format="dummy"`."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class StepDriver:
    """Runs steps of chosen shapes on the engine's own runner, with block tables made up front.

    Slots have `blocks_per_slot` blocks of their own each.
    """

    def __init__(self, config: dict[str, object] = LLAMA_3_8B, *, max_context: int = 2048, **options: object) -> None:
        options = {"max_prefill_tokens": 2048, **options}
        arguments = EngineConfig(
            model=str(save_config(config)),
            load_format="dummy",
            device="cuda:0",
            block_size=64,
            **options,  # type: ignore[arg-type]
        )
        source = resolve_model(arguments.model, load_format="dummy")
        self.spec: ModelSpec = load_spec(source)
        self.model: BuiltModel = build_gpu_model(arguments, source, self.spec)
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
        return partial(self.model.executor.execute, batch)

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
        return self.model.executor.execute(batch)

    def fill(self, lengths: dict[int, int], sampling: dict[str, float] | None = None) -> None:
        """Prefill a context of its length for each slot, in chunks of 2,048 tokens, and sample a first token."""
        for slot, length in lengths.items():
            for start in range(0, length, 2048):
                count = min(2048, length - start)
                entry = self._entry(slot, start, count, samples=start + count == length, sampling=sampling)
                self.model.executor.execute(self._batch(Phase.PREFILL, None, (), (entry,), [slot])).wait()

    def close(self) -> None:
        """Give everything back."""
        self.model.executor.close()
        self.model.backend.close()

    def _entry(
        self, slot: int, start: int, count: int, *, samples: bool, sampling: dict[str, float] | None = None
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
    """Launch steps one ahead of the host for so long, or until told; returns seconds from done to done."""
    times: list[float] = []
    pending = launch()
    end = time.perf_counter() + seconds
    last = None
    while time.perf_counter() < end and not until():
        following = launch()
        pending.wait()
        now = time.perf_counter()
        if last is not None:
            times.append(now - last)
        last, pending = now, following
    pending.wait()
    return times


def run_steps(launch: Callable[[], Completion[StepResult]], count: int) -> None:
    """Launch so many steps, one ahead of the host."""
    pending = launch()
    for _ in range(count - 1):
        following = launch()
        pending.wait()
        pending = following
    pending.wait()


@triton.jit
def _read_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, size: int, BLOCK: tl.constexpr, NUM_CTAS: tl.constexpr) -> None:
    cta = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for start in tl.range(cta * BLOCK, size, NUM_CTAS * BLOCK, num_stages=4):
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
                _read_kernel[(grid,)](x, out, x.numel(), BLOCK=block, NUM_CTAS=grid, num_warps=warps)

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

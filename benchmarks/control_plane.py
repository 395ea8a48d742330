"""What the control plane costs: schedule, commit and delivery (detokenising included) of decode steps, without a model.

    python -m benchmarks.control_plane MODEL [--requests 256] [--steps 500] [--soak 100000] [--json FILE]

A scripted executor answers every step at once with random token ids, so all that runs is Python: the lane's thread
schedules and commits, the delivery thread detokenises with MODEL's tokenizer (a folder or .gguf file) and fills the
streams. Both share the GIL, so the CPU time of the whole process per step is what one step costs.
`--soak` sends that many short requests through the engine instead and prints the memory that stays.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from semipd import Engine, SamplingParams
from semipd.config import EngineConfig, Phase
from semipd.core import EngineCore, RequestLimits
from semipd.device.partition import Completion, Stream
from semipd.memory.block_allocator import BlockAllocator
from semipd.sched.batch import Batch, StepResult
from semipd.tokenizer import Tokenizer, load_tokenizer


class _Done:
    """A step that is finished as soon as the gate is open."""

    def __init__(self, result: StepResult, gate: threading.Event) -> None:
        self._result = result
        self._gate = gate

    def is_done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        self._gate.wait()
        return self._result


class _ScriptedExecutor:
    """Answers with token ids drawn in advance; counts decode steps of the full batch and the CPU time they took."""

    def __init__(self, vocab_size: int, num_requests: int) -> None:
        rng = random.Random(0)
        self._rows = [[rng.randrange(vocab_size) for _ in range(num_requests)] for _ in range(64)]
        self._num_requests = num_requests
        self.gate = threading.Event()
        self.num_full_steps = 0
        self.first: tuple[float, float] | None = None
        self.last: tuple[float, float] | None = None

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def execute(self, batch: Batch) -> Completion[StepResult]:
        num_rows = len(batch.decode_slots) + sum(entry.samples for entry in batch.prefill)
        now = time.monotonic()
        if len(batch.decode_slots) == self._num_requests:
            self.last = (now, time.process_time())
            self.first = self.first or self.last
            self.num_full_steps += 1
        return _Done(StepResult(self._rows[batch.step_id % 64][:num_rows], now), self.gate)


class _Backend:
    """A device of two parts whose streams nobody uses."""

    num_sms = 2
    splits = ((1, 1),)
    default_split = (1, 1)

    def stream(self, phase: Phase, num_sms: int) -> Stream:
        raise AssertionError("the scripted executor needs no stream")

    def close(self) -> None:
        return


def _engine(tokenizer: Tokenizer, executor: _ScriptedExecutor, num_requests: int) -> Engine:
    core = EngineCore(
        config=EngineConfig(model="scripted", max_num_seqs=num_requests),
        limits=RequestLimits(vocab_size=tokenizer.vocab_size, max_model_len=4096, eos_token_ids=frozenset()),
        executor=executor,
        backend=_Backend(),
        allocator=BlockAllocator(num_requests * 4096 // 16, 16),
        max_prefill_tokens=16_384,
    )
    return Engine.from_core(core, tokenizer)


def measure_step(tokenizer: Tokenizer, num_requests: int, num_steps: int) -> dict[str, Any]:
    """CPU and wall milliseconds of a decode step of `num_requests`."""
    executor = _ScriptedExecutor(tokenizer.vocab_size, num_requests)
    with _engine(tokenizer, executor, num_requests) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=num_steps)
        streams = [engine.submit([index % 1000, 1, 2, 3, 4, 5, 6, 7], params) for index in range(num_requests)]
        ends: list[tuple[float, float]] = []  # delivered, before a reader puts any result together
        for stream in streams:
            stream.call_when_ended(lambda: ends.append((time.monotonic(), time.process_time())))
        executor.gate.set()  # not before, or the first requests end while the last ones are still being submitted
        outputs = [stream.result() for stream in streams]
    assert all(len(output.outputs[0].token_ids) == num_steps for output in outputs)
    assert executor.first is not None and executor.last is not None
    wall_end, cpu_end = max(ends)
    steps = executor.num_full_steps
    return {
        "num_requests": num_requests,
        "num_full_steps": steps,
        "cpu_ms_per_step": 1e3 * (cpu_end - executor.first[1]) / steps,
        "wall_ms_per_step": 1e3 * (wall_end - executor.first[0]) / steps,
    }


def soak(tokenizer: Tokenizer, num_requests: int) -> dict[str, Any]:
    """Resident memory after a tenth and after all of `num_requests` short requests."""
    executor = _ScriptedExecutor(tokenizer.vocab_size, 256)
    executor.gate.set()
    rss: list[float] = []
    started = time.monotonic()
    with _engine(tokenizer, executor, 256) as engine:
        for tenth in range(10):
            prompts = [[tenth, index % 1000, 1, 2] for index in range(num_requests // 10)]
            engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4))
            gc.collect()
            rss.append(_resident_mib())
        engine.check_integrity()
    return {
        "num_requests": num_requests,
        "requests_per_second": num_requests / (time.monotonic() - started),
        "resident_mib_after_each_tenth": rss,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder or .gguf file whose tokenizer to use")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--soak", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    if args.soak:
        result = soak(tokenizer, args.soak)
    else:
        result = measure_step(tokenizer, args.requests, args.steps)
    for name, value in result.items():
        print(f"{name:>32}  {value:.3f}" if isinstance(value, float) else f"{name:>32}  {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(environment() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The table of step times is measured on the GPU's own runner: here in Triton's interpreter, on the cores of a CPU."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.step_times import PROMPT_SLOTS, Step, TableDriver, Timing, Trial, make_trials, run_trials, summary
from semipd.build_model import BuiltModel
from semipd.config import Phase
from semipd.device.cpu import CpuPartitionBackend
from semipd.kernels.ops import create_ops
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.gpu_runner import GpuRunner
from semipd.model.loader import load_spec, load_weights, resolve_model
from semipd.model.step_inputs import Buckets, StepShape
from semipd.sched.batch import Batch, StepResult
from semipd.sched.latency import count_pairs
from tests.fakes import EagerGraphs
from tests.tiny import save_tiny_model

MAX_SEQS = 2 + PROMPT_SLOTS
MAX_CHUNK = 16
BLOCK_SIZE = 16
MAX_MODEL_LEN = 640
NUM_BLOCKS = 90
QUICK = Timing(lead=0.0, steps=1, shortest=0.0, longest=20.0)
H100_SPLITS = [(132 - 8 * groups, 8 * groups) for groups in range(1, 15)]


class SerialRunner(GpuRunner):
    """One lane's launches at a time: the interpreter replaces parts of Triton while a kernel runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._serial = threading.Lock()

    def _launch(self, batch: Batch, shape: StepShape) -> Callable[[], StepResult]:
        with self._serial:
            return super()._launch(batch, shape)


class HostDriver(TableDriver):
    """The driver without a GPU."""

    def __init__(self, folder: Path) -> None:
        device, dtype = torch.device("cpu"), torch.float32
        source = resolve_model(str(folder))
        self.spec = spec = load_spec(source)
        layout = spec.kv_layout(dtype.itemsize)
        kv_cache = KVCache(layout=layout, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=device)
        kv_cache.fill_(float("nan"))
        backend = CpuPartitionBackend()
        runner = SerialRunner(
            decoder=Decoder(spec, load_weights(source, spec, dtype=dtype, device=device), create_ops("triton")),
            sampler=CudaSampler(max_slots=MAX_SEQS, vocab_size=spec.vocab_size, device=device),
            kv_cache=kv_cache,
            backend=backend,
            graphs=EagerGraphs(),
            buckets=dict.fromkeys(Phase, Buckets(MAX_SEQS, MAX_CHUNK)),
            num_heads=spec.num_heads,
            max_slots=MAX_SEQS,
            max_model_len=MAX_MODEL_LEN,
            device=device,
        )
        runner.warm_up({phase: [backend.num_sms] for phase in Phase})
        self.model = BuiltModel(executor=runner, backend=backend, kv_cache=kv_cache, max_model_len=MAX_MODEL_LEN)
        self.blocks_per_slot = 1
        self._rng = random.Random(0)
        self._step_id = 0
        self._staged = set()

    def set_lengths(self, lengths: Mapping[int, int]) -> None:
        values = torch.tensor(list(lengths.values()), dtype=torch.int32)
        self.runner._lengths_X[list(lengths)] = values

    def wait_for_graphs(self) -> None:
        pass


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[HostDriver]:
    save_tiny_model(tmp_path, "llama", dtype=torch.float32)
    driver = HostDriver(tmp_path)
    driver.fill(dict.fromkeys(range(MAX_SEQS), 1))
    yield driver
    driver.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_trial_becomes_points_of_its_own_work(driver: HostDriver, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    whole = driver.num_sms
    prefill_sms, decode_sms = next(iter(driver.model.backend.splits), (whole, whole))
    trials = [
        (Step(num_sms=whole, rows=2, context=10_000),),  # more than the pool has
        (Step(num_sms=whole, rows=2, context=9, chunk=8, start=16),),
        (Step(num_sms=decode_sms, rows=1, context=20), Step(num_sms=prefill_sms, chunk=16)),
    ]
    deadline = time.perf_counter() + 200.0
    result = run_trials(driver, trials, QUICK, deadline=deadline, path=path, info={"title": "test"})
    assert json.loads(path.read_text()) == result
    assert [item["error"].split(":")[0] for item in result["failed"]] == ["ValueError"]
    mixed, decode, prefill = result["points"]
    assert (mixed["num_decodes"], mixed["num_prompt_tokens"], mixed["prompt_pairs"]) == (2, 8, count_pairs(16, 8))
    assert 18 <= mixed["context_tokens"] <= 18 + 2 * mixed["count"] + 4
    assert (decode["num_sms"], decode["other_sms"], decode["num_decodes"]) == (decode_sms, prefill_sms, 1)
    assert (prefill["num_sms"], prefill["other_sms"], prefill["num_prompt_tokens"]) == (prefill_sms, decode_sms, 16)
    assert all(point["seconds"] > 0.0 and point["count"] >= 1 for point in result["points"])
    assert summary(result).row_count == 3


class NoDevice:
    """As much of a driver as a run asks for itself."""

    model = SimpleNamespace(
        backend=SimpleNamespace(num_sms=132, splits=H100_SPLITS),
        kv_cache=SimpleNamespace(num_blocks=7000, block_size=64),
    )


def run(trials: Sequence[Trial], path: Path | None, deadline: float = float("inf")) -> dict[str, Any]:
    driver = cast("TableDriver", NoDevice())
    return run_trials(driver, trials, QUICK, deadline=deadline, path=path, info={})


def test_what_time_does_not_allow_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    result = run(make_trials(132, [])[:4], path, deadline=0.0)
    assert json.loads(path.read_text())["points"] == result["points"] == []
    assert result["failed"][0]["error"] == "4 trials left out"


def test_a_trial_that_fails_costs_itself_and_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    point = dict.fromkeys(("num_sms", "other_sms", "num_prompt_tokens", "num_decodes"), 1)

    def measure(driver: TableDriver, trial: Trial, timing: Timing) -> list[dict[str, Any]]:
        if trial[0].rows == 3:
            raise RuntimeError("illegal address")
        return [point]

    monkeypatch.setattr("benchmarks.step_times.measure", measure)
    trials = [(Step(num_sms=132, rows=rows, context=9),) for rows in (1, 3, 1, *[3] * 8, 1, 1)]
    result = run(trials, None)
    assert result["points"] == [point] * 2
    assert len(result["failed"]) == 10 and result["failed"][-1]["error"] == "2 trials left out"


def test_an_h100_is_offered_every_kind_of_trial() -> None:
    trials = make_trials(132, H100_SPLITS)
    assert len(set(trials)) == len(trials)
    shares = {(step.phase, step.num_sms) for trial in trials for step in trial}
    assert shares >= {(Phase.DECODE, share) for share in (132, 56, 48, 32)}
    assert shares >= {(Phase.PREFILL, share) for share in (132, 116, 100, 84, 76)}
    for trial in trials:
        assert sum(step.rows * (step.context + 512) + 2 * (step.start + step.chunk) for step in trial) < 450_000


def test_a_device_that_is_not_split_has_trials_on_the_whole() -> None:
    assert {step.num_sms for trial in make_trials(108, []) for step in trial} == {108}

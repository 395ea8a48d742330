"""What a new engine knows of step times: stored figures scaled to its model and device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step_table import StepTable
from semipd.build_latency import build_latency, step_costs, store_key
from semipd.cache_file import cache_folder
from semipd.config import EngineConfig
from semipd.latency_figures import H100_LLAMA_3_8B, stored_state
from semipd.latency_store import LatencyStore
from semipd.model.spec import ModelSpec
from semipd.sched.latency import LatencyModel, StepWork, count_pairs
from tests.test_cache_file import leave_homeless

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "h100_step_times.json"
LLAMA_3_8B = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope_theta=5e5,
    dtype="bfloat16",
    eos_token_ids=frozenset({128_001}),
)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)
WORKS = [
    StepWork(132, 0, 0, 0, 64, 64_000),
    StepWork(132, 0, 2048, count_pairs(0, 2048)),
    StepWork(132, 0, 512, count_pairs(1024, 512), 64, 64_000),
    StepWork(48, 84, 0, 0, 64, 64_000),
    StepWork(84, 48, 2048, count_pairs(0, 2048)),
]


def model_of(spec: ModelSpec, device: SimpleNamespace = H100, dtype: torch.dtype = torch.bfloat16) -> LatencyModel:
    num_sms = device.multi_processor_count
    return LatencyModel.from_state(stored_state(step_costs(spec, dtype, device), num_sms))


def test_the_figures_are_of_llama_3_8b_on_an_h100() -> None:
    costs = step_costs(LLAMA_3_8B, torch.bfloat16, H100)
    assert costs.terms == pytest.approx(H100_LLAMA_3_8B.terms, rel=0.01)


@pytest.mark.skipif(not TABLE.is_file(), reason="benchmarks/results is not here")
def test_the_figures_are_those_that_were_measured() -> None:
    model = model_of(LLAMA_3_8B)
    for work, seconds in StepTable.load(TABLE).points:
        if work.num_sms + work.other_sms <= 132:
            assert model.predict(work) == pytest.approx(seconds, rel=0.3)
    assert model.trusted_prompt_tokens == 2048


def test_half_the_layers_take_half_the_time() -> None:
    full, half = model_of(LLAMA_3_8B), model_of(replace(LLAMA_3_8B, num_layers=16))
    for work in WORKS:
        assert 0.49 < half.predict(work) / full.predict(work) < 0.56, work  # the head is there all the same


@pytest.mark.parametrize(("change", "fewest", "most"), [({"num_kv_heads": 1}, 0.4, 0.6), ({"num_heads": 64}, 1.0, 1.2)])
def test_contexts_cost_what_their_heads_do(change: dict[str, int], fewest: float, most: float) -> None:
    work, other = StepWork(132, 0, 0, 0, 64, 200_000), replace(LLAMA_3_8B, **change)  # type: ignore[arg-type]
    assert fewest < model_of(other).predict(work) / model_of(LLAMA_3_8B).predict(work) < most


def test_a_smaller_device_is_slower_by_what_bounds_the_step() -> None:
    a100 = SimpleNamespace(
        name="A100",
        major=8,
        minor=0,
        multi_processor_count=108,
        clock_rate=1_410_000,
        memory_clock_rate=1_593_000,
        memory_bus_width=5120,
    )
    ours, theirs = model_of(LLAMA_3_8B, a100), model_of(LLAMA_3_8B)
    decode, prompt = StepWork(108, 0, 0, 0, 8, 8000), StepWork(108, 0, 2048, count_pairs(0, 2048))
    assert ours.predict(decode) / theirs.predict(replace(decode, num_sms=132)) == pytest.approx(3.35 / 2.04, rel=0.02)
    assert ours.predict(prompt) / theirs.predict(replace(prompt, num_sms=132)) == pytest.approx(3.43, rel=0.05)
    assert ours.predict(StepWork(40, 68, 0, 0, 8, 8000)) > ours.predict(decode)


def test_float32_reads_twice_and_computes_slower() -> None:
    wide = model_of(LLAMA_3_8B, dtype=torch.float32)
    assert wide.predict(WORKS[0]) > 1.9 * model_of(LLAMA_3_8B).predict(WORKS[0])
    assert wide.predict(WORKS[1]) > 5 * model_of(LLAMA_3_8B).predict(WORKS[1])


def test_the_key_names_what_matters_and_nothing_else() -> None:
    key = store_key(LLAMA_3_8B, torch.bfloat16, H100.name, 132, 1)
    assert key == store_key(replace(LLAMA_3_8B, eos_token_ids=frozenset({1, 2})), torch.bfloat16, H100.name, 132, 1)
    for other in (
        store_key(replace(LLAMA_3_8B, num_layers=31), torch.bfloat16, H100.name, 132, 1),
        store_key(LLAMA_3_8B, torch.float16, H100.name, 132, 1),
        store_key(LLAMA_3_8B, torch.bfloat16, "NVIDIA H200", 132, 1),
        store_key(LLAMA_3_8B, torch.bfloat16, H100.name, 114, 1),
        store_key(LLAMA_3_8B, torch.bfloat16, H100.name, 132, 2),
    ):
        assert key != other
    LatencyStore(key, Path())  # it is JSON


def test_a_cpu_starts_from_nothing() -> None:
    model, store = build_latency(EngineConfig(model="x", device="cpu"), LLAMA_3_8B, 2)
    assert store is None and not model.to_state()["given"]


@pytest.mark.parametrize("calibrate", [None, True, False])
def test_a_gpu_starts_from_what_is_stored_unless_told_otherwise(
    calibrate: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored = LatencyModel(132)
    stored.observe(WORKS[0], 0.5)
    stored.is_calibrated = True
    key = store_key(LLAMA_3_8B, torch.bfloat16, H100.name, 132, 1)
    folder = cache_folder()
    assert folder is not None
    LatencyStore(key, folder / "latency").save(stored.to_state())
    config = EngineConfig(model="x", device="cuda:0", calibrate=calibrate)
    model, store = build_latency(config, LLAMA_3_8B, 132)
    assert model.is_calibrated is (calibrate is None)
    assert (model.predict(WORKS[0]) > 0.1) is (calibrate is None)
    assert (store is None) is (calibrate is False)


def test_a_gpu_starts_for_a_user_without_a_home(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    leave_homeless(monkeypatch)
    model, store = build_latency(EngineConfig(model="x", device="cuda:0"), LLAMA_3_8B, 132)
    assert len(caplog.records) == 1 and not model.is_calibrated
    assert store is not None, "it is calibrated all the same"
    store.save(model.to_state())

"""The benchmark of steps on several ranks: on a CPU, with its GPU half in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import tensor_parallel_rank
from benchmarks.tensor_parallel import compare, layer_times, remarks, speedup, table
from benchmarks.tensor_parallel_rank import SequencePlans, Steps, plan_of
from semipd.build_model import BuiltModel
from semipd.config import EngineConfig, Phase, Shard
from semipd.device.cpu import CpuPartitionBackend
from semipd.kernels.ops import StepContext, create_ops
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.gpu_runner import GpuRunner
from semipd.model.loader import ModelSource, load_weights
from semipd.model.spec import ModelSpec
from semipd.model.step_inputs import Buckets
from semipd.parallel.group import TensorGroup
from semipd.parallel.linear import RowParallelLinear
from semipd.parallel.overlapped_product import OverlappedProducts
from semipd.parallel.planner import FixedPlans
from semipd.parallel.plans import Collective, Plan, Problem
from tests.fakes import EagerGraphs
from tests.parallel.workers import ROOT

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
OPTIONS = {
    "engine": "overlap",
    "config": CONFIG,
    "device": "cuda:0",
    "rows": [8, 20],
    "decode_rows": [2],
    "prompt_tokens": 16,
    "slots": 2,
    "split": False,
    "seconds": 0.0,
    "limit": 60.0,
}


def step(engine: str, layers: int, ms: float, rows: int = 512, **values: Any) -> dict[str, Any]:
    return {
        "kind": "prompt",
        "engine": engine,
        "layers": layers,
        "sms": 132,
        "rows": rows,
        "ms": ms,
        "host_ms": 0.5,
        "computed_rows": rows + 16,
        "plans": f"{engine}!",
        **values,
    }


def test_rows_of_all_engines_become_lines() -> None:
    rows = [step("sequence", 1, 3.0), step("sequence", 5, 11.0), step("overlap", 1, 2.0), step("overlap", 5, 6.0)]
    rows += [step("overlap", 1, 9.0, rows=1024), {"kind": "error", "engine": "sequence", "layers": 1, "error": "x"}]
    compared = compare(rows, "prompt")
    assert [(row["layers"], row["rows"]) for row in compared] == [(1, 512), (5, 512), (1, 1024)]
    assert [speedup(row) for row in compared] == [1.5, pytest.approx(11 / 6), None]
    (layer,) = layer_times(compared)
    assert (layer["sequence"]["ms"], layer["overlap"]["ms"], speedup(layer)) == (2.0, 1.0, 2.0)
    lines = table([*compared, layer], ["sequence", "overlap"], {"overlap": "ours"})
    assert [line["layers"] for line in lines] == [1, 5, 1, "a layer"]
    assert lines[0] == {
        "layers": 1,
        "SMs": 132,
        "rows": "512 (528)",
        "sequence": "3.00",
        "ours": "2.00",
        "speed-up": "1.500",
        "host": "0.50",
        "plans": "overlap!",
    }
    assert (lines[2]["sequence"], lines[2]["speed-up"], lines[3]["host"]) == ("", "", "")


def test_a_speedup_is_over_the_fastest_of_the_others() -> None:
    (row,) = compare([step("sequence", 1, 3.0), step("wide", 1, 2.5), step("overlap", 1, 2.0)], "prompt")
    assert speedup(row) == 1.25


def test_what_is_wrong_with_an_engine_is_remarked() -> None:
    engine = {"kind": "engine", "start_s": 12.3, "has_fused_sums": True}
    eager = step("overlap", 1, 2.0, has_graph=False)
    assert remarks([engine, step("overlap", 1, 2.0)]) == ["ready after 12 s", "fused sums"]
    assert remarks([eager, eager, {"kind": "error", "error": "x"}]) == ["x", "2 steps without graphs"]


def test_the_plan_of_a_layer_is_told() -> None:
    weight_OI = torch.ones(8, 4)
    plans = FixedPlans(2, {(512, 8, 4): Plan((2, 4), 8), (1024, 8, 4): Plan()})
    group = cast("TensorGroup", SimpleNamespace(shard=Shard(world_size=2)))
    ops, products = create_ops("reference"), OverlappedProducts(plans, None, None)
    overlapped = RowParallelLinear(weight_OI, ops=ops, group=group, make_product=products)
    usual = RowParallelLinear(weight_OI, ops=ops, group=group)
    whole, split = (StepContext(num_sms, phase=Phase.PREFILL) for num_sms in (2, 1))
    assert [plan_of(overlapped, rows, whole) for rows in (528, 1024, 16)] == ["2+2/8", "sequence", "-"]
    assert [plan_of(overlapped, 528, split), plan_of(usual, 528, whole), plan_of(object(), 528, whole)] == ["-"] * 3


def test_a_store_of_sequences_has_one_for_each_problem() -> None:
    problem = Problem(
        device="gpu",
        num_rows=512,
        num_outputs=8,
        num_inputs=4,
        dtype="bfloat16",
        world_size=2,
        num_sms=132,
        collective=Collective.ALL_REDUCE,
        ctas=(8,),
    )
    assert not SequencePlans(None).get(problem).plan.overlaps


def build_interpreted(config: EngineConfig, source: ModelSource, spec: ModelSpec) -> BuiltModel:
    """What a GPU has, on a CPU."""
    device, dtype = torch.device("cpu"), torch.float32
    assert config.kv_cache_tokens is not None and config.block_size is not None
    assert config.max_prefill_tokens is not None and config.max_model_len is not None
    num_blocks = config.kv_cache_tokens // config.block_size
    layout = spec.kv_layout(dtype.itemsize)
    kv_cache = KVCache(layout=layout, num_blocks=num_blocks, block_size=config.block_size, dtype=dtype, device=device)
    kv_cache.fill_(float("nan"))
    backend = CpuPartitionBackend()
    runner = GpuRunner(
        decoder=Decoder(spec, load_weights(source, spec, dtype=dtype, device=device), create_ops("triton")),
        sampler=CudaSampler(max_slots=config.max_num_seqs, vocab_size=spec.vocab_size, device=device),
        kv_cache=kv_cache,
        backend=backend,
        graphs=EagerGraphs(),
        buckets={
            Phase.PREFILL: Buckets(config.max_num_seqs, config.max_prefill_tokens),
            Phase.DECODE: Buckets(config.max_num_seqs, 0),
        },
        num_heads=spec.num_heads,
        max_slots=config.max_num_seqs,
        max_model_len=config.max_model_len,
        device=device,
    )
    runner.warm_up({phase: [backend.num_sms] for phase in Phase})
    return BuiltModel(executor=runner, backend=backend, kv_cache=kv_cache, max_model_len=config.max_model_len)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_steps_of_the_gpus_runner_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.build_model", build_interpreted)
    monkeypatch.setattr(tensor_parallel_rank, "_FEWEST", 1)
    steps = Steps(OPTIONS, world_size=1)
    try:
        engine, *prompts, decode = steps.measure()
        lengths_X = steps.driver.runner._lengths_X.tolist()
    finally:
        steps.driver.close()
    assert engine["kind"] == "engine" and not engine["has_fused_sums"]
    assert [(row["kind"], row["rows"]) for row in prompts] == [("prompt", 8), ("prompt", 20)]
    assert [row["computed_rows"] for row in prompts] == [16, 22]  # the most is as many as can come
    assert (decode["kind"], decode["rows"]) == ("decode", 2)
    for row in (*prompts, decode):
        assert 0 < row["least_ms"] <= row["ms"] <= row["most_ms"] and row["has_graph"]
    num_steps = 1 + decode["count"] + 2
    assert lengths_X[:2] == [16 + num_steps] * 2, "decodes begin with contexts of the prompts' length"


@pytest.mark.slow
def test_two_ranks_are_measured_by_one_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "out.json"
    sizes = ("--layers", "1", "--rows", "8", "20", "--prompt-tokens", "16", "--decode-rows", "1", "--measuring", "0")
    engines = ("--engines", "overlap")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.tensor_parallel",
            tmp_path,
            "--device",
            "cpu",
            *sizes,
            *engines,
            "--json",
            path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "prompt steps" in done.stdout and "decode steps" in done.stdout
    result = json.loads(path.read_text())
    assert {row["kind"] for row in result["engines"]} == {"engine"}
    for row in result["prompt_steps"] + result["decode_steps"]:
        assert row["overlap"]["ms"] > 0
    assert {row["rows"] for row in result["prompt_steps"]} == {8, 20}

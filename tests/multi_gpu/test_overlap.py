"""Products that overlap with their collectives on two GPUs: the operator against cuBLAS and NCCL, and whole engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.build import build_core
from semipd.config import EngineConfig, MixedPolicy, Phase, PolicyConfig, Shard, StaticPolicy
from semipd.latency_store import cache_folder
from semipd.model.loader import load_spec, resolve_model
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import host_store
from semipd.parallel.overlap import BESIDE_CTAS
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.planner import FixedPlans, problems_of
from semipd.parallel.plans import Collective, Plan, Problem
from semipd.parallel.tuner import Tuned
from tests.gpu.judge import SMALL, Judge, batch_shortfalls, save_config
from tests.multi_gpu.test_engine import prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or torch.cuda.get_device_capability() != (9, 0), reason="needs two Hopper GPUs"
    ),
    pytest.mark.timeout(300),
]

LENGTHS = (513, 700, 1000, 1024, 1500, 2048)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def test_the_operator_is_right_in_all_collectives(record_property: Callable[[str, object], None]) -> None:
    _store, port = host_store()
    command = [sys.executable, "-m", "tests.multi_gpu.overlap_operator", LOOPBACK, str(port)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    errors = [json.loads(output.splitlines()[-1]) for output in outputs]
    record_property("largest error", max(errors))
    assert max(errors) < 6e-3


def force_plans(config: EngineConfig) -> None:
    """Leave a store in which every product overlaps, as `Overlap` would find it."""
    assert config.max_prefill_tokens is not None
    source = resolve_model(config.model, load_format=config.load_format)
    own = load_spec(source).shard(Shard(world_size=2))
    properties = torch.cuda.get_device_properties(0)
    problem = Problem(
        device=properties.name,
        num_rows=1,
        num_outputs=1,
        num_inputs=1,
        dtype="bfloat16",
        world_size=2,
        num_sms=properties.multi_processor_count,
        collective=Collective.ALL_REDUCE,
        ctas=BESIDE_CTAS,
    )
    shapes = [(own.hidden_size, own.num_heads * own.head_dim), (own.hidden_size, own.intermediate_size)]
    store = PlanStore(cache_folder().parent / "overlap" / "plans.json")
    for i, one in enumerate(problems_of(problem, shapes, config.max_num_seqs + config.max_prefill_tokens)):
        blocks = one.num_blocks
        store.put(one, Tuned(plan=Plan((1, blocks // 2, blocks), BESIDE_CTAS[i % 2])))
    store.save()


@pytest.mark.parametrize("policy", [StaticPolicy(), MixedPolicy(token_budget=1024)], ids=["static", "mixed"])
def test_tokens_of_an_engine_whose_products_overlap(
    tmp_path: Path,
    policy: PolicyConfig,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_config(tmp_path, SMALL)
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cuda",
        tensor_parallel_size=2,
        policy=policy,
        max_prefill_tokens=2048,
        max_num_seqs=32,
        kv_cache_tokens=65536,
    )
    force_plans(config)
    asked: set[tuple[Phase, bool]] = set()
    find = FixedPlans.plan

    def plan(planner: FixedPlans, num_rows: int, weight: torch.Tensor, context: object) -> Plan | None:
        found = find(planner, num_rows, weight, context)  # type: ignore[arg-type]
        asked.add((context.phase, found is not None and found.overlaps))  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(FixedPlans, "plan", plan)
    exact = Judge(folder, torch.float32, drawn_in=torch.bfloat16)
    half = Judge(folder, torch.bfloat16, drawn_in=torch.bfloat16)
    texts = prompts(seed=9, lengths=LENGTHS)
    error = max(float((exact.logits(prompt) - half.logits(prompt)).abs().max()) for prompt in texts)
    built = build_core(config)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        for seed in (0, 1, 2):  # the first round is eager, the next ones replay graphs
            batch = prompts(seed, LENGTHS)
            outputs = engine.generate(batch, GREEDY)
            finished = [(prompt, output.outputs[0].token_ids) for prompt, output in zip(batch, outputs, strict=True)]
            assert batch_shortfalls(exact, finished).max() <= 2 * error
            engine.settle()
        engine.check_integrity()
    record_property("asked", sorted(map(str, asked)))
    assert any(overlaps for _, overlaps in asked), "no step overlapped"

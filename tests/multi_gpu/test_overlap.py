"""Products that overlap with their collectives on two GPUs: the operator against cuBLAS and NCCL, and whole engines."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.build import BuiltEngine, build_core
from semipd.build_overlap import _describe, plans_path
from semipd.config import EngineConfig, ExclusivePolicy, MixedPolicy, Phase, PolicyConfig, Shard, StaticPolicy
from semipd.device.peer_memory import PeerMemoryUnavailable
from semipd.kernels.ops import StepContext
from semipd.model.loader import load_spec, resolve_model
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import host_store
from semipd.parallel.overlap import BESIDE_CTAS
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.planner import FixedPlans, problems_of
from semipd.parallel.plans import Collective, Plan, Problem
from semipd.parallel.tuner import Tuned
from tests.gpu.judge import SMALL, Judge, batch_shortfalls, bfloat16_judge, save_config
from tests.gpu.random_plans import draw_plans
from tests.multi_gpu.test_engine import prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or torch.cuda.get_device_capability() != (9, 0), reason="needs two Hopper GPUs"
    ),
    pytest.mark.timeout(300),
]

WIDE = {**SMALL, "hidden_size": 4096, "num_hidden_layers": 2}
"""Rows so long that few of them are summed by a kernel of their own."""

NUM_SMS = 132
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


def force_plans(config: EngineConfig, *, copies: bool) -> None:
    """Leave a store in which every product overlaps, as `Overlap` would find it."""
    assert config.max_prefill_tokens is not None
    source = resolve_model(config.model, load_format=config.load_format)
    own = load_spec(source).shard(Shard(world_size=2))
    problem = Problem(
        device=_describe(torch.device("cuda", 0)),
        num_rows=1,
        num_outputs=1,
        num_inputs=1,
        dtype="bfloat16",
        world_size=2,
        num_sms=NUM_SMS,
        collective=Collective.ALL_REDUCE,
        ctas=() if copies else BESIDE_CTAS,
        has_copies=copies,
    )
    shapes = [(own.hidden_size, own.num_heads * own.head_dim), (own.hidden_size, own.intermediate_size)]
    store = PlanStore(plans_path())
    for i, one in enumerate(problems_of(problem, shapes, config.max_num_seqs + config.max_prefill_tokens)):
        ends = (1, one.num_blocks // 2, one.num_blocks)
        store.put(one, Tuned(plan=Plan(ends, copies=True) if copies else Plan(ends, BESIDE_CTAS[i % 2])))
    store.save()


def no_memory(num_bytes: int, word: int) -> None:
    raise PeerMemoryUnavailable("the test wants none")


@dataclass(frozen=True)
class Wide:
    """An engine whose products all overlap, and what judges it."""

    built: BuiltEngine
    exact: Judge
    error: float
    asked: set[tuple[Phase, int, bool]]  # of products: the lane, its SMs, whether they overlapped

    def judge(self, engine: Engine, batch: list[list[int]]) -> None:
        """Generate, and judge every token."""
        outputs = engine.generate(batch, GREEDY)
        finished = [(prompt, output.outputs[0].token_ids) for prompt, output in zip(batch, outputs, strict=True)]
        assert batch_shortfalls(self.exact, finished).max() <= 2 * self.error


@pytest.fixture
def build_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[PolicyConfig, bool], Wide]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_config(tmp_path, WIDE)
    asked: set[tuple[Phase, int, bool]] = set()
    find = FixedPlans.plan

    def plan(planner: FixedPlans, num_rows: int, weight: torch.Tensor, context: StepContext) -> Plan | None:
        found = find(planner, num_rows, weight, context)
        asked.add((context.phase, context.num_sms, found is not None and found.overlaps))
        return found

    monkeypatch.setattr(FixedPlans, "plan", plan)

    def build(policy: PolicyConfig, copies: bool) -> Wide:
        config = EngineConfig(
            model=str(folder),
            load_format="dummy",
            device="cuda",
            tensor_parallel_size=2,
            policy=policy,
            max_prefill_tokens=2048,
            max_num_seqs=32,
            kv_cache_tokens=32768,
        )
        force_plans(config, copies=copies)
        if not copies:  # on this rank is enough
            monkeypatch.setattr("semipd.parallel.peer_memory.PeerMemory", no_memory)
        exact, error = bfloat16_judge(folder, prompts(seed=9, lengths=LENGTHS))
        return Wide(build_core(config), exact, error, asked)

    return build


@pytest.mark.parametrize(
    ("policy", "copies"),
    [
        (StaticPolicy(), True),
        (MixedPolicy(token_budget=1024), True),
        (MixedPolicy(token_budget=1024), False),
        (ExclusivePolicy(), False),
    ],
    ids=["a split by copies", "mixed by copies", "mixed by NCCL", "exclusive by NCCL"],
)
def test_tokens_of_an_engine_whose_products_overlap(
    build_wide: Callable[[PolicyConfig, bool], Wide], policy: PolicyConfig, copies: bool
) -> None:
    wide = build_wide(policy, copies)
    with Engine.from_core(wide.built.core, wide.built.tokenizer) as engine:
        for seed in (0, 1, 2):  # the first round is eager, the next ones replay graphs
            wide.judge(engine, prompts(seed, LENGTHS))
            engine.settle()
        engine.check_integrity()
    is_split = isinstance(policy, StaticPolicy)
    assert any(overlaps and (num_sms < NUM_SMS) == is_split for _, num_sms, overlaps in wide.asked), "none overlapped"


def test_random_plans_and_aborts_of_copies_leave_every_token_right(
    build_wide: Callable[[PolicyConfig, bool], Wide],
) -> None:
    rng = random.Random(3)
    wide = build_wide(MixedPolicy(token_budget=1500), True)
    draw_plans(wide.built.core, seed=0, token_budgets=(300, 700, 1500))
    with Engine.from_core(wide.built.core, wide.built.tokenizer) as engine:
        for _ in range(6):
            doomed = [engine.submit(prompt, SamplingParams(max_tokens=200)) for prompt in prompts(7, LENGTHS)]
            for stream in doomed[::2]:
                stream.abort()
            wide.judge(engine, prompts(rng.randrange(1000), [rng.randrange(1, 2000) for _ in range(24)]))
            for stream in doomed[1::2]:
                stream.abort()
            engine.check_integrity()
    assert {phase for phase, _, overlaps in wide.asked if overlaps} == set(Phase)
    assert any(overlaps and num_sms < NUM_SMS for _, num_sms, overlaps in wide.asked)

"""Whole engines on several GPUs: their tokens against one GPU's and a plain-torch judge, and ranks that die."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.build import BuiltEngine, build_core
from semipd.config import EngineConfig, MixedPolicy, parse_policy
from tests.gpu.judge import SMALL, Judge, batch_shortfalls, bfloat16_judge, random_prompts, save_config, shortfalls
from tests.gpu.random_plans import draw_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(300),
]

WORLD_SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} devices"))
    for size in (2, 4)
]
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200, 513, 1500)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def judges(folder: Path) -> tuple[Judge, float]:
    return bfloat16_judge(folder, prompts(seed=9))


def prompts(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return random_prompts(seed, lengths)


def build(folder: Path, world_size: int, **options: Any) -> BuiltEngine:
    config = EngineConfig(
        model=str(folder), load_format="dummy", device="cuda", tensor_parallel_size=world_size, **options
    )
    return build_core(config)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_float32_tokens_are_those_of_one_gpu(
    folder: Path, world_size: int, record_property: Callable[[str, object], None]
) -> None:
    judge = Judge(folder, torch.float32, drawn_in=torch.float32)
    tokens = []
    for size in (1, world_size):
        built = build(folder, size, dtype="float32", kv_cache_tokens=8192, max_prefill_tokens=512)
        with Engine.from_core(built.core, built.tokenizer) as engine:
            tokens.append([output.outputs[0].token_ids for output in engine.generate(prompts(), GREEDY)])
    for prompt, output in zip(prompts(), tokens[1], strict=True):
        assert shortfalls(judge, prompt, output).max() < NEAR_TIE
    num_other = sum(one != other for one, other in zip(*tokens, strict=True))
    record_property("prompts whose tokens part at a near tie", num_other)
    assert num_other <= 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("policy", ["static", "exclusive", MixedPolicy(token_budget=256)], ids=str)
def test_bfloat16_tokens_are_best_within_the_error_of_bfloat16(
    folder: Path, judges: tuple[Judge, float], policy: Any, world_size: int
) -> None:
    judge, error = judges
    built = build(folder, world_size, policy=parse_policy(policy), kv_cache_tokens=8192)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        for seed in (0, 1, 2):
            outputs = engine.generate(prompts(seed), GREEDY)
            finished = [(prompt, out.outputs[0].token_ids) for prompt, out in zip(prompts(seed), outputs, strict=True)]
            assert batch_shortfalls(judge, finished).max() <= 2 * error
            engine.settle()  # the first round is eager, the next ones replay graphs
        engine.check_integrity()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_random_plans_aborts_and_preemptions_leave_every_token_right(
    folder: Path, judges: tuple[Judge, float], world_size: int
) -> None:
    judge, error = judges
    rng = random.Random(5)
    built = build(
        folder,
        world_size,
        policy=MixedPolicy(token_budget=256),
        block_size=16,
        max_num_seqs=24,
        max_prefill_tokens=256,
        max_model_len=700,
        kv_cache_tokens=4096,
    )
    draw_plans(built.core, seed=0, token_budgets=(40, 256))
    with Engine.from_core(built.core, built.tokenizer) as engine:
        for _ in range(4):
            batch = prompts(rng.randrange(1000), [rng.randrange(1, 400) for _ in range(60)])
            doomed = [engine.submit(prompt, SamplingParams(max_tokens=200)) for prompt in batch[:10]]
            params = [SamplingParams(temperature=0.0, max_tokens=rng.randrange(1, 200), ignore_eos=True) for _ in batch]
            for stream in doomed[::2]:
                stream.abort()
            outputs = engine.generate(batch, params)
            for stream in doomed[1::2]:
                stream.abort()
            finished = [(prompt, output.outputs[0].token_ids) for prompt, output in zip(batch, outputs, strict=True)]
            assert batch_shortfalls(judge, finished).max() <= 2 * error
            engine.check_integrity()
        assert engine.statistics().num_preemptions > 0


KILL = """
import os, signal, sys, time
import psutil
from semipd import Engine, EngineDead, SamplingParams

engine = Engine(sys.argv[1], load_format="dummy", device="cuda", tensor_parallel_size=2, kv_cache_tokens=65536)
endless = SamplingParams(max_tokens=4000, ignore_eos=True)
streams = [engine.submit([index + 1] * 50, endless) for index in range(8)]
for stream in streams:
    next(iter(stream))
(worker,) = [child for child in psutil.Process().children() if "semipd.parallel.worker" in child.cmdline()]
if sys.argv[2] == "stuck":
    worker.suspend()
    time.sleep(0.5)
start = time.monotonic()
worker.kill()
for stream in streams:
    try:
        stream.result(20)
    except EngineDead as error:
        assert "rank 1" in str(error.__cause__), error.__cause__
    else:
        raise AssertionError("the stream went on")
print("reported after", round(time.monotonic() - start, 3), flush=True)
engine.close()
print("closed after", round(time.monotonic() - start, 3), flush=True)
assert not psutil.Process().children()
"""


@pytest.mark.parametrize("state", ["running", "stuck"])
def test_a_killed_rank_is_reported_within_seconds(
    folder: Path, tmp_path: Path, state: str, record_property: Callable[[str, object], None]
) -> None:
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    run = subprocess.run(
        [sys.executable, str(script), str(folder), state], capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seconds = float(run.stdout.split("reported after")[1].split()[0])
    record_property("seconds", seconds)
    assert seconds < 5.0

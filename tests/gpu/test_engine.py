"""Whole engines on a GPU: their tokens against a plain-torch judge, under plans that change at random."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.build import BuiltEngine, build_core
from semipd.config import EngineConfig, MixedPolicy, PolicyConfig, StaticPolicy, parse_policy
from tests.gpu.judge import SMALL, Judge, batch_shortfalls, bfloat16_judge, random_prompts, save_config, shortfalls
from tests.gpu.random_plans import draw_plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200, 513, 1500)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def judges(folder: Path) -> tuple[Judge, float]:
    return bfloat16_judge(folder, prompts(seed=9))


def prompts(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return random_prompts(seed, lengths)


def built_engine(folder: Path, **options: Any) -> BuiltEngine:
    """An engine over a pool full of NaN."""
    config = EngineConfig(model=str(folder), load_format="dummy", device="cuda", **options)
    built = build_core(config)
    with torch.inference_mode():
        built.kv_cache.fill_(float("nan"))
    torch.cuda.synchronize()
    return built


@pytest.mark.parametrize("policy", ["static", "exclusive", MixedPolicy(token_budget=256)], ids=str)
@pytest.mark.parametrize(("block_size", "chunk"), [(64, 2048), (16, 300), (1, 64)])
def test_bfloat16_tokens_are_best_within_the_error_of_bfloat16(
    folder: Path, judges: tuple[Judge, float], policy: Any, block_size: int, chunk: int
) -> None:
    judge, error = judges
    chosen: PolicyConfig = parse_policy(policy)
    built = built_engine(folder, policy=chosen, block_size=block_size, max_prefill_tokens=chunk, kv_cache_tokens=8192)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        for seed in (0, 1):
            outputs = engine.generate(prompts(seed), GREEDY)
            for prompt, output in zip(prompts(seed), outputs, strict=True):
                worst = shortfalls(judge, prompt, output.outputs[0].token_ids).max()
                assert worst <= 2 * error, f"a token of a prompt of {len(prompt)} is {worst:.3g} below the best"
        engine.check_integrity()


def test_float32_tokens_equal_those_of_plain_torch(folder: Path) -> None:
    judge = Judge(folder, torch.float32, drawn_in=torch.float32)
    built = built_engine(folder, dtype="float32", kv_cache_tokens=8192, max_prefill_tokens=512)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        for prompt, output in zip(prompts(), engine.generate(prompts(), GREEDY), strict=True):
            assert shortfalls(judge, prompt, output.outputs[0].token_ids).max() < 1e-3


@pytest.fixture
def restless(folder: Path) -> BuiltEngine:
    """An engine with a small pool, whose plan changes all the time."""
    built = built_engine(
        folder,
        policy=MixedPolicy(token_budget=256),
        block_size=16,
        max_num_seqs=24,
        max_prefill_tokens=256,
        max_model_len=700,
        kv_cache_tokens=4096,
    )
    draw_plans(built.core, seed=0, token_budgets=(40, 256))
    return built


def test_random_plans_aborts_and_preemptions_leave_every_token_right(
    restless: BuiltEngine, judges: tuple[Judge, float]
) -> None:
    judge, error = judges
    rng = random.Random(5)
    with Engine.from_core(restless.core, restless.tokenizer) as engine:
        for _ in range(6):
            lengths = [rng.randrange(1, 400) for _ in range(60)]
            batch = prompts(rng.randrange(1000), lengths)
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
        statistics = engine.statistics()
        assert statistics.num_preemptions > 0


def test_a_planted_stale_block_is_noticed(folder: Path, judges: tuple[Judge, float]) -> None:
    judge, error = judges
    built = built_engine(folder, kv_cache_tokens=4096, block_size=64)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        prompt = prompts(3, [200])[0]
        engine.settle()  # torch draws no numbers while graphs are captured
        engine.generate([prompt], GREEDY)
        built.core.settle()
        with torch.inference_mode():
            built.kv_cache.kv_LPS2KH.copy_(torch.randn_like(built.kv_cache.kv_LPS2KH))
        torch.cuda.synchronize()
        output = engine.generate([prompt], GREEDY)[0]  # its prefix is cached, and now wrong
        assert shortfalls(judge, prompt, output.outputs[0].token_ids).max() > 2 * error


def test_sampled_tokens_do_not_depend_on_batch_mates(folder: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=3, max_tokens=16, ignore_eos=True)
    prompt = prompts(4, [40])[0]
    built = built_engine(folder, dtype="float32", kv_cache_tokens=8192)
    with Engine.from_core(built.core, built.tokenizer) as engine:
        alone = engine.generate([prompt], params)[0].outputs[0].token_ids
        crowd = engine.generate([*prompts(6), prompt], params)[-1].outputs[0].token_ids
        assert crowd == alone


def test_close_gives_the_memory_back(folder: Path) -> None:
    def free_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    x = torch.randn(64, 64, device="cuda")
    x @ x
    before = free_bytes()
    for _ in range(2):
        built = built_engine(folder, policy=StaticPolicy())
        with Engine.from_core(built.core, built.tokenizer) as engine:
            engine.generate(prompts(), GREEDY)
            engine.settle()  # the driver keeps memory for graphs
        del built, engine
    assert before - free_bytes() < 300 << 20

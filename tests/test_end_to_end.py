"""Whole engines on tiny float64 models: the same tokens as `transformers`, whatever the plan, chunk, block or pool."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.build import build_core
from semipd.config import DType, EngineConfig, parse_policy
from tests.tiny import VOCAB, greedy, save_tiny_model

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
MAX_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint, prompts, and what the naive loop generates for each."""

    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(folder, request.param)
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 2, 7, 16, 33, 50)]
    prompts += [shared + [1, 2, 3], shared + [4], shared[:16]]
    return Case(folder, prompts, [greedy(model, prompt, MAX_TOKENS) for prompt in prompts])


def poisoned_engine(folder: Path, *, dtype: DType = "float64", **options: Any) -> Engine:
    """An engine whose KV pool is full of NaN, as if every block had a careless owner before."""
    policy = parse_policy(options.pop("policy", "static"))
    built = build_core(EngineConfig(model=str(folder), device="cpu", dtype=dtype, policy=policy, **options))
    with torch.inference_mode():
        built.kv_cache.fill_(float("nan"))
    return Engine.from_core(built.core, built.tokenizer)


def generate(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, params)]


@pytest.mark.parametrize("policy", ["static", "exclusive", "mixed", "cadence"])
@pytest.mark.parametrize(("block_size", "chunk"), [(1, 5), (2, 64), (16, 7), (16, 512)])
def test_greedy_tokens_equal_the_naive_loop(case: Case, policy: str, block_size: int, chunk: int) -> None:
    with poisoned_engine(
        case.folder, policy=policy, block_size=block_size, max_prefill_tokens=chunk, kv_cache_tokens=1024
    ) as engine:
        assert generate(engine, case.prompts) == case.expected
        assert generate(engine, case.prompts[::-1]) == case.expected[::-1]  # now with a warm prefix cache
        engine.check_integrity()


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_preempted_requests_come_back_to_the_same_tokens(case: Case, block_size: int) -> None:
    with poisoned_engine(
        case.folder,
        block_size=block_size,
        max_prefill_tokens=16,
        kv_cache_tokens=128,  # two of the longest prompts fill it
        max_model_len=80,
        enable_prefix_caching=False,
    ) as engine:
        for _ in range(10):  # whether anybody is preempted depends on which lane is faster
            assert generate(engine, case.prompts * 2) == case.expected * 2
            if engine.statistics().num_preemptions > 0:
                break
        else:  # blocks of 16 are too few for it, and Mistral's window leaves room for everybody
            assert block_size == 16 or "mistral" in case.folder.name, "nobody was ever preempted"
        engine.check_integrity()


def test_one_request_at_a_time_equals_all_at_once(case: Case) -> None:
    with poisoned_engine(case.folder, max_num_seqs=1, kv_cache_tokens=1024) as engine:
        assert [generate(engine, [prompt])[0] for prompt in case.prompts] == case.expected


def test_sampled_tokens_depend_on_the_request_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(6)]
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.9, top_k=40, seed=index, max_tokens=10, ignore_eos=True, n=1 + index % 2
        )
        for index in range(6)
    ]
    seen = []
    for policy, chunk, pool in (("static", 512, 1024), ("mixed", 5, 1024), ("exclusive", 9, 96)):
        with poisoned_engine(
            tmp_path, policy=policy, max_prefill_tokens=chunk, kv_cache_tokens=pool, max_model_len=64, block_size=2
        ) as engine:
            outputs = engine.generate(prompts, params)
            seen.append([[sample.token_ids for sample in output.outputs] for output in outputs])
            alone = [engine.generate(prompt, one)[0].outputs for prompt, one in zip(prompts, params, strict=True)]
            seen.append([[sample.token_ids for sample in outputs] for outputs in alone])
    assert all(one == seen[0] for one in seen[1:])
    assert seen[0][1][0] != seen[0][1][1], "the two samples of one prompt are independent"


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_float32_tokens_differ_only_where_two_logits_are_nearly_equal(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, family, dtype=torch.float32)
    rng = random.Random(4)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 7, 16, 33, 50)))] for _ in range(24)]
    num_tokens = num_differences = num_preemptions = 0
    for policy, chunk, block_size, pool in (
        ("static", 512, 16, 1024),
        ("static", 5, 1, 160),
        ("mixed", 16, 2, 160),
        ("exclusive", 7, 16, 160),
    ):
        with poisoned_engine(
            tmp_path,
            dtype="float32",
            policy=policy,
            max_prefill_tokens=chunk,
            block_size=block_size,
            kv_cache_tokens=pool,
            max_model_len=80,
        ) as engine:
            for prompt, output in zip(prompts, generate(engine, prompts), strict=True):
                # Each token by itself, behind those that the engine chose before it.
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
                chosen = logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)
                assert (logits.amax(1) - chosen).max() < 1e-3
                num_tokens += len(output)
                num_differences += int((logits.argmax(1) != torch.tensor(output)).sum())
            num_preemptions += engine.statistics().num_preemptions
    assert num_differences <= num_tokens // 500, f"{num_differences} of {num_tokens} tokens are near ties"
    assert num_preemptions > 0 or family == "mistral"

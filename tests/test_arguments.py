"""What users may pass, in all its forms, and the messages for what they may not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semipd import SLO, ConfigError, RequestError, SamplingParams
from semipd.arguments import (
    as_config,
    as_name,
    as_params_per_prompt,
    as_prompts,
    as_sampling_params,
    as_slo,
    as_token_ids,
)
from semipd.config import MixedPolicy


@pytest.mark.parametrize(
    "prompt", ["text", "", [3, 1], (3, 1), range(3), np.array([3, 1]), torch.tensor([3, 1]), [np.int64(3), np.int32(1)]]
)
def test_one_prompt_is_a_batch_of_one(prompt: Any) -> None:
    batch = as_prompts(prompt)
    assert len(batch) == 1
    assert batch[0] is prompt


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        (),
        ["a", "b"],
        ("a",),
        [[3, 1], [2]],
        ["a", [3, 1]],
        [torch.tensor([5]), torch.tensor([5, 6])],
        np.array([[3, 1], [2, 4]]),
        torch.tensor([[3, 1]]),
        np.array([], dtype=np.int64),
    ],
)
def test_a_sequence_of_prompts_stays_one(prompts: Any) -> None:
    assert as_prompts(prompts) is prompts


@pytest.mark.parametrize("prompts", [None, 5, b"bytes", {"prompt": "a"}, {1, 2}, (i for i in "ab")])
def test_other_prompts_say_what_is_expected(prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"prompts is a \w+; expected text, a sequence of token ids, or"):
        as_prompts(prompts)


@pytest.mark.parametrize(
    "prompt",
    [[3, 1], (3, 1), np.array([3, 1], dtype=np.int16), torch.tensor([3, 1]), [np.int64(3), torch.tensor(1)]],
)
def test_token_ids_become_plain_ints(prompt: Any) -> None:
    token_ids = as_token_ids(prompt)
    assert token_ids == [3, 1]
    assert {type(token_id) for token_id in token_ids} == {int}


@pytest.mark.parametrize(
    "prompt",
    [None, 5, np.int64(5), b"\x01", {3: 1}, ["a"], [3, "a"], [3.0], np.array([3.0]), [[3, 1]], np.array([[3, 1]])],
)
def test_other_token_ids_say_what_is_expected(prompt: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is .*; expected text or a sequence of token ids"):
        as_token_ids(prompt)


def test_a_long_wrong_prompt_is_not_printed_whole() -> None:
    with pytest.raises(RequestError) as caught:
        as_token_ids(["x" * 10_000])  # type: ignore[list-item]
    assert len(str(caught.value)) < 400


def test_params_are_objects_dicts_or_none() -> None:
    params = SamplingParams(top_k=3)
    assert as_sampling_params(params) is params
    assert as_sampling_params({"top_k": 3}) == params
    assert as_sampling_params(None) == SamplingParams()


def test_an_unknown_field_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match="unknown sampling field temprature; known are .*temperature.*top_p"):
        as_sampling_params({"temprature": 1.0})


@pytest.mark.parametrize("params", [3, "greedy", {1, 2}])
def test_params_of_another_type_are_refused(params: Any) -> None:
    with pytest.raises(RequestError, match=r"params is a \w+; expected SamplingParams, a dict of its fields, or None"):
        as_params_per_prompt(params, 2)


def test_params_are_one_for_all_or_one_per_prompt() -> None:
    assert as_params_per_prompt({"seed": 1}, 3) == [SamplingParams(seed=1)] * 3
    assert as_params_per_prompt([None, {"seed": 1}], 2) == [SamplingParams(), SamplingParams(seed=1)]
    assert as_params_per_prompt(None, 0) == []


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_params_that_do_not_match_the_prompts_are_refused(num_params: int) -> None:
    with pytest.raises(RequestError, match=f"{num_params} params for 2 prompts; give one for all, or one per prompt"):
        as_params_per_prompt([None] * num_params, 2)


@pytest.mark.parametrize("value", ["", 7, b"a", ["a"]])
def test_names_are_strings(value: Any) -> None:
    for argument in ("request_id", "cache_salt"):
        with pytest.raises(RequestError, match=f"{argument} is .*; expected a string that is not empty, or None"):
            as_name(value, argument)
    assert as_name("a", "cache_salt") == "a"
    assert as_name(None, "request_id") is None


def test_an_slo_is_an_slo() -> None:
    with pytest.raises(RequestError, match=r"slo is \{'ttft': 1\}; expected an SLO, such as SLO\("):
        as_slo({"ttft": 1})  # type: ignore[arg-type]
    assert as_slo(SLO(ttft=1.0)) == SLO(ttft=1.0)
    assert as_slo(None) is None


def test_engine_arguments_make_a_config() -> None:
    config = as_config("model", {"policy": "mixed", "seed": 3})
    assert config.policy == MixedPolicy()
    assert config.seed == 3


def test_folders_may_be_paths() -> None:
    config = as_config(Path("a/model"), {"tokenizer": Path("b")})
    assert (config.model, config.tokenizer) == (os.path.join("a", "model"), "b")


def test_an_unknown_engine_argument_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown engine argument block_sise, slots; known are .*block_size"):
        as_config("model", {"slots": 1, "block_sise": 8})  # type: ignore[typeddict-unknown-key]

"""Engine arguments say no where they are made, in words that name the argument; None is left to those that have it."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from semipd import SLO, ConfigError
from semipd.config import CadencePolicy, EngineConfig, MixedPolicy, StaticPolicy

NAMES = [field.name for field in fields(EngineConfig)]


def make_config(**values: Any) -> EngineConfig:
    return EngineConfig(**{"model": "org/model", **values})


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_takes_a_value_of_any_type(name: str) -> None:
    for value in (object(), {"ttft": 0.5}, [1]):
        with pytest.raises(ConfigError, match=f"^{name} is .*; expected "):
            make_config(**{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_none_is_taken_where_it_is_the_default(name: str) -> None:
    (field,) = (field for field in fields(EngineConfig) if field.name == name)
    if field.default is None:
        assert getattr(make_config(**{name: None}), name) is None
    else:
        with pytest.raises(ConfigError, match=f"^{name} is None; expected "):
            make_config(**{name: None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "model is ''; expected a hub id, a folder or a .gguf file$"),
        ({"model": Path("x.gguf")}, "model is .*; expected a hub id, a folder or a .gguf file"),
        ({"tokenizer": 3}, "tokenizer is 3; expected a hub id, a folder or a .gguf file, or None"),
        ({"revision": 5}, "revision is 5; expected a branch, tag or commit, or None"),
        ({"device": 0}, "device is 0; expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'"),
        ({"load_format": "pickle"}, "load_format is 'pickle'; expected one of auto, safetensors, gguf, dummy"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of auto, float32, bfloat16, float16, float64"),
        ({"seed": True}, "seed is True; expected an integer from"),
        ({"seed": 0.0}, "seed is 0.0; expected an integer from"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; expected an integer from -2\*\*63 to 2\*\*64 - 1"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; expected a positive integer"),
        ({"max_num_seqs": True}, "max_num_seqs is True; expected a positive integer"),
        ({"max_model_len": 4096.0}, "max_model_len is 4096.0; expected a positive integer, or None"),
        ({"kv_cache_bytes": "8GiB"}, "kv_cache_bytes is '8GiB'; expected a positive integer, or None"),
        ({"kv_cache_fraction": "0.5"}, r"kv_cache_fraction is '0.5'; expected a share of memory in \(0, 1\], or None"),
        ({"kv_cache_fraction": True}, "kv_cache_fraction is True; expected a share of memory"),
        ({"kv_cache_fraction": 0}, "kv_cache_fraction is 0; expected a share of memory"),
        ({"kv_cache_fraction": 1.1}, "kv_cache_fraction is 1.1; expected a share of memory"),
        ({"kv_cache_fraction": math.nan}, "kv_cache_fraction is nan; expected a share of memory"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching is 'no'; expected True or False"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1; expected True or False"),
        ({"freeze_gc": 0}, "freeze_gc is 0; expected True or False"),
        ({"calibrate": 0}, "calibrate is 0; expected True, False or None"),
        ({"policy": "mixed"}, "policy is 'mixed'; expected a policy object, or None"),
        ({"slo": {"ttft": 0.5}}, r"slo is .'ttft': 0.5.; expected an SLO, such as SLO\(ttft=0.5, tpot=0.05\), or None"),
        ({"switch_interval": True}, "switch_interval is True; expected seconds above 0 and up to 1, or None"),
        ({"switch_interval": 1.5}, "switch_interval is 1.5; expected seconds above 0 and up to 1, or None"),
        ({"trace": ""}, "trace is ''; expected the path of a file to write, or None"),
        ({"kv_cache_bytes": 1, "kv_cache_tokens": 2}, "kv_cache_bytes and kv_cache_tokens are all given; expected one"),
    ],
)
def test_arguments_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer": "org/other", "revision": "main", "device": "cuda:1"},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"kv_cache_fraction": 1},
        {"switch_interval": 0.0005, "freeze_gc": True, "calibrate": False, "enable_prefix_caching": False},
        {"trace": Path("trace.jsonl"), "slo": SLO(), "policy": MixedPolicy()},
    ],
)
def test_arguments_at_their_bounds_are_taken(values: dict[str, Any]) -> None:
    config = make_config(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, pytest.param(10**400, id="huge"), True, "1"])
@pytest.mark.parametrize("name", ["ttft", "tpot", "gap"])
def test_targets_are_positive_seconds(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"SLO.{name} is .*; expected a positive number of seconds, or None"):
        SLO(**{name: value})


def test_a_bool_is_no_number_of_a_policy() -> None:
    with pytest.raises(ConfigError, match="StaticPolicy.prefill_sms is True; expected a positive number of SMs"):
        StaticPolicy(prefill_sms=True, decode_sms=1)
    with pytest.raises(ConfigError, match="MixedPolicy.token_budget is True; expected a positive number of tokens"):
        MixedPolicy(token_budget=True)
    with pytest.raises(ConfigError, match="CadencePolicy.decode_steps is True; expected a positive number"):
        CadencePolicy(decode_steps=True)

"""Configurations: what transformers' own classes write is read back, and what cannot be served is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from semipd.errors import WeightsError
from semipd.model.families import expected_weights, parse_config
from semipd.model.spec import LinearRopeScaling, Llama3RopeScaling

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 3e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied, biases, bfloat16": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "bfloat16"},
    ),
    "llama 3": ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "head_dim": 16}),
    "llama, linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 33}),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2, windows from layer 2": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "qwen3, windows by layer": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def written_config(architecture: str, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A transformers configuration, and what it writes to config.json."""
    config_class = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    config = config_class(**(SIZES | overrides), architectures=[architecture])
    return config, json.loads(config.to_json_string(use_diff=True))


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 wrote for the same configuration."""
    old = dict(config)
    scaling = dict(old.pop("rope_parameters"))
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    old["torch_dtype"] = old.pop("dtype", None)
    old.pop("layer_types", None)
    return old


@pytest.mark.parametrize("case", CASES)
def test_spec_says_what_the_transformers_config_says(case: str) -> None:
    architecture, overrides = CASES[case]
    config, written = written_config(architecture, overrides)
    spec = parse_config(written)
    assert spec.architecture == architecture
    for ours, theirs in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "rms_norm_eps": "rms_norm_eps",
        "max_position_embeddings": "max_position_embeddings",
        "tie_word_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
    }.items():
        assert getattr(spec, ours) == getattr(config, theirs), ours
    assert spec.eos_token_ids == {2, 5}
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.dtype == overrides.get("dtype", "float32")


@pytest.mark.parametrize("case", CASES)
def test_expected_weights_are_those_of_the_transformers_model(case: str) -> None:
    architecture, overrides = CASES[case]
    config, written = written_config(architecture, overrides)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert expected_weights(parse_config(written)) == state


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_the_transformers_layers(case: str) -> None:
    architecture, overrides = CASES[case]
    config, written = written_config(architecture, overrides)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    if architecture == "MistralForCausalLM":
        windows = [config.sliding_window] * config.num_hidden_layers
    spec = parse_config(written)
    assert [spec.window(layer) for layer in range(spec.num_layers)] == windows


@pytest.mark.parametrize("case", [case for case in CASES if "by layer" not in case])
def test_old_and_new_style_give_one_spec(case: str) -> None:
    _, written = written_config(*CASES[case])
    assert parse_config(old_style(written)) == parse_config(written)


def test_rope_scalings_are_read_in_full() -> None:
    _, llama3 = written_config(*CASES["llama 3"])
    assert parse_config(llama3).rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
    )
    _, plain = written_config(*CASES["llama"])
    del plain["rope_parameters"]
    oldest = parse_config(plain | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert (oldest.rope_theta, oldest.rope_scaling) == (10000.0, LinearRopeScaling(factor=4.0))


def test_biases_follow_the_family() -> None:
    biases = {
        "LlamaForCausalLM": (True, True, True),
        "MistralForCausalLM": (False, False, False),
        "Qwen2ForCausalLM": (True, False, False),
        "Qwen3ForCausalLM": (True, True, False),
    }
    for architecture, expected in biases.items():
        spec = parse_config(SIZES | {"architectures": [architecture], "attention_bias": True, "mlp_bias": True})
        assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == expected, architecture


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    needed = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "rms_norm_eps")}
    llama = parse_config(needed | {"architectures": ["LlamaForCausalLM"]})
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta) == (6, 8, 10000.0)
    assert (llama.rms_norm_eps, llama.dtype, llama.tie_word_embeddings) == (1e-6, "float32", False)
    mistral = parse_config(needed | {"architectures": ["MistralForCausalLM"]})
    assert mistral.sliding_windows == (4096,) * 4
    assert parse_config(needed | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


def test_eos_ids_are_the_union_of_both_files() -> None:
    config = SIZES | {"model_type": "llama", "eos_token_id": 2}
    assert parse_config(config).eos_token_ids == {2}
    assert parse_config(config, {"eos_token_id": [7, 2]}).eos_token_ids == {2, 7}
    assert parse_config(config, {"eos_token_id": None, "bos_token_id": 9}).eos_token_ids == {2}
    assert parse_config(config | {"eos_token_id": None}).eos_token_ids == frozenset()


def test_model_type_names_the_family_when_architectures_is_absent() -> None:
    assert parse_config(SIZES | {"model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\]; expected one of LlamaForCausalLM, Mistral"),
        ({"architectures": []}, r"the architecture is \[\]; expected one of"),
        ({"architectures": None, "model_type": "gemma"}, "the architecture is 'gemma'; expected one of"),
        ({"architectures": None}, "the architecture is None; expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'.*choose the unquantised model, or a GGUF"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn'; expected one of default, linear",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing; expected a positive number"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "expected low below high"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer type"),
        ({"rope_parameters": [1]}, r"rotary parameters are \[1\]; expected an object"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ({"vocab_size": None}, "vocab_size is missing; expected an integer of at least 1; take a complete"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer of at least 1"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001; expected an integer of at most 10000"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0; expected an integer"),
        ({"num_attention_heads": True}, "num_attention_heads is True; expected an integer"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size is 48 and num_attention_heads is 7"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6 and num_key_value_heads is 4; expected a multiple"),
        ({"head_dim": 9}, "head_dim is 9; expected an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; expected one of float32, bfloat16"),
        ({"eos_token_id": 96}, "eos_token_id is 96; expected token ids from 0 to 95"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\]; expected token ids"),
        ({"bos_token_id": -1}, "bos_token_id is -1; expected token ids from 0 to 95"),
    ],
)
def test_what_cannot_be_served_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        parse_config(SIZES | {"architectures": ["LlamaForCausalLM"]} | overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window is 0; expected an integer of at least 1"),
        ({"max_window_layers": -1, "use_sliding_window": True}, "max_window_layers is -1; expected an integer of at"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*; expected a list of 4 names"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types has chunked_attention; expected full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "expected use_sliding_window and sliding_window with it"),
    ],
)
def test_windows_that_make_no_sense_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        parse_config(SIZES | {"architectures": ["Qwen2ForCausalLM"]} | overrides)

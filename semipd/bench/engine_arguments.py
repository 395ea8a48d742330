"""What the command line says of an engine, and the Python values that it means."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from semipd.config import PolicyConfig, PolicyName, parse_policy
from semipd.errors import ConfigError

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 32768,  # room for the longest workload
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Configurations to fill with random weights."""


def save_shapes(name: str, folder: Path) -> Path:
    """Write the config.json of known shapes to `folder`, for `load_format="dummy"`."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return folder


def parse_value(text: str) -> object:
    """A Python literal, `true`, `false` and `none` in any case, or the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text


def policy_name(policy: PolicyConfig) -> str:
    """The name that stands for a policy without arguments."""
    names: tuple[PolicyName, ...] = get_args(PolicyName)
    return next(name for name in names if parse_policy(name) == policy)


def parse_policy_spec(text: str) -> PolicyConfig:
    """A policy by name, with arguments of its own behind a colon: `mixed:token_budget=1024`.

    Raises:
        ConfigError: no such policy, or it has no such argument.
    """
    name, _, rest = text.partition(":")
    policy = parse_policy(name)  # type: ignore[arg-type]  # which judges the name
    arguments: dict[str, Any] = {}
    for item in rest.split(",") if rest else ():
        key, has_value, value = item.partition("=")
        known = [field.name for field in fields(policy)]
        if key not in known or not has_value:
            takes = f"{', '.join(known)}, each as NAME=VALUE" if known else "no arguments"
            raise ConfigError(f"policy {text!r}: {item!r} is no argument of {name!r}, which takes {takes}")
        arguments[key] = parse_value(value)
    return replace(policy, **arguments)

"""Which architectures run here, and what their configuration means.

A `config.json` becomes a `ModelSpec`, and a `ModelSpec` becomes the names and shapes of its weights, and the part that
each rank has of them. Defaults of absent fields are those of transformers, whose classes wrote the files. What would
change the arithmetic and is not served (other rotary scalings, quantised weights, other activations) is refused, never
ignored. This module reads no files and no tensors; the caller adds the file's name to its errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import TypeGuard

from semipd.config import Shard
from semipd.errors import WeightsError
from semipd.model.spec import LinearRopeScaling, Llama3RopeScaling, ModelSpec, RopeScaling

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

# What transformers takes for a window that a config names by no field at all; null means none.
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
# Every layer is listed by name, so a corrupt count would fill the memory before any tensor is missed.
_MAX_LAYERS = 10_000


class _Windows(Enum):
    """How a family decides which layers have a sliding window."""

    NONE = auto()
    EVERY_LAYER = auto()
    BY_LAYER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What sets one architecture apart from plain Llama.

    Attributes:
        model_type: names the family in a config that has no `architectures`.
        qkv_bias: q, k and v always have biases.
        reads_attention_bias: `attention_bias` gives q, k, v and o biases.
        reads_mlp_bias: `mlp_bias` gives gate, up and down biases.
        head_dim: of a config without that field; None means hidden size over heads.
    """

    model_type: str
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    windows: _Windows = _Windows.NONE


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "LlamaForCausalLM": _Family(model_type="llama", reads_attention_bias=True, reads_mlp_bias=True),
        "MistralForCausalLM": _Family(model_type="mistral", windows=_Windows.EVERY_LAYER),
        "Qwen2ForCausalLM": _Family(model_type="qwen2", qkv_bias=True, windows=_Windows.BY_LAYER),
        "Qwen3ForCausalLM": _Family(
            model_type="qwen3", reads_attention_bias=True, qk_norm=True, head_dim=128, windows=_Windows.BY_LAYER
        ),
    }
)


def parse_config(config: Mapping[str, object], generation_config: Mapping[str, object] | None = None) -> ModelSpec:
    """The `ModelSpec` of a Hugging Face configuration, in the style of transformers 4 or 5.

    Args:
        config: the content of config.json.
        generation_config: the content of generation_config.json; adds its EOS ids.

    Raises:
        WeightsError: the architecture or a field of it is not served, or a field is missing or makes no sense.
    """
    architecture = _architecture(config)
    family = _FAMILIES[architecture]
    _refuse_unserved(config)
    hidden_size = _int(config, "hidden_size")
    num_layers = _int(config, "num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise _bad_field(config, "num_hidden_layers", f"an integer of at most {_MAX_LAYERS}")
    num_heads = _int(config, "num_attention_heads")
    vocab_size = _int(config, "vocab_size")
    max_positions = _int(config, "max_position_embeddings")
    rope_theta, rope_scaling = _rope(config)
    attention_bias = family.reads_attention_bias and _bool(config, "attention_bias")
    bos_token_ids = _token_ids(config, "bos_token_id", vocab_size)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_int(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        rms_norm_eps=_positive_float(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and _bool(config, "mlp_bias"),
        qk_norm=family.qk_norm,
        tie_word_embeddings=_bool(config, "tie_word_embeddings"),
        sliding_windows=_sliding_windows(config, family, num_layers),
        dtype=_dtype(config),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=frozenset(_token_ids(config, "eos_token_id", vocab_size))
        | frozenset(_token_ids(generation_config or {}, "eos_token_id", vocab_size)),
    )


def expected_weights(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight of a model, named and laid out as transformers saves it (linear: out x in)."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        shapes.update((f"model.layers.{layer}.{name}", shape) for name, shape in _layer_weights(spec))
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    return shapes


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Which part of a weight a rank has.

    Attributes:
        index: a range of the whole for each dim.
        shape: of the rank's tensor; what it has behind the rows of `index` is zeros.
    """

    index: tuple[slice, ...]
    shape: tuple[int, ...]


def weight_parts(spec: ModelSpec, shard: Shard) -> dict[str, WeightPart]:
    """What `shard` has of each of the `expected_weights`, in their order; those of which it has nothing are left out.

    Linears that read the residual are split by outputs, those that add to it by inputs: of the latter rank 0 has the
    bias, which is added once.

    Raises:
        ConfigError: the model cannot be split so.
    """
    local, rank = spec.shard(shard), shard.rank
    heads = _part(rank * local.num_heads, local.num_heads, spec.head_dim)
    kv_heads = _part(rank * spec.num_kv_heads // shard.world_size, local.num_kv_heads, spec.head_dim)
    features = _part(rank, 1, local.intermediate_size)
    ids = _part(rank, 1, local.vocab_size)
    ids = slice(min(ids.start, spec.vocab_size), min(ids.stop, spec.vocab_size))
    outputs = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "gate_proj": features, "up_proj": features}
    outputs |= {"embed_tokens": ids, "lm_head": ids}
    inputs = {"o_proj": heads, "down_proj": features}
    shapes, parts = expected_weights(local), {}
    for name, whole_shape in expected_weights(spec).items():
        module, kind = name.split(".")[-2:]
        index = [slice(0, size) for size in whole_shape]
        if module in outputs:
            index[0] = outputs[module]
        elif module in inputs and kind == "weight":
            index[1] = inputs[module]
        if module not in inputs or kind == "weight" or rank == 0:
            parts[name] = WeightPart(tuple(index), shapes[name])
    return parts


def _part(first: int, count: int, size: int) -> slice:
    """The elements of `count` units of `size` from the unit `first` on."""
    return slice(first * size, (first + count) * size)


def _layer_weights(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = (
        ("self_attn.q_proj", q_size, hidden, spec.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, spec.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, spec.o_bias),
        ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
        ("mlp.up_proj", inner, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, inner, spec.mlp_bias),
    )
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, out_features, in_features, has_bias in linears:
        yield f"{name}.weight", (out_features, in_features)
        if has_bias:
            yield f"{name}.bias", (out_features,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,)
        yield "self_attn.k_norm.weight", (spec.head_dim,)


def _architecture(config: Mapping[str, object]) -> str:
    given = config.get("architectures")
    if given is None:
        given = config.get("model_type")
        names = [name for name, family in _FAMILIES.items() if family.model_type == given]
    else:
        named = given if isinstance(given, list) else [given]
        names = [name for name in _FAMILIES if name in named]
    if not names:
        raise WeightsError(
            f"the architecture is {given!r}; expected one of {', '.join(_FAMILIES)}; choose a model of one of these"
        )
    return names[0]


def _refuse_unserved(config: Mapping[str, object]) -> None:
    if config.get("quantization_config") is not None:
        raise WeightsError(
            f"quantization_config is {config['quantization_config']!r}; quantised safetensors are not served; "
            "choose the unquantised model, or a GGUF file, which is dequantised when it is loaded"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise WeightsError(f"hidden_act is {activation!r}; expected 'silu'; choose a model with that activation")


def _num_kv_heads(config: Mapping[str, object], num_heads: int) -> int:
    if config.get("num_key_value_heads") is None:
        return num_heads
    num_kv_heads = _int(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise WeightsError(
            f"num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}; "
            "expected a multiple; take config.json from the model's publisher"
        )
    return num_kv_heads


def _head_dim(config: Mapping[str, object], family: _Family, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = _int(config, "head_dim")
    elif family.head_dim is not None:
        head_dim = family.head_dim
    elif hidden_size % num_heads:
        raise WeightsError(
            f"hidden_size is {hidden_size} and num_attention_heads is {num_heads}; expected a multiple, or head_dim; "
            "take config.json from the model's publisher"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise WeightsError(f"head_dim is {head_dim}; expected an even number, since rotary embedding turns pairs")
    return head_dim


def _rope(config: Mapping[str, object]) -> tuple[float, RopeScaling | None]:
    # transformers 4 wrote rope_theta and rope_scaling, 5 writes both into rope_parameters; the old name wins there too.
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise WeightsError(f"the rotary parameters are {given!r}; expected an object with rope_type and rope_theta")
    rope = dict(given)
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None:
            rope[name] = config.get(name)
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        raise WeightsError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; expected 1; "
            "choose a model whose rotary embedding turns whole heads"
        )
    return _positive_float(rope, "rope_theta", 10000.0), _rope_scaling(rope)


def _rope_scaling(rope: Mapping[str, object]) -> RopeScaling | None:
    match rope.get("rope_type", rope.get("type", "default")):
        case "default" if not any(isinstance(value, Mapping) for value in rope.values()):
            return None
        case "default":
            raise WeightsError(f"rope_parameters differ by layer type: {dict(rope)!r}; expected one set for all layers")
        case "linear":
            return LinearRopeScaling(factor=_positive_float(rope, "factor"))
        case "llama3":
            low, high = _positive_float(rope, "low_freq_factor"), _positive_float(rope, "high_freq_factor")
            if not low < high:
                raise WeightsError(f"low_freq_factor is {low} and high_freq_factor is {high}; expected low below high")
            return Llama3RopeScaling(
                factor=_positive_float(rope, "factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=_int(rope, "original_max_position_embeddings"),
            )
        case other:
            raise WeightsError(
                f"rope_type is {other!r}; expected one of default, linear, llama3; "
                "choose a model without this scaling of rotary positions"
            )


def _sliding_windows(config: Mapping[str, object], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows is _Windows.NONE:
        return ()
    window: int | None = None
    is_used = family.windows is _Windows.EVERY_LAYER or _bool(config, "use_sliding_window")
    if is_used and config.get("sliding_window", _DEFAULT_WINDOW) is not None:
        window = _int(config, "sliding_window", default=_DEFAULT_WINDOW)
    # Mistral has no max_window_layers, and transformers ignores layer_types there.
    first, layer_types = 0, None
    if family.windows is _Windows.BY_LAYER:
        layer_types = config.get("layer_types")
        if window is not None and layer_types is None:
            first = _int(config, "max_window_layers", default=_DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    if layer_types is None:
        windows = tuple(window if layer >= first else None for layer in range(num_layers))
    else:
        windows = _windows_of_types(layer_types, window, num_layers)
    return windows if any(width is not None for width in windows) else ()


def _windows_of_types(layer_types: object, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise WeightsError(f"layer_types is {layer_types!r}; expected a list of {num_layers} names, one a layer")
    unknown = {str(name) for name in layer_types} - {"full_attention", "sliding_attention"}
    if unknown:
        raise WeightsError(
            f"layer_types has {', '.join(sorted(unknown))}; expected full_attention or sliding_attention; "
            "choose a model of such layers only"
        )
    if window is None and "sliding_attention" in layer_types:
        raise WeightsError("layer_types has sliding_attention; expected use_sliding_window and sliding_window with it")
    return tuple(window if name == "sliding_attention" else None for name in layer_types)


def _dtype(config: Mapping[str, object]) -> str:
    given = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(given, str) or given not in SUPPORTED_DTYPES:
        raise WeightsError(
            f"dtype is {given!r}; expected one of {', '.join(SUPPORTED_DTYPES)}; choose a checkpoint in one of these"
        )
    return given


def _token_ids(config: Mapping[str, object], name: str, vocab_size: int) -> tuple[int, ...]:
    given = config.get(name)
    if given is None:
        return ()
    values = given if isinstance(given, list) else [given]
    # An id outside the vocabulary would index outside the logits when min_tokens masks it.
    ids = tuple(value for value in values if _is_int(value) and 0 <= value < vocab_size)
    if len(ids) != len(values):
        raise WeightsError(
            f"{name} is {given!r}; expected token ids from 0 to {vocab_size - 1}; take the file from the publisher"
        )
    return ids


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(config: Mapping[str, object], name: str, *, default: int | None = None, minimum: int = 1) -> int:
    value = config.get(name, default)
    if not _is_int(value) or value < minimum:
        raise _bad_field(config, name, f"an integer of at least {minimum}")
    return value


def _positive_float(config: Mapping[str, object], name: str, default: float | None = None) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, float) and not _is_int(value):
        raise _bad_field(config, name, "a positive number")
    if not (math.isfinite(value) and value > 0):
        raise _bad_field(config, name, "a positive number")
    return float(value)


def _bool(config: Mapping[str, object], name: str) -> bool:
    value = config.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _bad_field(config, name, "true or false")
    return value


def _bad_field(config: Mapping[str, object], name: str, expected: str) -> WeightsError:
    given = f"{name} is {config[name]!r}" if config.get(name) is not None else f"{name} is missing"
    return WeightsError(f"{given}; expected {expected}; take a complete configuration from the model's publisher")

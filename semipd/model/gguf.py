"""A model in one GGUF file: its metadata as a `ModelSpec`, its tensors under the names and layouts of transformers.

llama.cpp's converter left three things to undo: names; the rows of q and k in "llama" files, reordered for a rotary
embedding of neighbours; and Llama-3's rotary scaling, kept as a tensor of divisors instead of its four parameters.
Metadata becomes a config first, so that `parse_config` stays the one judge of what is served. A window is honoured
where the file names one ("llama" files of Mistral); files of Mistral 7B v0.1 name none and read every token, as they
do in llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch

from semipd.errors import WeightsError
from semipd.gguf_file import GGUFFile
from semipd.model.families import EMBEDDING, LM_HEAD, WeightPart, parse_config
from semipd.model.spec import ModelSpec

_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)
_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": LM_HEAD}
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_DIVISORS = "rope_freqs.weight"
_EOS_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# Of every Llama 3.1, 3.2 and 3.3 checkpoint; only `factor` differs among them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_POSITIONS = 1.0, 4.0, 8192


class GGUFCheckpoint:
    """The weights of a GGUF file, dequantised one at a time."""

    def __init__(self, file: GGUFFile, spec: ModelSpec) -> None:
        self.path = file.path
        self._file = file
        self._head_dim = spec.head_dim
        self._names = {_weight_name(name): name for name in file.tensors if name != _ROPE_DIVISORS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor that the file offers."""
        return {name: self._file.tensors[stored].shape for name, stored in self._names.items()}

    def tensors(self, parts: Mapping[str, WeightPart]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight of `parts` at its index, in float32 on the CPU.

        Raises:
            WeightsError: a tensor cannot be read.
        """
        for name, part in parts.items():
            values = self._file.read(self._names[name], part.index)
            yield name, self._restore_rows(name, torch.from_numpy(values))

    def _restore_rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The rows of heads of q and k in the order of a rotary embedding by halves; other weights as they are."""
        is_reordered = self._file.metadata["general.architecture"] == "llama"
        if not is_reordered or not (".q_proj." in name or ".k_proj." in name):
            return weight
        # The file holds row j of a head's first half at 2j and of its second half at 2j + 1.
        num_heads, half = len(weight) // self._head_dim, self._head_dim // 2
        return weight.reshape(num_heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def parse_metadata(file: GGUFFile) -> ModelSpec:
    """The `ModelSpec` of a GGUF file.

    Its dtype is float16 or bfloat16 where more than half of the elements are stored so, and float32 otherwise, which
    keeps the values of every quantised format exactly.

    Raises:
        WeightsError: the model is not served, or metadata is missing or makes no sense.
    """
    metadata, tensors = file.metadata, file.tensors
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise WeightsError(
            f"general.architecture is {arch!r}; expected one of {', '.join(_ARCHITECTURES)}; "
            "choose a model of one of these"
        )
    if metadata.get("split.count", 1) != 1:
        raise WeightsError(
            f"the model is split into {metadata['split.count']} files; expected one; "
            "merge them with llama.cpp's `llama-gguf-split --merge`"
        )
    if metadata.get(f"{arch}.expert_count", 0) != 0:
        raise WeightsError(f"{arch}.expert_count is {metadata[f'{arch}.expert_count']}; choose a model without experts")
    if "token_embd.weight" not in tensors:
        raise WeightsError("token_embd.weight is missing; expected a whole model; convert it again")
    return parse_config(_config(file, str(arch)))


def _config(file: GGUFFile, arch: str) -> dict[str, object]:
    """What config.json would say of this model."""
    metadata, tensors = file.metadata, file.tensors
    hidden_size = _count(metadata, f"{arch}.embedding_length")
    num_heads = _count(metadata, f"{arch}.attention.head_count")
    head_dim = metadata.get(f"{arch}.attention.key_length", hidden_size // num_heads)
    if metadata.get(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise WeightsError(
            f"{arch}.attention.key_length is {head_dim} and value_length is "
            f"{metadata[f'{arch}.attention.value_length']}; expected one size; choose another model"
        )
    window = metadata.get(f"{arch}.attention.sliding_window") if arch == "llama" else None
    return {
        "architectures": [_ARCHITECTURES[arch] if window is None else "MistralForCausalLM"],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _count(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _count(metadata, f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": _count(metadata, f"{arch}.context_length"),
        "rms_norm_eps": _required(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, arch, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "sliding_window": window,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dominant_dtype(file),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [metadata[key] for key in _EOS_KEYS if key in metadata],
    }


def _count(metadata: Mapping[str, object], key: str) -> int:
    value = _required(metadata, key)
    if not isinstance(value, int) or value < 1:
        raise WeightsError(f"{key} is {value!r}; expected a positive integer; convert the model again")
    return value


def _required(metadata: Mapping[str, object], key: str) -> object:
    if key not in metadata:
        raise WeightsError(f"{key} is missing from the metadata; expected a whole model; convert it again")
    return metadata[key]


def _rope_parameters(file: GGUFFile, arch: str, head_dim: object) -> dict[str, object]:
    metadata = file.metadata
    theta = metadata.get(f"{arch}.rope.freq_base", 10000.0)
    rope: dict[str, object] = {"rope_theta": theta}
    rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise WeightsError(
            f"{arch}.rope.dimension_count is {rotated} of a head of {head_dim}; expected whole heads; "
            "choose a model whose rotary embedding turns whole heads"
        )
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": metadata.get(f"{arch}.rope.scaling.factor")}
    elif _ROPE_DIVISORS in file.tensors:
        rope |= _llama3_parameters(file.read(_ROPE_DIVISORS), theta)
    return rope


def _llama3_parameters(divisors: np.ndarray, theta: object) -> dict[str, object]:
    """The parameters of Llama-3's scaling that give `divisors`, one for each frequency; none where all are 1."""
    if np.all(divisors == 1):
        return {}
    factor = float(divisors.max())
    exponents = np.arange(divisors.size) / divisors.size
    wavelengths = 2 * math.pi * np.asarray(theta, dtype=np.float64) ** exponents
    smooth = (_LLAMA3_POSITIONS / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    smooth = smooth.clip(0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
        raise WeightsError(
            f"{_ROPE_DIVISORS} does not follow Llama 3's scaling of {_LLAMA3_POSITIONS} positions; "
            "take the model as safetensors, where config.json names the scaling"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_POSITIONS,
    }


def _dominant_dtype(file: GGUFFile) -> str:
    num_elements: Counter[str] = Counter()
    for tensor in file.tensors.values():
        num_elements[tensor.type_name] += math.prod(tensor.shape)
    for type_name, dtype in (("F16", "float16"), ("BF16", "bfloat16")):
        if 2 * num_elements[type_name] > num_elements.total():
            return dtype
    return "float32"


def _weight_name(name: str) -> str:
    """What transformers calls the tensor `name`; itself when no weight is known by it."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"

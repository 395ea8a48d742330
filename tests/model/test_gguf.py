"""GGUF files: tiny ones written here with the gguf library, every way to damage them, and the real SmolLM2."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from semipd.config import Shard
from semipd.errors import WeightsError
from semipd.gguf_file import read_gguf
from semipd.model.families import expected_weights
from semipd.model.loader import load_spec, load_weights, resolve_model
from semipd.model.spec import Llama3RopeScaling, ModelSpec
from tests.parallel.shards import shard_of

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 64, 96, 4, 2, 16, 40
Weights = dict[str, np.ndarray]
LAYER_WEIGHTS = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
}
QKV_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", (HEADS * HEAD_DIM,)),
    "attn_k.bias": ("self_attn.k_proj.bias", (KV_HEADS * HEAD_DIM,)),
    "attn_v.bias": ("self_attn.v_proj.bias", (KV_HEADS * HEAD_DIM,)),
}
QK_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", (HEAD_DIM,)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", (HEAD_DIM,)),
}


def random_weights(layer_weights: dict[str, tuple[str, tuple[int, ...]]], *, tied: bool) -> tuple[Weights, Weights]:
    """The same random weights under the names of GGUF and of transformers, rows in the order of the latter."""
    rng = np.random.default_rng(0)
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN))
    }
    for layer in range(LAYERS):
        for name, (hf_name, shape) in layer_weights.items():
            names[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{hf_name}", shape)
    names["output_norm.weight"] = ("model.norm.weight", (HIDDEN,))
    if not tied:
        names["output.weight"] = ("lm_head.weight", (VOCAB, HIDDEN))
    values = {name: rng.standard_normal(shape, dtype=np.float32) for name, (_, shape) in names.items()}
    return values, {hf_name: values[name] for name, (hf_name, _) in names.items()}


def interleave_rows(weights: Weights) -> Weights:
    """What llama.cpp does to q and k of Llama: each head's rows (a0, .., an, b0, .., bn) to (a0, b0, .., an, bn)."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    result = dict(weights)
    for name, weight in weights.items():
        num_heads = heads.get(name.split(".")[-2])
        if num_heads is not None:
            halves = weight.reshape(num_heads, 2, HEAD_DIM // 2, -1)
            result[name] = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)
    return result


def write_gguf(
    path: Path,
    arch: str,
    weights: Weights,
    metadata: dict[str, Any] | None = None,
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A GGUF file of `weights`, the matrices in the format `quantised`; `metadata` adds keys, and None removes one."""
    fields: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 5e5,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(VOCAB)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields | (metadata or {})).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, weight in weights.items():
        if quantised is not None and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(path: Path, metadata: dict[str, Any] | None = None, extra: Weights | None = None) -> Path:
    weights, _ = random_weights(LAYER_WEIGHTS, tied=True)
    return write_gguf(path, "llama", interleave_rows(weights) | (extra or {}), metadata)


def load(path: Path) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    source = resolve_model(str(path))
    spec = load_spec(source)
    return spec, load_weights(source, spec, torch.float32, "cpu")


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight.numpy(), theirs[name], err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_rows_of_q_and_k_come_back_in_order(tmp_path: Path, tied: bool) -> None:
    weights, hf_weights = random_weights(LAYER_WEIGHTS, tied=tied)
    spec, ours = load(write_gguf(tmp_path / "llama.gguf", "llama", interleave_rows(weights)))
    assert_equal_weights(ours, hf_weights)
    assert spec == ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=256,
        rope_theta=5e5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_ids=frozenset({2}),
    )


def test_llama_biases_are_reordered_too(tmp_path: Path) -> None:
    biases = QKV_BIASES | {"attn_output.bias": ("self_attn.o_proj.bias", (HIDDEN,))}
    weights, hf_weights = random_weights(LAYER_WEIGHTS | biases, tied=True)
    spec, ours = load(write_gguf(tmp_path / "llama.gguf", "llama", interleave_rows(weights)))
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, False)
    assert_equal_weights(ours, hf_weights)


@pytest.mark.parametrize(
    ("arch", "architecture", "extra"),
    [("qwen2", "Qwen2ForCausalLM", QKV_BIASES), ("qwen3", "Qwen3ForCausalLM", QK_NORMS)],
)
def test_qwen_rows_stay_where_they_are(
    tmp_path: Path, arch: str, architecture: str, extra: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    weights, hf_weights = random_weights(LAYER_WEIGHTS | extra, tied=True)
    spec, ours = load(write_gguf(tmp_path / "qwen.gguf", arch, weights))
    assert (spec.architecture, spec.qkv_bias, spec.qk_norm) == (architecture, arch == "qwen2", arch == "qwen3")
    assert_equal_weights(ours, hf_weights)


def test_llama_with_a_window_is_mistral(tmp_path: Path) -> None:
    spec, _ = load(tiny_llama(tmp_path / "mistral.gguf", {"llama.attention.sliding_window": 32}))
    assert (spec.architecture, spec.sliding_windows) == ("MistralForCausalLM", (32, 32))


def test_eos_ids_are_the_union_of_all_keys(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    spec, _ = load(tiny_llama(tmp_path / "llama.gguf", metadata))
    assert spec.eos_token_ids == {2, 7, 9}


@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    [("F16", "float16", 2e-3), ("BF16", "bfloat16", 2e-2), ("Q8_0", "float32", 2e-2), ("Q4_0", "float32", 0.5)],
)
def test_dtype_is_that_of_most_elements(tmp_path: Path, name: str, dtype: str, atol: float) -> None:
    weights, hf_weights = random_weights(LAYER_WEIGHTS, tied=True)
    path = tmp_path / "llama.gguf"
    spec, ours = load(write_gguf(path, "llama", interleave_rows(weights), quantised=gguf.GGMLQuantizationType[name]))
    assert spec.dtype == dtype
    for name, weight in ours.items():
        np.testing.assert_allclose(weight.numpy(), hf_weights[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("quantised", [None, "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_shards_are_parts_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quantised: str | None, world_size: int, tied: bool
) -> None:
    biases = QKV_BIASES | {"attn_output.bias": ("self_attn.o_proj.bias", (HIDDEN,))}
    weights, _ = random_weights(LAYER_WEIGHTS | biases, tied=tied)
    format_ = None if quantised is None else gguf.GGMLQuantizationType[quantised]
    path = write_gguf(tmp_path / "llama.gguf", "llama", interleave_rows(weights), quantised=format_)
    spec, whole = load(path)
    num_elements: list[int] = []

    def dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        values = original(data, kind)
        num_elements.append(values.size)
        return values

    original = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    for rank in range(world_size):
        num_elements.clear()
        shard = Shard(rank=rank, world_size=world_size)
        mine = load_weights(resolve_model(str(path)), spec, torch.float32, "cpu", shard=shard)
        expected = shard_of(whole, spec, shard)
        assert list(mine) == list(expected)
        for name, weight in mine.items():
            assert torch.equal(weight, expected[name]), name
        # Of o and down, whose columns are split, a rank dequantises whole blocks of 32.
        extra = sum(
            weight.shape[0] * (covered(rank, weight.shape[1]) - weight.shape[1])
            for name, weight in mine.items()
            if name.endswith(("o_proj.weight", "down_proj.weight")) and quantised in ("Q8_0", "Q4_0")
        )
        assert sum(num_elements) == sum(weight.numel() for weight in mine.values()) + extra


def covered(rank: int, num_columns: int) -> int:
    """Columns of the blocks of 32 that have a part in those of a rank."""
    return (-(-(rank + 1) * num_columns // 32) - rank * num_columns // 32) * 32


def llama3_divisors(factor: float, positions: int) -> np.ndarray:
    """What llama.cpp writes for Llama 3.1's scaling, one divisor a frequency, in plain Python."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 5e5 ** (2 * i / HEAD_DIM)
        if wavelength < positions / 4:
            divisors.append(1.0)
        elif wavelength > positions:
            divisors.append(factor)
        else:
            smooth = (positions / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_divisors_become_llama3_scaling(tmp_path: Path, factor: float) -> None:
    divisors = {"rope_freqs.weight": llama3_divisors(factor, positions=8192)}
    spec, ours = load(tiny_llama(tmp_path / "llama.gguf", extra=divisors))
    assert spec.rope_scaling == Llama3RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert ours.keys() == expected_weights(spec).keys()


def test_rope_divisors_of_one_scale_nothing(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, dtype=np.float32)}
    assert load(tiny_llama(tmp_path / "llama.gguf", extra=ones))[0].rope_scaling is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "llama.block_count is missing from the metadata; expected a whole model"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing from the metadata"),
        ({"llama.block_count": 1 << 25}, "num_hidden_layers is 33554432; expected an integer of at most 10000"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length is '64'; expected a positive integer"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; choose a model without experts"),
        ({"llama.attention.value_length": 8}, "key_length is 16 and value_length is 8; expected one size"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8 of a head of 16; expected whole heads"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope_type is 'yarn'; expected one"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"num_key_value_heads is \[2, 1\]; expected an integer"),
        ({"tokenizer.ggml.eos_token_id": 40}, r"eos_token_id is \[40\]; expected token ids from 0 to 39"),
        ({"split.count": 3}, "split into 3 files; expected one; merge them"),
    ],
)
def test_metadata_that_cannot_be_served_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = tiny_llama(tmp_path / "bad.gguf", metadata)
    with pytest.raises(WeightsError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert "factor=4.0" in repr(load(tiny_llama(tmp_path / "llama.gguf", scaling))[0].rope_scaling)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_freqs.weight": llama3_divisors(8.0, positions=4096)}, "rope_freqs.weight does not follow Llama 3"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, "missing: .*q_proj.bias|missing: .*k_proj.bias"),
        ({"blk.1.ffn_gate_exps.weight": np.ones(8, np.float32)}, "1 unexpected: blk.1.ffn_gate_exps.weight"),
        (
            {"blk.2.attn_q.weight": np.ones((64, 64), np.float32)},
            "1 unexpected: model.layers.2.self_attn.q_proj.weight",
        ),
        ({"output_norm.weight": np.ones(63, np.float32)}, r"model.norm.weight \(63,\) where \(64,\) was expected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, extra: Weights, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load(tiny_llama(tmp_path / "bad.gguf", extra=extra))


def test_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "gemma.gguf", "gemma", {"token_embd.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(WeightsError, match="general.architecture is 'gemma'; expected one of llama, qwen2, qwen3"):
        load(path)


def test_file_without_an_embedding_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "vocab.gguf", "llama", {})
    with pytest.raises(WeightsError, match="token_embd.weight is missing; expected a whole model"):
        load(path)


def test_formats_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "int8.gguf", extra={"output_norm.weight": np.ones(HIDDEN, np.int8)})
    with pytest.raises(WeightsError, match="output_norm.weight is stored as I8, which cannot be dequantised"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(64), b"GGUF" + (3 << 24).to_bytes(4, "little")])
def test_other_bytes_are_no_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is not a complete GGUF file.*download it again"):
        load(path)


@pytest.fixture(scope="module")
def llama_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "llama.gguf").read_bytes()


@given(data=st.data())
def test_truncation_anywhere_is_noticed_before_any_tensor_is_read(
    tmp_path_factory: pytest.TempPathFactory, llama_bytes: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    path.write_bytes(llama_bytes[: data.draw(st.integers(0, len(llama_bytes) - 32))])
    with pytest.raises(WeightsError, match="is not a complete GGUF file"):
        read_gguf(path)


@given(data=st.data())
def test_corrupt_headers_end_in_a_weights_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, llama_bytes: bytes, data: st.DataObject
) -> None:
    header = llama_bytes.index(b"token_embd.weight")
    content = bytearray(llama_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header + 2000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "corrupt.gguf"
    path.write_bytes(content)
    try:
        load(path)
    except WeightsError as error:
        assert str(path) in str(error)


@pytest.mark.slow
def test_smollm2_equals_what_transformers_dequantises(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers parses the file twice, at several seconds each.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    spec, ours = load(smollm2_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    del theirs["lm_head.weight"]
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert (spec.num_layers, spec.rope_theta, spec.dtype) == (30, 100000.0, "float32")
    assert (spec.tie_word_embeddings, spec.eos_token_ids) == (True, frozenset({2}))

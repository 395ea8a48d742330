"""Each rank's weights, of safetensors and random ones: together the whole model, and of the files no more is read.

GGUF files are in `tests/model/test_gguf.py`.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semipd.config import LoadFormat, Shard
from semipd.errors import ConfigError, WeightsError
from semipd.model.families import expected_weights
from semipd.model.loader import load_spec, load_weights, resolve_model
from semipd.model.spec import ModelSpec
from tests.parallel.shards import shard_of
from tests.tiny import tiny_config

VOCAB = 61
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"num_key_value_heads": 1},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}
SHARDS = [Shard(rank=rank, world_size=size) for size in (1, 2, 4) for rank in range(size)]

families = pytest.mark.parametrize("family", FAMILIES)
each_shard = pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: f"{shard.rank}of{shard.world_size}")


def save_model(folder: Path, family: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """A random model in two files: its spec and its weights."""
    config = tiny_config(family)
    config.update({"vocab_size": VOCAB, "eos_token_id": None} | FAMILIES[family])
    config.save_pretrained(folder)
    spec = load_spec(resolve_model(str(folder)))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in expected_weights(spec).items()}
    names = list(weights)
    files = {f"model-{index}.safetensors": names[index::2] for index in range(2)}
    weight_map = {name: file for file, names in files.items() for name in names}
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return spec, weights


class CountingFile:
    """A safetensors file that gives slices only and counts their elements."""

    num_elements = 0

    def __init__(self, file: AbstractContextManager[Any]) -> None:
        self._file = file

    def __enter__(self) -> CountingFile:
        self._open = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        names: list[str] = self._open.keys()
        return names

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self._open.get_slice(name))


class CountingSlice:
    def __init__(self, slice_: Any) -> None:
        self._slice = slice_
        self.get_shape = slice_.get_shape

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        part: Tensor = self._slice[index]
        CountingFile.num_elements += part.numel()
        return part


@families
@each_shard
def test_a_rank_has_its_part_and_reads_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, shard: Shard
) -> None:
    spec, weights = save_model(tmp_path, family)

    def count_in(*args: Any, **options: Any) -> CountingFile:
        return CountingFile(safe_open(*args, **options))

    monkeypatch.setattr("semipd.model.checkpoint.safe_open", count_in)
    monkeypatch.setattr(CountingFile, "num_elements", 0)

    mine = load_weights(resolve_model(str(tmp_path)), spec, torch.float64, "cpu", shard=shard)

    expected = shard_of(weights, spec, shard)
    assert list(mine) == list(expected)
    for name, weight in mine.items():
        assert torch.equal(weight, expected[name].double()), name
        assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    local = expected_weights(spec.shard(shard))
    assert {name: tuple(weight.shape) for name, weight in mine.items()} == {name: local[name] for name in mine}
    num_padding = (spec.shard(shard).vocab_size * shard.world_size - VOCAB) if shard.rank == shard.world_size - 1 else 0
    num_tables = 1 if spec.tie_word_embeddings else 2
    num_elements = sum(weight.numel() for weight in mine.values()) - num_tables * num_padding * spec.hidden_size
    assert CountingFile.num_elements == num_elements


@families
@each_shard
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_of_one_model(tmp_path: Path, family: str, shard: Shard, dtype: torch.dtype) -> None:
    spec, _ = save_model(tmp_path, family)
    source = resolve_model(str(tmp_path), load_format="dummy")
    expected = shard_of(load_weights(source, spec, dtype, "cpu", seed=3), spec, shard)
    mine = load_weights(source, spec, dtype, "cpu", seed=3, shard=shard)
    assert list(mine) == list(expected)
    for name, weight in mine.items():
        assert torch.equal(weight, expected[name]), name
        assert weight.untyped_storage().nbytes() == weight.nbytes, "the whole weight is kept"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_ranks_behind_the_vocabulary_have_zeros(tmp_path: Path, load_format: LoadFormat) -> None:
    config = tiny_config("llama3")
    config.update({"vocab_size": 9, "eos_token_id": None, "num_attention_heads": 8})
    config.save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path), load_format="dummy")
    spec = load_spec(source)
    whole = load_weights(source, spec, torch.float32, "cpu")
    save_file(whole, tmp_path / "model.safetensors")
    source = resolve_model(str(tmp_path), load_format=load_format)
    shards = [Shard(rank=rank, world_size=8) for rank in range(8)]
    tables = [load_weights(source, spec, torch.float32, "cpu", shard=shard)["lm_head.weight"] for shard in shards]
    assert [len(table) for table in tables] == [2] * 8
    rows = torch.cat(tables)
    assert torch.equal(rows[:9], whole["lm_head.weight"]) and rows[9:].eq(0).all()


def test_weights_are_checked_whole(tmp_path: Path) -> None:
    spec, weights = save_model(tmp_path, "qwen2")
    weights["model.norm.weight"] = torch.ones(3)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(weights, tmp_path / "model.safetensors")
    shard = Shard(rank=1, world_size=2)
    with pytest.raises(WeightsError, match=r"1 of another shape: model.norm.weight \(3,\) where \(32,\) was expected"):
        load_weights(resolve_model(str(tmp_path)), spec, torch.float32, "cpu", shard=shard)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_model_that_cannot_be_split_is_refused(tmp_path: Path, load_format: LoadFormat) -> None:
    spec, _ = save_model(tmp_path, "qwen2")
    source = resolve_model(str(tmp_path), load_format=load_format)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, but the model has 4 query heads.*: 1, 2, 4$"):
        load_weights(source, spec, torch.float32, "cpu", shard=Shard(rank=0, world_size=3))


def test_a_tied_head_is_compared_by_part(tmp_path: Path) -> None:
    spec, weights = save_model(tmp_path, "qwen3")
    (tmp_path / "model.safetensors.index.json").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][-1] += 1
    save_file(weights, tmp_path / "model.safetensors")
    source = resolve_model(str(tmp_path))
    first, last = (Shard(rank=rank, world_size=2) for rank in range(2))
    assert "lm_head.weight" not in load_weights(source, spec, torch.float32, "cpu", shard=first)
    with pytest.raises(WeightsError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        load_weights(source, spec, torch.float32, "cpu", shard=last)

"""Folders, hub ids and random weights: what transformers saves is loaded bit for bit, what is damaged is named."""

from __future__ import annotations

import json
import pickle
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from semipd.config import LoadFormat
from semipd.errors import ConfigError, WeightsError
from semipd.model.families import expected_weights
from semipd.model.loader import ModelSource, SourceKind, load_spec, load_weights, resolve_model, resolve_tokenizer
from semipd.model.spec import ModelSpec

SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(llama: transformers.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in one file and in shards; do not change them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "sharded")}
    llama.save_pretrained(folders["whole"])
    llama.save_pretrained(folders["sharded"], max_shard_size=SHARD_BYTES)
    return folders


@pytest.fixture
def whole(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the one-file model to damage."""
    return Path(shutil.copytree(saved["whole"], tmp_path / "whole"))


@pytest.fixture
def sharded(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sharded model to damage."""
    return Path(shutil.copytree(saved["sharded"], tmp_path / "sharded"))


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail("a pickle was opened")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)


def load(folder: Path) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    source = resolve_model(str(folder))
    spec = load_spec(source)
    return spec, load_weights(source, spec, torch.float32, "cpu")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace or add tensors of a one-file model; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_weights_are_those_that_transformers_saved(
    saved: dict[str, Path], llama: transformers.LlamaForCausalLM, layout: str
) -> None:
    spec, weights = load(saved[layout])
    assert (len(shards(saved[layout])) > 2) == (layout == "sharded")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected_weights(spec)
    assert list(weights) == list(expected_weights(spec))
    for name, weight in llama.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_rounded_to_the_asked_dtype(
    saved: dict[str, Path], llama: transformers.LlamaForCausalLM, dtype: torch.dtype
) -> None:
    source = resolve_model(str(saved["whole"]))
    weights = load_weights(source, load_spec(source), dtype, torch.device("cpu"))
    for name, weight in llama.state_dict().items():
        assert torch.equal(weights[name], weight.to(dtype)), name


def test_weights_outlive_their_file(whole: Path, llama: transformers.LlamaForCausalLM) -> None:
    _, weights = load(whole)
    path = whole / "model.safetensors"
    with path.open("r+b") as file:  # in place, as a map of the file would see it
        file.write(bytes(path.stat().st_size))
    assert torch.equal(weights["model.norm.weight"], llama.model.norm.weight)
    assert torch.equal(weights["lm_head.weight"], llama.lm_head.weight)


def test_generation_config_adds_its_eos_ids(whole: Path) -> None:
    (whole / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    edit_json(whole / "config.json", eos_token_id=2)
    assert load(whole)[0].eos_token_ids == {2, 5, 7}


def test_rotary_buffers_of_old_checkpoints_are_ignored(whole: Path) -> None:
    edit_weights(whole, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    spec, weights = load(whole)
    assert weights.keys() == expected_weights(spec).keys()


def test_tied_head_may_be_saved_when_it_equals_the_embedding(whole: Path) -> None:
    edit_json(whole / "config.json", tie_word_embeddings=True)
    edit_weights(whole, {"lm_head.weight": load_file(whole / "model.safetensors")["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in load(whole)[1]
    edit_weights(whole, {"lm_head.weight": None})
    assert "lm_head.weight" not in load(whole)[1]


def test_tied_head_that_differs_is_refused(whole: Path) -> None:
    edit_json(whole / "config.json", tie_word_embeddings=True)
    with pytest.raises(WeightsError, match="tie_word_embeddings is true, but lm_head.weight differs.*to false"):
        load(whole)


def test_every_name_that_does_not_fit_is_counted_and_listed(whole: Path) -> None:
    changes: dict[str, torch.Tensor | None] = {f"surplus.{i:02}": torch.ones(1) for i in range(12)}
    changes |= {"lm_head.weight": None, "model.norm.weight": torch.ones(47)}
    edit_weights(whole, changes)
    with pytest.raises(WeightsError) as caught:
        load(whole)
    message = str(caught.value)
    assert f"{whole}: the weights do not fit the configuration, which has 30 of them" in message
    assert "1 missing: lm_head.weight;" in message
    assert "12 unexpected: surplus.00, surplus.01, " in message
    assert "surplus.09, and 2 more;" in message
    assert "surplus.10" not in message
    assert "1 of another shape: model.norm.weight (47,) where (48,) was expected;" in message
    assert "use the configuration and the weights of one model" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(whole: Path, dtype: torch.dtype) -> None:
    edit_weights(whole, {"model.norm.weight": torch.ones(48).to(dtype)})
    with pytest.raises(WeightsError, match=f"model.norm.weight is {dtype}; expected one of torch.float64.*unquantised"):
        load(whole)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_are_named(whole: Path, keep: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="model.safetensors is not a complete safetensors file.*download it again"):
        load(whole)


def test_corrupt_header_is_named(sharded: Path) -> None:
    path = shards(sharded)[2]
    content = bytearray(path.read_bytes())
    content[8:20] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path.name} is not a complete safetensors file"):
        load(sharded)


def test_missing_shard_is_named(sharded: Path) -> None:
    path = shards(sharded)[1]
    path.unlink()
    with pytest.raises(WeightsError, match=f"{path.name} is missing; .*download the model again"):
        load(sharded)


def test_weight_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = shards(sharded)[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(WeightsError, match=f"{second.name} holds .* again; expected each weight in one shard"):
        load(sharded)


def test_index_that_points_to_the_wrong_shard_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    wrong = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    edit_json(index, weight_map=weight_map | {"model.norm.weight": wrong})
    with pytest.raises(WeightsError, match=f"lists model.norm.weight in {wrong}, which does not hold it"):
        load(sharded)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", 3], ids=["up", "root", "bin", "int"]
)
def test_index_that_lists_other_files_is_refused(sharded: Path, file: object) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map={"model.norm.weight": file})
    with pytest.raises(
        WeightsError, match="lists .*; expected safetensors files beside it; pickles .* are never opened"
    ):
        load(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_a_map_is_refused(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="index.json has no weight_map; expected weight names to file names"):
        load(sharded)


def test_pickled_weights_are_never_opened(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(WeightsError) as caught:
        load(whole)
    message = str(caught.value)
    assert "has no model.safetensors and no model.safetensors.index.json, only: config.json" in message
    assert "pytorch_model.bin; pickles (.bin, .pt, .pth) are never opened" in message
    assert "save_pretrained writes safetensors" in message


def test_folder_without_a_config_is_refused(whole: Path) -> None:
    (whole / "config.json").unlink()
    with pytest.raises(WeightsError, match="has no config.json; expected a model saved by transformers"):
        load(whole)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"\xff\xfe", "cannot be read as JSON"), (b"[]", "holds list; expected a JSON")],
)
def test_files_that_are_no_json_object_are_named(whole: Path, file: str, content: bytes, message: str) -> None:
    (whole / file).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{file} {message}"):
        load(whole)


def test_errors_of_the_configuration_name_the_folder(whole: Path) -> None:
    edit_json(whole / "config.json", hidden_act="relu")
    with pytest.raises(WeightsError, match="whole: hidden_act is 'relu'"):
        load(whole)


def test_dummy_needs_the_config_alone(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    source = resolve_model(str(whole), load_format="dummy")
    assert source == resolve_model(str(whole / "config.json"), load_format="dummy")
    spec = load_spec(source)
    weights = load_weights(source, spec, torch.float32, "cpu", seed=3)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected_weights(spec)
    again = load_weights(source, spec, torch.bfloat16, "cpu", seed=3)
    other = load_weights(source, spec, torch.float32, "cpu", seed=4)
    for name, weight in weights.items():
        assert torch.equal(again[name], weight.bfloat16()), name
        assert not torch.equal(other[name], weight), name
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_dummy_weights_keep_activations_sane(llama: transformers.LlamaForCausalLM, saved: dict[str, Path]) -> None:
    source = resolve_model(str(saved["whole"]), load_format="dummy")
    weights = load_weights(source, load_spec(source), torch.float32, "cpu")
    np.testing.assert_allclose(weights["model.layers.1.mlp.down_proj.weight"].std(), 80**-0.5, rtol=0.1)
    np.testing.assert_allclose(weights["model.norm.weight"], 1, atol=0.1)
    model = transformers.LlamaForCausalLM(llama.config)
    model.load_state_dict(weights)
    with torch.inference_mode():
        logits = model(torch.randint(0, 96, (1, 64))).logits
    assert 0.3 < logits.std() < 3


@pytest.mark.parametrize(
    "model",
    ["/no/such/folder", "./missing", "../missing", "~/missing-model", "a/b/c", "model.gguf", "org/x.safetensors"],
)
def test_missing_path_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="does not exist; expected a folder, a .gguf file or a hub id such as"):
        resolve_model(model)


@pytest.mark.parametrize(
    ("name", "load_format", "revision", "message"),
    [
        ("", "gguf", None, "load_format is 'gguf', but '.*' names no .gguf file; pass the path of the file itself"),
        ("x.gguf", "safetensors", None, "load_format is 'safetensors', but '.*x.gguf' is a GGUF file"),
        ("x.gguf", "dummy", None, "load_format is 'dummy', but '.*x.gguf' is a GGUF file"),
        ("", "auto", "main", "revision is 'main', but the model '.*' is on this machine; leave revision out"),
    ],
)
def test_contradicting_arguments_are_refused(
    tmp_path: Path, name: str, load_format: LoadFormat, revision: str | None, message: str
) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(tmp_path / name), revision, load_format)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_other_files_are_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=f"{name}' is a file; expected a .gguf file, or a folder with config.json"):
        resolve_model(str(tmp_path / name))


def test_hub_id_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve_model("org/some.model-1", "v2")
    assert source == ModelSource(path=tmp_path, kind=SourceKind.SAFETENSORS)
    assert resolve_model("gpt", load_format="dummy").kind is SourceKind.DUMMY
    assert resolve_tokenizer("org/other") == tmp_path
    (repository, revision, patterns), (_, _, dummy_patterns), (other, none, tokenizer_patterns) = calls
    assert (repository, revision) == ("org/some.model-1", "v2")
    assert (other, none) == ("org/other", None)
    files = [
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.bin", "original/consolidated.00.pth",
        "modeling_org.py", "training_args.bin", "flax_model.msgpack", "sub/model.safetensors",
    ]  # fmt: skip
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)] == files[:6]
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in dummy_patterns)] == files[:3]
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in tokenizer_patterns)] == files[:3]


def test_a_tokenizer_here_is_taken_as_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    (tmp_path / "x.gguf").touch()
    assert resolve_tokenizer(str(tmp_path)) == tmp_path
    assert resolve_tokenizer(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    with pytest.raises(WeightsError, match="does not exist; expected a folder, a .gguf file or a hub id such as"):
        resolve_tokenizer("./missing")


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("what the hub says\nand more",)
    return error


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (hub_error(errors.GatedRepoError), "accept its terms at https://huggingface.co/org/model, then run `hf auth"),
        (hub_error(errors.RepositoryNotFoundError), "check the name; for a private repository run `hf auth login`"),
        (hub_error(errors.RevisionNotFoundError), "revision 'v2' does not exist; expected a branch, tag or commit"),
        (hub_error(errors.LocalEntryNotFoundError), "not in the local cache and the hub cannot be reached"),
        (hub_error(errors.HFValidationError), "check the connection and the name, or download the model and pass"),
        (ConnectionError("what the hub says"), "check the connection and the name"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match="the hub gave no 'org/model'") as caught:
        resolve_model("org/model", "v2")
    assert advice in str(caught.value)
    assert "and more" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_offline_hub_id_is_an_error_not_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="not in the local cache and the hub cannot be reached.*HF_HUB_OFFLINE"):
        resolve_model("org/model")

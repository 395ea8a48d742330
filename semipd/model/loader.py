"""From what a user calls a model to its spec and its weights: a folder, a GGUF file, a hub id, or random weights.

`resolve_model` decides where the files are, `load_spec` reads what the model is, `load_weights` reads the tensors. Of
a hub repository only JSON, safetensors and tokenizer files are fetched: no pickle is opened, no code of it is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from semipd.config import LoadFormat, Shard
from semipd.errors import ConfigError, WeightsError
from semipd.gguf_file import read_gguf
from semipd.model.checkpoint import Checkpoint, SafetensorsCheckpoint, copy_part, read_json, read_weights
from semipd.model.families import expected_weights, parse_config, weight_parts
from semipd.model.gguf import GGUFCheckpoint, parse_metadata
from semipd.model.spec import ModelSpec

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_CONFIG_PATTERNS = (
    _CONFIG,
    _GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
_WEIGHT_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WHOLE = Shard()
_FILE_SUFFIXES = (".gguf", ".json", ".safetensors", ".bin", ".pt", ".pth")


class SourceKind(StrEnum):
    """Where the weights of a model come from."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    DUMMY = "dummy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model's files on this machine.

    Attributes:
        path: the .gguf file of kind GGUF; otherwise the folder with config.json and the tokenizer's files.
    """

    path: Path
    kind: SourceKind


def resolve_model(model: str, revision: str | None = None, load_format: LoadFormat = "auto") -> ModelSource:
    """Where the files of `model` are, fetched from the hub if they are not here.

    Args:
        model: a folder, a .gguf file, a hub id, or for "dummy" a config.json.
        revision: a branch, tag or commit of a hub id.
        load_format: "auto" takes GGUF for a .gguf file and safetensors otherwise.

    Raises:
        ConfigError: the arguments contradict each other.
        WeightsError: no such file or folder, or the hub cannot give the model.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return _resolve_hub_id(model, revision, load_format)
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, but the model {model!r} is on this machine; leave revision out")
    if path.is_dir():
        return ModelSource(path=path, kind=_folder_kind(model, load_format))
    if path.suffix.lower() == ".gguf":
        if load_format not in ("auto", "gguf"):
            raise ConfigError(f"load_format is {load_format!r}, but {model!r} is a GGUF file; use 'auto' or 'gguf'")
        return ModelSource(path=path, kind=SourceKind.GGUF)
    if path.name == _CONFIG and load_format == "dummy":
        return ModelSource(path=path.parent, kind=SourceKind.DUMMY)
    raise WeightsError(
        f"{model!r} is a file; expected a .gguf file, or a folder with config.json and safetensors "
        "(a config.json alone goes with load_format='dummy')"
    )


def resolve_tokenizer(tokenizer: str) -> Path:
    """The folder or .gguf file of `tokenizer`, of the same forms as a model; from the hub come no weights.

    Raises:
        WeightsError: no such file or folder, or the hub cannot give it.
    """
    if Path(tokenizer).expanduser().exists():
        return resolve_model(tokenizer).path
    _require_hub_id(tokenizer)
    return _download(tokenizer, None, _CONFIG_PATTERNS)


def load_spec(source: ModelSource) -> ModelSpec:
    """What the model of `source` is; no weights are read.

    Raises:
        WeightsError: the configuration is missing, malformed or not served.
    """
    if source.kind is SourceKind.GGUF:
        file = read_gguf(source.path)
        with _naming(source.path):
            return parse_metadata(file)
    config_path, generation_path = source.path / _CONFIG, source.path / _GENERATION_CONFIG
    if not config_path.is_file():
        raise WeightsError(f"{source.path} has no {_CONFIG}; expected a model saved by transformers; check the path")
    config = read_json(config_path)
    generation_config = read_json(generation_path) if generation_path.is_file() else None
    with _naming(source.path):
        return parse_config(config, generation_config)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def load_weights(
    source: ModelSource,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    shard: Shard = _WHOLE,
) -> dict[str, torch.Tensor]:
    """What `shard` has of the model's weights, on `device` in `dtype`: exactly what `weight_parts` names, in its order.

    The tensors belong to the caller; no file stays open or mapped. At most one tensor is held twice meanwhile.

    Args:
        source: of `resolve_model`.
        spec: of `load_spec`: of the whole model.
        dtype: any floating dtype; values are rounded to it, never rescaled.
        device: where the weights go, and for kind DUMMY where they are drawn.
        seed: decides the random values of kind DUMMY, whatever the shard; unused otherwise.
        shard: which part is read.

    Raises:
        ConfigError: the model cannot be split so.
        WeightsError: names or shapes differ from what the model needs, or a file is missing, truncated or malformed.
    """
    device = torch.device(device)
    if source.kind is SourceKind.DUMMY:
        return _random_weights(spec, dtype, device, seed, shard)
    checkpoint: Checkpoint
    if source.kind is SourceKind.GGUF:
        checkpoint = GGUFCheckpoint(read_gguf(source.path), spec)
    else:
        checkpoint = SafetensorsCheckpoint(source.path)
    return read_weights(checkpoint, spec, dtype, device, shard)


def _random_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int, shard: Shard
) -> dict[str, torch.Tensor]:
    """Normal weights that keep activations near unit size: 1/sqrt(fan-in) for matrices, norms near 1, small biases.

    Each is drawn whole, so that all shards are parts of one model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parts = weight_parts(spec, shard)
    weights = {}
    for name, shape in expected_weights(spec).items():
        # Drawn in float32 whatever the dtype, so that a model in float64 and one in bfloat16 are the same model.
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if len(shape) == 2:
            values *= shape[1] ** -0.5
        else:
            values *= 0.02
        if name.endswith("norm.weight"):
            values += 1
        if name in parts:
            weights[name] = copy_part(values[parts[name].index], parts[name], dtype, device)
    return weights


def _folder_kind(model: str, load_format: LoadFormat) -> SourceKind:
    if load_format == "gguf":
        raise ConfigError(f"load_format is 'gguf', but {model!r} names no .gguf file; pass the path of the file itself")
    return SourceKind.DUMMY if load_format == "dummy" else SourceKind.SAFETENSORS


def _require_hub_id(model: str) -> None:
    if not _HUB_ID.fullmatch(model) or model.lower().endswith(_FILE_SUFFIXES):
        raise WeightsError(
            f"{model!r} does not exist; expected a folder, a .gguf file or a hub id such as "
            f"'HuggingFaceTB/SmolLM2-135M-Instruct'; check the path (the current folder is {Path.cwd()})"
        )


def _resolve_hub_id(model: str, revision: str | None, load_format: LoadFormat) -> ModelSource:
    _require_hub_id(model)
    kind = _folder_kind(model, load_format)
    patterns = _CONFIG_PATTERNS if kind is SourceKind.DUMMY else _CONFIG_PATTERNS + _WEIGHT_PATTERNS
    return ModelSource(path=_download(model, revision, patterns), kind=kind)


def _download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Imported here: a local model need not pay for the hub's HTTP client.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # errors of the HTTP client have no other base in common
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(
            f"the hub gave no {repository!r} ({said}); {_hub_advice(error, repository, revision)}"
        ) from error


def _hub_advice(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return f"accept its terms at https://huggingface.co/{repository}, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "check the name; for a private repository run `hf auth login`; a local folder needs its path"
        case errors.RevisionNotFoundError():
            return f"revision {revision!r} does not exist; expected a branch, tag or commit"
        case errors.LocalEntryNotFoundError():
            return "it is not in the local cache and the hub cannot be reached; connect (or unset HF_HUB_OFFLINE)"
    return "check the connection and the name, or download the model and pass its folder"

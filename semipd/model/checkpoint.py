"""Weights as files offer them: the check of names and shapes that every format shares, and safetensors folders.

A checkpoint shows its shapes before any data is read, and gives tensors one at a time, so that a model is never held
twice; of each a rank reads its own part. Pickles are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from semipd.config import Shard
from semipd.errors import WeightsError
from semipd.model.families import EMBEDDING, LM_HEAD, WeightPart, expected_weights, weight_parts
from semipd.model.spec import ModelSpec

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_LISTED = 10
_NO_PICKLES = "pickles (.bin, .pt, .pth) are never opened, since they can run code"
# Buffers that old versions of transformers saved with the weights; they follow from the configuration.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Checkpoint(Protocol):
    """Where weights come from."""

    @property
    def path(self) -> Path:
        """The folder or file, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of every tensor on offer, read from headers only."""
        ...

    def tensors(self, parts: Mapping[str, WeightPart]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight of `parts` at its index, on the CPU, in any order; perhaps a view of a file: copy what you keep.

        As far as the format allows, nothing else is read.
        """
        ...


def read_weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device, shard: Shard
) -> dict[str, torch.Tensor]:
    """The `weight_parts` of `spec`, copied from `checkpoint`, in their order.

    Raises:
        WeightsError: names or shapes differ from what the model needs, or a file cannot be read.
    """
    expected = expected_weights(spec)
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if not name.endswith(_IGNORED_SUFFIXES)}
    parts = weight_parts(spec, shard)
    has_tied_head = spec.tie_word_embeddings and LM_HEAD in shapes
    if has_tied_head:
        expected[LM_HEAD], parts[LM_HEAD] = expected[EMBEDDING], parts[EMBEDDING]
    _check_names(checkpoint.path, expected, shapes)
    weights = dict.fromkeys(parts, torch.empty(0))
    for name, tensor in checkpoint.tensors(parts):
        weights[name] = copy_part(tensor, parts[name], dtype, device)
    if has_tied_head and not torch.equal(weights.pop(LM_HEAD), weights[EMBEDDING]):
        raise WeightsError(
            f"{checkpoint.path}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false in config.json, or remove that tensor"
        )
    return weights


def copy_part(tensor: torch.Tensor, part: WeightPart, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous copy of `tensor`, a weight at `part.index`, padded to `part.shape`."""
    weight = torch.empty(part.shape, dtype=dtype, device=device)
    weight[: len(tensor)] = tensor
    weight[len(tensor) :] = 0
    return weight


def _check_names(path: Path, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {shapes[name]} where {shape} was expected"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    found = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"{path}: the weights do not fit the configuration, which has {len(expected)} of them; {'; '.join(found)}; "
            "use the configuration and the weights of one model"
        )


class SafetensorsCheckpoint:
    """The weights of a folder, in model.safetensors or in the shards of model.safetensors.index.json.

    Raises:
        WeightsError: no weights are there, or a file is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        weight_map: Mapping[str, str] = {}
        if (folder / _SINGLE_FILE).is_file():
            paths = [folder / _SINGLE_FILE]
        elif (folder / _INDEX).is_file():
            weight_map = _read_index(folder / _INDEX)
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise _no_weights(folder)
        self._headers: dict[Path, dict[str, tuple[int, ...]]] = {}
        for path in paths:
            header = _read_header(path)
            twice = sorted(header.keys() & self.shapes.keys())
            if twice:
                raise WeightsError(f"{path} holds {_listing(twice)} again; expected each weight in one shard")
            self._headers[path] = header
        for name, file in weight_map.items():
            if name not in self._headers[folder / file]:
                raise WeightsError(
                    f"{folder / _INDEX} lists {name} in {file}, which does not hold it; download the model again"
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor in the files."""
        return {name: shape for header in self._headers.values() for name, shape in header.items()}

    def tensors(self, parts: Mapping[str, WeightPart]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight of `parts` at its index, as a view of its file.

        Raises:
            WeightsError: a file cannot be read, or holds a tensor that is no plain floating point.
        """
        for path, header in self._headers.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in header:
                        if name in parts:
                            yield name, _require_float(path, name, file.get_slice(name)[parts[name].index])
            except (SafetensorError, OSError) as error:
                raise _unreadable(path, error) from error


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing; the index lists weights in it; download the model again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; expected weight names to file names; download it again")
    for file in weight_map.values():
        # A name with a folder in it could lead out of the model's folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise WeightsError(
                f"{path} lists {file!r}; expected safetensors files beside it; {_NO_PICKLES}; download the model again"
            )
    return weight_map


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        WeightsError: the file cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}; expected a JSON object; download it again")
    return content


def _require_float(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _DTYPES:
        raise WeightsError(
            f"{path}: {name} is {tensor.dtype}; expected one of {', '.join(map(str, _DTYPES))}; "
            "quantised safetensors are not served, choose the unquantised model"
        )
    return tensor


def _no_weights(folder: Path) -> WeightsError:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    return WeightsError(
        f"{folder} has no {_SINGLE_FILE} and no {_INDEX}, only: {_listing(found) or 'nothing'}; {_NO_PICKLES}; "
        "convert the model (transformers' save_pretrained writes safetensors), or pass a .gguf file by its own path"
    )


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is not a complete safetensors file ({error}); download it again")


def _listing(names: list[str]) -> str:
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more

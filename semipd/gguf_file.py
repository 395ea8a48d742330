"""The GGUF container: header, metadata and tensors of one file, checked against the file's size before any is used.

The header is read here and not by `gguf.GGUFReader`, which makes numpy views of every string of the vocabulary (4 s for
the 98,000 of SmolLM2, where this takes 0.1 s) and goes on for ever when a corrupt array length points beyond the file.
The `gguf` library knows the quantised formats and does the dequantising. Nothing here knows a model.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semipd.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
# The format's numbers of its value types, and what `struct` calls the ones of fixed size.
_STRING, _ARRAY = 8, 9
_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies in its file, and how it is stored.

    Attributes:
        type_name: the format of its elements, such as F32 or Q4_K.
        shape: as torch orders it, outermost first.
        byte_shape: `shape` with the last axis counted in bytes.
        offset: of its first byte in the file.
    """

    type_name: str
    shape: tuple[int, ...]
    byte_shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFile:
    """The parsed header of a GGUF file; tensors stay in the file until `read`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> npt.NDArray[np.float32]:
        """The tensor `name`, dequantised to float32, in torch's shape.

        Args:
            index: a range for each dim, what is read of it: of the last, the blocks that have a part in its range.

        Raises:
            WeightsError: the file cannot be read, or holds a format that cannot be dequantised.
        """
        import numpy as np
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        *outer, columns = index or (slice(0, size) for size in tensor.shape)
        format_ = GGMLQuantizationType[tensor.type_name]
        block_length, block_bytes = GGML_QUANT_SIZES[format_]
        first, stop = columns.start // block_length, -(-columns.stop // block_length)
        try:
            num_bytes = math.prod(tensor.byte_shape)
            data = np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(num_bytes,))
            part = data.reshape(tensor.byte_shape)[(*outer, slice(first * block_bytes, stop * block_bytes))]
            values = dequantize(np.array(part), format_)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: {name} is stored as {tensor.type_name}, which cannot be dequantised; "
                "use a file quantised another way, such as Q4_K_M or Q8_0"
            ) from error
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.path}: {name} cannot be read ({error}); download the file again") from error
        begin = first * block_length
        return values.astype(np.float32, copy=False)[..., columns.start - begin : columns.stop - begin]


def read_gguf(path: Path) -> GGUFFile:
    """The header of the GGUF file at `path`, every tensor known to lie inside the file.

    Raises:
        WeightsError: the file cannot be opened, is no GGUF file, is truncated or is malformed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (OSError, ValueError) as error:  # ValueError: malformed, no UTF-8, or empty, which mmap refuses
        raise WeightsError(
            f"{path} is not a complete GGUF file ({error}); download it again, or convert the model again"
        ) from error


class _Cursor:
    """Reads values one after another and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.size = len(data)
        self.offset = 0

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.size - self.offset:
            raise ValueError(f"it ends at byte {self.size}, inside a field of {num_bytes} bytes")
        self.offset += num_bytes
        return self._data[self.offset - num_bytes : self.offset]

    def integer(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        return self.take(self.integer("Q")).decode()

    def value(self, kind: int) -> object:
        if kind == _ARRAY:
            kind = self.integer("I")
            return self.array(kind, self.integer("Q"))
        return self.array(kind, 1)[0]

    def array(self, kind: int, length: int) -> list[object]:
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        code = _SCALARS[kind] if kind < len(_SCALARS) else None
        if code is None:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(code))))


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != _MAGIC:
        raise ValueError("it does not begin with the bytes GGUF")
    version = cursor.integer("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}; expected 2 or 3, little-endian")
    num_tensors, num_fields = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, object] = {}
    for _ in range(num_fields):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}; expected a positive integer")
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, dims, kind, offset in infos:
        if name in tensors:
            raise ValueError(f"it has two tensors {name}")
        tensors[name] = tensor = _tensor(name, dims, kind, start + offset)
        end = tensor.offset + math.prod(tensor.byte_shape)
        if end > cursor.size:
            raise ValueError(f"it ends at byte {cursor.size}, before byte {end}, the end of {name}")
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dims innermost first, format number, and offset from the start of the tensors."""
    name = cursor.string()
    num_dims = cursor.integer("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"{name} has {num_dims} dims; expected 1 to {_MAX_DIMS}")
    dims = tuple(cursor.integer("Q") for _ in range(num_dims))
    return name, dims, cursor.integer("I"), cursor.integer("Q")


def _tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        format_ = GGMLQuantizationType(kind)
    except ValueError as error:
        raise ValueError(f"{name} is stored in the unknown format {kind}") from error
    block_length, block_bytes = GGML_QUANT_SIZES[format_]
    if dims[0] % block_length:
        raise ValueError(f"{name} has rows of {dims[0]} elements, stored in blocks of {block_length}")
    shape = dims[::-1]
    return GGUFTensor(
        type_name=format_.name,
        shape=shape,
        byte_shape=(*shape[:-1], shape[-1] // block_length * block_bytes),
        offset=offset,
    )

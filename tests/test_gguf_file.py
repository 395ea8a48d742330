"""The GGUF container: every kind of value, and files that lie about their sizes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from semipd.errors import WeightsError
from semipd.gguf_file import read_gguf


def write_metadata(path: Path) -> dict[str, Any]:
    """Write a file with metadata of every type and no tensors; returns what it holds."""
    writer = GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "uint8": 1,
        "int8": -1,
        "uint16": 2,
        "int16": -2,
        "uint32": 3,
        "int32": -3,
        "uint64": 2**63,
        "int64": -(2**63),
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("strings", ["é", ""])
    writer.add_array("ints", [1, -2])
    writer.add_array("floats", [0.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = {"f32": 0.5, "f64": 0.1, "bool": True, "strings": ["é", ""], "ints": [1, -2], "floats": [0.5]}
    return {"general.architecture": "llama", **values, **expected}


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    expected = write_metadata(tmp_path / "a.gguf")
    assert read_gguf(tmp_path / "a.gguf").metadata == expected


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_metadata(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="is not a complete GGUF file"):
            read_gguf(path)


@pytest.mark.parametrize(
    "pair",
    [
        struct.pack("<Q", 2**63),  # a key longer than the file
        struct.pack("<Q1sI", 1, b"k", 13),  # an unknown type
        struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**62),  # an array longer than the file
        struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**62),  # the same of strings
        struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1),  # an array of arrays
        struct.pack("<Q1sIQ", 1, b"k", 8, 2**64 - 1),  # a string longer than the file
        struct.pack("<Q1sIQ1s", 1, b"k", 8, 1, b"\xff"),  # no UTF-8
    ],
)
def test_sizes_in_a_file_are_not_trusted(tmp_path: Path, pair: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + pair)
    with pytest.raises(WeightsError, match="is not a complete GGUF file"):
        read_gguf(path)

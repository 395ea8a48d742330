"""Files in the user's cache folder: where they are, and that nothing wrong with them is more than a warning."""

from __future__ import annotations

import json
import logging
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from semipd.cache_file import cache_folder, read_json, replace_json


def leave_homeless(patch: pytest.MonkeyPatch) -> None:
    """As in a container whose user id has no entry."""

    def no_entry(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.delenv("HOME", raising=False)
    patch.setattr(pwd, "getpwuid", no_entry)


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "semipd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/semipd")


def test_a_user_without_a_home_has_none_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_homeless(monkeypatch)
    assert cache_folder() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "XDG_CACHE_HOME" in record.message
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "semipd"


def test_what_was_written_is_read_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    assert read_json(path, dict, what="things") is None
    for content in ({"a": [1, None]}, {}):
        replace_json(path, content, what="things")
        assert read_json(path, dict, what="things") == content
    assert list(path.parent.iterdir()) == [path] and not caplog.records


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b'{"b": 1}', b'{"a": "b"}'])
def test_what_is_not_as_expected_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert read_json(path, lambda read: int(read["a"]), what="things") is None
    (record,) = caplog.records
    assert record.message.startswith(f"stored things in {path} are ignored: ")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "folder" / "file.json"
    replace_json(path, {}, what="things")
    (record,) = caplog.records
    assert record.message.startswith(f"things cannot be stored in {path}: ")


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "file.json"
    replace_json(path, 1, what="things")
    monkeypatch.setattr(os, "replace", full)
    replace_json(path, 2, what="things")
    assert json.loads(path.read_text()) == 1 and list(tmp_path.iterdir()) == [path]
    assert "no space left" in caplog.text

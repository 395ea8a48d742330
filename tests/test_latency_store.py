"""What is kept of step times: the next engine finds it, and nothing that is wrong with it does any harm."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from semipd.latency_store import LatencyStore, cache_folder
from semipd.sched.latency import LatencyModel, StepWork

KEY = {"device": "a GPU", "num_sms": 132, "dtype": "torch.bfloat16"}
DECODE = StepWork(132, 0, 0, 0, 64, 64_000)


def learned() -> LatencyModel:
    model = LatencyModel(132)
    for _ in range(20):
        model.observe(DECODE, 0.02)
    return model


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    LatencyStore(KEY, tmp_path / "new" / "folder").save(learned().to_state())
    model = LatencyStore(KEY, tmp_path / "new" / "folder").load(132)
    assert model is not None
    assert model.predict(DECODE) == pytest.approx(learned().predict(DECODE))
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".json"]


def test_nothing_is_found_for_another_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LatencyStore(KEY, tmp_path).save(learned().to_state())
    for name, value in (("device", "another GPU"), ("num_sms", 114), ("dtype", "torch.float16"), ("more", 1)):
        assert LatencyStore({**KEY, name: value}, tmp_path).load(132) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {**content, "key": {"device": "x"}}, "another model or device"),
        (lambda content: [content], "another model or device"),
        (lambda content: {**content, "state": None}, "version"),
        (lambda content: {**content, "state": {**content["state"], "version": 0}}, "version of .* is 0; expected 1"),
        (lambda content: {**content, "state": {**content["state"], "num_sms": 60}}, "device of 60 SMs, not 132"),
        (lambda content: {**content, "state": {**content["state"], "measured": 3}}, "damaged"),
        (lambda content: {**content, "state": {"version": 1}}, "damaged: KeyError"),
    ],
)
def test_a_foreign_file_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, message: str
) -> None:
    store = LatencyStore(KEY, tmp_path)
    store.save(learned().to_state())
    store.path.write_text(json.dumps(change(json.loads(store.path.read_text()))))
    assert store.load(132) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(store.path) in record.message
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.message)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b'{"key": NaN}'])
def test_a_file_that_is_no_json_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    store = LatencyStore(KEY, tmp_path)
    store.path.write_bytes(content)
    assert store.load(132) is None
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    LatencyStore(KEY, tmp_path / "file" / "folder").save(learned().to_state())
    assert len(caplog.records) == 1
    assert "cannot be stored" in caplog.records[0].message


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "semipd" / "latency"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/semipd/latency")

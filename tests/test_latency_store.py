"""What is kept of step times: the next engine finds it, unless it is another's. Bad files: test_cache_file.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from semipd.latency_store import LatencyStore
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
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert store.load(132) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"stored step times in {path} are ignored" in record.message
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.message)


def test_without_a_folder_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    store = LatencyStore(KEY, None)
    store.save(learned().to_state())
    assert store.load(132) is None and not caplog.records

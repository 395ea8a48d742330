"""A table of what ran on the GPU, at the end; a real model only where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Step times that an engine learns here are not for the user's engines, nor theirs for these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2_path(request: pytest.FixtureRequest) -> Path:
    """The model of all tests, where its variable is set: a machine with a GPU may have no way to fetch it."""
    if not os.environ.get("SEMIPD_SMOLLM2"):
        pytest.skip("SEMIPD_SMOLLM2 is not set; expected the path of SmolLM2-135M-Instruct.Q4_1.gguf")
    path: Path = request.getfixturevalue("smollm2_path")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each test function: how many cases passed, the seconds they took, and what they measured."""
    rows: dict[str, list[float]] = {}
    measured: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name, _, case = report.nodeid.removeprefix("tests/gpu/").partition("[")
            passed, others, seconds = rows.setdefault(name, [0, 0, 0.0])
            is_passed = outcome == "passed"
            rows[name] = [passed + is_passed, others + (not is_passed), seconds + getattr(report, "duration", 0.0)]
            values = ", ".join(f"{key} {value}" for key, value in getattr(report, "user_properties", ()))
            if values:
                measured.setdefault(name, []).append(f"{case.rstrip(']')}: {values}".removeprefix(": "))
    if not rows:
        return
    width = max(map(len, rows))
    terminalreporter.write_line(f"\n{'test':{width}}  passed  other  seconds")
    for name, (passed, others, seconds) in rows.items():
        terminalreporter.write_line(f"{name:{width}}  {passed:6.0f}  {others:5.0f}  {seconds:7.1f}")
        for line in measured.get(name, ()):
            terminalreporter.write_line(f"    {line}")

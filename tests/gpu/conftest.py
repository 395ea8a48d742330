"""A table of what ran on the GPU, at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each test function: how many cases passed, and the seconds they took."""
    rows: dict[str, list[float]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.split("[")[0].removeprefix("tests/gpu/")
            passed, others, seconds = rows.setdefault(name, [0, 0, 0.0])
            is_passed = outcome == "passed"
            rows[name] = [passed + is_passed, others + (not is_passed), seconds + getattr(report, "duration", 0.0)]
    if not rows:
        return
    width = max(map(len, rows))
    terminalreporter.write_line(f"\n{'test':{width}}  passed  other  seconds")
    for name, (passed, others, seconds) in rows.items():
        terminalreporter.write_line(f"{name:{width}}  {passed:6.0f}  {others:5.0f}  {seconds:7.1f}")

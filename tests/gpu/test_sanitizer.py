"""compute-sanitizer finds nothing in any kernel, and finds what was planted. See `tests/gpu/sanitize.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from semipd.kernels.triton_util import is_hopper
from tests.gpu.kernel_cases import kernel_names
from tests.gpu.sanitize import SEEN, TOOLS, Outcome, find_sanitizer, run_tools, table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer in the path or in CUDA_HOME/bin")
    return run_tools(sanitizer)


def test_every_kernel_is_launched(outcomes: dict[str, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{table(outcomes)}\n")
    if not is_hopper():
        pytest.skip("some kernels are for Hopper alone")
    for tool, outcome in outcomes.items():
        assert outcome.launches.keys() >= set(kernel_names()), f"under {tool}"


@pytest.mark.parametrize("tool", TOOLS)
def test_kernels_are_clean(
    outcomes: dict[str, Outcome], tool: str, record_property: Callable[[str, object], None]
) -> None:
    outcome = outcomes[tool]
    record_property("launches", sum(outcome.launches.values()))
    record_property("reports", sum(outcome.errors.values()))
    record_property("planted", outcome.planted)
    record_property("seconds", round(outcome.seconds))
    assert outcome.is_clean, outcome.log
    assert outcome.planted or tool not in SEEN, f"the planted faults were not noticed:\n{outcome.log}"

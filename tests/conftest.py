"""What every test shares: a clean environment, one torch thread, hypothesis profiles, a real model, no lost threads."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton reads this when a kernel is decorated, so it stands before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

THREAD_GRACE = 1.0  # seconds in which an engine that was closed may still be ending its threads

# `ci` draws the same examples on every run and keeps no database, so a red run is red for everyone. Neither profile
# judges time: a busy machine is not a bug.
_UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("ci", _UNTIMED, max_examples=50, derandomize=True, database=None)
hypothesis.settings.register_profile("deep", _UNTIMED, max_examples=5000, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Take the user's Hugging Face and semipd settings and cache away for the run, and keep libraries off the network.

    Here and not in a fixture: huggingface_hub reads these variables once, when a test module first imports it.
    """
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE_", "SEMIPD_", "TRANSFORMERS_")) and name != "SEMIPD_SMOLLM2":
            patch.delenv(name)
    home = tempfile.TemporaryDirectory()
    config.add_cleanup(home.cleanup)
    patch.setenv("HF_HOME", home.name)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which `scripts/test` fetches once."""
    value = os.environ.get("SEMIPD_SMOLLM2")
    if not value or not Path(value).is_file():
        pytest.fail(
            f"SEMIPD_SMOLLM2 is {value!r}; expected the path of SmolLM2-135M-Instruct.Q4_1.gguf. "
            "Run scripts/test, or set it to what scripts/fetch-model prints.",
            pytrace=False,
        )
    return Path(value)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Run torch's operators on the thread that calls them, when torch is loaded at all.

    By default each calling thread has one OpenMP thread per core; with two lanes and a reference model on two cores the
    barriers between them then cost a hundred times the work. A lane that owns several cores says so itself.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail a test that leaves threads of an engine running; engines of module or session fixtures may live on."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + THREAD_GRACE
    leaked = [t for t in threading.enumerate() if t.name.startswith("semipd-") and t not in before]
    for thread in leaked:
        thread.join(max(0.0, deadline - time.monotonic()))
    names = sorted(thread.name for thread in leaked if thread.is_alive())
    if names:
        pytest.fail(f"threads still run after the test: {', '.join(names)}; close the engine or lane", pytrace=False)

"""How kernels are launched and compiled."""

from __future__ import annotations

import math
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.runtime
from triton.runtime import _async_compile

from semipd.kernels import triton_util
from semipd.kernels.rms_norm import rms_norm
from semipd.kernels.triton_util import compiling_in_parallel, is_compiling_only, is_interpreted, starting_compiler


def test_tests_without_a_gpu_interpret_kernels() -> None:
    assert is_interpreted() != torch.cuda.is_available()


def test_launches_inside_compiling_in_parallel_do_not_run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    out = torch.full_like(x, math.nan)
    with compiling_in_parallel():
        rms_norm(x, weight, 1e-5, out)
    assert out.isnan().all()
    rms_norm(x, weight, 1e-5, out)
    assert not out.isnan().any()


def test_the_compiler_starts_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    is_loaded, calls = threading.Event(), list[str]()

    def call(name: str) -> None:
        assert is_loaded.wait(10)
        calls.append(name)

    class Active:
        @property
        def utils(self) -> None:
            call("utils")

    monkeypatch.setattr(triton_util, "triton_key", partial(call, "key"))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Active()))
    with starting_compiler():
        is_loaded.set()
    assert sorted(calls) == ["key", "utils"]


def test_compiling_builds_what_kernels_are_launched_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would build it at the first launch, one kernel after another."""
    built: list[tuple[str, str]] = []
    finished: list[Any] = []
    active = SimpleNamespace(launcher_cls=lambda src, metadata: built.append((src, metadata)))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    with compiling_in_parallel():
        mode = _async_compile.active_mode.get()
        assert mode is not None
        for name in ("a", "b", "a"):
            mode.submit(name, partial(SimpleNamespace, src=name, metadata=f"of {name}"), finished.append)
    assert sorted(built) == [("a", "of a"), ("b", "of b")]
    assert sorted(kernel.src for kernel in finished) == ["a", "b"]


def test_a_kernel_that_does_not_compile_is_an_error() -> None:
    def compile_kernel() -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"), compiling_in_parallel():
        mode = _async_compile.active_mode.get()
        assert mode is not None
        mode.submit("a", compile_kernel, lambda _: None)
    assert not is_compiling_only(), "later launches run"

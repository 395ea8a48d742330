"""The signalling GEMM: the portable kernel in the interpreter, Hopper's with its warps as threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from semipd.kernels import gemm_signal_hopper as hopper
from semipd.kernels import gemm_signal_raster as raster
from semipd.kernels.gemm_signal import (
    MAX_GROUPS,
    SIGNALS_PER_TILE,
    GemmSignalConfig,
    config_for,
    gemm_signal,
    gemm_signal_reference,
    signal_targets,
)
from semipd.kernels.triton_util import is_interpreted
from tests.kernels import warpgroups
from tests.kernels.gemm_warpgroups import Tma, launch_gemm

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
PORTABLE = GemmSignalConfig(block_m=16, block_n=32, block_k=16, band=2, uses_hopper=False)
# 64 rows of a half are a tensor core instruction's; its outputs may be few.
HOPPER = GemmSignalConfig(block_k=64, block_n=64, num_parts=2, out_stages=1, band=2)

on_cpu = pytest.mark.skipif(not is_interpreted(), reason="threads want tensors of the CPU")


class Case:
    """Random operands; the output is a part of a matrix of NaN, and its residual too if that is apart."""

    def __init__(self, num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.generator = torch.Generator().manual_seed(num_rows)
        self.dtype = dtype
        self.x = self.random(num_rows, num_inputs)
        self.weight = self.random(num_outputs, num_inputs, scale=num_inputs**-0.5)
        self.bias = self.random(num_outputs)
        self.residual = self.random(num_rows, num_outputs)
        self.frame = torch.full((num_rows + 2, num_outputs + 16), math.nan, dtype=dtype)
        self.out = self.frame[1:-1, 8:-8]
        self.counters = torch.full((MAX_GROUPS,), 100, dtype=torch.int32)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def check(
        self,
        config: GemmSignalConfig,
        group_ends: Sequence[int],
        *,
        num_sms: int = 3,
        num_reserved: int = 0,
        residual: str | None = None,
        has_bias: bool = False,
    ) -> Tensor:
        """Runs it and compares; `residual` is None, "apart" or "in place". Returns the output."""
        bias = self.bias if has_bias else None
        wide = Case(len(self.x), len(self.weight), self.x.shape[1], torch.float32)
        wide.counters.copy_(self.counters)
        gemm_signal_reference(
            self.x.float(),
            self.weight.float(),
            wide.out,
            wide.counters,
            group_ends=group_ends,
            config=config,
            residual_TO=None if residual is None else self.residual.float(),
            bias_O=None if bias is None else bias.float(),
        )
        if residual == "in place":
            self.out.copy_(self.residual)
        gemm_signal(
            self.x,
            self.weight,
            self.out,
            self.counters,
            group_ends=group_ends,
            num_sms=num_sms,
            num_reserved=num_reserved,
            config=config,
            residual_TO={None: None, "apart": self.residual, "in place": self.out}[residual],
            bias_O=bias,
        )
        error = (self.out.float() - wide.out).norm() / wide.out.norm()
        assert error < TOLERANCE[self.dtype]
        assert int((~self.frame.isnan()).sum()) == self.out.numel(), "neighbours were written, or NaN"
        assert self.counters.tolist() == wide.counters.tolist()
        return self.out.clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("residual", "has_bias"), [(None, False), ("apart", True), ("in place", False)])
@pytest.mark.parametrize(("shape", "group_ends"), [((37, 71, 45), (16, 37)), ((64, 64, 32), (64,)), ((1, 8, 8), (1,))])
def test_values_and_counters(
    shape: tuple[int, int, int], group_ends: Sequence[int], residual: str | None, has_bias: bool, dtype: torch.dtype
) -> None:
    Case(*shape, dtype).check(PORTABLE, group_ends, residual=residual, has_bias=has_bias)


@pytest.mark.parametrize("group_ends", [(16,), (16, 32, 48, 64, 73), (32, 73), (48, 64, 73)])
def test_neither_groups_nor_programs_change_a_bit(group_ends: Sequence[int]) -> None:
    num_rows = group_ends[-1]
    whole = Case(num_rows, 40, 24).check(PORTABLE, (num_rows,), num_sms=1)
    for num_sms in (2, 100):
        assert torch.equal(Case(num_rows, 40, 24).check(PORTABLE, group_ends, num_sms=num_sms), whole)


@pytest.mark.parametrize(("num_sms", "num_reserved"), [(2, 1), (7, 3), (5, 4), (9, 1), (40, 16)])
@pytest.mark.parametrize("group_ends", [(73,), (16, 73), (48, 64, 73)])
def test_programs_that_leave_after_the_first_group(group_ends: Sequence[int], num_sms: int, num_reserved: int) -> None:
    whole = Case(73, 40, 24).check(PORTABLE, (73,), num_sms=1)
    out = Case(73, 40, 24).check(PORTABLE, group_ends, num_sms=num_sms, num_reserved=num_reserved)
    assert torch.equal(out, whole)


def test_counters_go_on_from_what_they_are() -> None:
    case = Case(40, 40, 16)
    case.check(PORTABLE, (16, 40))
    case.frame.fill_(math.nan)
    case.check(PORTABLE, (16, 40))
    assert case.counters.tolist() == [100 + 2 * target for target in signal_targets((16, 40), 40, PORTABLE)] + [100] * 3


def test_targets_count_the_halves_of_tiles() -> None:
    config = GemmSignalConfig(block_m=128, block_n=256)
    assert signal_targets((256, 384, 1000), 4096, config) == (2 * 32, 32, 5 * 32)
    assert sum(signal_targets((1000,), 300, config)) == 8 * 2 * SIGNALS_PER_TILE


@pytest.mark.parametrize("group_ends", [(), (16,), (8, 40), (32, 16, 40), (16, 16, 40), (16, 20, 24, 28, 32, 40)])
def test_groups_that_cannot_be(group_ends: Sequence[int]) -> None:
    with pytest.raises(AssertionError):
        Case(40, 16, 16).check(PORTABLE, group_ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gpu_the_portable_kernel_is_taken(dtype: torch.dtype) -> None:
    case = Case(130, 24, 8, dtype)
    config = config_for(case.x, case.weight, case.out)
    if is_interpreted():
        assert not config.uses_hopper
        case.check(config, (128, 130), num_sms=1)


def test_hoppers_kernel_is_taken_for_aligned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semipd.kernels.gemm_signal.is_hopper", lambda device: True)
    x, weight, out = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((130, 16), (24, 16), (130, 24)))
    assert config_for(x, weight, out).uses_hopper
    assert not config_for(x[:, :12], weight[:, 1:13], out).uses_hopper
    assert not config_for(x.float(), weight.float(), out.float()).uses_hopper


# ---- Hopper's kernel, with warps as threads


@pytest.fixture
def as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Hopper's kernel run in Python, a program after another, a thread for each of its kinds of warps."""
    tma = Tma()

    def signal(counter: warpgroups.Pointer) -> None:
        tma.store_wait()
        counter.memory[counter.offset] += 1

    monkeypatch.setattr(hopper, "launch", launch_gemm(hopper, tma, raster, replaced={"_signal": signal}))


@on_cpu
@pytest.mark.usefixtures("as_threads")
@pytest.mark.parametrize(("residual", "has_bias"), [(None, True), ("apart", False), ("in place", False)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_stages": 3, "num_parts": 1},
        {"num_parts": 4, "out_stages": 2},
        {"block_m": 256, "num_stages": 2, "out_stages": 2, "band": 1},
    ],
)
def test_hopper(options: dict[str, int], residual: str | None, has_bias: bool) -> None:
    values = {name: getattr(HOPPER, name) for name in HOPPER.__slots__}
    config = GemmSignalConfig(**{**values, **options})
    case = Case(600, 104, 200)
    out = case.check(config, (256, 512, 600), num_sms=4, num_reserved=1, residual=residual, has_bias=has_bias)
    assert torch.equal(Case(600, 104, 200).check(config, (600,), num_sms=5, residual=residual, has_bias=has_bias), out)


@on_cpu
@pytest.mark.usefixtures("as_threads")
def test_hopper_with_one_step() -> None:
    Case(3, 8, 8).check(HOPPER, (3,))

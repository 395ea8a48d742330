"""The stream-K GEMM: how units are cut, where it is chosen, and Hopper's kernel with its warps as threads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from semipd.kernels import stream_k_gemm_hopper as hopper
from semipd.kernels import triton_ops
from semipd.kernels.ops import StepContext
from semipd.kernels.stream_k_gemm import (
    StreamKConfig,
    StreamKScratch,
    can_stream_k,
    is_stream_k_ahead,
    num_cut_units,
    stream_k_gemm,
)
from semipd.kernels.triton_util import is_interpreted
from tests.kernels import warpgroups
from tests.kernels.gemm_warpgroups import Tma, launch_gemm

if TYPE_CHECKING:
    from torch import Tensor

SMALL = StreamKConfig(block_n=64, num_parts=2, out_stages=1, band=2)  # a half's 64 rows are an instruction's
BF16 = torch.bfloat16

on_cpu = pytest.mark.skipif(not is_interpreted(), reason="threads want tensors of the CPU")


class Case:
    """Random operands; the output is a part of a matrix of NaN, and so is the scratch."""

    def __init__(self, num_rows: int, num_outputs: int, num_inputs: int) -> None:
        generator = torch.Generator().manual_seed(num_rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = random(num_rows, num_inputs).to(BF16)
        self.weight = (random(num_outputs, num_inputs) * num_inputs**-0.5).to(BF16)
        self.before = random(num_rows, num_outputs).to(BF16)
        self.frame = torch.full((num_rows + 2, num_outputs + 16), math.nan, dtype=BF16)
        self.out = self.frame[1:-1, 8:-8]

    def check(self, num_sms: int, config: StreamKConfig = SMALL, *, adds: bool = False) -> Tensor:
        """Runs it and compares. Returns the output."""
        num_partials, num_flags = config.scratch_size(num_sms)
        scratch = StreamKScratch(torch.full((num_partials,), math.nan), torch.zeros(num_flags, dtype=torch.int32))
        expected = self.x.float() @ self.weight.float().T
        if adds:
            self.out.copy_(self.before)
            expected += self.before.float()
        stream_k_gemm(self.x, self.weight, self.out, scratch, num_sms=num_sms, adds=adds, config=config)
        assert (self.out.float() - expected).norm() / expected.norm() < 4e-3
        assert int((~self.frame.isnan()).sum()) == self.out.numel(), "neighbours were written, or NaN"
        assert not scratch.flags.any()
        return self.out.clone()


@pytest.fixture
def hand_overs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the kernel run in Python, a program after another, a thread for each of its kinds of warps; slots read."""
    tma, slots = Tma(), []

    def memory(pointer: warpgroups.Pointer, slot: int, size: int) -> Tensor:
        return pointer.memory[int(slot) * size : (int(slot) + 1) * size]

    def store_partial(sums: Tensor, pointer: warpgroups.Pointer, slot: int) -> None:
        memory(pointer, slot, sums.numel()).copy_(sums.flatten())

    def load_partial(pointer: warpgroups.Pointer, slot: int, is_there: bool, m: int, n: int) -> Tensor:
        if not is_there:
            return torch.zeros(m, n)
        slots.append(int(slot))
        return memory(pointer, slot, m * n).view(m, n).clone()

    def await_(flag: warpgroups.Pointer) -> None:
        assert flag.memory[flag.offset] == 1, "a program waits for one behind it"

    replaced = {
        "_store_partial": store_partial,
        "_load_partial": load_partial,
        "_await": await_,
        "_await_stores": tma.store_wait,
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
        "_thread_barrier": lambda: None,
    }
    monkeypatch.setattr(hopper, "launch", launch_gemm(hopper, tma, replaced=replaced))
    return slots


@on_cpu
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_sms", "has_cuts"),
    [
        ((130, 200, 704), 7, True),  # 8 units of 11 steps on 7 programs
        ((130, 200, 704), 6, True),
        ((130, 200, 704), 4, False),  # in two turns
        ((600, 104, 200), 3, True),  # 10 units of 4 steps: cuts are at most moved by a unit's steps
        ((600, 104, 600), 8, True),
        ((600, 104, 136), 8, True),  # so few steps that all cuts are moved to borders
        ((600, 104, 64), 8, True),
        ((600, 104, 704), 3, True),  # units are dealt to programs before those that they share
        ((3, 8, 8), 1, False),
        ((300, 136, 1280), 132, False),  # more SMs than units
    ],
)
def test_values(shape: tuple[int, int, int], num_sms: int, has_cuts: bool, adds: bool, hand_overs: list[int]) -> None:
    out = Case(*shape).check(num_sms, adds=adds)
    num_units = math.ceil(shape[0] / 128) * math.ceil(shape[1] / 64)
    assert (num_cut_units(num_units, min(num_sms, num_units)) > 0) == has_cuts
    assert len(hand_overs) == len(set(hand_overs)) and bool(hand_overs) == (has_cuts and shape[2] >= 300)
    hand_overs.clear()
    assert torch.equal(Case(*shape).check(1, adds=adds), out), "bits depend on the cuts"
    assert not hand_overs


@on_cpu
@pytest.mark.usefixtures("hand_overs")
@pytest.mark.parametrize("config", [StreamKConfig(), StreamKConfig(num_stages=2, num_parts=1, out_stages=3)])
def test_configurations(config: StreamKConfig) -> None:
    case = Case(200, 696, 320)  # 6 units on 5 programs
    assert torch.equal(case.check(5, config, adds=True), Case(200, 696, 320).check(2, config, adds=True))


def test_partial_sums_have_a_place_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        warpgroups.replace_names(hopper, patch)
        patch.setattr(hopper, "gl", SimpleNamespace(**vars(warpgroups.language(0, 1))))
        pointer = hopper._partial_ptrs(warpgroups.Pointer(torch.empty(0)), torch.tensor(2), 64, 256)
    assert torch.equal(pointer.offset.flatten().sort().values, 2 * 64 * 256 + torch.arange(64 * 256))


def test_units_are_cut_where_the_last_turn_is_for_few() -> None:
    assert num_cut_units(672, 132) == 132 + 12  # 5.09 turns: 768 rows, 28,672 outputs
    assert num_cut_units(784, 132) == 0  # 5.94
    assert num_cut_units(256, 116) == 116 + 24
    assert num_cut_units(256, 100) == 0  # 2.56
    assert num_cut_units(264, 132) == 0
    for num_programs in range(1, 133):
        for num_units in range(num_programs, 5 * num_programs):
            num_cut = num_cut_units(num_units, num_programs)
            assert num_cut == 0 or num_programs < num_cut < 2 * num_programs
            assert (num_units - num_cut) % num_programs == 0 or num_cut == 0


def test_where_it_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semipd.kernels.stream_k_gemm.num_device_sms", lambda device: 132)

    def is_ahead(num_rows: int, shape: tuple[int, int], num_sms: int) -> bool:
        return is_stream_k_ahead(
            torch.empty(num_rows, shape[1], device="meta"), torch.empty(shape, device="meta"), num_sms
        )

    assert is_ahead(2048, (4096, 4096), 100) and is_ahead(512, (4096, 4096), 100) and is_ahead(256, (28672, 4096), 84)
    assert not is_ahead(384, (4096, 4096), 100) and not is_ahead(256, (6144, 4096), 100)
    assert (
        is_ahead(768, (28672, 4096), 132) and is_ahead(641, (28672, 4096), 132) and is_ahead(1536, (28672, 4096), 132)
    )
    assert not is_ahead(640, (28672, 4096), 132) and not is_ahead(1024, (28672, 4096), 132)
    assert not is_ahead(768, (4096, 14336), 132)
    monkeypatch.setattr("semipd.kernels.stream_k_gemm.num_device_sms", lambda device: 114)
    assert not is_ahead(768, (28672, 4096), 114), "measured on 132 SMs"


@on_cpu
def test_only_on_hopper() -> None:
    case = Case(130, 24, 8)
    assert not can_stream_k(case.x, case.weight, case.out)


def test_of_16_bits_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semipd.kernels.stream_k_gemm.is_hopper", lambda device: True)
    x, weight, out = torch.empty(130, 16, dtype=BF16), torch.empty(24, 16, dtype=BF16), torch.empty(130, 24, dtype=BF16)
    assert can_stream_k(x, weight, out)
    assert not can_stream_k(x, weight, out.float()), "logits are float32"
    assert not can_stream_k(x.float(), weight.float(), out.float())
    assert not can_stream_k(x, weight.half(), out)
    assert not can_stream_k(x[:, :12], weight[:, 1:13], out), "not at 16 bytes"
    assert not can_stream_k(x, weight, torch.empty(130, 25, dtype=BF16)[:, :24]), "rows not at 16 bytes"


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("is_warm_up", [False, True])
def test_products_choose_it(is_ahead: bool, is_warm_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool, int]] = []

    def multiply(x: Tensor, weight: Tensor, out: Tensor, scratch: StreamKScratch, *, num_sms: int, adds: bool) -> None:
        calls.append((num_sms, adds, len(scratch.flags)))
        out.copy_((out if adds else 0) + x @ weight.T)

    monkeypatch.setattr(triton_ops, "can_stream_k", lambda *_: True)
    monkeypatch.setattr(triton_ops, "is_stream_k_ahead", lambda *_: is_ahead)
    monkeypatch.setattr(triton_ops, "num_device_sms", lambda _: 10)
    monkeypatch.setattr(triton_ops, "stream_k_gemm", multiply)
    case = Case(100, 24, 16)
    linear = triton_ops.TritonOps().pack_linear(case.weight, None)
    context = StepContext(8, is_warm_up=is_warm_up)
    out, residual = linear(case.x, context), case.before.clone()
    linear.add_(residual, case.x, context)
    assert calls == [(8, False, 20), (8, True, 20)] * (is_ahead or is_warm_up)
    torch.testing.assert_close(out, case.x @ case.weight.T, atol=0.02, rtol=0.02)
    if not is_warm_up:
        torch.testing.assert_close(residual, case.before + case.x @ case.weight.T, atol=0.04, rtol=0.02)
    with_bias = triton_ops.TritonOps().pack_linear(case.weight, case.before[0].clone())
    calls.clear()
    with_bias(case.x, context)
    assert not calls, "a bias is cuBLAS's"

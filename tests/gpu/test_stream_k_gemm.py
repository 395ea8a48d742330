"""The stream-K GEMM on partitions: values, bits that do not depend on how it is cut, and programs that wait."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest
import torch

from semipd.config import Phase
from semipd.device.green_context import GreenContextBackend
from semipd.kernels.stream_k_gemm import StreamKConfig, StreamKScratch, can_stream_k, num_cut_units, stream_k_gemm
from semipd.kernels.triton_util import is_hopper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs a GPU of the Hopper generation")]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of |out - expected| / |expected|


@pytest.fixture(scope="module")
def backend() -> Iterator[GreenContextBackend]:
    backend = GreenContextBackend()
    yield backend
    backend.close()


class Case:
    """Random operands in matrices of NaN."""

    def __init__(self, num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.x = self._framed(torch.randn(num_rows, num_inputs, device="cuda").to(dtype))
        self.weight = self._framed((torch.randn(num_outputs, num_inputs, device="cuda") * num_inputs**-0.5).to(dtype))
        self.before = torch.randn(num_rows, num_outputs, device="cuda").to(dtype)
        self.out = self._framed(torch.full_like(self.before, math.nan))
        self.scratch = scratch()

    @staticmethod
    def _framed(values: Tensor) -> Tensor:
        frame = values.new_full((len(values) + 2, values.shape[1] + 16), math.nan)
        return frame[1:-1, 8:-8].copy_(values)

    def run(self, num_sms: int, *, adds: bool) -> Tensor:
        """Runs it, checks it, and returns the output."""
        assert can_stream_k(self.x, self.weight, self.out)
        self.out.copy_(self.before if adds else torch.full_like(self.before, math.nan))
        stream_k_gemm(self.x, self.weight, self.out, self.scratch, num_sms=num_sms, adds=adds)
        expected = self.x.double() @ self.weight.double().T + (self.before.double() if adds else 0)
        error = (self.out.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[self.out.dtype], f"{num_sms} SMs: {float(error)}"
        assert int((~self.out._base.isnan()).sum()) == self.out.numel(), "neighbours were written, or NaN"  # type: ignore[union-attr]
        assert not self.scratch.flags.any()
        return self.out.clone()


def scratch() -> StreamKScratch:
    num_partials, num_flags = StreamKConfig().scratch_size(132)
    partials = torch.full((num_partials,), math.nan, device="cuda")
    return StreamKScratch(partials, torch.zeros(num_flags, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2048, 4096, 4096), (768, 28672, 4096), (1500, 2304, 520), (65, 520, 72), (1, 8, 8), (4500, 640, 1032)],
)
def test_values_and_bits(shape: tuple[int, int, int], adds: bool, dtype: torch.dtype) -> None:
    case = Case(*shape, dtype)
    first = case.run(132, adds=adds)
    for num_sms in (116, 100, 84, 17, 1):
        assert torch.equal(case.run(num_sms, adds=adds), first), f"{num_sms} SMs give other bits"


def test_random_shapes() -> None:
    rng = random.Random(0)
    num_cut = 0
    for _ in range(60):
        shape = rng.randint(1, 2500), 8 * rng.randint(1, 700), 8 * rng.randint(1, 300)
        num_units = -(-shape[0] // 128) * -(-shape[1] // 256)
        num_sms = rng.choice([rng.randint(1, 132), max(1, min(132, num_units * 6 // 7))])
        num_cut += num_cut_units(num_units, min(num_sms, num_units)) > 0
        Case(*shape).run(num_sms, adds=rng.random() < 0.5)
    assert num_cut > 15


def test_on_partitions_beside_other_work(backend: GreenContextBackend) -> None:
    """More programs wait for others than ever run at once: no launch hangs, and no bit differs."""
    case = Case(1152, 4096, 4096)  # 144 units
    assert num_cut_units(144, 132) and num_cut_units(144, 116)
    expected = case.run(132, adds=True)
    streams = {
        num_sms: backend.stream(Phase.PREFILL, num_sms).torch_stream
        for num_sms in backend.shares(Phase.PREFILL)
        if num_sms in (116, 100, 84, 36)
    }
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    outs: dict[tuple[int, int], Tensor] = {}
    scratches = {num_sms: scratch() for num_sms in streams}
    torch.cuda.synchronize()
    for _ in range(10):
        torch.mm(a, b)  # on all SMs
        for num_sms, stream in streams.items():
            with torch.cuda.stream(stream):
                for num_programs in (132, num_sms):  # as many as the device has SMs: some start when others have ended
                    out = outs.setdefault((num_sms, num_programs), case.before.clone())
                    out.copy_(case.before)
                    stream_k_gemm(case.x, case.weight, out, scratches[num_sms], num_sms=num_programs, adds=True)
    torch.cuda.synchronize()
    for (num_sms, num_programs), out in outs.items():
        assert torch.equal(out, expected), f"{num_programs} programs on {num_sms} SMs"
        assert not scratches[num_sms].flags.any()

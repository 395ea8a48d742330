"""The decode GEMM, kernel and reference, against matmuls in float64.

Random data, strided rows between NaN, scratch that is NaN at first. The interpreter runs one CTA after another, so it
says nothing about what they hand to each other at the same time: `benchmarks/decode_gemm.py` does, on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels.decode_gemm import (
    DecodeGemmConfig,
    DecodeGemmScratch,
    DecodeLinear,
    config_for,
    decode_gemm_reference,
)
from semipd.kernels.triton_util import has_tma, is_interpreted

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
# One rounding of the dtype, to the other side: the interpreter truncates.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NAN_COLUMNS = 8

TMA = DecodeGemmConfig(block_m=16, block_n=64, block_k=32, num_stages=2)
POINTERS = replace(TMA, uses_tma=False)
CONFIGS = {
    "pointers": POINTERS,
    "tma": TMA,
    "swapped": replace(TMA, is_swapped=True),
    "two slices": replace(TMA, block_k=64, split_k=2),
    "two slices, swapped": replace(TMA, block_k=64, split_k=2, is_swapped=True),
    "three slices, two CTAs an SM": replace(POINTERS, block_k=128, split_k=3, ctas_per_sm=2),
    "two columns of warps": replace(TMA, block_m=64, num_warps=8),
}

if not is_interpreted() and not has_tma():
    CONFIGS = {name: config for name, config in CONFIGS.items() if not config.uses_tma}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


@dataclass
class Problem:
    """A call of the kernel: its tensors, and what surrounds them."""

    linear: DecodeLinear
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    out_buffer: Tensor
    before: Tensor
    is_gated: bool

    def run(self, num_sms: int, config: DecodeGemmConfig | None = None, *, adds: bool = False) -> Tensor:
        """The result of one call, with what the call promises about its surroundings checked."""
        is_aligned = self.x.stride(0) % 8 == 0
        if config is None:
            config = self.linear.config(len(self.x), num_sms, is_aligned=is_aligned)
        num_partials, num_counters = config.scratch_size(len(self.weight), num_sms)
        scratch = DecodeGemmScratch.allocate(num_partials + 1, num_counters + 1, DEVICE)
        scratch.partials.fill_(math.nan)
        scratch.counters[-1] = -1
        self.out.copy_(self.before)
        inputs = [self.x.clone(), self.weight.clone()]
        self.linear(self.x, self.out, scratch, num_sms=num_sms, adds=adds, config=config)
        assert scratch.partials[-1].isnan() and scratch.counters[-1] == -1, "wrote past its scratch"
        assert not scratch.counters[:-1].any(), "the next launch needs zeros"
        assert torch.equal(inputs[0].nan_to_num(), self.x.nan_to_num()) and torch.equal(inputs[1], self.weight)
        assert self.out_buffer[-1].isnan().all() and self.out_buffer[:, self.out.shape[1] :].isnan().all()
        return self.out.clone()

    def expected(self, *, adds: bool = False) -> Tensor:
        y = F.linear(self.x.double(), self.weight.double(), None if self.bias is None else self.bias.double())
        if self.is_gated:
            gate, up = y.chunk(2, -1)
            y = gate / (1 + (-gate).exp()) * up
        return self.before.double() + y if adds else y


def make(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    is_gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Problem:
    """A problem of `shape` = (rows, outputs, inputs); rows of x and out are strided, with NaN between them."""
    num_rows, num_outputs, num_inputs = shape

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, device=DEVICE, generator=generator)

    x_buffer = torch.full((num_rows, num_inputs + NAN_COLUMNS), math.nan, dtype=dtype, device=DEVICE)
    x = x_buffer[:, :num_inputs]
    x.copy_(randn(num_rows, num_inputs))
    weight = (randn(num_outputs, num_inputs) / math.sqrt(num_inputs)).to(dtype)
    bias = randn(num_outputs).to(dtype) if has_bias else None
    num_columns = num_outputs // 2 if is_gated else num_outputs
    sizes = (num_rows + 1, num_columns + NAN_COLUMNS)
    out_buffer = torch.full(sizes, math.nan, dtype=out_dtype or dtype, device=DEVICE)
    out = out_buffer[:-1, :num_columns]
    before = randn(num_rows, num_columns).to(out.dtype)
    return Problem(DecodeLinear(weight, bias, is_gated=is_gated), x, weight, bias, out, out_buffer, before, is_gated)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("adds", "has_bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1, 66, 40), (5, 200, 37)])
def test_the_default_configuration(
    generator: torch.Generator,
    dtype: torch.dtype,
    is_gated: bool,
    adds: bool,
    has_bias: bool,
    shape: tuple[int, int, int],
) -> None:
    problem = make(generator, shape, dtype, has_bias=has_bias, is_gated=is_gated)
    assert_near(problem.run(3, adds=adds), problem.expected(adds=adds))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("num_rows", [3, 20])  # one launch, and two
def test_every_variant(generator: torch.Generator, name: str, is_gated: bool, num_rows: int) -> None:
    config = CONFIGS[name]
    num_inputs = 72 if config.split_k == 1 else 264
    problem = make(generator, (num_rows, 224, num_inputs), torch.float16, has_bias=True, is_gated=is_gated)
    assert_near(problem.run(3, config, adds=True), problem.expected(adds=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's numpy
@pytest.mark.parametrize("name", CONFIGS)
def test_results_depend_neither_on_the_number_of_sms_nor_on_the_batch(generator: torch.Generator, name: str) -> None:
    config = CONFIGS[name]
    problem = make(generator, (7, 328 if config.split_k == 1 else 192, 136), torch.bfloat16)
    whole = problem.run(1, config)
    for num_sms in (2, 4, 5, 50):
        assert torch.equal(problem.run(num_sms, config), whole)
    problem.x[:2] = math.nan
    problem.x[3:] = math.inf
    assert torch.equal(problem.run(3, config)[2], whole[2])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_outputs_may_have_another_dtype(generator: torch.Generator, out_dtype: torch.dtype) -> None:
    problem = make(generator, (4, 100, 64), torch.bfloat16, out_dtype=out_dtype)
    assert_near(problem.run(2), problem.expected())


def test_the_scratch_of_a_linear_is_enough_for_all_its_batches(generator: torch.Generator) -> None:
    problem = make(generator, (70, 200, 40), torch.float32)
    sizes = problem.linear.scratch_size(70, 3)
    scratch = DecodeGemmScratch.allocate(*sizes, DEVICE)
    for num_rows in (1, 2, 31, 32, 33, 70):
        needed = problem.linear.config(num_rows, 3).scratch_size(200, 3)
        assert needed[0] <= sizes[0] and needed[1] <= sizes[1]
        problem.linear(problem.x[:num_rows], problem.out[:num_rows], scratch, num_sms=3)
        assert_near(problem.out[:num_rows], problem.expected()[:num_rows])


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_reference(generator: torch.Generator, is_gated: bool, adds: bool) -> None:
    problem = make(generator, (4, 60, 33), torch.bfloat16, has_bias=True, is_gated=is_gated)
    out = problem.before.clone()
    decode_gemm_reference(problem.x, problem.weight, out, problem.bias, is_gated=is_gated, adds=adds)
    assert_near(out, problem.expected(adds=adds))


LLAMA_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
OTHER_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (7, 8))
NUM_ROWS = (1, 2, 8, 16, 17, 32, 64, 96, 128, 192, 256, 300)
NUM_SMS = (8, 16, 32, 48, 64, 132)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), LLAMA_SHAPES + OTHER_SHAPES)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("can_use_tma", [False, True])
def test_default_configurations_fit_and_share_the_order_of_additions(
    num_outputs: int, num_inputs: int, is_gated: bool, can_use_tma: bool
) -> None:
    for num_rows in NUM_ROWS:
        for num_sms in NUM_SMS:
            config = config_for(
                num_rows, num_outputs, num_sms, dtype=torch.bfloat16, is_gated=is_gated, can_use_tma=can_use_tma
            )
            assert config.uses_tma == can_use_tma
            assert config.split_k == 1
            assert config.steps_per_unit(num_inputs) * config.block_k >= num_inputs
            stage_bytes = 2 * config.block_k * (config.block_m + config.block_n)
            assert config.num_stages * stage_bytes * config.ctas_per_sm <= (227 if can_use_tma else 100) * 1024
            assert config.block_m >= min(num_rows, 64)
            # Accumulators: at most 128 registers of each thread.
            assert config.block_m * config.block_n <= config.num_warps * 32 * 128
            num_ctas = config.num_ctas(num_outputs, num_sms)
            assert num_ctas <= min(config.num_units(num_outputs), config.ctas_per_sm * num_sms)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), LLAMA_SHAPES)
def test_large_matrices_give_every_sm_its_share(num_outputs: int, num_inputs: int) -> None:
    for num_rows in (1, 64):
        for num_sms in NUM_SMS:
            config = config_for(num_rows, num_outputs, num_sms, dtype=torch.bfloat16)
            assert config.num_ctas(num_outputs, num_sms) >= min(num_sms, 32 if num_sms < 64 else 64)

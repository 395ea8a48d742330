"""Is the decode GEMM right on a GPU? What the interpreter cannot tell; `benchmarks/decode_gemm.py` runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.partition import Partition
from semipd.kernels.decode_gemm import DecodeGemmScratch, DecodeLinear, decode_gemm_reference
from semipd.kernels.rms_norm import rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MAX_ERRORS = {BF16: 4e-3, FP16: 1e-3, FP32: 1e-5}
NUM_LAUNCHES = 200


@dataclass(frozen=True)
class Case:
    """One check of values."""

    num_rows: int
    num_outputs: int
    num_inputs: int
    dtype: torch.dtype = BF16
    is_gated: bool = False
    adds: bool = False
    has_bias: bool = False
    out_dtype: torch.dtype | None = None


CASES = [
    Case(1, 960, 576),
    Case(5, 200, 1032, has_bias=True),
    Case(17, 576, 1536, FP16, adds=True),
    Case(33, 4168, 2056, has_bias=True),
    Case(64, 4096, 4096, adds=True),
    Case(100, 1000, 2184, adds=True, has_bias=True),
    Case(256, 6144, 4096),
    Case(3, 3072, 576, is_gated=True),
    Case(64, 28672, 4096, is_gated=True),
    Case(77, 2064, 2056, FP16, is_gated=True, has_bias=True),
    Case(200, 3072, 576, is_gated=True, adds=True),
    Case(64, 4968, 520, out_dtype=FP32),
    Case(7, 49152, 576, out_dtype=FP32),
    Case(9, 194, 301, has_bias=True),  # rows that are not aligned
    Case(70, 194, 301, FP16, is_gated=True),
    Case(4, 960, 576, FP32, adds=True),
    Case(65, 4100, 2050, FP32, is_gated=True, has_bias=True),
]


def randn(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal numbers on the GPU, drawn in float32."""
    return torch.randn(*sizes, dtype=FP32, device="cuda").to(dtype)


def check_values() -> list[dict[str, Any]]:
    """For each case its error and what is wrong."""
    rows = []
    for case in CASES:
        try:
            error, wrong = _check(case)
        except Exception as failure:  # of a compiler or a launch: the others may do
            error, wrong = math.nan, [(str(failure).splitlines() or [repr(failure)])[0][:100]]
        rows.append({"case": repr(case)[5:-1], "error": f"{error:.1e}", "wrong": ", ".join(wrong)})
    return rows


def _check(case: Case) -> tuple[float, list[str]]:
    x = torch.full((case.num_rows, case.num_inputs + 8), math.nan, dtype=case.dtype, device="cuda")
    x = x[:, : case.num_inputs].copy_(randn(case.num_rows, case.num_inputs))
    weight = (randn(case.num_outputs, case.num_inputs) * case.num_inputs**-0.5).to(case.dtype)
    bias = randn(case.num_outputs, dtype=case.dtype) if case.has_bias else None
    num_columns = case.num_outputs // 2 if case.is_gated else case.num_outputs
    before = randn(case.num_rows, num_columns, dtype=case.out_dtype or case.dtype)
    expected = before.to(FP32, copy=True)
    decode_gemm_reference(x, weight, expected, bias, is_gated=case.is_gated, adds=case.adds)
    linear = DecodeLinear(weight, bias, is_gated=case.is_gated)
    results, wrong = [], []
    for num_sms in (16, 32, 48, 132):
        sizes = linear.scratch_size(case.num_rows, num_sms)
        scratch = DecodeGemmScratch.allocate(*sizes, x.device)
        scratch.partials.fill_(math.nan)
        buffer = torch.full((case.num_rows + 1, num_columns + 8), math.nan, dtype=before.dtype, device="cuda")
        out = buffer[:-1, :num_columns].copy_(before)
        linear(x, out, scratch, num_sms=num_sms, adds=case.adds)
        results.append(out)
        wrong += ["counters"] if scratch.counters.any() else []
        wrong += ["neighbours"] if not (buffer[-1].isnan().all() and buffer[:, num_columns:].isnan().all()) else []
    error = float((results[0].float() - expected).norm() / expected.norm())
    wrong += [] if error <= MAX_ERRORS[case.dtype] else ["error"]
    wrong += [] if all(torch.equal(results[0], result) for result in results) else ["depends on the SMs"]
    return error, wrong


def check_rows() -> dict[str, list[int]]:
    """For each kind of matrix the numbers of rows that give other bits than the same rows among 256."""
    different = {}
    for is_gated in (False, True):
        linear, x = DecodeLinear(randn(4096, 4096), is_gated=is_gated), randn(256, 4096)
        scratch = DecodeGemmScratch.allocate(*linear.scratch_size(256, 48), x.device)
        outs = {}
        for num_rows in (256, 1, 8, 16, 17, 32, 33, 64, 65, 128, 192):
            outs[num_rows] = torch.empty(num_rows, 2048 if is_gated else 4096, dtype=BF16, device="cuda")
            linear(x[:num_rows], outs[num_rows], scratch, num_sms=48)
        name = "gated" if is_gated else "plain"
        different[name] = [rows for rows, out in outs.items() if not torch.equal(out, outs[256][:rows])]
    return different


def check_races(partition: Partition) -> dict[str, int]:
    """Launches that differ from the first, of 200 beside a kernel that takes SMs away; and of chains that overlap."""
    noise = randn(8192, 8192)
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    different = {}
    for name, num_outputs, is_gated in (("plain", 6144, False), ("gated", 14336, True)):
        linear, x = DecodeLinear(randn(num_outputs, 4096), is_gated=is_gated), randn(64, 4096)
        scratch = DecodeGemmScratch.allocate(*linear.scratch_size(64, partition.num_sms), x.device)
        num_columns = num_outputs // 2 if is_gated else num_outputs
        outs = torch.empty(NUM_LAUNCHES, 64, num_columns, dtype=BF16, device="cuda")
        torch.cuda.synchronize()  # with the stream that made the inputs; not with those of green contexts
        with torch.cuda.stream(other):
            for _ in range(8):
                torch.mm(noise, noise)
        with torch.cuda.stream(partition.stream):
            for out in outs:
                linear(x, out, scratch, num_sms=partition.num_sms)
        partition.stream.synchronize()
        different[name] = sum(not torch.equal(out, outs[0]) for out in outs)
    expected = _chain(partition, is_alone=True)
    assert expected.isfinite().all()
    results = [_chain(partition, is_alone=False) for _ in range(4)]
    different["chain"] = sum(not torch.equal(result, expected) for result in results)
    return different


def _chain(partition: Partition, *, is_alone: bool) -> Tensor:
    """Rows after 24 feed-forwards: in a graph, where each launch begins while the one before ends, or each alone."""
    torch.manual_seed(0)
    up, down = DecodeLinear(randn(7168, 2048) / 45, is_gated=True), DecodeLinear(randn(2048, 3584) / 60)
    start, hidden = randn(64, 2048), torch.empty(64, 3584, dtype=BF16, device="cuda")
    residual, normed, weight = torch.empty_like(start), torch.empty_like(start), torch.ones_like(start[0])
    pairs = zip(up.scratch_size(64, partition.num_sms), down.scratch_size(64, partition.num_sms), strict=True)
    num_partials, num_counters = (max(pair) for pair in pairs)
    scratch = DecodeGemmScratch.allocate(num_partials, num_counters, start.device)

    def launch() -> None:
        torch.add(start, 0, out=residual)  # a kernel, not a copy
        for _ in range(24):
            for product in (
                partial(rms_norm, residual, weight, 1e-5, normed),
                partial(up, normed, hidden, scratch, num_sms=partition.num_sms),
                partial(down, hidden, residual, scratch, num_sms=partition.num_sms, adds=True),
            ):
                product()
                if is_alone:
                    partition.stream.synchronize()

    if is_alone:
        torch.cuda.synchronize()
        with torch.cuda.stream(partition.stream):
            launch()
        return residual
    graph = partition.capture(launch)
    with torch.cuda.stream(partition.stream):
        graph.replay()
        graph.replay()
    partition.stream.synchronize()
    return residual

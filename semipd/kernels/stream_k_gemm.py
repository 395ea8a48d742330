"""A GEMM for some of a GPU's SMs: `x @ weight.T`, or that added to a matrix.

cuBLAS chooses tiles and grid for all SMs of the device. On a partition of 116 of an H100's 132 SMs, 128 tiles take two
turns as on 84, and telling cuBLASLt how many SMs there are helps little. This kernel runs one program on each SM, and
cuts what the last turn would leave over. A program keeps its SM until the product is done: a lane that shares SMs with
this one waits longer than for cuBLAS, whose programs come and go.

*Units* are tiles of `block_m` rows and `block_n` outputs. They are dealt to the programs in turns. Where the last turn
would be for few of the programs, it and the one before are cut instead: each program has an equal *range* of their
steps over the inputs ("stream-K", arXiv 2301.03598, in its hybrid form: turns of whole units, then less than two units
for each program). A unit that two programs share is begun by one, whose sums the other goes on with.

Sums are in float32, in the order of the inputs, and rounded once: results do not depend on the number of SMs. The plain
torch reference is `torch.mm`, or `addmm`, in float32.

Shapes: T rows, I inputs, O outputs (rows of the weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from semipd.kernels.hopper_gemm import is_aligned
from semipd.kernels.stream_k_gemm_hopper import stream_k_gemm_hopper
from semipd.kernels.triton_util import is_hopper, num_device_sms

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ROWS = 256  # with fewer, reading the weights takes as long
_LEAST_FILL = 0.6  # of a partition's SMs that have a unit, with the rows of padding taken off
_CUT_FOR_ONE_IN = 3  # programs, or fewer, that the last turn is for: then units are cut

# On the whole device cuBLAS is as fast or faster but here, by (SMs, outputs, inputs): more rows than the first number,
# up to the second, where its own tiles leave a last turn to few SMs. With gate and up of Llama-3-8B done so, a layer's
# products take 478 us for 768 rows and 565 for 896 on an H100, and 507 and 626 without (`python -m benchmarks.rows`).
_AHEAD_ON_ALL_SMS = MappingProxyType({(132, 28672, 4096): ((640, 896), (1408, 1536))})


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamKConfig:
    """How a launch is cut.

    Attributes:
        block_m: rows of a unit; 128 of the Hopper kernel, whose two warpgroups have 64 each.
        block_n: outputs of a unit.
        block_k: inputs of a step.
        num_stages: steps whose operands are in shared memory or on the way there.
        num_parts: ranges of columns in which a unit is stored.
        out_stages: such ranges that are in shared memory at a time, of each half of the rows.
        band: row blocks that units are walked by.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    num_parts: int = 4
    out_stages: int = 2
    band: int = 16

    def scratch_size(self, num_sms: int) -> tuple[int, int]:
        """Numbers of partial sums and flags of a launch on so many SMs."""
        return num_sms * self.block_m * self.block_n, num_sms * 2


@dataclass(frozen=True, slots=True, eq=False)
class StreamKScratch:
    """Memory of launches that follow one another on a stream.

    Attributes:
        partials: float32; holds anything.
        flags: int32; zeros at first, and again after each launch.
    """

    partials: Tensor
    flags: Tensor


def can_stream_k(x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> bool:
    """Whether `stream_k_gemm` takes these: on Hopper, of the same 16 bits, with rows aligned to 16 bytes."""
    has_one_dtype = x_TI.dtype == weight_OI.dtype == out_TO.dtype
    return is_hopper(x_TI.device) and has_one_dtype and all(map(is_aligned, (x_TI, weight_OI, out_TO)))


def is_stream_k_ahead(x_TI: Tensor, weight_OI: Tensor, num_sms: int) -> bool:
    """Whether it is expected to be faster than cuBLAS, on so many SMs."""
    num_rows, (num_outputs, num_inputs) = len(x_TI), weight_OI.shape
    if num_sms < num_device_sms(x_TI.device):
        config = StreamKConfig()
        num_full_units = num_rows * num_outputs / (config.block_m * config.block_n)
        return num_rows >= _LEAST_ROWS and num_full_units >= _LEAST_FILL * num_sms
    ranges = _AHEAD_ON_ALL_SMS.get((num_sms, num_outputs, num_inputs), ())
    return any(above < num_rows <= up_to for above, up_to in ranges)


def stream_k_gemm(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    scratch: StreamKScratch,
    *,
    num_sms: int,
    adds: bool = False,
    config: StreamKConfig | None = None,
) -> None:
    """Writes `x @ weight.T` to `out`, or adds it to what is there before the one rounding.

    Args:
        x_TI: rows that may be strided, as those of the others; `can_stream_k` says of which matrices.
        scratch: at least of `config.scratch_size`.
        num_sms: programs at most: as many as there are SMs. With more the result is the same, later, as those wait
            that have no SM yet.
    """
    config = config or StreamKConfig()
    num_rows, num_inputs = x_TI.shape
    assert weight_OI.shape[1] == num_inputs and out_TO.shape == (num_rows, len(weight_OI))
    assert x_TI.stride(1) == weight_OI.stride(1) == out_TO.stride(1) == 1
    num_units = -(-num_rows // config.block_m) * -(-len(weight_OI) // config.block_n)
    num_programs = min(num_sms, num_units)
    num_partials, num_flags = config.scratch_size(num_programs)
    assert len(scratch.partials) >= num_partials and len(scratch.flags) >= num_flags
    assert scratch.partials.dtype == torch.float32 and scratch.flags.dtype == torch.int32
    stream_k_gemm_hopper(
        x_TI,
        weight_OI,
        out_TO,
        scratch.partials,
        scratch.flags,
        num_cut_units(num_units, num_programs),
        config,
        grid=(num_programs,),
        adds=adds,
    )


def num_cut_units(num_units: int, num_programs: int) -> int:
    """How many of the units, the last ones, are cut: more than one a program and less than two, or none.

    Programs that share a unit read its operands at different times, so cutting costs the more the larger a share of a
    unit each has above its first. On one H100 it gains 3 to 20 % where the last turn is for up to a third of the
    programs, and loses as much, or more, from 0.4 of them on.
    """
    rest = num_units % num_programs
    return num_programs + rest if 0 < rest * _CUT_FOR_ONE_IN <= num_programs else 0

"""The GEMM of a decode step: up to 64 rows times a matrix that is read once, as fast as memory and few SMs can stream.

The work is one sequence of *steps* of BLOCK_K inputs: those of the first unit, of the second, and so on, where a unit
is an output tile or one of `split_k` slices of its inputs. Each CTA takes an equal range of the sequence, so all stream
as many bytes on any number of SMs, and walks it in one loop, whose loads run ahead across the borders of units. Where a
range ends inside a unit, the unit's sum is not split in two:

    units           |    u    |  u + 1  |  u + 2  |
    CTAs        ........ i ......][...... i + 1 ......
    pieces            whole  head  tail   whole

CTA i computes the head *first* and hands on its accumulators; CTA i + 1 goes on from them with the tail, *last*. A
range is no shorter than a unit, so by then they are there. Thus an output is summed over the inputs of each slice in
ascending order, then over the slices: an order that follows from the weight's shape alone. Results depend neither on
the number of SMs nor on the other rows, and one launch does it all.

An SM of an H100 takes in at most 109 bytes/ns, and every tile reads the activations again, which are BLOCK_M / BLOCK_N
of the weight's bytes. So 32 SMs need tiles of 256 outputs to stream 64 rows' weights at 2.8 TB/s; 64 and more have
bandwidth to spare and need tiles enough.

Shapes: T rows of a step, I inputs, O outputs (rows of the weight), F = O / 2 features of a gated projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from semipd.kernels.decode_gemm_kernel import decode_gemm_kernel
from semipd.kernels.triton_util import is_hopper, is_interpreted, launch

_MAX_ROWS = 64  # of one launch; cuBLAS is faster for more
# Slices of the inputs are multiples of it and so of any BLOCK_K.
_SLICE_MULTIPLE = 128
# So many SMs have bandwidth to spare, so many tiles keep all of an H100's busy.
_MANY_SMS = 64
_MANY_TILES = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGemmConfig:
    """How a launch is cut. Of these `split_k` alone changes the order of additions.

    Attributes:
        block_m: rows of a launch, padded; more rows are further launches.
        block_n: outputs of a tile; of a gated projection, gate and up together.
        block_k: inputs of a step.
        split_k: slices of the inputs; must follow from the weight's shape.
        num_stages: steps whose operands are in shared memory or on the way there.
        is_swapped: whether the outputs are the rows of the tensor cores' tiles, at least 64, and the tokens their
            columns, which may be 16.
        uses_tma: whether the tensor memory accelerator loads the operands.
        prefetch: inputs of each row of its first tile that a CTA draws into the L2 cache while it waits for the kernel
            before (PDL).
    """

    block_m: int
    block_n: int
    block_k: int = 64
    split_k: int = 1
    num_stages: int
    num_warps: int = 4
    ctas_per_sm: int = 1
    is_swapped: bool = False
    uses_tma: bool = True
    prefetch: int = 256

    def steps_per_unit(self, num_inputs: int) -> int:
        """Steps of one slice of the inputs."""
        if self.split_k == 1:
            return _cdiv(num_inputs, self.block_k)
        slice_length = _cdiv(num_inputs, self.split_k * _SLICE_MULTIPLE) * _SLICE_MULTIPLE
        return slice_length // self.block_k

    def num_units(self, num_outputs: int) -> int:
        """Output tiles times slices."""
        return _cdiv(num_outputs, self.block_n) * self.split_k

    def num_ctas(self, num_outputs: int, num_sms: int) -> int:
        """The grid. At most one per unit: those in the middle of a unit would wait for each other."""
        return min(self.num_units(num_outputs), num_sms * self.ctas_per_sm)

    def scratch_size(self, num_outputs: int, num_sms: int) -> tuple[int, int]:
        """Elements of `DecodeGemmScratch.partials` and `.counters` that a launch uses."""
        num_ctas, num_units = self.num_ctas(num_outputs, num_sms), self.num_units(num_outputs)
        num_slots = num_ctas + (num_units if self.split_k > 1 else 0)
        return num_slots * self.block_m * self.block_n, num_ctas + num_units // self.split_k


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGemmScratch:
    """Through which the CTAs of a launch pass sums. Launches that may run at the same time need one each.

    Attributes:
        partials: float32; may hold anything.
        counters: int32; zeros before the first launch, and zeros after each.
    """

    partials: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, num_partials: int, num_counters: int, device: torch.device) -> DecodeGemmScratch:
        """Scratch for all launches whose `scratch_size` is no larger."""
        partials = torch.empty(num_partials, dtype=torch.float32, device=device)
        return cls(partials, torch.zeros(num_counters, dtype=torch.int32, device=device))


@cache
def config_for(
    num_rows: int,
    num_outputs: int,
    num_sms: int,
    *,
    dtype: torch.dtype,
    is_gated: bool = False,
    can_use_tma: bool = True,
) -> DecodeGemmConfig:
    """How to cut a launch; `num_outputs` are the weight's rows: gate and up of a gated projection.

    By measurement on an H100 (`benchmarks/decode_gemm.py`). Few SMs need wide tiles; of many each needs a tile, and
    long steps. Slices of the inputs cost more than they gain on any number of SMs.
    """
    if not can_use_tma:
        # 52 KB of shared memory, which every GPU has. All rows in one shape of 16-bit tensor-core tile, so that all are
        # summed alike; float32 runs on the FMA units.
        is_float32 = dtype == torch.float32
        block_m = min(max(1 << (num_rows - 1).bit_length(), 16), _MAX_ROWS) if is_float32 else _MAX_ROWS
        block_k = 32 if is_float32 else 64
        return DecodeGemmConfig(block_m=block_m, block_n=64, block_k=block_k, num_stages=3, uses_tma=False)
    has_many_sms = num_sms >= _MANY_SMS
    if is_gated:
        if has_many_sms and num_rows <= 16:
            return DecodeGemmConfig(block_m=16, block_n=64, block_k=256, num_stages=5, is_swapped=True)
        if has_many_sms:
            return DecodeGemmConfig(block_m=64, block_n=128, block_k=128, num_stages=2, ctas_per_sm=2)
        return DecodeGemmConfig(block_m=64, block_n=256, block_k=64, num_stages=5)
    if num_rows <= 16:
        return DecodeGemmConfig(block_m=16, block_n=64, block_k=256, num_stages=5, is_swapped=True)
    if num_rows <= 32:
        return DecodeGemmConfig(block_m=32, block_n=64, block_k=256, num_stages=4, is_swapped=True)
    if not has_many_sms:
        return DecodeGemmConfig(block_m=64, block_n=128, block_k=128, num_stages=4)
    if num_outputs < 64 * _MANY_TILES:
        return DecodeGemmConfig(block_m=64, block_n=32, block_k=256, num_stages=4)
    return DecodeGemmConfig(block_m=64, block_n=64, block_k=256, num_stages=3)


@cache
def _scratch_size(
    num_rows: int, num_outputs: int, num_sms: int, dtype: torch.dtype, is_gated: bool, can_use_tma: bool
) -> tuple[int, int]:
    """What `DecodeGemmScratch` has to hold for launches of up to `num_rows` rows, aligned or not."""
    buckets = {min(1 << bit, num_rows) for bit in range(num_rows.bit_length() + 1)}
    sizes = [
        config_for(
            rows, num_outputs, num_sms, dtype=dtype, is_gated=is_gated, can_use_tma=can_use_tma and is_aligned
        ).scratch_size(num_outputs, num_sms)
        for rows in buckets
        for is_aligned in (False, True)
    ]
    return max(size for size, _ in sizes), max(size for _, size in sizes)


class DecodeLinear:
    """A weight, and a bias, with what their decode GEMMs need; no copy of them.

    With `is_gated` the weight is a gate's rows above as many of an up projection, and the result `silu(gate) * up`.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, is_gated: bool = False) -> None:
        assert weight_OI.stride(1) == 1 and (bias_O is None or bias_O.is_contiguous())
        assert not is_gated or len(weight_OI) % 2 == 0
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self._is_gated = is_gated
        # The TMA variant is cut for Hopper's tensor cores and shared memory.
        self._can_use_tma = is_hopper(weight_OI.device) and _is_aligned(weight_OI)
        self._descriptors: dict[tuple[int, int, int], TensorDescriptor] = {}

    def config(self, num_rows: int, num_sms: int, *, is_aligned: bool = True) -> DecodeGemmConfig:
        """`config_for` this weight; `is_aligned` says whether its inputs' rows start at multiples of 16 bytes."""
        return config_for(
            num_rows,
            self._weight_OI.shape[0],
            num_sms,
            dtype=self._weight_OI.dtype,
            is_gated=self._is_gated,
            can_use_tma=self._can_use_tma and is_aligned,
        )

    def scratch_size(self, num_rows: int, num_sms: int) -> tuple[int, int]:
        """Sizes for `DecodeGemmScratch.allocate` that suit calls of up to `num_rows` rows on exactly `num_sms` SMs."""
        weight = self._weight_OI
        return _scratch_size(num_rows, weight.shape[0], num_sms, weight.dtype, self._is_gated, self._can_use_tma)

    def __call__(
        self,
        x_TI: Tensor,
        out_TO: Tensor,
        scratch: DecodeGemmScratch,
        *,
        num_sms: int,
        adds: bool = False,
        config: DecodeGemmConfig | None = None,
    ) -> None:
        """Writes `x @ weight.T + bias`, or its gated product, to `out_TO`, or with `adds` adds it to what is there.

        Sums are in float32 and rounded once. `out_TO` may be of another floating dtype; rows of both may be strided.
        """
        num_outputs, num_inputs = self._weight_OI.shape
        num_columns = num_outputs // 2 if self._is_gated else num_outputs
        num_rows = x_TI.shape[0]
        assert x_TI.dtype == self._weight_OI.dtype and x_TI.shape[1] == num_inputs and x_TI.stride(1) == 1
        assert out_TO.shape == (num_rows, num_columns) and out_TO.stride(1) == 1
        if config is None:
            config = self.config(num_rows, num_sms, is_aligned=_is_aligned(x_TI))
        num_ctas = config.num_ctas(num_outputs, num_sms)
        for start in range(0, num_rows, config.block_m):
            rows = slice(start, start + config.block_m)
            self._launch(x_TI[rows], out_TO[rows], scratch, config, num_ctas, adds)

    def _launch(
        self,
        x_TI: Tensor,
        out_TO: Tensor,
        scratch: DecodeGemmScratch,
        config: DecodeGemmConfig,
        num_ctas: int,
        adds: bool,
    ) -> None:
        num_outputs, num_inputs = self._weight_OI.shape
        group = self._group(config)
        x_descriptor = weight_descriptor = None
        if config.uses_tma:
            x_descriptor = TensorDescriptor.from_tensor(x_TI, [config.block_m, config.block_k])
            weight_descriptor = self._weight_descriptor(config.block_n, config.block_k, group)
        steps_per_unit = config.steps_per_unit(num_inputs)
        launch(decode_gemm_kernel, (num_ctas,), pdl_on=x_TI.device)(
            x_descriptor,
            weight_descriptor,
            x_TI,
            self._weight_OI,
            self._bias_O,
            out_TO,
            scratch.partials,
            scratch.counters,
            x_TI.shape[0],
            num_outputs,
            num_inputs,
            steps_per_unit,
            *divmod(config.num_units(num_outputs) * steps_per_unit, num_ctas),
            x_TI.stride(0),
            self._weight_OI.stride(0),
            out_TO.stride(0),
            IS_GATED=self._is_gated,
            ADDS=adds,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=group,
            SPLIT_K=config.split_k,
            IS_SWAPPED=config.is_swapped,
            PREFETCH=config.prefetch,
            INTERPRETED=is_interpreted(),
            NUM_WARPS=config.num_warps,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def _group(self, config: DecodeGemmConfig) -> int:
        """How many gates lie in a tile before their ups: those of one warp, which then has both of each feature."""
        half = config.block_n // 2
        num_features = len(self._weight_OI) // 2
        # 8 warps are two rows of warps for 128 tokens, and for 64 two columns.
        return half // 2 if config.num_warps == 8 and config.block_m <= 64 and num_features % (half // 2) == 0 else half

    def _weight_descriptor(self, block_n: int, block_k: int, group: int) -> TensorDescriptor:
        """The weight in boxes of a tile's rows; a gated one as `[groups of features, gate or up, features, inputs]`."""
        key = (block_n, block_k, group)
        if key not in self._descriptors:
            weight, block = self._weight_OI, [block_n, block_k]
            if self._is_gated:
                num_groups = block_n // (2 * group)
                num_inputs = weight.shape[1]
                if num_groups == 1:  # it may start at any feature, and the last one ends it
                    weight = weight.view(1, 2, -1, num_inputs)
                else:
                    weight = weight.view(2, -1, group, num_inputs).transpose(0, 1)
                block = [num_groups, 2, group, block_k]
            self._descriptors[key] = TensorDescriptor.from_tensor(weight, block)
        return self._descriptors[key]


def decode_gemm_reference(
    x_TI: Tensor,
    weight_OI: Tensor,
    out_TO: Tensor,
    bias_O: Tensor | None = None,
    *,
    is_gated: bool = False,
    adds: bool = False,
) -> None:
    """What a call of a `DecodeLinear` does, in plain torch: in float32, or in float64 if the inputs are."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    y_TO = F.linear(x_TI.to(dtype), weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
    if is_gated:
        gate_TF, up_TF = y_TO.chunk(2, -1)
        y_TO = F.silu(gate_TF) * up_TF
    out_TO.copy_(out_TO.to(dtype) + y_TO if adds else y_TO)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can load boxes of its rows as operands of the tensor cores."""
    return tensor.element_size() == 2 and tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0

"""The ops in plain torch: the specification of every other op table, and the CPU backend.

Numbers in comments: SmolLM2-135M on two threads of a 2-core AVX-512 Xeon, torch 2.13. At one row a step is bound by
reading the weights and by the number of torch calls (1-15 us each, 30 layers), so both are kept small.

Shapes: see `kernels/ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels.ops import AttentionMetadata, AttentionPlan, PackedLinear, RMSNorm, RotaryTable
from semipd.kernels.paged_attention import PagedAttention

# A oneDNN call costs a step of one row up to 0.1 ms more than mm, the time to read 3 MB, and saves a fifth at 8 to 16
# rows: float32 matrices are prepacked from this size on. bfloat16 gains at every size: 12 ms against 17 at one row.
_MIN_PREPACK_BYTES = 16 << 20
# Of matrices that are small but wide both layouts are held, one for few rows and one for many: a step of 16 rows
# takes 59 ms instead of 68, one of one row stays at 27. For SmolLM2-135M that is 325 MB; in large models nothing is
# that small.
_MIN_TWIN_OUTPUTS = 2048
_MAX_TWIN_BYTES = 128 << 20
_MIN_ROWS_ONEDNN = 4


class ReferenceOps:
    """The op table `"reference"`."""

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None, *, is_shared: bool = False) -> PackedLinear:
        """See `Ops.pack_linear`."""
        is_twin = weight_OI.shape[0] >= _MIN_TWIN_OUTPUTS and weight_OI.nbytes <= _MAX_TWIN_BYTES
        if not _has_onednn(weight_OI):
            return _plain_linear(weight_OI, bias_O) if is_shared else _transposed_linear(weight_OI, bias_O)
        if is_shared:
            many_rows = _onednn_linear(_prepacked(weight_OI) if is_twin else weight_OI, bias_O)
            return _by_rows(_plain_linear(weight_OI, bias_O), many_rows)
        if weight_OI.dtype != torch.float32 or weight_OI.nbytes >= _MIN_PREPACK_BYTES:
            return _onednn_linear(_prepacked(weight_OI), bias_O)
        few_rows = _transposed_linear(weight_OI, bias_O)
        return _by_rows(few_rows, _onednn_linear(_prepacked(weight_OI), bias_O)) if is_twin else few_rows

    def pack_rms_norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        """See `Ops.pack_rms_norm`."""
        return _ReferenceNorm(weight_D, eps)

    def rotary_table(self, positions_T: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> RotaryTable:
        """See `Ops.rotary_table`."""
        angles = positions_T.to(inv_freq.dtype)[:, None, None] * inv_freq
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return RotaryTable(cos_T1H=torch.cat((cos, cos), -1), sin_T1H=torch.cat((-sin, sin), -1))

    def rotary_write_kv_(self, qkv_TEH: Tensor, table: RotaryTable, kv_R2KH: Tensor, slot_mapping_T: Tensor) -> None:
        """See `Ops.rotary_write_kv_`."""
        num_kv = kv_R2KH.shape[1]
        num_heads = qkv_TEH.shape[1]
        qk_TEH = qkv_TEH.narrow(1, 0, num_heads - num_kv // 2)
        rolled_TEH = qk_TEH.roll(qkv_TEH.shape[2] // 2, -1)
        qk_TEH.mul_(table.cos_T1H).addcmul_(rolled_TEH, table.sin_T1H)
        kv_R2KH.index_copy_(0, slot_mapping_T, qkv_TEH.narrow(1, num_heads - num_kv, num_kv))

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate, up = gate_up_TF.unsafe_chunk(2, -1)  # without autograd's bookkeeping of views
        return F.silu(gate).mul_(up)

    def plan_attention(
        self, metadata: AttentionMetadata, kv_LPS2KH: Tensor, windows: Sequence[int | None], scale: float
    ) -> AttentionPlan:
        """See `Ops.plan_attention`."""
        return PagedAttention(metadata, kv_LPS2KH, windows, scale)


class _ReferenceNorm:
    """`x * (sqrt(D) * weight) / hypot(|x|, sqrt(D * eps))`: the same with |x| the Euclidean norm, and four calls.

    Behind a matmul that swept the caches they take 20 us, F.rms_norm 65, and a step has 61 norms.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._dtype = weight_D.dtype
        self._wide_dtype = torch.promote_types(weight_D.dtype, torch.float32)
        dim = weight_D.shape[-1]
        self._weight_D = weight_D.to(self._wide_dtype) * math.sqrt(dim)
        self._floor = self._weight_D.new_tensor(math.sqrt(dim * eps))

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self._dtype == self._wide_dtype:
            norm_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
            return torch.div(x_TD, torch.hypot(norm_T1, self._floor)).mul_(self._weight_D)
        x_TD = x_TD.to(self._wide_dtype)
        norm_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
        return x_TD.div_(torch.hypot(norm_T1, self._floor)).mul_(self._weight_D).to(self._dtype)

    def add_(self, residual_TD: Tensor, x_TD: Tensor) -> Tensor:
        return self(residual_TD.add_(x_TD))


def _has_onednn(weight_OI: Tensor) -> bool:
    """Whether oneDNN runs matrices of this dtype here without emulation."""
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    match weight_OI.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return False


def _transposed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
    weight_IO = weight_OI.t().contiguous()
    if bias_O is None:
        return lambda x_TI: torch.mm(x_TI, weight_IO)
    return lambda x_TI: torch.addmm(bias_O, x_TI, weight_IO)


def _plain_linear(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
    return lambda x_TI: F.linear(x_TI, weight_OI, bias_O)


def _prepacked(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed


def _onednn_linear(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
    """On a prepacked weight or one in the plain layout, which oneDNN takes too.

    The latter takes 13 ms where MKL takes 28 (49152 outputs, 8 rows, one thread, float32).
    """
    linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return lambda x_TI: linear(x_TI, weight_OI, bias_O, "none", [], "")


def _by_rows(few_rows: PackedLinear, many_rows: PackedLinear) -> PackedLinear:
    return lambda x_TI: many_rows(x_TI) if x_TI.shape[0] >= _MIN_ROWS_ONEDNN else few_rows(x_TI)

"""The ops in plain torch: the specification of every other op table, and the CPU backend.

Numbers in comments: SmolLM2-135M on two threads of a 2-core AVX-512 Xeon, torch 2.13. At one row a step is bound by
reading the weights and by the number of torch calls (1-15 us each, 30 layers), so both are kept small.

Shapes: see `kernels/ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels.ops import (
    AttentionSpec,
    PackedGateUp,
    PackedHead,
    PackedLinear,
    QKNorm,
    RMSNorm,
    StepContext,
)
from semipd.kernels.paged_attention import AttentionMetadata, PagedAttention

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
    """The op table `"reference"`. It allocates its results: the buffers of a step's context are not used."""

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """See `Ops.pack_linear`."""
        if not _has_onednn(weight_OI):
            return _TransposedLinear(weight_OI, bias_O)
        if weight_OI.dtype != torch.float32 or weight_OI.nbytes >= _MIN_PREPACK_BYTES:
            return _OneDnnLinear(_prepacked(weight_OI), bias_O)
        few_rows = _TransposedLinear(weight_OI, bias_O)
        if _has_twin(weight_OI):
            return _TwinLinear(few_rows, _OneDnnLinear(_prepacked(weight_OI), bias_O))
        return few_rows

    def pack_head(self, weight_VD: Tensor, *, is_shared: bool) -> PackedHead:
        """See `Ops.pack_head`."""
        return _Head(self._shared_linear(weight_VD) if is_shared else self.pack_linear(weight_VD, None))

    def _shared_linear(self, weight_OI: Tensor) -> PackedLinear:
        """A map on a weight that is used as it is."""
        few_rows = _PlainLinear(weight_OI)
        if not _has_onednn(weight_OI):
            return few_rows
        return _TwinLinear(few_rows, _OneDnnLinear(_prepacked(weight_OI) if _has_twin(weight_OI) else weight_OI, None))

    def pack_gate_up(self, gate_up_2FD: Tensor, bias_2F: Tensor | None) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return _GateUp(self.pack_linear(gate_up_2FD, bias_2F))

    def pack_rms_norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        """See `Ops.pack_rms_norm`."""
        return _Norm(weight_D, eps)

    def pack_qk_norm(self, q_norm_H: Tensor, k_norm_H: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> QKNorm:
        """See `Ops.pack_qk_norm`."""
        return _Norm(torch.cat((q_norm_H.expand(num_heads, -1), k_norm_H.expand(num_kv_heads, -1))), eps)

    def embed(
        self, token_ids_T: Tensor, embedding_VD: Tensor, context: StepContext, first_id: int | None = None
    ) -> Tensor:
        """See `Ops.embed`."""
        if first_id is None:
            return F.embedding(token_ids_T, embedding_VD)
        rows_T = token_ids_T - first_id
        kept_T = rows_T.clamp(0, len(embedding_VD) - 1)
        return F.embedding(kept_T, embedding_VD).masked_fill_((rows_T != kept_T)[:, None], 0)


class ReferencePlan:
    """The `AttentionPlan` of rows at `positions_T`: their rotary tables and their paged attention.

    Cosines and sines are computed in the precision of `inv_freq` and kept over the full head dim in the pool's dtype.
    The sign of the half rotation is in the sine: rotated = x * cos + roll(x, H / 2) * sin.
    """

    def __init__(
        self, positions_T: Tensor, metadata: AttentionMetadata, kv_LPS2KH: Tensor, spec: AttentionSpec
    ) -> None:
        angles = positions_T.to(spec.inv_freq.dtype)[:, None, None] * spec.inv_freq
        cos, sin = angles.cos().to(kv_LPS2KH.dtype), angles.sin().to(kv_LPS2KH.dtype)
        self._cos_T1H, self._sin_T1H = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self._half = spec.inv_freq.shape[0]
        self._num_kv = 2 * kv_LPS2KH.shape[4]
        self._slot_mapping_T = metadata.slot_mapping_T
        self._attention = PagedAttention(metadata, kv_LPS2KH, spec.windows, spec.scale)
        self._layers_R2KH = self._attention.layers_R2KH
        self.attend = self._attention.attend

    def rotary_write_kv_(self, layer: int, qkv_TEH: Tensor, qk_norm: QKNorm | None, context: StepContext) -> None:
        """See `AttentionPlan.rotary_write_kv_`; K heads are rotated in place too."""
        num_kv, num_heads = self._num_kv, qkv_TEH.shape[1]
        qk_TEH = qkv_TEH.narrow(1, 0, num_heads - num_kv // 2)
        if qk_norm is not None:
            assert isinstance(qk_norm, _Norm)
            qk_TEH.copy_(qk_norm.apply(qk_TEH))
        rolled_TEH = qk_TEH.roll(self._half, -1)
        qk_TEH.mul_(self._cos_T1H).addcmul_(rolled_TEH, self._sin_T1H)
        kv_T2KH = qkv_TEH.narrow(1, num_heads - num_kv, num_kv)
        self._layers_R2KH[layer].index_copy_(0, self._slot_mapping_T, kv_T2KH)


class _GateUp:
    """A stacked projection and its activation."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        gate, up = self._linear(x_TD, context).unsafe_chunk(2, -1)  # without autograd's bookkeeping of views
        return F.silu(gate).mul_(up)


class _Norm:
    """`x * (sqrt(D) * weight) / hypot(|x|, sqrt(D * eps))`: the same with |x| the Euclidean norm, and four calls.

    Behind a matmul that swept the caches they take 20 us, F.rms_norm 65, and a step has 61 norms. Leading dims, and a
    weight that broadcasts over them, are free: heads are normed as `[T, N, H]` by `[N, H]`.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.weight_D, self.eps = weight_D, eps
        self._dtype = weight_D.dtype
        self._wide_dtype = torch.promote_types(weight_D.dtype, torch.float32)
        dim = weight_D.shape[-1]
        self._scaled_D = weight_D.to(self._wide_dtype) * math.sqrt(dim)
        self._floor = self._scaled_D.new_tensor(math.sqrt(dim * eps))

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        return self.apply(x_TD)

    def apply(self, x_TD: Tensor) -> Tensor:
        """`x_TD` normed, in new memory."""
        if self._dtype == self._wide_dtype:
            norm_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
            return torch.div(x_TD, torch.hypot(norm_T1, self._floor)).mul_(self._scaled_D)
        x_TD = x_TD.to(self._wide_dtype)
        norm_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
        return x_TD.div_(torch.hypot(norm_T1, self._floor)).mul_(self._scaled_D).to(self._dtype)


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


class _TransposedLinear:
    """On weights laid out by inputs: the fastest for few rows, and the sum with a residual is one call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_IO = weight_OI.t().contiguous()
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        if self._bias_O is None:
            return torch.mm(x_TI, self._weight_IO)
        return torch.addmm(self._bias_O, x_TI, self._weight_IO)

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        residual_TO.addmm_(x_TI, self._weight_IO)
        if self._bias_O is not None:
            residual_TO.add_(self._bias_O)

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        out_TO.copy_(self(x_TI, context))


class _PlainLinear:
    """On a weight as checkpoints have it."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight_OI = weight_OI

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        return F.linear(x_TI, self._weight_OI)

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        residual_TO.add_(self(x_TI, context))

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        out_TO.copy_(self(x_TI, context))


class _Head:
    """Another map with its outputs in float32 at least."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear

    def __call__(self, x_RD: Tensor, context: StepContext) -> Tensor:
        logits_RV = self._linear(x_RD, context)
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()


class _OneDnnLinear:
    """On a prepacked weight or one in the plain layout, which oneDNN takes too.

    The latter takes 13 ms where MKL takes 28 (49152 outputs, 8 rows, one thread, float32).
    """

    def __init__(self, weight: Tensor, bias_O: Tensor | None) -> None:
        self._linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._weight = weight
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        return self._linear(x_TI, self._weight, self._bias_O, "none", [], "")

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        residual_TO.add_(self(x_TI, context))

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        out_TO.copy_(self(x_TI, context))


class _TwinLinear:
    """One map in two layouts: for few rows and for many."""

    def __init__(self, few_rows: PackedLinear, many_rows: PackedLinear) -> None:
        self._few_rows = few_rows
        self._many_rows = many_rows

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        return self._of(x_TI)(x_TI, context)

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        self._of(x_TI).add_(residual_TO, x_TI, context)

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        self._of(x_TI).write_(out_TO, x_TI, context)

    def _of(self, x_TI: Tensor) -> PackedLinear:
        return self._many_rows if x_TI.shape[0] >= _MIN_ROWS_ONEDNN else self._few_rows


def _has_twin(weight_OI: Tensor) -> bool:
    return weight_OI.shape[0] >= _MIN_TWIN_OUTPUTS and weight_OI.nbytes <= _MAX_TWIN_BYTES


def _prepacked(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed

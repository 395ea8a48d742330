"""The ops on a GPU: the project's Triton kernels, and cuBLAS for products of many rows on the whole device.

A product of few rows is bound by reading the weight, and the decode GEMM reads it with few SMs. One of many is bound by
arithmetic: on the whole device cuBLAS is ahead, but for some sizes, and on a part of a Hopper GPU the stream-K GEMM,
which adds no bias. Results live in the lane's buffers, so a captured step allocates nothing.

Shapes: see `kernels/ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.kernels.decode_gemm import DecodeGemmScratch, DecodeLinear
from semipd.kernels.ops import PackedGateUp, PackedHead, PackedLinear, QKNorm, RMSNorm, StepContext
from semipd.kernels.rms_norm import rms_norm
from semipd.kernels.silu_mul import silu_mul
from semipd.kernels.step_inputs import gather_rows
from semipd.kernels.stream_k_gemm import (
    StreamKConfig,
    StreamKScratch,
    can_stream_k,
    is_stream_k_ahead,
    stream_k_gemm,
)
from semipd.kernels.triton_util import num_device_sms

MAX_DECODE_ROWS = 64
"""Rows up to which a product is a decode GEMM."""


class TritonOps:
    """The op table `"triton"`."""

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """See `Ops.pack_linear`."""
        return _Linear(weight_OI, bias_O)

    def pack_head(self, weight_VD: Tensor, *, is_shared: bool) -> PackedHead:
        """See `Ops.pack_head`."""
        return _Head(weight_VD)

    def pack_gate_up(self, gate_up_2FD: Tensor, bias_2F: Tensor | None) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return _GateUp(gate_up_2FD, bias_2F)

    def pack_rms_norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        """See `Ops.pack_rms_norm`."""
        return _Norm(weight_D, eps)

    def pack_qk_norm(self, q_norm_H: Tensor, k_norm_H: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> QKNorm:
        """See `Ops.pack_qk_norm`."""
        return TritonQKNorm(q_norm_H, k_norm_H, eps)

    def embed(
        self, token_ids_T: Tensor, embedding_VD: Tensor, context: StepContext, first_id: int | None = None
    ) -> Tensor:
        """See `Ops.embed`."""
        residual_TD = context.buffer("residual", (len(token_ids_T), embedding_VD.shape[1]), embedding_VD)
        gather_rows(embedding_VD, token_ids_T, residual_TD, first_row=first_id or 0)
        return residual_TD


@dataclass(frozen=True, slots=True, eq=False)
class TritonQKNorm:
    """The weights of the norms of heads, which the rotary kernel applies."""

    q_norm_H: Tensor
    k_norm_H: Tensor
    eps: float


class _Product:
    """A weight in the checkpoint's layout, which both ways to multiply take."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, is_gated: bool = False) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self._decode = DecodeLinear(weight_OI, bias_O, is_gated=is_gated)

    def decode(self, x_TI: Tensor, out_TO: Tensor, context: StepContext, *, adds: bool = False) -> None:
        """The product of few rows; that of a gated weight with its activation."""
        num_partials, num_counters = self._decode.scratch_size(x_TI.shape[0], context.num_sms)
        scratch = DecodeGemmScratch(
            context.buffer("gemm_partials", (num_partials,), x_TI, torch.float32),
            context.buffer("gemm_counters", (num_counters,), x_TI, torch.int32),
        )
        self._decode(x_TI, out_TO, scratch, num_sms=context.num_sms, adds=adds)

    def multiply(self, x_TI: Tensor, out_TO: Tensor, context: StepContext) -> None:
        """The product of many rows."""
        if self._stream_k(x_TI, out_TO, context):
            return
        if out_TO.dtype != x_TI.dtype:
            torch.mm(x_TI, self._weight_OI.t(), out_dtype=out_TO.dtype, out=out_TO)
        elif self._bias_O is None:
            torch.mm(x_TI, self._weight_OI.t(), out=out_TO)
        else:
            torch.addmm(self._bias_O, x_TI, self._weight_OI.t(), out=out_TO)

    def multiply_add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """The same, added to `residual_TO` before the one rounding."""
        if self._stream_k(x_TI, residual_TO, context, adds=True):
            return
        residual_TO.addmm_(x_TI, self._weight_OI.t())
        if self._bias_O is not None:
            residual_TO.add_(self._bias_O)

    def _stream_k(self, x_TI: Tensor, out_TO: Tensor, context: StepContext, *, adds: bool = False) -> bool:
        """Have the stream-K GEMM do it if that is faster; whether it did."""
        if self._bias_O is not None or not can_stream_k(x_TI, self._weight_OI, out_TO):
            return False
        is_ahead = is_stream_k_ahead(x_TI, self._weight_OI, context.num_sms)
        if is_ahead or context.is_warm_up:
            num_partials, num_flags = StreamKConfig().scratch_size(num_device_sms(x_TI.device))
            scratch = StreamKScratch(
                context.buffer("stream_k_partials", (num_partials,), x_TI, torch.float32),
                context.buffer("stream_k_flags", (num_flags,), x_TI, torch.int32),
            )
            stream_k_gemm(x_TI, self._weight_OI, out_TO, scratch, num_sms=context.num_sms, adds=adds)
        return is_ahead


class _Linear:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._product = _Product(weight_OI, bias_O)
        self._num_outputs = weight_OI.shape[0]

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        out_TO = context.buffer("linear", (x_TI.shape[0], self._num_outputs), x_TI)
        self.write_(out_TO, x_TI, context)
        return out_TO

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        if x_TI.shape[0] <= MAX_DECODE_ROWS:
            self._product.decode(x_TI, out_TO, context)
        else:
            self._product.multiply(x_TI, out_TO, context)

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        if x_TI.shape[0] <= MAX_DECODE_ROWS:
            self._product.decode(x_TI, residual_TO, context, adds=True)
        else:
            self._product.multiply_add_(residual_TO, x_TI, context)


class _Head:
    def __init__(self, weight_VD: Tensor) -> None:
        self._product = _Product(weight_VD)
        self._vocab_size = weight_VD.shape[0]

    def __call__(self, x_RD: Tensor, context: StepContext) -> Tensor:
        logits_RV = context.buffer("logits", (x_RD.shape[0], self._vocab_size), x_RD, torch.float32)
        if x_RD.shape[0] <= MAX_DECODE_ROWS:
            self._product.decode(x_RD, logits_RV, context)
        else:
            self._product.multiply(x_RD, logits_RV, context)
        return logits_RV


class _GateUp:
    def __init__(self, gate_up_2FD: Tensor, bias_2F: Tensor | None) -> None:
        self._product = _Product(gate_up_2FD, bias_2F, is_gated=True)
        self._dim = gate_up_2FD.shape[0] // 2

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        activations_TF = context.buffer("activations", (x_TD.shape[0], self._dim), x_TD)
        if x_TD.shape[0] <= MAX_DECODE_ROWS:
            self._product.decode(x_TD, activations_TF, context)
        else:
            gate_up_T2F = context.buffer("gate_up", (x_TD.shape[0], 2 * self._dim), x_TD)
            self._product.multiply(x_TD, gate_up_T2F, context)
            silu_mul(gate_up_T2F, activations_TF)
        return activations_TF


class _Norm:
    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.weight_D = weight_D
        self.eps = eps

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        out_TD = context.buffer("normed", tuple(x_TD.shape), x_TD)
        rms_norm(x_TD, self.weight_D, self.eps, out_TD)
        return out_TD

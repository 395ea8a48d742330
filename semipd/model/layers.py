"""The parts of a decoder layer: the one `Linear` of the project, the rotary frequencies, the fused layer weights.

Shapes: T rows of a step, D model dim, F feed-forward dim, N query heads, K KV heads, H head dim, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.kernels.ops import Ops, QKNorm, RMSNorm, StepContext
from semipd.model.spec import LinearRopeScaling, Llama3RopeScaling, ModelSpec
from semipd.parallel.linear import RowParallelLinear


class Linear:
    """`y_TO = x_TI @ weight_OI.T + bias_O`: the only matmul on weights, and the owner of their format.

    Several weights of equal inputs are fused along their outputs.
    """

    def __init__(self, weights_OI: Sequence[Tensor], biases_O: Sequence[Tensor] = (), *, ops: Ops) -> None:
        self._packed = ops.pack_linear(_stacked(weights_OI), _stacked(biases_O) if biases_O else None)

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        """The outputs of every row."""
        return self._packed(x_TI, context)

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """Adds the outputs of every row to `residual_TO`."""
        self._packed.add_(residual_TO, x_TI, context)

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        """The same, and the new residual normed."""
        self.add_(residual_TO, x_TI, context)
        return norm(residual_TO, context)


class Embedding:
    """The rows of a table by token id: where the residual of a step begins."""

    def __init__(self, embedding_VD: Tensor, *, ops: Ops) -> None:
        self._embedding_VD = embedding_VD
        self._ops = ops

    def __call__(self, token_ids_T: Tensor, context: StepContext) -> Tensor:
        """The rows, `[T, D]`."""
        return self._ops.embed(token_ids_T, self._embedding_VD, context)


class GateUp:
    """`silu(x @ gate.T) * (x @ up.T)`: the `Linear` of a gated feed-forward with its activation."""

    def __init__(self, weights_FD: Sequence[Tensor], biases_F: Sequence[Tensor] = (), *, ops: Ops) -> None:
        self._packed = ops.pack_gate_up(_stacked(weights_FD), _stacked(biases_F) if biases_F else None)

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        """The activations of every row, `[T, F]`."""
        return self._packed(x_TD, context)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayer:
    """The packed weights of one layer.

    Attributes:
        qk_norm: norms of the query and the key heads; None in models without.
        next_norm: the norm behind the layer: the first of the next layer, or the model's last.
    """

    qkv: Linear
    qk_norm: QKNorm | None
    o: Linear | RowParallelLinear
    post_attention_norm: RMSNorm
    gate_up: GateUp
    down: Linear | RowParallelLinear
    next_norm: RMSNorm


def rotary_inv_freq(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair of a head, `[H / 2]`: in float64 for a float64 model, in float32 otherwise."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).to(dtype) / spec.head_dim
    inv_freq = 1.0 / (spec.rope_theta**exponents)
    match spec.rope_scaling:
        case LinearRopeScaling(factor=factor):
            inv_freq = inv_freq / factor
        case Llama3RopeScaling() as scaling:
            inv_freq = _llama3_scaled(inv_freq, scaling)
        case None:
            pass
    return inv_freq.to(device)


def _llama3_scaled(inv_freq: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength  # over the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 1 keeps a frequency, 0 divides it
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))

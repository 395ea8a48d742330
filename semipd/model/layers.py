"""The parts of a decoder layer: the one `Linear` of the project, the rotary frequencies, the fused layer weights.

Shapes: T rows of a step, D model dim, F feed-forward dim, N query heads, K KV heads, H head dim, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.kernels.ops import Ops, RMSNorm
from semipd.model.spec import LinearRopeScaling, Llama3RopeScaling, ModelSpec


class Linear:
    """`y_TO = x_TI @ weight_OI.T + bias_O`: the only matmul on weights, and the owner of their format.

    Several weights of equal inputs are fused along their outputs. `is_shared` says that the caller keeps the (one)
    weight for another use, so that it is not copied into the device's format.
    """

    def __init__(
        self,
        weights_OI: Sequence[Tensor],
        biases_O: Sequence[Tensor] = (),
        *,
        ops: Ops,
        is_shared: bool = False,
    ) -> None:
        weight_OI = weights_OI[0] if len(weights_OI) == 1 else torch.cat(tuple(weights_OI))
        bias_O = torch.cat(tuple(biases_O)) if biases_O else None
        self._apply = ops.pack_linear(weight_OI, bias_O, is_shared=is_shared)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """The outputs of every row."""
        return self._apply(x_TI)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayer:
    """The packed weights of one layer.

    Attributes:
        qk_norm: norms the query heads and the KV heads in one call; None in models without.
        next_norm: the norm behind the layer: the first of the next layer, or the model's last.
    """

    qkv: Linear
    qk_norm: RMSNorm | None
    o: Linear
    post_attention_norm: RMSNorm
    gate_up: Linear
    down: Linear
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

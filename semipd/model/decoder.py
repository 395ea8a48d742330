"""The decoder: rows of tokens in, hidden states and logits out, K and V into the pool.

It knows shapes, weights and ops; requests, lanes and sampling are the runner's. It holds nothing that a call writes, so
two lanes may run it at once on disjoint slots.

Shapes: T rows of a step, R rows whose logits are wanted, D model dim, F feed-forward dim, V vocabulary, N query heads,
K KV heads, E = N + 2K heads of the fused projection, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels.ops import AttentionMetadata, Ops, RMSNorm
from semipd.memory.kv_cache import KVCache
from semipd.model.layers import DecoderLayer, Linear, rotary_inv_freq
from semipd.model.spec import ModelSpec


class Decoder:
    """A Llama-like decoder: RMS norm, rotary attention with grouped KV heads, gated SiLU feed-forward.

    `weights` has exactly the tensors that `families.expected_weights(spec)` names, all in the model's dtype. They are
    taken out of it one by one as they are packed, so that the weights are in memory once and a layer's twice.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], ops: Ops) -> None:
        self._ops = ops
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._windows = tuple(spec.window(layer) for layer in range(spec.num_layers))

        self._embedding_VD = weights.pop("model.embed_tokens.weight")
        self.dtype = self._embedding_VD.dtype
        if spec.tie_word_embeddings:
            self._head = Linear((self._embedding_VD,), ops=ops, is_shared=True)
        else:
            self._head = Linear((weights.pop("lm_head.weight"),), ops=ops)
        self._inv_freq = rotary_inv_freq(spec, self.dtype, self._embedding_VD.device)
        self._first_norm = ops.pack_rms_norm(weights.pop("model.layers.0.input_layernorm.weight"), spec.rms_norm_eps)
        self._layers = [_take_layer(spec, layer, weights, ops) for layer in range(spec.num_layers)]
        assert not weights, f"weights that the decoder does not use: {sorted(weights)}"

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """The normed last hidden state of every row, `[T, D]`, with K and V of the rows written to their slots."""
        ops = self._ops
        num_rows = token_ids_T.shape[0]
        num_heads, num_kv_heads, head_dim = self._num_heads, self._num_kv_heads, self._head_dim
        table = ops.rotary_table(positions_T, self._inv_freq, self.dtype)
        plan = ops.plan_attention(metadata, kv_cache.kv_LPS2KH, self._windows, self._scale)
        slot_mapping_T = metadata.slot_mapping_T

        residual_TD = F.embedding(token_ids_T, self._embedding_VD)
        x_TD = self._first_norm(residual_TD)
        for index, layer in enumerate(self._layers):
            qkv_TEH = layer.qkv(x_TD).view(num_rows, -1, head_dim)
            if layer.qk_norm is not None:
                qk_TEH = qkv_TEH.narrow(1, 0, num_heads + num_kv_heads)
                qk_TEH.copy_(layer.qk_norm(qk_TEH))
            ops.rotary_write_kv_(qkv_TEH, table, kv_cache.layers_R2KH[index], slot_mapping_T)
            attended = plan.attend(index, qkv_TEH.narrow(1, 0, num_heads))
            x_TD = layer.post_attention_norm.add_(residual_TD, layer.o(attended))
            x_TD = layer.next_norm.add_(residual_TD, layer.down(ops.silu_mul(layer.gate_up(x_TD))))
        return x_TD

    def compute_logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits `[R, V]`, in float32, or in float64 if that is the model's dtype."""
        logits_RV = self._head(hidden_RD)
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()


def _take_layer(spec: ModelSpec, layer: int, weights: dict[str, Tensor], ops: Ops) -> DecoderLayer:
    prefix = f"model.layers.{layer}."

    def linear(*names: str, has_bias: bool) -> Linear:
        weights_OI = [weights.pop(f"{prefix}{name}.weight") for name in names]
        biases_O = [weights.pop(f"{prefix}{name}.bias") for name in names] if has_bias else []
        return Linear(weights_OI, biases_O, ops=ops)

    def norm(weight: Tensor) -> RMSNorm:
        return ops.pack_rms_norm(weight, spec.rms_norm_eps)

    qk_norm = None
    if spec.qk_norm:
        q_norm_H = weights.pop(f"{prefix}self_attn.q_norm.weight")
        k_norm_H = weights.pop(f"{prefix}self_attn.k_norm.weight")
        heads = (q_norm_H.expand(spec.num_heads, -1), k_norm_H.expand(spec.num_kv_heads, -1))
        qk_norm = norm(torch.cat(heads))
    is_last = layer == spec.num_layers - 1
    next_norm = "model.norm.weight" if is_last else f"model.layers.{layer + 1}.input_layernorm.weight"
    return DecoderLayer(
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", has_bias=spec.qkv_bias),
        qk_norm=qk_norm,
        o=linear("self_attn.o_proj", has_bias=spec.o_bias),
        post_attention_norm=norm(weights.pop(f"{prefix}post_attention_layernorm.weight")),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj", has_bias=spec.mlp_bias),
        down=linear("mlp.down_proj", has_bias=spec.mlp_bias),
        next_norm=norm(weights.pop(next_norm)),
    )

"""The decoder: rows of tokens in, hidden states and logits out, K and V into the pool.

It knows shapes, weights and ops; requests, lanes and sampling are the runner's. It holds nothing that a call writes, so
two lanes may run it at once on disjoint slots.

Shapes: T rows of a step, R rows whose logits are wanted, D model dim, F feed-forward dim, V vocabulary, N query heads,
K KV heads, E = N + 2K heads of the fused projection, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from semipd.kernels.ops import AttentionPlan, AttentionSpec, Ops, PackedHead, RMSNorm, StepContext
from semipd.model.layers import DecoderLayer, Embedding, GateUp, Linear, rotary_inv_freq
from semipd.model.spec import ModelSpec
from semipd.parallel.linear import (
    RowParallelLinear,
    RowParallelProducts,
    SequentialProduct,
    VocabParallelEmbedding,
    VocabParallelHead,
)

if TYPE_CHECKING:
    from torch import Tensor

    from semipd.parallel.group import TensorGroup


class Decoder:
    """A Llama-like decoder: RMS norm, rotary attention with grouped KV heads, gated SiLU feed-forward.

    `weights` has exactly the tensors that `families.expected_weights(spec)` names, all in the model's dtype. They are
    taken out of it one by one as they are packed, so that the weights are in memory once and a layer's twice.

    In a `group` each rank has its decoder, whose weights are the `families.weight_parts` of `spec`. All take the same
    steps, and all get the whole results. There `make_product` makes the products that are summed over the ranks.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        ops: Ops,
        group: TensorGroup | None = None,
        *,
        make_product: RowParallelProducts = SequentialProduct,
    ) -> None:
        embedding_VD = weights.pop("model.embed_tokens.weight")
        head_VD = embedding_VD if spec.tie_word_embeddings else weights.pop("lm_head.weight")
        head = ops.pack_head(head_VD, is_shared=spec.tie_word_embeddings)
        self._embed: Embedding | VocabParallelEmbedding
        self._head: PackedHead
        if group is None:
            self._embed, self._head = Embedding(embedding_VD, ops=ops), head
        else:
            self._embed = VocabParallelEmbedding(embedding_VD, ops=ops, group=group)
            self._head = VocabParallelHead(head, spec.vocab_size, group=group)
            spec = spec.shard(group.shard)
        self._num_heads, self._head_dim = spec.num_heads, spec.head_dim
        self.dtype = embedding_VD.dtype
        self.attention = AttentionSpec(
            windows=tuple(spec.window(layer) for layer in range(spec.num_layers)),
            scale=spec.head_dim**-0.5,
            inv_freq=rotary_inv_freq(spec, self.dtype, embedding_VD.device),
        )
        self._first_norm = ops.pack_rms_norm(weights.pop("model.layers.0.input_layernorm.weight"), spec.rms_norm_eps)
        self._layers = [_take_layer(spec, layer, weights, ops, group, make_product) for layer in range(spec.num_layers)]
        assert not weights, f"weights that the decoder does not use: {sorted(weights)}"

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self._layers)

    def forward(self, token_ids_T: Tensor, plan: AttentionPlan, context: StepContext) -> Tensor:
        """The normed last hidden state of every row, `[T, D]`, with K and V of the rows written to their slots."""
        return self._run(range(len(self._layers)), token_ids_T, plan, context)

    def warm_up(self, token_ids_T: Tensor, plan: AttentionPlan, context: StepContext) -> Tensor:
        """`forward` through one layer of each kind: the same kernels and memory, and a result of no meaning."""
        windows = self.attention.windows  # all that layers differ in, but for values
        return self._run([windows.index(window) for window in dict.fromkeys(windows)], token_ids_T, plan, context)

    def _run(self, layers: Iterable[int], token_ids_T: Tensor, plan: AttentionPlan, context: StepContext) -> Tensor:
        num_rows, num_heads = token_ids_T.shape[0], self._num_heads
        residual_TD = self._embed(token_ids_T, context)
        x_TD = self._first_norm(residual_TD, context)
        for index in layers:
            layer = self._layers[index]
            qkv_TEH = layer.qkv(x_TD, context).view(num_rows, -1, self._head_dim)
            plan.rotary_write_kv_(index, qkv_TEH, layer.qk_norm, context)
            attended = plan.attend(index, qkv_TEH.narrow(1, 0, num_heads), context)
            x_TD = layer.o.add_norm(residual_TD, attended, layer.post_attention_norm, context)
            x_TD = layer.down.add_norm(residual_TD, layer.gate_up(x_TD, context), layer.next_norm, context)
        return x_TD

    def compute_logits(self, hidden_RD: Tensor, context: StepContext) -> Tensor:
        """Logits `[R, V]`, in float32, or in float64 if that is the model's dtype."""
        return self._head(hidden_RD, context)


def _take_layer(
    spec: ModelSpec,
    layer: int,
    weights: dict[str, Tensor],
    ops: Ops,
    group: TensorGroup | None,
    make_product: RowParallelProducts,
) -> DecoderLayer:
    prefix = f"model.layers.{layer}."

    def take(*names: str, has_bias: bool) -> tuple[list[Tensor], list[Tensor]]:
        weights_OI = [weights.pop(f"{prefix}{name}.weight") for name in names]
        return weights_OI, [weights.pop(f"{prefix}{name}.bias") for name in names] if has_bias else []

    def take_row_parallel(name: str, *, has_bias: bool, half: int) -> Linear | RowParallelLinear:
        if group is None:
            return Linear(*take(name, has_bias=has_bias), ops=ops)
        (weight_OI,), biases_O = take(name, has_bias=has_bias and group.shard.rank == 0)
        bias_O = biases_O[0] if biases_O else None
        return RowParallelLinear(weight_OI, bias_O, ops=ops, group=group, half=half, make_product=make_product)

    def norm(weight: Tensor) -> RMSNorm:
        return ops.pack_rms_norm(weight, spec.rms_norm_eps)

    qk_norm = None
    if spec.qk_norm:
        q_norm_H = weights.pop(f"{prefix}self_attn.q_norm.weight")
        k_norm_H = weights.pop(f"{prefix}self_attn.k_norm.weight")
        qk_norm = ops.pack_qk_norm(q_norm_H, k_norm_H, spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps)
    is_last = layer == spec.num_layers - 1
    next_norm = "model.norm.weight" if is_last else f"model.layers.{layer + 1}.input_layernorm.weight"
    return DecoderLayer(
        qkv=Linear(*take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", has_bias=spec.qkv_bias), ops=ops),
        qk_norm=qk_norm,
        o=take_row_parallel("self_attn.o_proj", has_bias=spec.o_bias, half=0),
        post_attention_norm=norm(weights.pop(f"{prefix}post_attention_layernorm.weight")),
        gate_up=GateUp(*take("mlp.gate_proj", "mlp.up_proj", has_bias=spec.mlp_bias), ops=ops),
        down=take_row_parallel("mlp.down_proj", has_bias=spec.mlp_bias, half=1),
        next_norm=norm(weights.pop(next_norm)),
    )

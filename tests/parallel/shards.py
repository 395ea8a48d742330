"""What a rank has of each weight, said a second time: by cutting the whole into equal chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from semipd.config import Shard
from semipd.model.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


def shard_of(weights: Mapping[str, Tensor], spec: ModelSpec, shard: Shard) -> dict[str, Tensor]:
    """The shard of a whole model's weights, in their order."""
    rank, size = shard.rank, shard.world_size
    result = {}
    for name, weight in weights.items():
        match name.split(".")[-2:]:
            case ["embed_tokens" | "lm_head", _]:
                padded = weight.new_zeros(-(-spec.vocab_size // size) * size, spec.hidden_size)
                padded[: spec.vocab_size] = weight
                result[name] = padded.chunk(size)[rank]
            case ["q_proj" | "gate_proj" | "up_proj", _]:
                result[name] = weight.chunk(size)[rank]
            case ["k_proj" | "v_proj", _]:
                heads = weight.view(spec.num_kv_heads, spec.head_dim, *weight.shape[1:])
                copies = heads.repeat_interleave(max(1, size // spec.num_kv_heads), 0)
                result[name] = copies.chunk(size)[rank].flatten(0, 1)
            case ["o_proj" | "down_proj", "weight"]:
                result[name] = weight.chunk(size, 1)[rank]
            case ["o_proj" | "down_proj", "bias"]:
                if rank == 0:
                    result[name] = weight
            case _:
                result[name] = weight
    return {name: value.contiguous() for name, value in result.items()}

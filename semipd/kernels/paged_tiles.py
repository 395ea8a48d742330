"""What decode and prefill attention share: tiles of a context in the block pool, the online softmax, the reference.

Shapes: T query rows of one request, C tokens of its context, N query heads (of a block table: its entries), K KV heads,
H head dim, R slots of the pool; in kernels M query rows of a tile and N tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The maximum before the first score. It is finite, so that a row that sees nothing yet has weights of exactly 0:
# exp2(-inf - NO_SCORE), where -inf - -inf would be NaN.
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def tile_block_ids(
    table_ptr: tl.tensor, first: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The blocks of tokens from `first` on: one if a tile lies in one block, else one a token; 0 from `end` on.

    Loops load them one tile ahead and carry them. Where the load stands in front of those of K and V, the pipeliner
    gives it stages of its own, and K and V get a single buffer at 4 stages instead of three (triton 3.6).
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        positions_N = first + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + positions_N // BLOCK_SIZE, mask=positions_N < end, other=0)


@triton.jit
def tile_slots(block_ids: tl.tensor, first: tl.tensor, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The pool slots of the tile's tokens, in int64: a pool may hold more than 2^31 elements."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return block_ids.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE + tl.arange(0, BLOCK_N)
    else:
        return block_ids.to(tl.int64) * BLOCK_SIZE + (first + tl.arange(0, BLOCK_N)) % BLOCK_SIZE


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """`acc + a @ b` in float32; float32 operands stay what they are, not TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def softmax_step(scores_MN: tl.tensor, max_M: tl.tensor, scale: float) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The weights of a tile, the new maximum, and the factor of what was summed under the old one.

    `scale` is that of the scores times log2(e), and the maximum is of scaled scores: one multiply-add a score.
    """
    new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * scale)
    weights_MN = tl.exp2(scores_MN * scale - new_max_M[:, None])
    return weights_MN, new_max_M, tl.exp2(max_M - new_max_M)


def attend_reference(
    q_TNH: Tensor,
    kv_R2KH: Tensor,
    block_table_N: Tensor,
    start_position: int,
    block_size: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """The outputs of queries at positions from `start_position` on, at least in float32.

    A query at position p reads positions up to p, and with a window w only those above p - w.
    """
    end = start_position + q_TNH.shape[0]
    first = 0 if window is None else max(0, start_position - window + 1)
    positions_C = torch.arange(first, end, device=q_TNH.device)
    slots_C = block_table_N[positions_C // block_size].long() * block_size + positions_C % block_size
    dtype = torch.promote_types(q_TNH.dtype, torch.float32)
    num_queries_per_kv = 2 * q_TNH.shape[1] // kv_R2KH.shape[1]
    kv_CNH = kv_R2KH[slots_C].to(dtype).repeat_interleave(num_queries_per_kv, 1)
    k_CNH, v_CNH = kv_CNH.chunk(2, 1)
    scores_NTC = torch.einsum("tnh,cnh->ntc", q_TNH.to(dtype), k_CNH) * scale
    age_TC = torch.arange(start_position, end, device=q_TNH.device)[:, None] - positions_C
    is_hidden_TC = age_TC < 0 if window is None else (age_TC < 0) | (age_TC >= window)
    weights_NTC = scores_NTC.masked_fill_(is_hidden_TC, float("-inf")).softmax(-1)
    return torch.einsum("ntc,cnh->tnh", weights_NTC, v_CNH)

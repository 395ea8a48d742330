"""From the fused projection to attention in one pass: head norms, rotary embedding, and K and V into the pool.

A program takes one token and some KV heads with their query heads, so that the token's cosines and sines, which it
computes itself, serve them all. Everything is float32 from the load to the one rounding at the store.

Shapes: T rows of a step, N query heads, K KV heads, E = N + 2K heads of the fused projection (Q, K, V), H head dim, R
slots of the pool. 2K: the K heads, then the V heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import launch, wait_for_previous

# Query heads of one program at most, which is 32 of their values a thread.
_MAX_QUERY_HEADS = 16


def rotary_write_kv(
    qkv_TEH: Tensor,
    positions_T: Tensor,
    inv_freq: Tensor,
    kv_R2KH: Tensor,
    slot_mapping_T: Tensor,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates the Q heads of `qkv_TEH` in place and writes the rotated K heads and the V heads to their slots.

    With `q_norm_H` and `k_norm_H` each head is RMS-normed first. The pairs that rotate are the halves of a head, by
    `positions_T * inv_freq` radians, `inv_freq` `[H / 2]` in float32. The K and V heads of `qkv_TEH` stay as they are.
    A row whose slot is -1 writes nothing to the pool. Rows of `qkv_TEH` and `kv_R2KH` may be strided, heads not.
    """
    num_rows, num_all_heads, head_dim = qkv_TEH.shape
    num_kv_heads = kv_R2KH.shape[1] // 2
    num_heads = num_all_heads - 2 * num_kv_heads
    assert kv_R2KH.shape[2] == head_dim and inv_freq.shape == (head_dim // 2,)
    assert qkv_TEH.stride()[1:] == kv_R2KH.stride()[1:] == (head_dim, 1)
    assert num_heads % num_kv_heads == 0 and (q_norm_H is None) == (k_norm_H is None)
    half_block = triton.next_power_of_2(head_dim // 2)
    kv_heads = _kv_heads_per_program(num_heads, num_kv_heads)
    launch(_rotary_write_kv_kernel, (num_rows, num_kv_heads // kv_heads), pdl_on=qkv_TEH.device)(
        qkv_TEH,
        positions_T,
        inv_freq,
        kv_R2KH,
        slot_mapping_T,
        q_norm_H,
        k_norm_H,
        qkv_TEH.stride(0),
        kv_R2KH.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        KV_HEADS=kv_heads,
        Q_BLOCK=triton.next_power_of_2(kv_heads * num_heads // num_kv_heads),
        KV_BLOCK=triton.next_power_of_2(kv_heads),
        HALF_BLOCK=half_block,
        # One thread for each pair. With more threads than pairs the compiler lets every thread compute the cosines and
        # sines of all the columns that it rotates, 12 of each instead of one, rather than pass them on.
        num_warps=max(1, half_block // 32),
    )


def _kv_heads_per_program(num_heads: int, num_kv_heads: int) -> int:
    """The most KV heads, in equal parts, whose query heads fit into a program; a function of shapes only."""
    sizes = [size for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0]
    return max((size for size in sizes if size * num_heads // num_kv_heads <= _MAX_QUERY_HEADS), default=1)


def rotary_write_kv_reference(
    qkv_TEH: Tensor,
    positions_T: Tensor,
    inv_freq: Tensor,
    kv_R2KH: Tensor,
    slot_mapping_T: Tensor,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`rotary_write_kv` in plain torch."""
    num_kv_heads = kv_R2KH.shape[1] // 2
    num_heads = qkv_TEH.shape[1] - 2 * num_kv_heads
    dtype = torch.promote_types(qkv_TEH.dtype, torch.float32)
    q_TNH, k_TKH, v_TKH = qkv_TEH.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    angles = positions_T.to(dtype)[:, None, None] * inv_freq.to(dtype)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x_TNH: Tensor, norm_H: Tensor | None) -> Tensor:
        x_TNH = x_TNH.to(dtype)
        if norm_H is not None:
            x_TNH = x_TNH * torch.rsqrt(x_TNH.square().mean(-1, keepdim=True) + eps) * norm_H
        low, high = x_TNH.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    has_slot_T = slot_mapping_T >= 0
    written = torch.cat((rotated(k_TKH, k_norm_H).to(kv_R2KH.dtype), v_TKH.to(kv_R2KH.dtype)), 1)
    kv_R2KH[slot_mapping_T[has_slot_T].long()] = written[has_slot_T]
    q_TNH.copy_(rotated(q_TNH, q_norm_H))


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _rotary_write_kv_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    inv_freq_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    qkv_stride: int,
    kv_stride: int,
    eps: float,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_HEADS: tl.constexpr = KV_HEADS * (NUM_HEADS // NUM_KV_HEADS)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pairs = tl.arange(0, HALF_BLOCK)
    is_pair = pairs < HALF
    # Constants may be read before the wait.
    inv_freq = tl.load(inv_freq_ptr + pairs, mask=is_pair, other=0)
    if q_norm_ptr is not None:
        q_norm_low, q_norm_high = _load_halves(q_norm_ptr + pairs, is_pair, HALF)
        k_norm_low, k_norm_high = _load_halves(k_norm_ptr + pairs, is_pair, HALF)

    q_heads = tl.arange(0, Q_BLOCK)
    q_mask = (q_heads < Q_HEADS)[:, None] & is_pair[None, :]
    q_ptrs = qkv_ptr + row * qkv_stride + (part * Q_HEADS + q_heads)[:, None] * HEAD_DIM + pairs[None, :]
    kv_heads = tl.arange(0, KV_BLOCK)
    kv_mask = (kv_heads < KV_HEADS)[:, None] & is_pair[None, :]
    kv_offsets = (part * KV_HEADS + kv_heads)[:, None] * HEAD_DIM + pairs[None, :]
    k_ptrs = qkv_ptr + row * qkv_stride + NUM_HEADS * HEAD_DIM + kv_offsets

    wait_for_previous(USE_PDL)
    # All loads before the sines, whose branches the compiler does not move loads across.
    position = tl.load(positions_ptr + row).to(tl.float32)
    slot = tl.load(slot_mapping_ptr + row).to(tl.int64)
    q_low, q_high = _load_halves(q_ptrs, q_mask, HALF)
    k_low, k_high = _load_halves(k_ptrs, kv_mask, HALF)
    v_low, v_high = _load_halves(k_ptrs + NUM_KV_HEADS * HEAD_DIM, kv_mask, HALF)
    angles = position * inv_freq
    cos, sin = tl.cos(angles)[None, :], tl.sin(angles)[None, :]

    if q_norm_ptr is not None:
        q_low, q_high = _normed(q_low, q_high, q_norm_low, q_norm_high, eps, HEAD_DIM)
        k_low, k_high = _normed(k_low, k_high, k_norm_low, k_norm_high, eps, HEAD_DIM)
    tl.store(q_ptrs, q_low * cos - q_high * sin, mask=q_mask)
    tl.store(q_ptrs + HALF, q_high * cos + q_low * sin, mask=q_mask)
    pool_ptrs = kv_ptr + slot * kv_stride + kv_offsets
    pool_mask = kv_mask & (slot >= 0)
    tl.store(pool_ptrs, k_low * cos - k_high * sin, mask=pool_mask)
    tl.store(pool_ptrs + HALF, k_high * cos + k_low * sin, mask=pool_mask)
    tl.store(pool_ptrs + NUM_KV_HEADS * HEAD_DIM, v_low, mask=pool_mask)
    tl.store(pool_ptrs + NUM_KV_HEADS * HEAD_DIM + HALF, v_high, mask=pool_mask)


@triton.jit
def _load_halves(ptrs: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    low = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    high = tl.load(ptrs + HALF, mask=mask, other=0).to(tl.float32)
    return low, high


@triton.jit
def _normed(
    low: tl.tensor,
    high: tl.tensor,
    weight_low: tl.tensor,
    weight_high: tl.tensor,
    eps: float,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / HEAD_DIM + eps)[:, None]
    return low * scale * weight_low[None, :], high * scale * weight_high[None, :]

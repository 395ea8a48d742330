"""How the contexts of decode rows are cut into splits, the work items of `decode_attention`.

A context is cut by its length alone, into equal parts of whole tiles, so that no result depends on the other rows of a
step or on the number of SMs.

Shapes: B requests, N query heads, K KV heads, H head dim, W work items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import launch, wait_for_previous

ITEM_INTS = 8  # 32 bytes, one sector: what a CTA must know before it can load is one trip to memory away
MIN_WARP_TOKENS = 16  # of a tile, for each warp: the least that the tensor cores take
_PLAN_BLOCK = 1024  # requests that the plan takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How contexts are cut and how the kernel is compiled; `decode_config` has the table.

    Attributes:
        block_n: tokens of a tile, of which each warp has its own 16 or more.
        split_tokens: tokens of a split, before `max_splits` makes it longer; a multiple of `block_n`.
        max_splits: splits of one context at most. It bounds the merge, whose loads only one CTA makes.
        num_warps: warps of a CTA.
        num_stages: depth of the pipeline; it keeps one tile of K and V less than that.
        ctas_per_sm: CTAs that one SM holds.
    """

    block_n: int
    split_tokens: int
    max_splits: int = 32
    num_warps: int
    num_stages: int
    ctas_per_sm: int

    @property
    def max_registers(self) -> int:
        """Registers of a thread at most, if `ctas_per_sm` CTAs shall fit: an SM has 2^16, a thread 255."""
        return min(255, 2**16 // (32 * self.num_warps * self.ctas_per_sm) // 8 * 8)


def decode_config(head_dim: int, dtype: torch.dtype, *, num_rows: int = 8, has_tma: bool = True) -> DecodeConfig:
    """The configuration for a head dim and a dtype.

    With up to `num_rows` query rows of a KV head, `q_len` times its query heads: more than 8 need more registers. GPUs
    without the tensor memory accelerator, which is not used here, have less shared memory.
    """
    is_wide = head_dim > 128
    if dtype == torch.float32:  # without tensor cores; what matters is that it fits
        num_warps = 1 if is_wide else 2
        return DecodeConfig(block_n=16 * num_warps, split_tokens=512, num_warps=num_warps, num_stages=3, ctas_per_sm=1)
    if has_tma and 64 < head_dim <= 128 and num_rows <= 8:
        # An H100's decode step of 64 contexts of 1k: 9.43 ms, and 9.59 with the wider tiles and 4 warps of before
        # (`benchmarks/lanes.py`); the sweep of `benchmarks/attention.py` has this shape with splits of 256 only.
        return DecodeConfig(block_n=32, split_tokens=512, num_warps=2, num_stages=4, ctas_per_sm=4)
    num_warps = 2 if is_wide else 4
    ctas_per_sm = 1 if not has_tma else 2 if num_rows > 8 else 4 if head_dim <= 64 else 3
    return DecodeConfig(
        block_n=16 * num_warps, split_tokens=512, num_warps=num_warps, num_stages=3, ctas_per_sm=ctas_per_sm
    )


def max_decode_items(num_requests: int, max_context_len: int, config: DecodeConfig) -> int:
    """Work items that `num_requests` contexts of up to `max_context_len` tokens can have."""
    return num_requests * min(config.max_splits, -(-max_context_len // config.split_tokens))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeScratch:
    """What the CTAs of a launch pass to one another; any content before `plan_decode_splits`. One per lane.

    Attributes:
        partials_WNH: float32 outputs of splits, each normed by its own weights, `[W, q_len * N, H]`.
        lse_WN: log2 of the sum of the weights of each, float32 `[W, q_len * N]`.
        arrivals_BK: splits that are done, int32.
    """

    partials_WNH: Tensor
    lse_WN: Tensor
    arrivals_BK: Tensor

    @classmethod
    def create(
        cls,
        num_requests: int,
        max_items: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_len: int,
        device: torch.device | str,
    ) -> DecodeScratch:
        """New memory for steps of up to `num_requests` requests and `max_items` work items."""
        num_rows = q_len * num_heads
        return cls(
            partials_WNH=torch.empty(max_items, num_rows, head_dim, dtype=torch.float32, device=device),
            lse_WN=torch.empty(max_items, num_rows, dtype=torch.float32, device=device),
            arrivals_BK=torch.empty(num_requests, num_kv_heads, dtype=torch.int32, device=device),
        )


def plan_decode_splits(
    slots_B: Tensor,
    context_lens_B: Tensor,
    items_W8: Tensor,
    scratch: DecodeScratch,
    *,
    config: DecodeConfig,
    q_len: int = 1,
    window: int | None = None,
) -> None:
    """Lists the splits of a step's contexts, for all layers that have this window, and clears the arrivals.

    A request whose context length is 0 is padding and has none.

    Args:
        slots_B: the request slot of each request.
        context_lens_B: tokens of each context, those of its own query rows included.
        items_W8: the result, int32 `[1 + max_items, 8]`: the number of items, then the items. `max_decode_items` says
            how many there can be; those that do not fit are left out, and the rows of their requests not written.
        scratch: of the lane.
        config: as that of the launches that follow.
        q_len: query rows of each request.
        window: as that of the layers.
    """
    assert items_W8.is_contiguous() and items_W8.shape[1] == ITEM_INTS and scratch.arrivals_BK.is_contiguous()
    assert config.split_tokens % config.block_n == 0 and scratch.partials_WNH.shape[0] >= items_W8.shape[0] - 1
    launch(_plan_kernel, (1,), pdl_on=items_W8.device)(
        slots_B,
        context_lens_B,
        items_W8,
        scratch.arrivals_BK,
        slots_B.shape[0],
        items_W8.shape[0] - 1,
        NUM_KV_HEADS=scratch.arrivals_BK.shape[1],
        Q_LEN=q_len,
        WINDOW=window or 0,
        BLOCK_N=config.block_n,
        TILES_PER_SPLIT=config.split_tokens // config.block_n,
        MAX_SPLITS=config.max_splits,
        ITEM_INTS=ITEM_INTS,
        BLOCK=_PLAN_BLOCK,
        num_warps=8,
    )


@triton.jit(
    do_not_specialize=["num_requests", "max_items"],
    do_not_specialize_on_alignment=["slots_ptr", "context_lens_ptr"],
)
def _plan_kernel(
    slots_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    items_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    num_requests: int,
    max_items: int,
    NUM_KV_HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ITEM_INTS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    num_items = 0
    for base in range(0, num_requests, BLOCK):
        requests = base + tl.arange(0, BLOCK)
        mask = requests < num_requests
        slots = tl.load(slots_ptr + requests, mask=mask, other=0)
        ends = tl.load(context_lens_ptr + requests, mask=mask, other=0)
        begins = _first_tile(ends, Q_LEN, WINDOW, BLOCK_N)
        num_tiles = tl.cdiv(ends - begins, BLOCK_N)
        # Equal splits, in whole tiles.
        num_splits = tl.minimum(tl.cdiv(num_tiles, TILES_PER_SPLIT), MAX_SPLITS)
        split_tiles = tl.cdiv(num_tiles, tl.maximum(num_splits, 1))
        num_splits = tl.cdiv(num_tiles, tl.maximum(split_tiles, 1))
        first_items = num_items + tl.cumsum(num_splits, 0) - num_splits
        for split in range(tl.max(num_splits, 0)):
            items = first_items + split
            is_item = (split < num_splits) & (items < max_items)
            item_ptrs = items_ptr + (1 + items) * ITEM_INTS
            split_begins = begins + split * split_tiles * BLOCK_N
            tl.store(item_ptrs, requests, mask=is_item)
            tl.store(item_ptrs + 1, slots, mask=is_item)
            tl.store(item_ptrs + 2, split_begins, mask=is_item)
            tl.store(item_ptrs + 3, tl.minimum(split_begins + split_tiles * BLOCK_N, ends), mask=is_item)
            tl.store(item_ptrs + 4, ends, mask=is_item)
            tl.store(item_ptrs + 5, split, mask=is_item)
            tl.store(item_ptrs + 6, num_splits, mask=is_item)
        for head in range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + requests * NUM_KV_HEADS + head, 0, mask=mask)
        num_items += tl.sum(num_splits, 0)
    tl.store(items_ptr, tl.minimum(num_items, max_items))


@triton.jit
def _first_tile(context_lens: tl.tensor, Q_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The start of the first tile that the first query row reads."""
    if WINDOW == 0:
        return tl.zeros_like(context_lens)
    else:
        return tl.maximum(context_lens - Q_LEN - WINDOW + 1, 0) // BLOCK_N * BLOCK_N

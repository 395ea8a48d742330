"""Attention over the block pool in plain torch: how a step's contexts are read, decided once and used by every layer.

Decode rows of similar context length attend in one call, each row of a prompt chunk with the rest of its chunk. A call
reads its contexts where they lie if their blocks follow one another in the pool, and gathers them otherwise. Numbers
in comments: SmolLM2-135M, float32, the 30 layers of one step on a 2-core AVX-512 Xeon, torch 2.13.

Shapes: T rows of a step, B decode rows, G decode rows of one call, N query heads (of a block table: its entries), K KV
heads, Q = N / K query heads of one KV head, H head dim, L layers, C tokens of a context, P blocks of the pool, S slots
of a block, R = P * S slots of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semipd.kernels.ops import StepContext

# Decode rows share a call if their contexts differ by at most this much: one more call costs 20 us, as much as padding
# 70 to 130 tokens. 16 rows of 128 tokens: 9 ms in one call on two threads, 14 to 17 in 16 calls.
_MAX_PADDING = 128
# Rows of a prompt chunk that attend in one call under a mask. Bounds the mask, and what it hides but is computed.
_MAX_MASKED_ROWS = 512

_attention = F.scaled_dot_product_attention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillMetadata:
    """One prompt chunk: rows [row_start, row_start + num_rows) at positions from `start_position`.

    `block_table_N` names the blocks of positions [0, start_position + num_rows). Entries whose tokens are all behind
    every layer's window, and entries past the end, may be anything.
    """

    row_start: int
    num_rows: int
    start_position: int
    block_table_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionMetadata:
    """Where the rows of one step write and read the KV pool. All tensors are int64 on the model's device.

    Rows are the decodes, one each, then those of `prefills` in order and without gaps.

    Attributes:
        slot_mapping_T: the slot of each row's own K and V: block_id * block_size + offset; no two are equal.
        decode_block_table_BN: as `PrefillMetadata.block_table_N`; entries past a context's end may be anything.
        decode_context_lens_B: tokens of each decode row's context, its own included.
    """

    slot_mapping_T: Tensor
    num_decodes: int
    decode_block_table_BN: Tensor
    decode_context_lens_B: Tensor
    prefills: tuple[PrefillMetadata, ...] = ()


def layer_rows(kv_LPS2KH: Tensor) -> tuple[Tensor, ...]:
    """A view of each layer's pool with a row per slot, its K heads, then its V heads: `[R, 2K, H]`."""
    return kv_LPS2KH.flatten(3, 4).flatten(1, 2).unbind(0)


class PagedAttention:
    """The attention of one step.

    Attributes:
        layers_R2KH: see `layer_rows`.
    """

    def __init__(
        self, metadata: AttentionMetadata, kv_LPS2KH: Tensor, windows: Sequence[int | None], scale: float
    ) -> None:
        self.layers_R2KH = layer_rows(kv_LPS2KH)
        plans = {window: _WindowPlan(metadata, kv_LPS2KH, window, scale) for window in set(windows)}
        self._plans = [plans[window] for window in windows]

    def attend(self, layer: int, q_TNH: Tensor, context: StepContext) -> Tensor:
        """See `AttentionPlan.attend`."""
        return self._plans[layer].attend(layer, q_TNH)


@dataclass(frozen=True, slots=True, eq=False)
class _DecodeGroup:
    """Decode rows that attend in one call. `rows_G` is None when it is all of them; no mask, when none is padded."""

    rows_G: Tensor | None
    slots_GC: Tensor
    mask_G11C: Tensor | None

    @property
    def is_single(self) -> bool:
        """Whether it is one row. Its KV heads are the batch, so that the output's heads lie in order: no copy."""
        return self.slots_GC.shape[0] == 1


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """Rows [row_start, row_end) of the step, one chunk's, over tokens [first, end) of what the chunk reads."""

    row_start: int
    row_end: int
    first: int
    end: int
    is_causal: bool
    is_masked: bool


class _WindowPlan:
    """The calls of the layers that have one window."""

    def __init__(self, metadata: AttentionMetadata, kv_LPS2KH: Tensor, window: int | None, scale: float) -> None:
        self._scale = scale
        self._num_decodes = metadata.num_decodes
        self._num_kv_heads = kv_LPS2KH.shape[4]
        block_size = kv_LPS2KH.shape[2]
        self._groups = _decode_groups(metadata, window, block_size, kv_LPS2KH.dtype)
        grouped = [group.rows_G for group in self._groups if group.rows_G is not None]
        self._ungroup_B = torch.cat(grouped).argsort() if grouped else None

        self._tiles: list[tuple[_Tile, ...]] = []
        chunk_slots: list[Tensor] = []
        for chunk in metadata.prefills:
            first, end = _first_read(chunk.start_position, window), chunk.start_position + chunk.num_rows
            positions = torch.arange(first, end, device=kv_LPS2KH.device)
            chunk_slots.append(_slots(chunk.block_table_N[None], positions[None], block_size))
            self._tiles.append(tuple(_tiles(chunk.row_start, chunk.num_rows, chunk.start_position, first, window)))
        self._mask = _mask([tile for tiles in self._tiles for tile in tiles], window, kv_LPS2KH)
        swaps = [group.is_single for group in self._groups] + [False] * len(chunk_slots)
        self._place([group.slots_GC for group in self._groups] + chunk_slots, swaps, kv_LPS2KH)

    def _place(self, reads: Sequence[Tensor], swaps: Sequence[bool], kv_LPS2KH: Tensor) -> None:
        """Make the views of K and V that each read has in every layer, and the gather that must come before.

        They are `[G, K, C, H]`, or `[K, 1, C, H]` where `swaps` says so.
        """
        num_layers, _, _, _, num_kv_heads, head_dim = kv_LPS2KH.shape
        starts = [_run_start(slots_GC) for slots_GC in reads]
        gathers = [slots_GC.flatten() for slots_GC, start in zip(reads, starts, strict=True) if start is None]
        self._layers_R2KH = layer_rows(kv_LPS2KH)
        # One buffer for all layers of the step, so that its views are made once.
        self._gather_index = torch.cat(gathers) if gathers else None
        self._gathered = kv_LPS2KH.new_empty(sum(map(len, gathers)), 2 * num_kv_heads, head_dim)

        views: list[Sequence[tuple[Tensor, Tensor]]] = []
        pool_2LRKH = kv_LPS2KH.flatten(1, 2).permute(2, 0, 1, 3, 4)
        offset = 0
        for slots_GC, start, is_swapped in zip(reads, starts, swaps, strict=True):
            num_rows, length = slots_GC.shape
            if start is None:
                rows = self._gathered[offset : offset + num_rows * length]
                kv_2GKCH = rows.view(num_rows, length, 2, num_kv_heads, head_dim).permute(2, 0, 3, 1, 4)
                k, v = (kv_2GKCH.transpose(1, 2) if is_swapped else kv_2GKCH).unbind(0)
                views.append([(k, v)] * num_layers)
                offset += num_rows * length
            else:
                kv_2LKCH = pool_2LRKH.narrow(2, start, length).transpose(2, 3)
                k, v = kv_2LKCH.unsqueeze(3 if is_swapped else 2).unbind(0)
                views.append(list(zip(k.unbind(0), v.unbind(0), strict=True)))
        self._kv = list(zip(*views, strict=True))

    def attend(self, layer: int, q_TNH: Tensor) -> Tensor:
        if self._gather_index is not None:
            torch.index_select(self._layers_R2KH[layer], 0, self._gather_index, out=self._gathered)
        kv = self._kv[layer]
        num_groups = len(self._groups)
        if not self._tiles:
            return self._decode(q_TNH, kv)
        outputs = [self._decode(q_TNH[: self._num_decodes], kv[:num_groups])] if num_groups else []
        for tiles, (k, v) in zip(self._tiles, kv[num_groups:], strict=True):
            outputs += [self._prefill(tile, q_TNH[tile.row_start : tile.row_end], k, v) for tile in tiles]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, q_BNH: Tensor, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        num_rows, num_heads, head_dim = q_BNH.shape
        # The query heads of one KV head are the rows of its attention: K and V are read once, and never repeated.
        q_BKQH = q_BNH.view(num_rows, self._num_kv_heads, -1, head_dim)
        outputs = []
        for group, (k, v) in zip(self._groups, kv, strict=True):
            q_GKQH = q_BKQH if group.rows_G is None else q_BKQH[group.rows_G]
            q = q_GKQH.transpose(0, 1) if group.is_single else q_GKQH
            out = _attention(q, k, v, group.mask_G11C, scale=self._scale)
            outputs.append(out.reshape(-1, num_heads * head_dim))
        return outputs[0] if self._ungroup_B is None else torch.cat(outputs)[self._ungroup_B]

    def _prefill(self, tile: _Tile, q_TNH: Tensor, k_1KCH: Tensor, v_1KCH: Tensor) -> Tensor:
        k_1KCH, v_1KCH = k_1KCH[:, :, tile.first : tile.end], v_1KCH[:, :, tile.first : tile.end]
        mask = self._mask[-q_TNH.shape[0] :, tile.first - tile.end :] if tile.is_masked else None
        q_1NTH = q_TNH.transpose(0, 1)[None]
        out_1NTH = _attention(
            q_1NTH, k_1KCH, v_1KCH, mask, is_causal=tile.is_causal, scale=self._scale, enable_gqa=True
        )
        return out_1NTH[0].transpose(0, 1).flatten(1)


def _first_read(position: int, window: int | None) -> int:
    """The first position that a query at `position` reads."""
    return 0 if window is None else max(0, position - window + 1)


def _slots(table_GN: Tensor, positions_GC: Tensor, block_size: int) -> Tensor:
    """The slots of tokens, `[G, C]`."""
    return table_GN.gather(1, positions_GC // block_size) * block_size + positions_GC % block_size


def _run_start(slots_GC: Tensor) -> int | None:
    """The first slot of one context that lies in the pool in order; None for anything else."""
    num_rows, length = slots_GC.shape
    start = int(slots_GC[0, 0])
    if num_rows == 1 and torch.equal(slots_GC[0], torch.arange(start, start + length, device=slots_GC.device)):
        return start
    return None


def _decode_groups(
    metadata: AttentionMetadata, window: int | None, block_size: int, dtype: torch.dtype
) -> list[_DecodeGroup]:
    num_decodes = metadata.num_decodes
    if num_decodes == 0:
        return []
    table_BN = metadata.decode_block_table_BN[:num_decodes]
    end_B = metadata.decode_context_lens_B[:num_decodes]
    first_B = torch.zeros_like(end_B) if window is None else (end_B - window).clamp_(min=0)
    lengths = (end_B - first_B).tolist()
    parts = _similar(lengths)
    groups = []
    for rows in parts:
        rows_G = None if len(parts) == 1 else torch.tensor(rows, device=table_BN.device)
        table_GN, first_G, end_G = (x if rows_G is None else x[rows_G] for x in (table_BN, first_B, end_B))
        longest = max(lengths[row] for row in rows)
        positions_GC = first_G[:, None] + torch.arange(longest, device=table_BN.device)
        mask = None
        if any(lengths[row] != longest for row in rows):
            is_padding = positions_GC >= end_G[:, None]
            mask = torch.zeros(is_padding.shape, dtype=dtype, device=table_BN.device)
            mask = mask.masked_fill_(is_padding, float("-inf"))[:, None, None]
        # Padding reads the row's own last token, which is written: what others left in the pool may be NaN, which a
        # probability of 0 would not hide.
        slots_GC = _slots(table_GN, torch.minimum(positions_GC, end_G[:, None] - 1), block_size)
        groups.append(_DecodeGroup(rows_G, slots_GC, mask))
    return groups


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of `lengths` in groups that differ by at most `_MAX_PADDING`."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[groups[-1][0]] - lengths[row] <= _MAX_PADDING:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _tiles(row_start: int, num_rows: int, start_position: int, first: int, window: int | None) -> list[_Tile]:
    """The calls of a chunk that reads from position `first` on."""
    if num_rows == 1 or (start_position == 0 and (window is None or window >= num_rows)):
        end = start_position + num_rows - first
        return [_Tile(row_start, row_start + num_rows, 0, end, is_causal=num_rows > 1, is_masked=False)]
    tiles = []
    for row in range(0, num_rows, _MAX_MASKED_ROWS):
        end_row = min(row + _MAX_MASKED_ROWS, num_rows)
        tile_first, tile_end = _first_read(start_position + row, window) - first, start_position + end_row - first
        tile = _Tile(row_start + row, row_start + end_row, tile_first, tile_end, is_causal=False, is_masked=True)
        tiles.append(tile)
    return tiles


def _mask(tiles: Sequence[_Tile], window: int | None, like: Tensor) -> Tensor:
    """An additive mask whose lower right corner serves each masked tile: last row and last token are one position."""
    masked = [tile for tile in tiles if tile.is_masked]
    if not masked:
        return like.new_empty(0, 0)
    num_rows = max(tile.row_end - tile.row_start for tile in masked)
    length = max(tile.end - tile.first for tile in masked)
    age = torch.arange(length - num_rows, length)[:, None] - torch.arange(length)
    is_hidden = age < 0 if window is None else (age < 0) | (age >= window)
    return like.new_zeros(num_rows, length).masked_fill_(is_hidden.to(like.device), float("-inf"))

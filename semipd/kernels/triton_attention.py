"""The attention plan of a step on a GPU: everything that varies from step to step is read from device memory.

Shapes: T rows of a step, B decode rows, N query heads, E = N + 2K heads of the fused projection, H head dim, X request
slots (the last is the null slot), G tiles of prompt rows. Of a block table, N is its entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.kernels.decode_attention import decode_attention
from semipd.kernels.decode_splits import DecodeScratch, decode_config, max_decode_items, plan_decode_splits
from semipd.kernels.ops import AttentionSpec, QKNorm, StepContext
from semipd.kernels.paged_attention import layer_rows
from semipd.kernels.prefill_attention import PrefillConfig, prefill_attention
from semipd.kernels.rotary import rotary_write_kv
from semipd.kernels.triton_ops import TritonQKNorm
from semipd.kernels.triton_util import has_tma

_ITEM_INTS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceMetadata:
    """Where the rows of a step read and write the pool; int32 on the device, at the step's padded sizes.

    Attributes:
        positions_T: of every row; small for padding.
        slot_mapping_T: the pool slot of each row's own K and V; -1 for padding, which writes none.
        block_table_XN: the blocks of every request slot.
        decode_slots_B: request slots of the first rows, as far as these may be decodes; there may be more than rows.
        decode_context_lens_B: tokens of their contexts, the own ones included; 0 for rows that are none.
        prefill_tiles_G4: by `prefill_tiles`.
    """

    positions_T: Tensor
    slot_mapping_T: Tensor
    block_table_XN: Tensor
    decode_slots_B: Tensor
    decode_context_lens_B: Tensor
    prefill_tiles_G4: Tensor


class TritonPlan:
    """The `AttentionPlan` of one step; launches what all layers share."""

    def __init__(
        self,
        metadata: DeviceMetadata,
        kv_LPS2KH: Tensor,
        spec: AttentionSpec,
        *,
        num_heads: int,
        prefill: PrefillConfig,
        context: StepContext,
    ) -> None:
        self._prefill = prefill
        self._metadata = metadata
        self._spec = spec
        self._block_size = kv_LPS2KH.shape[2]
        self._layers_R2KH = layer_rows(kv_LPS2KH)
        self._items: dict[int | None, Tensor] = {}
        if len(metadata.decode_slots_B):
            self._plan_decodes(kv_LPS2KH, num_heads, context)

    def _plan_decodes(self, kv_LPS2KH: Tensor, num_heads: int, context: StepContext) -> None:
        """List the splits of the contexts, once for each window that layers have."""
        metadata = self._metadata
        num_kv_heads, head_dim = kv_LPS2KH.shape[4:]
        num_rows = num_heads // num_kv_heads
        self._config = decode_config(head_dim, kv_LPS2KH.dtype, num_rows=num_rows, has_tma=has_tma(kv_LPS2KH.device))
        max_decodes = len(metadata.decode_slots_B)
        longest = metadata.block_table_XN.shape[1] * self._block_size
        max_items = max_decode_items(max_decodes, longest, self._config)
        self._scratch = DecodeScratch(
            partials_WNH=context.buffer(
                "attention_partials", (max_items, num_heads, head_dim), kv_LPS2KH, torch.float32
            ),
            lse_WN=context.buffer("attention_lse", (max_items, num_heads), kv_LPS2KH, torch.float32),
            arrivals_BK=context.buffer("attention_arrivals", (max_decodes, num_kv_heads), kv_LPS2KH, torch.int32),
        )
        for window in dict.fromkeys(self._spec.windows):
            name = f"attention_items_{window}"
            self._items[window] = context.buffer(name, (1 + max_items, _ITEM_INTS), kv_LPS2KH, torch.int32)
            plan_decode_splits(
                metadata.decode_slots_B,
                metadata.decode_context_lens_B,
                self._items[window],
                self._scratch,
                config=self._config,
                window=window,
            )

    def rotary_write_kv_(self, layer: int, qkv_TEH: Tensor, qk_norm: QKNorm | None, context: StepContext) -> None:
        """See `AttentionPlan.rotary_write_kv_`; the K heads of `qkv_TEH` stay as they are."""
        assert qk_norm is None or isinstance(qk_norm, TritonQKNorm)
        rotary_write_kv(
            qkv_TEH,
            self._metadata.positions_T,
            self._spec.inv_freq,
            self._layers_R2KH[layer],
            self._metadata.slot_mapping_T,
            q_norm_H=None if qk_norm is None else qk_norm.q_norm_H,
            k_norm_H=None if qk_norm is None else qk_norm.k_norm_H,
            eps=0.0 if qk_norm is None else qk_norm.eps,
        )

    def attend(self, layer: int, q_TNH: Tensor, context: StepContext) -> Tensor:
        """See `AttentionPlan.attend`; rows of padding hold anything."""
        num_rows, num_heads, head_dim = q_TNH.shape
        out_TNH = context.buffer("attended", (num_rows, num_heads, head_dim), q_TNH)
        window = self._spec.windows[layer]
        if self._items:
            decode_attention(
                q_TNH,
                self._layers_R2KH[layer],
                self._metadata.block_table_XN,
                self._items[window],
                self._scratch,
                out_TNH,
                block_size=self._block_size,
                scale=self._spec.scale,
                config=self._config,
                num_sms=context.num_sms,
                window=window,
            )
        if len(self._metadata.prefill_tiles_G4):
            prefill_attention(
                q_TNH,
                self._layers_R2KH[layer],
                self._metadata.block_table_XN,
                self._metadata.prefill_tiles_G4,
                out_TNH,
                block_size=self._block_size,
                scale=self._spec.scale,
                config=self._prefill,
                num_sms=context.num_sms,
                window=window,
            )
        return out_TNH.flatten(1)

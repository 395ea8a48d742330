"""The op table: every tensor operation that a decoder needs, as one Protocol with a registry of lazy creators.

`kernels/reference.py` is the specification in plain torch and the CPU backend. An op table holds no state that a call
writes, so two lanes may call it at once; what a step shares between its layers lives in the step's `AttentionPlan`.

Shapes: T rows of a step (packed tokens), B decode rows, D model dim, F feed-forward dim, N query heads (of a block
table: its entries), K KV heads, E = N + 2K heads of the fused projection, H head dim, I inputs, O outputs, L layers, P
blocks of the pool, S slots of a block, R = P * S slots of the pool. 2K: the K heads, then the V heads, as neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from semipd.errors import ConfigError

PackedLinear = Callable[[Tensor], Tensor]


class RMSNorm(Protocol):
    """A norm with its weight; made by `Ops.pack_rms_norm`."""

    def __call__(self, x_TD: Tensor) -> Tensor:
        """`x_TD` normed."""
        ...

    def add_(self, residual_TD: Tensor, x_TD: Tensor) -> Tensor:
        """Adds `x_TD` to `residual_TD` in place and returns the sum normed."""
        ...


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryTable:
    """Cosines and sines of a step's positions over the full head dim, in the model's dtype, shared by all layers.

    The sign of the half rotation is in the sine: rotated = x * cos + roll(x, H / 2) * sin.
    """

    cos_T1H: Tensor
    sin_T1H: Tensor


class AttentionPlan(Protocol):
    """What the layers of one step share; made by `Ops.plan_attention` and valid for that step alone."""

    def attend(self, layer: int, q_TNH: Tensor) -> Tensor:
        """Attention outputs `[T, N * H]` of `layer`, whose K and V of this step are written.

        A query at position p reads positions up to p, and with a window w only those above p - w.
        """
        ...


class Ops(Protocol):
    """The operations of a decoder. A name that ends in an underscore mutates its first argument or the pool."""

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None, *, is_shared: bool = False) -> PackedLinear:
        """`x_TI -> x_TI @ weight_OI.T + bias_O` on weights laid out once for this device.

        With `is_shared` the caller keeps `weight_OI` for another use: it is used as it is and not copied.
        """
        ...

    def pack_rms_norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        """`x / sqrt(mean(x * x) + eps) * weight_D` over the last dim, computed at least in float32.

        Leading dims, and a weight that broadcasts over them, are free: heads are normed as `[T, N, H]` by `[N, H]`.
        """
        ...

    def rotary_table(self, positions_T: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> RotaryTable:
        """The table of `positions_T` in `dtype`, computed in the precision of `inv_freq` `[H / 2]`."""
        ...

    def rotary_write_kv_(self, qkv_TEH: Tensor, table: RotaryTable, kv_R2KH: Tensor, slot_mapping_T: Tensor) -> None:
        """Rotates the Q and K heads of `qkv_TEH` in place and writes the K and V heads to their slots.

        The pairs that rotate are the halves of a head. `kv_R2KH` is one layer's pool, `[R, 2K, H]`.
        """
        ...

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """`silu(gate) * up` of `gate_up_TF` `[T, 2F]`, whose first half is the gate: `[T, F]`."""
        ...

    def plan_attention(
        self, metadata: AttentionMetadata, kv_LPS2KH: Tensor, windows: Sequence[int | None], scale: float
    ) -> AttentionPlan:
        """The step's plan over the pool of all layers; `windows` has one entry a layer."""
        ...


def _create_reference() -> Ops:
    from semipd.kernels.reference import ReferenceOps

    return ReferenceOps()


_CREATORS: Mapping[str, Callable[[], Ops]] = MappingProxyType({"reference": _create_reference})


def create_ops(name: str) -> Ops:
    """The op table called `name`.

    Raises:
        ConfigError: no table has that name; the message lists those that exist.
    """
    creator = _CREATORS.get(name)
    if creator is None:
        raise ConfigError(f"op table is {name!r}; expected one of {', '.join(sorted(_CREATORS))}")
    return creator()

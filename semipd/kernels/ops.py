"""The op table: every tensor operation that a decoder needs, as one Protocol with a registry of lazy creators.

`kernels/reference.py` is the specification in plain torch and the CPU backend. An op table holds no state that a call
writes, so two lanes may call it at once: what a step shares between its layers lives in its `AttentionPlan`, and what
passes between its kernels in the memory of its `StepContext`.

Shapes: T rows of a step (packed tokens), B decode rows, D model dim, F feed-forward dim, N query heads (of a block
table: its entries), K KV heads, E = N + 2K heads of the fused projection, H head dim, I inputs, O outputs, L layers, P
blocks of the pool, S slots of a block, R = P * S slots of the pool. 2K: the K heads, then the V heads, as neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from semipd.config import Phase
from semipd.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """Where a step runs: its share of the device, and the memory for what passes between its kernels.

    Attributes:
        num_sms: SMs of the step's partition; kernels size their grids by it.
        buffers: the lane's static memory; without it results are allocated.
        phase: the lane's.
        peers: the lane's sums over ranks that share memory; None without.
        is_warm_up: results have no meaning, and every kernel that a later step may choose is launched.
    """

    num_sms: int
    buffers: Buffers | None = None
    phase: Phase = Phase.DECODE
    peers: PeerSums | None = None
    is_warm_up: bool = False

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device and, unless given, of the dtype of `like`; the lane's, if it has any.

        The next call with this `name` in the lane returns the same memory as it was left. It begins as zeros.
        """
        dtype = dtype or like.dtype
        if self.buffers is None:
            return torch.zeros(shape, dtype=dtype, device=like.device)
        return self.buffers.get(name, shape, dtype)


class Buffers(Protocol):
    """Named memory of one lane."""

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory called `name`, contiguous in `shape`."""
        ...


class PeerSums(Protocol):
    """Sums over ranks that write each other's memory.

    Attributes:
        max_rows: up to which they are faster than a collective; the same on all ranks.
    """

    max_rows: int

    def add_norm(
        self, residual_TD: Tensor, partial_TD: Tensor, norm: RMSNorm, context: StepContext, *, half: int
    ) -> Tensor:
        """Adds the `partial_TD` of all ranks to the residual; the residual normed, of the same bits on each.

        The residual of some rows may be kept up on one rank alone, always the same for as many rows.

        Args:
            half: 0 and 1 in turn, of all calls in the lane.
        """
        ...


class RMSNorm(Protocol):
    """A norm with its weight; made by `Ops.pack_rms_norm`."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        """`x_TD` normed; in the lane's buffer of normed rows, which it overwrites."""
        ...


class QKNorm(Protocol):
    """Norms of the query and key heads; made by `Ops.pack_qk_norm` for that table's `AttentionPlan`."""


class PackedHead(Protocol):
    """The matmul to logits; made by `Ops.pack_head`."""

    def __call__(self, x_RD: Tensor, context: StepContext) -> Tensor:
        """Logits `[R, V]` of `x_RD`."""
        ...


class PackedLinear(Protocol):
    """A matmul with its weight; made by `Ops.pack_linear`."""

    def __call__(self, x_TI: Tensor, context: StepContext) -> Tensor:
        """`x_TI @ weight_OI.T + bias_O`."""
        ...

    def add_(self, residual_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """Adds the product to `residual_TO` in place."""
        ...

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """Overwrites `out_TO` with the product."""
        ...


class PackedGateUp(Protocol):
    """The first half of a gated feed-forward; made by `Ops.pack_gate_up`."""

    def __call__(self, x_TD: Tensor, context: StepContext) -> Tensor:
        """`silu(gate) * up` of the projections of `x_TD`: `[T, F]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionSpec:
    """What attention is in a model.

    Attributes:
        windows: the sliding window of each layer; None reads everything before.
        scale: of the scores.
        inv_freq: radians per position of each rotating pair, `[H / 2]`.
    """

    windows: tuple[int | None, ...]
    scale: float
    inv_freq: Tensor


class AttentionPlan(Protocol):
    """What the layers of one step share; valid for that step alone."""

    def rotary_write_kv_(self, layer: int, qkv_TEH: Tensor, qk_norm: QKNorm | None, context: StepContext) -> None:
        """Norms and rotates the Q and K heads of `qkv_TEH` and writes the K and V heads to the pool of `layer`.

        The pairs that rotate are the halves of a head. The Q heads of `qkv_TEH` are changed in place; what becomes of
        its other heads is up to the table.
        """
        ...

    def attend(self, layer: int, q_TNH: Tensor, context: StepContext) -> Tensor:
        """Attention outputs `[T, N * H]` of `layer`, whose K and V of this step are written.

        A query at position p reads positions up to p, and with a window w only those above p - w.
        """
        ...


class Ops(Protocol):
    """The operations of a decoder. A name that ends in an underscore mutates its first argument or the pool."""

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """A linear map on weights laid out once for this device."""
        ...

    def pack_head(self, weight_VD: Tensor, *, is_shared: bool) -> PackedHead:
        """The map to logits, which are in float32, or in float64 if the weight is.

        With `is_shared` the caller keeps `weight_VD` for the embedding: it is used as it is and not copied.
        """
        ...

    def pack_gate_up(self, gate_up_2FD: Tensor, bias_2F: Tensor | None) -> PackedGateUp:
        """The gate's projection, then the up projection, stacked along their outputs."""
        ...

    def pack_rms_norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        """`x / sqrt(mean(x * x) + eps) * weight_D` over the last dim, computed at least in float32."""
        ...

    def pack_qk_norm(self, q_norm_H: Tensor, k_norm_H: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> QKNorm:
        """The same over each head, with one weight for the `num_heads` of Q and one for the `num_kv_heads` of K."""
        ...

    def embed(
        self, token_ids_T: Tensor, embedding_VD: Tensor, context: StepContext, first_id: int | None = None
    ) -> Tensor:
        """The rows of `embedding_VD`, `[T, D]`, in memory that the step may change.

        With `first_id` they are part of a table, those of the ids from it on, and ids outside of the part give zeros.
        """
        ...


def _create_reference() -> Ops:
    from semipd.kernels.reference import ReferenceOps

    return ReferenceOps()


def _create_triton() -> Ops:
    from semipd.kernels.triton_ops import TritonOps

    return TritonOps()


_CREATORS: Mapping[str, Callable[[], Ops]] = MappingProxyType(
    {"reference": _create_reference, "triton": _create_triton}
)


def create_ops(name: str) -> Ops:
    """The op table called `name`.

    Raises:
        ConfigError: no table has that name; the message lists those that exist.
    """
    creator = _CREATORS.get(name)
    if creator is None:
        raise ConfigError(f"op table is {name!r}; expected one of {', '.join(sorted(_CREATORS))}")
    return creator()

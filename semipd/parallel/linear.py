"""The parts of a decoder whose weights lie on several ranks and whose results every rank needs whole.

A rank's weights are a part of each matrix. Those that read the residual (q, k, v, gate, up) are split by outputs: a
rank computes its heads and features by a plain `Linear`, and nothing passes between ranks. Those that add to the
residual (o, down) are split by inputs, which are just those heads and features, and their products are summed:

    residual + x @ W.T + b = (residual + x_0 @ W_0.T + b) + x_1 @ W_1.T + ... + x_r @ W_r.T

The residual rides along: rank 0 adds its product, the others overwrite theirs, and one all-reduce in place leaves the
sum, of the same bits, on every rank. There is no further pass over memory. Of few rows the ranks of one host sum the
products, add the residual and norm it in one kernel, by memory that they share.

Shapes: T rows of a step, R rows whose logits are wanted, D model dim, I inputs (of this rank), O outputs, V vocabulary,
U rows of the vocabulary on each rank, W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from semipd.kernels.ops import Ops, PackedHead, RMSNorm, StepContext

if TYPE_CHECKING:
    from torch import Tensor

    from semipd.parallel.group import TensorGroup


class RowParallelProduct(Protocol):
    """A rank's product of a row-parallel weight, and the sum over the ranks."""

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        """Leaves in `residual_TO`, on every rank, what rank 0 has there and the products of all; that normed."""
        ...

    def write_(self, out_TO: Tensor, x_TI: Tensor, context: StepContext) -> None:
        """Overwrites `out_TO` with this rank's product alone."""
        ...


class RowParallelProducts(Protocol):
    """Makes the product of one weight for a rank of `group`, of which rank 0 has the residual that counts."""

    def __call__(
        self, weight_OI: Tensor, bias_O: Tensor | None, *, ops: Ops, group: TensorGroup
    ) -> RowParallelProduct: ...


class SequentialProduct:
    """The whole product, then one all-reduce."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, ops: Ops, group: TensorGroup) -> None:
        packed = ops.pack_linear(weight_OI, bias_O)
        self.write_ = packed.write_
        self._multiply = packed.add_ if group.shard.rank == 0 else packed.write_
        self._group = group

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        """See `RowParallelProduct`."""
        self._multiply(residual_TO, x_TI, context)
        self._group.communicator(context.phase).all_reduce_(residual_TO)
        return norm(residual_TO, context)


class RowParallelLinear:
    """`residual_TO += x_TI @ weight_OI.T + bias_O`, summed over the inputs of all ranks; rank 0 alone has the bias.

    Args:
        half: of the ranks' inboxes, which the layers of a model use in turn.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None = None,
        *,
        ops: Ops,
        group: TensorGroup,
        half: int = 0,
        make_product: RowParallelProducts = SequentialProduct,
    ) -> None:
        assert bias_O is None or group.shard.rank == 0, "the bias is added once"
        self._half = half
        self._product = make_product(weight_OI, bias_O, ops=ops, group=group)

    def add_norm(self, residual_TO: Tensor, x_TI: Tensor, norm: RMSNorm, context: StepContext) -> Tensor:
        """Adds the outputs of every row to `residual_TO`, the same on all ranks; the new residual normed."""
        peers = context.peers
        num_rows, num_outputs = residual_TO.shape
        if peers is None or num_rows > peers.max_rows:
            return self._product.add_norm(residual_TO, x_TI, norm, context)
        partial_TO = context.buffer("partial_sums", (peers.max_rows, num_outputs), residual_TO)[:num_rows]
        self._product.write_(partial_TO, x_TI, context)
        return peers.add_norm(residual_TO, partial_TO, norm, context, half=self._half)


class VocabParallelEmbedding:
    """The rows of a table by token id; a rank has the rows `[rank * U, (rank + 1) * U)`."""

    def __init__(self, embedding_UD: Tensor, *, ops: Ops, group: TensorGroup) -> None:
        self._embedding_UD = embedding_UD
        self._first_id = group.shard.rank * len(embedding_UD)
        self._ops = ops
        self._group = group

    def __call__(self, token_ids_T: Tensor, context: StepContext) -> Tensor:
        """The rows, `[T, D]`, on every rank."""
        rows_TD = self._ops.embed(token_ids_T, self._embedding_UD, context, self._first_id)
        self._group.communicator(context.phase).all_reduce_(rows_TD)  # exact: all but one rank have zeros
        return rows_TD


class VocabParallelHead:
    """Logits of the whole vocabulary, from each rank's for its rows; those of padding rows are left out.

    Args:
        head: of this rank's rows, as many as on every rank.
        vocab_size: of all.
    """

    def __init__(self, head: PackedHead, vocab_size: int, *, group: TensorGroup) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._group = group

    def __call__(self, x_RD: Tensor, context: StepContext) -> Tensor:
        """Logits `[R, V]` on every rank; their rows may be strided."""
        logits_RU = self._head(x_RD, context)
        num_rows, size = logits_RU.shape
        world_size = self._group.shard.world_size
        gathered_WRU = context.buffer("gathered_logits", (world_size, num_rows, size), logits_RU)
        self._group.communicator(context.phase).all_gather(gathered_WRU.flatten(0, 1), logits_RU)
        whole_RWU = context.buffer("whole_logits", (num_rows, world_size, size), logits_RU)
        whole_RWU.copy_(gathered_WRU.transpose(0, 1))
        return whole_RWU.flatten(1)[:, : self._vocab_size]

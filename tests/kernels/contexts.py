"""Contexts in a block pool of NaN, and what attention over them is in float64: the oracle of the attention kernels.

Shapes: T query rows, C tokens of a context, N query heads, K KV heads, H head dim, R pool slots, X request slots.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from semipd.kernels.triton_util import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GARBAGE = 10**9  # a block id that would be an error to read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads and where they lie."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


class Contexts:
    """Contexts by (length, query rows) in a shuffled pool, which is NaN where `window` hides a token or none is.

    The request slots are shuffled too; the last row of the table is the null request's.
    """

    def __init__(self, heads: Heads, sizes: Sequence[tuple[int, int]], window: int | None, seed: int = 0) -> None:
        self.heads, self.sizes, self.window = heads, sizes, window
        self.generator = torch.Generator().manual_seed(seed)
        rng, block_size = random.Random(seed), heads.block_size
        counts = [-(-length // block_size) for length, _ in sizes]
        block_ids = rng.sample(range(sum(counts) + 3), sum(counts))
        num_blocks, max_blocks = sum(counts) + 3, max(counts) + 1
        self.slots = rng.sample(range(len(sizes) + 2), len(sizes))
        table = torch.full((len(sizes) + 3, max_blocks), GARBAGE, dtype=torch.int32)
        kv = torch.full((num_blocks * block_size, 2 * heads.num_kv_heads, heads.head_dim), math.nan, dtype=heads.dtype)
        self._contexts: list[Tensor] = []
        for (length, num_rows), slot, count in zip(sizes, self.slots, counts, strict=True):
            ids = [block_ids.pop() for _ in range(count)]
            first = 0 if window is None else max(0, length - num_rows - window + 1)
            context_C2KH = self.randn(length, 2 * heads.num_kv_heads, heads.head_dim)
            for position in range(first, length):
                kv[ids[position // block_size] * block_size + position % block_size] = context_C2KH[position]
            table[slot, first // block_size : count] = torch.tensor(ids, dtype=torch.int32)[first // block_size :]
            self._contexts.append(context_C2KH)
        self.kv_R2KH, self.block_table_XN = kv.to(DEVICE), table.to(DEVICE)

    def randn(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return values.to(self.heads.dtype)

    def queries(self, num_padding: int = 0) -> tuple[Tensor, Tensor]:
        """Random query rows in order, then `num_padding` of NaN, as a view between NaN; and the like of NaN, to write.

        The gap between rows is 16 elements.
        """
        heads, num_rows = self.heads, sum(num_rows for _, num_rows in self.sizes)
        size = heads.num_heads * heads.head_dim
        rows = torch.full((2, num_rows + num_padding, size + 16), math.nan, dtype=heads.dtype)
        rows[0, :num_rows, :size] = self.randn(num_rows, size)
        q, out = rows.to(DEVICE)[..., :size].view(2, -1, heads.num_heads, heads.head_dim)
        return q, out

    def expected(self, q_TNH: Tensor, scale: float) -> Tensor:
        """One query head of one row at a time."""
        outputs = []
        rows = iter(q_TNH.cpu().double())
        for context_C2KH, (length, num_rows) in zip(self._contexts, self.sizes, strict=True):
            for position in range(length - num_rows, length):
                first = 0 if self.window is None else max(0, position - self.window + 1)
                keys, values = context_C2KH[first : position + 1].double().chunk(2, 1)
                for head, query in enumerate(next(rows)):
                    kv_head = head * keys.shape[1] // q_TNH.shape[1]
                    weights = torch.softmax(keys[:, kv_head] @ query * scale, 0)
                    outputs.append(weights @ values[:, kv_head])
        return torch.stack(outputs).view(-1, *q_TNH.shape[1:])

    def check(self, q_TNH: Tensor, out_TNH: Tensor, scale: float) -> None:
        """Compare with `expected`, and see that neither padding rows nor what lies between rows were written."""
        expected = self.expected(q_TNH, scale)
        error = (out_TNH[: len(expected)].cpu().double() - expected).abs().max()
        assert error <= TOLERANCE[self.heads.dtype], f"error {error:g}"
        self.check_untouched(out_TNH)

    def check_untouched(self, out_TNH: Tensor) -> None:
        """See that neither padding rows nor what lies between rows were written."""
        num_rows, size = sum(num_rows for _, num_rows in self.sizes), out_TNH[0].numel()
        gaps = out_TNH.as_strided((out_TNH.shape[0], 16), (size + 16, 1), out_TNH.storage_offset() + size)
        assert gaps.isnan().all() and out_TNH[num_rows:].isnan().all()

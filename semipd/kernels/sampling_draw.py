"""Drawing the token of one row on the device: limits by search, then a walk over what they keep. No kernels.

Blocks that hold a token worth weighing are listed in scratch memory, ascending. A list of one tile is decided in
registers. A longer one is read tile by tile: each pass of a search gathers the codes that are still undecided, and ends
when they fit in registers. Scratch of a row is int64: of each listed block its index, the weight of its tokens above
the border of the nucleus and the number of those on it, as many words each as the row has blocks; then the undecided
codes, a tile of words.

`semipd/model/sampling_ops.py` is the specification.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from semipd.kernels.sampling_codes import (
    END_OF_WEIGHT_CODES,
    LOWEST_KEY,
    LOWEST_RANK_CODE,
    LOWEST_WEIGHT_CODE,
    logit_key,
    lowest_rank_code_of_same_logit,
    rank_code,
    search,
    search_rank,
    weigh,
    weight_code,
    weight_of_code,
)

BLOCK = tl.constexpr(64)


class Row(NamedTuple):
    """What the draw of one row depends on, on the device."""

    logits_ptr: tl.tensor
    work_ptr: tl.tensor
    vocab_size: tl.tensor
    num_blocks: tl.tensor
    peak_key: tl.tensor
    temperature: tl.tensor  # above 0
    num_best: tl.tensor  # top_k; the size of the vocabulary for all
    top_p: tl.tensor
    min_p: tl.tensor
    u: tl.tensor  # the random number


@triton.jit
def draw(row: Row, maxima: tl.tensor, MAX_BLOCKS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """The token of a random row."""
    blocks = tl.arange(0, MAX_BLOCKS)
    codes = rank_code(maxima, blocks)
    limit = tl.full((), LOWEST_RANK_CODE, tl.int64)
    if row.num_best < row.num_blocks:
        limit = search_rank(codes, blocks < row.num_blocks, row.num_best)
    weights = tl.where(codes >= limit, weigh(maxima, row.peak_key, row.temperature), 0.0)
    num_listed = _list_blocks(row, weights, row.min_p, MAX_BLOCKS)
    if num_listed <= TILE:
        token = _draw_from_tile(row, num_listed, TILE)
    else:
        token = _draw_from_list(row, num_listed, weights, lowest_rank_code_of_same_logit(limit), MAX_BLOCKS, TILE)
    return token


@triton.jit
def _draw_from_tile(row: Row, num_listed: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """`draw` where one tile holds all listed blocks."""
    ids, keys = _load_tile(row, 0, num_listed, TILE)
    limit = tl.full((), LOWEST_RANK_CODE, tl.int64)
    if row.num_best < row.vocab_size:
        limit = search_rank(rank_code(keys, ids), ids < row.vocab_size, row.num_best)
    weights = _weigh_kept(row, ids, keys, limit)
    if row.top_p < 1:
        target = row.top_p * tl.sum(weights, axis=0)
        first = tl.full((), LOWEST_WEIGHT_CODE, tl.int64)
        end = tl.full((), END_OF_WEIGHT_CODES, tl.int64)
        border = weight_of_code(search(weight_code(weights), weights, target, 0.0, first, end))
        above = tl.sum(tl.where(weights > border, weights, 0.0), axis=0)
        weights = _cut(weights, border, tl.ceil((target - above) / border), 0)
    total = tl.sum(weights, axis=0)
    token = tl.min(tl.where(tl.cumsum(weights, axis=0) > row.u * total, ids, row.vocab_size), axis=0)
    return tl.where(total > 0, token, 0)


@triton.jit
def _draw_from_list(
    row: Row,
    num_listed: tl.tensor,
    block_weights: tl.tensor,
    first_rank: tl.tensor,
    MAX_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """`draw` where the listed blocks are read tile by tile. The best tokens' rank codes start at `first_rank`."""
    limit = tl.full((), LOWEST_RANK_CODE, tl.int64)
    if row.num_best < row.vocab_size:
        end = rank_code(row.peak_key, 0) + 1
        limit = _search_list(row, num_listed, limit, row.num_best, first_rank, end, TILE, IS_RANK=True)
    border = tl.full((), 0.0, tl.float64)
    target = tl.full((), 0.0, tl.float64)
    if row.top_p < 1:
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, num_listed, TILE):
            ids, keys = _load_tile(row, start, num_listed, TILE)
            total += tl.sum(_weigh_kept(row, ids, keys, limit), axis=0)
        target = row.top_p * total
        # Below the mean of what it leaves out a nucleus ends for sure: a whole vocabulary of such weights is less.
        # Half of it, for the rounding.
        least = 0.5 * (total - target) / row.vocab_size
        num_listed = _list_blocks(row, block_weights, tl.maximum(row.min_p, least), MAX_BLOCKS)
        end = tl.full((), END_OF_WEIGHT_CODES, tl.int64)
        border = weight_of_code(
            _search_list(row, num_listed, limit, target, weight_code(least), end, TILE, IS_RANK=False)
        )
    return _pick(row, num_listed, limit, border, target, MAX_BLOCKS, TILE)


@triton.jit
def _search_list(
    row: Row,
    num_listed: tl.tensor,
    limit: tl.tensor,
    target: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    TILE: tl.constexpr,
    IS_RANK: tl.constexpr,
) -> tl.tensor:
    """`search` over the tokens of listed blocks, by number and rank or by weight.

    A pass over the list gathers the codes in [low, high). While they are too many for a tile, its sums cut the range in
    four.
    """
    CAPACITY: tl.constexpr = TILE * BLOCK
    candidates_ptr = row.work_ptr + 3 * row.num_blocks
    above = tl.full((), 0.0, tl.float64)
    num_open = tl.full((), CAPACITY + 1, tl.int32)
    while (num_open > CAPACITY) & (high - low > 1):
        step = (high - low + 3) >> 2
        code_1 = low + step
        code_2 = tl.minimum(code_1 + step, high)
        code_3 = tl.minimum(code_2 + step, high)
        mass_1 = tl.full((), 0.0, tl.float64)
        mass_2 = tl.full((), 0.0, tl.float64)
        mass_3 = tl.full((), 0.0, tl.float64)
        num_open = tl.full((), 0, tl.int32)
        for start in range(0, num_listed, TILE):
            ids, keys = _load_tile(row, start, num_listed, TILE)
            if IS_RANK:
                codes = tl.where(ids < row.vocab_size, rank_code(keys, ids), LOWEST_RANK_CODE)
                masses = (ids < row.vocab_size).to(tl.float64)
            else:
                masses = _weigh_kept(row, ids, keys, limit)
                codes = weight_code(masses)
            mass_1 += tl.sum(tl.where(codes >= code_1, masses, 0.0), axis=0)
            mass_2 += tl.sum(tl.where(codes >= code_2, masses, 0.0), axis=0)
            mass_3 += tl.sum(tl.where(codes >= code_3, masses, 0.0), axis=0)
            is_open = (codes >= low) & (codes < high)
            position = num_open + tl.cumsum(is_open.to(tl.int32), axis=0) - 1
            tl.store(candidates_ptr + position, codes, mask=is_open & (position < CAPACITY))
            num_open += tl.sum(is_open.to(tl.int32), axis=0)
        if num_open > CAPACITY:
            is_1, is_2, is_3 = mass_1 >= target, mass_2 >= target, mass_3 >= target
            low = tl.where(is_3, code_3, tl.where(is_2, code_2, tl.where(is_1, code_1, low)))
            high = tl.where(is_3, high, tl.where(is_2, code_3, tl.where(is_1, code_2, code_1)))
            above = tl.where(is_3, above, tl.where(is_2, mass_3, tl.where(is_1, mass_2, mass_1)))
    tl.debug_barrier()
    index = tl.arange(0, CAPACITY)
    codes = tl.load(candidates_ptr + index, mask=index < num_open, other=0)
    masses = tl.full((CAPACITY,), 1.0, tl.float64) if IS_RANK else weight_of_code(codes)
    border = search(codes, tl.where(index < num_open, masses, 0.0), target, above, low, high)
    tl.debug_barrier()  # the next search writes where this one read
    return border


@triton.jit
def _pick(
    row: Row,
    num_listed: tl.tensor,
    limit: tl.tensor,
    border: tl.tensor,
    target: tl.tensor,
    MAX_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The token where the weights of listed tokens above the border, and some on it, pass `u` of their sum."""
    masses_ptr = row.work_ptr + row.num_blocks
    ties_ptr = masses_ptr + row.num_blocks
    for start in range(0, num_listed, TILE):
        ids, keys = _load_tile(row, start, num_listed, TILE)
        weights = _weigh_kept(row, ids, keys, limit)
        above = tl.sum(tl.reshape(tl.where(weights > border, weights, 0.0), (TILE, BLOCK)), axis=1)
        ties = tl.sum(tl.reshape((weights == border).to(tl.int32), (TILE, BLOCK)), axis=1)
        listed = start + tl.arange(0, TILE)
        tl.store(masses_ptr + listed, above.to(tl.int64, bitcast=True), mask=listed < num_listed)
        tl.store(ties_ptr + listed, ties, mask=listed < num_listed)
    tl.debug_barrier()
    listed = tl.arange(0, MAX_BLOCKS)
    masses = tl.load(masses_ptr + listed, mask=listed < num_listed, other=0).to(tl.float64, bitcast=True)
    ties = tl.load(ties_ptr + listed, mask=listed < num_listed, other=0).to(tl.float64)
    num_ties = tl.full((), 0.0, tl.float64)  # that are kept
    if border > 0:
        num_ties = tl.ceil((target - tl.sum(masses, axis=0)) / border)
    ties_before = tl.cumsum(ties, axis=0) - ties
    masses += tl.minimum(tl.maximum(num_ties - ties_before, 0.0), ties) * border

    goal = row.u * tl.sum(masses, axis=0)
    chosen = tl.min(tl.where(tl.cumsum(masses, axis=0) > goal, listed, num_listed - 1), axis=0)
    passed = tl.sum(tl.where(listed < chosen, masses, 0.0), axis=0)
    num_ties_passed = tl.sum(tl.where(listed < chosen, ties, 0.0), axis=0)
    ids = tl.load(row.work_ptr + chosen).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    weights = _weigh_kept(row, ids, load_keys(row.logits_ptr, ids, row.vocab_size), limit)
    weights = _cut(weights, border, num_ties, num_ties_passed)
    return tl.min(tl.where(passed + tl.cumsum(weights, axis=0) > goal, ids, row.vocab_size), axis=0)


@triton.jit
def _list_blocks(row: Row, weights: tl.tensor, least: tl.tensor, MAX_BLOCKS: tl.constexpr) -> tl.tensor:
    """Writes the indices of blocks whose largest weight is at least `least` and not 0, ascending; their number."""
    is_listed = (weights >= least) & (weights > 0)
    position = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # threads may still read the last list
    tl.store(row.work_ptr + position, tl.arange(0, MAX_BLOCKS), mask=is_listed)
    tl.debug_barrier()
    return tl.sum(is_listed.to(tl.int32), axis=0)


@triton.jit
def _load_tile(row: Row, start: tl.tensor, num_listed: tl.tensor, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Ids and keys of the tokens of TILE listed blocks from `start` on; behind the list's end, ids of no tokens."""
    offsets = tl.arange(0, TILE * BLOCK)
    listed = start + offsets // BLOCK
    blocks = tl.load(row.work_ptr + listed, mask=listed < num_listed, other=row.num_blocks).to(tl.int32)
    ids = blocks * BLOCK + offsets % BLOCK
    return ids, load_keys(row.logits_ptr, ids, row.vocab_size)


@triton.jit
def load_keys(logits_ptr: tl.tensor, ids: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """Keys of the tokens of one row; the lowest key where an id is no token."""
    is_token = ids < vocab_size
    return tl.where(is_token, logit_key(tl.load(logits_ptr + ids, mask=is_token, other=0.0)), LOWEST_KEY)


@triton.jit
def _weigh_kept(row: Row, ids: tl.tensor, keys: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Weights of tokens that top_k and min_p keep; 0 for the others."""
    weights = weigh(keys, row.peak_key, row.temperature)
    return tl.where((weights >= row.min_p) & (rank_code(keys, ids) >= limit), weights, 0.0)


@triton.jit
def _cut(weights: tl.tensor, border: tl.tensor, num_ties: tl.tensor, num_passed: tl.tensor) -> tl.tensor:
    """Keeps weights above the border and the first `num_ties` on it, of which `num_passed` came before these."""
    is_tie = weights == border
    is_kept_tie = is_tie & (num_passed + tl.cumsum(is_tie.to(tl.int32), axis=0) <= num_ties)
    return tl.where((weights > border) | is_kept_tie, weights, 0.0)

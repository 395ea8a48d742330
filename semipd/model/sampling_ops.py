"""Drawing a token from a row of logits: pure functions of tensors, each row by itself.

A row's token depends on that row alone, never on its batch-mates, its place among them or the path taken, because

- a token's weight exp((logit - peak) / temperature) is rounded to a multiple of `WEIGHT_UNIT`, and a row's weights sum
  to at most 2**53 of these units, so that float64 adds them without rounding, in any order;
- tokens are ranked by logit, then by the smaller id, so that no two are equal whatever the sort does with ties;
- the draw walks the kept tokens by growing id until the weights passed exceed u times their sum. A token of weight 0
  never makes the sum grow, so it is never drawn.

Shape suffixes: R rows, V vocab, K candidates of a row, best first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_VOCAB_SIZE = 2**19
WEIGHT_UNIT = 2.0**-34  # MAX_VOCAB_SIZE weights of at most 1 sum to at most 2**53 units

# float64 numbers near this one are WEIGHT_UNIT apart, so adding it rounds; a cast to int64 takes 4 times as long.
_ROUNDER = WEIGHT_UNIT * 2.0**52

# The k best tokens lie in the k blocks with the best maxima. With 64 tokens a block and k = 50, 16 rows of 49,152 take
# 0.9 ms, the half of torch.topk, which breaks ties as it likes; 32 and 128 are slower.
_BLOCK = 64

# Weights sorted to find a nucleus; most nuclei of a language model at top_p 0.95 hold fewer tokens.
_NUM_SORTED = 64

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True, slots=True)
class DrawParams:
    """What a row's draw depends on beside its logits.

    Attributes:
        temperature_R: float64, above 0.
        top_p_R: float64 in (0, 1].
        top_k_R: int64; 0 keeps all.
        min_p_R: float64 in [0, 1].
        uniform_R: float64 in [0, 1), the row's random number.
    """

    temperature_R: Tensor
    top_p_R: Tensor
    top_k_R: Tensor
    min_p_R: Tensor
    uniform_R: Tensor

    def __getitem__(self, rows: Tensor) -> DrawParams:
        """The parameters of `rows`, indices or a mask."""
        return DrawParams(
            self.temperature_R[rows], self.top_p_R[rows], self.top_k_R[rows], self.min_p_R[rows], self.uniform_R[rows]
        )


def stream_key(seed: int, sample_index: int) -> Tensor:
    """The key of a request's random numbers, 0-dim int64 on the CPU. Seeds that agree modulo 2**64 are the same."""
    return torch.tensor(stream_key_value(seed, sample_index))


def stream_key_value(seed: int, sample_index: int) -> int:
    """`stream_key` as a signed int. In plain ints, because this takes 50 us on tensors."""
    key = _mix_int(_mix_int(seed) + (sample_index + 1) * _GOLDEN)
    return (key + 2**63) % 2**64 - 2**63


def uniform(key_R: Tensor, index_R: Tensor) -> Tensor:
    """The random number of output token `index_R` under `key_R`: float64 in [0, 1), a multiple of 2**-53.

    It is output `index_R` of the SplitMix64 generator that starts at `key_R`, so it needs no state.
    """
    return _shift_right(_mix(key_R + (index_R + 1) * _GOLDEN), 11).double() * 2.0**-53


def argmax(logits_RV: Tensor) -> Tensor:
    """The token with the largest logit, the smallest id among equals, int64 `[R]`; 0 when all are -inf.

    Equals `logits_RV.argmax(-1)`, in a fifth of its time: the maxima of blocks are vectorised, the search is not.
    """
    blocks = _blocks(logits_RV)
    best = blocks.amax(-1).argmax(-1)
    rows = torch.arange(best.shape[0], device=best.device)
    return best * _BLOCK + blocks[rows, best].argmax(-1)


def top_tokens(logits_RV: Tensor, k: int) -> Tensor:
    """Ids of the `k` largest logits, best first, the smaller id first among equals, int64 `[R, k]`; `k` is at most V.

    float64 logits are compared after rounding to float32.
    """
    ids = torch.arange(logits_RV.shape[-1], device=logits_RV.device).expand(logits_RV.shape)
    values = logits_RV
    if k * _BLOCK < logits_RV.shape[-1]:
        blocks = _blocks(logits_RV)
        maxima = blocks.amax(-1)
        # Among blocks with equal maxima those of smaller ids are taken, or a tie at rank k could be lost.
        chosen = _rank_key(maxima, torch.arange(maxima.shape[-1], device=maxima.device)).topk(k, sorted=False).indices
        values = _take_blocks(blocks, chosen)
        ids = (chosen.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=chosen.device)).flatten(1)
    return ids.gather(1, _rank_key(values, ids).topk(k).indices)


def draw(logits_RV: Tensor, params: DrawParams) -> Tensor:
    """Tokens drawn from whole rows, int64 `[R]`; truncation is ignored. 0 for a row of -inf."""
    return _pick(_weights(logits_RV, params), params.uniform_R)


def draw_truncated(logits_RV: Tensor, params: DrawParams) -> Tensor:
    """Tokens drawn after min_p, top_k and top_p, int64 `[R]`; 0 for a row of -inf.

    Kept are the tokens with at least `min_p` of the best one's weight; of these the first `top_k` as `top_tokens` ranks
    them; of these, by falling weight and then by growing id, the first that hold `top_p` of their sum. The largest
    top_k, and which rows have none, are read on the host.
    """
    tokens_R = torch.empty_like(params.top_k_R)
    is_limited_R = (params.top_k_R > 0) & (params.top_k_R < logits_RV.shape[-1])
    limited = is_limited_R.nonzero().squeeze(-1)
    if limited.numel() > 0:
        tokens_R[limited] = _draw_from_best(select(logits_RV, limited), params[limited])
    unlimited = (~is_limited_R).nonzero().squeeze(-1)
    if unlimited.numel() > 0:
        rows = params[unlimited]
        weights = _weights(select(logits_RV, unlimited), rows)
        _cut_below_(weights, rows.min_p_R)
        _cut_nucleus_(weights, rows.top_p_R)
        tokens_R[unlimited] = _pick(weights, rows.uniform_R)
    return tokens_R


def _draw_from_best(logits_RV: Tensor, params: DrawParams) -> Tensor:
    """`draw_truncated` for rows that all have a top_k below V: only so many candidates are weighed."""
    num_candidates = int(params.top_k_R.max())
    ids_RK = top_tokens(logits_RV, num_candidates)
    weights_RK = _weights(logits_RV.gather(1, ids_RK), params)
    weights_RK.masked_fill_(torch.arange(num_candidates, device=ids_RK.device) >= params.top_k_R.unsqueeze(-1), 0)
    ids_RK, order_RK = ids_RK.sort(-1)  # the draw walks by growing id
    weights_RK = weights_RK.gather(1, order_RK)
    _cut_below_(weights_RK, params.min_p_R)
    _cut_nucleus_(weights_RK, params.top_p_R)
    return ids_RK.gather(1, _pick(weights_RK, params.uniform_R).unsqueeze(-1)).squeeze(-1)


def _weights(logits: Tensor, params: DrawParams) -> Tensor:
    """Probabilities over the row's largest one, as float64 multiples of WEIGHT_UNIT; all 0 for a row of -inf."""
    # clamped: -inf - -inf is NaN
    peak = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    # float64 before the subtraction: dividing by a temperature of 1e-6 would multiply its rounding
    scaled = logits.to(torch.float64, copy=True).sub_(peak).div_(params.temperature_R.unsqueeze(-1))
    return scaled.exp_().add_(_ROUNDER).sub_(_ROUNDER)


def _cut_below_(weights: Tensor, min_p_R: Tensor) -> None:
    """Set weights below `min_p` to 0; the largest one of a row is 1."""
    if bool((min_p_R > 0).any()):
        weights.masked_fill_(weights < min_p_R.unsqueeze(-1), 0)


def _cut_nucleus_(weights: Tensor, top_p_R: Tensor) -> None:
    """Set to 0 what is not among the first weights, by size and then by index, that hold `top_p` of the row's sum."""
    rows = (top_p_R < 1).nonzero().squeeze(-1)
    if rows.numel() == 0:
        return
    some = select(weights, rows)
    nucleus_R = top_p_R[rows] * some.sum(-1)
    border_R, above_R = _nucleus_border(some, nucleus_R)
    some.masked_fill_(some < border_R.unsqueeze(-1), 0)
    # Equal weights at the border may hold more than is needed; seldom, so only such rows pay for counting.
    num_kept_R = ((nucleus_R - above_R) / border_R).ceil_()
    crowded = (some.sum(-1) - above_R > num_kept_R * border_R).nonzero().squeeze(-1)
    if crowded.numel() > 0:
        is_border = some[crowded] == border_R[crowded].unsqueeze(-1)
        is_surplus = is_border & (is_border.cumsum(-1) > num_kept_R[crowded].unsqueeze(-1))
        some[crowded] = some[crowded].masked_fill(is_surplus, 0)
    if some is not weights:
        weights[rows] = some


def _nucleus_border(weights: Tensor, nucleus_R: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weight such that it and all above it sum to at least `nucleus`, and the sum of those above it.

    Most rows need few weights, which are sorted; the border of the others is found by `_search_border`.
    """
    best = _top_values(weights, min(_NUM_SORTED, weights.shape[-1]))
    reached = best.cumsum(-1)
    index = torch.searchsorted(reached, nucleus_R.unsqueeze(-1))
    border_R = best.gather(1, index.clamp_max(best.shape[-1] - 1)).squeeze(-1)
    above_R = best.masked_fill(best <= border_R.unsqueeze(-1), 0).sum(-1)
    wider = (index.squeeze(-1) == best.shape[-1]).nonzero().squeeze(-1)
    if wider.numel() > 0:
        border_R[wider], above_R[wider] = _search_border(select(weights, wider), nucleus_R[wider])
    return border_R, above_R


def _search_border(weights: Tensor, nucleus_R: Tensor) -> tuple[Tensor, Tensor]:
    """`_nucleus_border` without a sort (5 ms for a row of 49,152): 12 binary digits of the border per pass."""
    num_rows, num_weights = weights.shape
    # Below the floor a nucleus ends for sure: not even num_weights of such weights are as much as it leaves out.
    floor_R1 = ((weights.sum(-1) - nucleus_R) / num_weights).unsqueeze(-1)
    # Flat, shape [F]: of a thousand tokens or so, where a row has fifty thousand.
    row_F, index_F = (weights >= floor_R1).nonzero(as_tuple=True)
    weight_F = weights[row_F, index_F]
    # As integers, in units; a cast would take 4 times as long.
    unit_F = (weight_F + _ROUNDER).view(torch.int64) - weights.new_tensor(_ROUNDER).view(torch.int64)

    num_digits = 12
    num_buckets = 2**num_digits + 2  # the first and the last take what is smaller or larger than these digits can say
    border_R1 = torch.zeros_like(nucleus_R, dtype=torch.int64).unsqueeze(-1)
    above_R1 = torch.zeros_like(nucleus_R).unsqueeze(-1)
    for shift in (2 * num_digits, num_digits, 0):
        digit_F = (unit_F - border_R1.squeeze(-1)[row_F]).bitwise_right_shift_(shift).clamp_(-1, 2**num_digits)
        sums = weights.new_zeros(num_rows * num_buckets).index_add_(0, row_F * num_buckets + digit_F + 1, weight_F)
        from_top = sums.view(num_rows, num_buckets).flip(-1).cumsum(-1)
        place_R1 = torch.searchsorted(from_top, nucleus_R.unsqueeze(-1)).clamp_(1, 2**num_digits)
        border_R1 = border_R1 + ((2**num_digits - place_R1) << shift)
        above_R1 = from_top.gather(1, place_R1 - 1)
    return (border_R1.to(weights.dtype) * WEIGHT_UNIT).squeeze(-1), above_R1.squeeze(-1)


def _pick(weights: Tensor, uniform_R: Tensor) -> Tensor:
    """The first index whose running sum exceeds `uniform_R` of the sum; 0 if all weights are 0."""
    reached = weights.cumsum(-1)
    sum_R1 = reached[:, -1:]
    # u * sum stays below the sum although it is rounded: u is at most 1 - 2**-53.
    index_R1 = torch.searchsorted(reached, uniform_R.unsqueeze(-1) * sum_R1, right=True)
    # The clamp is for NaN logits, which are a bug of the model's: an id out of range would be read from the embedding.
    return index_R1.clamp_max_(weights.shape[-1] - 1).masked_fill_(sum_R1 == 0, 0).squeeze(-1)


def select(logits_RV: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the logits; no copy when it is all of them (`rows` has no repeats and grows)."""
    return logits_RV if rows.numel() == logits_RV.shape[0] else logits_RV[rows]


def _blocks(logits_RV: Tensor) -> Tensor:
    """Rows cut into blocks `[R, ceil(V / _BLOCK), _BLOCK]`, the last one filled up with -inf."""
    num_rows, num_vocab = logits_RV.shape
    missing = -num_vocab % _BLOCK
    if missing:
        logits_RV = F.pad(logits_RV, (0, missing), value=-math.inf)
    return logits_RV.reshape(num_rows, (num_vocab + missing) // _BLOCK, _BLOCK)


def _take_blocks(blocks: Tensor, chosen: Tensor) -> Tensor:
    """The elements of the chosen blocks of each row, `[R, number of chosen * _BLOCK]`."""
    return blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)


def _top_values(values: Tensor, k: int) -> Tensor:
    """The `k` largest values of each row, largest first."""
    if k * _BLOCK < values.shape[-1]:
        blocks = _blocks(values)
        values = _take_blocks(blocks, blocks.amax(-1).topk(k, sorted=False).indices)
    return values.topk(k).values


def _rank_key(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that grow with the value and, among equal values, fall with the id."""
    # Read as an integer, a positive float32 keeps its order and the lower 31 bits of a negative one reverse it.
    # Adding 0.0 turns -0.0 into 0.0, its equal.
    bits = values.float().add(0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().mul_(2**32).sub_(ids)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of int64 whose output bits each depend on all input bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """`_mix` of an int, taken modulo 2**64."""
    x %= 2**64
    x = (x ^ (x >> 30)) * _MIX_1 % 2**64
    x = (x ^ (x >> 27)) * _MIX_2 % 2**64
    return x ^ (x >> 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift; that of int64 tensors copies the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)

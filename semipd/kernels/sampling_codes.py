"""Logits and weights as integers that order as they do, and the search that stands in for a sort.

Jit functions that kernels call, no kernels. A limit on the tokens of a row (the k best, the heaviest that hold top_p)
is the largest code such that the tokens at or above it reach a target, in number or in weight: a search that halves a
range of codes needs 30 to 50 sums, where a sort would move the tokens. `semipd/model/sampling_ops.py` is the
specification of all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_VOCAB_SIZE = 2**19
_ID_BITS = tl.constexpr(19)
_LAST_ID = tl.constexpr(MAX_VOCAB_SIZE - 1)

LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of -inf; read back as a logit it is NaN, which weighs nothing
LOWEST_RANK_CODE = tl.constexpr(-(2**52))  # below those of all keys
_LOWEST_LOGIT = tl.constexpr(-3.4028234663852886e38)

# Weights are multiples of 2**-34 up to 1: the lowest 18 bits of such a float64 are 0, and its exponent is 989 to 1023.
_UNUSED_BITS = tl.constexpr(18)
LOWEST_WEIGHT_CODE = tl.constexpr(988 << 34)
END_OF_WEIGHT_CODES = tl.constexpr((1023 << 34) + 1)
_ROUNDER = tl.constexpr(2.0**18)  # float64 numbers near it are 2**-34 apart, so adding it rounds

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def logit_key(logit: tl.tensor) -> tl.tensor:
    """int32 that orders as float32 logits do; both zeros have one key."""
    logit = logit.to(tl.float32)
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    """The logit that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_code(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """int64 that no two tokens of a row share: it grows with the logit and, among equal ones, falls with the id."""
    return (key.to(tl.int64) << _ID_BITS) - index


@triton.jit
def lowest_rank_code_of_same_logit(code: tl.tensor) -> tl.tensor:
    """The code that the last token of a vocabulary would have, had it the logit of `code`."""
    return (((code + _LAST_ID) >> _ID_BITS) << _ID_BITS) - _LAST_ID


@triton.jit
def weigh(key: tl.tensor, peak_key: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Probability over the row's largest one, a float64 multiple of 2**-34; 0 where it is not a number."""
    peak = tl.maximum(_logit(peak_key), _LOWEST_LOGIT).to(tl.float64)  # -inf - -inf is NaN
    weight = tl.exp((_logit(key).to(tl.float64) - peak) / temperature)
    weight = tl.where(weight <= 1.0, weight, 0.0)
    return (weight + _ROUNDER) - _ROUNDER


@triton.jit
def weight_code(weight: tl.tensor) -> tl.tensor:
    """int64 that orders as weights do, linear in their logarithm but for a few percent: half a range, half a ratio."""
    return weight.to(tl.int64, bitcast=True) >> _UNUSED_BITS


@triton.jit
def weight_of_code(code: tl.tensor) -> tl.tensor:
    """The weight that has this code."""
    return (code << _UNUSED_BITS).to(tl.float64, bitcast=True)


@triton.jit
def search(
    codes: tl.tensor, masses: tl.tensor, target: tl.tensor, above: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tl.tensor:
    """The largest code in [low, high) such that the masses at or above it, and `above`, reach `target`; else `low`.

    It may be a smaller one, with the same masses at or above it, if they are exactly the target: k distinct logits are
    found after a dozen sums instead of 45.
    """
    reached = tl.full((), -1.0, tl.float64)
    while (high - low > 1) & (reached != target):
        middle = low + ((high - low) >> 1)
        mass = above + tl.sum(tl.where(codes >= middle, masses, 0.0), axis=0)
        low = tl.where(mass >= target, middle, low)
        high = tl.where(mass >= target, high, middle)
        reached = tl.where(mass >= target, mass, reached)
    return low


@triton.jit
def search_rank(codes: tl.tensor, is_token: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The rank code of the token that `count - 1` others stand above; the lowest one if there are fewer."""
    best = tl.max(codes, axis=0)
    lowest = tl.min(tl.where(is_token, codes, best), axis=0)
    return search(codes, is_token.to(tl.float64), count, 0.0, lowest, best + 1)


@triton.jit
def uniform(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Output `index` of the SplitMix64 generator that starts at `key`, as float64 in [0, 1)."""
    x = key.to(tl.uint64) + (index + 1).to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2**-53

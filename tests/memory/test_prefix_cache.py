"""Pure tests of block keys and of the key maps. Random tokens from a small range, so that prefixes do coincide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.memory.prefix_cache import PrefixCache, block_keys

BLOCK_SIZES = (1, 2, 16)


def keys_of(token_ids: list[int], block_size: int, cache_salt: str | None = None) -> list[bytes]:
    keys: list[bytes] = []
    block_keys(token_ids, block_size, cache_salt=cache_salt, keys=keys)
    return keys


@given(
    first=st.lists(st.integers(0, 1), max_size=40),
    second=st.lists(st.integers(0, 1), max_size=40),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(first: list[int], second: list[int], block_size: int) -> None:
    for index, (a, b) in enumerate(zip(keys_of(first, block_size), keys_of(second, block_size), strict=False)):
        end = (index + 1) * block_size
        assert (a == b) == (first[:end] == second[:end])


@given(
    token_ids=st.lists(st.integers(0, 2**31), max_size=70),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_keys_made_in_pieces_equal_keys_made_at_once(token_ids: list[int], cuts: list[int], block_size: int) -> None:
    whole = keys_of(token_ids, block_size)
    assert len(whole) == len(token_ids) // block_size
    grown: list[bytes] = []
    for cut in sorted(cuts) + [len(token_ids)]:
        block_keys(token_ids[len(grown) * block_size : cut], block_size, keys=grown)
    assert grown == whole


def test_a_cache_salt_separates_equal_prompts() -> None:
    token_ids = list(range(8))
    chains = [keys_of(token_ids, 2, cache_salt) for cache_salt in (None, "", "tenant a", "tenant b", "\ud800")]
    assert len({key for chain in chains for key in chain}) == 5 * 4
    assert keys_of(token_ids, 2, "tenant a") == chains[2]


def test_blocks_are_evicted_in_the_order_of_their_release() -> None:
    cache = PrefixCache()
    for block_id in (4, 7, 9):
        cache.insert(block_id, bytes([block_id]))
        cache.release(block_id)
    cache.retain(4)
    cache.release(4)
    assert cache.evictable_blocks() == (7, 9, 4)
    assert [cache.evict(), cache.evict()] == [7, 9]
    assert (cache.find(b"\x07"), cache.find(b"\x04")) == (None, 4)
    assert (len(cache), cache.num_evictable, 7 in cache, 4 in cache) == (1, 1, False, True)
    cache.check_integrity()


def test_a_key_stays_with_its_first_block() -> None:
    cache = PrefixCache()
    cache.insert(1, b"key")
    cache.insert(2, b"key")
    assert cache.find(b"key") == 1
    assert 2 not in cache
    cache.insert(1, b"key")
    cache.check_integrity()


def test_a_block_cannot_change_its_key() -> None:
    cache = PrefixCache()
    cache.insert(1, b"a")
    with pytest.raises(AssertionError, match="block 1 has the key 61 and was given 62"):
        cache.insert(1, b"b")


def test_misuse_is_caught() -> None:
    cache = PrefixCache()
    with pytest.raises(AssertionError, match="block 3 has no key"):
        cache.release(3)
    cache.insert(3, b"key")
    cache.release(3)
    with pytest.raises(AssertionError, match="block 3 is evictable already"):
        cache.release(3)
    with pytest.raises(AssertionError, match="block 3 is not in use"):
        cache.forget(3)


def test_clear_drops_every_key_and_returns_what_was_evictable() -> None:
    cache = PrefixCache()
    cache.insert(1, b"a")
    cache.insert(2, b"b")
    cache.release(2)
    assert cache.clear() == [2]
    assert (len(cache), cache.num_evictable, cache.find(b"a"), cache.find(b"b")) == (0, 0, None, None)
    cache.insert(1, b"c")
    cache.check_integrity()


def test_check_integrity_sees_broken_maps() -> None:
    cache = PrefixCache()
    cache.insert(1, b"a")
    cache._block_of[b"b"] = 2
    with pytest.raises(AssertionError, match="not inverses"):
        cache.check_integrity()
    cache = PrefixCache()
    cache._evictable[5] = None
    with pytest.raises(AssertionError, match=r"blocks \[5\] are evictable and have no key"):
        cache.check_integrity()

"""The block allocator's rules, one by one; test_block_allocator_model.py tests them all at once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from semipd.memory.block_allocator import BlockAllocator
from semipd.memory.prefix_cache import block_keys

BLOCK_SIZES = (1, 2, 16)
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)


def make_keys(num_blocks: int, block_size: int, *, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    keys: list[bytes] = []
    block_keys([rng.randrange(50_000) for _ in range(num_blocks * block_size)], block_size, keys=keys)
    return keys


def allocate(allocator: BlockAllocator, num_blocks: int) -> list[int]:
    block_ids = allocator.allocate(num_blocks)
    assert block_ids is not None
    return block_ids


def allocate_published(allocator: BlockAllocator, keys: list[bytes]) -> list[int]:
    """New blocks that hold the chain `keys`, as after the prefill of a prompt that was not cached."""
    block_ids = allocate(allocator, len(keys))
    for block_id, key in zip(block_ids, keys, strict=True):
        allocator.publish(block_id, key)
    return block_ids


# Allocation


def test_allocation_is_all_or_nothing() -> None:
    allocator = BlockAllocator(5, 16)
    first = allocate(allocator, 3)
    assert allocator.allocate(3) is None
    assert allocator.num_free_blocks == 2
    second = allocate(allocator, 2)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.allocate(1) is None
    assert allocator.allocate(0) == []
    allocator.check_integrity([first, second])


def test_a_failed_allocation_evicts_nothing() -> None:
    allocator = BlockAllocator(3, 2)
    keys = make_keys(3, 2)
    allocator.free(allocate_published(allocator, keys))
    assert allocator.allocate(4) is None
    assert len(allocator.match(keys)) == 3


@block_sizes
def test_eviction_counts_blocks_whatever_their_size(block_size: int) -> None:
    """mini-sglang dae78f6 evicted a number of pages where tokens were meant."""
    allocator = BlockAllocator(10, block_size)
    keys = make_keys(8, block_size)
    allocator.free(allocate_published(allocator, keys))
    assert allocator.num_free_blocks == 10
    table = allocate(allocator, 5)  # two never used, three of eight cached ones
    statistics = allocator.statistics()
    assert (statistics.num_evictions, statistics.num_cached_blocks, statistics.num_free_blocks) == (3, 5, 5)
    matched = allocator.match(keys)
    assert len(matched) == 5
    assert set(matched).isdisjoint(table)
    allocator.check_integrity([table, matched])


@block_sizes
def test_the_tail_of_a_chain_is_evicted_before_its_head(block_size: int) -> None:
    allocator = BlockAllocator(4, block_size)
    keys = make_keys(4, block_size)
    allocator.free(allocate_published(allocator, keys))
    for num_left in (3, 2, 1, 0):
        block_ids = allocate(allocator, 1)
        matched = allocator.match(keys)
        assert len(matched) == num_left
        allocator.free(matched)
        allocator.free(block_ids, forget=True)
        # The freed block has no content and goes first: take it away, so that the next one is evicted.
        assert allocate(allocator, 1) == block_ids


def test_the_tail_of_a_chain_is_evicted_first_after_a_deferred_drop_too() -> None:
    allocator = BlockAllocator(4, 2)
    keys = make_keys(4, 2)
    table = allocate_published(allocator, keys)
    allocator.step_launched(1)
    allocator.free(table, after_step=1)
    allocator.step_done(1)
    assert allocate(allocator, 3) == table[:0:-1]
    assert allocator.match(keys) == table[:1]


def test_a_shared_head_is_evicted_after_the_tails_of_all_who_shared_it() -> None:
    allocator = BlockAllocator(3, 2)
    head, *_ = keys = make_keys(2, 2)
    first = allocate_published(allocator, keys)
    second = allocator.match([head]) + allocate(allocator, 1)
    allocator.publish(second[1], b"another tail")
    allocator.step_launched(1)
    allocator.free(first, after_step=1)
    allocator.free(second, after_step=1)
    allocator.step_done(1)
    assert allocate(allocator, 3) == [first[1], second[1], first[0]]


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    allocator = BlockAllocator(4, 2)
    old, new = make_keys(2, 2, seed=1), make_keys(2, 2, seed=2)
    allocator.free(allocate_published(allocator, old))
    allocator.free(allocate_published(allocator, new))
    allocator.free(allocator.match(old))  # used again: now the younger one
    allocate(allocator, 2)
    assert allocator.match(new) == []
    assert len(allocator.match(old)) == 2


# Matching


@block_sizes
def test_only_the_unbroken_head_of_a_chain_is_matched(block_size: int) -> None:
    allocator = BlockAllocator(8, block_size)
    keys = make_keys(4, block_size)
    table = allocate(allocator, 4)
    for index in (0, 1, 3):
        allocator.publish(table[index], keys[index])
    assert allocator.count_cached(keys) == 2
    allocator.check_integrity([table])
    assert allocator.match(keys) == table[:2]
    assert allocator.match(keys[3:]) == table[3:]
    assert allocator.match(make_keys(4, block_size, seed=1)) == []


@block_sizes
def test_a_revived_block_keeps_its_key(block_size: int) -> None:
    """nano-vllm 9fa256a revived a cached free block by the path of a new one and lost its hash."""
    allocator = BlockAllocator(3, block_size)
    keys = make_keys(3, block_size)
    table = allocate_published(allocator, keys)
    for _ in range(3):
        allocator.free(table)
        assert allocator.match(keys) == table
        assert allocator.match(keys) == table
        allocator.free(table)
        assert allocator.num_free_blocks == 0
        allocator.check_integrity([table])


def test_a_match_takes_blocks_out_of_the_free_count() -> None:
    allocator = BlockAllocator(4, 2)
    keys = make_keys(2, 2)
    allocator.free(allocate_published(allocator, keys))
    assert allocator.num_free_blocks == 4
    matched = allocator.match(keys)
    assert allocator.num_free_blocks == 2
    assert allocator.allocate(3) is None
    fresh = allocate(allocator, 2)
    assert set(fresh).isdisjoint(matched)
    allocator.check_integrity([matched + fresh])


@block_sizes
def test_scheduled_tokens_are_the_prompt_less_what_is_cached(block_size: int) -> None:
    """nano-vllm 77dd709 counted the tokens to schedule before the prefix hit changed what was cached."""
    rng = random.Random(block_size)
    allocator = BlockAllocator(24, block_size)
    written: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, as the requests below computed them
    tables: list[list[int]] = []
    num_hits = 0
    for _ in range(300):
        if tables and rng.random() < 0.5:
            allocator.free(tables.pop(rng.randrange(len(tables))))
            continue
        prompt = [rng.randrange(2) if i % block_size == 0 else 0 for i in range(rng.randrange(1, 6 * block_size + 1))]
        keys: list[bytes] = []
        block_keys(prompt[:-1], block_size, keys=keys)  # one token stays to be computed
        table = allocator.match(keys)
        num_hits += len(table)
        num_cached_tokens = len(table) * block_size
        assert num_cached_tokens < len(prompt)
        for index, block_id in enumerate(table):
            assert written[block_id] == tuple(prompt[: (index + 1) * block_size])
        num_scheduled_tokens = len(prompt) - num_cached_tokens
        fresh = allocator.allocate(-(-num_scheduled_tokens // block_size))
        if fresh is None:
            allocator.free(table)
            continue
        table += fresh
        for index in range(num_cached_tokens // block_size, len(keys)):
            written[table[index]] = tuple(prompt[: (index + 1) * block_size])
            allocator.publish(table[index], keys[index])
        tables.append(table)
        allocator.check_integrity(tables)
    assert num_hits > 0
    assert allocator.statistics().num_evictions > 0


def test_the_first_block_of_a_key_keeps_it() -> None:
    allocator = BlockAllocator(4, 2)
    keys = make_keys(1, 2)
    first, second = allocate_published(allocator, keys), allocate_published(allocator, keys)
    assert allocator.match(keys) == first
    allocator.free(second)  # no key: it is free, not cached
    assert allocator.statistics().num_cached_blocks == 1
    allocator.check_integrity([first, first])


def test_nothing_is_cached_when_caching_is_off() -> None:
    allocator = BlockAllocator(2, 2, enable_prefix_caching=False)
    keys = make_keys(2, 2)
    table = allocate_published(allocator, keys)
    assert allocator.match(keys) == []
    allocator.free(table)
    assert allocator.match(keys) == []
    statistics = allocator.statistics()
    assert (statistics.num_cached_blocks, statistics.num_free_blocks) == (0, 2)


def test_forgotten_blocks_are_never_matched_again() -> None:
    allocator = BlockAllocator(4, 2)
    keys = make_keys(3, 2)
    table = allocate_published(allocator, keys)
    sharer = allocator.match(keys)
    allocator.step_launched(1)
    allocator.free(table[:1], after_step=1, forget=True)
    assert allocator.match(keys) == []
    assert allocator.match(keys[1:]) == table[1:]
    allocator.free(table[1:])
    allocator.step_done(1)
    allocator.free(sharer)
    assert allocator.statistics().num_cached_blocks == 2
    allocator.check_integrity([table[1:]])


def test_reset_drops_keys_and_no_references() -> None:
    allocator = BlockAllocator(5, 2)
    held, cached, deferred = make_keys(1, 2, seed=1), make_keys(2, 2, seed=2), make_keys(1, 2, seed=3)
    table = allocate_published(allocator, held)
    allocator.free(allocate_published(allocator, cached))
    allocator.step_launched(1)
    allocator.free(allocate_published(allocator, deferred), after_step=1)
    allocator.reset_prefix_cache()
    assert [allocator.match(keys) for keys in (held, cached, deferred)] == [[], [], []]
    assert allocator.num_free_blocks == 3
    allocator.step_done(1)
    allocator.check_integrity([table])
    assert allocator.statistics().num_cached_blocks == 0
    assert allocator.num_free_blocks == 4


# Steps in flight


def test_blocks_of_a_step_in_flight_are_not_allocated() -> None:
    allocator = BlockAllocator(2, 2)
    table = allocate(allocator, 2)
    allocator.step_launched(7)
    allocator.free(table, after_step=7)
    assert (allocator.num_free_blocks, allocator.num_deferred_blocks) == (0, 2)
    assert allocator.allocate(1) is None
    allocator.check_integrity([])
    allocator.step_done(7)
    assert (allocator.num_free_blocks, allocator.num_deferred_blocks) == (2, 0)
    assert allocate(allocator, 2) == table


def test_blocks_of_a_step_that_is_done_are_free_at_once() -> None:
    allocator = BlockAllocator(4, 2)
    allocator.step_launched(3)
    allocator.step_done(3)
    allocator.free(allocate(allocator, 1), after_step=3)
    allocator.free(allocate(allocator, 1), after_step=-1)  # a request that no step has touched
    allocator.free(allocate(allocator, 1))
    assert (allocator.num_free_blocks, allocator.num_deferred_blocks) == (4, 0)


def test_a_deferred_block_can_be_matched_and_survives_its_step() -> None:
    allocator = BlockAllocator(2, 2)
    keys = make_keys(2, 2)
    table = allocate_published(allocator, keys)
    allocator.step_launched(1)
    allocator.free(table, after_step=1)
    assert allocator.match(keys) == table
    assert allocator.num_deferred_blocks == 0
    allocator.step_done(1)
    assert allocator.num_free_blocks == 0
    allocator.check_integrity([table])


def test_a_block_waits_for_every_step_that_may_touch_it() -> None:
    allocator = BlockAllocator(1, 2)
    keys = make_keys(1, 2)
    table = allocate_published(allocator, keys)
    for step_id in (1, 2):
        allocator.step_launched(step_id)
    allocator.free(table, after_step=1)
    allocator.free(allocator.match(keys), after_step=2)
    allocator.free(allocator.match(keys))
    assert allocator.num_deferred_blocks == 1
    allocator.step_done(2)
    assert (allocator.num_deferred_blocks, allocator.num_free_blocks) == (1, 0)
    allocator.step_done(1)
    assert (allocator.num_deferred_blocks, allocator.num_free_blocks) == (0, 1)


# Misuse


def test_no_value_is_shared_with_the_caller() -> None:
    """mini-sglang 94fe255 cached a view of a table row that was re-used later."""
    allocator = BlockAllocator(6, 2)
    keys = make_keys(3, 2)
    table = allocate_published(allocator, keys)
    matched = allocator.match(keys)
    assert all(type(block_id) is int for block_id in table + matched)
    assert matched is not table
    allocator.step_launched(1)
    freed = list(table)
    allocator.free(freed, after_step=1)
    freed.clear()
    table.clear()
    keys.clear()
    allocator.check_integrity([matched])
    allocator.step_done(1)
    allocator.free(matched)
    assert allocator.match(make_keys(3, 2)) == matched


@pytest.mark.parametrize("after_step", [None, 1])
def test_a_double_free_is_caught_at_the_call(after_step: int | None) -> None:
    allocator = BlockAllocator(4, 2)
    table = allocate(allocator, 1)
    allocator.step_launched(1)
    allocator.free(table, after_step=after_step)
    with pytest.raises(AssertionError, match="block 0 is in no block table; freed twice?"):
        allocator.free(table, after_step=after_step)


@pytest.mark.parametrize("block_id", [-1, 4])
def test_foreign_blocks_are_caught(block_id: int) -> None:
    allocator = BlockAllocator(4, 2)
    allocate(allocator, 4)
    with pytest.raises(AssertionError, match=f"block {block_id} is not of this pool of 4"):
        allocator.free([block_id])
    with pytest.raises(AssertionError, match=f"block {block_id} is not of this pool of 4"):
        allocator.publish(block_id, b"key")


def test_an_unused_block_cannot_be_published() -> None:
    allocator = BlockAllocator(4, 2)
    with pytest.raises(AssertionError, match="block 2 is in no block table"):
        allocator.publish(2, b"key")


def test_steps_are_launched_and_done_once() -> None:
    allocator = BlockAllocator(4, 2)
    allocator.step_launched(1)
    with pytest.raises(AssertionError, match="step 1 is in flight already"):
        allocator.step_launched(1)
    allocator.step_done(1)
    with pytest.raises(AssertionError, match="step 1 is not in flight"):
        allocator.step_done(1)


def test_sizes_are_checked() -> None:
    for num_blocks, block_size in ((0, 16), (4, 0)):
        with pytest.raises(AssertionError):
            BlockAllocator(num_blocks, block_size)
    with pytest.raises(AssertionError, match="-1 blocks asked for"):
        BlockAllocator(4, 2).allocate(-1)


# The integrity check


def _hand_out_twice(allocator: BlockAllocator) -> None:
    allocator._free.append(0)


def _lose(allocator: BlockAllocator) -> None:
    allocator._free.pop()


def _free_a_foreign_block(allocator: BlockAllocator) -> None:
    allocator._free.append(99)


def _free_with_key(allocator: BlockAllocator) -> None:
    allocator._cache.insert(allocator._free[0], b"stale")


def _leak_a_reference(allocator: BlockAllocator) -> None:
    allocator._num_references[0] += 1


def _lose_a_drop(allocator: BlockAllocator) -> None:
    allocator._pending_drops[1].pop()


def _drop_a_foreign_block(allocator: BlockAllocator) -> None:
    allocator._pending_drops[1].append(99)


def _miscount_deferred(allocator: BlockAllocator) -> None:
    allocator._num_deferred += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_hand_out_twice, "block 0 has 1 references and 0 pending drops, and is 1 times among free and evictable"),
        (_lose, "has 0 references and 0 pending drops, and is 0 times among free"),
        (_free_a_foreign_block, r"free and evictable blocks \[99\] are not of this pool"),
        (_free_with_key, r"blocks \[7\] are free and have a key"),
        (_leak_a_reference, "block 0 has 2 references, but block tables hold 1"),
        (_lose_a_drop, "block 1 has 1 pending drops, but steps in flight hold 0"),
        (_drop_a_foreign_block, r"steps in flight hold blocks \[99\], which are not of this pool"),
        (_miscount_deferred, "1 blocks are deferred, 2 were counted"),
    ],
)
def test_check_integrity_names_the_damage(damage: Callable[[BlockAllocator], None], message: str) -> None:
    allocator = BlockAllocator(8, 2)
    held, deferred = allocate(allocator, 1), allocate(allocator, 1)
    allocator.step_launched(1)
    allocator.free(deferred, after_step=1)
    allocator.check_integrity([held])
    damage(allocator)
    with pytest.raises(AssertionError, match=message):
        allocator.check_integrity([held])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1]], "block 2 has 1 references, but block tables hold 0"),
        ([[0, 1, 2], [2]], "block 2 has 1 references, but block tables hold 2"),
        ([[0, 1, 1]], "a block is twice in the block table"),
        ([[0, 1, 2], [8]], r"block tables hold blocks \[8\], which are not of this pool"),
    ],
)
def test_check_integrity_compares_references_with_tables(tables: list[list[int]], message: str) -> None:
    allocator = BlockAllocator(8, 2)
    assert allocate(allocator, 3) == [0, 1, 2]
    allocator.check_integrity()
    with pytest.raises(AssertionError, match=message):
        allocator.check_integrity(tables)

"""Who owns which KV block.

At any time, each of the pool's blocks is in one of four states:

    state      references   pending drops   key
    free       0            0               no       on the free stack
    cached     0            0               yes      evictable, least recently used first
    deferred   0            1 or more       or not   a launched step may still read or write it
    held       1 or more    any             or not   in that many block tables

    free or cached  -- allocate -------------------->  held
    cached          -- match ----------------------->  held
    held            -- free ------------------------>  cached if it has a key, else free
    held            -- free, after_step in flight -->  deferred
    deferred        -- step_done ------------------->  cached if it has a key, else free
    deferred        -- match ----------------------->  held

Free and cached blocks can be allocated. The allocator hands out plain ints and knows nothing of tensors, requests or
clocks. It takes no lock: all calls are made under the scheduler's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

from semipd.memory.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorStatistics:
    """What a `BlockAllocator` holds and has done; free, deferred and held blocks add up to `num_blocks`."""

    #: blocks in the pool
    num_blocks: int
    #: tokens in a block
    block_size: int
    #: blocks that can be allocated now, cached ones included
    num_free_blocks: int
    #: blocks that wait only for a launched step to end
    num_deferred_blocks: int
    #: blocks in at least one block table
    num_held_blocks: int
    #: blocks that can be matched, whatever their state
    num_cached_blocks: int
    #: cached blocks given up for new content so far
    num_evictions: int

    @property
    def usage(self) -> float:
        """Share of the pool that cannot be allocated now."""
        return 1.0 - self.num_free_blocks / self.num_blocks


class BlockAllocator:
    """Hands out blocks, counts their references, and keeps the content of unused ones for as long as there is room.

    A reference belongs to one entry of one block table: `allocate` and `match` give it, `free` takes it back.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        assert block_size > 0, f"blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # A stack: what was freed last is in the processor's caches, and a use after free shows at once.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_references = [0] * num_blocks
        self._num_pending_drops = [0] * num_blocks
        self._pending_drops: dict[int, list[int]] = {}  # step in flight -> blocks, in the order of their drops
        self._num_deferred = 0
        self._cache = PrefixCache()
        self._num_evictions = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now: free ones and cached ones that nobody references."""
        return len(self._free) + self._cache.num_evictable

    @property
    def num_deferred_blocks(self) -> int:
        """Blocks that become free or cached as soon as launched steps are done, unless they are matched before."""
        return self._num_deferred

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks of no content with one reference each, or None, and no change, if there are fewer.

        Cached blocks go last, the least recently used first.
        """
        assert num_blocks >= 0, f"{num_blocks} blocks asked for"
        if num_blocks > self.num_free_blocks:
            return None
        num_evicted = max(num_blocks - len(self._free), 0)
        block_ids = [self._free.pop() for _ in range(num_blocks - num_evicted)]
        block_ids.extend(self._cache.evict() for _ in range(num_evicted))
        self._num_evictions += num_evicted
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def unused_blocks(self) -> Sequence[int]:
        """Blocks of no content that nobody holds, without taking them: for whoever is done before any is taken."""
        return tuple(self._free)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of keys, with one more reference each.

        Unreferenced ones were counted by `num_free_blocks`, so match first, then ask for the rest. Prefill needs one
        token to compute: leave out the key of a block that ends the prompt.
        """
        if not self.enable_prefix_caching:
            return []
        block_ids = []
        for key in keys:
            block_id = self._cache.find(key)
            if block_id is None:
                break
            self._hold(block_id)
            block_ids.append(block_id)
        return block_ids

    def count_cached(self, keys: Sequence[bytes]) -> int:
        """How many blocks `match` would give; holds none."""
        if not self.enable_prefix_caching:
            return 0
        return sum(1 for _ in takewhile(lambda key: self._cache.find(key) is not None, keys))

    def publish(self, block_id: int, key: bytes) -> None:
        """From now on a held block, computed to its last slot, can be matched by `key`.

        Nothing happens if caching is off or another block has the key already.
        """
        self._assert_held(block_id)
        if self.enable_prefix_caching:
            self._cache.insert(block_id, key)

    def step_launched(self, step_id: int) -> None:
        """A step is in flight from now on."""
        assert step_id not in self._pending_drops, f"step {step_id} is in flight already"
        self._pending_drops[step_id] = []

    def step_done(self, step_id: int) -> None:
        """The step's done event has fired: drops that waited for it happen now. Steps may end in any order."""
        assert step_id in self._pending_drops, f"step {step_id} is not in flight"
        for block_id in self._pending_drops.pop(step_id):
            self._num_pending_drops[block_id] -= 1
            if self._num_references[block_id] == 0 and self._num_pending_drops[block_id] == 0:
                self._num_deferred -= 1
                self._recycle(block_id)

    def free(self, block_ids: Sequence[int], *, after_step: int | None = None, forget: bool = False) -> None:
        """Take back one reference to each block.

        Args:
            block_ids: in the order of a block table. They are given up from the last to the first, as no block can be
                matched without those before it.
            after_step: the last launched step that may touch them by this table; they are not allocated while it is in
                flight. Earlier steps of the table end before it.
            forget: their content is never to be matched again, so their keys go at once.
        """
        pending = None if after_step is None else self._pending_drops.get(after_step)
        for block_id in reversed(block_ids):
            self._assert_held(block_id)
            if forget:
                self._cache.forget(block_id)
            if pending is not None:
                pending.append(block_id)
                self._num_pending_drops[block_id] += 1
            self._num_references[block_id] -= 1
            if self._num_references[block_id] == 0:
                if self._num_pending_drops[block_id]:
                    self._num_deferred += 1
                else:
                    self._recycle(block_id)

    def reset_prefix_cache(self) -> None:
        """Drop all keys, those of held blocks too; block tables stay valid."""
        self._free.extend(self._cache.clear())

    def statistics(self) -> AllocatorStatistics:
        """A snapshot; O(1)."""
        return AllocatorStatistics(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_free_blocks=self.num_free_blocks,
            num_deferred_blocks=self._num_deferred,
            num_held_blocks=self.num_blocks - self.num_free_blocks - self._num_deferred,
            num_cached_blocks=len(self._cache),
            num_evictions=self._num_evictions,
        )

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Check every rule of the module's head in O(num_blocks); meant for tests, and for production in idle moments.

        Args:
            tables: all block tables, without entries freed already. References are compared with them if given.

        Raises:
            AssertionError: a rule is broken; raised under `python -O` too.
        """
        self._cache.check_integrity()
        self._check_states()
        drops = Counter(chain.from_iterable(self._pending_drops.values()))
        _require_equal_counts("pending drops", self._num_pending_drops, drops, "steps in flight")
        if tables is not None:
            rows = [tuple(table) for table in tables]
            for row in rows:
                if len(set(row)) != len(row):
                    raise AssertionError(f"a block is twice in the block table {list(row)}")
            entries = Counter(chain.from_iterable(rows))
            _require_equal_counts("references", self._num_references, entries, "block tables")

    def _check_states(self) -> None:
        evictable = self._cache.evictable_blocks()
        idle = Counter(chain(self._free, evictable))
        num_deferred = 0
        for block_id in range(self.num_blocks):
            num_references, num_drops = self._num_references[block_id], self._num_pending_drops[block_id]
            is_idle = num_references == 0 and num_drops == 0
            num_deferred += num_references == 0 and num_drops > 0
            if min(num_references, num_drops) < 0 or idle[block_id] != is_idle:
                raise AssertionError(
                    f"block {block_id} has {num_references} references and {num_drops} pending drops, "
                    f"and is {idle[block_id]} times among free and evictable blocks"
                )
        foreign = idle.keys() - set(range(self.num_blocks))
        if foreign:
            raise AssertionError(f"free and evictable blocks {sorted(foreign)} are not of this pool")
        keyed = [block_id for block_id in self._free if block_id in self._cache]
        if keyed:
            raise AssertionError(f"blocks {keyed} are free and have a key")
        if num_deferred != self._num_deferred:
            raise AssertionError(f"{num_deferred} blocks are deferred, {self._num_deferred} were counted")

    def _assert_held(self, block_id: int) -> None:
        assert 0 <= block_id < self.num_blocks, f"block {block_id} is not of this pool of {self.num_blocks}"
        assert self._num_references[block_id] > 0, f"block {block_id} is in no block table; freed twice?"

    def _hold(self, block_id: int) -> None:
        if self._num_references[block_id] == 0:
            if self._num_pending_drops[block_id]:
                self._num_deferred -= 1
            else:
                self._cache.retain(block_id)
        self._num_references[block_id] += 1

    def _recycle(self, block_id: int) -> None:
        if block_id in self._cache:
            self._cache.release(block_id)
        else:
            self._free.append(block_id)


def _require_equal_counts(what: str, counted: Sequence[int], found: Counter[int], where: str) -> None:
    for block_id, count in enumerate(counted):
        if count != found[block_id]:
            raise AssertionError(f"block {block_id} has {count} {what}, but {where} hold {found[block_id]}")
    foreign = sorted(block_id for block_id in found if not 0 <= block_id < len(counted))
    if foreign:
        raise AssertionError(f"{where} hold blocks {foreign}, which are not of this pool")

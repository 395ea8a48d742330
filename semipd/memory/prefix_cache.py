"""Which blocks hold which tokens: keys of full blocks, and the blocks that may be found again by them.

A key names a block's tokens and everything before them, so equal keys mean equal KV and no tokens are compared. This
module knows keys and order of use; who references a block is the allocator's business. Keys never leave the process.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

# 256 bits: a prompt crafted to collide with another tenant's would take 2**128 hashes; 16 bytes would save nothing.
_KEY_BYTES = 32
_ROOT = bytes(_KEY_BYTES)


def block_keys(token_ids: Sequence[int], block_size: int, *, cache_salt: str | None = None, keys: list[bytes]) -> None:
    """Append to `keys` the keys of the full blocks of `token_ids`.

    Args:
        token_ids: the request's tokens behind the blocks that have keys: a decoding request gives its last few only and
            is spared a copy of the whole context, 43 us at 8k tokens.
        block_size: tokens in a block.
        cache_salt: keeps blocks apart whose tokens are equal: those of tenants, of adapters; it salts the first key.
        keys: the request's chain of keys so far, in the order of its blocks; extended in place.
    """
    parent = keys[-1] if keys else _root(cache_salt)
    for begin in range(0, len(token_ids) - block_size + 1, block_size):
        digest = blake2b(parent, digest_size=_KEY_BYTES)
        digest.update(array("q", token_ids[begin : begin + block_size]).tobytes())
        parent = digest.digest()
        keys.append(parent)


def _root(cache_salt: str | None) -> bytes:
    if cache_salt is None:
        return _ROOT
    # surrogatepass: any str a user can make has a key, so this cannot raise inside a lane.
    return blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


class PrefixCache:
    """Keys of blocks, blocks of keys, and the order in which unused blocks with a key are given up.

    A block with a key is in use or evictable, as its owner says by `retain` and `release`. Every call but `clear` and
    `check_integrity` is O(1).
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Least recently used first. Not a dict: finding a dict's first item again and again scans its deleted entries.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks with a key."""
        return len(self._key_of)

    def __contains__(self, block_id: int) -> bool:
        """Whether the block has a key."""
        return block_id in self._key_of

    @property
    def num_evictable(self) -> int:
        """Blocks with a key that nobody uses."""
        return len(self._evictable)

    def find(self, key: bytes) -> int | None:
        """The block of `key`, or None."""
        return self._block_of.get(key)

    def insert(self, block_id: int, key: bytes) -> None:
        """Give a block in use its key. A key that another block has already stays there."""
        owner = self._block_of.setdefault(key, block_id)
        if owner == block_id:
            old_key = self._key_of.setdefault(block_id, key)
            assert old_key == key, f"block {block_id} has the key {old_key.hex()} and was given {key.hex()}"

    def forget(self, block_id: int) -> None:
        """Drop the key, if any, of a block in use."""
        assert block_id not in self._evictable, f"block {block_id} is not in use; evict it"
        key = self._key_of.pop(block_id, None)
        if key is not None:
            del self._block_of[key]

    def release(self, block_id: int) -> None:
        """The block, which has a key, is not in use any more: evictable, after all those that are so already."""
        assert block_id in self._key_of, f"block {block_id} has no key"
        assert block_id not in self._evictable, f"block {block_id} is evictable already"
        self._evictable[block_id] = None

    def retain(self, block_id: int) -> None:
        """The evictable block is in use again; its key stays."""
        del self._evictable[block_id]

    def evict(self) -> int:
        """The least recently used evictable block, now without a key. There must be one."""
        block_id, _ = self._evictable.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        return block_id

    def clear(self) -> list[int]:
        """Drop all keys, and return the blocks that were evictable."""
        evicted = list(self._evictable)
        self._evictable.clear()
        self._key_of.clear()
        self._block_of.clear()
        return evicted

    def evictable_blocks(self) -> tuple[int, ...]:
        """Blocks with a key that nobody uses, the next to be evicted first."""
        return tuple(self._evictable)

    def check_integrity(self) -> None:
        """Check that the maps are mutual inverses and that evictable blocks have keys.

        Raises:
            AssertionError: they are not; raised under `python -O` too.
        """
        if self._key_of != {block_id: key for key, block_id in self._block_of.items()}:
            raise AssertionError("the maps from keys to blocks and from blocks to keys are not inverses")
        without_key = [block_id for block_id in self._evictable if block_id not in self._key_of]
        if without_key:
            raise AssertionError(f"blocks {without_key} are evictable and have no key")

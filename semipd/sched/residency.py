"""What a running request holds of the device: a slot and blocks.

    block_ids:   [0 ......... freed) [freed ....... published) [published .. staged) [staged ..... len)
                 fell out of the     this request's, and       this request's,       this request's, not yet
                 sliding window      matched by others         known to the device   in the device's table

Called only under the scheduler's lock, but for `hash_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence

from semipd.memory.block_allocator import BlockAllocator
from semipd.memory.prefix_cache import block_keys
from semipd.request import Request

_SPARE = 8  # the share of slots and of blocks that is kept for prompts in time: one of so many; of fewer, none


class Residency:
    """Gives slots and blocks to requests and takes them back behind their last launched step."""

    def __init__(self, allocator: BlockAllocator, *, num_slots: int, window: int | None) -> None:
        self.allocator = allocator
        self._window = window
        self._num_slots = num_slots
        self._free_slots = list(reversed(range(num_slots)))

    @property
    def has_free_slot(self) -> bool:
        """Whether one more request can run."""
        return bool(self._free_slots)

    @property
    def num_spare_blocks(self) -> int:
        """Blocks that are not for late prompts."""
        return self.allocator.num_blocks // _SPARE

    @property
    def is_scarce(self) -> bool:
        """Whether no more than the spare slots or blocks are free."""
        num_spare_slots = self._num_slots // _SPARE
        return len(self._free_slots) <= num_spare_slots or self.allocator.num_free_blocks <= self.num_spare_blocks

    def hash_prompt(self, request: Request) -> None:
        """Make the keys of the prompt's blocks: before the lock, while nobody else sees it. 9 ms at 128k tokens.

        A sample of the same prompt takes its leader's.
        """
        if not self.allocator.enable_prefix_caching:
            return
        if request.leader is not None and not request.block_keys:
            num_full = len(request.prompt_token_ids) // self.allocator.block_size
            request.block_keys = request.leader.block_keys[:num_full]
        self._extend_keys(request)

    def try_admit(self, request: Request, *, reserve: int) -> bool:
        """A slot, and blocks for all known tokens, prefix hits first; False, with nothing held, when they do not fit.

        `reserve` blocks stay free: one for each running request, so that admitting this one does not preempt another
        at once.
        """
        allocator = self.allocator
        block_size = allocator.block_size
        num_tokens = request.num_tokens
        num_blocks = num_tokens // block_size + 1  # room for the next token too
        cached = allocator.match(self._usable_keys(request))
        fresh = None
        if num_blocks - len(cached) + reserve <= allocator.num_free_blocks:
            fresh = allocator.allocate(num_blocks - len(cached))
        if fresh is None:
            allocator.free(cached)
            return False
        request.slot = self._free_slots.pop()
        request.block_ids = cached + fresh
        request.num_published_blocks = len(cached)
        request.num_computed_tokens = request.num_scheduled_tokens = len(cached) * block_size
        return True

    def count_cached_tokens(self, request: Request) -> int:
        """Tokens that admitting the request now would find in the prefix cache."""
        return self.allocator.count_cached(self._usable_keys(request)) * self.allocator.block_size

    def free_blocks(self, request: Request, *, after_step: int | None) -> None:
        """Give all blocks back, free once step `after_step` is done."""
        self.allocator.free(request.block_ids[request.num_freed_blocks :], after_step=after_step)
        request.block_ids = []
        request.num_freed_blocks = request.num_staged_blocks = request.num_published_blocks = 0

    def free_slot(self, request: Request) -> None:
        """Give the slot back; no launched step may hold the request."""
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None

    def free_behind_window(self, request: Request, step_id: int) -> None:
        """Let go of the blocks that only steps up to `step_id` can still read.

        The next query stands at num_scheduled_tokens and reads `window` positions, itself included.
        """
        if self._window is None:
            return
        num_unreachable = max(0, request.num_scheduled_tokens + 1 - self._window) // self.allocator.block_size
        if num_unreachable > request.num_freed_blocks:
            gone = request.block_ids[request.num_freed_blocks : num_unreachable]
            request.num_freed_blocks = num_unreachable
            request.num_published_blocks = max(request.num_published_blocks, num_unreachable)
            self.allocator.free(gone, after_step=step_id, forget=True)

    def publish(self, request: Request) -> None:
        """Offer the request's full, computed blocks to the prefix cache."""
        allocator = self.allocator
        num_full = request.num_computed_tokens // allocator.block_size
        if num_full <= request.num_published_blocks or not allocator.enable_prefix_caching:
            return
        if num_full > len(request.block_keys):
            self._extend_keys(request)
        for index in range(request.num_published_blocks, num_full):
            allocator.publish(request.block_ids[index], request.block_keys[index])
        request.num_published_blocks = num_full

    def _usable_keys(self, request: Request) -> Sequence[bytes]:
        """Keys of the blocks that need not be computed if they are cached."""
        if not self.allocator.enable_prefix_caching:
            return ()
        self._extend_keys(request)
        if request.num_prompt_logprobs_wanted is not None:
            return ()
        # The last token is always computed: its logits choose the next one.
        return request.block_keys[: (request.num_tokens - 1) // self.allocator.block_size]

    def _extend_keys(self, request: Request) -> None:
        """Keys for all full blocks of known tokens."""
        block_size = self.allocator.block_size
        missing = request.token_ids_from(len(request.block_keys) * block_size)
        block_keys(missing, block_size, cache_salt=request.cache_salt, keys=request.block_keys)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Assert that slots and blocks have exactly the owners that `running` names."""
        self.allocator.check_integrity([r.block_ids[r.num_freed_blocks :] for r in running])
        held = {r.slot for r in running}
        assert len(held) == len(running) and None not in held, "two running requests share a slot, or one has none"
        assert held.isdisjoint(self._free_slots), "a running request's slot is in the free list"

"""The block allocator and its prefix cache against a plain model.

The model runs requests with real tokens through two lanes whose steps end in any interleaving. It knows which blocks
each launched step touches, so it also states what the allocator exists for: nothing that a step may still read or write
is ever handed out, and a match yields exactly the tokens that were asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semipd.config import Phase
from semipd.memory.block_allocator import BlockAllocator
from semipd.memory.prefix_cache import block_keys

BLOCK_SIZES = (1, 2, 16)


@dataclasses.dataclass(eq=False, repr=False)
class ModelRequest:
    """A request as the model sees it: tokens it has room for, and the blocks of its window."""

    token_ids: list[int]
    table: list[int]  # all its blocks
    keys: list[bytes]
    num_published: int  # of its keys
    num_freed: int = 0  # blocks that its window has passed
    last_step_id: int = -1

    @property
    def held(self) -> list[int]:
        return self.table[self.num_freed :]

    def __repr__(self) -> str:
        return f"<{len(self.token_ids)} tokens in {self.held}, last in step {self.last_step_id}>"


class AllocatorMachine(RuleBasedStateMachine):
    """Random requests in two lanes; the model is dictionaries, lists and sets written for clarity alone."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[ModelRequest] = []
        self.lanes: dict[Phase, list[int]] = {phase: [] for phase in Phase}
        self.touched: dict[int, set[int]] = {}  # step in flight -> blocks that it may read or write
        self.waits_for: dict[int, set[int]] = {}  # step -> steps that end before it
        self.drops: dict[int, list[int]] = {}  # step in flight -> blocks dropped when it is done
        self.block_of: dict[bytes, int] = {}
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, when it was published
        self.cached: list[int] = []  # least recently used first
        self.next_step_id = 0

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from(BLOCK_SIZES),
        enable_prefix_caching=st.sampled_from((True, True, True, False)),
    )
    def make(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.block_size = block_size
        self.free = set(range(num_blocks))

    # What the model does

    def references(self) -> Counter[int]:
        return Counter(block_id for request in self.requests for block_id in request.held)

    def deferred(self) -> set[int]:
        return {block_id for drops in self.drops.values() for block_id in drops} - set(self.references())

    def settle(self, block_ids: list[int]) -> None:
        """Blocks that lost references, in that order, go where they belong if those were the last."""
        in_use = set(self.references()) | {block_id for drops in self.drops.values() for block_id in drops}
        for index, block_id in enumerate(block_ids):
            if block_id in in_use or block_id in block_ids[index + 1 :]:  # two requests may leave with one step
                continue
            if block_id in self.block_of.values():
                self.cached.append(block_id)
            else:
                self.free.add(block_id)

    def take(self, num_blocks: int) -> list[int] | None:
        """Allocate, and hold the answer against the model."""
        num_free = len(self.free) + len(self.cached)
        block_ids = self.allocator.allocate(num_blocks)
        if num_blocks > num_free:
            assert block_ids is None
            return None
        assert block_ids is not None
        assert len(set(block_ids)) == num_blocks
        taken = set(block_ids)
        assert taken.isdisjoint(self.references())
        for step_id, touched in self.touched.items():
            assert taken.isdisjoint(touched), f"blocks of step {step_id} were handed out while it is in flight"
        evicted = taken - self.free
        assert evicted == set(self.cached[: max(num_blocks - len(self.free), 0)])
        self.free -= taken
        self.cached = [block_id for block_id in self.cached if block_id not in evicted]
        self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in evicted}
        return block_ids

    def drop(self, block_ids: list[int], after_step: int | None, *, forget: bool = False) -> None:
        """Free blocks that have left their table, and do the same in the model."""
        self.allocator.free(block_ids, after_step=after_step, forget=forget)
        if forget:
            self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in block_ids}
        if after_step in self.drops:
            self.drops[after_step].extend(reversed(block_ids))
        self.settle(block_ids[::-1])

    # What the scheduler does

    @rule(
        head=st.lists(st.sampled_from((0, 0, 0, 1)), min_size=1, max_size=5),
        num_missing=st.integers(0, 15),
        phase=st.sampled_from(Phase),
    )
    def admit(self, head: list[int], num_missing: int, phase: Phase) -> None:
        # All tokens of a block are equal, so that prefixes coincide often at any block size.
        token_ids = [token for token in head for _ in range(self.block_size)]
        token_ids = token_ids[: len(token_ids) - num_missing % self.block_size]
        keys: list[bytes] = []
        block_keys(token_ids[:-1], self.block_size, keys=keys)
        expected = list(itertools.takewhile(lambda b: b is not None, map(self.block_of.get, keys)))
        table = self.allocator.match(keys)
        assert table == expected
        for index, block_id in enumerate(table):
            assert self.contents[block_id] == tuple(token_ids[: (index + 1) * self.block_size])
        self.cached = [block_id for block_id in self.cached if block_id not in table]
        request = ModelRequest(token_ids, table, keys, num_published=len(table))
        self.requests.append(request)
        fresh = self.take(-(-len(token_ids) // self.block_size) - len(table))
        if fresh is None:
            self.requests.remove(request)
            self.drop(table, None)
        else:
            table.extend(fresh)
            self.launch(phase, [request])

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 1), phase=st.sampled_from(Phase))
    def decode(self, data: st.DataObject, token: int, phase: Phase) -> None:
        requests = data.draw(st.lists(st.sampled_from(self.requests), min_size=1, max_size=3, unique=True))
        fresh = self.take(len(requests))
        if fresh is not None:
            for request, block_id in zip(requests, fresh, strict=True):
                num_missing = len(request.table) * self.block_size - len(request.token_ids)
                request.token_ids.extend([token] * (num_missing + self.block_size))
                request.table.append(block_id)
        self.launch(phase, requests)

    def launch(self, phase: Phase, requests: list[ModelRequest]) -> None:
        step_id, self.next_step_id = self.next_step_id, self.next_step_id + 1
        self.allocator.step_launched(step_id)
        self.lanes[phase].append(step_id)
        self.drops[step_id] = []
        self.touched[step_id] = {block_id for request in requests for block_id in request.held}
        # A request's steps are ordered by events, whichever lane runs them.
        self.waits_for[step_id] = {request.last_step_id for request in requests}
        for request in requests:
            request.last_step_id = step_id

    @precondition(lambda self: self.touched)
    @rule(data=st.data())
    def finish_step(self, data: st.DataObject) -> None:
        heads = [steps[0] for steps in self.lanes.values() if steps]
        step_id = data.draw(st.sampled_from([s for s in heads if self.waits_for[s].isdisjoint(self.touched)]))
        self.step_done(step_id)
        for request in self.requests:
            if request.last_step_id == step_id:
                self.publish(request)

    def step_done(self, step_id: int) -> None:
        self.allocator.step_done(step_id)
        for steps in self.lanes.values():
            if step_id in steps:
                steps.remove(step_id)
        del self.touched[step_id]
        self.settle(self.drops.pop(step_id))

    def publish(self, request: ModelRequest) -> None:
        block_keys(request.token_ids[len(request.keys) * self.block_size :], self.block_size, keys=request.keys)
        for index in range(max(request.num_published, request.num_freed), len(request.keys)):
            block_id, key = request.table[index], request.keys[index]
            self.allocator.publish(block_id, key)
            if self.allocator.enable_prefix_caching and key not in self.block_of:
                self.block_of[key] = block_id
                self.contents[block_id] = tuple(request.token_ids[: (index + 1) * self.block_size])
        request.num_published = len(request.keys)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish_request(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.drop(request.held, request.last_step_id)

    @precondition(lambda self: any(len(request.held) > 1 for request in self.requests))
    @rule(data=st.data(), forget=st.booleans())
    def slide_window(self, data: st.DataObject, forget: bool) -> None:
        request = data.draw(st.sampled_from([request for request in self.requests if len(request.held) > 1]))
        passed = request.held[:1]
        request.num_freed += 1
        self.drop(passed, request.last_step_id, forget=forget)

    @precondition(lambda self: self.next_step_id % 8 == 7)  # now and then
    @rule()
    def reset_prefix_cache(self) -> None:
        self.allocator.reset_prefix_cache()
        self.block_of.clear()
        self.free.update(self.cached)
        self.cached.clear()

    @precondition(lambda self: self.next_step_id % 8 == 7)
    @rule()
    def drain(self) -> None:
        """Abort all requests, then end all steps: every block comes back."""
        while self.requests:
            request = self.requests.pop()
            self.drop(request.held, request.last_step_id)
        for step_id in sorted(self.touched):
            self.step_done(step_id)
        assert self.allocator.num_free_blocks == self.allocator.num_blocks

    # What always holds

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.allocator.check_integrity([request.held for request in self.requests])
        statistics = self.allocator.statistics()
        assert statistics.num_free_blocks == self.allocator.num_free_blocks == len(self.free) + len(self.cached)
        assert statistics.num_deferred_blocks == self.allocator.num_deferred_blocks == len(self.deferred())
        assert statistics.num_held_blocks == len(self.references())
        assert statistics.num_cached_blocks == len(self.block_of)
        num_used = len(self.references()) + len(self.deferred())
        assert statistics.usage == pytest.approx(num_used / statistics.num_blocks)


TestAllocatorMachine = AllocatorMachine.TestCase
# Runs from which hypothesis leaves `admit` out end at once: draw more than the profile says.
TestAllocatorMachine.settings = settings(max_examples=4 * settings().max_examples, stateful_step_count=40)

"""Where the rows of a step lie on the device: decodes, chunks, padding, in shapes with more room than they need.

The runner's own launches around a decoder that does nothing but attend, over a pool of NaN, in the interpreter.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from semipd.config import Phase
from semipd.device.cpu import CpuPartitionBackend
from semipd.kernels.ops import AttentionPlan, AttentionSpec, StepContext
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.gpu_runner import GpuRunner
from semipd.model.step_inputs import Buckets, StepShape
from semipd.sched.batch import Batch, PrefillEntry, SamplingFeature
from tests.fakes import EagerGraphs
from tests.kernels.contexts import Contexts, Heads

HEADS = Heads(head_dim=16, block_size=16)
MAX_SEQS = 24
MAX_PROMPT_ROWS = 24
VOCAB = 50
SCALE = 0.3
STALE = 7  # where an earlier step may have left anything


class Attention:
    """As much of a decoder as the runner's launches need."""

    def __init__(self, window: int | None) -> None:
        self.attention = AttentionSpec(inv_freq=torch.ones(1), scale=SCALE, windows=(window,))
        self.q_TNH = torch.empty(0)
        self.token_ids_T = torch.empty(0)

    def forward(self, token_ids_T: Tensor, plan: AttentionPlan, context: StepContext) -> Tensor:
        self.token_ids_T = token_ids_T.clone()
        q_TNH = torch.full((len(token_ids_T), *self.q_TNH.shape[1:]), math.nan)
        q_TNH[: len(self.q_TNH)] = self.q_TNH
        context.buffer("attended", tuple(q_TNH.shape), q_TNH).fill_(math.nan)
        return plan.attend(0, q_TNH, context)


class Bench:
    """A step of decodes of these context lengths, and of chunks by (context length, rows)."""

    def __init__(self, decodes: list[int], chunks: list[tuple[int, int]], window: int | None) -> None:
        self.num_decodes = len(decodes)
        sizes = [(length, 1) for length in decodes] + chunks
        self.contexts = contexts = Contexts(HEADS, sizes, window)
        self.q_TNH, _ = contexts.queries()
        table_XN = contexts.block_table_XN
        self.decoder = Attention(window)
        self.decoder.q_TNH = self.q_TNH
        kv = contexts.kv_R2KH.view(1, -1, HEADS.block_size, 2, HEADS.num_kv_heads, HEADS.head_dim)
        pool = SimpleNamespace(kv_LPS2KH=kv, block_size=HEADS.block_size)
        max_slots = len(table_XN) - 1
        self.runner = GpuRunner(
            decoder=cast("Decoder", self.decoder),
            sampler=CudaSampler(max_slots=max_slots, vocab_size=VOCAB, device=torch.device("cpu")),
            kv_cache=cast("KVCache", pool),
            backend=CpuPartitionBackend(),
            graphs=EagerGraphs(),
            buckets=dict.fromkeys(Phase, Buckets(MAX_SEQS, MAX_PROMPT_ROWS)),
            num_heads=HEADS.num_heads,
            max_slots=max_slots,
            max_model_len=(table_XN.shape[1] - 1) * HEADS.block_size,
            device=torch.device("cpu"),
        )
        self.runner._block_table_XN.copy_(table_XN)
        rng = random.Random(0)
        self.token_ids = [rng.randrange(VOCAB) for _ in range(len(self.q_TNH))]
        entries: list[PrefillEntry] = []
        row = self.num_decodes
        for slot, (length, num_rows) in list(zip(contexts.slots, sizes, strict=True))[self.num_decodes :]:
            entries.append(
                PrefillEntry(slot, length - num_rows, tuple(self.token_ids[row : row + num_rows]), samples=not entries)
            )
            row += num_rows
        self.batch = Batch(
            step_id=0,
            phase=Phase.DECODE,
            num_sms=3,
            decode_slots=tuple(contexts.slots[: self.num_decodes]),
            prefill=tuple(entries),
            block_updates=(),
            features=SamplingFeature.NONE,
        )
        self.run(Buckets(MAX_SEQS, MAX_PROMPT_ROWS).largest)  # after which no buffer grows

    def run(self, shape: StepShape, num_sampled: int = MAX_SEQS) -> Any:
        """Launch the step; returns the lane's inputs."""
        runner, lane = self.runner, self.runner._lanes[Phase.DECODE]
        runner._lengths_X.fill_(STALE)
        last_token = runner._sampler.last_token
        for row, slot in enumerate(self.batch.decode_slots):
            runner._lengths_X[slot] = self.contexts.sizes[row][0] - 1
            last_token[slot] = self.token_ids[row]
        for stale in (lane.inputs.token_ids_T, lane.inputs.positions_T, lane.inputs.slot_mapping_T):
            stale.fill_(STALE)
        lane.inputs.context_lens_B.fill_(STALE)
        runner._stage(lane, self.batch, shape, num_sampled)
        runner._launch_layers(lane, shape, self.batch.num_sms)
        return lane.inputs

    def output(self, num_rows: int) -> Tensor:
        hidden_TD = self.runner._lanes[Phase.DECODE].hidden_TD[:num_rows]
        return hidden_TD.view(num_rows, HEADS.num_heads, HEADS.head_dim).clone()


CHUNKS = [(21, 6), (1, 1), (16, 5)]


@pytest.mark.parametrize(("decodes", "window"), [([], None), ([1], None), ([530, 16, 3], None), ([16, 17, 50], 9)])
def test_no_row_depends_on_the_room_around_it(decodes: list[int], window: int | None) -> None:
    bench = Bench(decodes, CHUNKS, window)
    num_rows = bench.batch.num_tokens
    exact = StepShape(num_rows=num_rows, max_decodes=len(decodes), max_chunks=len(CHUNKS))
    bench.run(exact)
    first = bench.output(num_rows)
    error = (first.double() - bench.contexts.expected(bench.q_TNH, SCALE)).abs().max()
    assert error <= 1e-5
    for more_rows, max_decodes, max_chunks in ((0, MAX_SEQS, 3), (5, len(decodes), 4), (30, MAX_SEQS, MAX_SEQS)):
        shape = StepShape(num_rows=num_rows + more_rows, max_decodes=max_decodes, max_chunks=max_chunks)
        inputs = bench.run(shape)
        attended = bench.output(shape.num_rows)
        assert torch.equal(attended[:num_rows], first)
        assert attended[num_rows:].isnan().all(), "a row of padding was written"
        assert bench.decoder.token_ids_T.tolist() == bench.token_ids + [0] * more_rows
        assert inputs.slot_mapping_T[num_rows : shape.num_rows].eq(-1).all()
        for (length, count), slot in zip(bench.contexts.sizes, bench.contexts.slots, strict=True):
            assert int(bench.runner._lengths_X[slot]) == length and count
        assert int(bench.runner._lengths_X[-1]) == STALE  # the null slot's


def test_each_row_has_its_position_and_place() -> None:
    bench = Bench([40, 16], CHUNKS, None)
    inputs = bench.run(StepShape(num_rows=16, max_decodes=MAX_SEQS, max_chunks=MAX_SEQS))
    positions, row = [], 0
    table_XN, block_size = bench.contexts.block_table_XN, HEADS.block_size
    for (length, count), slot in zip(bench.contexts.sizes, bench.contexts.slots, strict=True):
        for position in range(length - count, length):
            positions.append(position)
            place = int(table_XN[slot, position // block_size]) * block_size + position % block_size
            assert int(inputs.slot_mapping_T[row]) == place
            row += 1
    assert inputs.positions_T[:row].tolist() == positions
    assert inputs.context_lens_B.tolist() == [40, 16] + [0] * (MAX_SEQS - 2)
    rows = [0, 1, 7]  # and the last one of the chunk that samples
    assert inputs.sampled_rows(8).tolist() == rows + [-1] * 5
    slots = bench.contexts.slots
    null_slot = len(table_XN) - 1
    assert inputs.sampled_slots(8).tolist() == [*slots[:3], *[null_slot] * 5]


def test_a_step_of_padding_alone_writes_nothing() -> None:
    bench = Bench([5], [(3, 2)], None)
    bench.batch = Batch(0, Phase.DECODE, 3, (), (), (), SamplingFeature.NONE)
    inputs = bench.run(StepShape(num_rows=32, max_decodes=MAX_SEQS, max_chunks=16))
    assert bench.output(32).isnan().all()
    assert inputs.slot_mapping_T[:32].eq(-1).all()
    assert bench.runner._lengths_X.eq(STALE).all()

"""A decoder on several ranks against the same model on one, over a pool of NaN. Ranks are threads.

`tests/model/test_decoder.py` compares the latter with `transformers`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.kernels.ops import AttentionPlan, PeerSums, StepContext, create_ops
from semipd.kernels.paged_attention import AttentionMetadata, PrefillMetadata
from semipd.kernels.prefill_attention import prefill_config, prefill_tiles
from semipd.kernels.reference import ReferencePlan
from semipd.kernels.triton_attention import DeviceMetadata, TritonPlan
from semipd.memory.kv_cache import KVCache
from semipd.model.decoder import Decoder
from semipd.model.families import expected_weights
from semipd.model.lane_memory import LaneBuffers
from semipd.model.spec import ModelSpec
from tests.parallel.shards import shard_of
from tests.parallel.thread_group import ThreadGroup, ThreadPeerSums, run_ranks

if TYPE_CHECKING:
    from semipd.parallel.group import TensorGroup

# Largest difference in units of the largest value: of orders of addition alone.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
BLOCK_SIZE = 16
VOCAB = 61  # which is odd, so that the last rank has padding
TABLE = ((3, 1), (0, 2), (0, 0))  # blocks of two requests and of none
CPU = torch.device("cpu")

CASES: dict[str, dict[str, Any]] = {
    "two KV heads": {},
    "one KV head, tied": {"num_kv_heads": 1, "tie_word_embeddings": True},
    "four KV heads, windows": {"num_kv_heads": 4, "sliding_windows": (7, None)},
    "all biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "biases of qkv, wide heads": {"qkv_bias": True, "head_dim": 16},
    "norms of heads, tied": {"qk_norm": True, "tie_word_embeddings": True},
}


def spec_of(case: str) -> ModelSpec:
    sizes: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
    }
    return ModelSpec(**sizes | CASES[case])


def random_weights(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in expected_weights(spec).items():
        values = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
        weights[name] = (values + 1 if name.endswith("norm.weight") else values).to(dtype)
    return weights


@dataclass(frozen=True)
class Step:
    """Decodes are (request, position, token), chunks (request, start, tokens)."""

    phase: Phase
    decodes: Sequence[tuple[int, int, int]]
    chunks: Sequence[tuple[int, int, Sequence[int]]]

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        chunks = self.chunks
        return [
            *self.decodes,
            *((slot, at, token) for slot, start, ids in chunks for at, token in enumerate(ids, start)),
        ]

    @property
    def slot_mapping(self) -> list[int]:
        return [TABLE[slot][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for slot, at, _ in self.rows]


def steps() -> list[Step]:
    """A prompt in two chunks, the second beside another prompt, and both decoded beside a chunk."""
    rng = random.Random(0)
    first, second = ([rng.randrange(VOCAB) for _ in range(length)] for length in (26, 19))
    return [
        Step(Phase.PREFILL, [], [(0, 0, first[:11])]),
        Step(Phase.PREFILL, [], [(0, 11, first[11:25]), (1, 0, second[:5])]),
        Step(Phase.DECODE, [(0, 25, first[25])], [(1, 5, second[5:18])]),
        Step(Phase.DECODE, [(1, 18, second[18])], []),
    ]


def reference_plan(step: Step, decoder: Decoder, cache: KVCache, num_heads: int, context: StepContext) -> AttentionPlan:
    prefills, row = [], len(step.decodes)
    for slot, start, ids in step.chunks:
        table_N = torch.tensor(TABLE[slot])
        prefills.append(PrefillMetadata(row_start=row, num_rows=len(ids), start_position=start, block_table_N=table_N))
        row += len(ids)
    metadata = AttentionMetadata(
        slot_mapping_T=torch.tensor(step.slot_mapping),
        num_decodes=len(step.decodes),
        decode_block_table_BN=torch.tensor([TABLE[slot] for slot, _, _ in step.decodes], dtype=torch.int64).view(-1, 2),
        decode_context_lens_B=torch.tensor([at + 1 for _, at, _ in step.decodes], dtype=torch.int64),
        prefills=tuple(prefills),
    )
    positions_T = torch.tensor([at for _, at, _ in step.rows])
    return ReferencePlan(positions_T, metadata, cache.kv_LPS2KH, decoder.attention)


def triton_plan(step: Step, decoder: Decoder, cache: KVCache, num_heads: int, context: StepContext) -> AttentionPlan:
    kv_LPS2KH = cache.kv_LPS2KH
    config = prefill_config(kv_LPS2KH.shape[-1], BLOCK_SIZE, kv_LPS2KH.dtype, has_tma=False)
    chunks, row = [], len(step.decodes)
    for slot, start, ids in step.chunks:
        chunks.append((slot, row, len(ids), start))
        row += len(ids)
    int32 = partial(torch.tensor, dtype=torch.int32)
    metadata = DeviceMetadata(
        positions_T=int32([at for _, at, _ in step.rows]),
        slot_mapping_T=int32(step.slot_mapping),
        block_table_XN=int32(TABLE),
        decode_slots_B=int32([slot for slot, _, _ in step.decodes]),
        decode_context_lens_B=int32([at + 1 for _, at, _ in step.decodes]),
        prefill_tiles_G4=int32(prefill_tiles(chunks, config.block_m)).view(-1, 4),
    )
    return TritonPlan(metadata, kv_LPS2KH, decoder.attention, num_heads=num_heads, prefill=config, context=context)


Outputs = list[tuple[Tensor, Tensor]]
"""Hidden states and logits of each step."""


def run(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    table: str,
    group: TensorGroup | None,
    peers: Mapping[Phase, PeerSums] = MappingProxyType({}),
) -> Outputs:
    shard = Shard() if group is None else group.shard
    local, mine = spec.shard(shard), shard_of(weights, spec, shard)
    dtype = weights["model.norm.weight"].dtype
    decoder = Decoder(spec, mine, create_ops(table), group)
    layout = local.kv_layout(dtype.itemsize)
    cache = KVCache(layout=layout, num_blocks=4, block_size=BLOCK_SIZE, dtype=dtype, device="cpu")
    cache.fill_(math.nan)
    make_plan = reference_plan if table == "reference" else triton_plan
    index_dtype = torch.int64 if table == "reference" else torch.int32
    buffers = {phase: None if table == "reference" else LaneBuffers(CPU) for phase in Phase}
    outputs = []
    for step in steps():
        context = StepContext(num_sms=2, buffers=buffers[step.phase], phase=step.phase, peers=peers.get(step.phase))
        plan = make_plan(step, decoder, cache, local.num_heads, context)
        token_ids_T = torch.tensor([token for _, _, token in step.rows], dtype=index_dtype)
        hidden_TD = decoder.forward(token_ids_T, plan, context).clone()
        outputs.append((hidden_TD, decoder.compute_logits(hidden_TD, context).clone()))
    return outputs


def assert_same(ranks: Sequence[Outputs], whole: Outputs, tolerance: float) -> None:
    for outputs in ranks:
        for mine, theirs, first in zip(outputs, whole, ranks[0], strict=True):
            for actual, expected, bits in zip(mine, theirs, first, strict=True):
                assert actual.shape == expected.shape
                assert torch.equal(actual, bits), "ranks differ"
                assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_does(case: str, dtype: torch.dtype, world_size: int) -> None:
    spec = spec_of(case)
    weights = random_weights(spec, dtype)
    with torch.inference_mode():
        whole = run(spec, weights, "reference", None)
    ranks = run_ranks(world_size, lambda group: run(spec, weights, "reference", group))
    assert_same(ranks, whole, TOLERANCE[dtype] if world_size > 1 else 0.0)


def test_peers_sum_small_steps_through_both_halves_in_turn() -> None:
    spec = spec_of("norms of heads, tied")
    weights = random_weights(spec, torch.float64)
    with torch.inference_mode():
        whole = run(spec, weights, "reference", None)

    def body(group: TensorGroup) -> Outputs:
        assert isinstance(group, ThreadGroup)
        peers = {phase: ThreadPeerSums(group.communicator(phase), max_rows=14) for phase in Phase}
        outputs = run(spec, weights, "reference", group, peers)
        num_steps = {Phase.PREFILL: 1, Phase.DECODE: 2}  # of up to so many rows
        for phase, count in num_steps.items():
            assert peers[phase].halves == [0, 1] * spec.num_layers * count
            assert group.communicator(phase).num_calls["all_reduce_"] == 2 + 2 * spec.num_layers * (2 - count)
        return outputs

    assert_same(run_ranks(2, body), whole, TOLERANCE[torch.float64])


@pytest.mark.parametrize(("case", "world_size"), [("biases of qkv, wide heads", 4), ("norms of heads, tied", 2)])
def test_kernels_compute_the_same(case: str, world_size: int) -> None:
    spec = spec_of(case)
    weights = random_weights(spec, torch.float32)
    with torch.inference_mode():
        whole = run(spec, weights, "reference", None)
    ranks = run_ranks(world_size, lambda group: run(spec, weights, "triton", group))
    assert_same(ranks, whole, TOLERANCE[torch.float32])

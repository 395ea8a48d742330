"""What a model is on each of several ranks: sizes that divide, and messages about those that do not."""

from __future__ import annotations

import re

import pytest

from semipd.config import Shard
from semipd.errors import ConfigError
from semipd.model.spec import ModelSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=1001,
    hidden_size=96,
    intermediate_size=240,
    num_layers=3,
    num_heads=24,
    num_kv_heads=4,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope_theta=1e4,
    sliding_windows=(7, 9, 11),
)


def sizes(spec: ModelSpec) -> tuple[int, int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.intermediate_size, spec.vocab_size


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(1, (24, 4, 240, 1001)), (2, (12, 2, 120, 501)), (4, (6, 1, 60, 251)), (8, (3, 1, 30, 126)), (24, (1, 1, 10, 42))],
)
def test_a_rank_has_its_heads_features_and_padded_vocabulary(world_size: int, expected: tuple[int, ...]) -> None:
    for rank in {0, world_size - 1}:
        local = SPEC.shard(Shard(rank=rank, world_size=world_size))
        assert sizes(local) == expected
        assert (local.hidden_size, local.head_dim, local.sliding_windows) == (96, 8, (7, 9, 11))
        (group,) = local.kv_layout(2).groups
        assert (group.token_shape, group.window) == ((2, expected[1], 8), 11)


def test_one_rank_has_the_whole() -> None:
    assert SPEC.shard(Shard()) == SPEC


@pytest.mark.parametrize(
    "world_size", [3, 5, 6, 16, 48]
)  # of KV heads, of heads and all, of KV heads, of features, of heads
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(world_size: int) -> None:
    message = (
        f"tensor_parallel_size is {world_size}, but the model has 24 query heads, 4 KV heads and 240 feed-forward "
        "features; expected a divisor of query heads and of features which divides the KV heads or is a multiple of "
        "them: 1, 2, 4, 8, 12, 24"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        SPEC.shard(Shard(rank=0, world_size=world_size))

"""The pool's layout and its sizing, with an invented amount of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from semipd.errors import ConfigError
from semipd.kernels.paged_attention import layer_rows
from semipd.memory.kv_cache import KVCache, available_host_memory, num_blocks_for
from semipd.model.spec import ModelSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=16,
    hidden_size=24,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=1e4,
)
LAYOUT = SPEC.kv_layout(4)
TOKEN = LAYOUT.bytes_per_token
BLOCK = 16 * TOKEN


def num_blocks(available: int = 1000 * BLOCK, **sizes: Any) -> int:
    arguments: dict[str, Any] = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 100, **sizes}
    return num_blocks_for(layout=LAYOUT, available_memory=lambda: available, **arguments)


def test_the_pool_has_the_size_of_the_layout_and_a_slots_keys_and_values_are_neighbours() -> None:
    cache = KVCache(layout=SPEC.kv_layout(4), num_blocks=5, block_size=4, dtype=torch.float32, device="cpu")
    cache.fill_(0)
    assert cache.kv_LPS2KH.nbytes == 5 * 4 * TOKEN
    cache.kv_LPS2KH[1, 2, 3, 0] = 1
    cache.kv_LPS2KH[1, 2, 3, 1] = 2
    row = layer_rows(cache.kv_LPS2KH)[1][2 * 4 + 3]
    assert row.flatten().tolist() == [1.0] * 12 + [2.0] * 12
    assert cache.kv_LPS2KH.sum() == row.sum()


def test_fill_reaches_every_element() -> None:
    cache = KVCache(layout=SPEC.kv_layout(2), num_blocks=2, block_size=1, dtype=torch.bfloat16, device="cpu")
    cache.fill_(float("nan"))
    assert cache.kv_LPS2KH.isnan().all()
    assert (cache.num_blocks, cache.block_size) == (2, 1)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"kv_cache_tokens": 1}, 1),
        ({"kv_cache_tokens": 16}, 1),
        ({"kv_cache_tokens": 17}, 2),
        ({"kv_cache_bytes": BLOCK}, 1),
        ({"kv_cache_bytes": 3 * BLOCK - 1}, 2),
        ({"kv_cache_fraction": 0.25}, 250),
        ({}, 4 * 7),  # four requests of 100 tokens, in blocks of 16
        ({"available": 20 * BLOCK}, 10),  # half of the memory is less
        ({"available": 20 * BLOCK, "kv_cache_fraction": 1.0}, 20),
    ],
)
def test_number_of_blocks(sizes: dict[str, Any], expected: int) -> None:
    assert num_blocks(**sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kv_cache_bytes": BLOCK - 1}, f"kv_cache_bytes is {BLOCK - 1} bytes and holds no KV block; expected"),
        ({"available": BLOCK}, "a share of 0.5 of the available memory"),
        ({"available": BLOCK, "kv_cache_fraction": 0.9}, "a share of 0.9 of the available memory"),
    ],
)
def test_a_pool_without_a_block_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        num_blocks(**sizes)


def test_tokens_and_bytes_do_not_look_at_the_memory() -> None:
    def refuse() -> int:
        pytest.fail("asked for the memory")

    for sizes in ({"kv_cache_tokens": 64}, {"kv_cache_bytes": 4 * BLOCK}):
        arguments: dict[str, Any] = {"block_size": 16, "max_num_seqs": 1, "max_model_len": 1, **sizes}
        assert num_blocks_for(layout=LAYOUT, available_memory=refuse, **arguments) == 4


def write_proc(root: Path, meminfo: str, limit: str | None = None, used: str = "0") -> None:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(meminfo)
    if limit is not None:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, "0", 2048), ("max", "0", 2048), ("5000", "4000", 1000), ("9000", "4000", 2048), ("5000", "6000", 0)],
)
def test_available_memory_is_the_less_of_the_machine_and_the_container(
    tmp_path: Path, limit: str | None, used: str, expected: int
) -> None:
    write_proc(tmp_path, "MemTotal:  9 kB\nMemFree:   1 kB\nMemAvailable:  2 kB\n", limit, used)
    assert available_host_memory(tmp_path) == expected


def test_a_machine_without_meminfo_counts_all_of_its_memory(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) > 1 << 20


def test_the_memory_of_this_machine_can_be_read() -> None:
    assert available_host_memory() > 0

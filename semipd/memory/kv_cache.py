"""The KV pool's tensors and how large to make it.

One pool serves both lanes: a block id means the same block in every layer. Which request owns a block is decided by
`memory/block_allocator.py`; nothing here knows requests.

Shapes: L layers, P blocks of the pool, S slots of a block, K KV heads, H head dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from semipd.config import KVLayout
from semipd.errors import ConfigError

# Of the memory that is available once the weights are loaded; the rest is for activations and for other programs.
DEFAULT_HOST_FRACTION = 0.5
# Of what is free on a GPU once weights, buffers and graphs have theirs; the rest is for what torch caches.
DEFAULT_GPU_FRACTION = 0.95


class KVCache:
    """K and V of every layer in one tensor, `kv_LPS2KH`.

    The K heads and the V heads of a slot are neighbours, so that one copy writes both and one gather reads both. The
    memory is not initialised: what a slot holds means nothing until a step writes it.
    """

    def __init__(
        self, *, layout: KVLayout, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        (group,) = layout.groups
        assert dtype.itemsize == group.dtype_bytes, f"the layout has {group.dtype_bytes} bytes an element, not {dtype}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv_LPS2KH = torch.empty(
            (len(group.layers), num_blocks, block_size, *group.token_shape), dtype=dtype, device=device
        )

    def fill_(self, value: float) -> None:
        """Set every element; in tests, NaN shows a slot that is read before it is written."""
        self.kv_LPS2KH.fill_(value)


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that a new allocation can have without swapping: the machine's, or the container's if less.

    `root` is where `proc` and `sys` are mounted.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: count all memory, half of which is the default anyway
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return available
    return min(available, max(0, limit - used))


def num_blocks_for(
    *,
    layout: KVLayout,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_cache_bytes: int | None = None,
    kv_cache_tokens: int | None = None,
    kv_cache_fraction: float | None = None,
    available_memory: Callable[[], int] = available_host_memory,
    default_fraction: float = DEFAULT_HOST_FRACTION,
) -> int:
    """The number of blocks of the pool, from at most one of the three sizes.

    Without one it is what `max_num_seqs` requests of `max_model_len` tokens can fill, but at most `default_fraction` of
    the memory that is available now; so call it with the weights loaded. `kv_cache_tokens` is rounded up to blocks,
    bytes are rounded down.

    Raises:
        ConfigError: the size does not hold one block.
    """
    block_bytes = layout.bytes_per_token * block_size
    if kv_cache_tokens is not None:
        return -(-kv_cache_tokens // block_size)
    if kv_cache_bytes is not None:
        size, source = kv_cache_bytes, "kv_cache_bytes"
    else:
        fraction = default_fraction if kv_cache_fraction is None else kv_cache_fraction
        size, source = int(available_memory() * fraction), f"a share of {fraction:g} of the available memory"
    num_blocks = size // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{source} is {size} bytes and holds no KV block; expected at least {block_bytes} bytes "
            f"({block_size} tokens of {layout.bytes_per_token} bytes): raise it or lower block_size"
        )
    if kv_cache_bytes is None and kv_cache_fraction is None:
        return min(num_blocks, max_num_seqs * -(-max_model_len // block_size))
    return num_blocks

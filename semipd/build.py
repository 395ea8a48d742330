"""The composition root: from an `EngineConfig` to a core that is ready to start.

Everything that takes seconds happens here and nowhere else: importing torch, reading a checkpoint, making the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from semipd.config import EngineConfig, KVLayout, Phase
from semipd.core import EngineCore, RequestLimits
from semipd.errors import ConfigError
from semipd.memory.block_allocator import BlockAllocator

if TYPE_CHECKING:
    from semipd.device.partition import PartitionBackend
    from semipd.memory.kv_cache import KVCache
    from semipd.model.loader import ModelSource
    from semipd.model.runner import Runner
    from semipd.model.spec import ModelSpec
    from semipd.tokenizer import Tokenizer

# Prompt tokens in a step, by device. On a CPU a step of 512 is as efficient as a longer one, and holds its cores a
# quarter as long as one of 2,048 before the plan can change.
_MAX_PREFILL_TOKENS = {"cpu": 512}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A core ready to start, and what its facade needs beside it."""

    core: EngineCore
    tokenizer: Tokenizer
    kv_cache: KVCache


def build_core(config: EngineConfig) -> BuiltEngine:
    """Load the model that `config` names and put an engine core together around it.

    Raises:
        ConfigError: arguments that do not fit the model or the device.
        WeightsError: a checkpoint that is missing, malformed or unsupported.
    """
    # torch and the model's libraries take seconds to import: only an engine pays for them
    from semipd.device.cpu import CpuPartitionBackend
    from semipd.model.loader import load_spec, resolve_model

    device = _resolve_device(config.device)
    source = resolve_model(config.model, revision=config.revision, load_format=config.load_format)
    spec = load_spec(source)
    tokenizer = _load_tokenizer(config, source)
    backend = CpuPartitionBackend()
    try:
        # Parallel work in the caller's thread would leave an OpenMP team there, and with more of these threads than
        # cores in the process, none spins between operations any more: a decode step on two cores takes 43 ms instead
        # of 26.
        stream = backend.stream(Phase.PREFILL, backend.num_sms)
        model = stream.submit(lambda: _build_model(config, source, spec, backend, device)).wait()
        core = EngineCore(
            config=replace(config, max_model_len=model.max_model_len),
            limits=RequestLimits(
                vocab_size=spec.vocab_size,
                max_model_len=model.max_model_len,
                eos_token_ids=spec.eos_token_ids | tokenizer.eos_token_ids,
            ),
            executor=model.runner,
            backend=backend,
            allocator=BlockAllocator(
                model.kv_cache.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
            ),
            max_prefill_tokens=config.max_prefill_tokens or _MAX_PREFILL_TOKENS[device],
            window=model.layout.window,
        )
    except BaseException:
        backend.close()
        raise
    return BuiltEngine(core=core, tokenizer=tokenizer, kv_cache=model.kv_cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What computes: the runner, with weights and sampler inside, and the pool that it writes."""

    runner: Runner
    kv_cache: KVCache
    layout: KVLayout
    max_model_len: int


def _build_model(
    config: EngineConfig, source: ModelSource, spec: ModelSpec, backend: PartitionBackend, device: str
) -> _Model:
    """Load the weights, size the KV pool by what memory is left, and make the runner; called on the device's stream."""
    import torch

    from semipd.kernels.ops import create_ops
    from semipd.memory.kv_cache import KVCache, num_blocks_for
    from semipd.model.decoder import Decoder
    from semipd.model.loader import load_weights
    from semipd.model.runner import Runner
    from semipd.model.sampler import Sampler

    dtype: torch.dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    weights = load_weights(source, spec, dtype=dtype, device=device, seed=config.seed)
    decoder = Decoder(spec, weights, create_ops("reference"))
    layout = spec.kv_layout(dtype.itemsize)
    num_blocks = num_blocks_for(
        layout=layout,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or spec.max_position_embeddings,
        kv_cache_bytes=config.kv_cache_bytes,
        kv_cache_tokens=config.kv_cache_tokens,
        kv_cache_fraction=config.kv_cache_fraction,
    )
    max_model_len = _fit_max_model_len(config, spec.max_position_embeddings, num_blocks * config.block_size)
    kv_cache = KVCache(layout=layout, num_blocks=num_blocks, block_size=config.block_size, dtype=dtype, device=device)
    sampler = Sampler(
        max_slots=config.max_num_seqs,
        vocab_size=spec.vocab_size,
        device=device,
        dtype=torch.float64 if dtype is torch.float64 else torch.float32,
    )
    runner = Runner(
        decoder=decoder,
        sampler=sampler,
        kv_cache=kv_cache,
        backend=backend,
        max_slots=config.max_num_seqs,
        max_model_len=max_model_len,
        device=torch.device(device),
    )
    return _Model(runner=runner, kv_cache=kv_cache, layout=layout, max_model_len=max_model_len)


def _load_tokenizer(config: EngineConfig, source: ModelSource) -> Tokenizer:
    """The model's tokenizer, or another one's; none for random weights from a config that stands alone."""
    from semipd.model.loader import resolve_model
    from semipd.tokenizer import AbsentTokenizer, load_tokenizer

    if config.tokenizer is not None:
        return load_tokenizer(resolve_model(config.tokenizer).path)
    if config.load_format == "dummy" and not (source.path / "tokenizer.json").is_file():
        return AbsentTokenizer()
    return load_tokenizer(source.path)


def _resolve_device(device: str) -> str:
    if device in ("auto", "cpu"):
        return "cpu"
    raise ConfigError(f"device is {device!r}; supported today: 'cpu' (or 'auto')")


def _fit_max_model_len(config: EngineConfig, max_position_embeddings: int, pool_tokens: int) -> int:
    """The longest request that both the model and the KV pool can hold."""
    asked = config.max_model_len
    if asked is not None and asked > max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {asked}, but the model's positions end at {max_position_embeddings}; give at most that"
        )
    if asked is not None and asked > pool_tokens:
        raise ConfigError(
            f"max_model_len is {asked}, but the KV pool holds {pool_tokens} tokens; give a larger kv_cache_bytes, "
            f"kv_cache_tokens or kv_cache_fraction, or a smaller max_model_len"
        )
    return asked or min(max_position_embeddings, pool_tokens)

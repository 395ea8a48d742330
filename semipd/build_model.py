"""What computes, for each kind of device: weights, KV pool and runner on the streams of a partition backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from semipd.config import AdaptivePolicy, EngineConfig, MixedPolicy, Phase, StaticPolicy
from semipd.device.cpu import CpuPartitionBackend
from semipd.device.green_context import PlainStreamBackend, create_cuda_backend
from semipd.device.partition import PartitionBackend
from semipd.errors import ConfigError
from semipd.kernels.ops import create_ops
from semipd.memory.kv_cache import (
    DEFAULT_GPU_FRACTION,
    DEFAULT_HOST_FRACTION,
    KVCache,
    available_host_memory,
    num_blocks_for,
)
from semipd.model.decoder import Decoder
from semipd.model.loader import ModelSource, load_weights
from semipd.model.runner import Runner
from semipd.model.sampler import Sampler
from semipd.model.spec import ModelSpec
from semipd.sched.lane import Executor

GRAPH_RESERVE = 1 << 30
"""Bytes of GPU memory that the KV pool leaves to graphs, cuBLAS workspaces and further partitions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A runner with weights and sampler inside, the streams it runs on, and the pool that it writes."""

    executor: Executor
    backend: PartitionBackend
    kv_cache: KVCache
    max_model_len: int


def build_host_model(config: EngineConfig, source: ModelSource, spec: ModelSpec) -> BuiltModel:
    """A model on the cores of this process."""
    backend = CpuPartitionBackend()
    try:
        # Parallel work in the caller's thread would leave an OpenMP team there, and with more of these threads than
        # cores in the process, none spins between operations any more: a decode step on two cores takes 43 ms instead
        # of 26.
        stream = backend.stream(Phase.PREFILL, backend.num_sms)
        build = partial(_build_on_host, config, source, spec, backend)
        return stream.submit(lambda: build).wait()
    except BaseException:
        backend.close()
        raise


def _build_on_host(
    config: EngineConfig, source: ModelSource, spec: ModelSpec, backend: CpuPartitionBackend
) -> BuiltModel:
    dtype, device = _dtype(config, spec), torch.device("cpu")
    weights = load_weights(source, spec, dtype=dtype, device=device, seed=config.seed)
    decoder = Decoder(spec, weights, create_ops("reference"))
    kv_cache = _make_pool(config, spec, device, available_host_memory(), DEFAULT_HOST_FRACTION)
    max_model_len = _fit_max_model_len(config, spec.max_position_embeddings, kv_cache)
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
        device=device,
    )
    return BuiltModel(executor=runner, backend=backend, kv_cache=kv_cache, max_model_len=max_model_len)


def build_gpu_model(config: EngineConfig, source: ModelSource, spec: ModelSpec) -> BuiltModel:
    """A model on one CUDA device. All that serving needs is allocated before the KV pool takes its share."""
    device = torch.device(config.device)
    backend = create_cuda_backend(device.index)
    try:
        with torch.cuda.device(device), torch.inference_mode():
            return _build_on_gpu(config, source, spec, backend, device)
    except BaseException:
        backend.close()
        raise


def _build_on_gpu(
    config: EngineConfig, source: ModelSource, spec: ModelSpec, backend: PlainStreamBackend, device: torch.device
) -> BuiltModel:
    # Triton, whose kernels these modules define, takes a second to import.
    from semipd.model.cuda_sampler import CudaSampler
    from semipd.model.gpu_runner import GpuRunner
    from semipd.model.graphs import GraphCache
    from semipd.model.step_inputs import Buckets

    assert config.max_prefill_tokens is not None and config.block_size is not None
    dtype = _dtype(config, spec)
    if dtype is torch.float64:
        raise ConfigError("dtype is 'float64', which GPUs are not served in; use 'float32', 'bfloat16' or device='cpu'")
    weights = load_weights(source, spec, dtype=dtype, device=device, seed=config.seed)
    torch.cuda.synchronize(device)  # the lanes' streams do not wait for this one
    mixed_rows = 0
    match config.policy:
        case MixedPolicy(token_budget=int(token_budget)):
            mixed_rows = token_budget
        case MixedPolicy() | AdaptivePolicy():
            mixed_rows = config.max_prefill_tokens
    graphs = GraphCache(backend, device)
    layout = spec.kv_layout(dtype.itemsize)
    runner = GpuRunner(
        decoder=Decoder(spec, weights, create_ops("triton")),
        sampler=CudaSampler(max_slots=config.max_num_seqs, vocab_size=spec.vocab_size, device=device),
        kv_cache=KVCache(layout=layout, num_blocks=1, block_size=config.block_size, dtype=dtype, device=device),
        backend=backend,
        graphs=graphs,
        buckets={
            Phase.PREFILL: Buckets(config.max_num_seqs, config.max_prefill_tokens),
            Phase.DECODE: Buckets(config.max_num_seqs, mixed_rows),
        },
        num_heads=spec.num_heads,
        max_slots=config.max_num_seqs,
        max_model_len=config.max_model_len or spec.max_position_embeddings,
        device=device,
    )
    try:
        shares = _first_shares(config, backend)
        runner.warm_up(shares)
        for phase, sizes in shares.items():
            for num_sms in sizes:
                backend.stream(phase, num_sms)  # made before the memory is divided
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        kv_cache = _make_pool(config, spec, device, free - GRAPH_RESERVE, DEFAULT_GPU_FRACTION)
        kv_cache.fill_(0.0)  # 20 ms; calibration reads blocks that nobody wrote, and NaN there would become tokens
        torch.cuda.synchronize(device)
        runner.use_pool(kv_cache)
        max_model_len = _fit_max_model_len(config, spec.max_position_embeddings, kv_cache)
    except BaseException:
        runner.close()
        raise
    return BuiltModel(executor=runner, backend=backend, kv_cache=kv_cache, max_model_len=max_model_len)


def _first_shares(config: EngineConfig, backend: PlainStreamBackend) -> dict[Phase, list[int]]:
    """The shares of each lane that the policy starts with; kernels of others are loaded by their first step."""
    split = None
    match config.policy:
        case StaticPolicy(prefill_sms=None):
            split = backend.default_split
        case StaticPolicy(prefill_sms=int(prefill_sms), decode_sms=int(decode_sms)):
            split = (prefill_sms, decode_sms)
    shares = {phase: [backend.num_sms] for phase in Phase}
    if split is not None and split in backend.splits:
        for phase, num_sms in zip(Phase, split, strict=True):
            shares[phase].append(num_sms)
    return shares


def _dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    return dtype


def _make_pool(
    config: EngineConfig, spec: ModelSpec, device: torch.device, available: int, default_fraction: float
) -> KVCache:
    """The KV pool, sized by the config or by the memory that is available."""
    assert config.block_size is not None
    dtype = _dtype(config, spec)
    layout = spec.kv_layout(dtype.itemsize)
    num_blocks = num_blocks_for(
        layout=layout,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or spec.max_position_embeddings,
        kv_cache_bytes=config.kv_cache_bytes,
        kv_cache_tokens=config.kv_cache_tokens,
        kv_cache_fraction=config.kv_cache_fraction,
        available_memory=lambda: available,
        default_fraction=default_fraction,
    )
    return KVCache(layout=layout, num_blocks=num_blocks, block_size=config.block_size, dtype=dtype, device=device)


def _fit_max_model_len(config: EngineConfig, max_position_embeddings: int, kv_cache: KVCache) -> int:
    """The longest request that both the model and the KV pool can hold."""
    asked, pool_tokens = config.max_model_len, kv_cache.num_blocks * kv_cache.block_size
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

"""What computes, for each kind of device: weights, KV pool and runner on the streams of a partition backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from semipd.config import AdaptivePolicy, EngineConfig, MixedPolicy, Phase, Shard, StaticPolicy
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
from semipd.parallel.executor import RankRunner
from semipd.parallel.linear import RowParallelProducts, SequentialProduct

if TYPE_CHECKING:  # they import Triton, or torch.distributed, which one rank has no use for
    from semipd.build_overlap import Overlap
    from semipd.model.gpu_runner import GpuRunner
    from semipd.parallel.group import TensorGroup
    from semipd.parallel.peer_memory import PeerSums

_WHOLE = Shard()

GRAPH_RESERVE = 1 << 30
"""Bytes of GPU memory that the KV pool leaves to graphs, cuBLAS workspaces and further partitions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A runner with weights and sampler inside, the streams it runs on, and the pool that it writes: of one rank."""

    executor: RankRunner
    backend: PartitionBackend
    kv_cache: KVCache
    max_model_len: int


def build_model(
    config: EngineConfig,
    source: ModelSource,
    spec: ModelSpec,
    group: TensorGroup | None = None,
    local_shard: Shard = _WHOLE,
) -> BuiltModel:
    """A model, or one shard of it, on the device of `config`.

    Args:
        config: with the device resolved: that of the first rank on this host.
        source: of the whole model.
        spec: of the whole model.
        group: whose shard is built; None for all of it.
        local_shard: which of the ranks on this host it is. Each has a GPU of its own, or a part of cores and memory.

    Raises:
        ConfigError: arguments that do not fit the model or the device.
        WeightsError: a checkpoint that is missing, malformed or unsupported.
    """
    job = _Job(config, source, spec, group, local_shard)
    if config.device == "cpu":
        return _build_on_cores(job)
    index = int(config.device.partition(":")[2]) + local_shard.rank
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"this rank's device is cuda:{index}, but torch sees {torch.cuda.device_count()} CUDA devices; start fewer "
            "ranks on this host"
        )
    return _build_on_gpu(job, torch.device("cuda", index))


@dataclass(frozen=True, slots=True)
class _Job:
    """What one rank is to build: the arguments of `build_model`."""

    config: EngineConfig
    source: ModelSource
    spec: ModelSpec
    group: TensorGroup | None
    local_shard: Shard

    @property
    def shard(self) -> Shard:
        """Which part of the model."""
        return _WHOLE if self.group is None else self.group.shard

    @property
    def own_spec(self) -> ModelSpec:
        """What this rank computes of the model."""
        return self.spec if self.group is None else self.spec.shard(self.shard)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV."""
        config = self.config
        dtype: torch.dtype = getattr(torch, self.spec.dtype if config.dtype == "auto" else config.dtype)
        return dtype


# ---- on cores


def _build_on_cores(job: _Job) -> BuiltModel:
    backend = CpuPartitionBackend(shard=job.local_shard)
    try:
        # Parallel work in the caller's thread would leave an OpenMP team there, and with more of these threads than
        # cores in the process, none spins between operations any more: a decode step on two cores takes 43 ms instead
        # of 26.
        stream = backend.stream(Phase.PREFILL, backend.num_sms)
        build = partial(_make_host_model, job, backend)
        return stream.submit(lambda: build).wait()
    except BaseException:
        backend.close()
        raise


def _make_host_model(job: _Job, backend: CpuPartitionBackend) -> BuiltModel:
    config, spec, device = job.config, job.spec, torch.device("cpu")
    decoder = _load_decoder(job, device, "reference")
    available = available_host_memory() // job.local_shard.world_size
    kv_cache = _make_pool(job, device, available, DEFAULT_HOST_FRACTION)
    max_model_len = _fit_max_model_len(config, spec.max_position_embeddings, kv_cache)
    sampler = Sampler(
        max_slots=config.max_num_seqs,
        vocab_size=spec.vocab_size,
        device=device,
        dtype=torch.float64 if job.dtype is torch.float64 else torch.float32,
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


# ---- on a GPU


def _build_on_gpu(job: _Job, device: torch.device) -> BuiltModel:
    backend = create_cuda_backend(device.index)
    try:
        with torch.cuda.device(device), torch.inference_mode():
            return _make_gpu_model(job, backend, device)
    except BaseException:
        backend.close()
        raise


def _make_gpu_model(job: _Job, backend: PlainStreamBackend, device: torch.device) -> BuiltModel:
    """All that serving needs is allocated before the KV pool takes its share."""
    group, shared = job.group, _Shared()
    try:
        runner = _make_gpu_runner(job, backend, device, shared)
    except BaseException:
        if group is not None:
            group.abort()  # the others do not close with this rank, and must not take what it says for an answer
        shared.close()
        raise
    try:
        shares = _first_shares(job.config, backend)
        runner.warm_up(shares)
        for phase, sizes in shares.items():
            for num_sms in sizes:
                backend.stream(phase, num_sms)  # made before the memory is divided
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        kv_cache = _make_pool(job, device, free - GRAPH_RESERVE, DEFAULT_GPU_FRACTION)
        kv_cache.fill_(0.0)  # 20 ms; calibration reads blocks that nobody wrote, and NaN there would become tokens
        torch.cuda.synchronize(device)
        runner.use_pool(kv_cache)
        max_model_len = _fit_max_model_len(job.config, job.spec.max_position_embeddings, kv_cache)
    except BaseException:
        if group is not None:
            group.abort()
        runner.close()
        raise
    return BuiltModel(executor=runner, backend=backend, kv_cache=kv_cache, max_model_len=max_model_len)


def _make_gpu_runner(job: _Job, backend: PlainStreamBackend, device: torch.device, shared: _Shared) -> GpuRunner:
    """A runner with all that it needs but a pool."""
    # Triton, whose kernels these modules define, takes a second to import.
    from semipd.build_overlap import agree_to_overlap
    from semipd.kernels.triton_util import starting_compiler
    from semipd.model.cuda_sampler import CudaSampler
    from semipd.model.gpu_runner import GpuRunner
    from semipd.model.graphs import GraphCache
    from semipd.model.step_inputs import Buckets

    config, spec, group, own, dtype = job.config, job.spec, job.group, job.own_spec, job.dtype
    assert config.max_prefill_tokens is not None and config.block_size is not None
    if dtype is torch.float64:
        raise ConfigError("dtype is 'float64', which GPUs are not served in; use 'float32', 'bfloat16' or device='cpu'")
    buckets = {
        Phase.PREFILL: Buckets(config.max_num_seqs, config.max_prefill_tokens),
        Phase.DECODE: Buckets(config.max_num_seqs, _mixed_rows(config)),
    }
    max_rows = max(lane.largest.num_rows for lane in buckets.values())
    if group is not None:
        shared.overlap = agree_to_overlap(config, own, group, job.local_shard, max_rows, backend, device, dtype)
    with starting_compiler():
        decoder = _load_decoder(job, device, "triton", shared.overlap)
        torch.cuda.synchronize(device)  # the lanes' streams do not wait for this one
    graphs = GraphCache(backend, device) if group is None else GraphCache(backend, device, ending=group.quiet)
    layout = own.kv_layout(dtype.itemsize)
    shared.peers = _connect_peers(job, device)
    return GpuRunner(
        decoder=decoder,
        sampler=CudaSampler(max_slots=config.max_num_seqs, vocab_size=spec.vocab_size, device=device),
        kv_cache=KVCache(layout=layout, num_blocks=1, block_size=config.block_size, dtype=dtype, device=device),
        backend=backend,
        graphs=graphs,
        buckets=buckets,
        num_heads=own.num_heads,
        max_slots=config.max_num_seqs,
        max_model_len=config.max_model_len or spec.max_position_embeddings,
        device=device,
        peers=shared.peers,
        check=shared.check,
        on_close=shared.close,
    )


@dataclass(slots=True, eq=False)
class _Shared:
    """What one rank shares with the others, as it is made; nothing without others."""

    peers: Mapping[Phase, PeerSums] = field(default_factory=dict)
    overlap: Overlap | None = None

    def check(self) -> None:
        """Raise if steps did not get what they waited for."""
        if self.overlap is not None:
            self.overlap.release.check()
        for peers in self.peers.values():
            peers.raise_if_released()

    def close(self) -> None:
        """Give the memory back, all ranks together; no step runs any more."""
        for peers in self.peers.values():
            peers.close()
        if self.overlap is not None:
            self.overlap.close()


def _connect_peers(job: _Job, device: torch.device) -> dict[Phase, PeerSums]:
    """What sums small steps of each lane, where all ranks are on this host and can write each other's memory."""
    group, dim = job.group, job.own_spec.hidden_size
    if group is None or job.local_shard.world_size != group.shard.world_size:
        return {}
    from semipd.parallel.peer_memory import connect_peers

    connected = {}
    for phase in Phase:
        peers = connect_peers(group.shard, group.exchange, device, dim=dim, dtype=job.dtype)
        if peers is None:  # on all ranks
            break
        connected[phase] = peers
        group.call_on_abort(peers.abort)
    return connected


def _mixed_rows(config: EngineConfig) -> int:
    """The most rows of prompts in a step of the decode lane."""
    assert config.max_prefill_tokens is not None
    match config.policy:
        case MixedPolicy(token_budget=int(token_budget)):
            return token_budget
        case MixedPolicy() | AdaptivePolicy():
            return config.max_prefill_tokens
    return 0


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


# ---- on both


def _load_decoder(job: _Job, device: torch.device, ops: str, overlap: Overlap | None = None) -> Decoder:
    """The decoder with this rank's weights, in a group that is connected once they are read.

    With `overlap`, products overlap with their collectives.
    """
    spec, group = job.spec, job.group
    weights = load_weights(job.source, spec, dtype=job.dtype, device=device, seed=job.config.seed, shard=job.shard)
    make_product: RowParallelProducts = SequentialProduct
    if group is not None:
        if overlap is None:
            group.connect(device)
        else:
            make_product = overlap.connect()
    return Decoder(spec, weights, create_ops(ops), group, make_product=make_product)


def _make_pool(job: _Job, device: torch.device, available: int, default_fraction: float) -> KVCache:
    """The KV pool, sized by the config or by the memory that is available; as many blocks on all ranks."""
    config, group, dtype = job.config, job.group, job.dtype
    assert config.block_size is not None
    layout = job.own_spec.kv_layout(dtype.itemsize)
    num_blocks = num_blocks_for(
        layout=layout,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or job.spec.max_position_embeddings,
        kv_cache_bytes=config.kv_cache_bytes,
        kv_cache_tokens=config.kv_cache_tokens,
        kv_cache_fraction=config.kv_cache_fraction,
        available_memory=lambda: available,
        default_fraction=default_fraction,
    )
    if group is not None:
        num_blocks = group.agree_min(num_blocks)
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

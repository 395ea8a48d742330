"""The composition root: from an `EngineConfig` to a core that is ready to start.

Everything that takes seconds happens here and nowhere else: importing torch, reading a checkpoint, making the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from semipd.config import AdaptivePolicy, EngineConfig, PolicyConfig, Shard, StaticPolicy
from semipd.core import EngineCore, RequestLimits
from semipd.errors import ConfigError
from semipd.memory.block_allocator import BlockAllocator
from semipd.parallel.executor import RankedExecutor
from semipd.sched.lane import Executor

if TYPE_CHECKING:
    from semipd.build_model import BuiltModel
    from semipd.memory.kv_cache import KVCache
    from semipd.model.loader import ModelSource
    from semipd.model.spec import ModelSpec
    from semipd.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    """What arguments that are left out mean on a kind of device."""

    max_prefill_tokens: int
    block_size: int
    prefill_steps_ahead: int
    policy: PolicyConfig


# On a CPU a step of 512 prompt tokens is as efficient as a longer one, and holds its cores a quarter as long as one of
# 2,048 before the plan can change; an H100 runs 8B shapes at 564 TFLOP/s at 2,048 tokens and at 597 at 8,192. Blocks of
# 64 tokens are whole tiles of the GPU's attention kernels. A GPU is bound by reads of the weights, which a MIXED step
# makes once for prompts and decodes; two lanes of a CPU, with a core each, need no barrier between them.
_DEFAULTS = {
    "cpu": _Defaults(max_prefill_tokens=512, block_size=16, prefill_steps_ahead=0, policy=StaticPolicy()),
    "cuda": _Defaults(max_prefill_tokens=2048, block_size=64, prefill_steps_ahead=1, policy=AdaptivePolicy()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A core ready to start, the tokenizer for its facade, and the pool that its model writes, to look into."""

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
    from semipd.build_latency import build_latency
    from semipd.model.loader import load_spec, resolve_model

    device = _resolve_device(config.device, config.tensor_parallel_size)
    kind = device.split(":")[0]
    source = resolve_model(config.model, revision=config.revision, load_format=config.load_format)
    spec = load_spec(source)
    tokenizer = _load_tokenizer(config, source)
    defaults = _DEFAULTS[kind]
    max_prefill_tokens = config.max_prefill_tokens or defaults.max_prefill_tokens
    config = replace(
        config,
        device=device,
        block_size=config.block_size or defaults.block_size,
        max_prefill_tokens=max_prefill_tokens,
        policy=config.policy or defaults.policy,
    )
    # Another model's tokenizer may end texts with ids that this one cannot generate: nothing ever ends there, and
    # min_tokens, which masks the logits of all ends, would index outside of them.
    own_ends = frozenset(token_id for token_id in tokenizer.eos_token_ids if 0 <= token_id < spec.vocab_size)
    own_spec = spec.shard(Shard(world_size=config.tensor_parallel_size))
    model, executor = _build_executor(config, source, spec)
    try:
        latency, latency_store = build_latency(config, own_spec, model.backend.num_sms)
        core = EngineCore(
            config=replace(config, max_model_len=model.max_model_len),
            limits=RequestLimits(
                vocab_size=spec.vocab_size,
                max_model_len=model.max_model_len,
                eos_token_ids=spec.eos_token_ids | own_ends,
            ),
            executor=executor,
            backend=model.backend,
            allocator=BlockAllocator(
                model.kv_cache.num_blocks,
                model.kv_cache.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            max_prefill_tokens=max_prefill_tokens,
            window=spec.kv_layout(1).window,
            prefill_steps_ahead=defaults.prefill_steps_ahead,
            latency=latency,
            latency_store=latency_store,
        )
    except BaseException:
        executor.close()
        model.backend.close()
        raise
    if isinstance(executor, RankedExecutor):
        executor.watch(core.fail)
    return BuiltEngine(core=core, tokenizer=tokenizer, kv_cache=model.kv_cache)


def _build_executor(config: EngineConfig, source: ModelSource, spec: ModelSpec) -> tuple[BuiltModel, Executor]:
    """The model in this process, and what runs its steps: on all ranks, if there are others."""
    from semipd.build_model import build_model

    if config.tensor_parallel_size == 1:
        model = build_model(config, source, spec)
        return model, model.executor
    from semipd.build_ranks import build_on_ranks

    return build_on_ranks(config, source, spec)


def _load_tokenizer(config: EngineConfig, source: ModelSource) -> Tokenizer:
    """The model's tokenizer, or another one's; none for random weights from a config that stands alone."""
    from semipd.model.loader import resolve_tokenizer
    from semipd.tokenizer import AbsentTokenizer, load_tokenizer

    if config.tokenizer is not None:
        return load_tokenizer(resolve_tokenizer(config.tokenizer))
    if config.load_format == "dummy" and not (source.path / "tokenizer.json").is_file():
        return AbsentTokenizer()
    return load_tokenizer(source.path)


def _resolve_device(device: str, world_size: int) -> str:
    """The device of the first rank as `cpu` or `cuda:<index>`."""
    if device == "cpu":
        return device
    import torch

    from semipd.device.cuda_driver import raise_max_connections

    raise_max_connections()  # before anything starts CUDA, as looking for devices may
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if num_devices else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index == "" or index.isdecimal()):
        raise ConfigError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'")
    first = int(index or 0)
    if first >= num_devices:
        raise ConfigError(
            f"device is {device!r}, but torch sees {num_devices} CUDA devices; use 'cpu' or another index"
        )
    if world_size > 1:
        from semipd.parallel.launched import is_launched  # torch.distributed, which one rank has no use for

        if first + world_size > num_devices and not is_launched():  # else others may be on other hosts
            raise ConfigError(
                f"tensor_parallel_size is {world_size} from {device!r} on, but torch sees {num_devices} CUDA devices; "
                f"give at most {num_devices - first}" + (" or begin at a lower device" if first else "")
            )
    return f"cuda:{first}"

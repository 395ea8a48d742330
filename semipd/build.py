"""The composition root: from an `EngineConfig` to a core that is ready to start.

Everything that takes seconds happens here and nowhere else: importing torch, reading a checkpoint, making the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from semipd.config import AdaptivePolicy, EngineConfig, PolicyConfig, StaticPolicy
from semipd.core import EngineCore, RequestLimits
from semipd.errors import ConfigError
from semipd.memory.block_allocator import BlockAllocator

if TYPE_CHECKING:
    from semipd.memory.kv_cache import KVCache
    from semipd.model.loader import ModelSource
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
    from semipd.build_latency import build_latency
    from semipd.build_model import build_gpu_model, build_host_model
    from semipd.model.loader import load_spec, resolve_model

    device = _resolve_device(config.device)
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
    model = (build_host_model if kind == "cpu" else build_gpu_model)(config, source, spec)
    try:
        latency, latency_store = build_latency(config, spec, model.backend.num_sms)
        core = EngineCore(
            config=replace(config, max_model_len=model.max_model_len),
            limits=RequestLimits(
                vocab_size=spec.vocab_size,
                max_model_len=model.max_model_len,
                eos_token_ids=spec.eos_token_ids | tokenizer.eos_token_ids,
            ),
            executor=model.executor,
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
        model.executor.close()
        model.backend.close()
        raise
    return BuiltEngine(core=core, tokenizer=tokenizer, kv_cache=model.kv_cache)


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
    """The device as `cpu` or `cuda:<index>`."""
    if device == "cpu":
        return device
    import torch

    from semipd.device.cuda_driver import raise_max_connections

    raise_max_connections()  # before anything starts CUDA, as looking for devices may
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if num_devices else "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index == "" or index.isdecimal()):
        raise ConfigError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'")
    if int(index or 0) >= num_devices:
        raise ConfigError(
            f"device is {device!r}, but torch sees {num_devices} CUDA devices; use 'cpu' or another index"
        )
    return f"cuda:{int(index or 0)}"

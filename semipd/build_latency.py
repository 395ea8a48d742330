"""What an engine knows of step times when it starts: an earlier engine's, an H100's scaled to the device, or nothing.

A CPU starts with nothing and is not calibrated: a step takes tens of milliseconds there, on cores that the caller's
process may want.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from semipd.cache_file import cache_folder
from semipd.config import EngineConfig
from semipd.latency_figures import StepCosts, stored_state
from semipd.latency_store import LatencyStore
from semipd.model.spec import ModelSpec
from semipd.sched.latency import LatencyModel

_FLOPS_PER_CLOCK = {8: 2048, 9: 4096, 10: 8192}  # of an SM in bfloat16, dense, by major compute capability
_OTHER_FLOPS_PER_CLOCK = 1024  # of GPUs for desktops
_FLOAT32 = 1 / 8  # of that, without tensor cores
_ASSUMED_BANDWIDTH, _ASSUMED_CLOCK = 2e12, 1.5e9  # where the driver says 0


def build_latency(config: EngineConfig, spec: ModelSpec, num_sms: int) -> tuple[LatencyModel, LatencyStore | None]:
    """The latency model of a new engine, and where to keep what it learns; on a CPU nowhere.

    Args:
        config: with the device resolved. `calibrate=False` neither reads nor keeps, `calibrate=True` does not read.
        spec: of what this rank computes of the model.
        num_sms: of the device.
    """
    if config.device == "cpu":
        return LatencyModel(num_sms), None
    dtype: torch.dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    properties = torch.cuda.get_device_properties(torch.device(config.device))
    store = None
    if config.calibrate is not False:
        key = store_key(spec, dtype, properties.name, num_sms, config.tensor_parallel_size)
        folder = cache_folder()
        store = LatencyStore(key, None if folder is None else folder / "latency")
    if store is not None and config.calibrate is None and (known := store.load(num_sms)) is not None:
        return known, store
    return LatencyModel.from_state(stored_state(step_costs(spec, dtype, properties), num_sms)), store


def store_key(spec: ModelSpec, dtype: torch.dtype, device_name: str, num_sms: int, num_ranks: int) -> dict[str, Any]:
    """What step times depend on: the device, ranks, and the model but for its special tokens."""
    shape = asdict(spec) | {"bos_token_id": None, "eos_token_ids": None}
    return {"device": device_name, "num_sms": num_sms, "ranks": num_ranks, "dtype": str(dtype), "model": shape}


def step_costs(spec: ModelSpec, dtype: torch.dtype, properties: Any) -> StepCosts:
    """What steps of a model cost on a GPU of these `torch.cuda` properties. Windows count as if they read all."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * heads + 2 * kv_heads + 3 * spec.intermediate_size)
    layers, head = spec.num_layers * layer, spec.vocab_size * spec.hidden_size
    # torch gives clocks in kHz; memory sends twice a clock
    bandwidth = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
    clock = 1e3 * properties.clock_rate or _ASSUMED_CLOCK
    per_clock = _FLOPS_PER_CLOCK.get(properties.major, _OTHER_FLOPS_PER_CLOCK)
    if (properties.major, properties.minor) in ((8, 6), (8, 9)):
        per_clock = _OTHER_FLOPS_PER_CLOCK
    flops = properties.multi_processor_count * clock * per_clock * (_FLOAT32 if dtype is torch.float32 else 1.0)
    return StepCosts(
        weight_bytes=(layers + head) * dtype.itemsize,
        token_flops=2.0 * layers,
        context_bytes=spec.kv_layout(dtype.itemsize).bytes_per_token,
        pair_flops=4.0 * spec.num_layers * heads,
        bandwidth=bandwidth or _ASSUMED_BANDWIDTH,
        flops=flops,
    )

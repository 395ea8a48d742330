"""An embeddable LLM serving engine: prefill and decode run side by side on one device, over one pool of KV blocks.

    from semipd import Engine, SamplingParams

    with Engine("model.gguf") as engine:
        output = engine.generate("The capital of France is", SamplingParams(max_tokens=8))

Importing semipd loads no tensor library; making an `Engine` does.
"""

import importlib
import typing

from semipd.config import (
    SLO,
    AdaptivePolicy,
    CadencePolicy,
    ExclusivePolicy,
    MixedPolicy,
    ReleasedSemiPDPolicy,
    SemiPDPolicy,
    StaticPolicy,
)
from semipd.errors import (
    ConfigError,
    DeviceError,
    EngineClosed,
    EngineDead,
    PartitionUnavailable,
    PromptTooLong,
    QueueFull,
    RankError,
    RequestError,
    SemiPDError,
    WeightsError,
)
from semipd.request import CompletionOutput, FinishReason, Logprob, RequestOutput, RequestTimings, SamplingParams

if typing.TYPE_CHECKING:
    from semipd.engine import Engine
    from semipd.metrics import EngineStatistics
    from semipd.sched.decisions import Decision

__version__ = "0.1.0"

__all__ = [
    "AdaptivePolicy",
    "CadencePolicy",
    "CompletionOutput",
    "ConfigError",
    "Decision",
    "DeviceError",
    "Engine",
    "EngineClosed",
    "EngineDead",
    "EngineStatistics",
    "ExclusivePolicy",
    "FinishReason",
    "Logprob",
    "MixedPolicy",
    "PartitionUnavailable",
    "PromptTooLong",
    "QueueFull",
    "RankError",
    "ReleasedSemiPDPolicy",
    "RequestError",
    "RequestOutput",
    "RequestTimings",
    "SLO",
    "SamplingParams",
    "SemiPDError",
    "SemiPDPolicy",
    "StaticPolicy",
    "WeightsError",
    "__version__",
]

_LAZY = {
    "Decision": "semipd.sched.decisions",
    "Engine": "semipd.engine",
    "EngineStatistics": "semipd.metrics",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

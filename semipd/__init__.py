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
    Phase,
    Plan,
    PlanKind,
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
    from semipd.async_stream import AsyncStream
    from semipd.engine import Engine
    from semipd.metrics import EngineStatistics, HistogramStatistics, prometheus_text
    from semipd.sched.decisions import Decision
    from semipd.streams import Stream
    from semipd.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "AdaptivePolicy",
    "AsyncStream",
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
    "HistogramStatistics",
    "Logprob",
    "MixedPolicy",
    "PartitionUnavailable",
    "Phase",
    "Plan",
    "PlanKind",
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
    "Stream",
    "Tokenizer",
    "WeightsError",
    "__version__",
    "prometheus_text",
]

_LAZY = {
    "AsyncStream": "semipd.async_stream",
    "Decision": "semipd.sched.decisions",
    "Engine": "semipd.engine",
    "EngineStatistics": "semipd.metrics",
    "HistogramStatistics": "semipd.metrics",
    "Stream": "semipd.streams",
    "Tokenizer": "semipd.tokenizer",
    "prometheus_text": "semipd.metrics",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

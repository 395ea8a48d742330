"""The small value objects that every room shares: phases, plans, targets, KV layouts, engine arguments.

All are frozen and keyword-only, validate themselves, and know nothing of torch or threads.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal, TypeGuard, get_args

from semipd.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]


class Phase(StrEnum):
    """The two kinds of work, and the name of the lane that does each."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Phase:
        """The other lane's phase."""
        return Phase.DECODE if self is Phase.PREFILL else Phase.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Latency targets of a request, in seconds. None means: no target.

    Attributes:
        ttft: arrival to first token.
        tpot: mean time per output token after the first.
        gap: largest time between two output tokens.
    """

    ttft: float | None = None
    tpot: float | None = None
    gap: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot", "gap"):
            value = getattr(self, name)
            # compared with a bound instead of math.isfinite, which fails for integers above the range of floats
            if value is not None and not (_is_number(value) and 0 < value <= sys.float_info.max):
                raise ConfigError(f"SLO.{name} is {value!r}; expected a positive number of seconds, or None")

    def is_attained(self, *, ttft: float | None, tpot: float | None, worst_gap: float | None) -> bool:
        """Whether measured times meet every target that is set; a missing measurement fails `ttft` and passes others.

        A request of one token has neither TPOT nor gaps, so only its TTFT counts.
        """
        if self.ttft is not None and (ttft is None or ttft > self.ttft):
            return False
        if self.gap is not None and worst_gap is not None and worst_gap > self.gap:
            return False
        return self.tpot is None or tpot is None or tpot <= self.tpot


class PlanKind(StrEnum):
    """What the two lanes do at the same time."""

    EXCLUSIVE = "exclusive"
    SPLIT = "split"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the lanes do from their next step border on. Made by `exclusive`, `split` or `mixed`.

    `prefill_sms` and `decode_sms` count the backend's units: SMs on a GPU, cores on a CPU. MIXED runs prompts
    and decodes together in the decode lane on the whole device, `token_budget` tokens a step (`prompt_budget`).
    """

    kind: PlanKind
    prefill_sms: int
    decode_sms: int
    token_budget: int | None = None

    @staticmethod
    def exclusive(phase: Phase, num_sms: int) -> Plan:
        """One lane has the whole device of `num_sms`; the other parks."""
        prefill = num_sms if phase is Phase.PREFILL else 0
        return Plan(PlanKind.EXCLUSIVE, prefill, num_sms - prefill)

    @staticmethod
    def split(prefill_sms: int, decode_sms: int) -> Plan:
        """Both lanes run, each on its share."""
        return Plan(PlanKind.SPLIT, prefill_sms, decode_sms)

    @staticmethod
    def mixed(token_budget: int, num_sms: int) -> Plan:
        """Decodes and prompt chunks share each step of the decode lane; the prefill lane parks."""
        return Plan(PlanKind.MIXED, 0, num_sms, token_budget)

    def num_sms(self, phase: Phase) -> int:
        """The share of `phase`; 0 means that its lane parks."""
        return self.prefill_sms if phase is Phase.PREFILL else self.decode_sms

    def prompt_budget(self, num_decodes: int) -> int:
        """Prompt tokens of a MIXED step: what the decodes leave of the budget, at least an eighth of it."""
        assert self.token_budget is not None
        return max(self.token_budget - num_decodes, -(-self.token_budget // 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePolicy:
    """At each step border the plan with the best predicted progress that keeps the targets of `SLO`.

    It weighs MIXED steps of several sizes and splits by a model of step times that learns from every step. A step may
    last as long as the TPOT and gap targets of running requests leave, and without a target 100 ms; of what fits, what
    keeps the TTFT of waiting prompts comes first, then throughput. Prompts that would be late beside decodes that can
    wait have a step of their own.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ExclusivePolicy:
    """Prefill first: prompts have the whole device while any can be prefilled, then decodes have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPolicy:
    """A fixed split while both kinds of work wait, the whole device for one kind otherwise.

    None takes the backend's default split.
    """

    prefill_sms: int | None = None
    decode_sms: int | None = None

    def __post_init__(self) -> None:
        if (self.prefill_sms is None) != (self.decode_sms is None):
            raise ConfigError("StaticPolicy takes both prefill_sms and decode_sms, or neither")
        for name in ("prefill_sms", "decode_sms"):
            value = getattr(self, name)
            if value is not None and not _is_positive_int(value):
                raise ConfigError(
                    f"StaticPolicy.{name} is {value!r}; expected a positive number of SMs (cores on a CPU)"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPolicy:
    """Chunked prefill: each step carries every decode and fills up to `token_budget` tokens with prompt chunks.

    Prompts have at least an eighth of the budget, so that none starves while more requests decode than it has tokens.
    With None the budget is chosen at each step border: as many tokens as a model of step times, which learns from every
    step, expects to fit the engine's `SLO.gap` and `SLO.tpot`, or 100 ms without either.
    """

    token_budget: int | None = 512

    def __post_init__(self) -> None:
        if self.token_budget is not None and not _is_positive_int(self.token_budget):
            raise ConfigError(
                f"MixedPolicy.token_budget is {self.token_budget!r}; expected a positive number of tokens, or None to "
                "have it chosen step by step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CadencePolicy:
    """Both kinds of step on the whole device in turn: one of prompts, then `decode_steps` of decodes."""

    decode_steps: int = 4

    def __post_init__(self) -> None:
        if not _is_positive_int(self.decode_steps):
            raise ConfigError(f"CadencePolicy.decode_steps is {self.decode_steps!r}; expected a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class SemiPDPolicy:
    """The controller of the semi-PD paper: after each window, the phase that misses its target is given more SMs.

    The targets are the engine's `SLO.ttft` and `SLO.tpot`, or 0.5 s and 0.1 s where it has none. The paper gives no
    values: step, percentile and start are its released code's; 100 decode steps are about two seconds of serving, and
    10 points a window cross the range in as many windows.

    Attributes:
        window_size: decode steps from one decision to the next.
        step_size: points of percent by which one step raises or lowers a share.
        max_step: most steps of one decision.
        percentile: of the TTFTs and TPOTs of a window; what is compared with the targets.
        prefill_percent: prefill's part of the device to start with; rounded to shares that the device offers.
        decode_percent: decode's; both together may pass 100, and the phases then share SMs.
    """

    window_size: int = 100
    step_size: float = 2.0
    max_step: int = 5
    percentile: float = 90.0
    prefill_percent: float = 100.0
    decode_percent: float = 100.0

    def __post_init__(self) -> None:
        for name in ("window_size", "max_step"):
            value = getattr(self, name)
            if not _is_positive_int(value):
                raise ConfigError(f"SemiPDPolicy.{name} is {value!r}; expected a positive integer")
        for name in ("step_size", "percentile", "prefill_percent", "decode_percent"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value <= 100):
                raise ConfigError(f"SemiPDPolicy.{name} is {value!r}; expected a percentage above 0 and up to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedSemiPDPolicy:
    """The controller of semi-PD's released code: fixed polynomials, 80 to 100 percent for each phase.

    It decides after 400 requests of two tokens or more. The targets are those of `SemiPDPolicy`.
    """


PolicyConfig = (
    AdaptivePolicy | ExclusivePolicy | StaticPolicy | MixedPolicy | CadencePolicy | SemiPDPolicy | ReleasedSemiPDPolicy
)
PolicyName = Literal["adaptive", "exclusive", "static", "mixed", "cadence", "semi-pd", "semi-pd-released"]


def parse_policy(policy: PolicyName | PolicyConfig) -> PolicyConfig:
    """The policy value that a name stands for; values pass through.

    Raises:
        ConfigError: the name is not one of the policies.
    """
    if isinstance(policy, PolicyConfig):
        return policy
    match policy:
        case "adaptive":
            return AdaptivePolicy()
        case "exclusive":
            return ExclusivePolicy()
        case "static":
            return StaticPolicy()
        case "mixed":
            return MixedPolicy()
        case "cadence":
            return CadencePolicy()
        case "semi-pd":
            return SemiPDPolicy()
        case "semi-pd-released":
            return ReleasedSemiPDPolicy()
    raise ConfigError(f"policy is {policy!r}; expected one of {', '.join(get_args(PolicyName))}, or a policy object")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that share one block table because they keep the same tokens.

    Attributes:
        layers: indices of the layers.
        token_shape: what a layer keeps of one token: (2, KV heads, head dim) for K and V; a latent cache has its own.
        dtype_bytes: bytes of one element.
        window: tokens that each layer still reads, itself included; None keeps all of them.
    """

    layers: tuple[int, ...]
    token_shape: tuple[int, ...]
    dtype_bytes: int
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token over all of these layers."""
        return len(self.layers) * math.prod(self.token_shape) * self.dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """What a model's layers need of the KV pool; the scheduler sees this and never the tensors."""

    groups: tuple[CacheGroup, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != 1:
            raise ConfigError(f"the KV layout has {len(self.groups)} cache groups; one is supported today")

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token over all groups."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def window(self) -> int | None:
        """The sliding window that lets old blocks go, or None when some layer reads every token."""
        return self.groups[0].window


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which part of the weights and of the KV heads a rank has; the whole, unless said otherwise."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank is {self.rank} of {self.world_size}; expected one from 0 to {self.world_size - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Every argument of an Engine; see `Engine` for their meaning to a user.

    Raises:
        ConfigError: a value is out of range or two contradict each other.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    load_format: LoadFormat = "auto"
    device: str = "auto"
    dtype: DType = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_prefill_tokens: int | None = None
    max_queued_requests: int | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_fraction: float | None = None
    enable_prefix_caching: bool = True
    policy: PolicyConfig | None = None
    slo: SLO | None = None
    switch_interval: float | None = None
    freeze_gc: bool = False
    calibrate: bool | None = None
    trace: str | os.PathLike[str] | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for rule in _RULES:
            for name in rule.names:
                value = getattr(self, name)
                if not rule.is_met(value) and not (value is None and name in optional):
                    raise ConfigError(f"{name} is {value!r}; expected {rule.expected}")
        sizes = [n for n in ("kv_cache_bytes", "kv_cache_tokens", "kv_cache_fraction") if getattr(self, n) is not None]
        if len(sizes) > 1:
            raise ConfigError(f"{' and '.join(sizes)} are all given; expected one size for the KV pool")


@dataclass(frozen=True, slots=True)
class _Rule:
    """What some arguments of an engine must be; None is also taken where it is the default."""

    names: tuple[str, ...]
    is_met: Callable[[object], bool]
    expected: str


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive_int(value: object) -> bool:
    return _is_int(value) and value >= 1


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_seed(value: object) -> bool:
    return _is_int(value) and -(2**63) <= value < 2**64  # what torch's generators take


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


_RULES = (
    _Rule(("model",), _is_text, "a hub id, a folder or a .gguf file"),
    _Rule(("tokenizer",), _is_text, "a hub id, a folder or a .gguf file, or None"),
    _Rule(("revision",), _is_text, "a branch, tag or commit, or None"),
    _Rule(("device",), _is_text, "'auto', 'cpu', 'cuda' or 'cuda:<index>'"),
    _Rule(("load_format",), get_args(LoadFormat).__contains__, f"one of {', '.join(get_args(LoadFormat))}"),
    _Rule(("dtype",), get_args(DType).__contains__, f"one of {', '.join(get_args(DType))}"),
    _Rule(("seed",), _is_seed, "an integer from -2**63 to 2**64 - 1"),
    _Rule(("max_num_seqs", "tensor_parallel_size"), _is_positive_int, "a positive integer"),
    _Rule(("max_model_len", "max_prefill_tokens"), _is_positive_int, "a positive integer, or None"),
    _Rule(("max_queued_requests", "block_size"), _is_positive_int, "a positive integer, or None"),
    _Rule(("kv_cache_bytes", "kv_cache_tokens"), _is_positive_int, "a positive integer, or None"),
    _Rule(("kv_cache_fraction",), _is_share, "a share of memory in (0, 1], or None"),
    _Rule(("switch_interval",), _is_share, "seconds above 0 and up to 1, or None"),
    _Rule(("enable_prefix_caching", "freeze_gc"), _is_bool, "True or False"),
    _Rule(("calibrate",), _is_bool, "True, False or None"),
    _Rule(("policy",), lambda value: isinstance(value, PolicyConfig), "a policy object, or None"),
    _Rule(("slo",), lambda value: isinstance(value, SLO), "an SLO, such as SLO(ttft=0.5, tpot=0.05), or None"),
    _Rule(("trace",), _is_path, "the path of a file to write, or None"),
)

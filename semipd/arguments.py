"""What users may pass to an `Engine`, and its one normal form: a config, token ids, sampling parameters."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from semipd.config import SLO, DType, EngineConfig, LoadFormat, PolicyConfig, PolicyName, parse_policy
from semipd.errors import ConfigError, RequestError
from semipd.request import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Mapping[str, Any] | None


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of `Engine`; see there."""

    tokenizer: str | os.PathLike[str] | None
    revision: str | None
    load_format: LoadFormat
    device: str
    dtype: DType
    seed: int
    max_model_len: int | None
    max_num_seqs: int
    max_prefill_tokens: int | None
    max_queued_requests: int | None
    block_size: int | None
    kv_cache_bytes: int | None
    kv_cache_tokens: int | None
    kv_cache_fraction: float | None
    enable_prefix_caching: bool
    policy: PolicyName | PolicyConfig | None
    slo: SLO | None
    switch_interval: float | None
    freeze_gc: bool
    calibrate: bool | None
    trace: str | os.PathLike[str] | None
    tensor_parallel_size: int


def as_config(model: str | os.PathLike[str], options: EngineOptions) -> EngineConfig:
    """The config that an engine's arguments make.

    Raises:
        ConfigError: a name is unknown, or a value cannot work.
    """
    known = EngineOptions.__annotations__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown engine argument {', '.join(unknown)}; known are {', '.join(known)}")
    values: dict[str, Any] = {"model": model, **options}
    for name in ("model", "tokenizer"):
        if isinstance(value := values.get(name), os.PathLike):
            values[name] = os.fspath(value)
    policy = values.pop("policy", None)
    return EngineConfig(policy=None if policy is None else parse_policy(policy), **values)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt is a batch of one: text, or a sequence that begins with a token id.

    Raises:
        RequestError: it is neither a prompt nor a sequence.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes) or not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__"):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; expected text, a sequence of token ids, or a sequence of either"
        )
    if len(prompts) > 0 and _is_token_id(prompts[0]):
        return [prompts]  # type: ignore[list-item]  # told apart by its first element
    return prompts  # type: ignore[return-value]


def as_token_ids(prompt: Prompt) -> list[int]:
    """Plain ints of a prompt that is no text: a sequence of any kind of integers, an array or tensor of one axis.

    Raises:
        RequestError: it is something else.
    """
    values = (
        prompt.tolist() if hasattr(prompt, "tolist") else prompt
    )  # arrays and tensors: 100 times faster than one by one
    try:
        if isinstance(values, Mapping | bytes):
            raise TypeError
        return [operator.index(value) for value in values]  # type: ignore[arg-type]  # checked by this
    except TypeError:
        given = f"{prompt!r:.200}"
    raise RequestError(f"the prompt is {given}; expected text or a sequence of token ids")


def as_sampling_params(params: Params) -> SamplingParams:
    """One request's parameters.

    Raises:
        RequestError: they are of another type, a field is unknown or out of range.
    """
    if params is None:
        return SamplingParams()
    if isinstance(params, SamplingParams):
        return params
    if isinstance(params, Mapping):
        return SamplingParams.from_dict(params)
    raise RequestError(f"params is a {type(params).__name__}; expected SamplingParams, a dict of its fields, or None")


def as_params_per_prompt(params: Params | Sequence[Params], num_prompts: int) -> list[SamplingParams]:
    """Parameters for each of `num_prompts`, from one for all or one per prompt.

    Raises:
        RequestError: there are more or fewer, or one of them cannot be used.
    """
    if not isinstance(params, Sequence) or isinstance(params, str):
        return [as_sampling_params(params)] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} params for {num_prompts} prompts; give one for all, or one per prompt")
    return [as_sampling_params(one) for one in params]


def as_name(value: str | None, argument: str) -> str | None:
    """A name that a user gave as `argument`, such as `request_id`.

    Raises:
        RequestError: it is not a string with something in it.
    """
    if value is not None and not (isinstance(value, str) and value):
        raise RequestError(f"{argument} is {value!r}; expected a string that is not empty, or None")
    return value


def as_slo(slo: SLO | None) -> SLO | None:
    """A request's latency targets.

    Raises:
        RequestError: they are of another type.
    """
    if slo is not None and not isinstance(slo, SLO):
        raise RequestError(f"slo is {slo!r}; expected an SLO, such as SLO(ttft=0.5, tpot=0.05), or None")
    return slo


def _is_token_id(value: object) -> bool:
    """Whether it is an integer: Python's, numpy's, or a tensor without axes."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0

"""How long prompts and outputs are: seeded length distributions.

Every quantity has a random stream of its own, so the first requests of a workload are the same however many are drawn,
and a sweep over rates offers the same requests at every rate.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from semipd.errors import ConfigError

Lengths = NDArray[np.int64]


class LengthDistribution(Protocol):
    """Draws lengths in tokens."""

    def sample(self, rng: np.random.Generator, count: int) -> Lengths:
        """So many lengths, each at least 1."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(normal(mu, sigma)), rounded and clipped to [low, high]."""

    mu: float
    sigma: float
    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int) -> Lengths:
        return np.clip(np.rint(rng.lognormal(self.mu, self.sigma, count)), self.low, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any length from low to high, both included; equal ends make it a constant."""

    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int) -> Lengths:
        return rng.integers(self.low, self.high, count, dtype=np.int64, endpoint=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompt and output lengths, and a share of the requests whose prompts are long.

    Attributes:
        name: how results call it.
        inputs: prompt lengths.
        outputs: output lengths.
        long_inputs: prompt lengths of `long_share` of the requests.
    """

    name: str
    inputs: LengthDistribution
    outputs: LengthDistribution
    long_inputs: LengthDistribution | None = None
    long_share: float = 0.0

    def sample(self, seed: int, count: int) -> tuple[Lengths, Lengths]:
        """Prompt and output lengths of the first `count` requests."""
        streams = [np.random.default_rng([seed, stream]) for stream in range(4)]
        inputs = self.inputs.sample(streams[0], count)
        outputs = self.outputs.sample(streams[1], count)
        if self.long_inputs is not None:
            is_long = streams[2].random(count) < self.long_share
            inputs = np.where(is_long, self.long_inputs.sample(streams[3], count), inputs)
        return inputs, outputs


_SHAREGPT_INPUTS = LogNormal(4.614, 1.335, 4, 4096)
_SHAREGPT_OUTPUTS = LogNormal(5.548, 0.674, 4, 1024)

# Lognormal fits to published moments: ShareGPT as NanoFlow reports it, Azure's conversation trace as Splitwise does.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="sharegpt", inputs=_SHAREGPT_INPUTS, outputs=_SHAREGPT_OUTPUTS),
        Workload(
            name="azure-conv",
            inputs=LogNormal(6.725, 0.808, 16, 8192),
            outputs=LogNormal(4.860, 0.992, 4, 1024),
        ),
        Workload(name="long", inputs=LogNormal(8.4, 0.6, 512, 16384), outputs=LogNormal(5.0, 0.6, 16, 512)),
        Workload(
            name="mixed-long",
            inputs=_SHAREGPT_INPUTS,
            outputs=_SHAREGPT_OUTPUTS,
            long_inputs=Uniform(6_000, 10_000),
            long_share=0.05,
        ),
    )
}

_LENGTHS = re.compile(r"lengths:(\d+)(?:-(\d+))?,(\d+)(?:-(\d+))?")


def parse_workload(text: str) -> Workload:
    """A workload by name, or `lengths:INPUT,OUTPUT` where each is a number or a range such as 16-64.

    Raises:
        ConfigError: it is neither.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    if match := _LENGTHS.fullmatch(text):
        low_in, high_in, low_out, high_out = (None if group is None else int(group) for group in match.groups())
        assert low_in is not None and low_out is not None
        inputs, outputs = _range(low_in, high_in), _range(low_out, high_out)
        if all(1 <= lengths.low <= lengths.high for lengths in (inputs, outputs)):
            return Workload(name=text, inputs=inputs, outputs=outputs)
    raise ConfigError(
        f"workload is {text!r}; expected one of {', '.join(WORKLOADS)}, lengths:INPUT,OUTPUT with numbers or ranges "
        "from 1 such as lengths:16-64,32, or trace:FILE"
    )


def _range(low: int, high: int | None) -> Uniform:
    return Uniform(low, low if high is None else high)


def arrival_times(rate: float, seconds: float, *, cv: float, seed: int) -> NDArray[np.float64]:
    """When requests arrive in [0, seconds), in seconds: gamma-distributed gaps, at `rate` a second on average.

    Args:
        rate: requests per second.
        seconds: where the arrivals end.
        cv: coefficient of variation of the gaps: 1 is Poisson, above it bursts, 0 a metronome.
        seed: of the gaps; another rate with the same seed stretches the same gaps.
    """
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"the rate is {rate!r}; expected requests per second above 0")
    if not (cv >= 0 and math.isfinite(cv)):
        raise ConfigError(f"cv is {cv!r}; expected the gaps' coefficient of variation, from 0 (1 is Poisson)")
    rng = np.random.default_rng([seed, 4])
    gaps = np.empty(0)
    while gaps.sum() < rate * seconds:
        block = int(rate * seconds) + 64
        gaps = np.append(gaps, rng.gamma(cv**-2, cv**2, block) if cv else np.ones(block))
    times = np.cumsum(gaps) / rate
    return times[times < seconds]

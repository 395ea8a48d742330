"""The step times that an engine starts with before it has measured any: an H100's, scaled to the model and the GPU.

`h100_latency.json` is the state of a latency model that learned steps of Llama-3-8B in bfloat16 on one H100 SXM;
`python -m benchmarks.latency_figures` makes it. Each of its terms is bound by one thing, bytes or flops, and grows with
it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("h100_latency.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What steps of a model cost on a device.

    Attributes:
        weight_bytes: read by every step.
        token_flops: of the products of one row.
        context_bytes: of K and V, read for one token of a context.
        pair_flops: of attention, for a token and one that it attends to.
        bandwidth: of the device's memory, in bytes a second.
        flops: of its dense products, in the dtype of the weights, a second.
    """

    weight_bytes: float
    token_flops: float
    context_bytes: float
    pair_flops: float
    bandwidth: float
    flops: float

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """Least seconds of the model's terms: weights, row, context, pair."""
        return (
            self.weight_bytes / self.bandwidth,
            self.token_flops / self.flops,
            self.context_bytes / self.bandwidth,
            self.pair_flops / self.flops,
        )


# What the figures were measured with: 6.98e9 parameters of layers and 0.53e9 of the head, 32 layers of 8 KV heads and
# 32 heads of 128; the bandwidth and clock that torch gives for an H100 SXM.
H100_LLAMA_3_8B = StepCosts(
    weight_bytes=2 * (6.98e9 + 0.53e9),
    token_flops=2 * 6.98e9,
    context_bytes=2 * 2 * 32 * 8 * 128,
    pair_flops=4 * 32 * 32 * 128,
    bandwidth=3.35e12,
    flops=132 * 4096 * 1.98e9,
)


def stored_state(costs: StepCosts, num_sms: int) -> dict[str, Any]:
    """The state of a latency model (`LatencyModel.from_state`) for a model and device of these costs.

    Args:
        costs: of the model on the device.
        num_sms: of the device; shares of it stand for those that were measured.
    """
    state: dict[str, Any] = json.loads(FIGURES.read_text())
    ratios = [mine / its for mine, its in zip(costs.terms, H100_LLAMA_3_8B.terms, strict=True)]
    cells: dict[tuple[str, int, int], list[Any]] = {}
    for kind, share, other, coefficients in state["given"]:
        num, num_other = (round(part * num_sms / state["num_sms"]) for part in (share, other))
        if num and (num_other or not other):  # else of a device too small for that share
            scaled = [value * ratio for value, ratio in zip(coefficients, ratios, strict=True)]
            cells.setdefault((kind, num, num_other), [kind, num, num_other, scaled])
    return state | {"num_sms": num_sms, "given": list(cells.values())}

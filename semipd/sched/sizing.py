"""From predicted times to sizes of steps: how close to a limit a prediction may come, and the sizes that are used."""

from __future__ import annotations

MARGIN = 0.9
"""Of a limit: a prediction is off by a few percent, and delivery comes on top."""


def on_grid(num_tokens: int, num_bits: int) -> int:
    """The next number below with so many significant bits, and 1 at least.

    Each size of step is a CUDA graph, and each change of plan wakes both lanes: a few sizes are enough.
    """
    spare_bits = max(num_tokens.bit_length() - num_bits, 0)
    return max(num_tokens >> spare_bits << spare_bits, 1)

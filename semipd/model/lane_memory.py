"""The static memory of one lane: what passes between the kernels of a step, at addresses that graphs keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LaneBuffers:
    """Named buffers that grow to the largest size asked of them and stay where they are below it.

    What a buffer outgrew is kept: a captured graph may still write it. A lane's first steps at its largest size, made
    when the engine starts, leave nothing to grow.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._outgrown: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self._buffers.values(), *self._outgrown))

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer called `name`, contiguous in `shape`; zeros when it is first asked for, then as it was left."""
        key, size = (name, dtype), math.prod(shape)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < size:
            if flat is not None:
                self._outgrown.append(flat)
            # Made in inference mode, a tensor could not be written outside of it.
            with torch.inference_mode(False):
                flat = self._buffers[key] = torch.zeros(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)

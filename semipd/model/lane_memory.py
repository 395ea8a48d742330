"""The static memory of one lane: what passes between the kernels of a step, at addresses that graphs keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from semipd.config import Phase
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.step_inputs import Buckets, StepInputs

_OUTPUT_RING = 4  # steps whose tokens may be unread; a lane is one step ahead


class LaneBuffers:
    """Named buffers that grow to the largest size asked of them and stay where they are below it.

    What a buffer outgrew is kept: a captured graph may still write it. A lane's first steps at its largest size, made
    when the engine starts, leave nothing to grow.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer called `name`, contiguous in `shape`; zeros when it is first asked for, then as it was left."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            # Made in inference mode, a tensor could not be written outside of it.
            with torch.inference_mode(False):
                view = self._views[name, shape, dtype] = self._make_view(name, shape, dtype)
        return view

    def _make_view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key, size = (name, dtype), math.prod(shape)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < size:
            if flat is not None:
                self._outgrown.append(flat)
                self._views = {view: tensor for view, tensor in self._views.items() if (view[0], view[2]) != key}
            flat = self._buffers[key] = torch.zeros(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)


class LaneMemory:
    """The static memory of one lane."""

    def __init__(
        self,
        phase: Phase,
        buckets: Buckets,
        *,
        tile_rows: int,
        null_slot: int,
        sampler: CudaSampler,
        device: torch.device,
    ) -> None:
        self.phase = phase
        self.buckets = buckets
        self.buffers = LaneBuffers(device)
        self.inputs = StepInputs(buckets, tile_rows=tile_rows, null_slot=null_slot, device=device)
        max_sampled = buckets.heads[-1]
        self.scratch = sampler.make_scratch(max_sampled)
        with torch.inference_mode(False):
            self.token_ids_R = torch.zeros(max_sampled, dtype=torch.int64, device=device)
            self._outputs = [
                torch.zeros(max_sampled, dtype=torch.int64, pin_memory=device.type == "cuda")
                for _ in range(_OUTPUT_RING)
            ]
        self._next_output = 0
        self._hidden_TD: Tensor | None = None
        self._logits_RV: Tensor | None = None

    @property
    def hidden_TD(self) -> Tensor:
        """The last step's hidden states; rows behind its own hold anything."""
        assert self._hidden_TD is not None, "no step ran"
        return self._hidden_TD

    @property
    def logits_RV(self) -> Tensor:
        """The last step's logits; rows behind its own hold anything."""
        assert self._logits_RV is not None, "no step sampled"
        return self._logits_RV

    def keep_hidden(self, hidden_TD: Tensor) -> None:
        """Note where steps leave their hidden states: the largest view of a buffer, the warm-up's, is good for all."""
        self._hidden_TD = _larger(self._hidden_TD, hidden_TD)

    def keep_logits(self, logits_RV: Tensor) -> None:
        """The same for logits."""
        self._logits_RV = _larger(self._logits_RV, logits_RV)

    def take_output(self) -> Tensor:
        """Host memory for the tokens of one step."""
        output = self._outputs[self._next_output]
        self._next_output = (self._next_output + 1) % _OUTPUT_RING
        return output


def _larger(kept: Tensor | None, view: Tensor) -> Tensor:
    assert kept is None or kept.data_ptr() == view.data_ptr(), "a step is larger than those of the warm-up"
    return view if kept is None or len(view) > len(kept) else kept

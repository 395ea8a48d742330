"""Host memory that the device copies from on its own time: a ring of pinned buffers, guarded by events."""

from __future__ import annotations

import torch
from torch import Tensor


class PinnedRing:
    """Copies host tensors to the device without waiting for it.

    A buffer is written again only once its last copy is done, so the host waits when all buffers are under way. The
    caller sees to it that one thread copies at a time. On a CPU it copies at once.
    """

    def __init__(self, *, num_buffers: int, num_bytes: int, device: torch.device) -> None:
        self._next = 0
        self._num_bytes = num_bytes
        self._buffers: Tensor | None = None
        if device.type == "cuda":
            with torch.inference_mode(False):  # or it could not be written outside of it
                self._buffers = torch.empty(num_buffers, num_bytes, dtype=torch.uint8, pin_memory=True)
            self._events = [
                torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(num_buffers)
            ]

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Writes `source`, on the host, to `out` of the same shape, on the current stream; both are contiguous."""
        source = source.to(out.dtype)
        if self._buffers is None:
            out.copy_(source)
            return
        source_bytes, out_bytes = (tensor.view(-1).view(torch.uint8) for tensor in (source, out))
        for start in range(0, len(source_bytes), self._num_bytes):
            source_piece = source_bytes[start : start + self._num_bytes]
            buffer, event = self._buffers[self._next], self._events[self._next]
            self._next = (self._next + 1) % len(self._events)
            event.synchronize()
            staged = buffer[: len(source_piece)]
            staged.copy_(source_piece)
            out_bytes[start : start + len(staged)].copy_(staged, non_blocking=True)
            event.record()

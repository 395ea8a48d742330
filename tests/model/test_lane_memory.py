"""The static memory of a lane: the same addresses for the same name, whatever shape is asked for."""

from __future__ import annotations

import torch

from semipd.model.lane_memory import LaneBuffers

F32, I32 = torch.float32, torch.int32


def test_a_name_is_the_same_memory_in_every_shape() -> None:
    buffers = LaneBuffers(torch.device("cpu"))
    whole = buffers.get("x", (4, 6), F32)
    assert whole.is_contiguous() and not whole.any()
    whole.copy_(torch.arange(24.0).view(4, 6))
    part = buffers.get("x", (2, 3), F32)
    assert part.data_ptr() == whole.data_ptr() and part.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert buffers.get("x", (4, 6), F32) is whole, "made once: a step asks for a dozen of them in each layer"
    assert buffers.get("x", (4, 6), I32).data_ptr() != whole.data_ptr()
    assert buffers.get("y", (4, 6), F32).data_ptr() != whole.data_ptr()


def test_what_a_buffer_outgrew_is_kept_and_no_longer_given() -> None:
    buffers = LaneBuffers(torch.device("cpu"))
    small, other = buffers.get("x", (2,), F32), buffers.get("x", (2,), I32)
    large = buffers.get("x", (1000,), F32)
    small.fill_(1)  # as a captured graph may
    again = buffers.get("x", (2,), F32)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr() and not again.any()
    assert buffers.get("x", (2,), I32) is other, "of the same name, in another dtype"


def test_memory_that_was_first_asked_for_in_inference_mode_may_be_written_outside() -> None:
    buffers = LaneBuffers(torch.device("cpu"))
    with torch.inference_mode():
        inside = buffers.get("x", (2, 2), F32)
    inside.fill_(1)
    assert not inside.is_inference() and buffers.get("x", (4,), F32).sum() == 4

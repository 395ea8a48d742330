"""Penalties on the logits of tokens that a request has seen, from a table of counts, without asking which those are.

Shapes: R rows of a batch, V vocab, P request slots, F parameters of a slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.sampling import FREQUENCY, PRESENCE, REPETITION
from semipd.kernels.triton_util import launch

_TOKENS_PER_PROGRAM = 4096


def apply_penalties(logits_RV: Tensor, slots_R: Tensor, params_PF: Tensor, seen_PV: Tensor, out_RV: Tensor) -> None:
    """Writes penalised logits: repetition_penalty on seen tokens, then frequency and presence on those of the output.

    Args:
        logits_RV: float32, or a narrower type that is read as float32. Rows may be strided.
        slots_R: the request slot of each row.
        params_PF: int64, see the columns in `kernels/sampling.py`.
        seen_PV: int32, twice the number of a token's occurrences in the output, plus one if the prompt has it.
        out_RV: float32, the results; may be `logits_RV`.
    """
    num_rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == out_RV.stride(1) == 1 and seen_PV.is_contiguous() and params_PF.is_contiguous()
    assert out_RV.shape == logits_RV.shape and seen_PV.shape[1] == vocab_size
    launch(_penalties_kernel, (triton.cdiv(vocab_size, _TOKENS_PER_PROGRAM), num_rows))(
        logits_RV,
        slots_R,
        params_PF,
        seen_PV,
        out_RV,
        logits_RV.stride(0),
        params_PF.stride(0),
        out_RV.stride(0),
        vocab_size,
        BLOCK=_TOKENS_PER_PROGRAM,
        num_warps=8,
        enable_fp_fusion=False,  # the reference rounds the product before it subtracts
    )


def apply_penalties_reference(
    logits_RV: Tensor, slots_R: Tensor, params_PF: Tensor, seen_PV: Tensor, out_RV: Tensor
) -> None:
    """`apply_penalties` in plain torch."""
    seen_RV = seen_PV[slots_R]
    params_RF = params_PF.view(torch.float64)[slots_R].float()
    presence_R1, frequency_R1, repetition_R1 = (
        params_RF[:, column.value, None] for column in (PRESENCE, FREQUENCY, REPETITION)
    )
    logits_RV = logits_RV.float()
    scores_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    count_RV = seen_RV >> 1
    scores_RV = scores_RV - count_RV * frequency_R1 - (count_RV > 0) * presence_R1
    out_RV.copy_(torch.where(seen_RV != 0, scores_RV, logits_RV))


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _penalties_kernel(
    logits_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    params_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    out_ptr: tl.tensor,
    logits_stride: int,
    params_stride: int,
    out_stride: int,
    vocab_size: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    params_ptr += slot * params_stride
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    seen = tl.load(seen_ptr + slot * vocab_size + ids, mask=mask, other=0)
    logits = tl.load(logits_ptr + row * logits_stride + ids, mask=mask, other=0.0).to(tl.float32)
    repetition = _load_float32(params_ptr + REPETITION)
    scores = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    count = (seen >> 1).to(tl.float32)
    scores -= count * _load_float32(params_ptr + FREQUENCY)
    scores -= tl.where(count > 0, _load_float32(params_ptr + PRESENCE), 0.0)
    tl.store(out_ptr + row * out_stride + ids, tl.where(seen != 0, scores, logits), mask=mask)


@triton.jit
def _load_float32(ptr: tl.tensor) -> tl.tensor:
    return tl.load(ptr).to(tl.float64, bitcast=True).to(tl.float32)

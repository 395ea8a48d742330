"""The next token of each row in two launches, with every row's parameters read from device tables.

The specification is `semipd/model/sampling_ops.py`, and tokens equal it. First the maxima of blocks of 64 tokens: the k
best tokens lie in the k blocks with the best maxima, and a block whose maximum has no weight has none. Then a program
per row lists the blocks that matter. What fits in one tile, as with top_k up to 64, is decided in registers; a longer
list is read tile by tile until what is undecided fits.

Weights are multiples of 2**-34, which float64 adds exactly: neither the order of a sum nor the size of a tile shows in
a token. Of `sampling_ops` only the last bit of an exponential may differ, before it is rounded to such a multiple.

Shape suffixes: R rows of a batch, V vocab, M blocks of a row, W words of scratch of a row, P request slots (the last is
the null slot, which padding rows use), F parameters of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.sampling_codes import LOWEST_KEY, MAX_VOCAB_SIZE, uniform
from semipd.kernels.sampling_draw import BLOCK, Row, draw, load_keys
from semipd.kernels.triton_util import launch, wait_for_previous

# Columns of a slot's parameters, int64; those from TEMPERATURE on hold the bits of a float64. MIN_TOKENS is not read
# here, and the last three are read by `kernels/penalties.py`.
KEY = tl.constexpr(0)
TOP_K = tl.constexpr(1)
MIN_TOKENS = tl.constexpr(2)
TEMPERATURE = tl.constexpr(3)
TOP_P = tl.constexpr(4)
MIN_P = tl.constexpr(5)
PRESENCE = tl.constexpr(6)
FREQUENCY = tl.constexpr(7)
REPETITION = tl.constexpr(8)
NUM_PARAMS = 9

_TILE_BLOCKS = 64  # 4,096 tokens, 8 a thread of 16 warps
_MAXIMA_PER_PROGRAM = 128  # 8,192 tokens: 16 programs share a row of 128,256


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """What the two kernels write for themselves. Steps that may run at the same time need one each.

    Attributes:
        maxima_RM: int32, keys of the blocks' largest logits.
        work_RW: int64. Of each listed block its index, the weight of its tokens above the border of the nucleus and the
            number of those on it, M words each; then the codes that are undecided, a tile of words.
    """

    maxima_RM: Tensor
    work_RW: Tensor

    @staticmethod
    def make(
        num_rows: int, vocab_size: int, device: torch.device | str, *, tile_blocks: int = _TILE_BLOCKS
    ) -> SamplingScratch:
        """Scratch for up to `num_rows` rows, 89 KB each at a vocabulary of 128,256. Tests make tiles smaller."""
        num_blocks = triton.cdiv(vocab_size, BLOCK.value)
        num_words = 3 * num_blocks + tile_blocks * BLOCK.value
        return SamplingScratch(
            maxima_RM=torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device),
            work_RW=torch.empty(num_rows, num_words, dtype=torch.int64, device=device),
        )


def sample(
    logits_RV: Tensor,
    slots_R: Tensor,
    params_PF: Tensor,
    last_token_P: Tensor,
    num_outputs_P: Tensor,
    token_ids_R: Tensor,
    scratch: SamplingScratch,
) -> None:
    """Writes each row's next token to `token_ids_R` and to its slot, and counts it.

    Greedy rows (temperature 0) may stand beside random ones. A row that is -inf throughout gives token 0; one with NaN
    gives some token of the vocabulary.

    Args:
        logits_RV: float32, or a narrower type that is read as float32. Rows may be strided.
        slots_R: the request slot of each row; none but the null slot twice.
        params_PF: int64, see the columns above; there may be more.
        last_token_P: what each slot sampled last; that of the null slot is left alone.
        num_outputs_P: int64, how many tokens each slot has sampled; that of the null slot is left alone.
        token_ids_R: the results, of any integer type.
        scratch: of at least as many rows.
    """
    num_rows, vocab_size = logits_RV.shape
    num_blocks = scratch.maxima_RM.shape[1]
    assert logits_RV.stride(1) == 1 and params_PF.is_contiguous() and vocab_size <= MAX_VOCAB_SIZE
    assert num_rows <= scratch.maxima_RM.shape[0] and num_blocks == triton.cdiv(vocab_size, BLOCK.value)
    launch(_block_maxima_kernel, (triton.cdiv(num_blocks, _MAXIMA_PER_PROGRAM), num_rows), pdl_on=logits_RV.device)(
        logits_RV,
        scratch.maxima_RM,
        logits_RV.stride(0),
        vocab_size,
        num_blocks,
        MAXIMA=_MAXIMA_PER_PROGRAM,
        num_warps=8,
    )
    max_blocks = max(triton.next_power_of_2(num_blocks), 16)
    launch(_sample_rows_kernel, (num_rows,), pdl_on=logits_RV.device)(
        logits_RV,
        slots_R,
        params_PF,
        last_token_P,
        num_outputs_P,
        token_ids_R,
        scratch.maxima_RM,
        scratch.work_RW,
        logits_RV.stride(0),
        params_PF.stride(0),
        scratch.work_RW.stride(0),
        vocab_size,
        num_blocks,
        last_token_P.shape[0] - 1,
        MAX_BLOCKS=max_blocks,
        TILE=(scratch.work_RW.shape[1] - 3 * num_blocks) // BLOCK.value,
        num_warps=16,
        enable_fp_fusion=False,  # the specification rounds its products
    )


@triton.jit
def _block_maxima_kernel(
    logits_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    logits_stride: int,
    vocab_size: int,
    num_blocks: int,
    MAXIMA: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    row = tl.program_id(1).to(tl.int64)
    blocks = tl.program_id(0) * MAXIMA + tl.arange(0, MAXIMA)
    ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    maxima = tl.max(load_keys(logits_ptr + row * logits_stride, ids, vocab_size), axis=1)
    tl.store(maxima_ptr + row * num_blocks + blocks, maxima, mask=blocks < num_blocks)


# Rows of a step are slices of its buffers, at any alignment: one compiled kernel takes them all.
@triton.jit(do_not_specialize=["null_slot"], do_not_specialize_on_alignment=["slots_ptr", "token_ids_ptr"])
def _sample_rows_kernel(
    logits_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    params_ptr: tl.tensor,
    last_token_ptr: tl.tensor,
    num_outputs_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    work_ptr: tl.tensor,
    logits_stride: int,
    params_stride: int,
    work_stride: int,
    vocab_size: int,
    num_blocks: int,
    null_slot: int,
    MAX_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    logits_ptr += row * logits_stride
    params_ptr += slot * params_stride
    blocks = tl.arange(0, MAX_BLOCKS)
    maxima = tl.load(maxima_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=LOWEST_KEY)
    num_outputs = tl.load(num_outputs_ptr + slot)
    peak_key = tl.max(maxima, axis=0)
    temperature = _load_float(params_ptr + TEMPERATURE)
    if temperature > 0:
        top_k = tl.load(params_ptr + TOP_K)
        drawn_row = Row(
            logits_ptr,
            work_ptr + row * work_stride,
            vocab_size,
            num_blocks,
            peak_key,
            temperature,
            tl.where(top_k > 0, tl.minimum(top_k, vocab_size), vocab_size),
            _load_float(params_ptr + TOP_P),
            _load_float(params_ptr + MIN_P),
            uniform(tl.load(params_ptr + KEY), num_outputs),
        )
        token = draw(drawn_row, maxima, MAX_BLOCKS, TILE)
    else:
        best = tl.min(tl.where(maxima == peak_key, blocks, MAX_BLOCKS), axis=0)
        ids = best * BLOCK + tl.arange(0, BLOCK)
        token = tl.min(tl.where(load_keys(logits_ptr, ids, vocab_size) == peak_key, ids, vocab_size), axis=0)

    token = tl.minimum(token, vocab_size - 1)  # the embedding would be read at an id that NaN logits left out of range
    tl.store(token_ids_ptr + row, token)
    tl.store(last_token_ptr + slot, token, mask=slot != null_slot)
    tl.store(num_outputs_ptr + slot, num_outputs + 1, mask=slot != null_slot)


@triton.jit
def _load_float(ptr: tl.tensor) -> tl.tensor:
    return tl.load(ptr).to(tl.float64, bitcast=True)

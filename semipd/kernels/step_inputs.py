"""From a step's description to what the decoder reads: positions, pool slots, token ids and rows, all on the device.

The host writes which request slots take part into static buffers; lengths, last tokens and block tables stay on the
device, so a captured graph starts with these kernels and serves every step of its size. All indices are int32.

Shapes: T rows of a step, B decode rows, E prompt chunks, U block updates, R gathered rows, X request slots (the last is
the null slot, which padding uses), N blocks that a request can have, D model dim, V rows of the source.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import launch, wait_for_previous

_BLOCK = 128  # indices of one program
_CHUNK_BLOCK = 512  # rows of a prompt chunk of one program
_MAX_ROW_BLOCK = 4096  # columns of one program that copies rows: four loads of 16 bytes a thread of 4 warps in bfloat16
_VALUES_PER_WARP = 1024


def apply_block_updates(updates_U3: Tensor, num_updates_1: Tensor, block_table_XN: Tensor) -> None:
    """Sets `block_table[slot, index] = block_id` by the first `num_updates_1` rows (slot, index, block_id)."""
    assert updates_U3.is_contiguous() and block_table_XN.stride(1) == 1
    max_updates = updates_U3.shape[0]
    launch(_apply_block_updates_kernel, (triton.cdiv(max_updates, _BLOCK),))(
        updates_U3, num_updates_1, block_table_XN, block_table_XN.stride(0), max_updates, BLOCK=_BLOCK
    )


def apply_block_updates_reference(updates_U3: Tensor, num_updates_1: Tensor, block_table_XN: Tensor) -> None:
    """`apply_block_updates` in plain torch."""
    slots, indices, block_ids = updates_U3[: int(num_updates_1)].long().unbind(1)
    block_table_XN[slots, indices] = block_ids.int()


def decode_inputs(
    slots_B: Tensor,
    lengths_X: Tensor,
    last_token_X: Tensor,
    block_table_XN: Tensor,
    block_size: int,
    token_ids_B: Tensor,
    positions_B: Tensor,
    slot_mapping_B: Tensor,
    context_lens_B: Tensor,
) -> None:
    """Each decode row feeds its request's last token at the end of its context, which grows by one.

    Rows of the null slot keep their token and get position 0, slot -1 and context length 0. Those behind the decodes of
    a step may belong to its prompts, whose token ids are there before and whose `prefill_inputs` comes after.

    Args:
        slots_B: the request slot of each row; none but the null slot twice.
        lengths_X: tokens in the pool per request; raised by one for each row.
        last_token_X: what each request sampled last; any integer type.
        block_table_XN: the blocks of each request.
        block_size: slots of a block.
        token_ids_B, positions_B, slot_mapping_B, context_lens_B: the results; the own token counts into the context.
    """
    assert block_table_XN.stride(1) == 1
    num_rows = slots_B.shape[0]
    launch(_decode_inputs_kernel, (triton.cdiv(num_rows, _BLOCK),), pdl_on=positions_B.device)(
        slots_B,
        lengths_X,
        last_token_X,
        block_table_XN,
        token_ids_B,
        positions_B,
        slot_mapping_B,
        context_lens_B,
        block_table_XN.stride(0),
        num_rows,
        block_table_XN.shape[0] - 1,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
    )


def decode_inputs_reference(
    slots_B: Tensor,
    lengths_X: Tensor,
    last_token_X: Tensor,
    block_table_XN: Tensor,
    block_size: int,
    token_ids_B: Tensor,
    positions_B: Tensor,
    slot_mapping_B: Tensor,
    context_lens_B: Tensor,
) -> None:
    """`decode_inputs` in plain torch."""
    is_row_B = slots_B != block_table_XN.shape[0] - 1
    at_B = lengths_X[slots_B] * is_row_B
    block_B = block_table_XN[slots_B, at_B // block_size]
    token_ids_B.copy_(torch.where(is_row_B, last_token_X[slots_B], token_ids_B))
    positions_B.copy_(at_B)
    slot_mapping_B.copy_(torch.where(is_row_B, block_B * block_size + at_B % block_size, -1))
    context_lens_B.copy_((at_B + 1) * is_row_B)
    lengths_X[slots_B[is_row_B]] += 1


def prefill_inputs(
    chunks_E4: Tensor,
    block_table_XN: Tensor,
    lengths_X: Tensor,
    block_size: int,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
) -> None:
    """Positions and pool slots of the rows of prompt chunks; other rows are left as they are.

    A chunk of the null slot is padding: its rows get slot -1.

    Args:
        chunks_E4: for each chunk its request slot, its first row, its number of rows, which may be 0, and the position
            of its first row.
        block_table_XN: the blocks of each request.
        lengths_X: tokens in the pool per request; set to the end of its chunk.
        block_size: slots of a block.
        positions_T, slot_mapping_T: the results.
    """
    assert chunks_E4.is_contiguous() and block_table_XN.stride(1) == 1
    grid = (chunks_E4.shape[0], triton.cdiv(positions_T.shape[0], _CHUNK_BLOCK))
    launch(_prefill_inputs_kernel, grid, pdl_on=positions_T.device)(
        chunks_E4,
        block_table_XN,
        lengths_X,
        positions_T,
        slot_mapping_T,
        block_table_XN.stride(0),
        block_table_XN.shape[0] - 1,
        BLOCK_SIZE=block_size,
        BLOCK=_CHUNK_BLOCK,
    )


def prefill_inputs_reference(
    chunks_E4: Tensor,
    block_table_XN: Tensor,
    lengths_X: Tensor,
    block_size: int,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
) -> None:
    """`prefill_inputs` in plain torch."""
    for slot, first, count, start in chunks_E4.tolist():
        rows = slice(first, first + count)
        at = torch.arange(start, start + count, device=positions_T.device)
        positions_T[rows] = at
        if slot == block_table_XN.shape[0] - 1:
            slot_mapping_T[rows] = -1
        elif count:
            slot_mapping_T[rows] = block_table_XN[slot, at // block_size] * block_size + at % block_size
            lengths_X[slot] = start + count


def gather_rows(source_VD: Tensor, rows_R: Tensor, out_RD: Tensor, *, first_row: int = 0) -> None:
    """Copies row `rows_R[r] - first_row` of `source_VD` to row r of `out_RD`; zeros where the source has no such row.

    The embedding of token ids, or of those in a part of the table, and the hidden states that go to the head. Rows may
    be strided.
    """
    num_rows, dim = out_RD.shape
    assert source_VD.shape[1] == dim and source_VD.stride(1) == out_RD.stride(1) == 1
    block = min(triton.next_power_of_2(dim), _MAX_ROW_BLOCK)
    launch(_gather_rows_kernel, (num_rows, triton.cdiv(dim, block)), pdl_on=out_RD.device)(
        source_VD,
        rows_R,
        out_RD,
        source_VD.stride(0),
        out_RD.stride(0),
        first_row,
        len(source_VD),
        DIM=dim,
        BLOCK=block,
        num_warps=max(1, block // _VALUES_PER_WARP),
    )


def gather_rows_reference(source_VD: Tensor, rows_R: Tensor, out_RD: Tensor, *, first_row: int = 0) -> None:
    """`gather_rows` in plain torch."""
    rows_R = rows_R - first_row
    kept_R = rows_R.clamp(0, len(source_VD) - 1)
    out_RD.copy_(torch.where((rows_R == kept_R)[:, None], source_VD[kept_R], 0))


# The host's and the step's buffers come in slices at any alignment: one compiled kernel takes them all.


@triton.jit(do_not_specialize=["max_updates"], do_not_specialize_on_alignment=["updates_ptr", "num_updates_ptr"])
def _apply_block_updates_kernel(
    updates_ptr: tl.tensor,
    num_updates_ptr: tl.tensor,
    table_ptr: tl.tensor,
    table_stride: int,
    max_updates: int,
    BLOCK: tl.constexpr,
) -> None:
    updates = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = updates < tl.minimum(tl.load(num_updates_ptr), max_updates)
    slots = tl.load(updates_ptr + updates * 3, mask=mask, other=0).to(tl.int64)
    indices = tl.load(updates_ptr + updates * 3 + 1, mask=mask, other=0)
    block_ids = tl.load(updates_ptr + updates * 3 + 2, mask=mask, other=0)
    tl.store(table_ptr + slots * table_stride + indices, block_ids, mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "null_slot"],
    do_not_specialize_on_alignment=[
        "slots_ptr",
        "token_ids_ptr",
        "positions_ptr",
        "slot_mapping_ptr",
        "context_lens_ptr",
    ],
)
def _decode_inputs_kernel(
    slots_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    last_token_ptr: tl.tensor,
    table_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    table_stride: int,
    num_rows: int,
    null_slot: int,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=mask, other=null_slot)
    is_used = slots != null_slot
    positions = tl.load(lengths_ptr + slots, mask=is_used, other=0)
    token_ids = tl.load(last_token_ptr + slots, mask=is_used, other=0)
    block_ptrs = table_ptr + slots.to(tl.int64) * table_stride + positions // BLOCK_SIZE
    block_ids = tl.load(block_ptrs, mask=is_used, other=0)
    pool_slots = tl.where(is_used, block_ids * BLOCK_SIZE + positions % BLOCK_SIZE, -1)
    tl.store(token_ids_ptr + rows, token_ids, mask=is_used)
    tl.store(positions_ptr + rows, positions, mask=mask)
    tl.store(slot_mapping_ptr + rows, pool_slots, mask=mask)
    tl.store(context_lens_ptr + rows, tl.where(is_used, positions + 1, 0), mask=mask)
    tl.store(lengths_ptr + slots, positions + 1, mask=is_used)


@triton.jit(
    do_not_specialize=["null_slot"], do_not_specialize_on_alignment=["chunks_ptr", "positions_ptr", "slot_mapping_ptr"]
)
def _prefill_inputs_kernel(
    chunks_ptr: tl.tensor,
    table_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    table_stride: int,
    null_slot: int,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Program (e, b) writes rows [b * BLOCK, (b + 1) * BLOCK) of chunk e."""
    wait_for_previous(USE_PDL)
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    slot = tl.load(chunk_ptr).to(tl.int64)
    first = tl.load(chunk_ptr + 1)
    count = tl.load(chunk_ptr + 2)
    start = tl.load(chunk_ptr + 3)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    has_slot = mask & (slot != null_slot)
    positions = start + rows
    block_ids = tl.load(table_ptr + slot * table_stride + positions // BLOCK_SIZE, mask=has_slot, other=0)
    slots = tl.where(has_slot, block_ids * BLOCK_SIZE + positions % BLOCK_SIZE, -1)
    tl.store(positions_ptr + first + rows, positions, mask=mask)
    tl.store(slot_mapping_ptr + first + rows, slots, mask=mask)
    is_chunk = (count > 0) & (slot != null_slot) & (tl.program_id(1) == 0)
    tl.store(lengths_ptr + slot, start + count, mask=is_chunk)


@triton.jit(do_not_specialize=["first_row", "num_source_rows"], do_not_specialize_on_alignment=["rows_ptr"])
def _gather_rows_kernel(
    source_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    source_stride: int,
    out_stride: int,
    first_row: int,
    num_source_rows: int,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    wait_for_previous(USE_PDL)
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < DIM
    row = tl.load(rows_ptr + index).to(tl.int64) - first_row
    is_there = (row >= 0) & (row < num_source_rows)
    values = tl.load(source_ptr + row * source_stride + columns, mask=mask & is_there, other=0)
    tl.store(out_ptr + index * out_stride + columns, values, mask=mask)

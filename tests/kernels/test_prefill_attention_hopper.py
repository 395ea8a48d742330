"""The Hopper kernel's work and protocol, with its warpgroups as threads; tests/gpu/test_attention.py runs it itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semipd.kernels import prefill_attention_hopper as hopper
from semipd.kernels.prefill_attention import prefill_tiles
from semipd.kernels.triton_util import is_interpreted
from tests.kernels.contexts import Contexts, Heads
from tests.kernels.warpgroups import launch_warpgroups

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="threads want tensors of the CPU")

SCALE = 0.3
BLOCK_M = 2 * hopper.HALF_M.value
# By (length, rows of the chunk): a whole prompt, a later chunk whose ends are ragged, one row, a whole tile.
SIZES = ((201, 201), (460, 77), (65, 1), (128, 128))


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "launch", launch_warpgroups(hopper))


def run(contexts: Contexts, num_sms: int, num_unused: int = 2) -> tuple[Tensor, Tensor]:
    contexts.generator.manual_seed(1)
    q, out = contexts.queries(num_padding=2)
    chunks, row = [], 0
    for slot, (length, num_rows) in zip(contexts.slots, contexts.sizes, strict=True):
        chunks.append((slot, row, num_rows, length - num_rows))
        row += num_rows
    tiles = prefill_tiles(chunks, BLOCK_M) + [(0, 0, 0, 0)] * num_unused
    hopper.prefill_attention_hopper(
        q,
        contexts.kv_R2KH,
        contexts.block_table_XN,
        torch.tensor(tiles, dtype=torch.int32),
        out,
        block_size=contexts.heads.block_size,
        scale=SCALE,
        num_sms=num_sms,
    )
    return q, out


@pytest.mark.parametrize("block_size", [64, 128, 192])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_odd_chunks_in_a_pool_of_nan(head_dim: int, dtype: torch.dtype, block_size: int) -> None:
    heads = Heads(num_heads=2, num_kv_heads=1, head_dim=head_dim, block_size=block_size, dtype=dtype)
    contexts = Contexts(heads, SIZES, None)
    contexts.check(*run(contexts, 3), SCALE)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (6, 2)])
def test_head_shapes(num_heads: int, num_kv_heads: int) -> None:
    heads = Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=64, dtype=torch.float16)
    contexts = Contexts(heads, ((130, 9), (63, 63)), None)
    contexts.check(*run(contexts, 2), SCALE)


def test_any_number_of_programs_gives_the_same_bits() -> None:
    """Some of which, of 100, find no work; none is for tiles of no rows only."""
    contexts = Contexts(Heads(num_heads=2, num_kv_heads=1, block_size=64, dtype=torch.bfloat16), SIZES, None)
    outputs = [run(contexts, num_sms)[1].nan_to_num(7.0) for num_sms in (1, 2, 5, 100)]
    assert all(torch.equal(out, outputs[0]) for out in outputs[1:])


def test_nothing_to_do() -> None:
    contexts = Contexts(Heads(num_heads=1, num_kv_heads=1, block_size=64, dtype=torch.float16), ((1, 0),), None)
    _, out = run(contexts, 3)
    assert out.isnan().all()

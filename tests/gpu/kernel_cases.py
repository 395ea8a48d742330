"""A few launches of every kernel, on tensors that end where the kernel's work ends: what a memory checker watches.

Odd sizes, strided rows, padding, scratch that nobody wrote, and the NaN and the wild block ids of `tests/kernels`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import semipd.kernels
from semipd.kernels.decode_attention import decode_attention
from semipd.kernels.decode_gemm import DecodeGemmConfig, DecodeGemmScratch, DecodeLinear
from semipd.kernels.decode_splits import DecodeScratch, decode_config, max_decode_items, plan_decode_splits
from semipd.kernels.penalties import apply_penalties
from semipd.kernels.prefill_attention import max_prefill_tiles, prefill_attention, prefill_config, prefill_tiles
from semipd.kernels.rms_norm import rms_norm
from semipd.kernels.rotary import rotary_write_kv
from semipd.kernels.sampling import SamplingScratch, sample
from semipd.kernels.silu_mul import silu_mul
from semipd.kernels.step_inputs import apply_block_updates, decode_inputs, gather_rows, prefill_inputs
from semipd.kernels.stream_k_gemm import StreamKConfig, StreamKScratch, stream_k_gemm
from semipd.kernels.triton_util import has_tma, is_hopper, is_interpreted
from tests.gpu.rank_kernel_cases import rank_cases
from tests.kernels.contexts import DEVICE, Contexts, Heads
from tests.kernels.test_sampling import Params, Tables, random_logits

BF16, FP32 = torch.bfloat16, torch.float32
HAS_TMA = is_interpreted() or has_tma()


def all_cases() -> list[Callable[[], None]]:
    """Each may be launched again and again."""
    return [
        *(partial(launch_gemm, gemm) for gemm in GEMMS if HAS_TMA or not gemm.needs_tma),
        *(partial(launch_stream_k_gemm, adds=adds) for adds in (False, True) if is_hopper()),
        *(partial(launch_decode_attention, *case) for case in DECODES),
        *(partial(launch_prefill_attention, *case) for case in PREFILLS),
        launch_rms_norm,
        launch_rotary,
        launch_silu_mul,
        launch_sampling,
        launch_penalties,
        launch_step_inputs,
        *rank_cases(),
    ]


# Matrices -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A call of a `DecodeLinear`."""

    rows: int
    outputs: int
    inputs: int
    num_sms: int = 5
    dtype: torch.dtype = BF16
    out_dtype: torch.dtype = BF16
    has_bias: bool = False
    is_gated: bool = False
    adds: bool = False
    config: DecodeGemmConfig | None = None

    @property
    def needs_tma(self) -> bool:
        """Whether its own configuration says so."""
        return self.config is not None and self.config.uses_tma


_SPLIT = DecodeGemmConfig(block_m=16, block_n=64, block_k=64, split_k=2, num_stages=2)
GEMMS = (
    Gemm(rows=1, outputs=200, inputs=520, has_bias=True),
    Gemm(rows=16, outputs=66, inputs=72, adds=True),
    Gemm(rows=20, outputs=328, inputs=1032, adds=True, has_bias=True),
    Gemm(rows=50, outputs=328, inputs=264),
    Gemm(rows=50, outputs=328, inputs=520, num_sms=100, out_dtype=FP32),
    Gemm(rows=50, outputs=6152, inputs=264, num_sms=100),
    Gemm(rows=100, outputs=200, inputs=136, num_sms=100, adds=True),  # two launches
    Gemm(rows=7, outputs=664, inputs=136, is_gated=True),
    Gemm(rows=60, outputs=664, inputs=264, num_sms=100, is_gated=True, has_bias=True),
    Gemm(rows=9, outputs=194, inputs=301, has_bias=True),  # rows that are not aligned
    Gemm(rows=70, outputs=194, inputs=301, is_gated=True),
    Gemm(rows=4, outputs=200, inputs=37, dtype=FP32, out_dtype=FP32, adds=True),
    Gemm(rows=7, outputs=192, inputs=264, config=_SPLIT),
    Gemm(rows=7, outputs=192, inputs=264, config=replace(_SPLIT, block_k=128, split_k=3, ctas_per_sm=2)),
    Gemm(rows=60, outputs=192, inputs=264, config=replace(_SPLIT, block_m=64, split_k=1, num_warps=8)),
)


def launch_gemm(gemm: Gemm) -> None:
    weight = randn(gemm.outputs, gemm.inputs, dtype=gemm.dtype)
    bias = randn(gemm.outputs, dtype=gemm.dtype) if gemm.has_bias else None
    linear = DecodeLinear(weight, bias, is_gated=gemm.is_gated)
    x = randn(gemm.rows, gemm.inputs, dtype=gemm.dtype)
    out = randn(gemm.rows, gemm.outputs // (2 if gemm.is_gated else 1), dtype=gemm.out_dtype)
    if gemm.config is None:
        sizes = linear.scratch_size(gemm.rows, gemm.num_sms)
    else:
        sizes = gemm.config.scratch_size(gemm.outputs, gemm.num_sms)
    scratch = DecodeGemmScratch.allocate(*sizes, torch.device(DEVICE))
    linear(x, out, scratch, num_sms=gemm.num_sms, adds=gemm.adds, config=gemm.config)


def launch_stream_k_gemm(*, adds: bool) -> None:
    """Ten units on eight programs, so that some are cut."""
    x, weight = randn(200, 520), randn(1256, 520)
    num_partials, num_flags = StreamKConfig().scratch_size(8)
    partials = torch.full((num_partials,), math.nan, device=DEVICE)
    scratch = StreamKScratch(partials, torch.zeros(num_flags, dtype=torch.int32, device=DEVICE))
    stream_k_gemm(x, weight, randn(200, 1256), scratch, num_sms=8, adds=adds)


# Attention ------------------------------------------------------------------------------------------------------------

# Heads, window, and query rows of a request.
DECODES = (
    (Heads(num_heads=8, head_dim=128, block_size=64, dtype=BF16), None, 1),
    (Heads(num_heads=6, head_dim=64, block_size=16, dtype=BF16), 20, 1),
    (Heads(num_heads=14, head_dim=64, block_size=8, dtype=BF16), 33, 3),
    (Heads(num_heads=7, num_kv_heads=1, head_dim=96, block_size=1, dtype=BF16), None, 1),
    (Heads(num_heads=4, head_dim=256, block_size=24, dtype=BF16), 50, 1),
    (Heads(num_heads=4, head_dim=64, block_size=16, dtype=FP32), None, 1),
)
# Heads and window.
PREFILLS = (
    (Heads(num_heads=4, head_dim=128, block_size=64, dtype=BF16), None),
    (Heads(num_heads=4, head_dim=64, block_size=128, dtype=BF16), None),
    (Heads(num_heads=4, head_dim=128, block_size=64, dtype=BF16), 50),
    (Heads(num_heads=4, head_dim=64, block_size=128, dtype=BF16), 70),
    (Heads(num_heads=6, head_dim=64, block_size=16, dtype=BF16), 20),
    (Heads(num_heads=7, num_kv_heads=1, head_dim=96, block_size=1, dtype=BF16), None),
    (Heads(num_heads=2, head_dim=256, block_size=32, dtype=BF16), None),
    (Heads(num_heads=4, head_dim=64, block_size=16, dtype=FP32), None),
)


def launch_decode_attention(heads: Heads, window: int | None, q_len: int) -> None:
    contexts = Contexts(heads, [(length, q_len) for length in (137, 3, 16, 65)], window)
    q, out = contexts.queries(num_padding=2 * q_len)
    num_rows = q_len * heads.num_heads // heads.num_kv_heads
    config = decode_config(heads.head_dim, heads.dtype, num_rows=num_rows, has_tma=HAS_TMA)
    config = replace(config, split_tokens=config.block_n)  # contexts of a few tiles make several splits
    slots = int32([*contexts.slots, *[contexts.block_table_XN.shape[0] - 1] * 2])
    lengths = int32([*(length for length, _ in contexts.sizes), 0, 0])
    max_items = max_decode_items(len(slots), 137, config)
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim, q_len)
    scratch = DecodeScratch.create(len(slots), max_items, *shape, device=DEVICE)
    items = torch.zeros(1 + max_items, 8, dtype=torch.int32, device=DEVICE)
    plan_decode_splits(slots, lengths, items, scratch, config=config, q_len=q_len, window=window)
    decode_attention(
        q,
        contexts.kv_R2KH,
        contexts.block_table_XN,
        items,
        scratch,
        out,
        block_size=heads.block_size,
        scale=0.3,
        config=config,
        num_sms=3,
        q_len=q_len,
        window=window,
    )


def launch_prefill_attention(heads: Heads, window: int | None) -> None:
    contexts = Contexts(heads, ((201, 201), (170, 77), (65, 1), (33, 33)), window)
    q, out = contexts.queries(num_padding=3)
    hopper = {"is_hopper": True} if not is_interpreted() and is_hopper() else {}
    config = prefill_config(heads.head_dim, heads.block_size, heads.dtype, has_tma=HAS_TMA, **hopper)
    chunks, row = [], 0
    for slot, (length, num_rows) in zip(contexts.slots, contexts.sizes, strict=True):
        chunks.append((slot, row, num_rows, length - num_rows))
        row += num_rows
    tiles = prefill_tiles(chunks, config.block_m)
    unused = max_prefill_tiles(row, len(chunks), config.block_m) - len(tiles)
    prefill_attention(
        q,
        contexts.kv_R2KH,
        contexts.block_table_XN,
        int32([*tiles, *[(0, 0, 0, 0)] * unused]),
        out,
        block_size=heads.block_size,
        scale=0.3,
        config=config,
        num_sms=3,
        window=window,
    )


# Rows -----------------------------------------------------------------------------------------------------------------


def launch_rms_norm() -> None:
    for num_rows, dim in ((3, 1000), (2, 9001)):
        x = randn(num_rows, dim + 3)[:, 1:-2]
        rms_norm(x, randn(dim), 1e-5, randn(num_rows, dim))
        rms_norm(x, randn(dim), 1e-5, randn(num_rows, dim), randn(num_rows, dim))


def launch_rotary() -> None:
    for num_heads, num_kv_heads, head_dim, has_norm in ((8, 2, 96, False), (7, 1, 128, True), (9, 3, 64, False)):
        norm = randn(head_dim) if has_norm else None
        rotary_write_kv(
            randn(4, num_heads + 2 * num_kv_heads, head_dim),
            int32([0, 17, 131_071, 0]),
            torch.rand(head_dim // 2, device=DEVICE),
            randn(9, 2 * num_kv_heads, head_dim),
            int32([8, 0, 3, -1]),
            norm,
            norm,
            1e-5,
        )


def launch_silu_mul() -> None:
    silu_mul(randn(3, 2 * 2050), randn(3, 2050))


def launch_step_inputs() -> None:
    table = int32([[3, 7, 1], [0, 2, 5], [10**9] * 3])  # of two requests and the null slot
    lengths = int32([17, 5, 0])
    apply_block_updates(int32([(0, 2, 4), (1, 1, 6), (9, 9, 9)]), int32([2]), table)
    rows = [torch.empty(3, dtype=torch.int32, device=DEVICE) for _ in range(4)]
    decode_inputs(int32([1, 2, 0]), lengths, int32([11, 12, 0]), table, 8, *rows)
    positions, slots = (torch.empty(23, dtype=torch.int32, device=DEVICE) for _ in range(2))
    prefill_inputs(
        int32([(1, 0, 6, 7), (0, 6, 13, 2), (2, 19, 4, 0), (0, 0, 0, 0)]), table, lengths, 8, positions, slots
    )
    for dim in (100, 5000):
        gather_rows(randn(9, dim), int32([3, -1, 8]), randn(3, dim))


# Sampling -------------------------------------------------------------------------------------------------------------


def launch_sampling() -> None:
    rows = [
        Params(temperature=0),
        Params(),
        Params(top_p=0.7, num_outputs=3),
        Params(top_k=50, top_p=0.95),
        Params(temperature=3.0, top_k=1500, top_p=0.9),
        Params(min_p=0.05),
    ]
    tables = Tables.of(rows)
    null_slot = len(tables.last_token_P) - 1
    slots = int32([*(2 * index + 1 for index in range(len(rows))), null_slot])
    for vocab_size, tile_blocks in ((2077, 4), (2077, 64)):  # lists of blocks that are read tile by tile, and in one
        logits = random_logits(len(slots), vocab_size).to(DEVICE)
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=DEVICE)
        scratch = SamplingScratch.make(len(slots), vocab_size, DEVICE, tile_blocks=tile_blocks)
        sample(logits, slots, tables.params_PF, tables.last_token_P, tables.num_outputs_P, token_ids, scratch)


def launch_penalties() -> None:
    tables = Tables.of([Params(), Params()])
    seen = torch.randint(0, 5, (len(tables.last_token_P), 1003), dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([3, 0, 1], device=DEVICE)
    apply_penalties(randn(3, 1003), slots, tables.params_PF, seen, randn(3, 1003, dtype=FP32))


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# What was launched ----------------------------------------------------------------------------------------------------


def kernel_names() -> list[str]:
    """All kernels of the package but the interpreter's twins, as `module.name`."""
    return sorted(
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in _modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel")
        and not name.startswith("_interpreted")
        and hasattr(value, "fn")
        and value.fn.__module__ == module.__name__
    )


@contextmanager
def counting_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel, by `module.name`."""
    counts: Counter[str] = Counter()
    modules = [module for module in _modules() if hasattr(module, "launch")]
    originals = [module.launch for module in modules]

    def counted(kernel: Any, *args: Any, launch: Callable[..., Any], **options: Any) -> Any:
        counts[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"] += 1
        return launch(kernel, *args, **options)

    try:
        for module, original in zip(modules, originals, strict=True):
            module.launch = partial(counted, launch=original)  # type: ignore[attr-defined]
        yield counts
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.launch = original  # type: ignore[attr-defined]


def _modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(semipd.kernels.__path__)]
    return [importlib.import_module(f"semipd.kernels.{name}") for name in names]

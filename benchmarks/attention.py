"""The attention kernels on a GPU: are they right, and how fast are they in several configurations?

    python -m benchmarks.attention [--sections check-decode check-prefill decode prefill] [--num-sms 48 32]
                                   [--num-heads 32] [--num-kv-heads 8] [--head-dim 128] [--json FILE]

- check-...: |out - reference| / |reference| over steps of odd lengths in a pool of NaN, with the configurations of the
  tables; each step is launched several times and must give the same bits
- decode: TB/s of K and V read once, bfloat16, random lengths around the context; on the device and on partitions of
  --num-sms SMs
- prefill: TFLOP/s of the causal half, one chunk at a position

A measurement is a CUDA graph over several layers, which do not fit into the L2 cache together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import environment, make_parser
from benchmarks.partition import Partition
from semipd.kernels.decode_attention import decode_attention, decode_attention_reference
from semipd.kernels.decode_splits import (
    DecodeConfig,
    DecodeScratch,
    decode_config,
    max_decode_items,
    plan_decode_splits,
)
from semipd.kernels.prefill_attention import (
    PrefillConfig,
    prefill_attention,
    prefill_attention_reference,
    prefill_config,
    prefill_tiles,
)
from semipd.kernels.triton_util import has_tma, is_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DECODE_LENGTHS = (1, 17, 64, 65, 0, 1023, 1500, 4321, 129)
# By position of the first row and number of rows.
PREFILL_CHUNKS = ((0, 1), (0, 300), (77, 129), (1000, 1), (640, 128), (0, 64), (1999, 333))
NUM_REPEATS = 20  # launches of a check
LAYER_BYTES = 2**28  # of all layers of a measurement together at least: five times the L2 cache

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The attention of a model, and its pool."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def __str__(self) -> str:
        shape = f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{shape} block {self.block_size} {str(self.dtype).removeprefix('torch.')}"


class Pool:
    """Contexts in shuffled blocks; what no context has written is NaN. Request slot i has context i."""

    def __init__(self, heads: Heads, lengths: Sequence[int], num_layers: int = 1) -> None:
        size = heads.block_size
        counts = [-(-length // size) for length in lengths]
        block_ids = torch.randperm(sum(counts) + 1, device=DEVICE).int()
        self.table = torch.full((len(lengths) + 1, max(counts) + 1), 2**30, dtype=torch.int32, device=DEVICE)
        shape = (num_layers, len(block_ids) * size, 2 * heads.num_kv_heads, heads.head_dim)
        self.kv = torch.full(shape, math.nan, dtype=heads.dtype, device=DEVICE)
        first = 0
        for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.table[slot, :count] = block_ids[first : first + count]
            positions = torch.arange(length, device=DEVICE)
            slots = self.table[slot, positions // size].long() * size + positions % size
            for kv in self.kv:
                kv[slots] = torch.randn(length, *shape[2:], dtype=heads.dtype, device=DEVICE)
            first += count


class DecodeStep:
    """The inputs of a decode step over contexts of `lengths`, of which some may be 0."""

    def __init__(self, heads: Heads, lengths: Sequence[int], q_len: int = 1, num_layers: int = 1) -> None:
        self.heads, self.q_len = heads, q_len
        self.pool = Pool(heads, lengths, num_layers)
        self.slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.longest = max(lengths)
        self.q, self.out = queries(heads, len(lengths) * q_len)
        self.first_out: Tensor | None = None  # of the first configuration

    def launcher(self, config: DecodeConfig, num_sms: int, window: int | None = None) -> Callable[[int], None]:
        """Plan the step; the result launches the attention of a layer."""
        heads, num_requests = self.heads, len(self.slots)
        max_items = max_decode_items(num_requests, self.longest, config)
        shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim, self.q_len)
        scratch = DecodeScratch.create(num_requests, max_items, *shape, device=DEVICE)
        items = torch.empty(1 + max_items, 8, dtype=torch.int32, device=DEVICE)
        q_len = self.q_len
        plan_decode_splits(self.slots, self.lengths, items, scratch, config=config, q_len=q_len, window=window)

        def launch(layer: int) -> None:
            decode_attention(
                self.q,
                self.pool.kv[layer],
                self.pool.table,
                items,
                scratch,
                self.out,
                block_size=heads.block_size,
                scale=heads.scale,
                config=config,
                num_sms=num_sms,
                q_len=q_len,
                window=window,
            )

        return launch

    def reference(self, window: int | None) -> Tensor:
        out = torch.full(self.q.shape, math.nan, dtype=torch.float32, device=DEVICE)
        decode_attention_reference(
            self.q.float(),
            self.pool.kv[0].float(),
            self.pool.table,
            self.slots,
            self.lengths,
            out,
            block_size=self.heads.block_size,
            scale=self.heads.scale,
            q_len=self.q_len,
            window=window,
        )
        return out


class PrefillStep:
    """The inputs of a prefill step of chunks by (position of the first row, rows)."""

    def __init__(self, heads: Heads, chunks: Sequence[tuple[int, int]], num_layers: int = 1) -> None:
        self.heads = heads
        self.pool = Pool(heads, [start + num_rows for start, num_rows in chunks], num_layers)
        self.chunks, row = [], 1  # row 0 is nobody's
        for slot, (start, num_rows) in enumerate(chunks):
            self.chunks.append((slot, row, num_rows, start))
            row += num_rows
        self.q, self.out = queries(heads, row)
        self.first_out: Tensor | None = None  # of the first configuration

    def _tiles(self, block_m: int) -> Tensor:
        tiles = [*prefill_tiles(self.chunks, block_m), (0, 0, 0, 0)]
        return torch.tensor(tiles, dtype=torch.int32, device=DEVICE)

    def launcher(self, config: PrefillConfig, num_sms: int, window: int | None = None) -> Callable[[int], None]:
        """The result launches the attention of a layer."""
        heads, tiles = self.heads, self._tiles(config.block_m)

        def launch(layer: int) -> None:
            prefill_attention(
                self.q,
                self.pool.kv[layer],
                self.pool.table,
                tiles,
                self.out,
                block_size=heads.block_size,
                scale=heads.scale,
                config=config,
                num_sms=num_sms,
                window=window,
            )

        return launch

    def reference(self, window: int | None) -> Tensor:
        out = torch.full(self.q.shape, math.nan, dtype=torch.float32, device=DEVICE)
        prefill_attention_reference(
            self.q.float(),
            self.pool.kv[0].float(),
            self.pool.table,
            self._tiles(2048),
            out,
            block_size=self.heads.block_size,
            scale=self.heads.scale,
            window=window,
        )
        return out


def queries(heads: Heads, num_rows: int) -> tuple[Tensor, Tensor]:
    """Query heads as they lie in the fused projection, and the outputs' memory."""
    shape = (num_rows, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
    q = torch.randn(shape, dtype=heads.dtype, device=DEVICE)[:, : heads.num_heads]
    return q, torch.zeros(q.shape, dtype=heads.dtype, device=DEVICE)


def error(launch: Callable[[int], None], out: Tensor, expected: Tensor, num_repeats: int = NUM_REPEATS) -> float:
    """The relative error; infinite if a launch differs from the first, or if a row is not written or should not be."""
    outputs = []
    for _ in range(num_repeats):
        out.fill_(math.nan)
        launch(0)
        outputs.append(out.clone())
    is_same = all(torch.equal(other.nan_to_num(7.0), outputs[0].nan_to_num(7.0)) for other in outputs)
    if not is_same or not torch.equal(outputs[0].isnan(), expected.isnan()):
        return math.inf
    difference = (outputs[0].float() - expected).nan_to_num()
    return float(difference.norm() / expected.nan_to_num().norm())


def variants(heads: Heads) -> list[tuple[Heads, int, int | None]]:
    """What is checked: heads, query rows of a decode request, and a window."""
    replace = functools.partial(dataclasses.replace, heads)
    return [
        (heads, 1, None),
        (heads, 4, None),
        (heads, 1, 200),
        *((replace(block_size=size), 1, window) for size, window in ((128, 100), (16, None), (1, 77))),
        *((replace(num_heads=n, num_kv_heads=k), 1, None) for n, k in ((4, 4), (9, 3), (28, 4), (16, 2))),
        (replace(num_heads=14, num_kv_heads=2), 8, 500),
        *((replace(num_heads=8, num_kv_heads=2, head_dim=dim), 1, None) for dim in (64, 96, 256)),
        (replace(dtype=torch.float16), 1, None),
        *((replace(num_heads=8, num_kv_heads=2, head_dim=dim, dtype=torch.float32), 2, 300) for dim in (128, 256)),
    ]


def decode_error(heads: Heads, q_len: int, window: int | None, num_sms: int) -> float:
    # A context has its query rows; 0 is padding.
    step = DecodeStep(heads, [length and max(length, q_len) for length in DECODE_LENGTHS], q_len)
    num_rows = q_len * heads.num_heads // heads.num_kv_heads
    config = decode_config(heads.head_dim, heads.dtype, num_rows=num_rows, has_tma=has_tma())
    launch = step.launcher(config, num_sms, window)
    return error(launch, step.out, step.reference(window))


def prefill_error(heads: Heads, config: PrefillConfig, window: int | None, num_sms: int) -> float:
    step = PrefillStep(heads, PREFILL_CHUNKS)
    return error(step.launcher(config, num_sms, window), step.out, step.reference(window), num_repeats=3)


def table_config(heads: Heads) -> PrefillConfig:
    """What the engine takes on this GPU."""
    return prefill_config(heads.head_dim, heads.block_size, heads.dtype, has_tma=has_tma(), is_hopper=is_hopper())


def check_decode(heads: Heads, num_sms: int) -> list[Row]:
    rows = []
    for variant, q_len, window in variants(heads):
        measure = functools.partial(decode_error, variant, q_len, window, num_sms)
        rows.append(checked(f"decode q_len {q_len}", variant, window, measure))
    return rows


def check_prefill(heads: Heads, num_sms: int) -> list[Row]:
    rows = []
    for variant, _, window in variants(heads):
        table = table_config(variant)
        pointers = prefill_config(variant.head_dim, variant.block_size, variant.dtype, has_tma=False)
        # Of equal ones the last name stays.
        configs = {pointers: "pointers", dataclasses.replace(table, use_hopper_kernel=False): "Triton", table: "table"}
        for config, name in configs.items():
            measure = functools.partial(prefill_error, variant, config, window, num_sms)
            rows.append(checked(f"prefill {name}", variant, window, measure))
    return rows


def checked(name: str, heads: Heads, window: int | None, measure: Callable[[], float]) -> Row:
    value, problem = attempt(measure)
    is_right = value is not None and value <= TOLERANCE[heads.dtype]
    row = {"check": f"{name} window {window}", "heads": str(heads), "error": value, "is_right": is_right}
    return row | {"problem": problem}


def attempt(measure: Callable[[], float]) -> tuple[float | None, str]:
    """The value, or the first line of what went wrong."""
    try:
        return measure(), ""
    except Exception as problem:  # of any kind: a configuration that does not compile or fit is a result
        return None, f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"


def decode_configs(heads: Heads) -> list[DecodeConfig]:
    """The table's, then others by (block_n, num_stages, num_warps, ctas_per_sm, split_tokens), likely ones first."""
    shapes = [(64, 3, 4, 3, 512), (64, 3, 4, 3, 256), (64, 4, 4, 2, 512), (64, 4, 4, 2, 256), (64, 2, 4, 4, 512)]
    shapes += [(64, 2, 4, 4, 256), (64, 3, 4, 3, 1024), (64, 4, 4, 2, 1024), (64, 3, 4, 3, 128), (32, 3, 2, 6, 256)]
    shapes += [(32, 4, 2, 4, 256), (64, 3, 2, 3, 256), (64, 3, 2, 3, 512), (128, 2, 4, 3, 512), (128, 2, 8, 2, 512)]
    configs = [
        DecodeConfig(block_n=n, num_stages=stages, num_warps=warps, ctas_per_sm=ctas, split_tokens=split)
        for n, stages, warps, ctas, split in shapes
    ]
    default = decode_config(heads.head_dim, heads.dtype, has_tma=has_tma())
    return [default, *(config for config in configs if config != default)]


def sweep_decode(heads: Heads, whole: Partition, parts: Sequence[Partition]) -> list[Row]:
    rows = []
    for num_requests, context, partitions in (
        (64, 1024, (whole, *parts)),
        (1, 1024, (whole,)),
        (64, 4096, (whole, *parts[-1:])),
        (1, 4096, (whole,)),
    ):
        spread = context // 4 if num_requests > 1 else 0
        lengths = torch.randint(context - spread, context + spread + 1, (num_requests,)).tolist()
        layer_bytes = sum(lengths) * 2 * heads.num_kv_heads * heads.head_dim * heads.dtype.itemsize
        step = DecodeStep(heads, lengths, num_layers=max(2, min(64, LAYER_BYTES // layer_bytes)))
        for config, partition in itertools.product(decode_configs(heads), partitions):
            name = f"{config.block_n} st{config.num_stages} w{config.num_warps} c{config.ctas_per_sm}"
            name += f" s{config.split_tokens}"
            case = f"{num_requests}x{context}" + f" {partition.num_sms} SMs" * (partition is not whole)
            launcher = functools.partial(step.launcher, config, partition.num_sms)
            rows.append({"config": name, "case": case} | timed(launcher, step, layer_bytes, partition))
    return rows


def prefill_configs(heads: Heads) -> list[tuple[int, PrefillConfig]]:
    """With their block size: the table's, its Triton twin, others by (block size, block_m, block_n, warps, stages)."""
    with_tma = [(64, 128, 64, 8, 3), (64, 64, 64, 4, 3), (128, 128, 128, 8, 3)]
    with_pointers = [(64, 128, 64, 8, 3), (16, 128, 64, 8, 3)]
    shapes = [(shape, True) for shape in with_tma if has_tma()] + [(shape, False) for shape in with_pointers]
    table = table_config(dataclasses.replace(heads, block_size=64))
    configs = [(64, config) for config in dict.fromkeys((table, dataclasses.replace(table, use_hopper_kernel=False)))]
    for (size, m, n, warps, stages), use_tma in shapes:
        config = PrefillConfig(block_m=m, block_n=n, num_warps=warps, num_stages=stages, use_tma=use_tma)
        configs.append((size, config))
    return configs


def sweep_prefill(heads: Heads, whole: Partition) -> list[Row]:
    rows = []
    for start, num_rows in ((0, 8192), (0, 2048), (0, 512), (6144, 2048)):
        flops = 4 * heads.num_heads * heads.head_dim * (num_rows * start + num_rows * (num_rows + 1) // 2)
        configs = prefill_configs(heads)
        steps = {
            size: PrefillStep(dataclasses.replace(heads, block_size=size), [(start, num_rows)], num_layers=8)
            for size in {size for size, _ in configs}
        }
        for size, config in configs:
            name = f"b{size} {config.block_m}x{config.block_n} st{config.num_stages} w{config.num_warps}"
            name += " TMA" if config.use_tma else " pointers"
            if config.use_hopper_kernel:
                name = f"b{size} Hopper kernel"
            launcher = functools.partial(steps[size].launcher, config, whole.num_sms)
            case = f"{num_rows} at {start}"
            rows.append({"config": name, "case": case} | timed(launcher, steps[size], flops, whole))
    return rows


def timed(
    launcher: Callable[[], Callable[[int], None]], step: DecodeStep | PrefillStep, work: float, partition: Partition
) -> Row:
    """Seconds of a launch, and `work` in units of 10^12 a second; or the problem, if the outputs differ also that."""

    def measure() -> float:
        launch, num_layers = launcher(), len(step.pool.kv)
        value = partition.seconds(lambda: [launch(layer) for layer in range(num_layers)]) / num_layers
        out = step.out.float()
        if step.first_out is None:
            step.first_out = out
        difference = float((out - step.first_out).norm() / step.first_out.norm())
        assert difference <= TOLERANCE[step.heads.dtype], f"differs by {difference:.2g}"
        return value

    value, problem = attempt(measure)
    return {"seconds": value, "rate": value and work / value / 1e12, "problem": problem}


def show(title: str, rows: Sequence[Row]) -> None:
    """A line per configuration, the table's first, and a column per case."""
    table = Table("config", *dict.fromkeys(row["case"] for row in rows), title=title)
    for config in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == config]
        table.add_row(
            config, *(row["problem"][:20] or f"{row['rate']:.4g} ({1e6 * row['seconds']:.0f})" for row in mine)
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    parser = make_parser(__doc__, has_model=False)
    sections = ("check-decode", "check-prefill", "decode", "prefill")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--num-sms", type=int, nargs="+", default=(48, 32), help="SMs of partitions, multiples of 8")
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; the kernels' tests run without one")
    torch.manual_seed(0)
    heads = Heads(args.num_heads, args.num_kv_heads, args.head_dim)
    whole, parts = Partition(2**16), [Partition(num_sms) for num_sms in args.num_sms]
    results: dict[str, Any] = environment() | {"heads": str(heads), "num_sms": whole.num_sms}

    measures: dict[str, Callable[[], list[Row]]] = {
        "check-decode": lambda: check_decode(heads, whole.num_sms),
        "check-prefill": lambda: check_prefill(heads, whole.num_sms),
        "decode": lambda: sweep_decode(heads, whole, parts),
        "prefill": lambda: sweep_prefill(heads, whole),
    }
    for section in args.sections:
        results[section] = measures[section]()
        if args.json is not None:  # after each section: a later one may fail
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if "decode" in results:
        show(f"Decode, TB/s (us): tile, stages, warps, CTAs an SM, split; {heads}", results["decode"])
    if "prefill" in results:
        show(f"Prefill, TFLOP/s (us): block size, tile, stages, warps; {heads}", results["prefill"])
    checks = results.get("check-decode", []) + results.get("check-prefill", [])
    wrong = [row for row in checks if not row["is_right"]]
    for row in wrong:
        print(f"WRONG: {row['check']}, {row['heads']}: error {row['error']} {row['problem']}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

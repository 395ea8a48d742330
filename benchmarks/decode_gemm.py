"""The decode GEMM on partitions of one GPU: is it right, and how near does it come to the rate of the memory?

    python -m benchmarks.decode_gemm [--partitions 32 48 132] [--sections check sweep rows head] [--json FILE]

Llama-3-8B in bfloat16, random data. The four matrices of a layer rotate over six layers in a CUDA graph, so that none
is in the L2 cache; a rate is the weights' bytes over the time. Beside it: cuBLAS on the same matrices, without the
activation and the sums that the decode GEMM fuses, and a plain read of 2 GB, which is the roof.

- check: errors against float32 torch, and equal bits on 16 to 132 SMs, beside other rows, in many launches
- sweep: candidates for each matrix at 64 rows; a winner has the slices that are best over all partitions
- rows: 1 to 256 rows
- head: the map to logits
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from benchmarks.common import environment, make_parser
from benchmarks.decode_gemm_check import BF16, FP32, check_races, check_rows, check_values, randn
from benchmarks.partition import Partition
from semipd.kernels.decode_gemm import DecodeGemmConfig as Config
from semipd.kernels.decode_gemm import DecodeGemmScratch, DecodeLinear

NUM_LAYERS = 6
MAX_ROWS = 256
Launch = Callable[[], object]
Winners = dict[tuple[str, int], Config]  # by matrix and number of SMs


@dataclass(frozen=True)
class Matrix:
    """One of a layer's weights."""

    name: str
    num_outputs: int
    num_inputs: int
    is_gated: bool = False
    adds: bool = False


MATRICES = (
    Matrix("qkv", 6144, 4096),
    Matrix("o", 4096, 4096, adds=True),
    Matrix("gate_up", 28672, 4096, is_gated=True),
    Matrix("down", 4096, 14336, adds=True),
)
HEAD = Matrix("lm_head", 128256, 4096)

CANDIDATES = [
    Config(block_m=64, block_n=128, block_k=128, num_stages=4),
    Config(block_m=64, block_n=64, block_k=128, num_stages=6),
    Config(block_m=64, block_n=64, block_k=256, num_stages=3),
    Config(block_m=64, block_n=64, block_k=128, num_stages=3, ctas_per_sm=2),
    Config(block_m=64, block_n=32, block_k=128, num_stages=8),
    Config(block_m=64, block_n=32, block_k=256, num_stages=4),
    Config(block_m=64, block_n=32, block_k=128, num_stages=4, ctas_per_sm=2),
    Config(block_m=64, block_n=128, block_k=128, num_stages=4, split_k=4),
    Config(block_m=64, block_n=64, block_k=128, num_stages=6, split_k=2),
]
GATED_CANDIDATES = [
    Config(block_m=64, block_n=256, num_stages=5),
    Config(block_m=64, block_n=256, block_k=128, num_stages=2),
    Config(block_m=64, block_n=128, block_k=128, num_stages=4),
    Config(block_m=64, block_n=128, block_k=128, num_stages=2, ctas_per_sm=2),
    Config(block_m=64, block_n=64, block_k=128, num_stages=6),
]
ROW_CANDIDATES = {  # beside the winner at 64 rows for fewer than that
    1: [
        Config(block_m=16, block_n=128, block_k=128, num_stages=5, is_swapped=True),
        Config(block_m=16, block_n=64, block_k=128, num_stages=8, is_swapped=True),
        Config(block_m=16, block_n=64, block_k=256, num_stages=5, is_swapped=True),
        Config(block_m=16, block_n=64, block_k=128, num_stages=5, ctas_per_sm=2, is_swapped=True),
        Config(block_m=16, block_n=64, block_k=256, num_stages=5, split_k=2, is_swapped=True),
    ],
    16: [
        Config(block_m=16, block_n=128, block_k=128, num_stages=5, is_swapped=True),
        Config(block_m=16, block_n=64, block_k=256, num_stages=5, is_swapped=True),
    ],
    128: [
        Config(block_m=128, block_n=256, num_stages=4, num_warps=8),
        Config(block_m=128, block_n=128, num_stages=6, num_warps=8),
    ],
    256: [
        Config(block_m=256, block_n=128, num_stages=4, num_warps=8),
        Config(block_m=256, block_n=64, num_stages=5, num_warps=8),
    ],
}


class Product:
    """A matrix in several copies, with inputs and outputs for them."""

    def __init__(self, matrix: Matrix, num_copies: int = NUM_LAYERS, out_dtype: torch.dtype = BF16) -> None:
        self.matrix = matrix
        self.weights = [randn(matrix.num_outputs, matrix.num_inputs) / 64 for _ in range(num_copies)]
        self.linears = [DecodeLinear(weight, is_gated=matrix.is_gated) for weight in self.weights]
        num_columns = matrix.num_outputs // 2 if matrix.is_gated else matrix.num_outputs
        self._x = randn(MAX_ROWS, matrix.num_inputs)
        self._out = torch.zeros(MAX_ROWS, num_columns, dtype=out_dtype, device="cuda")
        self._wide = torch.empty(MAX_ROWS, matrix.num_outputs, dtype=BF16, device="cuda")
        self.num_bytes = sum(weight.nbytes for weight in self.weights)

    def launches(self, partition: Partition, config: Config, num_rows: int = 64) -> list[Launch]:
        """A launch for each copy."""
        sizes = config.scratch_size(self.matrix.num_outputs, partition.num_sms)
        scratch = DecodeGemmScratch.allocate(*sizes, torch.device("cuda"))
        return [partial(self._call, linear, scratch, partition.num_sms, config, num_rows) for linear in self.linears]

    def warm(self, config: Config, num_rows: int = 64) -> None:
        """Compiles, or in `triton.AsyncCompileMode` begins to."""
        scratch = DecodeGemmScratch.allocate(16, 16, torch.device("cuda"))
        self._call(self.linears[0], scratch, 132, config, num_rows)

    def cublas(self, num_rows: int = 64) -> list[Launch]:
        """The same by cuBLAS."""
        x, out = self._x[:num_rows], self._wide[:num_rows]
        return [partial(torch.mm, x, weight.t(), out=out) for weight in self.weights]

    def _call(
        self,
        linear: DecodeLinear,
        scratch: DecodeGemmScratch,
        num_sms: int,
        config: Config,
        num_rows: int,
    ) -> None:
        x, out = self._x[:num_rows], self._out[:num_rows]
        linear(x, out, scratch, num_sms=num_sms, config=config, adds=self.matrix.adds)


def rate(products: Sequence[Product], partition: Partition, launches: Sequence[Sequence[Launch]]) -> float:
    """TB/s of products whose launches take turns: those of the first layer, those of the second, and so on."""

    def run() -> None:
        for launch in itertools.chain(*zip(*launches, strict=True)):
            launch()

    return sum(product.num_bytes for product in products) / partition.seconds(run) / 1e12


def text(config: Config) -> str:
    """A configuration in few characters."""
    words = [f"{config.block_m}x{config.block_n}x{config.block_k} st{config.num_stages} w{config.num_warps}"]
    words += [f"S{config.split_k}"] if config.split_k > 1 else []
    words += [f"{config.ctas_per_sm}/SM"] if config.ctas_per_sm > 1 else []
    return " ".join(words + (["swapped"] if config.is_swapped else []))


def try_rate(product: Product, partition: Partition, config: Config, num_rows: int = 64) -> float | None:
    """TB/s of one product, or None, and a line, if it does not compile or fit."""
    try:
        return rate([product], partition, [product.launches(partition, config, num_rows)])
    except Exception as error:
        lines = str(error).splitlines() or [repr(error)]
        print(f"{product.matrix.name} {num_rows} rows {text(config)}: {lines[0][:120]}", flush=True)
        return None


def warm_all(calls: Iterable[Launch]) -> None:
    """Compile on all cores; an error comes again with the launch."""
    with ThreadPoolExecutor(os.cpu_count()) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        for call in calls:
            call()


@triton.jit
def _read_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, size: int, BLOCK: tl.constexpr, NUM_CTAS: tl.constexpr) -> None:
    pid = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(pid * BLOCK, size, NUM_CTAS * BLOCK, num_stages=4):
        acc += tl.load(x_ptr + start + tl.arange(0, BLOCK), eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + pid, tl.sum(acc))


def roof(partition: Partition) -> float:
    """TB/s of a plain read of 2 GB."""
    x, out = randn(1 << 28).repeat(4), torch.empty(1024, device="cuda")
    num_ctas = 2 * partition.num_sms
    rates = []
    for block, num_warps in ((4096, 8), (8192, 8), (8192, 16)):
        options = {"BLOCK": block, "NUM_CTAS": num_ctas, "num_warps": num_warps}
        seconds = partition.seconds(partial(_read_kernel[(num_ctas,)], x, out, len(x), **options), num_replays=2)
        rates.append(x.nbytes / seconds / 1e12)
    return max(rates)


def sweep(products: Sequence[Product], partitions: Sequence[Partition]) -> tuple[list[dict[str, Any]], Winners]:
    """A row for each matrix and candidate, and the best on each partition with as many slices on all."""
    candidates = {product: GATED_CANDIDATES if product.matrix.is_gated else CANDIDATES for product in products}
    warm_all(partial(product.warm, config) for product in products for config in candidates[product])
    rows: list[dict[str, Any]] = []
    winners: Winners = {}
    for product in products:
        name = product.matrix.name
        rates: dict[Config, dict[int, float]] = {}
        for config in candidates[product]:
            measured = {partition.num_sms: try_rate(product, partition, config) for partition in partitions}
            if None not in measured.values():
                rates[config] = {num_sms: value for num_sms, value in measured.items() if value is not None}
        library = {f"{p.num_sms} SMs": f"{rate([product], p, [product.cublas()]):.2f}" for p in partitions}
        rows.append({"matrix": name, "config": "cuBLAS", **library})
        totals: dict[int, float] = {}  # the time of each number of slices, over all partitions
        for split_k in {config.split_k for config in rates}:
            own = [values for config, values in rates.items() if config.split_k == split_k]
            totals[split_k] = sum(1 / max(values[p.num_sms] for values in own) for p in partitions)
        split_k = min(totals, key=totals.__getitem__)
        for num_sms in (partition.num_sms for partition in partitions):
            own_rates = {config: values[num_sms] for config, values in rates.items() if config.split_k == split_k}
            winners[name, num_sms] = max(own_rates, key=own_rates.__getitem__)
        for config, values in rates.items():
            marked = {f"{n} SMs": f"{v:.2f}{'*' * (winners[name, n] == config)}" for n, v in values.items()}
            rows.append({"matrix": name, "config": text(config), **marked})
    return rows, winners


def measure_layers(
    products: Sequence[Product], partitions: Sequence[Partition], winners: Winners
) -> list[dict[str, Any]]:
    """The four matrices at 64 rows: roof, cuBLAS, the winners, and these with other lengths drawn early."""
    plans = {}
    for partition, prefetch in itertools.product(partitions, (0, 256, 1024)):
        for product in products:
            winner = winners[product.matrix.name, partition.num_sms]
            plans[partition, prefetch, product] = replace(winner, prefetch=prefetch)
    warm_all(partial(product.warm, config) for (_, _, product), config in plans.items())
    rows = []
    for partition in partitions:
        row: dict[str, Any] = {"SMs": partition.num_sms, "roof": roof(partition)}
        row["cuBLAS"] = rate(products, partition, [product.cublas() for product in products])
        own = {product: winners[product.matrix.name, partition.num_sms] for product in products}
        launches = [product.launches(partition, config) for product, config in own.items()]
        row["decode GEMM"] = rate(products, partition, launches)
        for prefetch in (0, 256, 1024):
            launches = [product.launches(partition, plans[partition, prefetch, product]) for product in products]
            row[f"prefetch {prefetch}"] = rate(products, partition, launches)
        row |= {product.matrix.name: text(config) for product, config in own.items()}
        rows.append(row)
    return rows


def measure_rows(
    products: Sequence[Product], partitions: Sequence[Partition], winners: Winners
) -> list[dict[str, Any]]:
    """Each number of rows: cuBLAS, the best candidate of each matrix, and these together; `all` has all rates."""
    plans: dict[tuple[int, Partition, Product], list[Config]] = {}
    for (num_rows, configs), partition in itertools.product(ROW_CANDIDATES.items(), partitions):
        for product in products:
            winner = winners[product.matrix.name, partition.num_sms]
            fitting = [config for config in configs if not (config.is_swapped and product.matrix.is_gated)]
            own = [replace(config, split_k=winner.split_k) for config in fitting]
            plans[num_rows, partition, product] = own + ([winner] if num_rows < 64 else [])
    warm_all(
        partial(product.warm, config, num_rows)
        for (num_rows, _, product), configs in plans.items()
        for config in configs
    )
    rows = []
    for num_rows, partition in itertools.product(ROW_CANDIDATES, partitions):
        row: dict[str, Any] = {"rows": num_rows, "SMs": partition.num_sms}
        row["cuBLAS"] = rate(products, partition, [product.cublas(num_rows) for product in products])
        row["decode GEMM"] = None
        launches, all_rates = [], {}
        for product in products:
            own = plans[num_rows, partition, product]
            rates = {config: try_rate(product, partition, config, num_rows) or 0.0 for config in own}
            best = max(rates, key=rates.__getitem__)
            launches.append(product.launches(partition, best, num_rows))
            row[product.matrix.name] = f"{rates[best]:.2f} {text(best)}"
            all_rates[product.matrix.name] = {text(config): value for config, value in rates.items()}
        row["decode GEMM"] = rate(products, partition, launches)
        row["all"] = all_rates
        rows.append(row)
    return rows


def measure_head(partitions: Sequence[Partition]) -> list[dict[str, Any]]:
    """The map to logits at 64 rows."""
    rows = []
    for out_dtype in (BF16, FP32):
        product = Product(HEAD, 1, out_dtype)
        for partition in partitions:
            row: dict[str, Any] = {"logits": str(out_dtype)[6:], "SMs": partition.num_sms}
            row["cuBLAS, bfloat16"] = rate([product], partition, [product.cublas()])
            default = product.linears[0].config(64, partition.num_sms)
            row["default"] = try_rate(product, partition, default)
            row["128 wide"] = try_rate(product, partition, Config(block_m=64, block_n=128, num_stages=6))
            rows.append(row)
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of `rows`; nested values are for the file."""
    names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    table = Table(*names)
    for row in rows:
        values = [row[name] for name in names]
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    console = Console(width=180)
    console.print(title, highlight=False)
    console.print(table)


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--partitions", type=int, nargs="+", default=[32, 48, 132], help="SMs of each")
    sections = ["check", "sweep", "rows", "head"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    partitions = [Partition(num_sms) for num_sms in args.partitions]
    results: dict[str, Any] = environment()

    def report(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        results[name] = rows
        show(f"{name} (after {time.monotonic() - started:.0f} s)", rows)
        if args.json is not None:  # after each section: a later one may fail
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    if "check" in args.sections:
        report("errors, and what is wrong", check_values())
        report("numbers of rows that change the bits of a row", [check_rows()])
        report("launches that differ", [{"SMs": p.num_sms, **check_races(p)} for p in partitions])
    if "sweep" in args.sections or "rows" in args.sections:
        products = [Product(matrix) for matrix in MATRICES]
        rows, winners = sweep(products, partitions)
        report("candidates at 64 rows, TB/s", rows)
        layers = measure_layers(products, partitions, winners)
        if "rows" in args.sections:
            report("the four matrices of a layer at other rows, TB/s", measure_rows(products, partitions, winners))
        report("the four matrices of a layer at 64 rows, TB/s", layers)
        del products
    if "head" in args.sections:
        report("the map to logits at 64 rows, TB/s", measure_head(partitions))


if __name__ == "__main__":
    main()

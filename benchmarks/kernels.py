"""Every kernel of a step beside the roof that is measured in the same run, on the whole GPU and on partitions of it.

    python -m benchmarks.kernels [--sections decode prefill small products] [--decode-sms 32 48 132]
                                 [--prefill-sms 84 100 116 132] [--json FILE]

Llama-3-8B in bfloat16 on random data. A time is that of one launch in a CUDA graph of many, over buffers that are
together five times the L2 cache, median of three runs. Roofs: a plain read of 2 GB, and cuBLAS on matrices of 8,192 by
8,192, each on the same SMs.

- decode: the four matrices of a layer at 1, 16 and 64 rows by the decode GEMM and by cuBLAS, the map to logits,
  attention over 64 contexts; weights, K and V are read once
- prefill: attention of a chunk behind a prefix; the flops of its causal half
- small: kernels that move each tensor once; bytes read and written
- products: the four matrices at 512 and 2,048 rows. cuBLAS believes that it has all SMs, and a grid made for them takes
  a second wave on fewer; beside it cuBLASLt, which is told their number, and the stream-K GEMM. `per SM`: the rate of
  an SM over its rate when all SMs work at the same product
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.attention import DecodeStep, Heads, PrefillStep, attempt, table_config
from benchmarks.common import environment, make_parser
from benchmarks.decode_gemm import HEAD, MATRICES, Matrix, Product
from benchmarks.gpu import device_events, read_bandwidth
from benchmarks.partition import Partition
from benchmarks.sampling import KINDS, sampling_launches
from semipd.kernels.decode_splits import DecodeConfig, decode_config
from semipd.kernels.prefill_attention import PrefillConfig
from semipd.kernels.rms_norm import rms_norm
from semipd.kernels.rotary import rotary_write_kv
from semipd.kernels.silu_mul import silu_mul
from semipd.kernels.stream_k_gemm import StreamKConfig, StreamKScratch, stream_k_gemm
from semipd.kernels.triton_util import compiling_in_parallel, has_tma, is_hopper

ROTATED_BYTES = 2**28  # of a kernel's buffers together at least
MAX_COPIES = 256
DURATION = 0.15  # seconds of a measurement at least
VOCAB, HIDDEN, FEATURES = 128256, 4096, 14336
PRODUCT_ROWS = (512, 2048)
READ, MULTIPLY = "TB/s", "TFLOP/s"

Row = dict[str, Any]
Launch = Callable[[], object]
Launches = Callable[[Partition], Sequence[Launch]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at one size.

    Attributes:
        kernel: its name in the tables.
        size: the same of its size.
        unit: `READ` or `MULTIPLY`, which is also the roof's.
        work: bytes or flops of one time.
        num_sms: of the partitions.
        launches: all launches of a graph on a partition.
        num_launches: so many of them are one time.
    """

    kernel: str
    size: str
    unit: str = READ
    work: float
    num_sms: Sequence[int]
    launches: Launches
    num_launches: int = 1


# ---- the kernels


def decode_cases(decode_sms: Sequence[int], prefill_sms: Sequence[int]) -> Iterator[Case]:
    products = [Product(matrix) for matrix in MATRICES]
    for num_rows in (1, 16, 64):
        yield weights_case("decode GEMM", products, num_rows, decode_sms, decode_gemm)
        yield weights_case("cuBLAS", products, num_rows, decode_sms, cublas)
    yield weights_case("decode GEMM, logits", [Product(HEAD, 1, torch.float32)], 64, decode_sms, decode_gemm)
    heads = Heads()
    config = decode_config(heads.head_dim, heads.dtype, has_tma=has_tma())
    for context in (1024, 4096):
        lengths = torch.randint(context * 3 // 4, context * 5 // 4 + 1, (64,)).tolist()
        work = sum(lengths) * 2.0 * heads.num_kv_heads * heads.head_dim * heads.dtype.itemsize
        launches = partial(decode_attention, DecodeStep(heads, lengths, num_layers=num_copies(work)), config)
        size = f"64 x {context:,}"
        yield Case(kernel="decode attention", size=size, work=work, num_sms=decode_sms, launches=launches)


def weights_case(
    kernel: str,
    products: Sequence[Product],
    num_rows: int,
    num_sms: Sequence[int],
    launches_of: Callable[[int, Product, Partition], Sequence[Launch]],
) -> Case:
    """All of these products one after the other, in several layers."""

    def launches(partition: Partition) -> list[Launch]:
        layers = zip(*(launches_of(num_rows, product, partition) for product in products), strict=True)
        return [launch for layer in layers for launch in layer]

    work = sum(product.num_bytes / len(product.weights) for product in products)
    size = f"{num_rows} rows"
    return Case(kernel=kernel, size=size, work=work, num_sms=num_sms, launches=launches, num_launches=len(products))


def decode_gemm(num_rows: int, product: Product, partition: Partition) -> Sequence[Launch]:
    return product.launches(partition, product.linears[0].config(num_rows, partition.num_sms), num_rows)


def cublas(num_rows: int, product: Product, partition: Partition) -> Sequence[Launch]:
    return product.cublas(num_rows)


def decode_attention(step: DecodeStep, config: DecodeConfig, partition: Partition) -> list[Launch]:
    launch = step.launcher(config, partition.num_sms)
    return [partial(launch, layer) for layer in range(len(step.pool.kv))]


def prefill_cases(decode_sms: Sequence[int], prefill_sms: Sequence[int]) -> Iterator[Case]:
    heads = Heads()
    config = table_config(heads)
    for start, num_rows in ((0, 2048), (0, 8192), (6144, 2048)):
        work = 4.0 * heads.num_heads * heads.head_dim * (num_rows * start + num_rows * (num_rows + 1) // 2)
        launches = partial(prefill_attention, PrefillStep(heads, [(start, num_rows)], num_layers=8), config)
        size = f"{num_rows:,} behind {start:,}"
        yield Case(
            kernel="prefill attention", size=size, unit=MULTIPLY, work=work, num_sms=prefill_sms, launches=launches
        )


def prefill_attention(step: PrefillStep, config: PrefillConfig, partition: Partition) -> list[Launch]:
    launch = step.launcher(config, partition.num_sms)
    return [partial(launch, layer) for layer in range(len(step.pool.kv))]


def small_cases(decode_sms: Sequence[int], prefill_sms: Sequence[int]) -> Iterator[Case]:
    heads = Heads()
    num_values = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    for num_rows, num_sms in (64, decode_sms), (2048, prefill_sms):
        yield small_case("rms_norm", norms, num_rows, 2 * HIDDEN, num_sms)
        yield small_case("rotary, KV write", partial(rotations, heads), num_rows, 2 * num_values, num_sms)
        yield small_case("silu_mul", gates, num_rows, 3 * FEATURES, num_sms)
    for num_rows in (64, 256):
        for name in ("greedy", "top-k + top-p"):
            launches = partial(everywhere, sampling_launches(num_rows, VOCAB, dtype=torch.float32, **KINDS[name]))
            kernel, size, work = f"sampling, {name}", f"{num_rows} rows", 4.0 * num_rows * VOCAB
            yield Case(kernel=kernel, size=size, work=work, num_sms=decode_sms, launches=launches)


def small_case(
    kernel: str, make: Callable[[int, int], list[Launch]], num_rows: int, num_values: int, num_sms: Sequence[int]
) -> Case:
    """A kernel that moves so many values of two bytes for each row; `make` makes launches by rows and copies."""
    work = 2.0 * num_rows * num_values
    launches = partial(everywhere, make(num_rows, num_copies(work)))
    return Case(kernel=kernel, size=f"{num_rows:,} rows", work=work, num_sms=num_sms, launches=launches)


def norms(num_rows: int, count: int) -> list[Launch]:
    weight = randn(HIDDEN)
    return [partial(rms_norm, randn(num_rows, HIDDEN), weight, 1e-5, randn(num_rows, HIDDEN)) for _ in range(count)]


def rotations(heads: Heads, num_rows: int, count: int) -> list[Launch]:
    shape = (num_rows, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
    positions = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    slots = torch.randperm(2 * num_rows, device="cuda")[:num_rows].int()
    inv_freq = 500_000.0 ** -torch.arange(0, 1, 2 / heads.head_dim, device="cuda")
    pools = [randn(2 * num_rows, 2 * heads.num_kv_heads, heads.head_dim) for _ in range(count)]
    return [partial(rotary_write_kv, randn(*shape), positions, inv_freq, kv, slots) for kv in pools]


def gates(num_rows: int, count: int) -> list[Launch]:
    return [partial(silu_mul, randn(num_rows, 2 * FEATURES), randn(num_rows, FEATURES)) for _ in range(count)]


def product_cases(decode_sms: Sequence[int], prefill_sms: Sequence[int]) -> Iterator[Case]:
    for num_rows in PRODUCT_ROWS:
        for matrix in MATRICES:
            x, out = randn(num_rows, matrix.num_inputs), randn(num_rows, matrix.num_outputs)
            weights = [randn(matrix.num_outputs, matrix.num_inputs) / 64 for _ in range(4)]
            products = [partial(multiply, matrix, x, weight, out) for weight in weights]
            ways: dict[str, Launches] = {
                "cuBLAS": partial(everywhere, products),
                "cuBLASLt, told": partial(multiply_told, products),
            }
            if is_hopper():
                ways["stream-K"] = partial(stream_k, matrix, x, weights, out)
            work = 2.0 * num_rows * matrix.num_outputs * matrix.num_inputs
            size = f"{matrix.name}, {num_rows:,} rows"
            for kernel, launches in ways.items():
                yield Case(kernel=kernel, size=size, unit=MULTIPLY, work=work, num_sms=prefill_sms, launches=launches)


def multiply(matrix: Matrix, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """By cuBLAS, as a prefill step on the whole device does: to a matrix, or added to the residual stream."""
    if matrix.adds:
        out.addmm_(x, weight.t())
    else:
        torch.mm(x, weight.t(), out=out)


def stream_k(matrix: Matrix, x: Tensor, weights: Sequence[Tensor], out: Tensor, partition: Partition) -> list[Launch]:
    num_partials, num_flags = StreamKConfig().scratch_size(partition.num_sms)
    flags = torch.zeros(num_flags, dtype=torch.int32, device="cuda")
    scratch = StreamKScratch(torch.empty(num_partials, device="cuda"), flags)
    run_one = partial(stream_k_gemm, num_sms=partition.num_sms, adds=matrix.adds)
    return [partial(run_one, x, weight, out, scratch) for weight in weights]


def multiply_told(products: Sequence[Launch], partition: Partition) -> list[Launch]:
    num_others = torch.cuda.get_device_properties(0).multi_processor_count - partition.num_sms
    return [partial(without_sms, num_others, product) for product in products]


def without_sms(num_sms: int, product: Launch) -> None:
    """`product` by cuBLASLt, which is told to leave so many SMs alone; torch has no public way to say it."""
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(num_sms)
    try:
        product()
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(library)


def everywhere(launches: Sequence[Launch], partition: Partition) -> Sequence[Launch]:
    """The same on any partition."""
    return launches


def num_copies(num_bytes: float) -> int:
    """How many sets of buffers of so many bytes take turns."""
    return min(MAX_COPIES, max(2, math.ceil(ROTATED_BYTES / num_bytes)))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


# ---- measure


def measure_roofs(partition: Partition) -> dict[str, float]:
    """What memory and tensor cores give on these SMs, in 10^12 a second."""
    size = 8192
    x, weight, out = (randn(size, size) for _ in range(3))
    seconds = partition.seconds(partial(torch.mm, x, weight.t(), out=out), num_replays=2, duration=2 * DURATION)
    return {READ: read_bandwidth(partition.stream, partition.num_sms) / 1e12, MULTIPLY: 2 * size**3 / seconds / 1e12}


def run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def measure(cases: Sequence[Case], partitions: Mapping[int, Partition], roofs: Mapping[int, Row]) -> list[Row]:
    """A row for each case and partition."""
    runs = [(case, partitions[num_sms]) for case in cases for num_sms in case.num_sms]
    graphs = [case.launches(partition) for case, partition in runs]
    with suppress(Exception), compiling_in_parallel():  # what goes wrong here does so again below
        for launches in graphs:
            run(launches)
    rows = []
    for (case, partition), launches in zip(runs, graphs, strict=True):
        row: Row = {"kernel": case.kernel, "size": case.size, "num_sms": partition.num_sms, "unit": case.unit}
        seconds, problem = attempt(partial(partition.seconds, partial(run, launches), num_replays=2, duration=DURATION))
        if seconds is not None:
            seconds *= case.num_launches / len(launches)
            rate, roof = case.work / seconds / 1e12, roofs[partition.num_sms][case.unit]
            row |= {"us": 1e6 * seconds, "rate": rate, "roof": roof, "share_of_roof": rate / roof}
        rows.append(row | {"problem": problem})
    return rows


def layer_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows for the four products of a layer together."""
    parts: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if "us" in row:
            parts.setdefault((row["kernel"], row["size"].split(", ")[1], row["num_sms"]), []).append(row)
    for (_, num_rows, _), mine in parts.items():
        if len(mine) == len(MATRICES):
            microseconds = sum(row["us"] for row in mine)
            rate = sum(row["us"] * row["rate"] for row in mine) / microseconds
            layer = {"size": f"layer, {num_rows}", "us": microseconds, "rate": rate}
            yield mine[0] | layer | {"share_of_roof": rate / mine[0]["roof"]}


def add_per_sm(rows: Sequence[Row], whole: int) -> None:
    """Note what an SM does in a partition over what it does when all work at the same product."""
    on_all = {(row["kernel"], row["size"]): row["rate"] for row in rows if row["num_sms"] == whole and "rate" in row}
    for row in rows:
        if "rate" in row and (row["kernel"], row["size"]) in on_all:
            row["per_sm"] = row["rate"] * whole / row["num_sms"] / on_all[row["kernel"], row["size"]]


def find_grids(cases: Sequence[Case], partitions: Mapping[int, Partition]) -> list[Row]:
    """Which function of the library each product is, and of how many CTAs, by the profiler."""
    runs = [(case, partitions[num_sms]) for case in cases for num_sms in case.num_sms]
    launches = [case.launches(partition)[0] for case, partition in runs]
    border = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()  # operands come from another stream

    def run_all() -> None:
        for (_, partition), launch in zip(runs, launches, strict=True):
            with torch.cuda.stream(partition.stream):
                border.fill_(1.0)
                launch()
            torch.cuda.synchronize()

    found: list[list[Mapping[str, Any]]] = []
    for event in device_events(run_all):
        if "FillFunctor" in event["name"]:
            found.append([])
        elif event["cat"] == "kernel":
            found[-1].append(event)
    rows = []
    for (case, partition), events in zip(runs, found, strict=True):
        longest = max(events, key=lambda event: float(event["dur"]))
        grid = {"function": longest["name"], "num_ctas": math.prod(longest["args"]["grid"])}
        rows.append({"kernel": case.kernel, "size": case.size, "num_sms": partition.num_sms, **grid})
    return rows


# ---- show


def show(title: str, rows: Sequence[Row], cell: Callable[[Row], str]) -> None:
    """A line for each kernel and size, and a column for each number of SMs."""
    all_sms = sorted({row["num_sms"] for row in rows})
    table = Table("kernel", "size", *(f"{num_sms} SMs" for num_sms in all_sms), title=title)
    for kernel, size in dict.fromkeys((row["kernel"], row["size"]) for row in rows):
        mine = {row["num_sms"]: row for row in rows if (row["kernel"], row["size"]) == (kernel, size)}
        table.add_row(kernel, size, *(cell(mine[num_sms]) if num_sms in mine else "" for num_sms in all_sms))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def rate_cell(row: Row) -> str:
    return str(row["problem"])[:18] or f"{row['rate']:.3g} {row['share_of_roof']:.0%} {row['us']:.3g}us"


def product_cell(row: Row) -> str:
    per_sm = f" {row['per_sm']:.2f}" if "per_sm" in row else ""
    return str(row["problem"])[:18] or f"{row['rate']:.0f} {row['share_of_roof']:.0%}{per_sm}"


def grid_cell(row: Row) -> str:
    """CTAs, and the tile as the function's name has it."""
    tile = re.search(r"\d+x\d+(_\d+x\d+)*", row["function"])
    return f"{row['num_ctas']} {tile[0] if tile else row['function'][:18]}"


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    sections = {"decode": decode_cases, "prefill": prefill_cases, "small": small_cases, "products": product_cases}
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--decode-sms", type=int, nargs="+", default=[32, 48, 132])
    parser.add_argument("--prefill-sms", type=int, nargs="+", default=[84, 100, 116, 132])
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    partitions = {num_sms: Partition(num_sms) for num_sms in sorted({*args.decode_sms, *args.prefill_sms})}
    roofs = {num_sms: measure_roofs(partition) for num_sms, partition in partitions.items()}
    results: dict[str, Any] = environment() | {"roofs": roofs}

    def report(name: str, title: str, rows: Sequence[Row], cell: Callable[[Row], str]) -> None:
        show(f"{name}: {title} (after {time.monotonic() - started:.0f} s)", rows, cell)
        results[name] = rows
        if args.json is not None:  # after each section: a later one may fail
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for num_sms, roof in roofs.items():
        print(f"{num_sms} SMs: a plain read {roof[READ]:.2f} TB/s, cuBLAS {roof[MULTIPLY]:.0f} TFLOP/s")
    for name in args.sections:
        cases = list(sections[name](args.decode_sms, args.prefill_sms))
        rows = measure(cases, partitions, roofs)
        if name == "products":
            rows += layer_rows(rows)
            add_per_sm(rows, max(partitions))
            report(name, "TFLOP/s, share of the roof, per SM", rows, product_cell)
            report("grids", "CTAs, tile", find_grids(cases, partitions), grid_cell)
        else:
            report(name, f"{rows[0]['unit']}, share of the roof, time", rows, rate_cell)
        del cases
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

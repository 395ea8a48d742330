"""A rank of `benchmarks/overlap.py`: cases come as JSON lines, and rank 0 answers each by one."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - torch's fused product needs its global group
from torch import Tensor

from semipd.config import Phase, Shard
from semipd.device.green_context import GreenContextBackend
from semipd.kernels.gemm_signal import config_for, gemm_signal
from semipd.kernels.ops import StepContext, create_ops
from semipd.parallel.group import LOOPBACK, Communicator, connect, join_store
from semipd.parallel.overlap import Communicators, OverlappedLinear, Release, owned_rows
from semipd.parallel.tuner import Collective, CollectiveCurve, Costs, Plan, Problem, tune, waves

BF16 = torch.bfloat16
NCCL_CTAS = 32  # at most, which is its own choice here
MAX_ERROR = 6e-3
ROUNDS = 5
_CACHED = 200_000_000  # bytes of operands in turn: four times the L2 cache
_CURVE_BYTES = tuple(1 << bits for bits in range(14, 29, 2))

Launch = Callable[[int], object]
"""Launches something on the operands of a number."""


class Sides:
    """A second stream for each."""

    def __init__(self, backend: GreenContextBackend | None, num_sms: int) -> None:
        self._backend, self._num_sms = backend, num_sms
        self._streams: dict[int, torch.cuda.Stream] = {}

    def beside(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        """See `SideStreams`."""
        if stream.cuda_stream not in self._streams:
            side = torch.cuda.Stream(priority=-5)  # type: ignore[no-untyped-call]
            if self._backend is not None:
                side = self._backend.capture_stream(Phase.PREFILL, self._num_sms)
            self._streams[stream.cuda_stream] = side
        return self._streams[stream.cuda_stream]


class Memory:
    """Named memory."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Buffers`."""
        if (name, shape) not in self._tensors:
            self._tensors[name, shape] = torch.zeros(shape, dtype=dtype, device="cuda")
        return self._tensors[name, shape]


class Rank:
    """One GPU, its communicators and its streams."""

    def __init__(
        self, port: int, world_size: int, ctas: int, sms: int, num_plans: int, effort: float, rank: int
    ) -> None:
        self.rank, self.world_size, self.ctas, self.num_plans = rank, world_size, ctas, num_plans
        self.seconds = 0.02 * effort  # of a measurement in each round
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        backend = GreenContextBackend(rank) if sms else None
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if backend is not None:
            self.stream = backend.stream(Phase.PREFILL, sms).torch_stream
        self.num_sms = sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.store = join_store(LOOPBACK, port)
        self._numbers = count()
        shard = Shard(rank=rank, world_size=world_size)
        max_ctas = {Phase.PREFILL: ctas, Phase.DECODE: NCCL_CTAS}
        self.group = connect(
            shard, store=join_store(LOOPBACK, port, prefix="group"), device=self.device, max_ctas=max_ctas
        )
        self.communicators = Communicators(
            self.group.communicator(Phase.PREFILL), self.group.communicator(Phase.DECODE)
        )
        self.sides = Sides(backend, self.num_sms)
        self.release = Release(self.device, limit=3.0)
        self.side = self.sides.beside(self.stream)
        self._curves: dict[tuple[Collective, bool], CollectiveCurve] = {}
        self._tiny = torch.zeros(256, device=self.device)

    def share(self, text: str) -> str:
        """What rank 0 passes."""
        key = f"share/{next(self._numbers)}"
        if self.rank == 0:
            self.store.set(key, text)
        value = self.store.get(key)
        return value.decode() if isinstance(value, bytes) else str(value)

    def context(self) -> StepContext:
        """The whole partition, with memory of its own."""
        return StepContext(self.num_sms, Memory(), Phase.PREFILL)

    def collect(self, collective: Collective, communicator: Communicator, tensor: Tensor, out: Tensor) -> None:
        """On all of `tensor`."""
        if collective is Collective.ALL_REDUCE:
            communicator.all_reduce_(tensor)
        else:
            communicator.reduce_scatter(out, tensor)

    def capture(self, launch: Launch, number: int) -> torch.cuda.CUDAGraph:
        """So many launches."""
        with torch.cuda.stream(self.stream):
            launch(0)
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(number):
                    launch(i)
            finally:
                graph.capture_end()
        return graph

    def time(self, launches: Mapping[str, Launch], number: int) -> dict[str, float]:
        """Median seconds of one launch of each, in turns."""
        graphs = {name: self.capture(launch, number) for name, launch in launches.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        once = {name: self._replay(graph, 2) / 2 for name, graph in graphs.items()}
        repeats = json.loads(
            self.share(json.dumps({name: max(2, math.ceil(self.seconds / value)) for name, value in once.items()}))
        )
        for i in range(ROUNDS):
            for name in list(graphs)[:: 1 if i % 2 == 0 else -1]:
                times[name].append(self._replay(graphs[name], repeats[name]) / repeats[name] / number)
        return {name: statistics.median(values) for name, values in times.items()}

    def _replay(self, graph: torch.cuda.CUDAGraph, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            self.communicators.alone.all_reduce_(self._tiny)  # the ranks begin together
            graph.replay()
            start.record(self.stream)
            for _ in range(repeats):
                graph.replay()
            end.record(self.stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def curve(self, collective: Collective, *, is_alone: bool) -> CollectiveCurve:
        """Measured once."""
        if (collective, is_alone) not in self._curves:
            communicator = self.communicators.alone if is_alone else self.communicators.beside
            points = []
            for size in _CURVE_BYTES:
                tensor = torch.zeros(size // 2, device=self.device, dtype=BF16)
                out = tensor.chunk(self.world_size)[self.rank].clone()

                def launch(i: int, tensor: Tensor = tensor, out: Tensor = out) -> None:
                    self.collect(collective, communicator, tensor, out)

                number = 10 if size < 1 << 25 else 2
                graph = self.capture(launch, number)
                points.append((size, min(self._replay(graph, 3) / 3 / number for _ in range(3))))
            self._curves[collective, is_alone] = CollectiveCurve(tuple(points))
        return self._curves[collective, is_alone]


class Case:
    """One product and collective."""

    def __init__(self, rank: Rank, values: Mapping[str, Any]) -> None:
        self.rank = rank
        self.collective = Collective(values["collective"])
        self.num_rows, self.num_outputs = int(values["rows"]), int(values["outputs"])
        self.num_inputs = int(values["inputs"]) // rank.world_size
        num_bytes = 2 * (self.num_rows * self.num_inputs + self.num_outputs * (self.num_inputs + self.num_rows))
        self.num_sets = max(2, math.ceil(_CACHED / num_bytes))
        torch.manual_seed(rank.rank)
        sets = range(self.num_sets)
        self.xs = [self._randn(self.num_rows, self.num_inputs) for _ in sets]
        self.weights = [self._randn(self.num_outputs, self.num_inputs) * self.num_inputs**-0.5 for _ in sets]
        self.products = [torch.zeros(self.num_rows, self.num_outputs, device="cuda", dtype=BF16) for _ in sets]
        self.outs = self.products
        if self.collective is Collective.REDUCE_SCATTER:
            own = self.num_rows // rank.world_size
            self.outs = [torch.zeros(own, self.num_outputs, device="cuda", dtype=BF16) for _ in sets]
            self.products = self.products[:1] * self.num_sets  # the engine's product is one buffer too
        ops = create_ops("triton")
        self.context = rank.context()
        self.linears = [
            OverlappedLinear(weight, ops=ops, adds=False, sides=rank.sides, release=rank.release)
            for weight in self.weights
        ]
        self.problem = Problem(
            device=torch.cuda.get_device_name(),
            num_rows=self.num_rows,
            num_outputs=self.num_outputs,
            num_inputs=self.num_inputs,
            dtype="bfloat16",
            world_size=rank.world_size,
            num_sms=rank.num_sms,
            collective=self.collective,
            num_ctas=rank.ctas,
        )
        self.counters = torch.zeros(8, dtype=torch.int32, device="cuda")

    def run(self) -> dict[str, Any]:
        """All times and the plan."""
        rank = self.rank
        number = self.num_sets * max(1, 4 // self.num_sets)
        alone = rank.time({"gemm": self.multiply, "signalling_gemm": self.signal}, number)
        wave = alone["signalling_gemm"] / waves(
            self.problem.num_blocks * self.problem.num_columns, self.problem, Plan()
        )
        costs = Costs(wave, rank.curve(self.collective, is_alone=False), rank.curve(self.collective, is_alone=True))
        measured: dict[str, float] = {}

        def measure(plans: Sequence[Plan]) -> list[float]:
            for plan in plans:
                self.check(plan)
            measured.update(rank.time({str(plan): self.ours(plan) for plan in plans}, number))
            return [measured[str(plan)] for plan in plans]

        tuned = tune(self.problem, costs, measure, rank.share, count=rank.num_plans)
        launches = {
            "gemm": self.multiply,
            "nccl": self.communicate,
            "sequence": self.sequence,
            "split2": self.split(2),
            "split4": self.split(4),
            "ours": self.ours(tuned.plan),
        }
        times = rank.time(launches, number)
        self.check(tuned.plan)
        return {
            **times,
            "signalling_gemm": alone["signalling_gemm"] * times["gemm"] / alone["gemm"],
            "plan": str(tuned.plan),
            "predicted": tuned.predicted,
            "wave": wave,
            "tried": measured,
        }

    def run_torch(self) -> dict[str, Any]:
        """Torch's fused product and reduce-scatter, which a graph cannot hold: launched, and the ranks at once."""
        world = dist.group.WORLD
        assert world is not None
        name = world.group_name

        def launch(i: int) -> None:
            torch.ops.symm_mem.fused_matmul_reduce_scatter(
                self.xs[i % self.num_sets], self.weights[i % self.num_sets].t(), "sum", 0, name
            )

        with torch.cuda.stream(self.rank.stream):
            for i in range(3):
                launch(i)
            times = []
            for _ in range(ROUNDS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                self.rank.communicators.alone.all_reduce_(self.rank._tiny)
                launch(0)
                start.record()
                for i in range(10):
                    launch(i)
                end.record()
                end.synchronize()
                times.append(float(start.elapsed_time(end)) * 1e-4)
        return {"torch": statistics.median(times)}

    def multiply(self, i: int) -> None:
        """By cuBLAS."""
        i %= self.num_sets
        torch.mm(self.xs[i], self.weights[i].t(), out=self.products[i])

    def signal(self, i: int) -> None:
        """The signalling GEMM on all SMs, in four groups if it can be."""
        i %= self.num_sets
        config = config_for(self.xs[i], self.weights[i], self.products[i])
        ends = sorted({-(-self.num_rows * j // 4 // 128) * 128 for j in (1, 2, 3)} | {self.num_rows})
        gemm_signal(
            self.xs[i],
            self.weights[i],
            self.products[i],
            self.counters,
            group_ends=ends,
            num_sms=self.rank.num_sms,
            config=config,
        )

    def communicate(self, i: int) -> None:
        """On what is there."""
        i %= self.num_sets
        self.rank.collect(self.collective, self.rank.communicators.alone, self.products[i], self.outs[i])

    def sequence(self, i: int) -> None:
        """CuBLAS, then NCCL."""
        self.multiply(i)
        self.communicate(i)

    def split(self, parts: int) -> Launch:
        """CuBLAS on parts of the rows, and NCCL on another stream behind each."""
        size = self.num_rows // parts
        own = size // self.rank.world_size
        stream, side = self.rank.stream, self.rank.side

        def launch(i: int) -> None:
            i %= self.num_sets
            for j in range(parts):
                rows = slice(j * size, (j + 1) * size)
                torch.mm(self.xs[i][rows], self.weights[i].t(), out=self.products[i][rows])
                side.wait_event(stream.record_event())
                with torch.cuda.stream(side):
                    out = self.outs[i][j * own : (j + 1) * own]
                    self.rank.collect(self.collective, self.rank.communicators.alone, self.products[i][rows], out)
            stream.wait_stream(side)

        return launch

    def ours(self, plan: Plan) -> Launch:
        """By a plan."""

        def launch(i: int) -> None:
            i %= self.num_sets
            linear = self.linears[i]
            run = linear.all_reduce_ if self.collective is Collective.ALL_REDUCE else linear.reduce_scatter
            run(self.outs[i], self.xs[i], self.rank.communicators, plan, self.context)

        return launch

    def check(self, plan: Plan) -> None:
        """Raises unless a plan's result is right, on all ranks alike or on none."""
        rank, alone = self.rank, self.rank.communicators.alone
        launch = self.ours(plan)
        with torch.cuda.stream(rank.stream):
            self.multiply(0)
            expected = self.products[0].clone()
            alone.all_reduce_(expected)
            self.signal(0)
            exact = self.products[0].clone()
            alone.all_reduce_(exact)
            if self.collective is Collective.REDUCE_SCATTER:
                ends = plan.row_ends(self.num_rows) if plan.overlaps else (self.num_rows,)
                rows = [row for part in owned_rows(ends, rank.rank, rank.world_size) for row in part]
                expected, exact = expected[rows], exact[rows]
            self.outs[0].fill_(math.nan)
            launch(0)
            error = float((self.outs[0].float() - expected.float()).norm() / expected.float().norm())
            is_exact = not plan.overlaps or rank.world_size > 2 or torch.equal(self.outs[0], exact)
            verdict = torch.tensor([not (error < MAX_ERROR and is_exact)], device="cuda", dtype=torch.float32)
            alone.all_reduce_(verdict)
            num_wrong = int((self.outs[0] != exact).sum())
        if rank.release.is_set:
            raise RuntimeError(f"{plan}: a wait reached its limit")
        if float(verdict) != 0:
            raise RuntimeError(f"{plan}: error {error:.2g}, {num_wrong} other than exact")

    def _randn(self, num_rows: int, num_columns: int) -> Tensor:
        return torch.randn(num_rows, num_columns, device="cuda", dtype=BF16)


def main() -> None:
    port, world_size, ctas, sms, num_plans, effort, index = sys.argv[1:]
    began = time.perf_counter()
    rank = Rank(int(port), int(world_size), int(ctas), int(sms), int(num_plans), float(effort), int(index))
    if rank.rank == 0:
        print(f"connected after {time.perf_counter() - began:.1f} s", flush=True)
    for line in sys.stdin:
        values = json.loads(line)
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                if values.get("part") == "torch":
                    if not dist.is_initialized():
                        store = join_store(LOOPBACK, int(port), prefix="torch")
                        dist.init_process_group(
                            "nccl",
                            store=store,
                            rank=rank.rank,
                            world_size=rank.world_size,
                            timeout=timedelta(seconds=60),
                            device_id=rank.device,
                        )
                    row = Case(rank, values).run_torch()
                else:
                    row = Case(rank, values).run()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        torch.cuda.empty_cache()
        row["case_seconds"] = time.perf_counter() - began
        if rank.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

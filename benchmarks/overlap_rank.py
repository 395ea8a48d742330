"""A rank of `benchmarks/overlap.py`: cases come as JSON lines, and rank 0 answers each by one."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - torch's fused product needs its global group
from torch import Tensor

from benchmarks.overlap_case import Case
from semipd.config import Phase, Shard
from semipd.device.green_context import GreenContextBackend, PlainStreamBackend
from semipd.kernels.ops import StepContext
from semipd.model.lane_memory import LaneBuffers
from semipd.parallel.communicator import LOOPBACK, Communicator
from semipd.parallel.group import TensorGroup, join_store
from semipd.parallel.overlap import ALONE_CTAS, Release
from semipd.parallel.peer_copies import PeerCopies, connect_copies
from semipd.parallel.plans import Collective
from semipd.parallel.tuner import CollectiveCurve
from semipd.parallel.turns import GraphTurns, Launch, time_in_turns

_CURVE_BYTES = tuple(1 << bits for bits in range(14, 29, 2))
_MAX_ROWS = 16384


class Rank:
    """One GPU, its communicators and its streams.

    Args:
        options: of the benchmark: CTAs of collectives beside a product, SMs, plans to measure, seconds of measuring.
    """

    def __init__(self, port: int, world_size: int, options: Mapping[str, Any], rank: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.ctas: Sequence[int] = options["ctas"]
        self.num_plans: int = options["plans"]
        self.seconds: float = options["measuring"]
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.sides = GreenContextBackend(rank) if options["sms"] else PlainStreamBackend(rank)
        self.num_sms: int = options["sms"] or self.sides.num_sms
        self.stream = self.sides.stream(Phase.PREFILL, self.num_sms).torch_stream
        self.group = TensorGroup(Shard(rank=rank, world_size=world_size), join_store(LOOPBACK, port, prefix="group"))
        self.group.connect(self.device, max_ctas=dict.fromkeys(Phase, ALONE_CTAS), beside_ctas=self.ctas)
        self.alone = self.group.communicator(Phase.PREFILL)
        self.release = Release(self.device, limit=3.0)
        self.side = self.sides.beside(self.stream)
        self._curves: dict[tuple[Collective, int | str], CollectiveCurve] = {}
        self._copies: dict[int, PeerCopies | None] = {}
        tiny = torch.zeros(256, device=self.device)
        self.turns = GraphTurns(self.stream, lambda: self.alone.all_reduce_(tiny))
        self.share = self.group.share

    def context(self) -> StepContext:
        """The whole partition, with memory of its own."""
        return StepContext(self.num_sms, LaneBuffers(self.device), Phase.PREFILL)

    def copies(self, dim: int) -> PeerCopies | None:
        """Copies between two ranks that share memory, of rows of this length."""
        if dim not in self._copies:
            self._copies[dim] = connect_copies(
                self.group.shard,
                self.group.exchange,
                self.device,
                self.release.flag,
                dim=dim,
                dtype=torch.bfloat16,
                max_rows=_MAX_ROWS,
            )
        return self._copies[dim]

    def collect(self, collective: Collective, communicator: Communicator, tensor: Tensor, out: Tensor) -> None:
        """On all of `tensor`."""
        if collective is Collective.ALL_REDUCE:
            communicator.all_reduce_(tensor)
        else:
            communicator.reduce_scatter(out, tensor)

    def time(self, launches: Mapping[str, Launch], number: int) -> dict[str, float]:
        """Median seconds of one launch of each, in turns."""
        turns = [self.turns.capture(launch, number) for launch in launches.values()]
        times = time_in_turns(turns, self.share, seconds=self.seconds)
        return {name: value / number for name, value in zip(launches, times, strict=True)}

    def curve(self, collective: Collective, num_ctas: int) -> CollectiveCurve:
        """Of collectives alone; measured once."""
        communicator = self.group.communicator(Phase.PREFILL, num_ctas)

        def run(tensor: Tensor) -> None:
            self.collect(collective, communicator, tensor, tensor.chunk(self.world_size)[self.rank])

        return self._curve((collective, num_ctas), run)

    def copy_curves(self, collective: Collective) -> list[CollectiveCurve]:
        """Of copies, and of sums of what was copied; of a reduce-scatter's rows it is half."""
        copies = self.copies(8192)
        if copies is None:
            return []
        part = 1 if collective is Collective.ALL_REDUCE else self.world_size
        return [
            self._curve((collective, "copies"), lambda tensor: copies.try_sending(tensor[: len(tensor) // part])),
            self._curve((collective, "adding"), lambda tensor: copies.try_adding(tensor[: len(tensor) // part])),
        ]

    def _curve(self, key: tuple[Collective, int | str], run: Callable[[Tensor], None]) -> CollectiveCurve:
        if key not in self._curves:
            points = []
            for size in _CURVE_BYTES:
                tensor = torch.zeros(size // 2, device=self.device, dtype=torch.bfloat16)

                def launch(i: int, tensor: Tensor = tensor) -> None:
                    run(tensor)

                number = 10 if size < 1 << 25 else 2
                (seconds,) = time_in_turns([self.turns.capture(launch, number)], self.share, seconds=0.01)
                points.append((size, seconds / number))
            self._curves[key] = CollectiveCurve(tuple(points))
        return self._curves[key]


def init_torch(rank: Rank, port: int) -> None:
    """Torch's global group, which its fused product needs."""
    import torch.distributed._symmetric_memory  # noqa: F401, TID251 - it defines the product

    dist.init_process_group(
        "nccl",
        store=join_store(LOOPBACK, port, prefix="torch"),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=60),
        device_id=rank.device,
    )


def main() -> None:
    port, world_size, options, index = sys.argv[1:]
    began = time.perf_counter()
    rank = Rank(int(port), int(world_size), json.loads(options), int(index))
    if rank.rank == 0:
        print(f"connected after {time.perf_counter() - began:.1f} s", flush=True)
    for line in sys.stdin:
        values = json.loads(line)
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                if values.get("part") == "torch":
                    if not dist.is_initialized():
                        init_torch(rank, int(port))
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

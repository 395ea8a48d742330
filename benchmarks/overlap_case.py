"""One product and collective of `benchmarks/overlap.py`, on one rank: what is launched, checked and timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist  # noqa: TID251 - torch's fused product needs its global group
from torch import Tensor

from semipd.config import Phase
from semipd.kernels.gemm_signal import config_for, gemm_signal
from semipd.kernels.ops import create_ops
from semipd.parallel.overlap import ALONE_CTAS, Communicators, OverlappedLinear, owned_rows
from semipd.parallel.plans import SEQUENCE, Collective, Plan, Problem
from semipd.parallel.tuner import Costs, tune, waves
from semipd.parallel.turns import Launch, time_in_turns

if TYPE_CHECKING:
    from benchmarks.overlap_rank import Rank
    from semipd.parallel.communicator import Communicator
    from semipd.parallel.peer_copies import PeerCopies

BF16 = torch.bfloat16
MAX_ERROR = 6e-3
TIMELINES = 5
_CACHED = 200_000_000  # bytes of operands in turn: four times the L2 cache
_SLEEP_CYCLES = 2_000_000  # a millisecond


class Marks:
    """Communicators that record an event on each side of a collective, or of what is copied."""

    def __init__(self, communicators: Communicators) -> None:
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        beside, alone = _Marked(communicators.beside, self.pairs), _Marked(communicators.alone, self.pairs)
        copies = None if communicators.copies is None else _MarkedCopies(communicators.copies, self.pairs)
        self.communicators = Communicators(beside, alone, copies)  # type: ignore[arg-type]


class _Marked:
    def __init__(self, communicator: Communicator, pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self.world_size, self.rank = communicator.world_size, communicator.rank
        self._communicator, self._pairs = communicator, pairs

    def all_reduce_(self, tensor: Tensor) -> None:
        before = _record()
        self._communicator.all_reduce_(tensor)
        self._pairs.append((before, _record()))

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        before = _record()
        self._communicator.reduce_scatter(out, tensor)
        self._pairs.append((before, _record()))


class _MarkedCopies:
    def __init__(self, copies: PeerCopies, pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self._copies, self._pairs = copies, pairs
        self.begin, self.receive = copies.begin, copies.receive

    def send(self, rows: Tensor, first_row: int, group: int) -> None:
        before = _record()
        self._copies.send(rows, first_row, group)
        self._pairs.append((before, _record()))


def _record() -> torch.cuda.Event:
    """An event on the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


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
        self.copies = rank.copies(self.num_outputs)
        self.problem = Problem(
            device=torch.cuda.get_device_name(),
            num_rows=self.num_rows,
            num_outputs=self.num_outputs,
            num_inputs=self.num_inputs,
            dtype="bfloat16",
            world_size=rank.world_size,
            num_sms=rank.num_sms,
            collective=self.collective,
            ctas=tuple(rank.ctas),
            has_copies=self.copies is not None,
        )
        self.counters = torch.zeros(8, dtype=torch.int32, device="cuda")
        self.tiny = torch.zeros(256, device="cuda")

    def run(self) -> dict[str, Any]:
        """All times and the plan."""
        rank = self.rank
        number = self.num_sets * max(1, 4 // self.num_sets)
        (gemm,) = rank.time({"gemm": self.signal}, number).values()
        wave = gemm / waves(self.problem.num_blocks * self.problem.num_columns, self.problem, SEQUENCE)
        beside = {num_ctas: rank.curve(self.collective, num_ctas) for num_ctas in rank.ctas}
        costs = Costs(wave, beside, rank.curve(self.collective, ALONE_CTAS), *rank.copy_curves(self.collective))

        def measure(plans: Sequence[Plan]) -> list[float]:
            for plan in plans:
                self.check(plan)
            times = rank.time({str(plan): self.ours(plan) for plan in plans}, number)
            return [times[str(plan)] for plan in plans]

        tuned = tune(self.problem, costs, measure, rank.share, count=rank.num_plans)
        by_nccl = [trial for trial in tuned.trials if not trial.plan.copies]
        nccl_plan = min(by_nccl, key=lambda trial: trial.measured).plan if by_nccl else SEQUENCE
        times = rank.time(
            {
                "gemm": self.multiply,
                "signalling_gemm": self.signal,
                "sequence": self.sequence,
                "split2": self.split(2),
                "split4": self.split(4),
                "overlapped_nccl": self.ours(nccl_plan),
                "ours": self.ours(tuned.plan),
            },
            number,
        )
        times |= rank.time({"nccl": self.communicate}, number)  # it would let the others' clocks rise
        self.check(tuned.plan)
        return {
            **times,
            "plan": str(tuned.plan),
            "nccl_plan": str(nccl_plan),
            "wave": wave,
            "tried": {str(trial.plan): [trial.predicted, trial.measured] for trial in tuned.trials},
            "timeline": self.timeline(tuned.plan),
        }

    def timeline(self, plan: Plan) -> list[list[float]]:
        """Seconds from the start at which each collective could begin and had ended, and all had; medians.

        A collective can begin when its rows are there and the one before has ended.
        """
        samples = []
        stream = self.rank.stream
        for _ in range(TIMELINES):
            marks = Marks(self.communicators(plan))
            with torch.cuda.stream(stream):
                self.rank.alone.all_reduce_(self.tiny)
                torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]  # meanwhile the host launches all
                start = _record()
                self.ours(plan, marks.communicators)(0)
                end = _record()
            end.synchronize()
            times = [[start.elapsed_time(event) * 1e-3 for event in pair] for pair in marks.pairs]
            samples.append([*times, [start.elapsed_time(end) * 1e-3] * 2])
        return [
            [statistics.median(values) for values in zip(*pairs, strict=True)] for pairs in zip(*samples, strict=True)
        ]

    def run_torch(self) -> dict[str, Any]:
        """Torch's fused product and reduce-scatter, which a graph cannot hold, in turns with the sequence."""
        world = dist.group.WORLD
        assert world is not None
        name = world.group_name

        def launch(i: int) -> None:
            torch.ops.symm_mem.fused_matmul_reduce_scatter(
                self.xs[i % self.num_sets], self.weights[i % self.num_sets].t(), "sum", 0, name
            )

        rank, number = self.rank, self.num_sets
        turns = [rank.turns.launched(launch, number), rank.turns.capture(self.sequence, number)]
        theirs, sequence = time_in_turns(turns, rank.share, seconds=rank.seconds)
        return {"torch": theirs / number, "torch_sequence": sequence / number}

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
        self.rank.collect(self.collective, self.rank.alone, self.products[i], self.outs[i])

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
                    self.rank.collect(self.collective, self.rank.alone, self.products[i][rows], out)
            stream.wait_stream(side)

        return launch

    def ours(self, plan: Plan, communicators: Communicators | None = None) -> Launch:
        """By a plan."""
        pair = communicators or self.communicators(plan)

        def launch(i: int) -> None:
            i %= self.num_sets
            linear = self.linears[i]
            run = linear.all_reduce_ if self.collective is Collective.ALL_REDUCE else linear.reduce_scatter
            run(self.outs[i], self.xs[i], pair, plan, self.context)

        return launch

    def communicators(self, plan: Plan) -> Communicators:
        """Those of a plan."""
        alone = self.rank.alone
        beside = self.rank.group.communicator(Phase.PREFILL, plan.reserved) if plan.reserved else alone
        return Communicators(beside, alone, self.copies)

    def check(self, plan: Plan) -> None:
        """Raises unless a plan's result is right, on all ranks alike or on none."""
        rank, alone = self.rank, self.rank.alone
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
            is_right = error < MAX_ERROR and is_exact and not rank.release.is_set
            verdict = torch.tensor([not is_right], device="cuda", dtype=torch.float32)
            alone.all_reduce_(verdict)
            num_wrong = int((self.outs[0] != exact).sum())
        if float(verdict) != 0:
            late = ", a wait reached its limit" if rank.release.is_set else ""
            raise RuntimeError(f"{plan}: error {error:.2g}, {num_wrong} other than exact{late}")

    def _randn(self, num_rows: int, num_columns: int) -> Tensor:
        return torch.randn(num_rows, num_columns, device="cuda", dtype=BF16)

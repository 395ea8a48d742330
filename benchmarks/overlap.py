"""A row-parallel product with its collective on two GPUs or more: in sequence, overlapped, and by what others offer.

    python -m benchmarks.overlap [--quick] [--rows 512 ... 16384] [--collectives all_reduce reduce_scatter]

The products are those of Llama-3 8B and 70B whose results every rank needs (bfloat16, random data), with the inputs of
a rank. All times are microseconds, medians, of CUDA graphs replayed in turns of a few milliseconds in random orders,
so that all meet the same clocks; NCCL's are taken apart:

- GEMM: cuBLAS. NCCL: the collective alone. seq: the one, then the other
- split 2, split 4: cuBLAS on halves or quarters of the rows, each followed by its collective on a second stream
- by NCCL: the best of the plans with NCCL that the tuner measured; ours: the one it chose, of those and, on two GPUs,
  those by copy engines. Plans are groups in blocks of 128 rows / SMs for the collective, or copies; speed-up of ours
  over the sequence
- hidden: (seq - ours) / (seq - max(GEMM, NCCL))
- torch: speed-up of its `fused_matmul_reduce_scatter` on symmetric memory over the sequence, in turns with it; it is
  launched, as no graph can hold it, in processes of its own, as it may hang
- GEMM %: the rate of the signalling GEMM alone, over cuBLAS's

Before it is timed, every plan's result is compared with cuBLAS and NCCL, and with the signalling GEMM followed by NCCL,
on two ranks bit by bit. The JSON file also has, for each case, the plans that were tried as [predicted, measured], and
a timeline of the chosen one: when each collective could begin and had ended. A case that hangs is killed and reported,
and the others go on.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, make_parser, report
from semipd.parallel.group import host_store

SHAPES = {"8B o": (4096, 4096), "8B down": (14336, 4096), "70B o": (8192, 8192), "70B down": (28672, 8192)}
"""Inputs, of all ranks, and outputs."""

COLUMNS = {
    "gemm": "GEMM",
    "nccl": "NCCL",
    "sequence": "seq",
    "split2": "split 2",
    "split4": "split 4",
    "overlapped_nccl": "by NCCL",
    "ours": "ours",
}
MAX_FAILURES = 4
Row = dict[str, Any]


class Ranks:
    """A process for each rank, which takes cases as JSON lines; rank 0 answers each by a line."""

    def __init__(self, world_size: int, options: str) -> None:
        self._store, port = host_store()
        env = {
            **os.environ,
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "benchmarks.overlap_rank", str(port), str(world_size), options]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank)],
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                start_new_session=True,
            )
            for rank in range(world_size)
        ]
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self, case: Row, seconds: float) -> Row:
        """What rank 0 says of the case, or why it says nothing."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(case) + "\n")
                process.stdin.flush()
            except OSError:
                return {"error": f"a rank ended with {process.wait()}"}
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=min(0.5, max(0.01, end - time.monotonic())))
            except queue.Empty:
                ended = [process.returncode for process in self._processes if process.poll() is not None]
                if ended:
                    return {"error": f"a rank ended with {ended[0]}"}
                if time.monotonic() > end:
                    return {"error": f"no answer in {seconds:.0f} s"}
                continue
            if line is None:
                return {"error": "rank 0 ended"}
            if line.startswith("{"):
                row: Row = json.loads(line)
                return row
            print(line, end="", flush=True)

    def close(self) -> None:
        """End the processes, which may hang."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except OSError:
                pass
        end = time.monotonic() + 3
        for process in self._processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _read(self) -> None:
        stdout = self._processes[0].stdout
        assert stdout is not None
        for line in stdout:
            self._lines.put(line)
        self._lines.put(None)


def run_all(cases: Sequence[Row], world_size: int, options: str, case_seconds: float, end: float) -> None:
    """Complete the cases by their results; after one that fails with new processes, and after some with none."""
    ranks: Ranks | None = None
    num_failures = 0
    for case in cases:
        left = end - time.monotonic()
        if left < 2 or num_failures == MAX_FAILURES:
            case["error"] = "no time left" if left < 2 else "too many failed before"
            continue
        if ranks is None:
            ranks = Ranks(world_size, options)
            left = min(left, case_seconds + 30)  # processes start, kernels compile
        else:
            left = min(left, case_seconds)
        case.update(ranks.run(case, left))
        if case.get("error"):
            print(f"{case['collective']} {case['shape']} {case['rows']}: {case['error']}", flush=True)
            ranks.close()
            ranks = None
            num_failures += 1
    if ranks is not None:
        ranks.close()


def complete(row: Row) -> None:
    """The columns that follow from others."""
    if "ours" not in row:
        return
    row["speedup"] = row["sequence"] / row["ours"]
    bound = max(row["gemm"], row["nccl"])
    if row["sequence"] > bound:
        row["hidden"] = (row["sequence"] - row["ours"]) / (row["sequence"] - bound)
    row["gemm_percent"] = 100 * row["gemm"] / row["signalling_gemm"]
    if "torch" in row:
        row["torch_speedup"] = row["torch_sequence"] / row["torch"]


def table(rows: Sequence[Row]) -> list[Row]:
    """What is printed."""
    lines = []
    for row in rows:
        kind = {"all_reduce": "AR", "reduce_scatter": "RS"}[row["collective"]]
        line: Row = {"": f"{kind} {row['shape']}", "M": row["rows"]}
        for name, title in COLUMNS.items():
            line[title] = f"{row[name] * 1e6:.0f}" if name in row else ""
        line["plan"] = row.get("plan", row.get("error", "")[:30])
        line["speed-up"] = f"{row['speedup']:.3f}" if "speedup" in row else ""
        line["hidden"] = f"{row['hidden']:.2f}" if "hidden" in row else ""
        line["torch"] = f"{row['torch_speedup']:.3f}" if "torch_speedup" in row else ""
        line["GEMM %"] = f"{row['gemm_percent']:.1f}" if "gemm_percent" in row else ""
        lines.append(line)
    return lines


def summary(rows: Sequence[Row]) -> Row:
    """The geometric mean and the extremes for M of 2,048 and more."""
    speedups = [row["speedup"] for row in rows if "speedup" in row and row["rows"] >= 2048]
    if not speedups:
        return {}
    mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
    return {"mean": mean, "least": min(speedups), "most": max(speedups), "cases": len(speedups)}


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--quick", action="store_true", help="M of 2,048 and 8,192, all-reduce only, within a minute")
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--collectives", nargs="+", default=["all_reduce", "reduce_scatter"])
    parser.add_argument("--world-size", type=int, default=torch.cuda.device_count())
    parser.add_argument("--ctas", nargs="+", type=int, default=[8, 16], help="of collectives beside products")
    parser.add_argument("--sms", type=int, default=0, help="of a partition, instead of the whole device")
    parser.add_argument("--plans", type=int, default=3, help="that the tuner measures")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which what is left is given up")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    if args.quick:
        args.rows, args.collectives = [2048, 8192], ["all_reduce"]
        end = min(end, time.monotonic() + 75)
    cases: list[Row] = [
        {
            "collective": collective,
            "shape": shape,
            "rows": rows,
            "outputs": SHAPES[shape][1],
            "inputs": SHAPES[shape][0],
        }
        for collective in args.collectives
        for shape in args.shapes
        for rows in args.rows
    ]
    seconds = 0.3 if args.quick else 0.5
    options = json.dumps({"ctas": args.ctas, "sms": args.sms, "plans": args.plans, "measuring": seconds})
    run_all(cases, args.world_size, options, 12.0 if args.quick else 30.0, end)
    scattered = [case for case in cases if case["collective"] == "reduce_scatter"]
    if scattered:  # apart, since it may hang
        theirs = [{**case, "part": "torch"} for case in scattered]
        run_all(theirs, args.world_size, options, 20.0, end + 20)
        for case, other in zip(scattered, theirs, strict=True):
            found: Row = {name: other[name] for name in ("torch", "torch_sequence") if name in other}
            case.update(found or {"torch_error": other.get("error", "")})
    for case in cases:
        complete(case)
    if args.json is not None:
        write(args.json, args, cases)
    if any("speedup" in case for case in cases):
        print(json.dumps({name: round(value, 3) for name, value in summary(cases).items()}))
    report(f"{args.world_size} GPUs, microseconds", table(cases), None)


def write(path: Path, args: Any, cases: Sequence[Row]) -> None:
    content = {
        "title": "row-parallel product with its collective",
        **environment(),
        "num_gpus": args.world_size,
        "ctas": args.ctas,
        "num_sms": args.sms,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "summary": summary(cases),
        "rows": list(cases),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Where the time of steps goes on one GPU: a table of kernels, and the idle time between them and between steps.

    python -m benchmarks.trace [--decodes 64 | --prompt 2048] [--context 1024] [--sms N] [--steps 20] [--json FILE]

Llama-3-8B shapes, bfloat16, random weights and tokens; the engine's own runner, one step ahead, from captured graphs.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import make_parser, report
from benchmarks.gpu import StepDriver, run_steps
from benchmarks.lanes import wait_for_graphs

Kernel = tuple[float, float, str]  # start, end in microseconds, name


def traced(launch: Callable[[], Any], num_steps: int) -> list[Kernel]:
    """The kernels of so many steps in order of their start."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_steps(launch, num_steps)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels)


def summary(kernels: list[Kernel], num_steps: int) -> list[dict[str, Any]]:
    """Time per step by kernel, then what is between kernels."""
    totals: dict[str, list[float]] = defaultdict(list)
    for start, end, name in kernels:
        totals[name.split("(")[0][:60]].append(end - start)
    rows = [
        {
            "kernel": name,
            "per_step": len(times) / num_steps,
            "us_each": sum(times) / len(times),
            "us_per_step": sum(times) / num_steps,
        }
        for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))
    ]
    idle, busy_until = 0.0, kernels[0][0]
    for start, end, _ in kernels:
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    span = busy_until - kernels[0][0]
    rows.append(
        {"kernel": "nothing runs", "per_step": 1.0, "us_each": idle / num_steps, "us_per_step": idle / num_steps}
    )
    rows.append({"kernel": "step", "per_step": 1.0, "us_each": span / num_steps, "us_per_step": span / num_steps})
    return rows


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--decodes", type=int, nargs="*", default=[])
    parser.add_argument("--prompt", type=int, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sms", type=int, default=None)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    longest = max([args.context + 256, *args.prompt])
    driver = StepDriver(max_num_seqs=128, max_context=longest, max_model_len=longest, max_prefill_tokens=8192)
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, Callable[[], Any]]] = []
    for size in args.decodes:
        driver.fill(dict.fromkeys(range(size), args.context))
        cases.append((f"{size} rows", partial(driver.decode, list(range(size)), args.sms)))
    cases += [
        (f"prompt {length}", partial(driver.prefill, [(100, 0, length)], args.sms, samples=True))
        for length in args.prompt
    ]
    for name, launch in cases:
        for _ in range(3):
            launch().wait()
            wait_for_graphs(driver)
        rows += [{"case": name, **row} for row in summary(traced(launch, args.steps), args.steps)]
    report("kernels of a step", rows, args.json)
    driver.close()


if __name__ == "__main__":
    main()

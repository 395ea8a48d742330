"""From `Engine(...)` to the first token in a new process, with an empty and a warm Triton cache, and what stays after.

    python -m benchmarks.startup [--json FILE]

Llama-3-8B shapes with random weights on one GPU; importing torch is not counted. Memory is what is free after `close()`
beside what was free after one matmul before the engine, and before it is closed the engine has captured its graphs. The
empty cache is measured twice: the first process of a machine may have files to read that later ones find in memory.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import make_parser, report


def measure() -> dict[str, Any]:
    """In this process; prints JSON."""
    import torch

    x = torch.randn(64, 64, device="cuda")
    x @ x
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    from benchmarks.gap import open_engine
    from semipd import SamplingParams

    engine = open_engine("llama-3-8b", max_model_len=8192)
    built = time.perf_counter()
    engine.generate([[1, 2, 3, 4] * 8], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    first_token = time.perf_counter()
    engine.settle()
    settled = time.perf_counter()
    engine.close()
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    free_after = torch.cuda.mem_get_info()[0]
    return {
        "engine_s": built - started,
        "to_first_token_s": first_token - started,
        "to_settled_s": settled - started,
        "kept_MiB": (free_before - free_after) / 2**20,
    }


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(json.dumps(measure()) + "\n")
        return
    import torch  # for the report

    torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        caches = {"empty": first, "empty again": second, "warm": second}
        rows = [{"triton_cache": name, **_measure_in_child(cache)} for name, cache in caches.items()]
    report("start-up of an 8B model", rows, args.json)


def _measure_in_child(cache: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.startup", "--child"]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()

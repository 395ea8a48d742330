"""Steps of a model on several GPUs with and without overlap, on the whole device and in a split: the engine's own.

    python -m benchmarks.tensor_parallel [llama-3-70b] [--tensor-parallel-size 2] [--layers 1 80]
        [--rows 512 ... 8192] [--engines sequence wide overlap] [--seconds 360] [--json FILE]

Random weights in bfloat16 and random tokens. The engines, one after the other, each in processes of its own:

- sequence: `calibrate=False`. Each row-parallel product is followed by NCCL's all-reduce, which has 16 CTAs, and by the
  norm. So in decode steps, of 8 CTAs: the ranks are told that they cannot map each other's memory
- wide: as `overlap`, but no product overlaps: on the whole device NCCL has as many CTAs as it likes. Prompt steps only,
  and not by default
- overlap: the engine as it is. Its plans are for the o and down products, `-` where it runs them as `sequence` does;
  products without a stored plan are tuned first. Decode steps sum by the peers' memory, fused with residual and norm

Times are medians of steps from their graphs, launched one ahead of the host, no other step beside them: `host` is what
a launch takes on rank 0, so a step that is not longer than that is the host's. A split is the engine's default one, of
which each lane has its share.

A prompt step has as many rows as asked, of prompts of 1,024 tokens that sample nothing, and computes what they are
padded to. With one layer it is that layer, the embedding, whose all-reduce never overlaps, and the last norm, in a
burst too short for the power limit; `a layer` is the difference between the two depths over their difference in layers:
the time of one among many. Decode steps are the deepest model's, head and sampling included, of contexts that the
prompts left; beside them a plain read of what a rank reads, weights and contexts, on the same SMs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, make_parser, report
from semipd.bench.engine_arguments import SHAPES
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import host_store

ENGINES = ("sequence", "wide", "overlap")
MIN_SLOTS = 32
_LEAST_SECONDS = 10.0  # in which it is worth starting an engine

Row = dict[str, Any]


class Ranks:
    """The processes of one engine, which wait for `run`."""

    def __init__(self, options: Mapping[str, Any], world_size: int) -> None:
        self._store, port = host_store()
        command = [sys.executable, "-m", "benchmarks.tensor_parallel_rank", json.dumps(options)]
        self._processes = []
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            address = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
            process = subprocess.Popen(
                command,
                env={**os.environ, **{name: str(value) for name, value in (place | address).items()}},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )
            self._processes.append(process)

    def run(self, seconds: float) -> list[Row]:
        """What rank 0 measured within this time; the last row says it if it failed."""
        rows: list[Row] = []
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            first = self._processes[0]
            assert first.stdout is not None
            for line in first.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                else:
                    print(line, end="", flush=True)
            status = first.wait()
        except OSError:  # one has ended before it began
            self.kill()
            status = self._processes[0].wait()
        finally:
            timer.cancel()
        if status != 0:
            rows.append({"kind": "error", "error": f"rank 0 ended with {status}"})
        return rows

    def kill(self) -> None:
        """End them, whatever they do."""
        for process in self._processes:
            process.kill()

    def close(self, seconds: float = 10.0) -> None:
        """Return when they have ended, which they do by themselves behind `run`."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def run_all(cases: Sequence[Row], world_size: int, limit: float, seconds: float) -> list[Row]:
    """The rows of all engines, each with the engine and its layers."""
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    ranks = [Ranks({**case, "limit": limit}, world_size) for case in cases]  # all of them import side by side
    try:
        for case, own in zip(cases, ranks, strict=True):
            began = time.monotonic()
            allowed = min(limit, deadline - began)
            new: list[Row] = [{"kind": "error", "error": "no time left"}]
            if allowed >= _LEAST_SECONDS:
                new = own.run(allowed)
                own.close()
            took = f"{time.monotonic() - began:.0f} s"
            print(", ".join([case["engine"], f"{case['layers']} layers", took, *remarks(new)]), flush=True)
            rows += [{"engine": case["engine"], "layers": case["layers"], **row} for row in new]
    finally:
        for own in ranks:
            own.kill()
            own.close()
    return rows


def remarks(rows: Sequence[Row]) -> list[str]:
    """What to know of an engine's rows."""
    said = [row["error"] for row in rows if row["kind"] == "error"]
    for row in rows:
        if row["kind"] == "engine":
            said += [f"ready after {row['start_s']:.0f} s", "fused sums" if row["has_fused_sums"] else "sums by NCCL"]
    num_eager = sum(not row.get("has_graph", True) for row in rows)
    return said + [f"{num_eager} steps without graphs"] * bool(num_eager)


def compare(rows: Sequence[Row], kind: str) -> list[Row]:
    """A row for each step that any engine measured, with the times of all."""
    compared: dict[tuple[int, int, int], Row] = {}
    for row in rows:
        if row["kind"] == kind:
            key = row["layers"], row["sms"], row["rows"]
            compared.setdefault(key, {"layers": row["layers"], "sms": row["sms"], "rows": row["rows"]})[
                row["engine"]
            ] = row
    return list(compared.values())


def layer_times(compared: Sequence[Row]) -> list[Row]:
    """What a layer more takes, between each two depths that were measured."""
    by_step: dict[tuple[int, int], list[Row]] = {}
    for row in compared:
        by_step.setdefault((row["sms"], row["rows"]), []).append(row)
    times = []
    for (sms, num_rows), steps in by_step.items():
        for few, many in pairwise(sorted(steps, key=lambda row: int(row["layers"]))):
            num_layers = many["layers"] - few["layers"]
            ms = {
                name: {**many[name], "ms": (many[name]["ms"] - few[name]["ms"]) / num_layers, "host_ms": None}
                for name in ENGINES
                if name in few and name in many
            }
            times.append({"layers": "a layer", "sms": sms, "rows": num_rows, **ms})
    return times


def speedup(row: Row) -> float | None:
    """Of the engine as it is over the faster one of the others."""
    others = [row[name]["ms"] for name in ENGINES[:-1] if name in row]
    return min(others) / row["overlap"]["ms"] if others and "overlap" in row else None


def table(compared: Sequence[Row], engines: Sequence[str], titles: Mapping[str, str]) -> list[Row]:
    """What is printed: milliseconds."""
    lines = []
    for row in compared:
        found = [row[name] for name in engines if name in row]
        line: Row = {"layers": row["layers"], "SMs": row["sms"], "rows": row["rows"]}
        if any(step.get("computed_rows", row["rows"]) != row["rows"] for step in found):
            line["rows"] = f"{row['rows']} ({found[-1]['computed_rows']})"
        for name in engines:
            line[titles.get(name, name)] = _text(row.get(name, {}).get("ms"))
        line["speed-up"] = _text(speedup(row), 3)
        line["host"] = _text(max((step["host_ms"] for step in found if step["host_ms"] is not None), default=None))
        if "plans" in found[-1]:
            line["plans"] = found[-1]["plans"]
        if "plain_read_ms" in found[-1]:
            line["plain read"] = _text(found[-1]["plain_read_ms"])
        lines.append(line)
    return lines


def _text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def load_config(model: str) -> Mapping[str, object]:
    """Of a model by name, or of a folder."""
    if model in SHAPES:
        return SHAPES[model]
    config: Mapping[str, object] = json.loads((Path(model) / "config.json").read_text())
    return config


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument(
        "model", nargs="?", default="llama-3-70b", help=f"{', '.join(SHAPES)}, or a folder with a config.json"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=2, help="devices that share the model")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 80])
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], help="of prompt steps")
    parser.add_argument("--decode-rows", nargs="*", type=int, default=[1, 16, 64], help="of the deepest model")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of each prompt, and so of decode's contexts")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["sequence", "overlap"])
    parser.add_argument("--no-split", action="store_true", help="the whole device only")
    parser.add_argument("--measuring", type=float, default=0.5, help="seconds of each step, three times at least")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of an engine, which is then given up")
    parser.add_argument("--seconds", type=float, default=360.0, help="after which what is left is given up")
    parser.add_argument("--device", default="cuda:0", help="of rank 0, or cpu for a dry run")
    args = parser.parse_args()
    began = time.monotonic()
    config, depths = load_config(args.model), sorted(set(args.layers))
    engines = [name for name in ENGINES if name in args.engines]
    prompts_of_a_step = -(-max(args.rows) // args.prompt_tokens)
    cases = [
        {
            "engine": engine,
            "layers": layers,
            "config": {**config, "num_hidden_layers": layers},
            "device": args.device,
            "rows": sorted(set(args.rows)),
            "decode_rows": sorted(set(args.decode_rows)) if layers == depths[-1] and engine != "wide" else [],
            "prompt_tokens": args.prompt_tokens,
            "slots": max(MIN_SLOTS, prompts_of_a_step, *args.decode_rows),
            "split": not args.no_split,
            "seconds": args.measuring,
        }
        for layers in depths
        for engine in engines
    ]
    rows = run_all(cases, args.tensor_parallel_size, args.limit, args.seconds)
    took = time.monotonic() - began
    prompts, decodes = compare(rows, "prompt"), compare(rows, "decode")
    layers = layer_times(prompts)
    for row in (*prompts, *layers, *decodes):
        row["speedup"] = speedup(row)
    if args.json is not None:
        write(args.json, args, took, rows, {"prompt_steps": prompts, "a_layer": layers, "decode_steps": decodes})
    title = f"{args.model} on {args.tensor_parallel_size} ranks, milliseconds"
    if prompts:
        report(f"prompt steps, {title}", table([*prompts, *layers], engines, {}), None)
    if decodes:
        sums = {"sequence": "NCCL", "overlap": "fused"}
        report(f"decode steps, {title}", table(decodes, [name for name in engines if name in sums], sums), None)
    if any(row["kind"] == "error" for row in rows):
        sys.exit("not all engines were measured")


def write(path: Path, args: Any, seconds: float, rows: Sequence[Row], results: Mapping[str, Sequence[Row]]) -> None:
    """All there is, as JSON."""
    is_cuda = torch.cuda.is_available()
    content = {
        "title": "steps on several ranks",
        **environment(),
        "model": args.model,
        "num_ranks": args.tensor_parallel_size,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,  # type: ignore[no-untyped-call]
        "seconds": seconds,
        "engines": [row for row in rows if row["kind"] in ("engine", "error")],
        **results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Every kernel under the tools of compute-sanitizer, on tensors that end where its work ends.

    python -m tests.gpu.sanitize [--tools memcheck initcheck racecheck synccheck]

A first run without a tool compiles the kernels; then each tool watches a run of its own, all at the same time. Without
torch's caching allocator each tensor is an allocation, and padding keeps these apart. Each run ends with a kernel that
does what the tools look for, so a tool that sees nothing is told from kernels that do nothing wrong.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from semipd.kernels import gemm_signal_hopper, prefill_attention_hopper, stream_k_gemm_hopper
from semipd.kernels.triton_util import compiling_in_parallel, is_interpreted
from tests.gpu.kernel_cases import all_cases, counting_launches, kernel_names

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
PLANTED = "_planted_kernel"
SEEN = ("memcheck", "initcheck", "racecheck")  # tools that the planted kernel gives something to see
TIME_LIMIT = 240.0  # seconds of a run

_PADDING = 1 << 16  # bytes behind each allocation
_DONE = "launched "


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one tool found.

    Attributes:
        errors: reports by kernel, the planted one left out; those of no kernel stand under their first line.
        planted: reports of the planted kernel.
        launches: of each kernel; empty if the run did not come to its end.
        failures: cases that did not run, with their exceptions.
        seconds: of the run.
        log: the end of what the tool and the run printed.
    """

    errors: Counter[str]
    planted: int
    launches: Counter[str]
    failures: list[str]
    seconds: float
    log: str

    @property
    def is_clean(self) -> bool:
        """Whether all ran and nothing was found."""
        return bool(self.launches) and not self.errors and not self.failures


def find_sanitizer() -> str | None:
    """The compute-sanitizer of the path or of CUDA's folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run_tools(sanitizer: str, tools: Sequence[str] = TOOLS) -> dict[str, Outcome]:
    """Run all cases under each tool.

    Raises:
        RuntimeError: they do not run without one.
    """
    warm = subprocess.run(_child("--compile"), capture_output=True, text=True, check=False, timeout=TIME_LIMIT)
    if _DONE not in warm.stdout:
        raise RuntimeError(f"the kernels do not run:\n{warm.stdout[-3000:]}{warm.stderr[-3000:]}")
    with tempfile.TemporaryDirectory() as name:
        runs = [_Run(sanitizer, tool, Path(name) / tool, port=49152 + 100 * index) for index, tool in enumerate(tools)]
        return {run.tool: run.outcome() for run in runs}


class _Run:
    """Cases that run under one tool."""

    def __init__(self, sanitizer: str, tool: str, log: Path, port: int) -> None:
        self.tool = tool
        self._log = log
        self._output = log.with_suffix(".out")
        self._started = time.monotonic()
        command = [
            sanitizer,
            *("--tool", tool),
            *("--log-file", str(log)),
            *("--port", str(port)),
            *("--launch-timeout", "60"),
            *("--target-processes", "application-only"),
            *("--destroy-on-device-error", "kernel"),  # the next one may run
            *("--show-backtrace", "no"),
            *("--print-limit", "1000"),
        ]
        if tool == "memcheck":
            command += ["--padding", str(_PADDING), "--report-api-errors", "no"]
        if tool != "initcheck":  # which must know what others write
            command += [
                word for name in sorted({*functions(), PLANTED}) for word in ("--kernel-name", f"kernel_name={name}")
            ]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [*command, *_child("--plant")],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                start_new_session=True,
            )

    def outcome(self) -> Outcome:
        """Wait for the end, or for the time limit."""
        try:
            self._process.wait(max(1.0, self._started + TIME_LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the tool and what it watches
            self._process.wait()
        log = self._log.read_text() if self._log.exists() else ""
        output = self._output.read_text()
        errors = reports(log)
        planted = errors.pop(PLANTED, 0)
        launched = [json.loads(line[len(_DONE) :]) for line in output.splitlines() if line.startswith(_DONE)]
        return Outcome(
            errors=errors,
            planted=planted,
            launches=Counter(launched[0]["launches"] if launched else {}),
            failures=launched[0]["failures"] if launched else ["the run did not come to its end"],
            seconds=time.monotonic() - self._started,
            log=f"{output[-2000:]}\n{log[:4000]}",
        )


def functions() -> set[str]:
    """Names of kernels as tools know them."""
    return {name.partition(".")[2] for name in kernel_names()}


def dispatch_lines() -> set[str]:
    """Where Triton's own code for warp groups says that it is: at the `def` of a kernel that has them and at the call.

    It hands them their parts and arguments through shared memory behind named barriers, which racecheck reports.
    """
    starts, places = ("def ", "gl.warp_specialize("), set()
    for kernel in (
        gemm_signal_hopper._gemm_signal_hopper_kernel,
        prefill_attention_hopper._prefill_attention_hopper_kernel,
        stream_k_gemm_hopper._stream_k_gemm_kernel,
    ):
        lines, first = inspect.getsourcelines(kernel.fn)
        file = Path(inspect.getsourcefile(kernel.fn) or "").name
        places |= {f"{file}:{first + index}" for index, line in enumerate(lines) if line.strip().startswith(starts)}
    return places


def reports(log: str) -> Counter[str]:
    """Of a tool's log the number of its reports by the kernel that each names; others by their first line."""
    found: Counter[str] = Counter()
    kernels = re.compile(rf"\b({'|'.join([PLANTED, *functions()])})\b")
    notes = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application returned")
    # A report begins behind one blank; its further lines are indented.
    for report in re.split(r"^========= (?=\S)", log, flags=re.MULTILINE)[1:]:
        places = set(re.findall(r"\bin (\S+\.py:\d+)", report))
        if places and places <= dispatch_lines():
            continue
        if not report.startswith(notes):
            kernel = kernels.search(report)
            found[kernel[0] if kernel else report.splitlines()[0][:100]] += 1
    return found


def table(outcomes: dict[str, Outcome]) -> str:
    """Reports of each tool on each kernel; how often it was launched."""
    lines = [f"{'kernel':58} launches" + "".join(f"{tool:>11}" for tool in outcomes)]
    launches = max((outcome.launches for outcome in outcomes.values()), key=len)
    for name in kernel_names():
        counts = [outcome.errors[name.partition(".")[2]] for outcome in outcomes.values()]
        verdict = "clean" if launches[name] else "-"
        lines.append(f"{name:58}{launches[name]:9}" + "".join(f"{count or verdict:>11}" for count in counts))
    others = sorted({key for outcome in outcomes.values() for key in outcome.errors} - functions())
    lines += [f"{key[:65]:67}" + "".join(f"{run.errors[key]:11}" for run in outcomes.values()) for key in others]
    lines.append(f"{'planted faults':67}" + "".join(f"{outcome.planted:11}" for outcome in outcomes.values()))
    lines.append(f"{'seconds':67}" + "".join(f"{outcome.seconds:11.0f}" for outcome in outcomes.values()))
    for tool, outcome in outcomes.items():
        lines += [f"{tool}: {failure}" for failure in outcome.failures]
    return "\n".join(lines)


def _child(option: str) -> list[str]:
    return [sys.executable, "-m", "tests.gpu.sanitize", option]


# In the run itself ----------------------------------------------------------------------------------------------------


@triton.jit
def _planted_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, THREADS: tl.constexpr) -> None:
    """Reads what nobody wrote, has warps race in shared memory, and writes behind the end."""
    index = tl.arange(0, THREADS)
    raced = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 planted;
        .reg .b32 address;
        mov.u32 address, planted;
        st.volatile.shared.b32 [address], $1;
        ld.volatile.shared.b32 $0, [address];
        }""",
        "=r,r",
        [index],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out_ptr + index, tl.load(x_ptr + index) + raced)


def _plant(*, compiles_only: bool = False) -> None:
    x, out = (torch.empty(size, dtype=torch.int32, device="cuda") for size in (128, 100))
    _planted_kernel.run(x, out, THREADS=128, grid=(1,), warmup=compiles_only)
    torch.cuda.synchronize()


def _launch_all() -> None:
    """Run all cases, and print how often which kernel was launched."""
    failures = []
    with counting_launches() as counts:
        for case in all_cases():
            try:
                case()
                if not is_interpreted():
                    torch.cuda.synchronize()
            except Exception as error:
                failures.append(f"{case}: {error!r}"[:300])
    sys.stdout.write(f"{_DONE}{json.dumps({'launches': counts, 'failures': failures})}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--compile", action="store_true", help="only compile and run the cases, without a tool")
    parser.add_argument("--plant", action="store_true", help="only run the cases, then a kernel with faults")
    args = parser.parse_args()
    if args.compile:
        if not is_interpreted():
            with compiling_in_parallel():
                for case in all_cases():
                    case()
                _plant(compiles_only=True)
        _launch_all()
    elif args.plant:
        _launch_all()
        if not is_interpreted():
            _plant()
    else:
        sanitizer = find_sanitizer()
        if sanitizer is None:
            parser.error("there is no compute-sanitizer in the path or in CUDA_HOME/bin")
        outcomes = run_tools(sanitizer, args.tools)
        sys.stdout.write(table(outcomes) + "\n")
        for tool, outcome in outcomes.items():
            if not outcome.is_clean:
                sys.stdout.write(f"\n{tool}:\n{outcome.log}\n")
        sys.exit(not all(run.is_clean and (run.planted or tool not in SEEN) for tool, run in outcomes.items()))


if __name__ == "__main__":
    main()

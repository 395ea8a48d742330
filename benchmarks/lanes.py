"""The lanes on one GPU: decode steps, prefill, and both at once under every kind of plan, on the engine's own runner.

    python -m benchmarks.lanes [--parts decode prefill corun] [--seconds 1.2] [--json FILE]

Llama-3-8B shapes, bfloat16, random weights and tokens. The sums of the co-run have fixed denominators: 41,000 prompt
tokens a second, and a decode step of 64 rows in 8.7 ms at contexts of 1k tokens, 16.9 ms at 4k; 1.00 is what taking
turns gives.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from functools import partial
from typing import Any

import torch

from benchmarks.common import make_parser, percentile, report
from benchmarks.gpu import StepDriver, event_time, read_bandwidth, run_ahead
from semipd.config import MixedPolicy
from semipd.sched.batch import SamplingFeature

PREFILL_RATE = 41_000.0
DECODE_SECONDS = {1024: 8.7e-3, 4096: 16.9e-3}
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}


def wait_for_graphs(driver: StepDriver) -> None:
    driver.model.executor._graphs.wait_until_captured()  # type: ignore[attr-defined]


def measure_decode(seconds: float) -> list[dict[str, Any]]:
    """Steps of 1 to 256 rows at contexts around 1k, greedy and sampled, beside a plain read of their bytes."""
    driver = StepDriver(max_num_seqs=256, max_context=1664, max_model_len=2048)
    rng = random.Random(1)
    roof = read_bandwidth(torch.cuda.current_stream(), driver.num_sms)
    lengths = {slot: rng.randrange(640, 1408) for slot in range(256)}
    rows = []
    for sampling, features in (None, SamplingFeature.NONE), (SAMPLING, SamplingFeature(3)):
        for size in (1, 16, 64, 256) if sampling is None else (64,):
            slots = list(range(size))
            driver.fill({slot: lengths[slot] for slot in slots}, sampling)
            for _ in range(3):
                driver.decode(slots, features=features).wait()
                wait_for_graphs(driver)
            times = run_ahead(partial(driver.decode, slots, features=features), seconds, lambda: False)
            kv_bytes = driver.spec.kv_layout(2).bytes_per_token * sum(lengths[slot] for slot in slots)
            num_bytes = weight_bytes(driver) + kv_bytes
            rows.append(
                {
                    "rows": size,
                    "sampling": "greedy" if sampling is None else "top-k, top-p",
                    "step_ms": statistics.mean(times) * 1e3,
                    "p50_ms": statistics.median(times) * 1e3,
                    "p99_ms": percentile(times, 0.99) * 1e3,
                    "plain_read_ms": num_bytes / roof * 1e3,
                    "read_TB_s": roof / 1e12,
                }
            )
    driver.close()
    return rows


def weight_bytes(driver: StepDriver) -> float:
    """Bytes of weights that a decode step reads: all but the embedding."""
    spec = driver.spec
    layer = spec.hidden_size * ((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim + 3 * spec.intermediate_size)
    layer += spec.num_heads * spec.head_dim * spec.hidden_size
    return 2.0 * (spec.num_layers * layer + spec.vocab_size * spec.hidden_size)


def measure_prefill() -> list[dict[str, Any]]:
    """One prompt on the whole device, from launch to its first token, beside the GEMMs alone on cuBLAS."""
    driver = StepDriver(max_num_seqs=8, max_context=16384, max_model_len=16384, max_prefill_tokens=8192)
    rows = []
    for length in (512, 2048, 8192):
        times = []
        for repeat in range(8):
            launch = driver.prepare_prefill([(0, 0, length)], samples=True)
            torch.cuda.synchronize()
            started = time.perf_counter()
            completion = launch()
            launched = time.perf_counter()
            result = completion.wait()
            times.append(time.perf_counter() - started)
            if repeat < 2:
                wait_for_graphs(driver)
        seconds = statistics.median(times[2:])
        gemm_rate, flops = gemm_roof(driver, length)
        rows.append(
            {
                "tokens": length,
                "ttft_ms": seconds * 1e3,
                "gpu_ms": result.seconds * 1e3,
                "launch_ms": (launched - started) * 1e3,
                "tok_s": length / seconds,
                "TFLOP_s": flops / seconds / 1e12,
                "cublas_TFLOP_s": gemm_rate / 1e12,
                "share_of_cublas": flops / seconds / gemm_rate,
            }
        )
    driver.close()
    return rows


def gemm_roof(driver: StepDriver, num_rows: int) -> tuple[float, float]:
    """The sustained rate of cuBLAS on the layers' products, and the flops of such a prefill with causal attention."""
    spec = driver.spec
    dim, width = spec.hidden_size, spec.num_heads * spec.head_dim
    shapes = [
        (width + 2 * spec.num_kv_heads * spec.head_dim, dim),
        (dim, width),
        (2 * spec.intermediate_size, dim),
        (dim, spec.intermediate_size),
    ]
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes]
    inputs = [torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16) for shape in shapes]
    outputs = [torch.empty(num_rows, shape[0], device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def layer() -> None:
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, weight.t(), out=out)

    flops = sum(2.0 * num_rows * out * inp for out, inp in shapes)
    seconds = event_time(layer, max(8, int(0.5 / (flops / 6e14))))
    attention = 2.0 * num_rows * num_rows * width
    return flops / seconds, spec.num_layers * (flops + attention)


def measure_corun(seconds: float, contexts: list[int], splits: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Both lanes at once: a decode step of 64 rows after the other beside prefill steps of 2,048 tokens, and MIXED."""
    rows = []
    for context in contexts:
        policy = MixedPolicy(token_budget=1024)
        driver = StepDriver(max_num_seqs=80, max_context=context + 1024, max_model_len=8192, policy=policy)
        slots = list(range(64))
        driver.fill(dict.fromkeys(slots, context))
        offered = [split for split in splits if split in driver.model.backend.splits]
        whole = driver.num_sms
        for prefill_sms, decode_sms in [*offered, (whole, whole)]:
            rows.append(corun(driver, context, slots, prefill_sms, decode_sms, seconds))
        rows += [mixed(driver, context, slots, budget, seconds) for budget in (256, 512, 1024)]
        driver.close()
    return rows


def corun(
    driver: StepDriver, context: int, slots: list[int], prefill_sms: int, decode_sms: int, seconds: float
) -> dict[str, Any]:
    prompt_slots = [64, 65, 66, 67]
    num_prefills = 0
    stop = threading.Event()

    def launch_prefill() -> Any:
        nonlocal num_prefills
        num_prefills += 1
        return driver.prefill([(prompt_slots[num_prefills % 4], 0, 2048)], prefill_sms)

    for _ in range(3):
        launch_prefill().wait()
        driver.decode(slots, decode_sms).wait()
        wait_for_graphs(driver)
    prefill_times: list[float] = []
    thread = threading.Thread(target=lambda: prefill_times.extend(run_ahead(launch_prefill, 60.0, stop.is_set)))
    thread.start()
    time.sleep(0.3)
    prefill_times.clear()
    times = run_ahead(lambda: driver.decode(slots, decode_sms), seconds, lambda: False)
    stop.set()
    thread.join()
    rate = 2048 / statistics.mean(prefill_times)
    return corun_row(f"split {prefill_sms}/{decode_sms}", context, times, rate)


def mixed(driver: StepDriver, context: int, slots: list[int], budget: int, seconds: float) -> dict[str, Any]:
    chunk = budget - 64
    position = 0

    def launch() -> Any:
        nonlocal position
        start = position if position + chunk <= context else 0
        position = start + chunk
        return driver.decode(slots, chunks=[(64, start, chunk)])

    for _ in range(3):
        launch().wait()
        wait_for_graphs(driver)
    times = run_ahead(launch, seconds, lambda: False)
    return corun_row(f"mixed {budget}", context, times, chunk / statistics.mean(times))


def corun_row(plan: str, context: int, times: list[float], prefill_rate: float) -> dict[str, Any]:
    step = statistics.mean(times)
    return {
        "context": context,
        "plan": plan,
        "tpot_ms": step * 1e3,
        "tpot_p99_ms": percentile(times, 0.99) * 1e3,
        "prefill_tok_s": prefill_rate,
        "sum": prefill_rate / PREFILL_RATE + DECODE_SECONDS[context] / step,
    }


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill", "corun"])
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--decode-sms", nargs="+", type=int, default=[32, 48, 64])
    args = parser.parse_args()
    path = args.json
    if "decode" in args.parts:
        report("decode step, contexts around 1k", measure_decode(args.seconds), _part(path, "decode"))
    if "prefill" in args.parts:
        report("prefill of one prompt, unloaded", measure_prefill(), _part(path, "prefill"))
    if "corun" in args.parts:
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        splits = [(num_sms - sms, sms) for sms in args.decode_sms]
        report("both lanes", measure_corun(args.seconds, args.contexts, splits), _part(path, "corun"))


def _part(path: Any, part: str) -> Any:
    return None if path is None else path.with_name(f"{path.stem}_{part}{path.suffix}")


if __name__ == "__main__":
    main()

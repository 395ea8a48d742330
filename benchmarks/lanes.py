"""The lanes on one GPU: decode steps, prefill, and both at once under every kind of plan, on the engine's own runner.

    python -m benchmarks.lanes [--parts decode prefill corun] [--seconds 1.2] [--json FILE]
    python -m benchmarks.lanes --parts corun --contexts 1024 [--decode-sms 32 40 48 56 64] [--budgets 128 256 528 1008]

Llama-3-8B shapes, bfloat16, random weights and tokens. The sums of the co-run have fixed denominators: 41,000 prompt
tokens a second, and a decode step of 64 rows in 8.7 ms at contexts of 1k tokens, 16.9 ms at 4k; 1.00 is what taking
turns gives. Beside each plan:

- alone: the step time and the prompt rate of the lanes on the same SMs while the other one rests
- mixed: the prompt rate of MIXED at the same step time, on the line between two budgets, and this plan's over it
- W, MHz: mean power and clock of the SMs, and the share of the time in which the power limit held the clock down
- TB/s: weights and contexts that steps read, and the activations of prompts as often as a kernel reads or writes them,
  though the L2 cache may serve some
- TFLOP/s: products and causal attention of the prompts
"""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common import make_parser, percentile, report
from benchmarks.counters import Counters
from benchmarks.gpu import StepDriver, event_time, intervals, read_bandwidth, run_ahead
from semipd.config import MixedPolicy, Phase
from semipd.device.partition import Completion
from semipd.sched.batch import SamplingFeature, StepResult

PREFILL_RATE = 41_000.0
DECODE_SECONDS = {1024: 8.7e-3, 4096: 16.9e-3}
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
NUM_DECODES = 64  # of a co-run
PROMPT = 2048  # tokens of its prompts, one a step
BUDGETS = (128, 192, 256, 368, 528, 768, 1008)  # of MIXED; what 64 decodes leave of each is a bucket of its own
CAPPED_SMS = 16  # that prefill leaves to decode where decode has the whole device
_ALONE_SECONDS = 0.4
_LEAD_SECONDS = 0.3  # both lanes run, and nothing is counted yet
_LEAD_TOKENS = 96  # that contexts are short of their length at first: they grow by about twice as many meanwhile

Launch = Callable[[], Completion[StepResult]]
Row = dict[str, Any]


def measure_decode(seconds: float) -> list[Row]:
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
                driver.wait_for_graphs()
            launch = partial(driver.decode, slots, features=features)
            times = intervals(run_ahead(launch, seconds, _never))
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


def weight_bytes(driver: StepDriver, *, has_head: bool = True) -> float:
    """Bytes of weights that a step reads: all but the embedding, and the map to logits only if it samples."""
    spec = driver.spec
    layer = sum(num_outputs * num_inputs for num_outputs, num_inputs in layer_shapes(driver))
    return 2.0 * (spec.num_layers * layer + has_head * spec.vocab_size * spec.hidden_size)


def measure_prefill() -> list[Row]:
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
                driver.wait_for_graphs()
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
    shapes = layer_shapes(driver)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes]
    inputs = [torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16) for shape in shapes]
    outputs = [torch.empty(num_rows, shape[0], device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def layer() -> None:
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, weight.t(), out=out)

    flops = sum(2.0 * num_rows * out * inp for out, inp in shapes)
    seconds = event_time(layer, max(8, int(0.5 / (flops / 6e14))))
    return flops / seconds, num_rows * prompt_flops(driver, num_rows)


def layer_shapes(driver: StepDriver) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's four weights."""
    spec = driver.spec
    dim, width = spec.hidden_size, spec.num_heads * spec.head_dim
    return [
        (width + 2 * spec.num_kv_heads * spec.head_dim, dim),
        (dim, width),
        (2 * spec.intermediate_size, dim),
        (dim, spec.intermediate_size),
    ]


def prompt_flops(driver: StepDriver, length: int) -> float:
    """Of a token of a prompt of that length, on average: products and causal attention of all layers."""
    spec = driver.spec
    products = sum(2.0 * out * inp for out, inp in layer_shapes(driver))
    return spec.num_layers * (products + 2.0 * length * spec.num_heads * spec.head_dim)


def prompt_bytes(driver: StepDriver) -> float:
    """What a prompt token's activations move to and from memory, each tensor as often as a kernel reads or writes it.

    The products read their input and write, or read and write, their output; norms, rotary embedding, attention and
    the gate read and write theirs.
    """
    spec = driver.spec
    (fused, dim), (_, width), (_, _), (_, features) = layer_shapes(driver)
    products = (dim + fused) + (width + 2 * dim) + (dim + 2 * features) + (features + 2 * dim)
    others = 2 * (2 * dim) + 2 * fused + (fused + width) + 3 * features
    return 2.0 * spec.num_layers * (products + others)


def measure_corun(
    seconds: float, contexts: Sequence[int], decode_sms: Sequence[int], budgets: Sequence[int]
) -> list[Row]:
    """Both lanes at once: a decode step of 64 rows after the other beside prefill steps of 2,048 tokens, and MIXED."""
    rows = []
    for context in contexts:
        rows += measure_plans(CoRun(context, seconds, decode_sms, max(budgets)), budgets)
        gc.collect()
        torch.cuda.empty_cache()  # the next driver's pool is what memory is free
    return rows


def measure_plans(corun: CoRun, budgets: Sequence[int]) -> list[Row]:
    """Each split and each MIXED budget; ends the driver."""
    mixed = [corun.mixed(budget) for budget in budgets]
    splits = [corun.split(*shares) for shares in corun.shares]
    for row in splits:
        compare(row, mixed)
    corun.driver.close()
    return splits + mixed


def compare(row: Row, mixed: Sequence[Row]) -> None:
    """Note the rate of MIXED at the step time of `row`, on the line between the next faster and slower budgets."""
    ordered = sorted(mixed, key=lambda other: float(other["tpot_ms"]))
    for faster, slower in pairwise(ordered):
        if faster["tpot_ms"] <= row["tpot_ms"] <= slower["tpot_ms"]:
            share = (row["tpot_ms"] - faster["tpot_ms"]) / (slower["tpot_ms"] - faster["tpot_ms"])
            rate = faster["prefill_tok_s"] + share * (slower["prefill_tok_s"] - faster["prefill_tok_s"])
            row |= {"mixed_tok_s": rate, "over_mixed": row["prefill_tok_s"] / rate}


class CoRun:
    """Plans for 64 decoding requests at one context and prompts without end, one after the other on one driver."""

    def __init__(self, context: int, seconds: float, decode_sms: Sequence[int], max_budget: int) -> None:
        self._context = context
        self._seconds = seconds
        self._slots = list(range(NUM_DECODES))
        self._num_prefills = 0
        self.driver = driver = StepDriver(
            max_num_seqs=NUM_DECODES + 16,
            max_context=max(PROMPT, context + 512),
            max_model_len=8192,
            policy=MixedPolicy(token_budget=max_budget),
        )
        driver.fill(dict.fromkeys(self._slots, context))
        splits = driver.model.backend.splits
        whole = (driver.num_sms, driver.num_sms)
        capped = [(prefill, whole[1]) for prefill, decode in splits if decode == CAPPED_SMS]
        self.shares = [split for split in splits if split[1] in decode_sms] + capped + [whole]
        shares = {Phase.PREFILL: [], Phase.DECODE: [decode for _, decode in self.shares]}
        driver.runner.warm_up(shares)  # compiles side by side what these shares need

    def split(self, prefill_sms: int, decode_sms: int) -> Row:
        """Each lane on a share of its own, or, where the two sum to more than the device, on some that are both's."""
        prefill = partial(self._prefill, prefill_sms)
        decode = partial(self.driver.decode, self._slots, decode_sms)
        self._warm(prefill, decode)
        alone = [statistics.mean(intervals(run_ahead(lane, _ALONE_SECONDS, _never))) for lane in (prefill, decode)]
        self._reset()
        prefill_ends: list[float] = []
        stop = threading.Event()
        thread = threading.Thread(target=lambda: prefill_ends.extend(run_ahead(prefill, 60.0, stop.is_set)))
        thread.start()
        try:
            run_ahead(decode, _LEAD_SECONDS, _never)
            with Counters() as counters:
                ends = run_ahead(decode, self._seconds, _never)
        finally:
            stop.set()
            thread.join()
        step = statistics.mean(intervals([end for end in prefill_ends if ends[0] <= end <= ends[-1]]))
        row = self._row(f"split {prefill_sms}/{decode_sms}", intervals(ends), PROMPT / step, PROMPT, counters)
        row["TB_s"] += weight_bytes(self.driver, has_head=False) / step / 1e12
        return row | {"alone_ms": alone[1] * 1e3, "alone_tok_s": PROMPT / alone[0]}

    def mixed(self, budget: int) -> Row:
        """Steps of all decodes and a chunk of a prompt."""
        chunk = budget - NUM_DECODES
        position = 0

        def launch() -> Completion[StepResult]:
            nonlocal position
            start = position if position + chunk <= PROMPT else 0
            position = start + chunk
            return self.driver.decode(self._slots, chunks=[(NUM_DECODES, start, chunk)])

        self._warm(launch)
        with Counters() as counters:
            times = intervals(run_ahead(launch, self._seconds, _never))
        return self._row(f"mixed {budget}", times, chunk / statistics.mean(times), PROMPT // chunk * chunk, counters)

    def _prefill(self, num_sms: int) -> Completion[StepResult]:
        self._num_prefills += 1
        return self.driver.prefill([(NUM_DECODES + self._num_prefills % 4, 0, PROMPT)], num_sms)

    def _warm(self, *launches: Launch) -> None:
        for _ in range(3):
            for launch in launches:
                launch().wait()
            self.driver.wait_for_graphs()
        self._reset()

    def _reset(self) -> None:
        self.driver.set_lengths(dict.fromkeys(self._slots, self._context - _LEAD_TOKENS))

    def _row(
        self, plan: str, times: Sequence[float], prefill_rate: float, prompt_length: int, counters: Counters
    ) -> Row:
        driver, step = self.driver, statistics.mean(times)
        contexts = NUM_DECODES * self._context * driver.spec.kv_layout(2).bytes_per_token
        num_bytes = (weight_bytes(driver) + contexts) / step + prefill_rate * prompt_bytes(driver)
        return {
            "context": self._context,
            "plan": plan,
            "tpot_ms": step * 1e3,
            "tpot_p99_ms": percentile(times, 0.99) * 1e3,
            "prefill_tok_s": prefill_rate,
            "sum": prefill_rate / PREFILL_RATE + DECODE_SECONDS[self._context] / step,
            "mixed_tok_s": None,
            "over_mixed": None,
            "alone_ms": None,
            "alone_tok_s": None,
            "W": counters.watts,
            "MHz": counters.sm_mhz,
            "capped": counters.power_capped,
            "TB_s": num_bytes / 1e12,
            "TFLOP_s": prefill_rate * prompt_flops(driver, prompt_length) / 1e12,
        }


def _never() -> bool:
    return False


def main() -> None:
    parser = make_parser(__doc__, has_model=False)
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill", "corun"])
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--decode-sms", nargs="+", type=int, default=[32, 40, 48, 56, 64])
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    args = parser.parse_args()
    path = args.json
    if "decode" in args.parts:
        report("decode step, contexts around 1k", measure_decode(args.seconds), _part(path, "decode"))
    if "prefill" in args.parts:
        report("prefill of one prompt, unloaded", measure_prefill(), _part(path, "prefill"))
    if "corun" in args.parts:
        rows = measure_corun(args.seconds, args.contexts, args.decode_sms, args.budgets)
        report("both lanes", rows, _part(path, "corun"))


def _part(path: Any, part: str) -> Any:
    return None if path is None else path.with_name(f"{path.stem}_{part}{path.suffix}")


if __name__ == "__main__":
    main()

r"""The gap test: running streams beside one long prompt, under each policy.

    python -m benchmarks.gap MODEL [--streams 8] [--prompt-tokens 1500] [--json FILE]
    python -m benchmarks.gap llama-3-8b --dtype bfloat16 --streams 32 --prompt-tokens 8192 --mixed-budget 1024
    python -m benchmarks.gap MODEL --policies mixed --mixed-budget auto --gap-target 0.1 --rounds 2
    python -m benchmarks.gap llama-3-8b --dtype bfloat16 --streams 32 --prompt-tokens 8192 --policies static \
        --split 100 32 --fresh --rounds 6

MODEL `llama-3-8b` is that model's shapes with random weights.

Streams decode steadily; then one long prompt arrives. What their readers feel is the largest time between two tokens
while that prompt is computed: under `exclusive` all of its prefill, under `static` a decode step on the decode lane's
own cores.

The last round counts: on a GPU the first ones capture graphs that `Engine.settle()` did not. With `--fresh` all rounds
are shown, from the engine's first request on, and nothing waits for graphs.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import make_parser, percentile, report
from semipd import SLO, Engine, RequestOutput, SamplingParams
from semipd.config import AdaptivePolicy, ExclusivePolicy, MixedPolicy, PolicyConfig, StaticPolicy

POLICIES: dict[str, PolicyConfig] = {
    "adaptive": AdaptivePolicy(),
    "exclusive": ExclusivePolicy(),
    "static": StaticPolicy(),
    "mixed": MixedPolicy(),
}
WARM_TOKENS = 8  # per stream, before the prompt arrives


def open_engine(model: Path | str, **options: Any) -> Engine:
    """An engine on a model's files, or on random weights in the shapes of `llama-3-8b`."""
    if str(model) != "llama-3-8b":
        return Engine(str(model), **options)
    from benchmarks.gpu import LLAMA_3_8B, save_config

    return Engine(str(save_config(LLAMA_3_8B)), load_format="dummy", **options)


class _Reader:
    """Reads one stream in a thread and keeps the time of each token."""

    def __init__(self, engine: Engine, prompt: list[int], params: SamplingParams, warm: threading.Semaphore) -> None:
        self.times: list[float] = []
        self._warm = warm
        self._stream = engine.stream(prompt, params)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for delta in self._stream:
            self.times.append(time.monotonic())
            if len(self.times) == WARM_TOKENS:
                self._warm.release()
            del delta

    def stop(self) -> None:
        self._stream.abort()
        self._thread.join()

    def gaps(self, start: float, end: float) -> list[float]:
        """Times between tokens, of those gaps that touch [start, end]."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [later - earlier for earlier, later in pairs if later >= start and earlier <= end]


def play(engine: Engine, prompts: list[list[int]], long_prompt: list[int]) -> tuple[RequestOutput, list[float]]:
    """Streams decode, then the long prompt arrives: its output, and the streams' gaps while it was computed."""
    params = SamplingParams(temperature=0.0, max_tokens=2_000, ignore_eos=True)
    warm = threading.Semaphore(0)
    readers = [_Reader(engine, prompt, params, warm) for prompt in prompts]
    for _ in readers:
        warm.acquire()
    start = time.monotonic()
    with engine.stream(long_prompt, SamplingParams(max_tokens=1)) as stream:
        output = stream.result()
    end = time.monotonic()
    for reader in readers:
        reader.stop()
    return output, [gap for reader in readers for gap in reader.gaps(start, end)]


def measure(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Worst gap and p99 of the streams' gaps while the prompt is computed, and the prompt's TTFT, of rounds to show."""
    rng = random.Random(0)
    draw = range(100, 40_000)
    policy = POLICIES[name]
    if name == "mixed":
        policy = MixedPolicy(token_budget=args.mixed_budget)
    elif name == "static" and args.split:
        policy = StaticPolicy(prefill_sms=args.split[0], decode_sms=args.split[1])
    max_model_len = 2 * max(args.prompt_tokens, 2048)
    slo = None if args.gap_target is None else SLO(gap=args.gap_target)
    rows = []
    with open_engine(args.model, policy=policy, dtype=args.dtype, max_model_len=max_model_len, slo=slo) as engine:
        if not args.fresh:
            engine.settle()
        for number in range(args.rounds):
            prompts = [rng.choices(draw, k=32) for _ in range(args.streams)]
            output, gaps = play(engine, prompts, rng.choices(draw, k=args.prompt_tokens))
            timings = output.outputs[0].timings
            assert timings is not None
            rows.append(
                {
                    "policy": name,
                    "round": number,
                    "streams": args.streams,
                    "prompt_tokens": args.prompt_tokens,
                    "worst_gap_ms": 1e3 * max(gaps),
                    "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
                    "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
                    "prompt_ttft_ms": 1e3 * (timings.ttft or 0.0),
                }
            )
    return rows if args.fresh else rows[-1:]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--policies", nargs="+", default=["exclusive", "static", "mixed"], choices=list(POLICIES))
    parser.add_argument(
        "--mixed-budget",
        type=lambda text: None if text == "auto" else int(text),
        default=64,
        help="tokens of a step, or auto: as many as a model of step times expects to fit the gap target",
    )
    parser.add_argument("--gap-target", type=float, help="seconds, the engine's SLO")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="show all rounds of an engine that captures graphs")
    parser.add_argument("--split", type=int, nargs=2, help="SMs (cores) of prefill and decode under `static`")
    args = parser.parse_args()
    rows = [row for name in args.policies for row in measure(args, name)]
    report("worst gap of running streams while one long prompt is computed", rows, args.json)


if __name__ == "__main__":
    main()

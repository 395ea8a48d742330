"""Calibration in a running engine: automatic, invisible, once per model and device, and no obstacle to closing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from semipd import AdaptivePolicy, ConfigError, Engine, EngineClosed, MixedPolicy, StaticPolicy
from semipd.config import PolicyConfig
from semipd.device.partition import Completion
from semipd.latency_store import LatencyStore
from semipd.sched.batch import Batch, StepResult
from tests.fakes import OracleExecutor, expected_text, make_engine, wait_until, wait_until_idle
from tests.sched.oracle import OraclePool

STEP = 0.0005


class CountingExecutor(OracleExecutor):
    """Counts steps; its pool holds something everywhere, as a device's memory does."""

    def __init__(self, step_seconds: float = STEP) -> None:
        pool = OraclePool(256, 4)
        pool._pool = [[0] * 4 for _ in range(256)]
        super().__init__(pool, step_seconds=step_seconds)
        self.num_steps = 0

    def execute(self, batch: Batch) -> Completion[StepResult]:
        self.num_steps += 1
        assert sum(len(entry.token_ids) for entry in batch.prefill) <= 16  # as many as `make_engine` allows
        return super().execute(batch)


def store_in(folder: Path) -> LatencyStore:
    return LatencyStore({"device": "two fake cores"}, folder)


def engine_with(executor: OracleExecutor, folder: Path, policy: PolicyConfig | None = None, **options: Any) -> Engine:
    store = store_in(folder)
    policy = AdaptivePolicy() if policy is None else policy
    return make_engine(
        executor=executor, policy=policy, latency_store=store, latency=store.load(2), max_num_seqs=8, **options
    )


def greedy(num_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": num_tokens}


def test_it_runs_once_for_a_model_and_device(tmp_path: Path) -> None:
    executor = CountingExecutor()
    with engine_with(executor, tmp_path) as engine:
        time.sleep(0.02)
        assert executor.num_steps == 0
        engine.generate("abc", greedy(3))
        wait_until(lambda: any(tmp_path.glob("*.json")))
        wait_until_idle(engine)
        assert executor.num_steps > 50
        statistics = engine.statistics()
        assert statistics.num_generation_tokens == 3
        assert statistics.step_time_error is not None
    assert (known := store_in(tmp_path).load(2)) is not None
    assert known.is_calibrated and known.trusted_prompt_tokens >= 64
    executor = CountingExecutor()
    with engine_with(executor, tmp_path) as engine:
        engine.generate("abc", greedy(3))
        time.sleep(0.02)
        assert executor.num_steps < 5


def test_outputs_are_the_same_through_it(tmp_path: Path) -> None:
    with engine_with(CountingExecutor(), tmp_path) as engine:
        for index in range(40):
            prompt = "one prefix for all of them" + "abcdefgh"[index % 8] * (index % 5)
            (output,) = engine.generate(prompt, greedy(5))
            assert output.outputs[0].text == expected_text(prompt, 5)
            engine.check_integrity()
        assert engine.statistics().num_prompt_tokens > 0
        wait_until(lambda: any(tmp_path.glob("*.json")))
        (output,) = engine.generate("one prefix for all of them", greedy(5))
        assert output.num_cached_tokens == 24
        assert output.outputs[0].text == expected_text("one prefix for all of them", 5)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (StaticPolicy(), {"calibrate": True}),
        (MixedPolicy(token_budget=64), {"calibrate": True}),
        (AdaptivePolicy(), {"calibrate": False}),
    ],
)
def test_it_does_not_run_where_nothing_comes_of_it(
    tmp_path: Path, policy: PolicyConfig, options: dict[str, bool]
) -> None:
    executor = CountingExecutor()
    with engine_with(executor, tmp_path, policy, **options) as engine:
        engine.generate("abc", greedy(3))
        time.sleep(0.03)
        assert executor.num_steps < 5


def test_it_runs_without_a_store_if_asked_for() -> None:
    executor = CountingExecutor()
    with make_engine(executor=executor, policy=MixedPolicy(token_budget=None), calibrate=True) as engine:
        engine.generate("abc", greedy(3))
        wait_until(lambda: executor.num_steps > 50)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_an_engine_closes_in_the_midst_of_it(tmp_path: Path, delay: float) -> None:
    engine = engine_with(CountingExecutor(0.005), tmp_path)
    engine.generate("abc", greedy(2))
    time.sleep(delay)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 1.0
    known = store_in(tmp_path).load(2)  # what the requests taught
    assert known is not None and not known.is_calibrated
    with pytest.raises(EngineClosed):
        engine.generate("abc")


def test_another_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate is 'yes'; expected True, False or None"):
        make_engine(calibrate="yes")

"""Whole engines on two ranks: the same tokens as on one, whatever the plan; processes that come and go with them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from semipd import ConfigError, Engine, EngineDead, SamplingParams, WeightsError
from semipd.request import RequestOutput
from tests.fakes import wait_until
from tests.parallel.workers import ROOT, plant, wait_for_no_workers, worker_processes
from tests.tiny import VOCAB, save_tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=450, ignore_eos=True)
REPORT_SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama3")
    return folder


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    yield
    wait_for_no_workers()


def make_engine(folder: Path, world_size: int = 2, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "float64", "kv_cache_tokens": 1024}
    return Engine(str(folder), device="cpu", tensor_parallel_size=world_size, **(defaults | options))


def prompts(count: int = 9, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 7, 16, 33, 50)))] for _ in range(count)]


def many_params() -> list[SamplingParams]:
    plain = GREEDY
    drawn = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7, max_tokens=9, ignore_eos=True, n=2)
    odd = SamplingParams(
        temperature=0.8,
        seed=3,
        repetition_penalty=1.3,
        logit_bias={5: 2.0},
        logprobs=2,
        prompt_logprobs=1,
        max_tokens=9,
        ignore_eos=True,
    )
    return [plain, drawn, odd] * 3


def all_tokens(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[tuple(sample.token_ids) for sample in output.outputs] for output in outputs]


def all_logprobs(outputs: list[RequestOutput]) -> list[float]:
    return [
        value.logprob
        for output in outputs
        for sample in output.outputs
        for position in sample.logprobs or ()
        for value in position.values()
    ]


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[list[tuple[int, ...]]], list[float]]:
    with make_engine(folder, 1) as engine:
        outputs = engine.generate(prompts(), many_params())
    return all_tokens(outputs), all_logprobs(outputs)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("static", {"max_prefill_tokens": 16}),
        ("mixed", {"max_prefill_tokens": 7, "block_size": 2}),
        ("exclusive", {"kv_cache_tokens": 96, "max_model_len": 80, "block_size": 2, "enable_prefix_caching": False}),
    ],
)
def test_tokens_and_logprobs_are_those_of_one_rank(
    folder: Path, expected: tuple[list[list[tuple[int, ...]]], list[float]], policy: str, options: dict[str, Any]
) -> None:
    with make_engine(folder, policy=policy, **options) as engine:
        outputs = engine.generate(prompts(), many_params())
        assert all_tokens(outputs) == expected[0]
        assert all_logprobs(outputs) == pytest.approx(expected[1])
        engine.settle()
        backwards = engine.generate(prompts()[::-1], many_params()[::-1])
        assert all_tokens(backwards) == expected[0][::-1]
        engine.check_integrity()
        if "max_model_len" in options:
            assert engine.statistics().num_preemptions > 0


def test_lanes_stay_in_step_while_ranks_run_unevenly_and_readers_leave(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(
        monkeypatch,
        tmp_path / "planted",
        """
        import random, time
        def slow(module):
            run, rng = module.Runner._run, random.Random(5)
            def run_slowly(self, batch):
                time.sleep(rng.random() * 0.004)
                return run(self, batch)
            module.Runner._run = run_slowly
        import_then("semipd.model.runner", slow)
        """,
    )
    tasks = prompts(24, seed=8)
    with make_engine(folder, 1) as engine:
        judge = all_tokens(engine.generate(tasks, GREEDY))
    with make_engine(folder, policy="static", max_prefill_tokens=16, block_size=2) as engine:
        left = [engine.submit(prompt, ENDLESS) for prompt in prompts(6, seed=9)]
        streams = [engine.submit(prompt, GREEDY) for prompt in tasks]
        for stream in left:
            next(iter(stream))
            stream.abort()
        assert all_tokens([stream.result(60) for stream in streams]) == judge
        engine.check_integrity()


@pytest.mark.slow
def test_float32_and_replicated_kv_heads(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "qwen3", dtype=torch.float32)
    tasks = prompts(6)
    with make_engine(tmp_path, 4, dtype="float32") as engine:  # 2 KV heads
        assert len(worker_processes()) == 3
        for prompt, (output,) in zip(tasks, all_tokens(engine.generate(tasks, GREEDY)), strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)
            assert (logits.amax(1) - chosen).max() < 1e-3


def test_close_ends_the_workers_and_two_engines_live_side_by_side(folder: Path) -> None:
    with make_engine(folder) as one, make_engine(folder) as two:
        assert len(worker_processes()) == 2
        first, second = one.submit([1, 2, 3], GREEDY), two.submit([1, 2, 3], GREEDY)
        assert first.result(30).outputs[0].token_ids == second.result(30).outputs[0].token_ids
        one.close()
        assert len(worker_processes()) == 1
        two.generate([[4]], GREEDY)
    assert not worker_processes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("semipd-")]


@pytest.mark.parametrize("is_busy", [True, False], ids=["collective", "idle"])
def test_a_killed_rank_ends_the_engine_with_its_cause(folder: Path, is_busy: bool) -> None:
    with make_engine(folder, kv_cache_tokens=4096) as engine:
        streams = [engine.submit([index], ENDLESS) for index in range(5)] if is_busy else []
        for stream in streams:
            next(iter(stream))
        (worker,) = worker_processes()
        if is_busy:
            worker.suspend()
            time.sleep(0.3)  # in which rank 0 comes to wait for it in a collective
        worker.kill()
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(EngineDead, match=rf"rank 1 \(process {worker.pid}\) was killed by SIGKILL"):
                stream.result(REPORT_SECONDS)
        wait_until(lambda: engine._core.is_ended)
        assert time.monotonic() - killed < REPORT_SECONDS
        with pytest.raises(EngineDead, match="rank 1"):
            engine.generate([[1]], GREEDY)
        with pytest.raises(EngineDead, match="rank 1"):
            engine.settle()


FAILING_STEP = """
def fail(module):
    run, count = module.Runner._run, [0]
    def run_or_fail(self, batch):
        count[0] += 1
        if count[0] == 9:
            raise ValueError("planted failure")
        return run(self, batch)
    module.Runner._run = run_or_fail
import_then("semipd.model.runner", fail)
"""


def test_an_exception_on_a_rank_is_the_cause_with_its_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "planted", FAILING_STEP)
    with make_engine(folder, kv_cache_tokens=4096) as engine:
        started = time.monotonic()
        with pytest.raises(EngineDead, match="ValueError: rank 1: planted failure") as caught:
            engine.generate([[1], [2, 3]], ENDLESS)
        assert time.monotonic() - started < REPORT_SECONDS
        cause = caught.value.__cause__
        assert isinstance(cause, ValueError)
        assert "in run_or_fail" in str(cause.__cause__)


def test_an_exception_on_rank_0_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from semipd.model.runner import Runner

    run = Runner._run
    count = iter(range(1000))

    def run_or_fail(self: Runner, batch: Any) -> Any:
        if next(count) == 9:
            raise ValueError("planted failure")
        return run(self, batch)

    monkeypatch.setattr(Runner, "_run", run_or_fail)
    with make_engine(folder, kv_cache_tokens=4096) as engine:
        with pytest.raises(EngineDead, match="ValueError: planted failure"):
            engine.generate([[1], [2, 3]], ENDLESS)
        wait_for_no_workers()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [("semipd.WeightsError('planted')", WeightsError), ("MemoryError('planted')", MemoryError)],
    ids=["weights", "memory"],
)
def test_what_keeps_a_rank_from_its_model_is_raised_where_the_engine_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str, expected: type[Exception]
) -> None:
    code = f"""
    def fail(module):
        import semipd
        def load_weights(*args, **kwargs):
            raise {raised}
        module.load_weights = load_weights
    import_then("semipd.model.loader", fail)
    """
    plant(monkeypatch, tmp_path / "planted", code)
    with pytest.raises(expected, match="rank 1: planted") as caught:
        make_engine(folder)
    assert "in load_weights" in str(caught.value.__cause__)
    assert not worker_processes()


def test_a_rank_that_ends_while_it_starts_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "planted", "import os; os._exit(3)")
    with pytest.raises(RuntimeError, match="rank 1 .* exited with status 3"):
        make_engine(folder)


def test_a_start_that_fails_here_kills_the_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        assert worker_processes()
        raise KeyboardInterrupt

    monkeypatch.setattr("semipd.build_model.load_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        make_engine(folder)
    assert not worker_processes()


def test_a_model_that_cannot_be_split_starts_no_process(folder: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        make_engine(folder, 3)


SCRIPT = """
import sys, time
from semipd import Engine, SamplingParams
print("script")
engine = Engine(sys.argv[1], device="cpu", dtype="float64", kv_cache_tokens=1024, tensor_parallel_size=2)
params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
print(engine.generate([[1, 2, 3]], params)[0].outputs[0].token_ids)
sys.stdout.flush()
"""


def run_script(tmp_path: Path, code: str, *command: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def model_beside(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(folder)
    return tmp_path


def test_a_script_needs_no_main_guard_and_may_leave_its_engine_open(folder: Path, model_beside: Path) -> None:
    with make_engine(folder, 1) as engine:
        token_ids = engine.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids[:5]
    assert run_script(model_beside, SCRIPT) == ["script", str(token_ids)]


def test_ranks_placed_by_torchrun_serve_one_engine_after_another(folder: Path, model_beside: Path) -> None:
    with make_engine(folder, 1) as engine:
        token_ids = engine.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids[:5]
    again = SCRIPT.replace('print("script")', "") + "engine.close()\n"
    code = again + again + "import psutil; print(len(psutil.Process().children()))\n"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "semipd.parallel.launch")
    assert run_script(model_beside, code, *launch) == [str(token_ids), str(token_ids), "0"]


def test_workers_end_with_a_killed_rank_0(model_beside: Path) -> None:
    script = model_beside / "script.py"
    script.write_text(SCRIPT + "time.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(script), str(model_beside / "model")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        (worker,) = worker_processes(process.pid)
        process.kill()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

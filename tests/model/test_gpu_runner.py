"""The GPU's runner on a CPU: its Triton kernels in the interpreter, its static memory and padding as on the device."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from semipd import Engine, SamplingParams
from semipd.build import build_core
from semipd.config import EngineConfig, MixedPolicy, Phase, PolicyConfig, StaticPolicy
from semipd.core import EngineCore, RequestLimits
from semipd.device.cpu import CpuPartitionBackend
from semipd.errors import EngineDead, RankError
from semipd.kernels import triton_ops
from semipd.kernels.ops import create_ops
from semipd.memory.block_allocator import BlockAllocator
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.gpu_runner import GpuRunner
from semipd.model.graphs import GraphKey
from semipd.model.loader import load_spec, load_weights, resolve_model
from semipd.model.step_inputs import Buckets, StepShape
from semipd.request import RequestOutput
from semipd.sched.batch import Batch, StepResult
from semipd.tokenizer import AbsentTokenizer
from tests.fakes import EagerGraphs
from tests.tiny import VOCAB, save_tiny_model

MAX_SEQS = 5
CHUNK = 24
BUDGET = 20
BLOCK_SIZE = 16
NUM_BLOCKS = 40
MAX_TOKENS = 3
FORWARDS, BACKWARDS = slice(None), slice(None, None, -1)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    save_tiny_model(tmp_path, family, dtype=torch.float32)
    return tmp_path


class SerialRunner(GpuRunner):
    """One lane's launches at a time: the interpreter replaces parts of Triton while a kernel runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()

    def _launch(self, batch: Batch, shape: StepShape) -> Callable[[], StepResult]:
        with self._lock:
            return super()._launch(batch, shape)


def gpu_engine(
    folder: Path, policy: PolicyConfig, graphs: EagerGraphs | None = None, check: Callable[[], None] = lambda: None
) -> Engine:
    """An engine whose steps run as on a GPU, over a pool full of NaN."""
    device, dtype = torch.device("cpu"), torch.float32
    config = EngineConfig(
        model=str(folder), max_num_seqs=MAX_SEQS, block_size=BLOCK_SIZE, policy=policy, dtype="float32"
    )
    source = resolve_model(str(folder))
    spec = load_spec(source)
    kv_cache = KVCache(
        layout=spec.kv_layout(dtype.itemsize), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=device
    )
    kv_cache.fill_(float("nan"))
    backend = CpuPartitionBackend()
    runner = SerialRunner(
        decoder=Decoder(spec, load_weights(source, spec, dtype=dtype, device=device), create_ops("triton")),
        sampler=CudaSampler(max_slots=MAX_SEQS, vocab_size=spec.vocab_size, device=device),
        kv_cache=kv_cache,
        backend=backend,
        graphs=graphs or EagerGraphs(),
        buckets={Phase.PREFILL: Buckets(MAX_SEQS, CHUNK), Phase.DECODE: Buckets(MAX_SEQS, BUDGET)},
        num_heads=spec.num_heads,
        max_slots=MAX_SEQS,
        max_model_len=128,
        device=device,
        check=check,
    )
    runner.warm_up({phase: [backend.num_sms] for phase in Phase})
    core = EngineCore(
        config=config,
        limits=RequestLimits(vocab_size=spec.vocab_size, max_model_len=128, eos_token_ids=spec.eos_token_ids),
        executor=runner,
        backend=backend,
        allocator=BlockAllocator(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True),
        max_prefill_tokens=CHUNK,
        window=spec.kv_layout(1).window,
    )
    return Engine.from_core(core, AbsentTokenizer())


@pytest.fixture
def host_engine(folder: Path) -> Iterator[Engine]:
    built = build_core(EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_cache_tokens=1024))
    with Engine.from_core(built.core, AbsentTokenizer()) as engine:
        yield engine


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 7, 16, 30)] + [shared + [1], shared + [2]]


@pytest.mark.parametrize(
    ("family", "policy", "orders"),
    [
        (
            "mistral",
            MixedPolicy(token_budget=BUDGET),
            (FORWARDS, BACKWARDS),
        ),  # first without, then with cached prefixes
        ("qwen3", StaticPolicy(), (BACKWARDS,)),
    ],
    ids=["mistral-mixed", "qwen3-static"],
)
@pytest.mark.timeout(300)
def test_tokens_equal_those_of_the_host_engine(
    folder: Path, host_engine: Engine, policy: PolicyConfig, orders: Sequence[slice]
) -> None:
    params = all_params()
    expected = host_engine.generate(prompts(), params)
    with gpu_engine(folder, policy) as engine:
        for order in orders:
            outputs = engine.generate(prompts()[order], params[order])
            assert [tokens(output) for output in outputs] == [tokens(output) for output in expected[order]]
        engine.check_integrity()
    check_logprobs(outputs[2], expected[3])  # of the reversed order: those that asked for them


def all_params() -> list[SamplingParams]:
    """Of `prompts`; the fourth asks for log-probabilities."""
    plain = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    drawn = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True)
    odd = SamplingParams(
        temperature=0.8,
        seed=3,
        repetition_penalty=1.3,
        logit_bias={5: 2.0},
        logprobs=2,
        prompt_logprobs=1,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
    )
    return [plain, drawn, plain, odd, plain, drawn]


def check_logprobs(mine: RequestOutput, judge: RequestOutput) -> None:
    own, expected = list(mine.outputs[0].logprobs or ()), list(judge.outputs[0].logprobs or ())
    assert len(own) == len(expected) == MAX_TOKENS
    assert mine.prompt_logprobs is not None and judge.prompt_logprobs is not None
    assert len(mine.prompt_logprobs) == len(judge.prompt_logprobs) == 30
    own += [values for values in mine.prompt_logprobs if values is not None]
    expected += [values for values in judge.prompt_logprobs if values is not None]
    for values, theirs in zip(own, expected, strict=True):
        assert list(values) == list(theirs)
        assert [value.logprob for value in values.values()] == pytest.approx(
            [value.logprob for value in theirs.values()], abs=1e-4
        )


class OneGraph(EagerGraphs):
    """Pretends that each partition has the graphs of `shapes`, and notes what is run and asked for."""

    def __init__(self) -> None:
        self.shapes: dict[tuple[Phase, int], tuple[Hashable, ...]] = {}
        self.requested: list[GraphKey] = []
        self.urgent: set[Hashable] = set()
        self.run_keys: list[GraphKey] = []

    def run(self, key: GraphKey, launch: Callable[[], None]) -> bool:
        self.run_keys.append(key)
        launch()
        return False

    def request(self, key: GraphKey, launch: Callable[[], None], *, is_urgent: bool = True) -> None:
        self.requested.append(key)
        if is_urgent:
            self.urgent.add(key.shape)

    def captured(self, phase: Phase, num_sms: int) -> Sequence[Hashable]:
        return self.shapes.get((phase, num_sms), ())


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.timeout(300)
def test_a_larger_graph_stands_in_for_one_that_is_not_captured_yet(folder: Path, host_engine: Engine) -> None:
    params = all_params()
    expected = host_engine.generate(prompts(), params)
    graphs = OneGraph()
    largest = StepShape(num_rows=MAX_SEQS + BUDGET, max_decodes=MAX_SEQS, max_chunks=MAX_SEQS)
    with gpu_engine(folder, MixedPolicy(token_budget=BUDGET), graphs) as engine:
        num_sms = CpuPartitionBackend().num_sms
        usual = set(graphs.requested)
        graphs.shapes = {(Phase.DECODE, num_sms): (largest, "a head")}
        outputs = engine.generate(prompts(), params)
    assert [tokens(output) for output in outputs] == [tokens(output) for output in expected]
    check_logprobs(outputs[3], expected[3])
    bodies = [key.shape for key in graphs.run_keys if isinstance(key.shape, StepShape)]
    assert {shape for shape in bodies if shape.max_chunks} == {largest}
    assert any(shape.num_rows < MAX_SEQS for shape in bodies if not shape.max_chunks)  # decodes as they are
    assert not usual, "asked for before the first step, whose token waits for nothing"
    asked = {key.shape for key in graphs.requested}
    assert asked.issuperset(Buckets(MAX_SEQS, BUDGET).usual(Phase.DECODE))
    assert replace(largest, num_rows=16) in graphs.urgent


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.timeout(300)
def test_steps_launch_no_kernel_that_the_warm_up_did_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[tuple[str, frozenset[tuple[str, Any]]]] = set()
    run = InterpretedFunction.run

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        launched.add((self.fn.__name__, frozenset((name, options[name]) for name in options if name.isupper())))
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    with gpu_engine(folder, MixedPolicy(token_budget=BUDGET)) as engine:
        before = set(launched)
        engine.generate(prompts()[2:4], all_params()[2:4])
    assert launched == before


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.timeout(300)
def test_every_size_is_launched_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuBLAS loads kernels by the number of rows; here only which are launched counts."""
    rows, heads = list[tuple[int, int]](), list[tuple[Phase, int, int]]()
    with gpu_engine(folder, MixedPolicy(token_budget=BUDGET)) as engine:
        runner: Any = engine._core._executor
        monkeypatch.setattr(
            runner, "_launch_layers", lambda lane, shape, num_sms, is_warm_up: rows.append((shape.num_rows, num_sms))
        )
        monkeypatch.setattr(
            runner, "_launch_head", lambda lane, size, num_sms, samples: heads.append((lane.phase, size, num_sms))
        )
        runner._launch_every_size({phase: [132, 48] for phase in Phase})
    buckets = {Phase.PREFILL: Buckets(MAX_SEQS, CHUNK), Phase.DECODE: Buckets(MAX_SEQS, BUDGET)}
    usual = {shape.num_rows for phase in Phase for shape in buckets[phase].usual(phase)}
    assert sorted(rows) == [(size, 132) for size in sorted(usual)]
    assert sorted(heads) == sorted((phase, size, 132) for phase in Phase for size in buckets[phase].heads)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.timeout(300)
def test_the_warm_up_runs_the_stream_k_gemm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that no lane starts on may want it: its kernels are loaded and its memory is there."""
    calls: set[tuple[int, bool]] = set()

    def multiply(*args: Any, num_sms: int, adds: bool) -> None:
        calls.add((args[3].partials.data_ptr(), adds))

    monkeypatch.setattr(triton_ops, "MAX_DECODE_ROWS", 8)
    monkeypatch.setattr(triton_ops, "can_stream_k", lambda *_: True)
    monkeypatch.setattr(triton_ops, "is_stream_k_ahead", lambda *_: False)
    monkeypatch.setattr(triton_ops, "num_device_sms", lambda _: 10)
    monkeypatch.setattr(triton_ops, "stream_k_gemm", multiply)
    with gpu_engine(folder, StaticPolicy()) as engine:
        scratches = {scratch for scratch, _ in calls}
        assert len(scratches) == len(Phase)
        assert calls == {(scratch, adds) for scratch in scratches for adds in (False, True)}
        calls.clear()
        engine.generate([[1, 2, 3] * 7], SamplingParams(max_tokens=1))
    assert not calls, "steps choose by what is faster"


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("family", ["llama"])
def test_steps_that_may_have_computed_garbage_end_the_engine(folder: Path) -> None:
    checks = iter(range(2))

    def check() -> None:
        if next(checks, None) is None:
            raise RankError("what was waited for did not come")

    with gpu_engine(folder, StaticPolicy(), check=check) as engine:
        stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
        with pytest.raises(EngineDead) as raised:
            stream.result(60)
    assert isinstance(raised.value.__cause__, RankError)

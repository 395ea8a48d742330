"""Logits of the engine's own steps beside float32: at most 1.5 times as far off as plain torch in bfloat16.

Contexts from 1 to 32k tokens, every share of the device, blocks and chunks of odd sizes, MIXED steps, a pool of NaN, by
launches and by graphs. Whole file: about a minute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from semipd.build_model import BuiltModel, build_model
from semipd.config import EngineConfig, MixedPolicy, Phase
from semipd.model.loader import load_spec, resolve_model
from tests.gpu.judge import SMALL, Judge, save_config
from tests.gpu.steps import Chunk, Errors, Steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

MAX_RATIO = 1.5
ROOM = 64  # tokens that a sequence goes on behind its prompt
MAX_SEQS = 72
CHUNK = 2048
BUDGET = 512
VOCAB = 8200  # the last tiles of the head are not full
# The first is what is decoded alone.
PROMPTS = (32_700, 1, 2, 15, 17, 63, 64, 65, 129, 511, 513, 1000, 2047, 4097, 8191, 16_385)
OTHERS = range(1, 300)
PREFILLED, MIXED, BROKEN = 2047, (2047, 513), 1000  # prompts of some tests

LLAMA = {
    **SMALL,
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": PROMPTS[0] + ROOM,
    "rope_theta": 500_000.0,
}
# All that Llama has not: 7 query heads for a KV head, norms of heads, biases, windows in every second layer, one matrix
# for embedding and head.
QWEN = {
    **LLAMA,
    "model_type": "qwen3",
    "num_attention_heads": 14,
    "head_dim": 64,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 700,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Case:
    """An engine."""

    model: str
    block_size: int

    def __str__(self) -> str:
        return f"{self.model}-{self.block_size}"

    @property
    def config(self) -> dict[str, Any]:
        """Of its model."""
        return LLAMA if self.model == "llama" else QWEN

    @property
    def probes(self) -> list[int]:
        """Lengths of prompts of every size, which the first slots have."""
        return [length for length in PROMPTS if self.model == "llama" or length < 5000]

    @property
    def prompts(self) -> list[int]:
        """Lengths of prompts, by slot."""
        num_others = MAX_SEQS - len(self.probes)
        return [*self.probes, *random.Random(0).choices(OTHERS, k=num_others)]

    @property
    def sequences(self) -> list[list[int]]:
        """Tokens of each slot."""
        rng = random.Random(1)
        return [rng.choices(range(VOCAB), k=length + ROOM) for length in self.prompts]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """An engine's steps, and what their logits should be."""

    case: Case
    steps: Steps
    errors: Errors
    model: BuiltModel

    @property
    def probes(self) -> list[int]:
        """Slots of contexts of every length."""
        return list(range(len(self.case.probes)))

    def fill(self, slots: Sequence[int], others: Sequence[int] = ()) -> None:
        """Have the prompts of these slots in the pool and nothing else, and room for others."""
        self.steps.open([*slots, *others])
        self.steps.fill({slot: self.case.prompts[slot] for slot in slots}, CHUNK)
        self.errors.clear()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Path, Errors]]:
    """The folder of a case's model, and its errors; once for each model."""

    @cache
    def of_model(model: str) -> tuple[Path, Errors]:
        case = Case(model, 1)
        folder = save_config(tmp_path_factory.mktemp(model), case.config)
        exact, plain = (Judge(folder, dtype, drawn_in=torch.bfloat16) for dtype in (torch.float32, torch.bfloat16))
        return folder, Errors((exact.logits(tokens), plain.logits(tokens)) for tokens in case.sequences)

    return lambda case: of_model(case.model)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, references: Callable[[Case], tuple[Path, Errors]]) -> Iterator[Bench]:
    case: Case = request.param
    folder, errors = references(case)
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cuda:0",
        policy=MixedPolicy(token_budget=BUDGET),
        block_size=case.block_size,
        max_num_seqs=MAX_SEQS,
        max_prefill_tokens=CHUNK,
        kv_cache_tokens=sum(map(len, case.sequences)) + MAX_SEQS * case.block_size,
    )
    source = resolve_model(str(folder), load_format="dummy")
    model = build_model(config, source, load_spec(source))
    runner: Any = model.executor
    steps = Steps(runner, model.kv_cache, case.sequences, model.backend.num_sms, runner._graphs.wait_until_captured)
    yield Bench(case, steps, errors, model)
    runner.close()
    model.backend.close()


def cases(*chosen: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", chosen, indirect=True, ids=str)


every_case = cases(Case("llama", 64), Case("llama", 16), Case("llama", 128), Case("llama", 1), Case("qwen", 64))
some_cases = cases(Case("llama", 64), Case("llama", 16), Case("qwen", 64))


def check(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    """All rows together, for the table too."""
    errors = bench.errors
    record_property("error / bf16's", f"{errors.ratio:.2f}")
    record_property("worst step", f"{errors.worst:.2f}")
    record_property("rows", errors.num_rows)
    assert errors.ratio <= MAX_RATIO


@every_case
def test_prompts_in_odd_chunks(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(2)
    bench.fill((), others=bench.probes)
    missing = {slot: bench.case.prompts[slot] for slot in bench.probes}
    while missing:
        chunks: list[Chunk] = []
        for slot in rng.sample(list(missing), min(4, len(missing))):
            room = CHUNK - sum(count for _, count in chunks)
            size = min(missing[slot], rng.choice((1, 3, 16, 63, 64, 65, 200, 777, CHUNK)), room)
            if size:
                chunks.append((slot, size))
                missing[slot] -= size
        missing = {slot: count for slot, count in missing.items() if count}
        bench.errors.add(bench.steps.prefill(chunks))
    check(bench, record_property)


@every_case
def test_decode_steps_of_every_size(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    slots = list(range(MAX_SEQS))
    bench.fill(slots)
    for size in (1, 2, len(bench.probes), 40, MAX_SEQS):
        for _ in range(3):
            assert bench.errors.add(bench.steps.decode(slots[:size])) <= 2 * MAX_RATIO
            bench.steps.wait_for_graphs()
    check(bench, record_property)


@some_cases
def test_decode_on_every_share(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    bench.fill(bench.probes)
    for num_sms in shares(bench, Phase.DECODE):
        for _ in range(2):
            assert bench.errors.add(bench.steps.decode(bench.probes, num_sms)) <= MAX_RATIO, f"{num_sms} SMs"
            bench.steps.wait_for_graphs()
    check(bench, record_property)


@some_cases
def test_prefill_on_every_share(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    slot = bench.case.prompts.index(PREFILLED)
    bench.errors.clear()
    for num_sms in shares(bench, Phase.PREFILL):
        for _ in range(2):
            bench.steps.open([slot])
            for size in (PREFILLED // 3, 1, PREFILLED // 2):
                ratio = bench.errors.add(bench.steps.prefill([(slot, size)], num_sms))
                assert ratio <= MAX_RATIO or size == 1, f"{num_sms} SMs"
            bench.steps.wait_for_graphs()
    check(bench, record_property)


@some_cases
def test_mixed_steps(bench: Bench, record_property: Callable[[str, object], None]) -> None:
    prompts = [bench.case.prompts.index(length) for length in MIXED]
    decoding = [slot for slot in bench.probes if slot not in prompts]
    bench.fill(decoding, others=prompts)
    for _ in range(6):
        chunks = [(slot, length // 7) for slot, length in zip(prompts, MIXED, strict=True)]
        bench.errors.add(bench.steps.decode(decoding, chunks=chunks))
        bench.steps.wait_for_graphs()
    check(bench, record_property)


@cases(Case("llama", 64))
def test_a_wrong_block_is_noticed(bench: Bench) -> None:
    slot = bench.case.prompts.index(BROKEN)
    bench.fill([slot])
    assert bench.errors.add(bench.steps.decode([slot])) <= 2 * MAX_RATIO
    bench.steps.repeat_block(slot, 1)
    assert bench.errors.add(bench.steps.decode([slot])) > 2 * MAX_RATIO


def shares(bench: Bench, phase: Phase) -> list[int]:
    """SMs that the phase can have."""
    index = list(Phase).index(phase)
    backend = bench.model.backend
    return [*sorted({split[index] for split in backend.splits}), backend.num_sms]

"""The decoder against `transformers`, and against itself under every way to cut and mix the same work.

Tiny random models in float64 and float32 on the CPU; the pool is full of NaN before the first step.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor

from semipd.kernels.ops import StepContext, create_ops
from semipd.kernels.paged_attention import AttentionMetadata, PrefillMetadata
from semipd.kernels.reference import ReferencePlan
from semipd.memory.kv_cache import KVCache
from semipd.model.decoder import Decoder
from semipd.model.families import expected_weights, parse_config
from semipd.model.spec import ModelSpec
from tests.tiny import VOCAB, tiny_config

FAMILIES = ("llama", "llama_linear", "llama_biased", "llama3", "mistral", "qwen2", "qwen2_mixed_windows", "qwen3")
# Largest error of a logit in units of the largest logit. transformers computes rotary tables in float32 always.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5}
CONTEXT = StepContext(num_sms=1)
SAME = 1e-13  # the same for two orders of one float64 computation


def config_of(family: str) -> transformers.PretrainedConfig:
    match family:
        case "llama_linear":
            config = tiny_config("llama")
            config.rope_parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
        case "llama_biased":
            config = tiny_config("llama")
            config.attention_bias = config.mlp_bias = True
        case "qwen2_mixed_windows":
            config = tiny_config("qwen2")
            config.use_sliding_window, config.sliding_window = True, 7
            config.layer_types = ["full_attention", "sliding_attention"]
        case _:
            config = tiny_config(family)
    return config


class Model:
    """A random model twice: as `transformers` has it, and as a decoder with a pool and a random block table."""

    def __init__(self, family: str, dtype: torch.dtype, *, block_size: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = config_of(family)
        self.reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        with torch.no_grad():
            for parameter in self.reference.parameters():  # larger than the default, or all logits are nearly equal
                parameter.normal_(0.0, 0.3 if parameter.dim() > 1 else 0.1)
        self.reference.eval()
        self.spec: ModelSpec = parse_config(config.to_dict())
        names = expected_weights(self.spec)
        weights = {name: value for name, value in self.reference.state_dict().items() if name in names}
        self.decoder = Decoder(self.spec, weights, create_ops("reference"))
        assert not weights
        self.block_size = block_size
        layout = self.spec.kv_layout(dtype.itemsize)
        self.cache = KVCache(layout=layout, num_blocks=200, block_size=block_size, dtype=dtype, device="cpu")
        self.cache.fill_(math.nan)
        self._free = list(range(200))
        random.Random(seed).shuffle(self._free)

    def expected(self, tokens: Sequence[int]) -> Tensor:
        """Logits of every position, `[T, V]`."""
        with torch.inference_mode():
            logits: Tensor = self.reference(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits

    def new_request(self, length: int) -> list[int]:
        """A block table for `length` tokens."""
        return [self._free.pop() for _ in range(-(-length // self.block_size))]

    @torch.inference_mode()
    def step(
        self,
        decodes: Sequence[tuple[list[int], int, int]] = (),
        chunks: Sequence[tuple[list[int], int, Sequence[int]]] = (),
    ) -> Tensor:
        """Logits of all rows. A decode is (table, position, token), a chunk (table, start, tokens)."""
        rows = [(table, position, token) for table, position, token in decodes]
        prefills = []
        for table, start, tokens in chunks:
            prefills.append(
                PrefillMetadata(
                    row_start=len(rows),
                    num_rows=len(tokens),
                    start_position=start,
                    block_table_N=torch.tensor(table),
                )
            )
            rows += [(table, start + index, token) for index, token in enumerate(tokens)]
        width = max((len(table) for table, _, _ in decodes), default=0)
        tables = [table + [0] * (width - len(table)) for table, _, _ in decodes]
        size = self.block_size
        metadata = AttentionMetadata(
            slot_mapping_T=torch.tensor([table[at // size] * size + at % size for table, at, _ in rows]),
            num_decodes=len(decodes),
            decode_block_table_BN=torch.tensor(tables, dtype=torch.int64).view(len(decodes), width),
            decode_context_lens_B=torch.tensor([position + 1 for _, position, _ in decodes], dtype=torch.int64),
            prefills=tuple(prefills),
        )
        token_ids = torch.tensor([token for _, _, token in rows])
        positions = torch.tensor([position for _, position, _ in rows])
        plan = ReferencePlan(positions, metadata, self.cache.kv_LPS2KH, self.decoder.attention)
        return self.decoder.compute_logits(self.decoder.forward(token_ids, plan, CONTEXT), CONTEXT)


def random_tokens(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_equal_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    model = Model(family, dtype)
    tokens = random_tokens(40)  # longer than every window
    table = model.new_request(40)
    expected = model.expected(tokens)

    prefilled = model.step(chunks=[(table, 0, tokens[:25])])
    decoded = [model.step(decodes=[(table, at, tokens[at])]) for at in range(25, 40)]

    assert prefilled.dtype == dtype
    assert relative_error(torch.cat([prefilled, *decoded]), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_transformers_is(dtype: torch.dtype) -> None:
    exact, half = Model("llama", torch.float64), Model("llama", dtype)
    tokens = random_tokens(30)
    expected = exact.expected(tokens)
    logits = half.step(chunks=[(half.new_request(30), 0, tokens)])
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < 1.5 * relative_error(half.expected(tokens), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2_mixed_windows"])
@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_every_cut_of_a_prompt_gives_the_same_logits(family: str, block_size: int) -> None:
    model = Model(family, torch.float64, block_size=block_size)
    tokens = random_tokens(20)
    whole = model.step(chunks=[(model.new_request(20), 0, tokens)])
    for cut in range(1, 20):
        model.cache.fill_(math.nan)
        table = model.new_request(20) if block_size > 1 else list(range(30, 50))
        parts = [model.step(chunks=[(table, 0, tokens[:cut])]), model.step(chunks=[(table, cut, tokens[cut:])])]
        assert relative_error(torch.cat(parts), whole) < SAME
        model._free += table if block_size > 1 else []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_mixed_step_equals_separate_steps(family: str) -> None:
    prompts = [random_tokens(length, seed=length) for length in (5, 17, 30)]
    chunk = random_tokens(9, seed=1)

    def prefilled() -> tuple[Model, list[list[int]]]:
        model = Model(family, torch.float64)
        tables = [model.new_request(40) for _ in prompts]
        for table, prompt in zip(tables, prompts, strict=True):
            model.step(chunks=[(table, 0, prompt)])
        return model, tables

    model, tables = prefilled()
    decodes = [(table, len(prompt), 7) for table, prompt in zip(tables, prompts, strict=True)]
    new_table = model.new_request(9)
    mixed = model.step(decodes=decodes, chunks=[(new_table, 0, chunk[:4]), (tables[0], 6, chunk[4:])])

    model, tables = prefilled()
    separate = [model.step(decodes=[decode]) for decode in decodes]
    separate += [model.step(chunks=[(model.new_request(9), 0, chunk[:4])])]
    separate += [model.step(chunks=[(tables[0], 6, chunk[4:])])]
    assert relative_error(mixed, torch.cat(separate)) < SAME


def test_two_lanes_may_run_the_decoder_at_once() -> None:
    model = Model("llama", torch.float64)
    tokens = random_tokens(60)
    expected = model.step(chunks=[(model.new_request(60), 0, tokens)])
    tables = [model.new_request(60) for _ in range(2)]
    results: dict[int, Tensor] = {}

    def run(lane: int) -> None:
        table = tables[lane]
        cut = 10 if lane == 0 else 50
        parts = [model.step(chunks=[(table, 0, tokens[:cut])])]
        parts += [model.step(decodes=[(table, at, tokens[at])]) for at in range(cut, 60)]
        results[lane] = torch.cat(parts)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lane in range(2):
        assert relative_error(results[lane], expected) < SAME


def test_steps_are_exactly_repeatable() -> None:
    model = Model("llama3", torch.float32)
    tokens = random_tokens(33)
    table = model.new_request(33)
    first = model.step(chunks=[(table, 0, tokens)])
    assert torch.equal(first, model.step(chunks=[(table, 0, tokens)]))


@pytest.mark.parametrize(("family", "layers"), [("llama", [0]), ("mistral", [0]), ("qwen2_mixed_windows", [0, 1])])
def test_a_warm_up_is_a_step_through_one_layer_of_each_window(
    family: str, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(family, torch.float32)
    monkeypatch.setattr(model.decoder, "forward", model.decoder.warm_up)
    model.step(chunks=[(model.new_request(5), 0, random_tokens(5))])
    written = [layer for layer, kv_PS2KH in enumerate(model.cache.kv_LPS2KH) if not kv_PS2KH.isnan().all()]
    assert written == layers and model.spec.num_layers == 2


def test_weights_that_do_not_belong_are_our_bug() -> None:
    model = Model("llama", torch.float32)
    weights = {name: torch.zeros(shape) for name, shape in expected_weights(model.spec).items()}
    weights["lm_head.weight"] = torch.zeros(VOCAB, 32)
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        Decoder(model.spec, weights, create_ops("reference"))

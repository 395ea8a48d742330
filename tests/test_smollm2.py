"""SmolLM2-135M-Instruct against `transformers` on the same dequantised weights, in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from semipd import Engine, SamplingParams
from semipd.model.loader import load_spec, load_weights, resolve_model

NUM_TOKENS = 24
TIE = 1e-3  # float32 may order two logits that are nearer than this either way (design: the float32 rule)

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "Il était une fois",
    "こんにちは、",
    "1, 1, 2, 3, 5, 8,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name FROM users WHERE",
    "   ",
    "🙂🙂🙂",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,",
]
LENGTHS = [1, 2, 15, 16, 17, 255, 700, 1500]


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> PreTrainedModel:
    """The judge: a transformers model that holds the weights that semipd loads.

    That these equal transformers' own reading of the file is a test of the loader.
    """
    source = resolve_model(str(smollm2_path))
    spec = load_spec(source)
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=spec.max_position_embeddings,
        rope_theta=spec.rope_theta,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        judge = transformers.LlamaForCausalLM(config)
    weights = load_weights(source, spec, torch.float32, "cpu")
    judge.load_state_dict(weights, strict=False, assign=True)
    judge.tie_weights()
    judge.model.rotary_emb = type(judge.model.rotary_emb)(config)  # its buffer was made on the meta device
    assert not any(parameter.is_meta for parameter in judge.parameters())
    return judge.eval()


def test_greedy_tokens_equal_transformers(smollm2_path: Path, model: PreTrainedModel) -> None:
    rng = random.Random(0)
    with Engine(str(smollm2_path), dtype="float32", kv_cache_tokens=16_384) as engine:
        prompts = [engine.tokenizer.encode(text) for text in TEXTS]
        prompts += [[rng.randrange(20, 49_000) for _ in range(length)] for length in LENGTHS]
        assert len(prompts) == 20
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        engine.check_integrity()
        texts = [engine.tokenizer.decode(output.outputs[0].token_ids) for output in outputs]
    num_ties = 0
    for prompt, output, text in zip(prompts, outputs, texts, strict=True):
        (result,) = output.outputs
        num_ties += _assert_greedy(model, prompt, result.token_ids)
        assert result.text == text
    assert num_ties <= 2, "near ties are rare; this many mean a numerical difference"


def _assert_greedy(model: PreTrainedModel, prompt: Sequence[int], token_ids: Sequence[int]) -> int:
    """Each token is the judge's own choice after the tokens before it; returns how many were decided by a near tie."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *token_ids[:-1]]]), logits_to_keep=len(token_ids)).logits[0]
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    best = logits.max(1).values
    assert (best - chosen).max() < TIE, f"a token is not the best one: prompt of {len(prompt)} tokens"
    return int((best != chosen).sum())


def test_text_equals_transformers_generate(smollm2_path: Path, model: PreTrainedModel) -> None:
    prompt = "Gravity is"
    with Engine(str(smollm2_path), dtype="float32", kv_cache_tokens=1024, max_model_len=1024) as engine:
        (output,) = engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24))
        ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=2, pad_token_id=2
        )[0, ids.shape[1] :].tolist()
        assert list(output.outputs[0].token_ids) == expected
        assert output.outputs[0].text == engine.tokenizer.decode(expected)

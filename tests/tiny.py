"""Tiny random models of every family as real checkpoints, with `transformers` as the independent judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel

VOCAB = 256
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 255,
    "pad_token_id": None,
}
WINDOW = 11


def tiny_config(family: str) -> transformers.PretrainedConfig:
    """A configuration of `family`: llama, llama3, mistral, qwen2 or qwen3."""
    match family:
        case "llama":
            return transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True)
        case "llama3":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
            return transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=False, rope_parameters=rope)
        case "mistral":
            return transformers.MistralConfig(**_SHAPE, sliding_window=WINDOW, tie_word_embeddings=False)
        case "qwen2":
            return transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=False)
        case "qwen3":
            return transformers.Qwen3Config(**_SHAPE, tie_word_embeddings=True)
    raise AssertionError(family)


def save_tiny_model(folder: Path, family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Write a random checkpoint with a byte tokenizer to `folder`; returns the model that wrote it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, or all logits are nearly equal
            parameter.normal_(0.0, 0.3 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    model.eval()
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return model


def save_byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The naive loop: the whole context again for every token, no cache, no batch."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]

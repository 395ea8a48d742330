"""Engines put together from a config: a tokenizer that is not the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd import Engine, RequestError
from semipd.build import build_core
from semipd.config import EngineConfig
from tests.tiny import VOCAB, save_byte_tokenizer, save_tiny_model

END = "<|end|>"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a tokenizer that ends texts with a token which that model does not have."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    model.mkdir()
    tokenizer.mkdir()
    save_tiny_model(model, "llama")
    save_byte_tokenizer(tokenizer)
    added = {str(VOCAB): {"content": END, "special": True}}
    config = {"added_tokens_decoder": added, "eos_token": END}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return model, tokenizer


@pytest.fixture
def engine(folders: tuple[Path, Path]) -> Iterator[Engine]:
    model, tokenizer = folders
    with Engine(str(model), tokenizer=str(tokenizer), device="cpu", kv_cache_tokens=256) as engine:
        yield engine


def test_an_end_that_the_model_cannot_generate_is_no_end(engine: Engine) -> None:
    assert engine.tokenizer.eos_token_ids == {VOCAB}
    (output,) = engine.generate("a", {"temperature": 0.0, "max_tokens": 8, "min_tokens": 8})
    assert len(output.outputs[0].token_ids) == 8
    engine.check_integrity()


def test_a_bad_word_that_the_model_cannot_generate_hurts_nobody(engine: Engine) -> None:
    for words in ([END], ["a" + END]):
        with pytest.raises(RequestError, match=f"bad_words, as encoded, holds {VOCAB}; expected token ids from 0 to"):
            engine.generate("a", {"bad_words": words})
    assert engine.generate("a", {"max_tokens": 2, "bad_words": ["b"]})[0].finished


def test_a_tokenizer_of_the_hub_is_fetched_without_weights(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model, tokenizer = folders
    patterns: list[str] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("org/70B", None)
        patterns.extend(allow_patterns)
        return str(tokenizer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    built = build_core(EngineConfig(model=str(model), tokenizer="org/70B", device="cpu", kv_cache_tokens=256))
    built.core.close()
    assert "tokenizer.json" in patterns
    assert not [pattern for pattern in patterns if "safetensors" in pattern]

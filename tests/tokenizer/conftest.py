"""Small tokenizers of every kind that the package decodes, and a writer of model folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

MARK = "\u2581"
WORDS = [
    "h",
    "e",
    "l",
    "o",
    "he",
    "ll",
    "hell",
    "hello",
    MARK,
    f"{MARK}h",
    f"{MARK}hello",
    "w",
    "日",
    "本",
    "\n",
    "é",
    "<",
    "0x",
]


def make_byte_level() -> Tokenizer:
    """Every byte and a few merges, two of which cut a character apart; special, plain and non-alphabet added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("æ", "Ĺ"), ("o", "æ"), ("¥", "æ")]
    vocab = {token: i for i, token in enumerate([*letters, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("naïve"), AddedToken("日本 語")])
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|é|>"])
    return tokenizer


def make_sentencepiece(*, has_prefix_space: bool = True) -> Tokenizer:
    """Llama's shape: U+2581 for spaces, byte tokens, and maybe a space put before a text, and dropped again."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *WORDS])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (MARK, "hello"), (MARK, "h")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    to_mark = normalizers.Replace(" ", MARK)
    steps: list[Any] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), to_mark]) if has_prefix_space else to_mark
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("  two spaces", normalized=False)])
    return tokenizer


def make_metaspace(prepend_scheme: str = "always") -> Tokenizer:
    """A Unigram vocabulary with Metaspace on both sides."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -float(i)) for i, word in enumerate(WORDS, 1))], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<s>", f"a{MARK}b c"])
    return tokenizer


def make_word_level() -> Tokenizer:
    """Whole words and no decoder: the library joins tokens with spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "日": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": make_byte_level,
    "sentencepiece": make_sentencepiece,
    "sentencepiece_no_prefix": lambda: make_sentencepiece(has_prefix_space=False),
    "metaspace": make_metaspace,
    "metaspace_never": lambda: make_metaspace("never"),
    "word_level": make_word_level,
}


@pytest.fixture(scope="session", params=sorted(BACKENDS))
def any_backend(request: pytest.FixtureRequest) -> Tokenizer:
    """One backend of each kind of decoder."""
    name: str = request.param
    return BACKENDS[name]()


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return make_byte_level()


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return make_sentencepiece()


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """A writer of model folders: the backend as tokenizer.json, and each `name__suffix` as that file."""

    def write(backend: Tokenizer, **files: object) -> Path:
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            file = tmp_path / name.replace("__", ".")
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write

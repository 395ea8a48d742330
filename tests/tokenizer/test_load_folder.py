"""Tokenizers from model folders: which file says what, and errors that name what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from semipd.errors import RequestError, WeightsError
from semipd.tokenizer import load_tokenizer

WriteFolder = Callable[..., Path]


def copy(backend: Backend) -> Backend:
    return Backend.from_str(backend.to_str())


def with_bos(backend: Backend) -> Backend:
    """A copy whose post-processor puts <|begin|> before and <|end|> after a text."""
    backend = copy(backend)
    special = [(token, backend.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
    backend.post_processor = processors.TemplateProcessing("<|begin|> $A <|end|>", special_tokens=special)
    return backend


def test_ids_and_text_are_those_of_the_tokenizer_json(byte_level: Backend, write_folder: WriteFolder) -> None:
    tokenizer = load_tokenizer(write_folder(byte_level))
    text = "hello <tool> 日本 語 世界\n\n  😀<|end|>"
    ids = tokenizer.encode(text)
    assert ids == byte_level.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removesuffix("<|end|>")
    assert tokenizer.vocab_size == byte_level.get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, frozenset())


def test_truncation_and_padding_of_the_training_are_dropped(byte_level: Backend, write_folder: WriteFolder) -> None:
    backend = copy(byte_level)
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    text = "hello hello hello"
    assert load_tokenizer(write_folder(backend)).encode(text) == byte_level.encode(text).ids


def test_the_post_processor_says_what_is_added(byte_level: Backend, write_folder: WriteFolder) -> None:
    backend = with_bos(byte_level)
    tokenizer = load_tokenizer(write_folder(backend))
    for text in ("hello", "", "日本"):
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=False) == byte_level.encode(text).ids


def test_the_configuration_outranks_the_post_processor(byte_level: Backend, write_folder: WriteFolder) -> None:
    begin, end = (byte_level.token_to_id(token) for token in ("<|begin|>", "<|end|>"))
    hello = byte_level.encode("hello").ids
    config: dict[str, object] = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "__type": "AddedToken"}}
    folder = write_folder(with_bos(byte_level), tokenizer_config__json={**config, "add_bos_token": False})
    assert load_tokenizer(folder).encode("hello") == hello
    folder = write_folder(byte_level, tokenizer_config__json={**config, "add_bos_token": True})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hello") == [begin, *hello]
    assert (tokenizer.bos_token_id, *tokenizer.eos_token_ids) == (begin, end)
    folder = write_folder(byte_level, tokenizer_config__json={**config, "add_eos_token": True})
    assert load_tokenizer(folder).encode("hello") == [*hello, end]


@pytest.mark.parametrize(("given", "expected"), [(1, {1, 7}), ([1, 2], {1, 2, 7}), (None, {7})])
def test_eos_ids_are_the_tokenizers_and_the_generation_configs(
    byte_level: Backend, write_folder: WriteFolder, given: object, expected: set[int]
) -> None:
    special = byte_level.token_to_id("<|end|>")
    folder = write_folder(
        byte_level,
        special_tokens_map__json={"eos_token": "<|end|>"},
        generation_config__json={"eos_token_id": given},
    )
    assert load_tokenizer(folder).eos_token_ids == {special if token == 7 else token for token in expected}


@pytest.mark.parametrize("given", ["<|end|>", 1.5, [1, "2"], [[1]], {"id": 1}])
def test_eos_ids_that_are_no_token_ids_are_refused(
    byte_level: Backend, write_folder: WriteFolder, given: object
) -> None:
    folder = write_folder(byte_level, generation_config__json={"eos_token_id": given})
    with pytest.raises(WeightsError, match=r"generation_config.json has the eos_token_id .*; expected a token id"):
        load_tokenizer(folder)


def test_tokens_that_only_the_configuration_knows_are_added(byte_level: Backend, write_folder: WriteFolder) -> None:
    new = byte_level.get_vocab_size()
    entry = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False}
    tokenizer = load_tokenizer(write_folder(byte_level, tokenizer_config__json={"added_tokens_decoder": {new: entry}}))
    assert tokenizer.encode("<|new|>") == [new]
    assert tokenizer.vocab_size == new + 1
    assert tokenizer.decode([new]) == ""


def test_contradicting_ids_are_refused(byte_level: Backend, write_folder: WriteFolder) -> None:
    folder = write_folder(byte_level, tokenizer_config__json={"added_tokens_decoder": {"5": {"content": "<|end|>"}}})
    with pytest.raises(WeightsError, match=r"gives '<\|end\|>' the id 5, tokenizer.json \d+; take both files"):
        load_tokenizer(folder)


def test_an_eos_token_without_id_is_refused(byte_level: Backend, write_folder: WriteFolder) -> None:
    folder = write_folder(byte_level, tokenizer_config__json={"eos_token": "<nope>"})
    with pytest.raises(WeightsError, match="names '<nope>' as eos_token, which its tokenizer.json does not know"):
        load_tokenizer(folder)


def test_the_chat_template_file_outranks_the_configuration(byte_level: Backend, write_folder: WriteFolder) -> None:
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "default", "template": "config {{ eos_token }}"}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(byte_level, tokenizer_config__json={"chat_template": named, "eos_token": "<|end|>"})
    assert load_tokenizer(folder).render_chat(messages) == "config <|end|>"
    assert load_tokenizer(folder).render_chat(messages, tools=[{}]) == "tools"
    folder = write_folder(byte_level, chat_template__json={"chat_template": "json"})
    assert load_tokenizer(folder).render_chat(messages) == "json"
    folder = write_folder(byte_level, chat_template__jinja="file é")
    assert load_tokenizer(folder).render_chat(messages) == "file é"


def test_a_folder_without_tokenizer_json_is_refused_by_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no tokenizer.json \(it has nothing\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"\(it has config.json, tokenizer.model\).*save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match="does not exist; expected a folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_malformed_files_are_refused_by_name(byte_level: Backend, write_folder: WriteFolder) -> None:
    with pytest.raises(WeightsError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(write_folder(byte_level, tokenizer_config__json="{"))
    with pytest.raises(WeightsError, match="tokenizer_config.json holds a list; expected an object"):
        load_tokenizer(write_folder(byte_level, tokenizer_config__json=[]))
    with pytest.raises(WeightsError, match="tokenizer.json is not a tokenizer that `tokenizers` can read"):
        load_tokenizer(write_folder(byte_level, tokenizer__json="{}"))


def test_text_that_is_not_unicode_is_refused(byte_level: Backend, write_folder: WriteFolder) -> None:
    tokenizer = load_tokenizer(write_folder(byte_level))
    for text in ("\ud800", None, ["hello"]):
        with pytest.raises(RequestError, match="expected a str without lone surrogates"):
            tokenizer.encode(text)  # type: ignore[arg-type]


def test_bad_words_have_a_sequence_with_and_without_a_space_before(
    byte_level: Backend, sentencepiece: Backend, write_folder: WriteFolder
) -> None:
    tokenizer = load_tokenizer(write_folder(byte_level))
    bare, spaced = byte_level.token_to_id("hello"), byte_level.token_to_id("Ġhello")
    assert tokenizer.encode_bad_words(["hello", " hello"]) == ((bare,), (spaced,)) * 2
    # " o" is two tokens, the second of which is that of "o": the first sequence covers it.
    assert tokenizer.encode_bad_words(["o"]) == ((byte_level.token_to_id("o"),),)
    assert tokenizer.encode_bad_words([]) == ()
    with pytest.raises(RequestError, match="bad word '  ' has no tokens"):
        tokenizer.encode_bad_words(["  "])
    tokenizer = load_tokenizer(write_folder(sentencepiece))
    assert tokenizer.encode_bad_words(["hello"]) == ((sentencepiece.token_to_id("\u2581hello"),),)

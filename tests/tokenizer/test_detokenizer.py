"""The parts of an incremental decode join to the decode of all ids, for any ids and every kind of decoder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from semipd.errors import WeightsError
from semipd.tokenizer import Tokenizer
from semipd.tokenizer.adapter import BackendTokenizer
from semipd.tokenizer.chat import ChatTemplates


def wrap(backend: Backend) -> Tokenizer:
    return BackendTokenizer(backend, chat=ChatTemplates({}, {}))


def id_of(backend: Backend, token: str) -> int:
    token_id = backend.token_to_id(token)
    assert token_id is not None
    return token_id


def parts(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True, continues_text: bool = False) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, continues_text=continues_text)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(data=st.data(), skip=st.booleans())
def test_parts_join_to_the_full_decode(any_backend: Backend, data: st.DataObject, skip: bool) -> None:
    tokenizer = wrap(any_backend)
    beyond = tokenizer.vocab_size + 2  # a model's vocabulary may be padded; those ids have no text
    ids = data.draw(st.lists(st.integers(0, beyond), max_size=40))
    assert "".join(parts(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data(), skip=st.booleans())
def test_byte_runs_join_to_the_full_decode(sentencepiece: Backend, data: st.DataObject, skip: bool) -> None:
    tokenizer = wrap(sentencepiece)
    ids = data.draw(st.lists(st.one_of(st.integers(3 + 0x80, 3 + 0xF4), st.integers(0, 4)), max_size=12))
    assert "".join(parts(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30))
def test_text_survives_encoding_and_incremental_decoding(byte_level: Backend, text: str) -> None:
    tokenizer = wrap(byte_level)
    ids = tokenizer.encode(text)
    assert "".join(parts(tokenizer, ids, skip=False)) == text


@given(data=st.data(), skip=st.booleans())
def test_a_continuation_joins_to_the_decode_after_a_prompt(
    any_backend: Backend, data: st.DataObject, skip: bool
) -> None:
    tokenizer = wrap(any_backend)
    prompt = [id_of(any_backend, "hello")]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=20))
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    text = "".join(parts(tokenizer, ids, skip=skip, continues_text=True))
    assert tokenizer.decode(prompt, skip_special_tokens=skip) + text == whole


def test_a_character_comes_with_its_last_byte(byte_level: Backend) -> None:
    tokenizer = wrap(byte_level)
    ids = [id_of(byte_level, char) for char in ("o", "æ", "Ĺ", "¥")]  # o, then the three bytes of U+65E5
    assert parts(tokenizer, ids) == ["o", "", "", "日", ""]


def test_an_unfinished_character_ends_as_a_replacement_character(byte_level: Backend) -> None:
    tokenizer = wrap(byte_level)
    ids = [id_of(byte_level, char) for char in ("o", "æ", "Ĺ")]
    assert parts(tokenizer, ids) == ["o", "", "", "\ufffd"]


def test_an_impossible_byte_does_not_hold_text_back(byte_level: Backend) -> None:
    tokenizer = wrap(byte_level)
    ids = [id_of(byte_level, char) for char in ("æ", "h", "ÿ", "e")]
    assert parts(tokenizer, ids) == ["", "\ufffdh", "\ufffd", "e", ""]


def test_a_run_of_byte_tokens_comes_when_it_ends(sentencepiece: Backend) -> None:
    tokenizer = wrap(sentencepiece)
    smile = [3 + byte for byte in "😀".encode()]
    hello, end = id_of(sentencepiece, "hello"), id_of(sentencepiece, "</s>")
    assert parts(tokenizer, [*smile, end, hello]) == ["", "", "", "", "", "😀hello", ""]


def test_the_prefix_space_is_dropped_at_the_start_of_a_text_only(sentencepiece: Backend) -> None:
    tokenizer = wrap(sentencepiece)
    ids = [id_of(sentencepiece, "\u2581hello")] * 2
    assert parts(tokenizer, ids) == ["hello", " hello", ""]
    assert parts(tokenizer, ids, continues_text=True) == [" hello", " hello", ""]


def test_special_tokens_are_left_out_unless_wanted(byte_level: Backend) -> None:
    tokenizer = wrap(byte_level)
    ids = tokenizer.encode("hello<|end|><tool>")
    assert "".join(parts(tokenizer, ids, skip=True)) == "hello<tool>"
    assert "".join(parts(tokenizer, ids, skip=False)) == "hello<|end|><tool>"


def test_token_text_is_what_the_token_reads_as_inside_a_text(byte_level: Backend, sentencepiece: Backend) -> None:
    tokenizer = wrap(byte_level)
    texts = [tokenizer.token_text(id_of(byte_level, token)) for token in ("Ġhello", "æ", "<|end|>", "日本 語")]
    assert texts == [" hello", "\ufffd", "<|end|>", "日本 語"]
    assert tokenizer.token_text(tokenizer.vocab_size) == ""
    tokenizer = wrap(sentencepiece)
    texts = [tokenizer.token_text(id_of(sentencepiece, token)) for token in ("\u2581h", "<0x0A>", "<0xE6>", "</s>")]
    assert texts == [" h", "\n", "\ufffd", "</s>"]
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
    ],
)
def test_a_decoder_that_cannot_go_token_by_token_is_refused(decoder: decoders.Decoder) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoder
    with pytest.raises(WeightsError, match="cannot be decoded token by token; expected ByteLevel"):
        wrap(backend)

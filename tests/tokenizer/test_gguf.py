"""Tokenizers from GGUF files: against the original SmolLM2, and against SentencePiece's rule written down here."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from semipd.errors import WeightsError
from semipd.tokenizer import Tokenizer, load_tokenizer

MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# No piece can be made of two overlapping pairs: merge ranks and SentencePiece would take them in different order.
PIECES = {MARK: -1.5, "a": -9.0, "b": -9.5, "c": -9.7, f"{MARK}a": -3.0, "ab": -2.0, f"{MARK}ab": -2.5, "bc": -1.0}
PIECES |= {"abc": -4.0, "ca": -0.5, f"{MARK}c": -6.0, "é": -7.0, MARK * 2: -8.0}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WriteGGUF = Callable[..., Path]


@pytest.fixture(scope="module")
def write_gguf(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    """A writer of GGUF files with these tokenizer keys and no tensors; None leaves a key out."""

    def write(**keys: Any) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in keys.items():
            name = "tokenizer." + ("" if key.startswith("chat_template") else "ggml.") + key.replace("__", ".")
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif value is not None:
                writer.add_string(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


def write_sentencepiece(write_gguf: WriteGGUF, **keys: Any) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<tool>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED]
    scores = [0.0] * (3 + 256) + list(PIECES.values()) + [0.0]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vocabulary = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    return write_gguf(**(vocabulary | ids | keys))


@pytest.fixture(scope="module")
def spm(write_gguf: WriteGGUF) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(write_gguf))


def sentencepiece_tokens(text: str) -> list[str]:
    """SentencePiece's BPE: always join the neighbours that make the best-scored piece, the leftmost of equals."""
    symbols = list((MARK + text).replace(" ", MARK)) if text else []
    while True:
        joins = [(PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not joins:
            break
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [token for s in symbols for token in ([s] if s in PIECES else [BYTES[b] for b in s.encode()])]


@given(text=st.text("abc éx😀", max_size=20))
def test_sentencepiece_ids_are_those_of_its_rule(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special_tokens=False)
    assert [spm.token_text(i) if i > 258 else BYTES[i - 3] for i in ids] == [
        token.replace(MARK, " ") for token in sentencepiece_tokens(text)
    ]
    assert spm.decode(ids) == text


def test_a_sentencepiece_prompt_begins_with_bos_unless_the_file_says_no(spm: Tokenizer, write_gguf: WriteGGUF) -> None:
    ids = spm.encode("ab", add_special_tokens=False)
    assert spm.encode("ab") == [1, *ids]
    assert (spm.bos_token_id, *spm.eos_token_ids) == (1, 2)
    tokenizer = load_tokenizer(write_sentencepiece(write_gguf, add_bos_token=False, add_eos_token=True))
    assert tokenizer.encode("ab") == [*ids, 2]


def test_special_and_user_defined_tokens_in_text_are_whole(spm: Tokenizer) -> None:
    ids = spm.encode("ab</s><tool>")
    assert [spm.token_text(i) for i in ids] == ["<s>", " ab", "</s>", "<tool>"]
    assert spm.decode(ids) == "ab<tool>"


def test_without_a_space_prefix_text_is_taken_as_it_is(write_gguf: WriteGGUF) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(write_gguf, add_space_prefix=False))
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_every_end_token_and_template_of_the_file_is_known(write_gguf: WriteGGUF) -> None:
    path = write_sentencepiece(
        write_gguf,
        eot_token_id=5,
        eom_token_id=6,
        chat_template="{{ bos_token }}{{ eos_token }}{{ unk_token }}",
        chat_template__tool_use="tools",
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token_ids == {2, 5, 6}
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "<s></s><unk>"
    assert tokenizer.render_chat(messages, tools=[{}]) == "tools"


# ---- byte level


def write_byte_level(write_gguf: WriteGGUF, pre: str | None) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "123 4", "Ġ Ġ", "Ġ 1", "Ã ©"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>", "unreachable", "[PAD264]"]
    types = [*[NORMAL] * (len(letters) + len(merges)), CONTROL, NORMAL, UNUSED]
    ids = {"bos_token_id": 262, "eos_token_id": 262}
    return write_gguf(model="gpt2", pre=pre, tokens=tokens, token_type=types, merges=merges, **ids)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("gpt-2", "12  1", ["12", " ", " 1"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("smollm", "12  1", ["1", "2", "  ", "1"]),
        ("starcoder", "12  1", ["1", "2", "  ", "1"]),
        ("llama-bpe", "1234 1", ["<|end|>", "123", "4", " ", "1"]),
        ("llama-bpe", "unreachable", ["<|end|>", "unreachable"]),
        ("llama3", "12  1", ["<|end|>", "12", " ", " ", "1"]),
        ("qwen2", "1234 1", ["1", "2", "3", "4", " ", "1"]),
        ("qwen2", unicodedata.normalize("NFD", "é"), ["é"]),
        ("tekken", "1234", ["<|end|>", "1", "2", "3", "4"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_original(
    write_gguf: WriteGGUF, pre: str, text: str, expected: list[str]
) -> None:
    tokenizer = load_tokenizer(write_byte_level(write_gguf, pre))
    assert [tokenizer.token_text(i) for i in tokenizer.encode(text)] == expected


def test_merges_are_not_ignored_where_the_original_heeds_them(write_gguf: WriteGGUF) -> None:
    tokenizer = load_tokenizer(write_byte_level(write_gguf, "gpt-2"))
    assert len(tokenizer.encode("unreachable")) == len("unreachable")


def test_unused_tokens_have_no_text(write_gguf: WriteGGUF) -> None:
    tokenizer = load_tokenizer(write_byte_level(write_gguf, "llama-bpe"))
    assert tokenizer.vocab_size == 264
    assert tokenizer.decode([264]) == tokenizer.token_text(264) == ""
    assert 264 not in tokenizer.encode("[PAD264]")


@pytest.mark.parametrize("pre", [None, "default", "jais"])
def test_an_unknown_pre_tokenizer_is_refused(write_gguf: WriteGGUF, pre: str | None) -> None:
    with pytest.raises(WeightsError, match=f"pre is {pre!r}; expected one of gpt-2, .*; give tokenizer="):
        load_tokenizer(write_byte_level(write_gguf, pre))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected gpt2 or llama"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens, so no vocabulary"),
        ({"scores": None}, "does not fit together"),
        ({"token_type": [NORMAL]}, "does not fit together"),
        ({"tokens": ["a", "a", "b"]}, "lists 1 tokens twice"),
        ({"bos_token_id": 3}, "has bos token 3, but 3 tokens"),
        ({"bos_token_id": None}, "adds bos to a prompt but names no bos token"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a x"]}, "does not fit together"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(write_gguf: WriteGGUF, keys: dict[str, Any], said: str) -> None:
    vocabulary = {"model": "llama", "tokens": ["a", "b", "ab"], "token_type": [NORMAL] * 3, "bos_token_id": 0}
    with pytest.raises(WeightsError, match=said):
        load_tokenizer(write_gguf(**(vocabulary | {"scores": [0.0, -1.0, -2.0]} | keys)))


# ---- the file format


# ---- SmolLM2

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': [x ** 2, 1e-3]}\n\n\tif x != None: pass  # 100%\r\n",
    "Привет, 世界! नमस्ते 안녕 مرحبا é e\u0301 \ufb01 \u00a0x\u3000y",
    "👩‍👩‍👧‍👦 🎉🏳️‍🌈",
    " leading, trailing  and   runs    of      space   ",
    "it's we'll I'D they've  ",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x<|endoftext|>",
    "3.14159 1,000,000 ²½ ٣ x1y2",
    "\n\n\n \n\t\t",
    "",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|im_end|> 😀"},
        {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:
    """The tokenizer that transformers makes of the same file, its splitting mended.

    transformers 5.23 has no entry for the pre-tokenizer "smollm" and leaves GPT-2's. The original model's
    tokenizer.json cuts digits out one by one first, which shows where several spaces stand before a digit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("a  1", [81, 256, 33]),
    ],
)
def test_smollm2_ids_are_those_of_the_original(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Tokenizer, oracle: Any, text: str) -> None:
    ids = smollm2.encode(text)
    assert ids == oracle(text)["input_ids"]
    for skip in (False, True):
        assert smollm2.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
    detokenizer = smollm2.detokenizer(skip_special_tokens=False)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


@given(text=st.text(max_size=40) | st.text("a1 \n'<|é²", max_size=40))
def test_smollm2_equals_transformers_on_any_text(smollm2: Tokenizer, oracle: Any, text: str) -> None:
    assert smollm2.encode(text) == oracle(text)["input_ids"]


@pytest.mark.parametrize("messages", CHATS)
def test_smollm2_chats_equal_those_of_transformers(
    smollm2: Tokenizer, oracle: Any, messages: list[dict[str, str]]
) -> None:
    for add in (False, True):
        expected = oracle.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
        assert smollm2.apply_chat_template(messages, add_generation_prompt=add) == expected


def test_smollm2_knows_its_special_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_token_id, *smollm2.eos_token_ids) == (49152, 1, 2)


@given(data=st.data(), skip=st.booleans())
def test_smollm2_parts_join_to_the_full_decode(smollm2: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=40))
    detokenizer = smollm2.detokenizer(skip_special_tokens=skip)
    parts = [*map(detokenizer.push, ids), detokenizer.flush()]
    assert "".join(parts) == smollm2.decode(ids, skip_special_tokens=skip)


def test_a_folder_made_from_the_file_gives_the_same_tokenizer(smollm2: Tokenizer, oracle: Any, tmp_path: Path) -> None:
    oracle.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == smollm2.encode(text)
    for messages in CHATS:
        assert tokenizer.apply_chat_template(messages) == smollm2.apply_chat_template(messages)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (smollm2.bos_token_id, smollm2.eos_token_ids)

"""The tokenizer of a model that has none: random weights made from a config alone speak token ids only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from semipd.errors import RequestError


class AbsentDetokenizer:
    """Turns every token into no text."""

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        return ""

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return ""


class AbsentTokenizer:
    """Refuses text and decodes to none; prompts must be token ids."""

    vocab_size = 0
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Refuse.

        Raises:
            RequestError: always.
        """
        _refuse("a text")

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """No words, no tokens.

        Raises:
            RequestError: there are words.
        """
        return _refuse("bad_words") if words else ()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Nothing."""
        return ""

    def token_text(self, token_id: int) -> str:
        """Nothing."""
        return ""

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> AbsentDetokenizer:
        """One that stays silent."""
        return AbsentDetokenizer()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Refuse.

        Raises:
            RequestError: always.
        """
        _refuse("a conversation")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Refuse.

        Raises:
            RequestError: always.
        """
        _refuse("a conversation")


def _refuse(what: str) -> NoReturn:
    raise RequestError(
        f"this engine has no tokenizer, so it cannot read {what}; give token ids, or Engine(tokenizer=...)"
    )

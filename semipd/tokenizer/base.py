"""What the engine asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Detokenizer(Protocol):
    """Turns one output's token ids into text as they come. One per output; not for two threads at once."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes final, maybe empty: nothing returned is ever taken back."""
        ...

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that are no character. Call once, at the end."""
        ...


class Tokenizer(Protocol):
    """Encodes, decodes and renders chats. Safe to share between threads."""

    @property
    def vocab_size(self) -> int:
        """Ids below this have a text; the model's own vocabulary may be larger (padding) and decodes to nothing."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence id; None when the model has none."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an output, as the tokenizer's files name them."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids.

        `add_special_tokens` adds what the model expects around a prompt, mostly BOS, and adds no second BOS to a text
        that starts with one.

        Raises:
            RequestError: `text` is not a string of Unicode characters.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads inside a text: spaces kept, U+FFFD for a part of a character."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> Detokenizer:
        """A fresh incremental decoder.

        What it returns joins to `decode(all ids)`. With `continues_text` the ids follow a prompt, so a space that
        begins the first token is kept where `decode` would take it for the start of a text; prompt + output then reads
        right.
        """
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text that the chat template makes of `messages`.

        Args:
            messages: `{"role": ..., "content": ...}` and what else the template reads; JSON values only.
            add_generation_prompt: end with the opening of the assistant's turn.
            chat_template: Jinja text instead of the model's own template.
            kwargs: further variables of the template, such as `tools`; JSON values only.

        Raises:
            RequestError: there is no template, the messages are malformed, or the template rejects them.
        """
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """`render_chat`, encoded: the template writes BOS itself where the model wants one, so none is added."""
        ...

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that must not be generated so that none of `words` appears, as vLLM makes them.

        A word has one sequence at the start of a text and often another after a space. The second is added only if it
        is as long as the first and begins with another token: a longer one is a lone space token and then the first.

        Raises:
            RequestError: a word has no tokens.
        """
        ...

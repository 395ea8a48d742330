"""The `Tokenizer` over a `tokenizers.Tokenizer` object, whichever files that was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from semipd.errors import RequestError
from semipd.tokenizer.chat import ChatTemplates
from semipd.tokenizer.detokenizer import PieceTables

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from semipd.tokenizer.base import Detokenizer


class BackendTokenizer:
    """A `Tokenizer`; see there for its methods. Owns `backend`, which nothing may change afterwards."""

    def __init__(
        self,
        backend: Backend,
        *,
        chat: ChatTemplates,
        bos_token_id: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        affixes: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Wraps `backend`, which puts `affixes` before and after a prompt; None takes them from its post-processor.

        Raises:
            WeightsError: the decoder is not supported.
        """
        backend.no_truncation()  # a tokenizer.json may carry its training's truncation and padding
        backend.no_padding()
        self._backend = backend
        self._chat = chat
        self._vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self._bos_token_id = bos_token_id
        self._eos_token_ids = eos_token_ids
        before, after = _post_processor_ids(backend) if affixes is None else affixes
        self._prefix, self._suffix = list(before), list(after)
        decoder = backend.decoder
        self._pieces = PieceTables(
            backend.id_to_token,
            frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special),
            None if decoder is None else json.loads(decoder.__getstate__()),
        )

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """See `Tokenizer`."""
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `Tokenizer`."""
        return self._eos_token_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""
        try:
            token_ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise RequestError(f"text is {text!r:.200}; expected a str without lone surrogates") from error
        if not add_special_tokens:
            return token_ids
        has_prefix = token_ids[: len(self._prefix)] == self._prefix
        return [*(() if has_prefix else self._prefix), *token_ids, *self._suffix]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer`."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer`."""
        return self._pieces.token_text(token_id)

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> Detokenizer:
        """See `Tokenizer`."""
        return self._pieces.detokenizer(skip_special_tokens=skip_special_tokens, continues_text=continues_text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """See `Tokenizer`."""
        return self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template, kwargs=kwargs
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """See `Tokenizer`."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template, **kwargs
        )
        return self.encode(text, add_special_tokens=False)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """See `Tokenizer`."""
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (
                tuple(self.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
            )
            if not bare:
                raise RequestError(f"bad word {word!r} has no tokens; give a word with visible characters")
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return tuple(sequences)


def _post_processor_ids(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids that the backend's own post-processor puts before and after a text, read off an encoding."""
    encoding = backend.encode("a", add_special_tokens=True)
    plain = backend.encode("a", add_special_tokens=False)
    mask = encoding.special_tokens_mask
    num_before = mask.index(0) if 0 in mask else len(mask) - len(plain.ids)
    return encoding.ids[:num_before], encoding.ids[num_before + len(plain.ids) :]

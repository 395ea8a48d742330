"""Token ids to text, one at a time, such that the parts join to exactly what a decode of all ids gives.

A decoder of the `tokenizers` library is, for all language models served here, a rule from token to *piece* and a rule
to join pieces. Pieces are looked up once and kept in a table, so a push is a dictionary lookup and a join. Measured:
0.3 us a token, where the library's own DecodeStream takes 0.7 and raises after byte tokens that are not UTF-8.

    byte level   a piece is bytes; the bytes of all tokens are one UTF-8 stream
    text         a piece is text, or one byte (`<0x0A>`). A run of byte tokens is text if all of it is UTF-8, else one
                 U+FFFD for each byte, so a run is final only when it ends
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from semipd.errors import WeightsError
from semipd.tokenizer.base import Detokenizer

Piece = TypeVar("Piece")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Byte-level vocabularies write a byte as one character: printable Latin-1 stands for itself, and the other bytes, in
# order, are the characters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF_CHAR = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


class _Table(dict[int, Piece], Generic[Piece]):
    """Id to piece, filled as ids are met: a vocabulary has 100,000 and an output uses few."""

    def __init__(self, make: Callable[[int], Piece]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> Piece:
        piece = self[token_id] = self._make(token_id)
        return piece


class ByteLevelDetokenizer:
    """Pieces are bytes; holds back the bytes of an unfinished character (three at most)."""

    __slots__ = ("_held", "_pieces")

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        data = self._held + self._pieces[token_id]
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[num_used:]
        return text

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class TextDetokenizer:
    """Pieces are texts, bytes as ints, or None for tokens that the text leaves out; holds back runs of bytes."""

    __slots__ = ("_pieces", "_rest", "_run", "_strip", "_strip_left")

    def __init__(
        self,
        first: Mapping[int, str | int | None],
        rest: Mapping[int, str | int | None],
        strip: str,
        num_strip: int,
    ) -> None:
        """Looks up the first token in `first`, others in `rest`; drops up to `num_strip` leading `strip` characters."""
        self._pieces = first
        self._rest = rest
        self._run = bytearray()
        self._strip = strip
        self._strip_left = num_strip

    def push(self, token_id: int) -> str:
        """See `Detokenizer.push`."""
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        self._pieces = self._rest
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if self._run:
            piece = self._end_run() + piece
        return self._stripped(piece) if self._strip_left else piece

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        start = 0
        while self._strip_left and start < len(text):
            if text[start] == self._strip:
                self._strip_left -= 1
                start += 1
            else:
                self._strip_left = 0
        return text[start:]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How a text decoder makes a token's piece.

    Attributes:
        replace: (old, new) pairs applied to each token in order.
        byte_fallback: `<0x0A>` is the byte 10.
        first_drops: removed from the first token before all else (Metaspace's start of a text).
        separator: put before every token but the first.
        strip, num_strip: up to so many of this character are dropped where the text starts.
    """

    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    first_drops: str = ""
    separator: str = ""
    strip: str = ""
    num_strip: int = 0

    def piece(self, token: str, *, first: bool) -> str | int:
        """The piece of `token`; `first` if no other comes before it."""
        if first and self.first_drops:
            token = token.replace(self.first_drops, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token if first else self.separator + token


def parse_decoder(state: Mapping[str, Any] | None) -> TextRules | None:
    """Rules of the decoder that `state` (its JSON) describes; None for byte level.

    Raises:
        WeightsError: the decoder is not one that can be decoded token by token.
    """
    if state is None:
        return TextRules(separator=" ")
    steps: list[Mapping[str, Any]] = list(state["decoders"]) if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return None
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        return TextRules(replace=((mark, " "),), first_drops="" if steps[0].get("prepend_scheme") == "never" else mark)
    return _parse_sequence(steps, kinds)


def _parse_sequence(steps: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> TextRules:
    """Replace*, ByteFallback?, then Fuse?, or Fuse and a Strip of the start."""
    num_replace = next((i for i, kind in enumerate(kinds) if kind != "Replace"), len(kinds))
    replaces, rest = steps[:num_replace], list(kinds[num_replace:])
    byte_fallback = rest[:1] == ["ByteFallback"]
    tail = rest[1:] if byte_fallback else rest
    patterns = [step["pattern"].get("String") for step in replaces]
    strip = steps[-1] if tail == ["Fuse", "Strip"] else None
    known_tail = tail in ([], ["Fuse"]) or (strip is not None and strip["stop"] == 0)
    if not known_tail or not all(patterns):
        raise WeightsError(
            f"the tokenizer's decoder is {' > '.join(kinds)}, which cannot be decoded token by token; expected "
            "ByteLevel, Metaspace or Replace > ByteFallback > Fuse > Strip (of the start); give another tokenizer"
        )
    return TextRules(
        replace=tuple((pattern, step["content"]) for pattern, step in zip(patterns, replaces, strict=True)),
        byte_fallback=byte_fallback,
        strip="" if strip is None else strip["content"],
        num_strip=0 if strip is None else strip["start"],
    )


def token_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the alphabet (an added token) is plain UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


class PieceTables:
    """The piece tables of one vocabulary and its decoder, which all its detokenizers share."""

    def __init__(
        self, id_to_token: Callable[[int], str | None], special_ids: frozenset[int], decoder: Mapping[str, Any] | None
    ) -> None:
        """Takes the vocabulary, the ids that `skip_special_tokens` leaves out, and the decoder's JSON.

        Raises:
            WeightsError: the decoder is not one that can be decoded token by token.
        """
        self._id_to_token = id_to_token
        self._special_ids = special_ids
        self._rules = rules = parse_decoder(decoder)
        if rules is None:
            self._bytes = {skip: self._byte_table(skip) for skip in (False, True)}
        else:
            self._first = {skip: self._text_table(rules, skip, first=True) for skip in (False, True)}
            self._rest = {skip: self._text_table(rules, skip, first=False) for skip in (False, True)}

    def detokenizer(self, *, skip_special_tokens: bool, continues_text: bool) -> Detokenizer:
        """See `Tokenizer.detokenizer`."""
        if self._rules is None:
            return ByteLevelDetokenizer(self._bytes[skip_special_tokens])
        rest = self._rest[skip_special_tokens]
        if continues_text:
            return TextDetokenizer(rest, rest, "", 0)
        return TextDetokenizer(self._first[skip_special_tokens], rest, self._rules.strip, self._rules.num_strip)

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer.token_text`."""
        if self._rules is None:
            return self._bytes[False][token_id].decode("utf-8", "replace")
        piece = self._rest[False][token_id]
        if isinstance(piece, int):
            return bytes([piece]).decode("utf-8", "replace")
        return piece or ""

    def _token(self, token_id: int, skip_special: bool) -> str | None:
        return None if skip_special and token_id in self._special_ids else self._id_to_token(token_id)

    def _byte_table(self, skip_special: bool) -> _Table[bytes]:
        return _Table(lambda token_id: token_bytes(self._token(token_id, skip_special) or ""))

    def _text_table(self, rules: TextRules, skip_special: bool, *, first: bool) -> _Table[str | int | None]:
        def piece(token_id: int) -> str | int | None:
            token = self._token(token_id, skip_special)
            return None if token is None else rules.piece(token, first=first)

        return _Table(piece)

"""Makes a tokenizer from the vocabulary inside a GGUF file.

GGUF stores the tokens and merges but only *names* how text is split before merging. Splitting wrongly gives valid but
unusual ids, and a model that is quietly worse; so the splits of the original tokenizers are written down here by name,
and a name that is not here is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semipd.errors import WeightsError
from semipd.gguf_file import read_gguf
from semipd.tokenizer.adapter import BackendTokenizer
from semipd.tokenizer.chat import ChatTemplates

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from semipd.tokenizer.base import Tokenizer


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """How a byte-level tokenizer cuts text before merging.

    Attributes:
        regex: the pieces of a text; None takes GPT-2's.
        digits: every digit is a piece of its own, cut before the regex sees the text.
        nfc: text is brought to Unicode's composed form first.
        ignore_merges: a piece that is a token is taken whole, even if merges do not lead there.
        add_bos: what holds if the file does not say.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _Split(
    regex=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}", ignore_merges=True, add_bos=True
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = _Split(
    regex=rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Split(regex=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS_AND_SPACES}", nfc=True),
    "tekken": _TEKKEN,
}
_ELSEWHERE = "give tokenizer= a folder or hub id that has the model's tokenizer.json"


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside the GGUF file at `path`.

    Raises:
        WeightsError: the file is malformed, has no vocabulary, or one of a kind that is not supported.
    """
    metadata = read_gguf(path).metadata
    for key in ("model", "tokens", "token_type"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise WeightsError(f"{path} has no tokenizer.ggml.{key}, so no vocabulary; {_ELSEWHERE}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens):
        raise WeightsError(f"{path} lists {len(tokens) - len(set(tokens))} tokens twice; {_ELSEWHERE}")
    kind = metadata["tokenizer.ggml.model"]
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level_backend(metadata)
        elif kind == "llama":
            backend, add_bos = _sentencepiece_backend(metadata), True
        else:
            raise WeightsError(f"tokenizer.ggml.model is {kind!r}; expected gpt2 or llama; {_ELSEWHERE}")
        _add_tokens(backend, tokens, metadata["tokenizer.ggml.token_type"])
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{path} has a vocabulary that does not fit together: {error}; {_ELSEWHERE}") from error
    return _wrap(path, backend, metadata, add_bos)


def _wrap(path: Path, backend: Backend, metadata: Mapping[str, Any], add_bos: bool) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = _special_ids(path, metadata)
    affixes: dict[str, list[int]] = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        is_added = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        if is_added and name not in ids:
            raise WeightsError(f"{path} adds {name} to a prompt but names no {name} token; {_ELSEWHERE}")
        affixes[name] = [ids[name]] if is_added else []
    variables = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return BackendTokenizer(
        backend,
        chat=ChatTemplates(
            _templates(metadata),
            {variable: tokens[ids[name]] for variable, name in variables.items() if name in ids},
        ),
        bos_token_id=ids.get("bos"),
        eos_token_ids=frozenset(ids[name] for name in ("eos", "eot", "eom") if name in ids),
        affixes=(affixes["bos"], affixes["eos"]),
    )


def _special_ids(path: Path, metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids that the file names, such as "bos"."""
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < num_tokens:
            raise WeightsError(f"{path} has {name} token {token_id}, but {num_tokens} tokens; {_ELSEWHERE}")
        ids[name] = token_id
    return ids


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the unnamed one is "default"."""
    key = "tokenizer.chat_template"
    named = {name[len(key) + 1 :]: text for name, text in metadata.items() if name.startswith(key + ".")}
    return {**named, "default": metadata[key]} if key in metadata else named


def _byte_level_backend(metadata: Mapping[str, Any]) -> tuple[Backend, bool]:
    """A byte-level BPE, and whether prompts of its kind begin with BOS by default."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    name = metadata.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        raise WeightsError(
            f"tokenizer.ggml.pre is {name!r}; expected one of {', '.join(sorted(_SPLITS))}; {_ELSEWHERE}"
        )
    split = _SPLITS[name]
    # Unused tokens pad the vocabulary to the model's; as text they would be matched whole where merges are ignored.
    types = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != _TokenType.UNUSED}
    merges = [_merge(pair) for pair in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", False)
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _merge(pair: str) -> tuple[str, str]:
    """The two sides of "left right"; the left one may itself begin with a space."""
    middle = pair.index(" ", 1)
    return pair[:middle], pair[middle + 1 :]


def _sentencepiece_backend(metadata: Mapping[str, Any]) -> Backend:
    """SentencePiece's BPE: spaces are U+2581, one is put before the text, unknown characters become bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise WeightsError(f"tokenizer.ggml.remove_extra_whitespaces is set, which is not supported; {_ELSEWHERE}")
    tokens = metadata["tokenizer.ggml.tokens"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_mark = normalizers.Replace(" ", "\u2581")
    steps: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), to_mark])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = to_mark
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that SentencePiece does implicitly: any two tokens whose concatenation is one, best score first.

    Of several ways to make the same token the one with the longer left side comes first.
    """
    score_of = {
        token: score for token, score, type_ in zip(tokens, scores, types, strict=True) if type_ == _TokenType.NORMAL
    }
    merges = [
        (-score, -cut, token)
        for token, score in score_of.items()
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(token[:-neg_cut], token[-neg_cut:]) for _, neg_cut, token in merges]


def _add_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control tokens special, and both those and user-defined tokens whole wherever they stand in a text."""
    from tokenizers import AddedToken

    special = (_TokenType.CONTROL, _TokenType.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=type_ in special)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (*special, _TokenType.USER_DEFINED)
        ]
    )

"""Makes a `Tokenizer` from the files of a model: a folder with a tokenizer.json, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semipd.errors import WeightsError
from semipd.tokenizer.adapter import BackendTokenizer
from semipd.tokenizer.chat import ChatTemplates

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from semipd.tokenizer.base import Tokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder or a GGUF file. Reads no network and runs no code of the model.

    From a folder: tokenizer.json, and what exists of tokenizer_config.json, special_tokens_map.json,
    generation_config.json, chat_template.jinja and chat_template.json.

    Raises:
        WeightsError: files are missing, malformed, or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        from semipd.tokenizer.gguf_vocab import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    raise WeightsError(f"{path} does not exist; expected a folder with a tokenizer.json, or a .gguf file")


def _load_folder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise WeightsError(
            f"{folder} has no tokenizer.json (it has {names}); take the model's full repository, or save its tokenizer "
            "there in that format (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{file} is not a tokenizer that `tokenizers` can read: {error}") from error

    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    _add_configured_tokens(backend, config)
    named = {name: text for name in _NAMED_TOKENS if (text := _token_content(config.get(name))) is not None}
    ids = {name: _require_id(backend, folder, name, named) for name in ("bos_token", "eos_token")}
    eos_token_ids = {ids["eos_token"], *_generation_eos_ids(folder)}
    return BackendTokenizer(
        backend,
        chat=ChatTemplates(_folder_templates(folder, config), named),
        bos_token_id=ids["bos_token"],
        eos_token_ids=frozenset(i for i in eos_token_ids if i is not None),
        affixes=_affixes(config, ids),
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a {type(value).__name__}; expected an object")
    return value


def _token_content(token: object) -> str | None:
    """Text of a token given as text or as an added-token object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _require_id(backend: Backend, folder: Path, name: str, named: Mapping[str, str]) -> int | None:
    if name not in named:
        return None
    token_id = backend.token_to_id(named[name])
    if token_id is None:
        raise WeightsError(f"{folder} names {named[name]!r} as {name}, which its tokenizer.json does not know")
    return token_id


def _add_configured_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder` (id to token) that tokenizer.json lacks."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for key, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([AddedToken(entry["content"], **{f: entry[f] for f in flags if f in entry})])
        if backend.token_to_id(entry["content"]) != int(key):
            raise WeightsError(
                f"tokenizer_config.json gives {entry['content']!r} the id {key}, tokenizer.json "
                f"{backend.token_to_id(entry['content'])}; take both files from one version of the model"
            )


def _affixes(config: Mapping[str, Any], ids: Mapping[str, int | None]) -> tuple[list[int], list[int]] | None:
    """Ids around a prompt if the configuration names them; that outranks the post-processor, as in transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return None
    bos, eos = (
        [token_id] if config.get(f"add_{name}") and (token_id := ids[name]) is not None else []
        for name in ("bos_token", "eos_token")
    )
    return bos, eos


def _generation_eos_ids(folder: Path) -> frozenset[int]:
    file = folder / "generation_config.json"
    given = _read_json(file).get("eos_token_id")
    token_ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token_id, int) for token_id in token_ids):
        raise WeightsError(f"{file} has the eos_token_id {given!r}; expected a token id, or a list of them")
    return frozenset(token_ids)


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. chat_template.jinja outranks chat_template.json, and that tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return {"default": jinja.read_text(encoding="utf-8")}
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {} if template is None else {"default": template}

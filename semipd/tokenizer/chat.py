"""Renders chat messages with a model's Jinja template, in a sandbox: templates come with weights and are not trusted.

The environment is the one that templates on the hub are written for (that of `transformers`): trimmed blocks, loop
controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, `generation` blocks. The template
sees JSON values only, so it can reach no method of a caller's objects.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from semipd.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser


class ChatTemplates:
    """The chat templates of one model, by name, and the special-token texts that they may use."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """Takes template texts by name ("default", maybe "tool_use") and variables such as `bos_token`."""
        self._templates = templates
        self._variables = variables
        self._compiled: dict[str, Template] = {}  # the model's own, by source: compiling takes 2 ms, rendering 0.03

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        chat_template: str | None,
        kwargs: Mapping[str, Any],
    ) -> str:
        """See `Tokenizer.render_chat`."""
        source = self._own(with_tools=bool(kwargs.get("tools"))) if chat_template is None else chat_template
        values: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **self._variables,
            **{name: _plain(name, value) for name, value in kwargs.items()},
            "messages": _plain_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = self._compiled.get(source) or _environment().from_string(source)
            if chat_template is None:
                self._compiled[source] = template
            return template.render(values)
        except Exception as error:  # a template can fail in any way that its expressions can
            raise RequestError(
                f"the chat template failed ({type(error).__name__}: {error}); check that roles, their order and the "
                "contents are what this model expects, or give another chat_template"
            ) from error

    def _own(self, *, with_tools: bool) -> str:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            named = f" named default (it has {', '.join(sorted(self._templates))})" if self._templates else ""
            raise RequestError(
                f"this model has no chat template{named}; give chat_template=, or write the prompt's text yourself and "
                "generate from it"
            )
        return self._templates[name]


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> Any:
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not messages or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            f"messages is {messages!r:.200}; expected a non-empty list of {{'role': ..., 'content': ...}}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] has role {message.get('role')!r}; expected a string such as 'user'")
    return _plain("messages", [dict(message) for message in messages])


def _plain(name: str, value: object) -> Any:
    """A copy of `value` in JSON types alone."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{name} holds a value that is not JSON ({error}); give strings, numbers, lists and dicts"
        ) from error


def _environment() -> Environment:
    """A fresh sandbox."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}`: marks what the assistant said, for training; its content is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)

"""Chats are rendered as templates on the hub expect, in a sandbox, and whatever fails is the request's error."""

from __future__ import annotations

import datetime
import enum
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from semipd.errors import RequestError
from semipd.tokenizer import Tokenizer
from semipd.tokenizer.adapter import BackendTokenizer
from semipd.tokenizer.chat import ChatTemplates

USER = [{"role": "user", "content": "hello"}]
TEMPLATE = """\
{%- for message in messages %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
    {%- if message.role not in ('user', 'assistant') %}{% continue %}{% endif %}
    <{{ message['role'] }}>{{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}
"""


def render(template: str, messages: Any = USER, **kwargs: Any) -> str:
    chat = ChatTemplates({"default": template}, {"bos_token": "<|begin|>"})
    return chat.render(messages, add_generation_prompt=True, chat_template=None, kwargs=kwargs)


def test_blocks_are_trimmed_and_loops_can_be_controlled() -> None:
    messages = [{"role": "user", "content": " hello "}, {"role": "note", "content": "x"}, *USER]
    expected = "<|begin|>    <user>hello\n    <user>hello\n<assistant>"
    assert render(TEMPLATE, messages) == expected


def test_generation_blocks_are_rendered_as_they_are() -> None:
    assert render("a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }}") == "abFalse"


def test_tojson_keeps_markup_and_letters() -> None:
    assert render("{{ x | tojson }}", x={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 2, "a": 1}) == '{\n "a": 1,\n "b": 2\n}'


def test_the_date_can_be_asked_for() -> None:
    before = datetime.datetime.now()
    year = int(render("{{ strftime_now('%Y') }}"))
    assert before.year <= year <= datetime.datetime.now().year


def test_tools_and_documents_are_none_unless_given() -> None:
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ tools[0].name }}", tools=[{"name": "search"}]) == "search"


def test_a_template_for_tools_is_taken_when_there_are_tools() -> None:
    chat = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    arguments: dict[str, Any] = {"add_generation_prompt": True, "chat_template": None}
    assert chat.render(USER, kwargs={}, **arguments) == "plain"
    assert chat.render(USER, kwargs={"tools": [{}]}, **arguments) == "tools"


def test_values_reach_the_template_as_plain_json() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    template = "{{ messages[0].role }} {{ messages[0].role.name is defined }}"
    assert render(template, [{"role": Role.USER, "content": ""}]) == "user False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__.datetime }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(x) }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))(x) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(x) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(role='system') %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="the chat template failed") as caught:
        render(template, x=1)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ 'a' + messages[0].nothing }}", "UndefinedError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_names_its_reason(template: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"the chat template failed \\({said}") as caught:
        render(template)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("messages", [[], "hello", None, [1], {"role": "user"}, ["hello"]])
def test_messages_must_be_a_list_of_mappings(messages: object) -> None:
    with pytest.raises(RequestError, match="expected a non-empty list"):
        render(TEMPLATE, messages)


def test_a_message_must_have_a_role() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\] has role None; expected a string"):
        render(TEMPLATE, [*USER, {"content": "x"}])


def test_values_must_be_json() -> None:
    with pytest.raises(RequestError, match="messages holds a value that is not JSON"):
        render(TEMPLATE, [{"role": "user", "content": object()}])
    with pytest.raises(RequestError, match="tools holds a value that is not JSON"):
        render(TEMPLATE, tools=[print])


def test_without_a_template_the_error_says_what_to_do() -> None:
    chat = ChatTemplates({}, {})
    with pytest.raises(RequestError, match="this model has no chat template; give chat_template="):
        chat.render(USER, add_generation_prompt=True, chat_template=None, kwargs={})
    chat = ChatTemplates({"rag": ""}, {})
    with pytest.raises(RequestError, match=r"no chat template named default \(it has rag\)"):
        chat.render(USER, add_generation_prompt=True, chat_template=None, kwargs={})


def make_tokenizer(backend: Backend, template: str) -> Tokenizer:
    """A copy of `backend` that puts <|begin|> before a prompt."""
    backend = Backend.from_str(backend.to_str())
    bos = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", bos)])
    chat = ChatTemplates({"default": template}, {"bos_token": "<|begin|>"})
    return BackendTokenizer(backend, chat=chat, bos_token_id=bos)


def test_bos_is_never_doubled(byte_level: Backend) -> None:
    tokenizer = make_tokenizer(byte_level, TEMPLATE)
    bos, hello = tokenizer.bos_token_id, byte_level.token_to_id("hello")
    assert tokenizer.encode("hello") == [bos, hello]
    assert tokenizer.encode("<|begin|>hello") == [bos, hello]
    assert tokenizer.encode("<|begin|><|begin|>hello") == [bos, bos, hello]
    assert tokenizer.encode("hello", add_special_tokens=False) == [hello]
    ids = tokenizer.apply_chat_template(USER)
    assert ids[0] == bos
    assert bos not in ids[1:]
    assert tokenizer.encode(tokenizer.render_chat(USER)) == ids


def test_a_template_that_writes_no_bos_gets_none(byte_level: Backend) -> None:
    tokenizer = make_tokenizer(byte_level, "{{ messages[0].content }}")
    assert tokenizer.apply_chat_template(USER) == [byte_level.token_to_id("hello")]


def test_a_template_of_the_caller_replaces_the_models_own(byte_level: Backend) -> None:
    tokenizer = make_tokenizer(byte_level, TEMPLATE)
    assert tokenizer.render_chat(USER, chat_template="{{ x }}", x="y") == "y"
    assert tokenizer.render_chat(USER, add_generation_prompt=False) == "<|begin|>    <user>hello\n"

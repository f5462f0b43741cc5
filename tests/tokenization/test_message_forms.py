"""How templates want tool calls, and messages that are continued."""

from __future__ import annotations

import json
from typing import Any

import pytest

from max_ray.errors import InputError
from max_ray.tokenization.chat_template import ChatTemplate
from max_ray.tokenization.message_forms import CallForm
from tests.tokenization import chat_templates

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEXT_AND_NULL = (  # as DeepSeek V3's: calls only beside a content that is none, arguments joined to other text
    _LOOP
    + "{% if m['role'] == 'assistant' and m['content'] is none %}"
    + "{% for c in m['tool_calls'] %}{{ c['function']['name'] + '|' + c['function']['arguments'] }}{% endfor %}"
    + "{% else %}{{ m['role'] + ':' + m['content'] }}{% endif %}"
    + _END
)
TEXT_AND_EMPTY = (
    _LOOP + "{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + '|' + c.function.arguments }}{% endfor %}" + _END
)
OBJECT_AND_EMPTY = (
    _LOOP + "{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}|{{ k }}={{ v }}{% endfor %}{% endfor %}" + _END
)
EITHER = (
    _LOOP + "{{ m.role }}:{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name ~ '|' ~ c.function.arguments }}{% endfor %}" + _END
)
USER = {"role": "user", "content": "hi"}


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}], **fields}


def rendered(source: str, *messages: dict[str, Any]) -> str:
    template = ChatTemplate(source, {})
    return template.render([dict(m) for m in template.prepare(messages)], {})


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (TEXT_AND_NULL, CallForm("text", "null")),
        (TEXT_AND_EMPTY, CallForm("text", "empty")),
        (OBJECT_AND_EMPTY, CallForm("object", "empty")),
        (EITHER, CallForm("object", "absent")),
        (chat_templates.QWEN, CallForm("object", "absent")),
        (chat_templates.CHATML, None),
        (chat_templates.GEMMA, None),
    ],
)
def test_the_form_of_calls(source: str, form: CallForm | None) -> None:
    facts = ChatTemplate(source, {}).facts
    assert facts.call_form == form
    assert facts.public()["tool_calls"] == (form is not None)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"a": "\u00e9"}, '{"a": "\u00e9"}'])
def test_calls_are_given_in_that_form(content: dict[str, Any], arguments: Any) -> None:
    assert rendered(TEXT_AND_NULL, USER, call(arguments, **content)) == 'user:hif|{"a": "\u00e9"}'
    assert rendered(TEXT_AND_EMPTY, USER, call(arguments, **content)) == 'user:hiassistant:f|{"a": "\u00e9"}'
    assert rendered(OBJECT_AND_EMPTY, USER, call(arguments, **content)) == "user:hiassistant:f|a=\u00e9"


def test_content_beside_calls_stays() -> None:
    assert rendered(OBJECT_AND_EMPTY, USER, call("{}", content="Well.")) == "user:hiassistant:Well.f"


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "[" * 100_000, ""])
def test_arguments_that_are_no_object_stay_a_text(arguments: str) -> None:
    assert rendered(EITHER, USER, call(arguments)).endswith(f"f|{arguments}")


@pytest.mark.parametrize("shape", [str, list])
def test_a_message_is_continued(shape: type) -> None:
    text = "It is <b> "
    content: Any = text if shape is str else [{"type": "text", "text": text}]
    template = ChatTemplate(chat_templates.PARTS, {})
    chat = [USER, {"role": "assistant", "content": content}]
    assert template.render(chat, {"continue_final_message": True}) == f"<|user|>hi<|assistant|>{text}"
    assert template.render(chat, {}) == f"<|user|>hi<|assistant|>{text}"


def test_what_cannot_be_continued() -> None:
    template = ChatTemplate(chat_templates.CHATML, {})
    for last in (USER, {"role": "assistant", "content": []}, call("{}")):
        with pytest.raises(InputError, match="Only a text of the assistant"):
            template.render([USER, last], {"continue_final_message": True})
    blind = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(InputError, match="does not write the last message"):
        blind.render([USER, {"role": "assistant", "content": "a"}], {"continue_final_message": True})


def test_the_public_facts_are_json() -> None:
    assert json.loads(json.dumps(ChatTemplate(TEXT_AND_NULL, {}).facts.public()))["tool_calls"] is True

"""ChatTemplate: what it knows of itself, which messages it takes, and whose fault an error is."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from max_ray.errors import InputError, PromptTooLongError
from max_ray.interfaces import RequestID, TextGenerationRequest
from max_ray.tokenization.chat_template import ChatTemplate, is_short
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.tokenization import chat_templates

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ALL_ROLES = ["system", "developer", "user", "assistant", "tool"]
FACTS: dict[str, dict[str, Any]] = {
    "chatml": {"roles": ALL_ROLES, "system": "anywhere"},
    "qwen": {"roles": ALL_ROLES, "system": "anywhere", "tools": True, "tool_calls": True},
    "llama": {"roles": ALL_ROLES, "system": "anywhere", "tool_calls": True},
    "mistral": {"roles": ALL_ROLES[:4], "system": "first"},
    "gemma": {"roles": ["user", "assistant"], "system": "none"},
    "phi": {"roles": ALL_ROLES[:4], "system": "anywhere"},
    "deepseek": {"roles": ALL_ROLES[:4], "system": "first"},
    "parts": {"roles": ALL_ROLES, "system": "anywhere", "content": "both"},
    "names": {"roles": ALL_ROLES, "system": "anywhere", "names": ALL_ROLES[:4]},
}
DEFAULT = {"names": [], "content": "string", "tools": False, "tool_calls": False}


def user(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(chat_templates.ALL[name], TOKENS)


def tokenizer_of(folder: Path, template: str, max_length: int = 4096) -> TextTokenizer:
    return TextTokenizer(write_byte_level(folder, chat_template=template), max_length=max_length)


def request(messages: list[dict[str, Any]], **options: Any) -> TextGenerationRequest:
    return TextGenerationRequest(RequestID(), messages=messages, chat_template_options=options or None)


@pytest.mark.parametrize("name", FACTS)
def test_what_a_template_knows(name: str) -> None:
    assert template_of(name).facts.public() == DEFAULT | FACTS[name]


def test_a_developer_is_a_system_message_where_the_template_has_no_branch_for_it() -> None:
    own = (
        "{% for m in messages %}{% if m.role == 'developer' %}[dev]{% endif %}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    for name in ("chatml", "qwen", "mistral", "deepseek"):
        assert template_of(name).prepare([{"role": "developer", "content": "x"}, user()])[0]["role"] == "system"
    assert ChatTemplate(own, {}).prepare([{"role": "developer", "content": "x"}])[0]["role"] == "developer"


SYSTEM, DEVELOPER = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
ANSWER = {"role": "assistant", "content": "a"}
LEFT_OUT = [
    ("gemma", [SYSTEM, user()], "messages[0].role", "System role not supported"),
    ("gemma", [user(), ANSWER, DEVELOPER], "messages[2].role", "'developer'"),
    ("phi", [user(), {"role": "tool", "content": "t"}], "messages[1].role", "it leaves it out"),
    ("qwen", [user(), {"role": "critic", "content": "c"}], "messages[1].role", "It knows system, developer, user"),
    ("mistral", [user(), SYSTEM], "messages[1].role", "as the first of all"),
    ("deepseek", [SYSTEM, DEVELOPER, user()], "messages[1].role", "as the first of all"),
    ("qwen", [user(), user(name="Ann")], "messages[1].name", "does not write the name"),
    ("qwen", [{**DEVELOPER, "name": "Ann"}, user()], "messages[0].name", "does not write the name"),
    ("phi", [user(), {**ANSWER, "tool_calls": [{"function": {"name": "f"}}]}], "messages[1].tool_calls", "tool calls"),
    ("qwen", [user(), {"role": "x" * 10**6, "content": "c"}], "messages[1].role", "a short word"),
    ("qwen", [user(), {"content": "c"}], "messages[1].role", "a short word"),
]


@pytest.mark.parametrize(("name", "messages", "param", "words"), LEFT_OUT)
async def test_what_would_be_left_out_is_refused_by_name(
    tmp_path: Path, name: str, messages: list[dict[str, Any]], param: str, words: str
) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_templates.ALL[name])
    with pytest.raises(InputError) as caught:
        await tokenizer.new_context(request(messages))
    assert caught.value.param == param
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", FACTS)
async def test_what_is_taken_is_written(tmp_path: Path, name: str) -> None:
    """Each role and field that the facts name is in the prompt's text."""
    tokenizer = tokenizer_of(tmp_path, chat_templates.ALL[name])
    facts = template_of(name).facts
    chat = [user("first"), {"role": "assistant", "content": "second"}, user("third")]
    for role in facts.roles:
        message = {"role": role, "content": "wanted"} | ({"name": "Named"} if role in facts.names else {})
        messages = [message, *chat] if role in ("system", "developer") else [*chat[:2], message]
        if role == "assistant":
            messages = [chat[0], message, chat[2]]
        context = await tokenizer.new_context(request(messages))
        text = tokenizer.decode_ids(context.tokens.prompt.tolist())
        assert "wanted" in text
        assert ("Named" in text) == (role in facts.names)


async def test_options_are_read_or_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN)
    tool = {"type": "function", "function": {"name": "forecast"}}
    assert "forecast" in tokenizer.render_chat([user()], {"tools": [tool]})
    assert tokenizer.render_chat([user()], {"enable_thinking": False}).endswith("</think>\n\n")
    for options, param in (
        ({"enable_thoughts": True}, "chat_template_options"),
        ({"documents": [{"text": "x"}]}, "documents"),
    ):
        with pytest.raises(InputError) as caught:
            await tokenizer.new_context(request([user()], **options))
        assert caught.value.param == param
    with pytest.raises(InputError, match="writes no tools"):
        tokenizer_of(tmp_path / "phi", chat_templates.PHI).render_chat([user()], {"tools": [tool]})


def test_several_templates() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"}, {})
    assert template.render([user()], {}) == "hi"
    assert template.render([user()], {"tools": [1]}) == "[1]"
    with pytest.raises(InputError, match="none is the default"):
        ChatTemplate({"tool_use": "x"}, {}).render([user()], {})


RAISES = [
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
    ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
    ("{{ 'x'.encode('no') }}", "LookupError"),
    ("{{ messages | groupby('role') | first | dictsort }}", "AttributeError"),
    ("{{ '%d' % 'x' }}", "TypeError"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{{ ('x' * 10 ** 9) }}", "does too much with these messages"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ {}['x' * 100000].y }}", "..."),
    ("{{ raise_exception(messages[0].content) }}", "The chat template refuses these messages: hi"),
    ("{% include 'other' %}", "TypeError: no loader"),
    ("{% for m in messages %}", "cannot be read"),
    ("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "cannot be read"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
]


@pytest.mark.parametrize(("template", "words"), RAISES)
async def test_whatever_a_template_raises_is_said(tmp_path: Path, template: str, words: str) -> None:
    tokenizer = tokenizer_of(tmp_path, template)
    with pytest.raises(InputError) as caught:
        await tokenizer.new_context(request([user()]))
    assert caught.value.param == "messages"
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


async def test_a_heavy_template_leaves_the_event_loop_free(tmp_path: Path) -> None:
    """It does much with little, so nothing tells beforehand."""
    heavy = (
        "{% if messages[0].content == 'go' %}{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0].content }}"
    )
    tokenizer = tokenizer_of(tmp_path, heavy)
    assert tokenizer.describe_chat_template() is not None
    work = asyncio.gather(*[tokenizer.new_context(request([user("go")])) for _ in range(4)])
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert [len(context.tokens) for context in await work] == [2] * 4
    assert turns > 10


async def test_many_tiny_messages_leave_the_event_loop_free(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_templates.CHATML, max_length=10**7)
    work = asyncio.ensure_future(tokenizer.new_context(request([user("a")] * 50_000)))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len((await work).tokens) > 50_000
    assert turns > 20


async def test_hopeless_chats_are_refused_before_they_are_rendered(tmp_path: Path) -> None:
    """More messages than tokens; more characters than tokens could hold, wherever they are."""
    tokenizer = tokenizer_of(tmp_path, "{{ 1 / 0 if messages[0].content != 'zquser' else 'zquser' }}", max_length=64)
    parts = [{"type": "text", "text": "abcdef"}] * 1000
    for messages in ([user("x" * 10**6)], [user("")] * 65, [user(parts)], [user("words")] * 60 + [user(parts)]):
        begin = time.thread_time()
        with pytest.raises(PromptTooLongError, match="at least"):
            await tokenizer.new_context(request(messages))
        assert time.thread_time() - begin < 0.5


async def test_only_texts_of_parts_count_as_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_templates.CHATML, max_length=2000)
    context = await tokenizer.new_context(request([user([{"type": "text", "text": "a"}] * 900)]))
    assert len(context.tokens) > 1800


def test_short_is_all_together() -> None:
    assert is_short([user("x" * 3000)], {"a": True}, 4096)
    assert not is_short([user("x" * 5000)], None, 4096)
    assert not is_short([user("")] * 1000, None, 4096)
    assert not is_short([user([{"type": "text", "text": ""}] * 500)], None, 4096)
    assert not is_short([user("x", name="y" * 5000)], None, 4096)
    assert not is_short([user("x", tool_calls=[{"arguments": "y" * 5000}])], None, 4096)
    assert not is_short([user("x")], {"tools": [{"description": "y" * 5000}]}, 4096)

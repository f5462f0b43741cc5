"""BoundedTemplate: the text that transformers renders, and an end to templates that would not end by themselves."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from max_ray.errors import InputError
from max_ray.tokenization.chat_template import ChatTemplate
from max_ray.tokenization.template_limits import TemplateLimitError, TemplateTimeError
from max_ray.tokenization.template_sandbox import BoundedTemplate
from tests.tokenization import chat_templates

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "hi",
    " two  spaces ",
    "<think>\nso\n</think>\n\nyes",
    "",
    "a < b & 'c' \"d\"",
    "\u00e9\u4e16\U0001f600",
    "{{ x }}",
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"\u00e9": {}}}}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {"x": "<1>"}}}


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = [{"role": "system", "content": draw.choice(TEXTS)}] if draw.random() < 0.4 else []
    for number in range(draw.randint(1, 6)):
        role = "assistant" if number % 2 else "user"
        role = draw.choice(["user", "assistant", "system", "tool", "developer"]) if draw.random() < 0.1 else role
        message: dict[str, Any] = {"role": role, "content": draw.choice(TEXTS)}
        message |= draw.choice([{}, {}, {"name": "Ann"}, {"reasoning": "hm"}, {"refusal": None}])
        if role == "assistant" and draw.random() < 0.2:
            message["tool_calls"] = [CALL]
        chat.append(message)
    return chat


def theirs(template: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    given = [{key: value for key, value in message.items() if value is not None} for message in chat]
    try:
        rendered, _ = render_jinja_template([given], chat_template=template, **TOKENS, **options)
    except Exception:  # noqa: BLE001  # templates raise anything
        return None
    return str(rendered[0])


def ours(template: ChatTemplate, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    try:
        return template.render(chat, options)
    except InputError:
        return None


@pytest.mark.parametrize("name", chat_templates.ALL)
def test_the_text_of_transformers(name: str) -> None:
    """400 random conversations; both render the same text, or both refuse."""
    draw = random.Random(name)
    template = ChatTemplate(chat_templates.ALL[name], TOKENS)
    num_rendered = 0
    for _ in range(400):
        chat = conversation(draw)
        options = draw.choice([{}, {"tools": [TOOL]}, {"enable_thinking": False}, {"date_string": "1 May 2030"}])
        options = {"add_generation_prompt": draw.random() < 0.7, **options}
        expected = theirs(chat_templates.ALL[name], chat, options)
        assert ours(template, chat, options) == expected, chat
        num_rendered += expected is not None
    assert num_rendered > 100


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9) %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.nextitem }}{% endfor %}",
        "{% for a in [[1, [2, [3]]]] recursive %}{{ a if a is number else loop(a) }}{% else %}none{% endfor %}",
        "{% for a in 'abcabc' if a != 'b' %}{{ loop.cycle('x', 'y') }}{{ a }}{% else %}none{% endfor %}",
        "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k ~ v ~ none }}{% endfor %}{% for x in nothing %}{% endfor %}",
        "{% macro m(x, y='z') %}[{{ x }}{{ y }}{{ caller() if caller else '' }}]{% endmacro %}{{ m(1) ~ m(2, 3) }}",
        "{% macro m(x) %}[{{ caller() }}]{% endmacro %}{% call m(1) %}in{{ side }}{% endcall %}",
        "{% set x %}a{{ 1 + 1 }}{% endset %}{{ x }}{% filter upper %}abc{{ x }}{% endfilter %}{{ 'a' + 'b' + x }}",
        "{{ [1, 2] + [3] }}{{ 2 ** 8 }}{{ 'ab' * 3 }}{{ '%s-%d' % ('a', 3) }}{{ 7 % 4 }}",
        "{{ '**%s**' | format('x') }}{{ '%*d' % (3, 4) }}{{ '{:>{}}'.format('a', 5) }}",
        "{{ 'a b'.replace(' ', '_') }}{{ 'x'.join(['a', 'b']) }}{{ ['a', 'b'] | join(', ') }}{{ '{}!'.format('a') }}",
        "{{ {'a': ['\u00e9<>', none, true]} | tojson }}{{ {'a': 1} | tojson(indent=2) }}{{ 'x' | indent(4, true) }}",
        "{{ [3, 1, 2] | sort | map('string') | join }}{{ 'abc'[::-1] }}{{ (1, 2) }}{{ ' x ' | trim }}{{ 'a' in 'ba' }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ dict(a=1) }}{{ namespace(b=2).b }}",
        "{{ 'abc' | center(9) }}{{ 'a b c d' | wordwrap(3) }}{{ range(7) | batch(3, 'x') | list }}{{ 1.5 | round }}",
    ],
)
def test_the_language_is_jinja(template: str) -> None:
    chat = [{"role": "user", "content": "x"}]
    expected = theirs(template, chat, {})
    assert expected is not None
    assert ours(ChatTemplate(template, TOKENS), chat, {}) == expected


TOO_MUCH = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}words{% endfor %}{% endfor %}",
    "{% macro m() %}{% for i in r %}{% for j in r %}wd{% endfor %}{% endfor %}{% endmacro %}{{ m() }}",
    "{% set x %}{% for i in range(99999) %}{{ 'word' * 999 }}{% endfor %}{% endset %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 2 ** (10 ** 9) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ '%s' % n.x }}",
    "{% macro m(x) %}{% if x %}{{ m(x - 1) }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ ('b' * 99999).join(range(99999)) }}",
    "{{ range(99999) | join('b' * 99999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('\\n' * 99999) | indent('b' * 99999) }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_templates_that_never_end(source: str) -> None:
    """Each ends by itself, soon, and without the memory that it asks for."""
    template = BoundedTemplate(source)
    begin = time.thread_time()
    with pytest.raises((TemplateLimitError, RecursionError)):
        template.render({"r": range(99999)}, seconds=0.3, characters=1_000_000)
    assert time.thread_time() - begin < 2


def test_time_is_its_own_error() -> None:
    with pytest.raises(TemplateTimeError, match=r"more than 0\.1 s"):
        BoundedTemplate(TOO_MUCH[0]).render({}, seconds=0.1, characters=1000)


def test_a_template_does_not_get_out() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{{ lipsum(9) }}",
    ):
        with pytest.raises(InputError):
            ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})

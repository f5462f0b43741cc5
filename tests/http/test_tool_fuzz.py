"""Chats with tools and a few things wrong in them: answered or refused with 400, never anything else."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.http.test_tools import CALL, CHAT, HI, TOOLS, served
from tests.tokenization import chat_templates

SAID = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "Hm.",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    ],
}
BODY: dict[str, Any] = {
    "messages": [HI, SAID, {"role": "tool", "tool_call_id": "c1", "content": "rain"}, HI],
    "tools": [
        *TOOLS,
        {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/a", "$defs": {}}}},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "chat_template_kwargs": {},
    "documents": None,
    "max_tokens": 150,
}
KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "arguments", "parameters", "type", "strict", "$ref")
KEYS += ("reasoning", "continue_final_message", "add_generation_prompt", "reasoning_effort", "include_reasoning", "n")
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 2**64, 0.5, "", "a", "tool", "required", "none", "function", "\u0000", "\ud800"),
    *("<tool_call>", "{}", "{", '{"a": ' * 300, "<|im_end|>", "\U000f1a55\U000f1a56", [], {}, [[]], [{}], {"": {}}),
    *([HI], [SAID], TOOLS, {"type": "function", "function": {"name": "get_time"}}, {"type": "object"}, ["a"] * 200),
    *({"enum": []}, {"type": ["string", 5]}, {"anyOf": [{"type": "null"}, 5]}, {"properties": {"city": 5}}),
]


def spoil(body: dict[str, Any], choose: random.Random) -> None:
    """One change at some depth."""
    place: Any = body
    while choose.random() < 0.8:
        values = place.values() if isinstance(place, dict) else place
        inner = [value for value in values if isinstance(value, (dict, list)) and value]
        if not inner:
            break
        place = choose.choice(inner)
    junk = copy.deepcopy(choose.choice(JUNK))
    if isinstance(place, list):
        place[choose.randrange(len(place))] = junk
    elif choose.random() < 0.2:
        place.pop(choose.choice(list(place)))
    else:
        place[choose.choice([*KEYS, *place])] = junk


@pytest.mark.parametrize("number", [150, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("template", [chat_templates.QWEN, chat_templates.CHATML, chat_templates.LLAMA])
async def test_anything_is_answered_or_refused(tmp_path: Path, template: str, number: int) -> None:
    choose = random.Random(template)
    statuses: dict[int, int] = {}
    async with served(tmp_path, f"Well.{CALL}", template) as (client, _):
        for _ in range(number):
            body = copy.deepcopy(BODY)
            for _ in range(choose.randint(0, 3)):
                spoil(body, choose)
            reply = await client.post(CHAT, content=json.dumps(body))
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            assert reply.status_code in (200, 400), (body, reply.text)
            if reply.status_code == 200:
                assert '"error"' not in reply.text, (body, reply.text)
    assert min(statuses[200], statuses[400]) > number // 20

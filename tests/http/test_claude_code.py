"""Requests of Claude Code as it sent them: `tests/clients/recorded/claude_code.json`, texts shortened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.test_dialect_tools import ANTHROPIC_TOOLS, post, prompt_of, thinking
from tests.http.test_reasoning import EFFORT
from tests.http.test_tools import served
from tests.source_tree import ROOT
from tests.tokenization import chat_templates

RECORDED = json.loads((ROOT / "tests" / "clients" / "recorded" / "claude_code.json").read_text(encoding="utf-8"))
MESSAGES = [{"role": "user", "content": "weather?"}]
THOUGHT = "<think>\nHm.\n</think>\n\nSee."
SEARCH = {"name": "search", "input_schema": {"type": "object", "properties": {}}}


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await client.post(RECORDED["path"], json=body, headers=RECORDED["headers"])
    assert reply.status_code == 200, reply.text
    return [json.loads(block.split("\ndata: ")[1]) for block in reply.text.removesuffix("\n\n").split("\n\n")]


@pytest.mark.parametrize("name", RECORDED["requests"])
@pytest.mark.parametrize("template", [chat_templates.QWEN, chat_templates.CHATML])
async def test_recorded_requests(tmp_path: Path, name: str, template: str) -> None:
    body = RECORDED["requests"][name]
    assert body["output_config"] == {"effort": "high"}
    call = '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.txt"}}\n</tool_call>'
    async with served(tmp_path, call, template) as (client, engine):
        events = await send(client, body)
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
        assert json.loads("".join(pieces)) == {"file_path": "a.txt"}
        prompt = prompt_of(engine)
        assert "Say hello." in prompt
        assert [tool["name"] in prompt for tool in body["tools"]] == [not t.get("defer_loading") for t in body["tools"]]
        counted = {key: body[key] for key in ("model", "messages", "system", "tools", "thinking", "output_config")}
        reply = await client.post("/v1/messages/count_tokens?beta=true", json=counted, headers=RECORDED["headers"])
        assert reply.json() == {"input_tokens": len(engine.contexts[0].tokens.prompt)}


async def test_a_deferred_tool_is_offered_once_a_result_refers_to_it(tmp_path: Path) -> None:
    weather = {**ANTHROPIC_TOOLS[0], "defer_loading": True}
    asked = {"max_tokens": 99, "tools": [SEARCH, weather], "messages": MESSAGES}
    async with thinking(tmp_path) as (client, engine):
        await post(client, "/v1/messages", asked)
        assert '"get_weather"' not in prompt_of(engine)
        reply = await client.post(
            "/v1/messages", json={**asked, "tool_choice": {"type": "tool", "name": "get_weather"}}
        )
        assert reply.status_code == 400
        found = {"type": "tool_reference", "tool_name": "get_weather"}
        said = [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "search", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [found]}]},
        ]
        await post(client, "/v1/messages", {**asked, "messages": [*MESSAGES, *said]})
        assert '"get_weather"' in prompt_of(engine)
        assert "Found the tool get_weather." in prompt_of(engine)
        reply = await client.post("/v1/messages", json={**asked, "messages": [{"role": "user", "content": [found]}]})
        assert reply.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_the_display_of_thinking(tmp_path: Path, stream: bool) -> None:
    async with thinking(tmp_path, THOUGHT) as (client, _):
        texts = {}
        for display in ("summarized", "omitted"):
            form = {"type": "adaptive", "display": display}
            body = {"max_tokens": 99, "messages": MESSAGES, "thinking": form, "stream": stream}
            texts[display] = (await client.post("/v1/messages", json=body)).text
            assert "See." in "".join(re.findall(r'"text": ?"(.*?)"', texts[display]))
        assert "Hm." in "".join(re.findall(r'"thinking": ?"(.*?)"', texts["summarized"]))
        assert '"thinking"' not in texts["omitted"]
        body["thinking"] = {"type": "adaptive", "display": "short"}
        assert (await client.post("/v1/messages", json=body)).status_code == 400


async def test_the_default_effort_passes_everywhere_and_reaches_templates_that_read_it(tmp_path: Path) -> None:
    body = {"max_tokens": 99, "messages": MESSAGES, "output_config": {"effort": "high"}}
    async with served(tmp_path / "a", "hello", EFFORT) as (client, engine):
        await post(client, "/v1/messages", body)
        assert "high|" in prompt_of(engine)
    async with served(tmp_path / "b", "hello", chat_templates.CHATML) as (client, engine):
        await post(client, "/v1/messages", body)
        reply = await client.post("/v1/messages", json={**body, "output_config": {"effort": "low"}})
        assert reply.status_code == 400
        assert "output_config.effort" in reply.text
        chat = {"messages": MESSAGES, "reasoning_effort": "high"}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 400

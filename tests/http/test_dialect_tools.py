"""Tools, reasoning, schemas and prefilled answers in the dialects: the same as of a chat request, in their words."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.fake_engine import FakeEngine
from tests.http.test_forced_tools import spec_of
from tests.http.test_tools import CALL, SCHEMA, TIME_CALL, prompt_of, served
from tests.tokenization import chat_templates

ARGUMENTS = {"city": "Bern"}
SCRIPT = f"<think>\nHm.\n</think>\n\nSee.\n{CALL}\n{TIME_CALL}"
OPENAI_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA},
}
ANTHROPIC_TOOLS = [
    {
        "name": "get_weather",
        "description": "Of a city.",
        "input_schema": SCHEMA,
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
]
RESPONSES_TOOLS = [
    {"type": "function", "name": "get_weather", "description": "Of a city.", "parameters": SCHEMA, "strict": False},
    {"type": "function", "name": "get_time", "parameters": None, "strict": False},
]
OLLAMA_TOOLS = [OPENAI_TOOL, {"type": "function", "function": {"name": "get_time"}}]


@asynccontextmanager
async def thinking(folder: Path, script: str = SCRIPT) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    """A model that reasons and calls tools."""
    async with served(folder, script, chat_templates.QWEN, reasoning_parser="think") as (client, engine):
        yield client, engine


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = await client.post(path, json={"model": "fake", **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def events_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await client.post(path, json={"model": "fake", "stream": True, **body})
    assert reply.status_code == 200, reply.text
    blocks = reply.text.removesuffix("\n\n").split("\n\n")
    return [json.loads(block.split("\ndata: ")[1]) for block in blocks]


# Anthropic.

MESSAGE: dict[str, Any] = {"max_tokens": 500, "messages": [{"role": "user", "content": "hi"}], "tools": ANTHROPIC_TOOLS}


async def test_anthropic_whole(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        answer = await post(client, "/v1/messages", MESSAGE)
        assert answer["stop_reason"] == "tool_use"
        thought, text, first, second = answer["content"]
        assert thought == {"type": "thinking", "thinking": "Hm.", "signature": ""}
        assert text["text"] == "See."
        assert (first["type"], first["name"], first["input"]) == ("tool_use", "get_weather", ARGUMENTS)
        assert (second["name"], second["input"]) == ("get_time", {})
        assert json.dumps(OPENAI_TOOL) in prompt_of(engine)
        result = {"type": "tool_result", "tool_use_id": first["id"], "content": [{"type": "text", "text": "sunny"}]}
        failed = {"type": "tool_result", "tool_use_id": second["id"], "content": "no clock", "is_error": True}
        follow = [
            *MESSAGE["messages"],
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": [result, failed, {"type": "text", "text": "so?"}]},
        ]
        await post(client, "/v1/messages", {**MESSAGE, "messages": follow})
        prompt = prompt_of(engine)
        assert '{"name": "get_weather", "arguments": {"city": "Bern"}}' in prompt
        assert prompt.index("See.") < prompt.index("sunny") < prompt.index("Error: no clock") < prompt.index("so?")
        counted = {name: value for name, value in MESSAGE.items() if name != "max_tokens"}
        tokens = (await post(client, "/v1/messages/count_tokens", counted))["input_tokens"]
        assert tokens == answer["usage"]["input_tokens"]


@pytest.mark.parametrize("tokens_per_output", [1, 7, 1000])
async def test_anthropic_stream(tmp_path: Path, tokens_per_output: int) -> None:
    async with thinking(tmp_path) as (client, engine):
        engine.tokens_per_output = tokens_per_output
        events = await events_of(client, "/v1/messages", MESSAGE)
        blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
        assert [block.get("input") for block in blocks[2:]] == [{}, {}]
        pieces = ["", "", "", ""]
        open_block = None
        for event in events:
            if event["type"] == "content_block_start":
                assert open_block is None
                open_block = event["index"]
            elif event["type"] == "content_block_stop":
                assert event["index"] == open_block
                open_block = None
            elif event["type"] == "content_block_delta":
                assert event["index"] == open_block
                pieces[open_block] += event["delta"][
                    {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}[
                        event["delta"]["type"]
                    ]
                ]
        assert pieces[:2] == ["Hm.", "See."]
        assert [json.loads(piece or "{}") for piece in pieces[2:]] == [ARGUMENTS, {}]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_anthropic_choices(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        one = await post(
            client, "/v1/messages", {**MESSAGE, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
        )
        assert [block["type"] for block in one["content"]] == ["thinking", "text", "tool_use"]
        none = await post(client, "/v1/messages", {**MESSAGE, "tool_choice": {"type": "none"}})
        assert [block["type"] for block in none["content"]] == ["thinking", "text"]
        assert "get_weather" not in prompt_of(engine)
        engine.script = lambda context: '[{"name": "get_weather", "parameters": {"city": "Bern"}}]'
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            forced = await post(client, "/v1/messages", {**MESSAGE, "tool_choice": choice})
            assert [block.get("input") for block in forced["content"]] == [ARGUMENTS]
            assert engine.contexts[-1].sampling_params.structured_output is not None
        reply = await client.post("/v1/messages", json={**MESSAGE, "tool_choice": {"type": "tool", "name": "x"}})
        assert "tool_choice" in reply.json()["error"]["message"]


async def test_anthropic_thinking_is_turned_off(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        await post(client, "/v1/messages", {**MESSAGE, "thinking": {"type": "adaptive"}})
        as_usual = prompt_of(engine)
        reply = await client.post("/v1/messages", json={**MESSAGE, "thinking": {"type": "disabled"}})
        assert (reply.status_code == 400) or prompt_of(engine) != as_usual, "turned off, or refused"
    async with served(tmp_path / "b", "ok", reasoning_parser="none") as (client, engine):
        await post(client, "/v1/messages", {**MESSAGE, "thinking": {"type": "disabled"}})


async def test_anthropic_prefill(tmp_path: Path) -> None:
    async with served(tmp_path, " there") as (client, engine):
        messages = [*MESSAGE["messages"], {"role": "assistant", "content": "Hello"}]
        await post(client, "/v1/messages", {"max_tokens": 9, "messages": messages})
        assert prompt_of(engine).endswith("Hello")


async def test_anthropic_schema(tmp_path: Path) -> None:
    async with served(tmp_path, '{"city": "Bern"}') as (client, engine):
        form = {"type": "json_schema", "schema": SCHEMA}
        for fields in ({"output_config": {"format": form}}, {"output_format": form}):
            await post(client, "/v1/messages", {**MESSAGE, "tools": [], **fields})
            spec = spec_of(engine)
            assert spec is not None
            assert json.loads(spec.text) == SCHEMA
        wrong = {"type": "json_schema", "schema": {"type": "object", "nonsense": 1}}
        reply = await client.post("/v1/messages", json={**MESSAGE, "tools": [], "output_config": {"format": wrong}})
        assert reply.status_code == 400
        assert "nonsense" in reply.json()["error"]["message"]


async def test_a_coding_agents_requests(tmp_path: Path) -> None:
    """The shape that Claude Code sends: its start, its main loop, and its counting."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body: dict[str, Any] = {
        "model": "fake",
        "max_tokens": 32_000,
        "temperature": 1,
        "stream": True,
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "tools": [
            {**ANTHROPIC_TOOLS[0], "input_schema": {"$schema": "http://json-schema.org/draft-07/schema#", **SCHEMA}}
        ],
        "metadata": {"user_id": f"user_{'0' * 64}_account__session_{'0' * 36}"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}]},
            {"role": "user", "content": [{"type": "text", "text": "weather?", **cached}]},
        ],
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "anthropic-dangerous-direct-browser-access": "true",
        "x-api-key": "none",
    }
    async with thinking(tmp_path) as (client, engine):
        reply = await client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        assert '"stop_reason": "tool_use"' in reply.text
        assert prompt_of(engine).index("You are an agent.\nBe brief.") < prompt_of(engine).index("weather?")
        quota = {"model": "fake", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
        reply = await client.post(
            "/v1/messages?beta=true", json={**quota, "metadata": body["metadata"]}, headers=headers
        )
        assert reply.json()["stop_reason"] == "max_tokens"
        counted = {name: body[name] for name in ("model", "messages", "tools", "system", "thinking")}
        reply = await client.post("/v1/messages/count_tokens?beta=true", json=counted, headers=headers)
        assert reply.json()["input_tokens"] == len(engine.contexts[0].tokens.prompt)


# Responses.

RESPONSE: dict[str, Any] = {"input": "hi", "tools": RESPONSES_TOOLS}


async def test_responses_whole(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        answer = await post(client, "/v1/responses", RESPONSE)
        thought, text, first, second = answer["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
        assert 3 <= answer["usage"]["output_tokens_details"]["reasoning_tokens"] <= len("<think>\nHm.\n</think>\n\n")
        assert text["content"][0]["text"] == "See."
        assert (first["type"], first["name"], json.loads(first["arguments"])) == (
            "function_call",
            "get_weather",
            ARGUMENTS,
        )
        assert (second["name"], json.loads(second["arguments"])) == ("get_time", {})
        assert [tool["name"] for tool in answer["tools"]] == ["get_weather", "get_time"]
        results = [
            {"type": "function_call_output", "call_id": first["call_id"], "output": "sunny"},
            {"type": "function_call_output", "call_id": second["call_id"], "output": "noon"},
        ]
        await post(client, "/v1/responses", {**RESPONSE, "previous_response_id": answer["id"], "input": results})
        stored = prompt_of(engine)
        sent = [{"role": "user", "content": "hi"}, *answer["output"], *results]
        await post(client, "/v1/responses", {**RESPONSE, "input": sent})
        assert prompt_of(engine) == stored, "a stored conversation and one that is sent are the same"
        assert '{"name": "get_weather", "arguments": {"city": "Bern"}}' in stored
        assert stored.count("<|im_start|>assistant") == 2
        assert stored.index("See.") < stored.index("sunny") < stored.index("noon")


@pytest.mark.parametrize("tokens_per_output", [1, 7, 1000])
async def test_responses_stream(tmp_path: Path, tokens_per_output: int) -> None:
    async with thinking(tmp_path) as (client, engine):
        engine.tokens_per_output = tokens_per_output
        events = await events_of(client, "/v1/responses", RESPONSE)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        final = events[-1]["response"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == final["output"]
        for kind, name in (
            ("response.reasoning_text", "text"),
            ("response.output_text", "text"),
            ("response.function_call_arguments", "arguments"),
        ):
            for end in (event for event in events if event["type"] == f"{kind}.done"):
                deltas = [e["delta"] for e in events if e["type"] == f"{kind}.delta" and e["item_id"] == end["item_id"]]
                assert "".join(deltas) == end[name]
        assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]


async def test_responses_choices_and_formats(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        one = await post(client, "/v1/responses", {**RESPONSE, "parallel_tool_calls": False})
        assert [item["type"] for item in one["output"]] == ["reasoning", "message", "function_call"]
        engine.script = lambda context: '[{"name": "get_weather", "parameters": {"city": "Bern"}}]'
        for choice in ("required", {"type": "function", "name": "get_weather"}):
            forced = await post(client, "/v1/responses", {**RESPONSE, "tool_choice": choice})
            assert [json.loads(item["arguments"]) for item in forced["output"]] == [ARGUMENTS]
            assert forced["tool_choice"] == choice
        form = {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}
        answer = await post(client, "/v1/responses", {"input": "hi", "text": {"format": form}})
        spec = spec_of(engine)
        assert spec is not None
        assert json.loads(spec.text) == SCHEMA
        assert answer["text"]["format"] == form
        wrong = {**form, "schema": {"type": "object", "nonsense": 1}}
        reply = await client.post("/v1/responses", json={"input": "hi", "text": {"format": wrong}})
        assert reply.status_code == 400
        assert "nonsense" in reply.json()["error"]["message"]


# Ollama.

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": OLLAMA_TOOLS}


async def test_ollama_whole_and_streamed(tmp_path: Path) -> None:
    async with thinking(tmp_path) as (client, engine):
        answer = await post(client, "/api/chat", {**CHAT, "stream": False})
        message = answer["message"]
        assert (message["thinking"], message["content"]) == ("Hm.", "See.")
        calls = [{"name": "get_weather", "arguments": ARGUMENTS}, {"name": "get_time", "arguments": {}}]
        assert [call["function"] for call in message["tool_calls"]] == calls
        reply = await client.post("/api/chat", json={"model": "fake", **CHAT})
        lines = [json.loads(line)["message"] for line in reply.text.strip().split("\n")]
        assert "".join(line.get("thinking", "") for line in lines) == "Hm."
        assert "".join(line["content"] for line in lines) == "See."
        assert [call["function"] for line in lines for call in line.get("tool_calls", [])] == calls
        results = [
            {"role": "tool", "content": "noon", "tool_name": "get_time"},
            {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
        ]
        await post(client, "/api/chat", {**CHAT, "stream": False, "messages": [*CHAT["messages"], message, *results]})
        prompt = prompt_of(engine)
        assert prompt.index('"get_weather", "arguments"') < prompt.index("noon") < prompt.index("sunny")
        extra = [*CHAT["messages"], message, *results, {"role": "tool", "content": "x"}]
        reply = await client.post("/api/chat", json={"model": "fake", "messages": extra})
        assert "messages[4]" in reply.json()["error"]
        assert (await post(client, "/api/show", {}))["capabilities"] == ["completion", "tools", "thinking"]


async def test_ollama_formats(tmp_path: Path) -> None:
    async with served(tmp_path, '{"city": "Bern"}') as (client, engine):
        for path, body in (("/api/chat", {"messages": CHAT["messages"]}), ("/api/generate", {"prompt": "hi"})):
            await post(client, path, {**body, "stream": False, "format": SCHEMA})
            spec = spec_of(engine)
            assert spec is not None
            assert json.loads(spec.text) == SCHEMA
            await post(client, path, {**body, "stream": False, "format": "json"})
            assert engine.contexts[-1].sampling_params.structured_output is not None
            wrong = {"model": "fake", **body, "format": {"type": "object", "nonsense": 1}}
            assert "nonsense" in (await client.post(path, json=wrong)).json()["error"]


# All of them.


async def test_dialects_tell_the_same_answers(tmp_path: Path) -> None:
    """Random texts with parts in any order, also cut off: whole answers of three dialects agree."""
    rng = random.Random(4)
    async with thinking(tmp_path) as (client, engine):
        for _ in range(25):
            pieces = [rng.choice(["a ", "é", CALL, TIME_CALL, "\n", "<tool_call>", "</think>", "{"]) for _ in range(5)]
            script = rng.choice(["", "<think>\nt\n</think>\n\n"]) + "".join(pieces)
            engine.script = lambda context, script=script: script  # type: ignore[misc]
            engine.tokens_per_output = rng.randrange(1, 30)
            limit = rng.choice([5, 40, 900])
            message = await post(client, "/v1/messages", {**MESSAGE, "max_tokens": limit})
            response = await post(client, "/v1/responses", {**RESPONSE, "max_output_tokens": limit})
            chat = await post(client, "/api/chat", {**CHAT, "stream": False, "options": {"num_predict": limit}})
            by_text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
            texts = [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]
            assert by_text == "".join(texts) == chat["message"]["content"]
            names = [block["name"] for block in message["content"] if block["type"] == "tool_use"]
            assert names == [item["name"] for item in response["output"] if item["type"] == "function_call"]
            assert names == [call["function"]["name"] for call in chat["message"].get("tool_calls", [])]


async def test_tokenize_with_tools(tmp_path: Path) -> None:
    async with served(tmp_path, "ok") as (client, engine):
        messages = CHAT["messages"]
        await post(client, "/v1/chat/completions", {"messages": messages, "tools": OLLAMA_TOOLS})
        tokens = (await post(client, "/tokenize", {"messages": messages, "tools": OLLAMA_TOOLS}))["tokens"]
        assert tokens == engine.contexts[-1].tokens.prompt.tolist()
        continued = {"messages": [*messages, {"role": "assistant", "content": "Hel"}], "continue_final_message": True}
        tokens = (await post(client, "/tokenize", continued))["tokens"]
        assert engine.tokenizer.decode_ids(tokens).endswith("Hel")

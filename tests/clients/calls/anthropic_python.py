"""The anthropic package for Python, and the shapes of Claude Code's requests as recorded bodies."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from tests.clients.harness import MODEL, URL, WEATHER_QUESTION, WEATHER_SCHEMA, ClientCalls, call

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
RECORDED = Path(__file__).parents[1] / "recorded" / "claude_code.json"
TOOL: Any = {"name": "get_weather", "description": "The weather of a city", "input_schema": WEATHER_SCHEMA}


class Answer(BaseModel):
    is_capital: bool


class AnthropicPython(ClientCalls):
    client = "anthropic (Python)"

    def setUp(self) -> None:
        super().setUp()
        self.anthropic = Anthropic(base_url=URL, api_key="-")

    def _blocks(self, message: Any) -> tuple[str, list[tuple[str, Any]]]:
        text = "".join(block.text for block in message.content if block.type == "text")
        return text, [(block.name, block.input) for block in message.content if block.type == "tool_use"]

    @call("messages.create", "text, stop_reason, usage")
    def test_create(self) -> None:
        message = self.anthropic.messages.create(model=MODEL, messages=HELLO, max_tokens=40)
        self.check_text(message.content[0].text)
        self.assertEqual(message.stop_reason == "max_tokens", message.usage.output_tokens == 40)
        self.assertIn(message.stop_reason, ("end_turn", "max_tokens"))

    @call("messages.create of AsyncAnthropic", "text")
    async def test_async(self) -> None:
        async with AsyncAnthropic(base_url=URL, api_key="-") as client:
            message = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=20)
        self.check_text(message.content[0].text)

    @call("messages.stream (helper)", "the final message has the streamed text")
    def test_stream(self) -> None:
        with self.anthropic.messages.stream(model=MODEL, messages=HELLO, max_tokens=40) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        self.check_text(text)
        self.assertEqual(final.content[0].text, text)

    @call("turn 2 with message.content, system blocks with cache_control", "text")
    def test_second_turn(self) -> None:
        system: Any = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
        asked: Any = {"model": MODEL, "system": system, "max_tokens": 20}
        first = self.anthropic.messages.create(messages=HELLO, **asked)
        history = [*HELLO, {"role": "assistant", "content": first.content}, *HELLO]
        self.check_text(self.anthropic.messages.create(messages=history, **asked).content[0].text)

    @call("tools, tool_choice auto", "a text, or tool_use blocks of the tool")
    def test_tools_auto(self) -> None:
        question: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        message = self.anthropic.messages.create(model=MODEL, messages=question, tools=[TOOL], max_tokens=60)
        text, calls = self._blocks(message)
        self.check_call_or_text(text, calls)
        self.assertEqual(message.stop_reason == "tool_use", bool(calls))

    @call("tools, tool_choice any, streamed; result sent back", "input fits the schema; then text or a call")
    def test_tools_forced(self) -> None:
        question: Any = {"role": "user", "content": WEATHER_QUESTION}
        asked: Any = {"model": MODEL, "tools": [TOOL], "max_tokens": 100}
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        with self.anthropic.messages.stream(messages=[question], tool_choice=choice, **asked) as stream:
            first = stream.get_final_message()
        ((name, found),) = self._blocks(first)[1]
        self.check_weather(name, found)
        self.assertEqual(first.stop_reason, "tool_use")
        result: Any = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "Sunny"}
        history = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        self.check_call_or_text(*self._blocks(self.anthropic.messages.create(messages=history, **asked)))

    @call("messages.parse(output_format=Model)", "the object that pydantic parsed")
    def test_parse(self) -> None:
        question: Any = [{"role": "user", "content": "Is Paris a capital?"}]
        message = self.anthropic.messages.parse(model=MODEL, messages=question, output_format=Answer, max_tokens=60)
        self.assertIsInstance(message.parsed_output, Answer)

    @call("messages.count_tokens", "the input_tokens that messages.create reports")
    def test_count_tokens(self) -> None:
        count = self.anthropic.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
        usage = self.anthropic.messages.create(model=MODEL, messages=HELLO, max_tokens=1).usage
        self.assertEqual(count, usage.input_tokens + (usage.cache_read_input_tokens or 0))

    @call("models.list, models.retrieve", "the served model's id in both")
    def test_models(self) -> None:
        self.assertEqual([model.id for model in self.anthropic.models.list()], [MODEL])
        self.assertEqual(self.anthropic.models.retrieve(MODEL).id, MODEL)


class ClaudeCode(ClientCalls):
    """Bodies that Claude Code sent, texts shortened: as they were they are longer than the model's 8192 tokens."""

    client = "Claude Code (recorded requests)"

    def setUp(self) -> None:
        super().setUp()
        self.recorded = json.loads(RECORDED.read_text(encoding="utf-8"))

    def _post(self, path: str, body: Any) -> str:
        headers = {"content-type": "application/json", "x-api-key": "-", **self.recorded["headers"]}
        request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            return str(reply.read().decode())

    def _check_stream(self, name: str) -> None:
        body = {**self.recorded["requests"][name], "model": MODEL, "max_tokens": 60}
        blocks = self._post(self.recorded["path"], body).removesuffix("\n\n").split("\n\n")
        events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        (reason,) = [event["delta"]["stop_reason"] for event in events if event["type"] == "message_delta"]
        calls = [block for block in starts if block["type"] == "tool_use"]
        self.assertLessEqual({block["name"] for block in calls}, {tool["name"] for tool in body["tools"]})
        self.assertTrue(calls or "".join(delta.get("text", "") for delta in deltas).strip())
        self.assertEqual(reason == "tool_use", bool(calls))
        counted = {key: body[key] for key in ("model", "messages", "system", "tools", "thinking", "output_config")}
        usage = events[0]["message"]["usage"]
        count = json.loads(self._post("/v1/messages/count_tokens?beta=true", counted))["input_tokens"]
        self.assertEqual(count, usage["input_tokens"] + usage["cache_read_input_tokens"])

    @call("main loop with tool search (deferred tools), count_tokens", "text or known tools; stop_reason; equal counts")
    def test_tool_search(self) -> None:
        self._check_stream("tool search")

    @call("main loop with all tools, count_tokens", "text or known tools; stop_reason; equal counts")
    def test_all_tools(self) -> None:
        self._check_stream("all tools")

"""Tools over HTTP: in the prompt, in whole and streamed answers, in the next turn, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.tokenization import chat_templates
from tests.tokenization import control_kinds as kinds

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@asynccontextmanager
async def served(
    folder: Path, script: str, template: str = chat_templates.QWEN, **parsers: str
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    tokenizer = TextTokenizer(kinds.write(folder, "byte-level", template), max_length=4000)
    engine = FakeEngine(tokenizer, lambda context: script)
    engine.parsers = ModelParsers.of(tokenizer, **parsers)
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client, engine


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(CHAT, json={"messages": [HI], "tools": TOOLS, **fields})
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def refusal(client: httpx.AsyncClient, **fields: Any) -> tuple[str, str]:
    reply = await client.post(CHAT, json={"messages": [HI], "tools": TOOLS, **fields})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["param"], reply.json()["error"]["message"]


async def chunks_of(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": [HI], "tools": TOOLS, "stream": True, **fields}
    events = (await client.post(CHAT, json=body)).text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode_ids(engine.contexts[-1].tokens.prompt.tolist())


async def test_a_whole_answer(tmp_path: Path) -> None:
    async with served(tmp_path, f"Let me see.\n{CALL}\n{TIME_CALL}") as (client, engine):
        choice = await ask(client)
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert (message["role"], message["content"]) == ("assistant", "Let me see.")
        first, second = message["tool_calls"]
        assert first["type"] == "function"
        assert first["id"].startswith("call_")
        assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
        assert second["function"] == {"name": "get_time", "arguments": "{}"}
        assert second["id"] != first["id"]
        prompt = prompt_of(engine)
        assert json.dumps(WEATHER) in prompt
        assert '"parameters": {"type": "object", "properties": {}}' in prompt


async def test_content_is_null_beside_calls_alone(tmp_path: Path) -> None:
    async with served(tmp_path, CALL) as (client, _):
        assert (await ask(client))["message"]["content"] is None
        assert (await ask(client, max_tokens=2))["message"]["content"] == "<t"
    async with served(tmp_path / "b", "no calls ") as (client, _):
        choice = await ask(client)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "no calls ")
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
async def test_a_stream(tmp_path: Path, tokens_per_output: int) -> None:
    async with served(tmp_path, f"See.\n{CALL}\n{TIME_CALL}") as (client, engine):
        engine.tokens_per_output = tokens_per_output
        chunks = await chunks_of(client, stream_options={"include_usage": True})
        usage = chunks.pop()
        assert usage["choices"] == []
        tokens = engine.contexts[0].tokens
        assert usage["usage"]["completion_tokens"] == len(tokens) - tokens.prompt_length
        choices = [chunk["choices"][0] for chunk in chunks]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert (deltas[-1], choices[-1]["finish_reason"]) == ({}, "tool_calls")
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert "".join(delta.get("content", "") for delta in deltas) == "See."
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        starts = [call for call in calls if "id" in call]
        assert [(call["index"], call["type"], call["function"]["name"]) for call in starts] == [
            (0, "function", "get_weather"),
            (1, "function", "get_time"),
        ]
        arguments = ["".join(c["function"]["arguments"] for c in calls if c["index"] == index) for index in (0, 1)]
        assert arguments == ['{"city": "Bern"}', "{}"]
        assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
        if tokens_per_output == 1:
            assert len(calls) > 10


async def test_pieces_of_arguments_go_out_before_the_call_is_complete(tmp_path: Path) -> None:
    async with served(tmp_path, CALL) as (client, _):
        length = CALL.index("Bern") + 2
        chunks = await chunks_of(client, max_tokens=length)
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Be'
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_several_choices(tmp_path: Path) -> None:
    async with served(tmp_path, CALL) as (client, engine):
        said = iter([CALL, "text", TIME_CALL])
        engine.script = lambda context: next(said)
        reply = await client.post(CHAT, json={"messages": [HI], "tools": TOOLS, "n": 3})
        reasons = [choice["finish_reason"] for choice in reply.json()["choices"]]
        assert reasons == ["tool_calls", "stop", "tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_most(tmp_path: Path, stream: bool) -> None:
    async with served(tmp_path, f"{CALL}{TIME_CALL} and more") as (client, engine):
        if stream:
            chunks = await chunks_of(client, parallel_tool_calls=False)
            names = [c["function"].get("name") for k in chunks for c in k["choices"][0]["delta"].get("tool_calls", ())]
            assert [name for name in names if name] == ["get_weather"]
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = await ask(client, parallel_tool_calls=False)
            assert len(choice["message"]["tool_calls"]) == 1
            reason = choice["finish_reason"]
        assert reason == "tool_calls"
        assert engine.contexts[0].request_id in engine.cancelled


async def test_none_neither_tells_of_tools_nor_reads_calls(tmp_path: Path) -> None:
    async with served(tmp_path, CALL) as (client, engine):
        choice = await ask(client, tool_choice="none")
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)
        assert "get_weather" not in prompt_of(engine)


async def test_stop_strings_and_log_probabilities_beside_calls(tmp_path: Path) -> None:
    async with served(tmp_path, f"Well.{CALL} STOP") as (client, _):
        choice = await ask(client, stop=" STOP", logprobs=True)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Well."
        logged = "".join(entry["token"] for entry in choice["logprobs"]["content"])
        assert logged == f"Well.{CALL}"
        chunks = await chunks_of(client, stop=" STOP", logprobs=True)
        entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert "".join(e["token"] for logs in entries if logs for e in logs["content"]) == logged


@pytest.mark.parametrize("as_dict", [True, False])
async def test_the_conversation_goes_on(tmp_path: Path, as_dict: bool) -> None:
    async with (
        served(tmp_path, CALL) as (client, engine),
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", max_retries=0, http_client=client) as caller,
    ):
        create: Any = caller.chat.completions.create
        message = (await create(model="fake", messages=[HI], tools=TOOLS)).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        said = message.model_dump() if as_dict else message
        await create(model="fake", messages=[HI, said, result], tools=TOOLS)
        prompt = prompt_of(engine)
        assert f"<|im_start|>assistant\n\n{CALL}<|im_end|>" in prompt
        assert "<tool_response>\nrain\n</tool_response>" in prompt


async def test_the_official_client_puts_a_stream_together(tmp_path: Path) -> None:
    tools: Any = [{**tool, "function": {**tool["function"], "strict": False}} for tool in (WEATHER, TIME)]
    async with (
        served(tmp_path, f"{CALL}{TIME_CALL}") as (client, engine),
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", http_client=client) as caller,
    ):
        streamed: Any = caller.chat.completions.stream
        async with streamed(model="fake", messages=[HI], tools=tools) as stream:
            kinds_seen = {event.type async for event in stream}
            message = (await stream.get_final_completion()).choices[0].message
        assert "tool_calls.function.arguments.delta" in kinds_seen
        assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Bern"}', "{}"]
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        create: Any = caller.chat.completions.create
        await create(model="fake", messages=[HI, message, result], tools=tools)
        assert CALL in prompt_of(engine)


async def test_a_call_that_was_cut_off_is_taken_back(tmp_path: Path) -> None:
    async with served(tmp_path, "hello") as (client, engine):
        function = {"name": "get_weather", "arguments": '{"city": "Be'}
        call = {"id": "call_1", "type": "function", "index": 0, "function": function}
        messages = [HI, {"role": "assistant", "content": None, "tool_calls": [call]}, HI]
        await ask(client, messages=messages)
        assert '{"city": "Be' in prompt_of(engine)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [TIME, TIME]}, "tools", "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [TIME] * 129}, "tools", "128"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "not in tools"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tools": {"a": 1}}, "tools", "list"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]}, "tools[0]", "dictionary"),
    ],
)
async def test_refusals(tmp_path: Path, fields: dict[str, Any], param: str, words: str) -> None:
    async with served(tmp_path, "hello") as (client, engine):
        named, message = await refusal(client, **fields)
        assert named.startswith(param)
        assert words in message
        assert not engine.contexts


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
async def test_a_choice_without_tools_asks_for_nothing(tmp_path: Path, choice: str) -> None:
    """LlamaIndex sends `tool_choice: "required"` by itself when it asks for a text."""
    async with served(tmp_path, CALL) as (client, engine):
        alone = await ask(client, tools=None, tool_choice=choice)
        assert (alone["message"]["content"], alone["message"].get("tool_calls")) == (CALL, None)
        await ask(client, tools=None)
        assert engine.contexts[0].tokens.prompt.tolist() == engine.contexts[1].tokens.prompt.tolist()


async def test_without_a_parser_tools_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path, CALL, tool_call_parser="none") as (client, _):
        param, message = await refusal(client)
        assert param == "tools"
        assert "--tool-call-parser" in message
        assert (await ask(client, tool_choice="none"))["message"]["content"] == CALL
        model = (await client.get("/v1/models/fake")).json()
        assert model["tool_call_parser"] == "none"


# Models whose template knows no tools.


@pytest.mark.parametrize("template", [chat_templates.CHATML, chat_templates.GEMMA, chat_templates.MISTRAL])
async def test_tools_are_described_where_the_template_does_not(tmp_path: Path, template: str) -> None:
    async with served(tmp_path, CALL, template) as (client, engine):
        choice = await ask(client)
        assert choice["finish_reason"] == "tool_calls"
        prompt = prompt_of(engine)
        assert json.dumps(WEATHER["function"]) in prompt
        assert "<tool_call>" in prompt
        call = choice["message"]
        results = [{"role": "tool", "tool_call_id": "1", "content": text} for text in ("rain", "noon")]
        await ask(client, messages=[HI, call, *results])
        prompt = prompt_of(engine)
        assert CALL in prompt
        assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>" in prompt
        await ask(client, messages=[HI, call, *results], tools=[])
        assert CALL in prompt_of(engine)
        assert "You can call" not in prompt_of(engine)


async def test_the_description_joins_a_system_message(tmp_path: Path) -> None:
    async with served(tmp_path, CALL, chat_templates.CHATML) as (client, engine):
        await ask(client, messages=[{"role": "system", "content": "Be brief."}, HI])
        assert prompt_of(engine).startswith("<|im_start|>system\nBe brief.\n\nYou can call")
        parts = [{"type": "text", "text": "Be brief."}]
        await ask(client, messages=[{"role": "system", "content": parts}, HI])
        assert "Be brief.\nYou can call" in prompt_of(engine).replace("\n\n", "\n")


# Markers that are special tokens.


def with_special_tokens(folder: Path, *names: str) -> TextTokenizer:
    """A tokenizer of bytes with more special tokens."""
    write_byte_level(folder)
    config = json.loads((folder / "tokenizer.json").read_text())
    for number, name in enumerate(names, start=600):
        config["added_tokens"].append({**config["added_tokens"][0], "id": number, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 700, "eos_token_id": 2}))
    return TextTokenizer(folder, max_length=4000)


@asynccontextmanager
async def served_by(tokenizer: TextTokenizer, script: str, **parsers: str) -> AsyncIterator[httpx.AsyncClient]:
    engine = FakeEngine(tokenizer, lambda context: script)
    engine.parsers = ModelParsers.of(tokenizer, **parsers)
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_markers_that_are_special_tokens(tmp_path: Path) -> None:
    """The parser sees them, and other texts do not show them."""
    tokenizer = with_special_tokens(tmp_path, "[TOOL_CALLS]", "[ARGS]")
    said = '<pad>a[TOOL_CALLS]get_time[ARGS]{"a": "ü"}<pad>'
    async with served_by(tokenizer, said, tool_call_parser="mistral") as client:
        choice = await ask(client)
        assert choice["message"]["content"] == "a"
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": '{"a": "ü"}'}
        assert len(call["id"]) == 9
        choice = await ask(client, tool_choice="none")
        assert choice["message"]["content"] == 'aget_time{"a": "ü"}'
        choice = await ask(client, stop="} ", logprobs=True)
        assert choice["message"]["tool_calls"] == [{**call, "id": choice["message"]["tool_calls"][0]["id"]}]
        logged = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "[TOOL_CALLS]" in logged
        assert len(logged) == len(tokenizer.encode_text(said, False))


@pytest.mark.parametrize("stream", [False, True])
async def test_harmony(tmp_path: Path, stream: bool) -> None:
    names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>")
    tokenizer = with_special_tokens(tmp_path, *names)
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Bern"}<|call|>'
    )
    parsers = {"tool_call_parser": "harmony", "reasoning_parser": "harmony"}
    async with served_by(tokenizer, said, **parsers) as client:
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in await chunks_of(client)]
            assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
            assert "".join(delta.get("content", "") for delta in deltas) == ""
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
            return
        message = (await ask(client))["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
        assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}

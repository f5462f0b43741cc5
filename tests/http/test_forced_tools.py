"""Tool calls that a grammar makes: forced ones, strict ones, and real ones of a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch

from max_ray.interfaces import GrammarSpec
from max_ray.kv_cache import LocalKVCacheClient
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.tool_fields import ChatOutput
from max_ray.serve.api.tool_grammar import forced_calls, strict_calls, tool_grammar
from max_ray.structured_output import GrammarChecker, Reasoning
from tests.checkpoints import make_llama
from tests.http.test_structured_output import ModelEngine
from tests.http.test_tools import CALL, CHAT, HI, SCHEMA, TIME, TOOLS, WEATHER, ask, chunks_of, refusal, served
from tests.tokenization import chat_templates

NAMED = {"type": "function", "function": {"name": "get_weather"}}
STRICT_WEATHER = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
REFERRING = {
    "type": "object",
    "properties": {"one": {"$ref": "#/$defs/item"}, "tree": {"$ref": "#"}, "word": {"enum": ["#/a", "$ref"]}},
    "required": ["one", "word"],
    "additionalProperties": False,
    "$defs": {"item": {"type": "integer", "minimum": 1, "maximum": 9}},
}
BOUNDED: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    {**REFERRING, "properties": {**REFERRING["properties"], "tree": {"type": "null"}}},
    {"type": "object", "properties": {}, "additionalProperties": False},
]
REAL_TOOLS = [
    {"type": "function", "function": {"name": f"f{number}", "parameters": schema}}
    for number, schema in enumerate(BOUNDED)
]


def spec_of(engine: Any) -> Any:
    spec = engine.contexts[-1].sampling_params.structured_output
    return Reasoning.of(spec).answer if spec is not None and spec.kind == "reasoning" else spec


async def test_a_named_function(tmp_path: Path) -> None:
    said = '{"name": "get_weather", "arguments": {"city": "Bern"}}'
    async with served(tmp_path, said) as (client, engine):
        choice = await ask(client, tool_choice=NAMED)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
        schema = json.loads(spec_of(engine).text)
        assert schema["properties"]["name"] == {"const": "get_weather"}
        assert schema["$defs"]["tool_0"] == SCHEMA
        calls = [
            call
            for chunk in await chunks_of(client, tool_choice=NAMED)
            for call in chunk["choices"][0]["delta"].get("tool_calls", ())
        ]
        assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
        assert len(calls) > 10


async def test_required_allows_several_calls(tmp_path: Path) -> None:
    said = '[{"name": "get_weather", "arguments": {"city": "Bern"}}, {"name": "get_time", "arguments": {}}]'
    async with served(tmp_path, said) as (client, engine):
        names = [c["function"]["name"] for c in (await ask(client, tool_choice="required"))["message"]["tool_calls"]]
        assert names == ["get_weather", "get_time"]
        assert json.loads(spec_of(engine).text)["maxItems"] == 8
        await ask(client, tool_choice="required", parallel_tool_calls=False)
        assert "maxItems" not in json.loads(spec_of(engine).text)


async def test_a_prompt_that_begins_a_thought_does_not_hide_a_forced_call(tmp_path: Path) -> None:
    async with served(tmp_path, '{"name": "get_weather", "arguments": {}}', chat_templates.DEEPSEEK) as (client, _):
        message = (await ask(client, tool_choice=NAMED))["message"]
        assert message["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_strict_functions_with_auto(tmp_path: Path) -> None:
    async with served(tmp_path, f"Well. {CALL}") as (client, engine):
        choice = await ask(client, tools=[STRICT_WEATHER, TIME])
        assert choice["message"]["content"] == "Well."
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        structures = json.loads(spec_of(engine).text)["structures"]
        assert [structure["schema"] for structure in structures] == [SCHEMA, {"type": "object"}]
    async with served(tmp_path / "b", CALL, chat_templates.CHATML) as (client, engine):
        await ask(client, tools=[STRICT_WEATHER])
        assert spec_of(engine).kind == "structural_tag"
        await ask(client, tools=[STRICT_WEATHER], tool_choice="none")
        assert spec_of(engine) is None


@pytest.mark.parametrize("parser", ["hermes", "mistral"])
async def test_an_answer_by_schema_or_a_call(tmp_path: Path, parser: str) -> None:
    """With `auto` the model may still call a tool."""
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    call = CALL if parser == "hermes" else '{"name": "get_weather", "arguments": {"city": "Bern"}}'
    async with served(tmp_path, call, tool_call_parser=parser) as (client, engine):
        choice = await ask(client, response_format=answer)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
        engine.script = lambda context: '{"city": "Rome"}'
        choice = await ask(client, response_format=answer)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '{"city": "Rome"}')
        assert spec_of(engine).kind == ("lark" if parser == "hermes" else "json_schema")


async def test_refusals(tmp_path: Path) -> None:
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    unknown = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    async with served(tmp_path, CALL) as (client, engine):
        param, message = await refusal(client, tool_choice="required", response_format=answer)
        assert param.startswith("response_format")
        assert "leave out one of them" in message
        param, message = await refusal(client, guided_regex="a")
        assert param == "guided_regex"
        param, message = await refusal(client, guided_json="{")
        assert (param, message) == ("guided_json", "The JSON schema of guided_json is not valid JSON.")
        param, message = await refusal(client, tools=[unknown], tool_choice="required")
        assert param == "tools"
        assert "'not'" in message
        assert not engine.contexts
    async with served(tmp_path / "b", CALL, tool_call_parser="llama3_json") as (client, _):
        param, message = await refusal(client, tools=[STRICT_WEATHER])
        assert param == "tools"
        assert "'required'" in message
        assert (await client.post(CHAT, json={"messages": [HI], "tools": TOOLS})).status_code == 200


def test_the_grammars_compile() -> None:
    """With references into the tools' own schemas."""
    checker = GrammarChecker()
    tools = {"f": REFERRING, "g": {**REFERRING, "$id": "https://example.org/g"}, "h": {}}
    try:
        for choice in ("required", "named"):
            for parallel in (True, False):
                checker.check(forced_calls(ChatOutput(tools=tools, choice=choice, is_parallel=parallel)))  # type: ignore[arg-type]
        chat = ChatOutput(tools=tools, strict=frozenset(["f"]), choice="auto")
        checker.check(strict_calls(chat))
        for parser in ("hermes", "mistral"):
            for answer in (GrammarSpec("json_schema", json.dumps(REFERRING)), GrammarSpec("json_object")):
                grammar, _ = tool_grammar(chat, answer, "response_format", parser, {})
                assert grammar is not None
                checker.check(grammar)
    finally:
        checker.close()


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    torch.set_num_threads(1)
    folder = make_llama(tmp_path, max_position_embeddings=4096)
    config = PipelineConfig(model_path=str(folder), num_threads=1, devices="cpu", max_length=3000)
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    loop = GenerationLoop(pipeline, LocalKVCacheClient(pipeline.kv_manager), SchedulerLimits(16, 512, 64, 8))
    task = asyncio.create_task(loop.run())
    transport = httpx.ASGITransport(build_api(ModelEngine(tokenizer, loop)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
        yield client
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("least", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_forced_calls_parse_and_validate(real: httpx.AsyncClient, least: int) -> None:
    num_calls = 0
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "f1"}}]
    for seed in range(100):
        body = {"messages": [HI], "tools": REAL_TOOLS, "tool_choice": choices[seed % 2], "n": 8, "seed": 8 * seed}
        reply = await real.post(CHAT, json=body)
        assert reply.status_code == 200, reply.text
        for choice in reply.json()["choices"]:
            assert choice["finish_reason"] == "tool_calls"
            for call in choice["message"]["tool_calls"]:
                schema = BOUNDED[int(call["function"]["name"].removeprefix("f"))]
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
                num_calls += 1
        if num_calls >= least:
            return
    pytest.fail(f"only {num_calls} calls")


async def test_an_answer_by_schema_or_real_calls(real: httpx.AsyncClient) -> None:
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": BOUNDED[0]}}
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in REAL_TOOLS]  # type: ignore[dict-item]
    body = {"messages": [HI], "tools": strict, "response_format": answer, "n": 16, "seed": 1, "max_tokens": 1500}
    choices = (await real.post(CHAT, json=body)).json()["choices"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert {"stop", "tool_calls"} <= set(reasons)
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()) if choice["finish_reason"] == "tool_calls" else ():
            jsonschema.validate(json.loads(call["function"]["arguments"]), BOUNDED[int(call["function"]["name"][1])])
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), BOUNDED[0])

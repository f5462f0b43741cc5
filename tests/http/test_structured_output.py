"""Structured output by HTTP: every field and alias, what is refused, and real texts of a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch

from max_ray.interfaces import GrammarSpec, TextContext, TextGenerationOutput
from max_ray.kv_cache import LocalKVCacheClient
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from max_ray.serve.api.routes import build_api
from tests.checkpoints import make_llama
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hi"},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f>"],
}
TEXT = json.dumps(SCHEMA)
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}

FIELDS: list[tuple[dict[str, Any], GrammarSpec]] = [
    ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
    ({"response_format": NAMED}, GrammarSpec("json_schema", TEXT)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED["json_schema"], "strict": True}}},  # type: ignore[dict-item]
        GrammarSpec("json_schema", TEXT),
    ),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, GrammarSpec("json_schema", TEXT)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, GrammarSpec("json_schema", TEXT)),
    ({"response_format": TAGS}, GrammarSpec("structural_tag", json.dumps(TAGS))),
    ({"guided_json": SCHEMA}, GrammarSpec("json_schema", TEXT)),
    ({"guided_json": TEXT}, GrammarSpec("json_schema", TEXT)),
    ({"guided_json_object": True}, GrammarSpec("json_object")),
    ({"guided_regex": "[a-z]+"}, GrammarSpec("regex", "[a-z]+")),
    ({"guided_choice": ["a", "b"]}, GrammarSpec("choice", '["a", "b"]')),
    ({"guided_grammar": 'start: "a"'}, GrammarSpec("lark", 'start: "a"')),
    ({"guided_grammar": 'root ::= "a"'}, GrammarSpec("gbnf", 'root ::= "a"')),
    ({"grammar": 'root ::= "a"'}, GrammarSpec("gbnf", 'root ::= "a"')),
    ({"ebnf": 'root ::= "a"'}, GrammarSpec("gbnf", 'root ::= "a"')),
    ({"regex": "a+"}, GrammarSpec("regex", "a+")),
    ({"json_schema": SCHEMA}, GrammarSpec("json_schema", TEXT)),
    ({"json_schema": TEXT}, GrammarSpec("json_schema", TEXT)),
    ({"structural_tag": json.dumps(TAGS)}, GrammarSpec("structural_tag", json.dumps(TAGS))),
    ({"structured_outputs": {"json": SCHEMA}}, GrammarSpec("json_schema", TEXT)),
    ({"structured_outputs": {"regex": "a+"}}, GrammarSpec("regex", "a+")),
    ({"structured_outputs": {"choice": ["a"]}}, GrammarSpec("choice", '["a"]')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, GrammarSpec("lark", 'start: "a"')),
    ({"structured_outputs": {"json_object": True}}, GrammarSpec("json_object")),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}},
        GrammarSpec("json_schema", TEXT, "flexible"),
    ),
    ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, GrammarSpec("json_schema", TEXT)),
]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "spec"), FIELDS)
async def test_every_name_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fields: dict[str, Any], spec: GrammarSpec
) -> None:
    reply = await client.post(route, json={**REQUESTS[route], **fields})
    assert reply.status_code == 200, reply.text
    assert engine.contexts[0].sampling_params.structured_output == spec


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None},
        {"grammar": "", "guided_json_object": False},
        {"structured_outputs": {"json_object": False}},
    ],
)
async def test_what_asks_for_nothing(client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any]) -> None:
    reply = await client.post(CHAT, json={**REQUESTS[CHAT], **fields})
    assert reply.status_code == 200, reply.text
    assert engine.contexts[0].sampling_params.structured_output is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "text", "a": 1}}, "response_format.a", "Unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "'not' at $",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
            "response_format.json_schema.strict",
            "true or false",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
            "an object",
        ),
        ({"guided_json": {"type": "object", "propertis": {}}}, "guided_json", "Did you mean 'properties'"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "x-guidance"),
        ({"guided_json": {"properties": {"a": {"uniqueItems": True}}}}, "guided_json", "at $.properties.a"),
        ({"guided_regex": "a("}, "guided_regex", "compiled"),
        ({"guided_regex": 5}, "guided_regex", "must be a text"),
        ({"guided_choice": "ab"}, "guided_choice", "list"),
        ({"guided_choice": []}, "guided_choice", "1 to"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "texts"),
        ({"guided_grammar": "start: <|im_end|>"}, "guided_grammar", "special token"),
        ({"grammar": "root ::= (("}, "grammar", "GBNF"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "Unknown"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "not",
        ),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "both"),
        ({"guided_json": {}, "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"guided_json": {}, "min_tokens": 3}, "min_tokens", "grammar"),
        ({"structural_tag": "{}"}, "structural_tag", "structures"),
        ({"guided_json": {"const": "a" * 300_000}}, "guided_json", "more than"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_enforced_is_a_400(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    error = error_of(await client.post(CHAT, json={**REQUESTS[CHAT], **fields, "stream": stream}), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.contexts


class ModelEngine(FakeEngine):
    """A loop over the real pipeline of a tiny model, in this process."""

    def __init__(self, tokenizer: Any, loop: GenerationLoop) -> None:
        super().__init__(tokenizer, lambda context: "")
        self._loop = loop

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        self.contexts.append(context)
        return self._loop.submit(context)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    folder: Path = make_llama(tmp_path_factory.mktemp("structured"))
    config = PipelineConfig(model_path=str(folder), num_threads=1, devices="cpu", kv_cache_page_size=4, max_length=250)
    return PIPELINE_REGISTRY.retrieve(config)


@pytest.fixture
async def real(model: tuple[Any, Any]) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer, pipeline = model
    loop = GenerationLoop(pipeline, LocalKVCacheClient(pipeline.kv_manager), SchedulerLimits(8, 64, 20, 8))
    task = asyncio.create_task(loop.run())
    transport = httpx.ASGITransport(build_api(ModelEngine(tokenizer, loop)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def official(real: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=real)


def check(text: str, finish_reason: str | None) -> None:
    assert finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


async def test_a_schema_with_n_choices_and_log_probabilities(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        response_format=NAMED,  # type: ignore[arg-type]
        n=4,
        logprobs=True,
        top_logprobs=2,
        seed=1,
    )
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice in answer.choices:
        check(choice.message.content or "", choice.finish_reason)
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


async def test_a_streamed_schema(official: openai.AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        response_format=NAMED,  # type: ignore[arg-type]
        stream=True,
        seed=5,
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    check("".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "<" ("a" | "b") ">"'}, "<[ab]>"),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 1}, r"\{"),
    ],
)
async def test_other_kinds(real: httpx.AsyncClient, fields: dict[str, Any], pattern: str) -> None:
    reply = await real.post(COMPLETIONS, json={"prompt": ["hi", "there"], "n": 2, "max_tokens": 60, **fields})
    for choice in reply.json()["choices"]:
        assert re.fullmatch(pattern, choice["text"])


async def test_requests_with_and_without_it_share_a_batch(real: httpx.AsyncClient) -> None:
    plain = {"prompt": "hi", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    alone = (await real.post(COMPLETIONS, json=plain)).json()["choices"][0]["text"]
    bodies = [
        {"prompt": "hi", "max_tokens": 60, "guided_json": SCHEMA},
        plain,
        {**plain, "guided_regex": "[a-z]{9}", "ignore_eos": False},
    ]
    schema, free, regex = await asyncio.gather(*(real.post(COMPLETIONS, json=body) for body in bodies))
    check(schema.json()["choices"][0]["text"], schema.json()["choices"][0]["finish_reason"])
    assert free.json()["choices"][0]["text"] == alone
    assert re.fullmatch("[a-z]{9}", regex.json()["choices"][0]["text"])

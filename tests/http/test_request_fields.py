"""What a request asks for decides, not the names in it: null, neutral values, labels, and hints that do not mislead."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from max_ray.errors import nearest
from max_ray.serve.api.answer import generate
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest, Message
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"role": "user", "content": "hi"}
AGAIN = {"role": "user", "content": "more"}
REQUESTS: dict[str, dict[str, Any]] = {CHAT: {"messages": [HELLO]}, COMPLETIONS: {"prompt": "a"}}
RENDERED = "<|user|>hi<|assistant|>hello<|user|>more<|assistant|>"


async def rendered(engine: FakeEngine) -> str:
    return await engine.tokenizer.decode(engine.contexts[-1].tokens.prompt)


# What the server itself gives is taken back.


async def test_the_official_client_goes_on_with_an_answer(server_url: str, engine: FakeEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any", max_retries=0) as client:
        create: Any = client.chat.completions.create
        message = (await create(model="fake", messages=[HELLO])).choices[0].message
        for form in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            await create(model="fake", messages=[HELLO, form, AGAIN])
            assert await rendered(engine) == RENDERED
        async with client.chat.completions.stream(model="fake", messages=[HELLO]) as stream:  # type: ignore[list-item]
            parsed = (await stream.get_final_completion()).choices[0].message
        for form in (parsed, parsed.model_dump()):
            await create(model="fake", messages=[HELLO, form, AGAIN])
            assert await rendered(engine) == RENDERED


async def test_deltas_put_together_are_taken_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    reply = await client.post(CHAT, json={"messages": [HELLO], "stream": True})
    message: dict[str, Any] = {}
    for event in reply.text.removesuffix("\n\n").split("\n\n")[:-1]:
        delta = json.loads(event.removeprefix("data: "))["choices"][0]["delta"]
        message = {**message, **delta, "content": message.get("content", "") + delta.get("content", "")}
    assert (await client.post(CHAT, json={"messages": [HELLO, message, AGAIN]})).status_code == 200
    assert await rendered(engine) == RENDERED


@pytest.mark.parametrize(
    "empty",
    [
        {"content": None},
        {},
        {"content": "", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"content": None, "name": None, "reasoning_content": None, "parsed": None, "tool_call_id": None},
    ],
)
async def test_an_answer_without_text_is_an_empty_turn(
    client: httpx.AsyncClient, engine: FakeEngine, empty: dict[str, Any]
) -> None:
    messages = [HELLO, {"role": "assistant", **empty}, AGAIN]
    assert (await client.post(CHAT, json={"messages": messages})).status_code == 200
    assert await rendered(engine) == "<|user|>hi<|assistant|><|user|>more<|assistant|>"


async def test_null_is_not_given_at_every_level(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    part = {"type": "text", "text": "hi", "cache_control": None, "annotations": None}
    body = {
        "messages": [{"role": "user", "content": [part], "name": None}],
        "stream": True,
        "stream_options": {"include_usage": None, "include_obfuscation": None},
        "metadata": None,
        "tools": None,
        "guided_json": None,
        "n": None,
        "logprobs": None,
    }
    assert (await client.post(CHAT, json=body)).status_code == 200
    assert await rendered(engine) == "<|user|>hi<|assistant|>"


@pytest.mark.parametrize("as_dict", [True, False])
async def test_a_python_caller_goes_on_with_an_answer(engine: FakeEngine, as_dict: bool) -> None:
    message: Any = ChatCompletionMessage(role="assistant", content="hello")
    messages: Any = [Message(**HELLO), message.model_dump() if as_dict else message, AGAIN]
    [_] = [part async for part in generate(engine, ChatCompletionRequest(messages=messages, n=None, user="me"))]
    assert await rendered(engine) == RENDERED


def test_a_python_caller_is_told_the_field() -> None:
    with pytest.raises(ValidationError, match=r"Unknown field 'temprature'\. Did you mean 'temperature'"):
        CompletionRequest(prompt="a", temprature=1)  # type: ignore[call-arg]


# Neutral values.

BOTH: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"tools": []},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none", "functions": [], "function_call": "none"},
    {"logit_bias": {}},
    {"best_of": 1},
    {"best_of": 2, "n": 2},
    {"store": False, "service_tier": "auto"},
    {"stream_options": {"include_usage": False}},
    {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
    {"use_beam_search": False, "length_penalty": 1, "guided_json": None, "bad_words": [], "priority": 0},
    {"cache_prompt": True, "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1.0, "repeat_penalty": 1.0, "id_slot": -1},
    {"grammar": "", "xtc_probability": 0.0, "xtc_threshold": 0.1, "dry_multiplier": 0, "n_probs": 0, "samplers": None},
]
ONE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"suffix": ""}),
    (COMPLETIONS, {"add_special_tokens": True}),
    (CHAT, {"modalities": ["text"], "prediction": None, "audio": None, "verbosity": "medium"}),
    (CHAT, {"echo": False, "add_special_tokens": False, "add_generation_prompt": True, "chat_template_kwargs": {}}),
    (CHAT, {"top_logprobs": 0, "logprobs": False}),
    (CHAT, {"messages": [{**HELLO, "cache_control": {"type": "ephemeral"}}]}),
]


@pytest.mark.parametrize(
    ("route", "fields"), [*[(route, fields) for route in (CHAT, COMPLETIONS) for fields in BOTH], *ONE]
)
async def test_what_asks_for_nothing_passes(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fields: dict[str, Any]
) -> None:
    plain = (await client.post(route, json={**REQUESTS[route], "n": fields.get("n", 1)})).json()
    reply = await client.post(route, json={**REQUESTS[route], **fields})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "Use 'tools'"),
        ({"function_call": {"name": "f"}}, "function_call", "Use 'tool_choice'"),
        ({"best_of": True}, "best_of", "best_of"),
        ({"store": True}, "store", "false"),
        ({"store": 0}, "store", "false"),
        ({"service_tier": "flex"}, "service_tier", '"auto" or "default"'),
        ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern", "only as null"),
        ({"use_beam_search": True}, "use_beam_search", "only as false"),
        ({"repeat_penalty": "x"}, "repeat_penalty", "must be a number"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty", "mean the same"),
        ({"n_predict": 5, "max_tokens": 6}, "n_predict", "mean the same"),
        ({"n_predict": True}, "n_predict", "whole number"),
        ({"use_beam_search": True}, "use_beam_search", "no beam search"),
        ({"mirostat": 2}, "mirostat", "only as 0"),
        ({"mirostat_tau": "x"}, "mirostat_tau", "a number"),
        ({"user": 5}, "user", "valid string"),
        ({"user": "x" * 513}, "user", "more than 512"),
        ({"metadata": {"a": 1}}, "metadata", "texts"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"k" * 513: "x"}}, "metadata", "at most 512"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "except as false"),
    ],
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_what_asks_for_something_is_named_with_what_would_pass(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(await client.post(route, json={**REQUESTS[route], **fields}), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.contexts


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[1].refusal"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "user", "content": "x", "reasoning_content": "hm"}, "messages[1].reasoning_content"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "x", "tool_call_id": "1"}, "messages[1].tool_call_id"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "system"}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": 1}]}, "messages[1].content[0]."),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0].type"),
    ],
)
async def test_parts_of_messages_that_ask_for_something(
    client: httpx.AsyncClient, engine: FakeEngine, message: dict[str, Any], param: str
) -> None:
    error = error_of(await client.post(CHAT, json={"messages": [HELLO, message]}), 400)
    assert error["param"].startswith(param)
    assert error["param"] in error["message"]
    assert not engine.contexts


def test_labels_are_in_the_job() -> None:
    labels = {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}}
    assert CompletionRequest(prompt="a", **labels).job().labels == labels  # type: ignore[arg-type]
    assert ChatCompletionRequest(messages=[Message(**HELLO)]).job().labels == {}


# Hints.


@pytest.mark.parametrize(
    ("route", "fields", "words"),
    [
        (CHAT, {"num_predict": 5}, "Use 'max_tokens'."),
        (CHAT, {"max_new_tokens": 5}, "Use 'max_tokens'."),
        (COMPLETIONS, {"max_completion_tokens": 5}, "Use 'max_tokens'."),
        (COMPLETIONS, {"messages": [HELLO]}, "/v1/chat/completions"),
        (CHAT, {"prompt": "x"}, "/v1/completions"),
        (CHAT, {"maxTokens": 5}, "Did you mean 'max_tokens'?"),
        (CHAT, {"top-p": 0.5}, "Did you mean 'top_p'?"),
        (CHAT, {"tempreature": 0.5}, "Did you mean 'temperature'?"),
    ],
)
async def test_a_name_that_means_a_field(
    client: httpx.AsyncClient, route: str, fields: dict[str, Any], words: str
) -> None:
    assert words in error_of(await client.post(route, json={**REQUESTS[route], **fields}), 400)["message"]


@pytest.mark.parametrize("name", ["sampling_method", "chat_templates_dir", "messages2go", "penalty", "x", "no", "tok"])
async def test_no_hint_is_better_than_a_wrong_one(client: httpx.AsyncClient, name: str) -> None:
    error = error_of(await client.post(CHAT, json={"messages": [HELLO], name: 1}), 400)
    assert error["message"] == f"Unknown field '{name}'."
    error = error_of(await client.post(CHAT, json={"messages": [{**HELLO, name: 1}]}), 400)
    assert error["message"] == f"Unknown field 'messages[0].{name}'."


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/responses", " Use /v1/responses."),
        ("/responses/", " Use /v1/responses."),
        ("/chat", " Use /v1/chat/completions."),
        ("/generate", " Use /v1/completions."),
        ("/v1/chat/completion", " Did you mean '/v1/chat/completions'?"),
        ("/v1/moderations", ""),
        ("/invocations", ""),
        ("/v1/" + "x" * 5000, ""),
    ],
)
async def test_unknown_routes(client: httpx.AsyncClient, path: str, words: str) -> None:
    message = error_of(await client.post(path, json={}), 404)["message"]
    assert message.endswith(f".{words}")
    assert len(message) < 400
    assert words or "Did you mean" not in message


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("ab", ["ac"], None),
        ("abc", ["abd"], "abd"),
        ("abc", ["ade"], None),
        ("max_lenght", ["max_length", "max_depth"], "max_length"),
        ("hots", ["port", "host"], "host"),
        ("Max-Length", ["max_length"], "max_length"),
        ("chat_template", ["temperature"], None),
        ("GemmaForCausalLM", ["LlamaForCausalLM"], None),
        ("x" * 100_000, ["x" * 99_999], None),
        ("anything", [], None),
    ],
)
def test_nearest(name: str, known: list[str], meant: str | None) -> None:
    assert nearest(name, known) == (f" Did you mean {meant!r}?" if meant else "")


async def test_a_float_without_a_fraction_is_a_whole_number(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": [65.0, 66], "max_tokens": 2.0, "temperature": 1.0, "stop_token_ids": [7.0]}
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 2
    assert engine.contexts[0].tokens.prompt.tolist() == [65, 66]
    assert engine.contexts[0].sampling_params.stop_token_ids == (7,)
    for wrong in ({"max_tokens": 2.5}, {"prompt": [65.5]}, {"n": 1.25}, {"seed": "1.0"}):
        error_of(await client.post("/v1/completions", json={"prompt": "a", **wrong}), 400)


async def test_an_item_whose_type_is_null_is_a_message(client: httpx.AsyncClient) -> None:
    item = {"type": None, "role": "user", "content": "hi"}
    assert (await client.post("/v1/responses", json={"input": [item]})).status_code == 200
    error_of(await client.post("/v1/responses", json={"input": [{"type": None, "content": "hi"}]}), 400)

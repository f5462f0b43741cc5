"""/v1/messages and /v1/messages/count_tokens: bodies, answers, events, errors; the official client if installed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from max_ray.errors import InsufficientBlocksError, MaxRayError, QueueFullError, WorkerGroupError
from max_ray.interfaces import PipelineTask
from max_ray.scheduler import SchedulerStats
from max_ray.serve.api import dialect
from tests.http.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hi"}]
EPHEMERAL = {"type": "ephemeral"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "max_tokens": 50, "messages": HELLO, **fields}


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(
        "/v1/messages?beta=true", json=body(**fields), headers={"anthropic-version": "2023-06-01"}
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """The events' data. Each event's name is its data's type."""
    events = []
    for block in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    reply = await client.post("/v1/messages", json=body(stream=True, **fields))
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return events_of(reply)


def error_of(reply: httpx.Response, status: int, kind: str) -> str:
    assert reply.status_code == status, reply.text
    content = reply.json()
    assert list(content) == ["type", "error"]
    assert (content["type"], content["error"]["type"]) == ("error", kind)
    return str(content["error"]["message"])


async def prompt_of(engine: FakeEngine) -> str:
    return await engine.tokenizer.decode(engine.contexts[-1].tokens.prompt)


async def test_a_whole_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.cached_tokens = 3
    answer = await ask(client)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "hello", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 6,
        },
    }
    assert await prompt_of(engine) == "<|user|>hi<|assistant|>"


async def test_the_events_of_a_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "ok"
    start, *rest = await streamed(client)
    message = start["message"]
    assert start["type"] == "message_start"
    assert (message["content"], message["stop_reason"], message["usage"]["input_tokens"]) == ([], None, 4)
    usage = {"input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 3}
    assert rest == [
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "o"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "k"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]


async def test_an_empty_answer_has_no_block(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: ""
    assert (await ask(client))["content"] == []
    kinds = [event["type"] for event in await streamed(client)]
    assert kinds == ["message_start", "ping", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "text"),
    [
        ({"max_tokens": 2}, "max_tokens", None, "he"),
        ({"stop_sequences": ["lo", "xx"]}, "stop_sequence", "lo", "hel"),
        ({"stop_sequences": ["zz"]}, "end_turn", None, "hello"),
        ({"stop_sequences": []}, "end_turn", None, "hello"),
    ],
)
async def test_stop_reasons(
    client: httpx.AsyncClient, fields: dict[str, Any], reason: str, sequence: str | None, text: str
) -> None:
    answer = await ask(client, **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"][0]["text"] == text
    events = await streamed(client, **fields)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == text


async def test_the_end_of_the_models_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "a" * 500
    assert (await ask(client, max_tokens=1000))["stop_reason"] == "model_context_window_exceeded"
    assert (await ask(client, max_tokens=100))["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    "system",
    [
        "s\nt",
        [{"type": "text", "text": "s", "cache_control": EPHEMERAL}, {"type": "text", "text": "t", "citations": None}],
    ],
)
async def test_system(client: httpx.AsyncClient, engine: FakeEngine, system: Any) -> None:
    await ask(client, system=system)
    assert await prompt_of(engine) == "<|system|>s\nt<|user|>hi<|assistant|>"


async def test_forms_of_messages(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Neighbours of one role are one message; the server's own blocks are taken back."""
    answer = await ask(client)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {**EPHEMERAL, "ttl": "1h"}}]},
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    await ask(client, messages=messages)
    assert await prompt_of(engine) == "<|user|>a\nb<|assistant|>hello<|user|>c\nd<|assistant|>"


async def test_sampling_and_labels(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, temperature=0.5, top_p=0.25, top_k=7, metadata={"user_id": "u1"}, max_tokens=9)
    params = engine.contexts[-1].sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.5, 0.25, 7, 9)


async def test_neutral_fields_pass(client: httpx.AsyncClient) -> None:
    neutral: dict[str, Any] = {
        "cache_control": EPHEMERAL,
        "service_tier": "auto",
        "thinking": {"type": "disabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "mcp_servers": [],
        "tools": [],
        "metadata": {},
        "container": None,
    }
    for name, value in neutral.items():
        await ask(client, **{name: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "'max_tokens' is required"),
        ({"max_tokens": 0}, "'max_tokens' is not valid"),
        ({"messages": []}, "'messages'"),
        ({"temprature": 1}, "Unknown field 'temprature'. Did you mean 'temperature'?"),
        ({"stop": ["a"]}, "Use 'stop_sequences'"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 17}, "'stop_sequences'"),
        ({"top_p": 2}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"thinking": {"type": "disabled", "x": 1}}, "thinking"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "'context_management'"),
        ({"mcp_servers": [{"type": "url"}]}, "'mcp_servers'"),
        ({"container": "c"}, "'container'"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source.media_type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "user",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": 1}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "it cannot bound it"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "budget_tokens"),
        ({"metadata": {"user_id": "a" * 600}}, "metadata.user_id"),
    ],
)
async def test_mistakes(client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], words: str) -> None:
    reply = await client.post("/v1/messages", json=body(**fields))
    assert words in error_of(reply, 400, "invalid_request_error")
    assert not engine.contexts


async def test_a_templates_refusal_names_the_message(client: httpx.AsyncClient) -> None:
    """Not the message of the chat that it became: there the system text comes first."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    messages = [*HELLO, {"role": "assistant", "content": "a"}, {"role": "user", "content": [image]}]
    message = error_of(
        await client.post("/v1/messages", json=body(system="s", messages=messages)), 400, "invalid_request_error"
    )
    assert "messages[2]" in message or "image" in message
    assert "messages[3]" not in message


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (QueueFullError("full", retry_after=2.5), 429, "rate_limit_error"),
        (InsufficientBlocksError("no room"), 503, "overloaded_error"),
        (MaxRayError("secret"), 500, "api_error"),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, engine: FakeEngine, failure: MaxRayError, status: int, kind: str
) -> None:
    engine.refuse = failure
    for stream in (False, True):
        reply = await client.post("/v1/messages", json=body(stream=stream))
        assert "secret" not in error_of(reply, status, kind)
    assert reply.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_guards_and_routes_speak_the_dialect(guarded: httpx.AsyncClient) -> None:
    key = {"x-api-key": "key-one"}
    error_of(await guarded.post("/v1/messages", json=body()), 401, "authentication_error")
    error_of(await guarded.get("/v1/messages", headers=key), 405, "invalid_request_error")
    error_of(await guarded.post("/v1/messages/batches", json={}, headers=key), 404, "not_found_error")
    error_of(await guarded.post("/v1/messages", json=body(model="other"), headers=key), 404, "not_found_error")
    error_of(await guarded.post("/v1/messages", json=body(system="a" * 2000), headers=key), 413, "request_too_large")
    error_of(await guarded.post("/v1/messages", content=b"{", headers=key), 400, "invalid_request_error")
    assert (await guarded.post("/v1/messages", json=body(), headers=key)).status_code == 200


async def test_a_foreign_page_is_refused_in_the_dialect(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/messages", json=body(), headers={"Origin": "http://evil.example"})
    error_of(reply, 403, "permission_error")


@pytest.mark.parametrize("failure", [WorkerGroupError("The workers are gone."), RuntimeError("secret")])
async def test_a_stream_that_fails_ends_with_an_error_event(
    client: httpx.AsyncClient, engine: FakeEngine, failure: Exception
) -> None:
    engine.failure, engine.fail_after = failure, 2
    events = await streamed(client)
    kind = "overloaded_error" if isinstance(failure, MaxRayError) else "api_error"
    assert events[-1]["error"]["type"] == kind
    assert "secret" not in json.dumps(events)
    status = 503 if isinstance(failure, MaxRayError) else 500
    assert engine.metrics.snapshot(SchedulerStats()).requests == {("/v1/messages", status): 1}


async def test_a_deadline_speaks_the_dialect(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    limit = {"x-request-timeout-seconds": "0.2"}
    error_of(await client.post("/v1/messages", json=body(), headers=limit), 408, "timeout_error")
    events = events_of(await client.post("/v1/messages", json=body(stream=True), headers=limit))
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "timeout_error")
    assert len(engine.cancelled) == 2


async def test_hanging_up_ends_the_request(server_url: str, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server_url) as client:
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/messages", json=body(stream=stream), timeout=0.3)
    async with asyncio.timeout(5):
        while len(engine.cancelled) < 2:
            await asyncio.sleep(0.01)


async def test_pings_while_a_prompt_is_processed(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "KEEP_ALIVE_S", 0.05)
    steps = engine._steps

    async def late(context: Any, ids: Any) -> Any:
        await asyncio.sleep(0.3)
        async for output in steps(context, ids):
            yield output

    monkeypatch.setattr(engine, "_steps", late)
    kinds = [event["type"] for event in await streamed(client)]
    assert kinds[:3] == ["message_start", "ping", "ping"]
    assert kinds[-1] == "message_stop"
    assert "ping" not in kinds[kinds.index("content_block_start") :]


async def test_count_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for fields in ({}, {"system": "s"}, {"messages": [{"role": "user", "content": "é" * 20}]}):
        counted = {name: value for name, value in body(**fields).items() if name != "max_tokens"}
        reply = await client.post("/v1/messages/count_tokens?beta=true", json=counted)
        assert reply.json() == {"input_tokens": (await ask(client, **fields))["usage"]["input_tokens"]}
    num_asked = len(engine.contexts)
    long = [{"role": "user", "content": "a" * 300}]
    assert (await client.post("/v1/messages/count_tokens", json={"messages": long})).json() == {"input_tokens": 302}
    assert len(engine.contexts) == num_asked, "nothing is generated"


async def test_count_tokens_mistakes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    path = "/v1/messages/count_tokens"
    kind = "invalid_request_error"
    assert "'max_tokens'" in error_of(await client.post(path, json=body()), 400, kind)
    assert "messages" in error_of(await client.post(path, json={}), 400, kind)
    error_of(await client.post(path, json={"messages": HELLO, "model": "other"}), 404, "not_found_error")
    long = [{"role": "user", "content": "a" * 90_000}]
    assert "at least" in error_of(await client.post(path, json={"messages": long}), 400, kind)
    engine.task = PipelineTask.EMBEDDINGS_GENERATION
    assert "embeddings" in error_of(await client.post(path, json={"messages": HELLO}), 400, kind)


async def test_random_texts_are_the_same_streamed_and_whole(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    rng = random.Random(3)
    for _ in range(40):
        text = "".join(rng.choice('ab"\\\n é😀\u2028</>') for _ in range(rng.randrange(25)))
        engine.script = lambda context, text=text: text  # type: ignore[misc]
        engine.tokens_per_output = rng.randrange(1, 4)
        answer, events = await ask(client, max_tokens=150), await streamed(client, max_tokens=150)
        pieces = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(pieces) == text
        assert [block["text"] for block in answer["content"]] == ([text] if text else [])
        assert events[-2]["usage"] == answer["usage"]


async def test_the_official_client(server_url: str, engine: FakeEngine) -> None:
    anthropic = pytest.importorskip("anthropic")
    async with anthropic.AsyncAnthropic(base_url=server_url, api_key="none", max_retries=0) as client:
        message = await client.messages.create(**body(system="s"))
        assert (message.content[0].text, message.stop_reason) == ("hello", "end_turn")
        async with client.messages.stream(**body()) as stream:
            assert "".join([text async for text in stream.text_stream]) == "hello"
            final = await stream.get_final_message()
        assert (final.content[0].text, final.usage.output_tokens, final.stop_reason) == ("hello", 6, "end_turn")
        follow = [*HELLO, {"role": "assistant", "content": final.content}, {"role": "user", "content": "more"}]
        assert (await client.messages.create(**body(messages=follow))).content
        beta = await client.beta.messages.create(**body(), betas=["context-1m-2025-08-07"])
        assert beta.content[0].text == "hello"
        counted = await client.messages.count_tokens(model="fake", messages=HELLO)
        assert counted.input_tokens == 4
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**body(model="other"))
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            await client.messages.create(**body(), extra_body={"temperature": -1})
        engine.refuse = QueueFullError("full", retry_after=1)
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**body())

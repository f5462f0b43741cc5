"""Everything that can go wrong, as a client sees it: statuses, OpenAI's error object, and no work left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from max_ray.errors import InsufficientBlocksError, MaxRayError, QueueFullError, WorkerGroupError
from tests.http.fake_engine import FakeEngine

COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "ab"}
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "Unknown field 'temprature'. Did you mean 'temperature'?"),
        ({"nonsense_xyz": None}, "nonsense_xyz", "Unknown field"),
        ({"user": 5}, "user", "valid string"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": 1e999}, "temperature", "finite"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"min_tokens": 20}, "min_tokens", "lower the one"),
        ({"min_tokens": 2**31, "max_tokens": 2**31}, "min_tokens", "from 0 to"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_k": -2}, "top_k", "positive"),
        ({"min_p": 2}, "min_p", "[0, 1]"),
        ({"frequency_penalty": 3}, "frequency_penalty", "[-2, 2]"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"seed": 2**64}, "seed", "64-bit"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "more than 128"),
        ({"prompt": ["a"] * 129}, "prompt", "more than 128"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": 5}, "stop", "list"),
        ({"stop": ["a", 5]}, "stop[1]", "string"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "outside the model's vocabulary"),
        ({"stop_token_ids": [2**63]}, "stop_token_ids", "outside the model's vocabulary"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids", "64 bits"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unknown field"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [[]]}, "prompt", "must be a text"),
        ({"prompt": ["a", 1]}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [10**40]}, "prompt", "64 bits"),
        ({"prompt": [261]}, "prompt", "outside the model's vocabulary"),
        ({"prompt": [7] * 200}, "prompt", "200 tokens"),
        ({"model": 7}, "model", "string"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_bad_completion_fields(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str, streamed: bool
) -> None:
    if streamed and param.startswith("stream"):
        return
    body = json.dumps({**COMPLETION, **({"stream": True} if streamed else {}), **fields}).replace("Infinity", "1e999")
    error = error_of(await client.post("/v1/completions", content=body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert not engine.contexts


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": None}, "messages", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type", "'text'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type", "required"),
        ({"messages": [{"role": "user", "content": "x", "tool": 1}]}, "messages[0].tool", "Unknown field"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, "messages", "max_length=200"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"echo": True}, "echo", "last message"),
        ({"prompt": "x"}, "prompt", "Unknown field"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ],
)
async def test_bad_chat_fields(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(await client.post("/v1/chat/completions", content=json.dumps({**CHAT, **fields})), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.contexts


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"],
)
async def test_bodies_that_are_not_json_objects(client: httpx.AsyncClient, body: bytes) -> None:
    error = error_of(await client.post("/v1/completions", content=body), 400)
    assert "JSON" in error["message"]


async def test_a_lone_surrogate_as_a_name_is_quoted(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", content=b'{"\\ud800": 1, "prompt": "x"}'), 400)
    assert "Unknown field" in error["message"]
    error = error_of(await client.post("/v1/completions", content=b'{"model": "\\ud800", "prompt": "x"}'), 404)
    assert error["code"] == "model_not_found"


async def test_context_length_has_its_code(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={**COMPLETION, "prompt": [7] * 200}), 400)
    assert error["code"] == "context_length_exceeded"


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        error = error_of(await client.post(f"/v1/{path}", json={**body, "model": "fak"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "Did you mean 'fake'?" in error["message"]
    error_of(await client.get("/v1/models/other/name"), 404)


async def test_unknown_route_and_method(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completion", json=COMPLETION), 404)
    assert "Did you mean '/v1/completions'?" in error["message"]
    reply = await client.get("/v1/completions")
    assert "does not take GET" in error_of(reply, 405)["message"]
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("streamed", [False, True])
async def test_queue_full(client: httpx.AsyncClient, engine: FakeEngine, streamed: bool) -> None:
    engine.refuse = QueueFullError("The queue is full. Try again later.", retry_after=1.2)
    engine.accept_first = 2
    reply = await client.post("/v1/completions", json={**COMPLETION, "n": 3, "stream": streamed})
    assert error_of(reply, 429)["type"] == "queue_full"
    assert reply.headers["retry-after"] == "2"
    assert engine.cancelled == [context.request_id for context in engine.contexts], "all choices or none"
    assert engine.metrics.prompt_tokens == 0


async def test_no_room_in_the_cache(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refuse = InsufficientBlocksError("It needs 9 blocks and there are 4.")
    error = error_of(await client.post("/v1/completions", json=COMPLETION), 503)
    assert (error["type"], error["message"]) == ("insufficient_kv_cache", "It needs 9 blocks and there are 4.")


@pytest.mark.parametrize(
    ("failure", "status", "kind", "words"),
    [
        (WorkerGroupError("Worker 1 died."), 503, "workers_unavailable", "Worker 1 died."),
        (MaxRayError("secret detail"), 500, "internal_error", "its log says why"),
        (RuntimeError("secret detail"), 500, "internal_error", "its log says why"),
    ],
)
async def test_failure_while_generating(
    client: httpx.AsyncClient, engine: FakeEngine, failure: Exception, status: int, kind: str, words: str
) -> None:
    engine.failure, engine.fail_after = failure, 2
    error = error_of(await client.post("/v1/completions", json=COMPLETION), status)
    assert error["type"] == kind
    assert words in error["message"]
    assert "secret" not in error["message"]
    for number in (1, 2):
        reply = await client.post("/v1/completions", json={**COMPLETION, "stream": True, "n": number})
        assert reply.status_code == 200
        last = reply.text.removesuffix("\n\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == kind
        assert "[DONE]" not in reply.text
    assert len(engine.cancelled) == 4, "every choice that had not finished"


async def test_keys(guarded: httpx.AsyncClient) -> None:
    for header in (None, "Bearer", "Bearer ", "Bearer wrong", "Basic key-one", "key-one", "Bearer \u00e9"):
        headers = {} if header is None else {b"authorization": header.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/version", "/nowhere"):
            reply = await guarded.get(path, headers=headers)
            assert error_of(reply, 401)["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
    for key in ("key-one", "key-two"):
        assert (await guarded.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
    assert (await guarded.get("/health")).status_code == 200


async def test_body_limit(guarded: httpx.AsyncClient) -> None:
    headers = {"Authorization": "Bearer key-one"}
    body = {**COMPLETION, "prompt": "x" * 1000}
    error = error_of(await guarded.post("/v1/completions", json=body, headers=headers), 413)
    assert (error["code"], "1000 bytes" in error["message"]) == ("request_too_large", True)

    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    error_of(await guarded.post("/v1/completions", content=pieces(), headers=headers), 413)
    fits = json.dumps(COMPLETION).encode().ljust(1000)
    assert (await guarded.post("/v1/completions", content=fits, headers=headers)).status_code == 200


async def test_health(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    engine.is_healthy = False
    assert "do not answer" in error_of(await client.get("/health"), 503)["message"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("num_choices", [1, 3])
async def test_hanging_up_cancels(server_url: str, engine: FakeEngine, streamed: bool, num_choices: int) -> None:
    engine.gate = asyncio.Event()
    body = {**COMPLETION, "stream": streamed, "n": num_choices}
    async with httpx.AsyncClient(base_url=server_url) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        while len(engine.contexts) < num_choices:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(5):
        while len(engine.cancelled) < num_choices:
            await asyncio.sleep(0.01)
    assert set(engine.cancelled) == {context.request_id for context in engine.contexts}
    async with httpx.AsyncClient(base_url=server_url) as client:
        text = (await client.get("/metrics")).text
    assert 'route="/v1/completions",status="499"} 1' in text

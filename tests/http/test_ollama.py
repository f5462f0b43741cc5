"""/api/chat, /api/generate and what else there is of Ollama's API; the official client if installed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from max_ray.errors import InsufficientBlocksError, QueueFullError, WorkerGroupError
from max_ray.scheduler import SchedulerStats
from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": HELLO}
GENERATE: dict[str, Any] = {"model": "fake", "prompt": "hi"}
BODIES = {"/api/chat": CHAT, "/api/generate": GENERATE}
PNG = "iVBORw0KGgo="


async def whole(client: httpx.AsyncClient, path: str = "/api/chat", **fields: Any) -> dict[str, Any]:
    reply = await client.post(path, json={**BODIES[path], "stream": False, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return dict(reply.json())


async def streamed(client: httpx.AsyncClient, path: str = "/api/chat", **fields: Any) -> list[dict[str, Any]]:
    """Streams are the default."""
    reply = await client.post(path, json={**BODIES[path], **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    assert reply.text.endswith("\n")
    return [json.loads(line) for line in reply.text[:-1].split("\n")]


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    content = reply.json()
    assert list(content) == ["error"]
    return str(content["error"])


async def prompt_of(engine: FakeEngine) -> str:
    return await engine.tokenizer.decode(engine.contexts[-1].tokens.prompt)


async def test_a_whole_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await whole(client)
    assert answer["message"] == {"role": "assistant", "content": "hello"}
    assert (answer["model"], answer["done"], answer["done_reason"]) == ("fake", True, "stop")
    assert (answer["prompt_eval_count"], answer["eval_count"], answer["load_duration"]) == (4, 6, 0)
    assert answer["total_duration"] >= answer["prompt_eval_duration"] + answer["eval_duration"] - 2 > 0
    assert await prompt_of(engine) == "<|user|>hi<|assistant|>"
    assert engine.contexts[-1].sampling_params.max_new_tokens is None


async def test_the_lines_of_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "ok"
    lines = await streamed(client)
    assert [line["message"] for line in lines] == [{"role": "assistant", "content": text} for text in ("o", "k", "")]
    assert [line["done"] for line in lines] == [False, False, True]
    assert len({line["created_at"] for line in lines}) == 1
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("stop", 3)


async def test_generate(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await whole(client, "/api/generate", system="s")
    assert (answer["response"], answer["done_reason"]) == ("hello", "stop")
    assert await prompt_of(engine) == "<|system|>s<|user|>hi<|assistant|>"
    lines = await streamed(client, "/api/generate")
    assert "".join(line["response"] for line in lines) == "hello"
    assert lines[-1]["done"] is True


async def test_raw_prompts_are_taken_as_they_are(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda context: "a" * 100
    answer = await whole(client, "/api/generate", raw=True, prompt="<|user|>x")
    assert await prompt_of(engine) == "<s><|user|>x"
    assert answer["response"] == "a" * 100, "not OpenAI's default of 16 tokens"
    for fields in ({"system": "s"}, {"images": [PNG]}, {"think": True}):
        reply = await client.post("/api/generate", json={**GENERATE, "raw": True, **fields})
        assert next(iter(fields)) in error_of(reply, 400)


async def test_options(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {
        **{"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.1, "seed": 3, "num_predict": 4, "num_ctx": 200},
        **{"repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["x"]},
        **{"repeat_last_n": -1, "mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1.0, "typical_p": 1.0, "num_keep": 0},
    }
    answer = await whole(client, options=options)
    params = engine.contexts[-1].sampling_params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 7, 0.25, 0.1)
    assert (params.seed, params.max_new_tokens, params.stop) == (3, 4, ("x",))
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 4)
    for unlimited in (-1, -2):
        await whole(client, options={"num_predict": unlimited})
        assert engine.contexts[-1].sampling_params.max_new_tokens is None


async def test_stop_strings(client: httpx.AsyncClient) -> None:
    lines = await streamed(client, options={"stop": ["lo"]})
    assert "".join(line["message"]["content"] for line in lines) == "hel"
    assert lines[-1]["done_reason"] == "stop"


@pytest.mark.parametrize(
    "keep_alive", ["5m", "1h30m", "1.5h2.5m", "0h1m", "0.5", -1, 300, 10**400, "-1", "10", 1.5, "-1m"]
)
async def test_the_model_is_kept(client: httpx.AsyncClient, keep_alive: Any) -> None:
    await whole(client, keep_alive=keep_alive)


async def test_loading(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, field in (("/api/chat", "message"), ("/api/generate", "response")):
        reply = await client.post(path, json={"model": "fake", "keep_alive": "5m"})
        assert (reply.json()["done"], reply.json()["done_reason"]) == (True, "load")
        assert field in reply.json()
        assert "keep_alive" in error_of(await client.post(path, json={"model": "fake", "keep_alive": 0}), 400)
    assert not engine.contexts


async def test_names_with_ollamas_tag(client: httpx.AsyncClient) -> None:
    assert (await whole(client, model="fake:latest"))["model"] == "fake"
    for path, body in BODIES.items():
        assert "fake" in error_of(await client.post(path, json={**body, "model": "fake:7b"}), 404)


async def test_messages_of_all_roles(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await whole(client)
    messages = [{"role": "system", "content": "s"}, *HELLO, answer["message"], {"role": "user", "content": "more"}]
    await whole(client, messages=messages)
    assert await prompt_of(engine) == "<|system|>s<|user|>hi<|assistant|>hello<|user|>more<|assistant|>"


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/api/chat", {"model": None}, "'model' is required"),
        ("/api/chat", {"messages": [{"role": "critic"}]}, "messages[0].role"),
        ("/api/chat", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0] is a tool's result"),
        ("/api/chat", {"messages": [{"role": "user", "images": ["AAAA"]}]}, "messages[0].images[0]"),
        ("/api/chat", {"temperature": 1}, "Use 'options.temperature'"),
        ("/api/chat", {"max_tokens": 1}, "Use 'options.num_predict'"),
        ("/api/chat", {"prompt": "a"}, "prompt"),
        ("/api/chat", {"options": {"num_gpu": 1}}, "options.num_gpu"),
        ("/api/chat", {"options": {"num_ctx": 201}}, "options.num_ctx"),
        ("/api/chat", {"options": {"num_predict": 0}}, "options.num_predict"),
        ("/api/chat", {"options": {"mirostat": 1}}, "options.mirostat"),
        ("/api/chat", {"options": {"repeat_last_n": -2}}, "repeat_last_n must be"),
        ("/api/chat", {"options": {"typical_p": 2.0}}, "typical_p must be"),
        ("/api/chat", {"options": {"nonsense": 1}}, "options.nonsense"),
        ("/api/chat", {"options": {"temperature": -1}}, "temperature"),
        ("/api/chat", {"options": {"stop": [""]}}, "options.stop"),
        ("/api/chat", {"keep_alive": "soon"}, "keep_alive"),
        ("/api/chat", {"keep_alive": "0s"}, "keep_alive"),
        ("/api/chat", {"keep_alive": "0h0.0m"}, "keep_alive"),
        ("/api/chat", {"keep_alive": "-0.0"}, "keep_alive"),
        ("/api/chat", {"keep_alive": True}, "keep_alive"),
        ("/api/chat", {"think": "much"}, "think"),
        ("/api/chat", {"logprobs": True}, "logprobs"),
        ("/api/chat", {"format": "yaml"}, "format"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a" * 300}]}, "tokens"),
        ("/api/generate", {"context": [1, 2]}, "context"),
        ("/api/generate", {"template": "x"}, "template"),
        ("/api/generate", {"suffix": "x"}, "suffix"),
        ("/api/generate", {"images": ["AAAA"]}, "images[0]"),
        ("/api/generate", {"messages": []}, "messages"),
    ],
)
async def test_mistakes(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], words: str
) -> None:
    assert words in error_of(await client.post(path, json={**BODIES[path], **fields}), 400)
    assert not engine.contexts


async def test_neutral_fields_pass(client: httpx.AsyncClient) -> None:
    for path in BODIES:
        for fields in ({"format": ""}, {"logprobs": False}, {"think": None}, {"think": True}, {"options": {}}):
            await whole(client, path, **fields)
    await whole(client, tools=[])
    await whole(client, "/api/generate", context=[], suffix="", template="")
    await whole(client, options={"repeat_last_n": 64, "repeat_penalty": 1.0, "penalize_newline": False})


async def test_refusals_and_guards(client: httpx.AsyncClient, guarded: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("full", retry_after=2)
    assert error_of(await client.post("/api/chat", json=CHAT), 429) == "full"
    engine.refuse = InsufficientBlocksError("no room")
    assert error_of(await client.post("/api/chat", json=CHAT), 503) == "no room"
    for path in ("/api/tags", "/api/ps", "/api/version"):
        error_of(await guarded.get(path), 401)
    assert "Bearer" in error_of(await guarded.post("/api/chat", json=CHAT), 401)
    error_of(await client.get("/api/chat"), 405)
    assert "started with" in error_of(await client.post("/api/pull", json={"model": "x"}), 404)
    error_of(await client.post("/api/chat", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    error_of(await client.get("/api/tags", headers={"Origin": "http://evil.example"}), 403)


@pytest.mark.parametrize("failure", [WorkerGroupError("The workers are gone."), RuntimeError("secret")])
async def test_a_stream_that_fails_ends_with_an_error_line(
    client: httpx.AsyncClient, engine: FakeEngine, failure: Exception
) -> None:
    engine.failure, engine.fail_after = failure, 2
    lines = await streamed(client)
    assert list(lines[-1]) == ["error"]
    assert "secret" not in lines[-1]["error"]
    assert [line["done"] for line in lines[:-1]] == [False, False]


async def test_a_deadline_speaks_the_dialect(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    limit = {"x-request-timeout-seconds": "0.2"}
    error_of(await client.post("/api/chat", json={**CHAT, "stream": False}, headers=limit), 408)
    reply = await client.post("/api/chat", json=CHAT, headers=limit)
    assert "0.2 s" in json.loads(reply.text.strip().split("\n")[-1])["error"]
    assert len(engine.cancelled) == 2


async def test_what_is_told_of_the_model(engine: FakeEngine) -> None:
    details = ModelDetails("llama", "gguf", "q4_k", 1234, is_on_gpu=True)
    transport = httpx.ASGITransport(build_api(engine, details=details))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        (listed,) = (await client.get("/api/tags")).json()["models"]
        (running,) = (await client.get("/api/ps")).json()["models"]
        shown = (await client.post("/api/show", json={"model": "fake:latest"})).json()
        assert (await client.get("/api/version")).json()["version"]
        error_of(await client.post("/api/show", json={"model": "other"}), 404)
        older = await client.post("/api/show", json={"name": "fake"})
        assert older.json() == shown
        error_of(await client.post("/api/show", json={"name": "other"}), 404)
        assert "'model' is required" in error_of(await client.post("/api/show", json={}), 400)
        assert "differ" in error_of(await client.post("/api/show", json={"model": "fake", "name": "b"}), 400)
    assert (listed["name"], listed["model"], listed["size"]) == ("fake", "fake", 1234)
    assert listed["details"]["family"] == "llama"
    assert (listed["details"]["format"], listed["details"]["quantization_level"]) == ("gguf", "q4_k")
    assert (running["context_length"], running["size_vram"]) == (200, 1234)
    assert shown["model_info"] == {"general.architecture": "llama", "llama.context_length": 200}
    assert shown["capabilities"] == ["completion", "tools"]


async def test_embed_is_for_models_that_embed(client: httpx.AsyncClient) -> None:
    body = {"model": "fake", "input": "a"}
    assert "embeddings" in error_of(await client.post("/api/embed", json=body), 400)
    for fields, words in (({"input": []}, "input"), ({"input": 5}, "input"), ({"dimensions": 0}, "dimensions")):
        assert words in error_of(await client.post("/api/embed", json={**body, **fields}), 400)


async def test_requests_are_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await whole(client)
    await client.get("/api/tags/")
    await client.post("/api/pull", json={})
    requests = engine.metrics.snapshot(SchedulerStats()).requests
    assert requests == {("/api/chat", 200): 1, ("/api/tags", 200): 1, ("other", 404): 1}


async def test_random_texts_are_the_same_streamed_and_whole(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    rng = random.Random(3)
    for _ in range(30):
        text = "".join(rng.choice('ab"\\\n\r é😀\u2028\u0085</>') for _ in range(rng.randrange(25)))
        engine.script = lambda context, text=text: text  # type: ignore[misc]
        engine.tokens_per_output = rng.randrange(1, 4)
        for path, told in (
            ("/api/chat", lambda line: line["message"]["content"]),
            ("/api/generate", lambda line: line["response"]),
        ):
            answer, lines = await whole(client, path), await streamed(client, path)
            assert told(answer) == "".join(map(told, lines)) == text
            assert answer["eval_count"] == lines[-1]["eval_count"]


async def test_the_official_client(server_url: str, engine: FakeEngine) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.AsyncClient(host=server_url)
    answer = await client.chat(**CHAT, options={"temperature": 0}, keep_alive="5m")
    assert (answer.message.content, answer.done_reason) == ("hello", "stop")
    pieces = [part.message.content async for part in await client.chat(**CHAT, stream=True)]
    assert "".join(pieces) == "hello"
    assert (await client.generate(**GENERATE)).response == "hello"
    pieces = [part.response async for part in await client.generate(**GENERATE, stream=True)]
    assert "".join(pieces) == "hello"
    follow = [*HELLO, answer.message, {"role": "user", "content": "more"}]
    assert (await client.chat(model="fake", messages=follow)).message.content == "hello"
    assert [model.model for model in (await client.list()).models] == ["fake"]
    assert [model.model for model in (await client.ps()).models] == ["fake"]
    assert (await client.show("fake")).capabilities == ["completion", "tools"]
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat(model="other", messages=HELLO)
    assert refused.value.status_code == 404
    engine.script = lambda context: "a\u2028b\x85c"
    pieces = [part.message.content async for part in await client.chat(**CHAT, stream=True)]
    assert "".join(pieces) == "a\u2028b\x85c"
    engine.failure, engine.fail_after = WorkerGroupError("The workers are gone."), 2
    with pytest.raises(ollama.ResponseError, match="gone"):
        [part async for part in await client.chat(**CHAT, stream=True)]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_options_are_checked_where_nothing_is_generated(client: httpx.AsyncClient, path: str) -> None:
    wrong = {"model": "fake", "options": {"frequency_penalty": -3}}
    reply = await client.post(path, json=wrong)
    assert reply.status_code == 400
    assert "frequency_penalty" in reply.json()["error"]
    assert (await client.post(path, json={"model": "fake", "options": {"stop": [""]}})).status_code == 400
    right = {"model": "fake", "options": {"frequency_penalty": -2, "repeat_last_n": 2**20, "num_predict": -1}}
    assert (await client.post(path, json=right)).status_code == 200

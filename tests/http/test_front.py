"""The front of several models over real connections: where requests go, what comes back, what is refused."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from max_ray.errors import QueueFullError
from max_ray.serve.api.access.key_file import key_hash
from max_ray.serve.api.engine import ApiOptions
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.front_server import Front, running_front

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}
DIALECTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 30}),
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 30}),
    ("/v1/messages", CHAT),
    ("/api/chat", {"messages": CHAT["messages"]}),
    ("/api/generate", {"prompt": "Hi"}),
]


@pytest.fixture
async def front(tokenizer: TextTokenizer) -> AsyncIterator[Front]:
    async with running_front(tokenizer) as front:
        yield front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=front.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), DIALECTS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_every_dialect_reaches_the_model_that_it_names(
    front: Front, client: httpx.AsyncClient, path: str, body: dict[str, Any], streamed: bool
) -> None:
    for model in ("alpha", "beta"):
        whole = {**body, "model": model, "stream": streamed}
        through = await client.post(path, json=whole)
        async with httpx.AsyncClient(base_url=front.urls[model]) as direct:
            expected = await direct.post(path, json=whole)
        assert through.status_code == 200, through.text
        assert said(through.text).count(f"{model} says hello") >= 1
        assert through.headers["content-type"] == expected.headers["content-type"]
        assert through.text.count("\n") == expected.text.count("\n")
    assert [len(engine.contexts) for engine in front.engines.values()] == [2, 2]


def said(text: str) -> str:
    """The texts of an answer or of its events, one after another."""
    if not text.startswith(("data:", "event:")) and "\n" not in text.strip():
        return text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith(("data: {", "{"))]
    return "".join(found for line in lines for found in texts_of(json.loads(line)))


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value[key] for key in ("text", "content", "delta", "response") if isinstance(value.get(key), str)]
        return own + [text for key, one in value.items() if not isinstance(one, str) for text in texts_of(one)]
    return [text for one in value for text in texts_of(one)] if isinstance(value, list) else []


async def test_aliases_reach_the_model(front: Front, client: httpx.AsyncClient) -> None:
    for name in ("alpha", "first", "org/alpha"):
        reply = await client.post("/v1/chat/completions", json={**CHAT, "model": name})
        assert (reply.status_code, reply.json()["model"]) == (200, "alpha")
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == "alpha"
    assert (await client.post("/api/chat", json={**CHAT, "max_tokens": 1, "model": "beta"})).status_code == 400
    reply = await client.post("/api/chat", json={"messages": CHAT["messages"], "model": "beta:latest", "stream": False})
    assert reply.json()["model"] == "beta"


async def test_a_model_that_is_not_served_is_a_404_with_the_names(front: Front, client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json={**CHAT, "model": "alpa"})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "Did you mean 'alpha'" in error["message"]
    assert "'alpha', 'beta'" in error["message"]
    reply = await client.post("/v1/messages", json={**CHAT, "model": "none"})
    assert (reply.status_code, reply.json()["type"]) == (404, "error")
    reply = await client.post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert (await client.get("/v1/models/none")).status_code == 404
    metrics = (await client.get("/metrics")).text
    assert 'max_ray_front_requests_total{route="/v1/chat/completions",status="404"} 1.0' in metrics
    assert not any(engine.contexts for engine in front.engines.values())


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"model": 5}', b'{"model": "alpha"', b'"model"', b"\xff"])
async def test_malformed_bodies_are_400(client: httpx.AsyncClient, body: bytes) -> None:
    reply = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_what_the_front_answers_itself(front: Front, client: httpx.AsyncClient) -> None:
    assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["alpha", "beta"]
    assert [one["name"] for one in (await client.get("/api/tags")).json()["models"]] == ["alpha", "beta"]
    assert (await client.post("/api/show", json={"model": "first"})).json()["details"]["family"] == "llama"
    assert [one["name"] for one in (await client.get("/api/ps")).json()["models"]] == ["alpha", "beta"]
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert "text/html" in (await client.get("/")).headers["content-type"]
    assert (await client.get("/openapi.json")).status_code == 200
    assert [one["state"] for one in (await client.get("/v1/server")).json()["models"]] == ["ready", "ready"]
    one = (await client.get("/v1/server", params={"model": "beta"})).json()
    assert one["model"]["id"] == "beta"
    assert (await client.get("/tokenizer_info", params={"model": "beta"})).status_code == 200
    assert (await client.get("/tokenizer_info")).status_code == 400
    assert (await client.get("/nowhere")).json()["error"]["code"] == "route_not_found"


async def test_metrics_have_the_series_of_all_models(front: Front, client: httpx.AsyncClient) -> None:
    for name in ("alpha", "beta", "beta"):
        await client.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 30})
    front.state.take({name: (await engine.metrics_snapshots())[:1] for name, engine in front.engines.items()})
    text = (await client.get("/metrics")).text
    assert 'requests_total{model_name="alpha",replica="r0",route="/v1/completions",status="200"} 1' in text
    assert 'requests_total{model_name="beta",replica="r0",route="/v1/completions",status="200"} 2' in text
    assert "max_ray_front_requests_total{" not in text
    assert text.count("# TYPE max_ray_queued_requests gauge") == 1


async def test_stored_responses_are_found_across_models(client: httpx.AsyncClient) -> None:
    first = (await client.post("/v1/responses", json={"model": "alpha", "input": "Hi"})).json()
    path = f"/v1/responses/{first['id']}"
    assert (await client.get(path)).json()["model"] == "alpha"
    second = {"model": "beta", "input": "And?", "previous_response_id": first["id"]}
    assert (await client.post("/v1/responses", json=second)).json()["model"] == "beta"
    assert (await client.get(f"{path}/input_items")).json()["data"][0]["content"][0]["text"] == "Hi"
    assert (await client.delete(path)).json()["deleted"]
    assert (await client.get(path)).status_code == 404


async def test_a_background_response_is_cancelled_through_the_front(front: Front, client: httpx.AsyncClient) -> None:
    front.engines["beta"].gate = asyncio.Event()
    body = {"model": "beta", "input": "Hi", "background": True}
    made = (await client.post("/v1/responses", json=body)).json()
    assert (await client.post(f"/v1/responses/{made['id']}/cancel")).json()["status"] == "cancelled"
    await eventually(lambda: len(front.engines["beta"].cancelled) == 1)


async def eventually(is_so: Any, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("streamed", [False, True])
async def test_hanging_up_ends_the_request(front: Front, client: httpx.AsyncClient, streamed: bool) -> None:
    engine = front.engines["alpha"]
    engine.gate = asyncio.Event()
    body = {"model": "alpha", "prompt": "a", "max_tokens": 30, "stream": streamed}
    task = asyncio.create_task(client.post("/v1/completions", json=body))
    await eventually(lambda: engine.contexts)
    await asyncio.sleep(0.05)
    task.cancel()
    await eventually(lambda: engine.cancelled)
    assert engine.cancelled == [engine.contexts[0].request_id]
    await eventually(lambda: not any(one.num_open for one in front.state.replicas.replicas("alpha")))


async def test_the_first_piece_of_a_stream_does_not_wait_for_the_second(
    front: Front, client: httpx.AsyncClient
) -> None:
    engine = front.engines["alpha"]
    engine.gate = asyncio.Event()
    body = {"model": "alpha", "prompt": "a", "max_tokens": 30, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        pieces = reply.aiter_raw()
        assert b'"text":"a"' in (await asyncio.wait_for(anext(pieces), 5)).replace(b": ", b":")
        engine.gate.set()
        rest = b"".join([piece async for piece in pieces])
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_refusals_of_a_replica_come_back_as_they_are(front: Front, client: httpx.AsyncClient) -> None:
    front.engines["alpha"].refuse = QueueFullError("The queue is full.", retry_after=7)
    reply = await client.post("/v1/completions", json={"model": "alpha", "prompt": "a"})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
    assert (await client.post("/v1/completions", json={"model": "beta", "prompt": "a"})).status_code == 200
    reply = await client.post("/v1/completions", json={"model": "beta", "prompt": "a", "unknown": 1})
    assert reply.status_code == 400


async def test_a_time_out_comes_from_the_client_s_header(front: Front, client: httpx.AsyncClient) -> None:
    front.engines["alpha"].gate = asyncio.Event()
    body = {"model": "alpha", "prompt": "a", "max_tokens": 30}
    headers = {"x-request-timeout-seconds": "0.2"}
    reply = await client.post("/v1/completions", json=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "request_timeout")
    assert len(front.engines["alpha"].cancelled) == 1


async def test_large_bodies_pass_and_are_bounded(tokenizer: TextTokenizer) -> None:
    limit = 512 * 1024
    async with (
        running_front(tokenizer, ApiOptions(max_body_bytes=limit)) as front,
        httpx.AsyncClient(base_url=front.url, timeout=20) as client,
    ):
        fits = b'{"prompt": "a", ' + b" " * (limit - 100) + b'"max_tokens": 30, "model": "beta"}'
        kind = {"Content-Type": "application/json"}
        replies = await asyncio.gather(*[client.post("/v1/completions", content=fits, headers=kind) for _ in range(12)])
        assert [reply.json()["choices"][0]["text"] for reply in replies] == ["beta says hello"] * 12
        for too_long in (fits.replace(b"{", b"{" + b" " * 200), json.dumps({"model": "beta", "prompt": "a" * limit})):
            reply = await client.post("/v1/completions", content=too_long, headers=kind)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_long_bodies_do_not_wait_for_one_another_s_answers(front: Front, client: httpx.AsyncClient) -> None:
    """More than may be read at a time, and none of them is answered yet."""
    engine = front.engines["beta"]
    engine.gate = asyncio.Event()
    body = b'{"prompt": "a", ' + b" " * 200_000 + b'"max_tokens": 30, "model": "beta"}'
    kind = {"Content-Type": "application/json"}
    tasks = [asyncio.create_task(client.post("/v1/completions", content=body, headers=kind)) for _ in range(6)]
    await eventually(lambda: len(engine.contexts) == 6)
    engine.gate.set()
    assert {reply.status_code for reply in await asyncio.gather(*tasks)} == {200}


async def test_keys_are_asked_for_and_limit_the_models(
    tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    one, other = key_hash(b"k-one"), key_hash(b"k-all")
    file.write_text(f"keys:\n- name: one\n  sha256: {one}\n  models: [beta]\n- name: all\n  sha256: {other}\n")
    file.chmod(0o600)
    async with (
        running_front(tokenizer, ApiOptions(api_keys_file=str(file))) as front,
        httpx.AsyncClient(base_url=front.url, timeout=20) as client,
    ):
        body = {"prompt": "a", "max_tokens": 30}

        async def status(key: str, model: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (await client.post("/v1/completions", json={**body, "model": model}, headers=headers)).status_code

        assert [await status("k-one", "beta"), await status("k-one", "alpha")] == [200, 403]
        assert [await status("k-all", "alpha"), await status("wrong", "alpha")] == [200, 401]
        for key, names in (("k-one", ["beta"]), ("k-all", ["alpha", "beta"])):
            headers = {"x-api-key": key}
            assert [one["id"] for one in (await client.get("/v1/models", headers=headers)).json()["data"]] == names
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        async with httpx.AsyncClient(base_url=front.urls["alpha"]) as direct:
            assert (await direct.post("/v1/completions", json=body)).status_code == 401


async def test_pages_of_other_sites_wake_nothing(tokenizer: TextTokenizer) -> None:
    async with (
        running_front(tokenizer, ApiOptions(allowed_origins=("https://chat.example.org",)), asleep=("beta",)) as front,
        httpx.AsyncClient(base_url=front.url, timeout=20) as client,
    ):
        body = {"model": "beta", "prompt": "a", "max_tokens": 30}
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 403
        assert front.woken == []
        origin = {"Origin": "https://chat.example.org"}
        reply = await client.post("/v1/completions", json=body, headers=origin)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin["Origin"])


async def test_two_hundred_requests_in_a_random_order_are_not_mixed(front: Front, client: httpx.AsyncClient) -> None:
    rng = random.Random(5)
    for name, engine in front.engines.items():
        engine.script = lambda context, name=name: f"{name}: {context.tokens.prompt.tolist()[-1]}"

    async def one(number: int) -> None:
        model, streamed = rng.choice(("alpha", "first", "beta")), rng.random() < 0.5
        letter = rng.choice("abcdefgh")
        body = {"model": model, "prompt": f"{'x' * rng.randrange(20)}{letter}", "max_tokens": 60, "stream": streamed}
        await asyncio.sleep(rng.random() * 0.2)
        if number % 10 == 9:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json={**body, "max_tokens": 60}), 0.001)
            return
        reply = await client.post("/v1/completions", json=body)
        assert reply.status_code == 200
        token = front.engines["alpha"].tokenizer.encode_text(letter, False).tolist()[-1]
        expected = f"{'beta' if model == 'beta' else 'alpha'}: {token}"
        assert (said(reply.text) if streamed else reply.json()["choices"][0]["text"]) == expected

    await asyncio.gather(*[one(number) for number in range(200)])
    for name in front.engines:
        assert [replica.num_open for replica in front.state.replicas.replicas(name)] == [0]


async def test_a_resumable_stream_is_read_on_through_the_front(front: Front, client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 30, "model": "beta", "stream": True, "request_id": "r"}
    whole = (await client.post("/v1/completions", json=body | {"stream_options": {"resumable": True}})).text
    rest = await client.get("/v1/streams/cmpl-r", params={"from": "3", "model": "beta"})
    assert rest.text == whole[whole.index("id: 4\n") :]
    assert (await client.get("/v1/streams/cmpl-r", params={"model": "alpha"})).status_code == 404
    assert (await client.delete("/v1/streams/cmpl-r", params={"model": "beta"})).json()["deleted"] is True
    unnamed = await client.get("/v1/streams/cmpl-r")
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")

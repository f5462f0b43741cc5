"""HTTP itself: HEAD, slashes at the end, clients of HTTP/1.0, an application below a prefix, labels of the metrics."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI

from max_ray.scheduler import SchedulerStats
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

READINGS = ("/health", "/v1/models", "/v1/models/fake", "/metrics", "/version")
COMPLETION = {"prompt": "ab"}


async def exchange(server_url: str, request: str) -> tuple[bytes, bytes]:
    """Head and body of what comes until the server closes the connection."""
    url = httpx.URL(server_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request.encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    writer.close()
    return head, body


def post(version: str, body: str, *headers: str) -> str:
    lines = [f"POST /v1/completions HTTP/{version}", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines) + "\r\n\r\n" + body


@pytest.mark.parametrize("path", READINGS)
async def test_head_is_get_without_a_body(server_url: str, client: httpx.AsyncClient, path: str) -> None:
    got, headed = await client.get(path), await client.head(path)
    assert headed.status_code == 200
    assert headed.headers["content-type"] == got.headers["content-type"]
    head, body = await exchange(server_url, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: 0" not in head
    assert b"content-length: " in head
    assert body == b""


async def test_head_of_other_routes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    reply = await client.head("/v1/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert (await client.head("/v1/models/other")).status_code == 404
    engine.is_healthy = False
    assert (await client.head("/health")).status_code == 503


async def test_aliases_name_the_one_model(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.model_aliases = ("fake.gguf", "other/name")
    for name in ("fake", *engine.model_aliases):
        reply = await client.post("/v1/completions", json=COMPLETION | {"model": name})
        assert (reply.status_code, reply.json()["model"]) == (200, "fake")
        shown = (await client.get(f"/v1/models/{name}")).json()
        assert (shown["id"], shown["aliases"]) == ("fake", ["fake.gguf", "other/name"])
    assert [context.model_name for context in engine.contexts] == ["fake"] * 3, "they share cached prefixes"
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["fake"]
    error = error_of(await client.post("/v1/completions", json=COMPLETION | {"model": "fake.ggu"}), 404)
    assert "Did you mean 'fake.gguf'?" in error["message"]


async def test_a_slash_at_the_end_is_the_route_itself(client: httpx.AsyncClient) -> None:
    """A redirect would lead to the host that the client named, whatever that is."""
    for path in READINGS:
        reply = await client.get(f"{path}/")
        assert (reply.status_code, "location" in reply.headers) == (200, False), path
    reply = await client.post("/v1/completions/", json=COMPLETION)
    assert reply.json()["choices"][0]["text"] == "hello"
    error_of(await client.get("/v1/nothing/"), 404)
    error_of(await client.get("/v1/completions/"), 405)
    error_of(await client.get("/v1/completions//"), 404)
    error_of(await client.get("http://test//"), 404)


async def test_a_stream_to_http_1_0_ends_with_the_connection(server_url: str, engine: FakeEngine) -> None:
    engine.script = lambda context: "hello, and more"
    body = json.dumps({**COMPLETION, "stream": True})
    _, chunked = await exchange(server_url, post("1.1", body, "Connection: close"))
    for headers in ((), ("Connection: keep-alive",)):
        head, plain = await exchange(server_url, post("1.0", body, *headers))
        assert b"transfer-encoding" not in head.lower()
        assert b"content-length" not in head.lower()
        assert b"connection: close" in head.lower()
        events = plain.decode().removesuffix("\n\n").split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert all(event.startswith("data: ") for event in events)
        text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1])
        assert text == "hello, and more"
    assert chunked.endswith(b"0\r\n\r\n"), "HTTP/1.1 goes on in chunks"


async def test_whole_answers_and_errors_to_http_1_0(server_url: str, engine: FakeEngine) -> None:
    head, body = await exchange(server_url, post("1.0", json.dumps(COMPLETION)))
    assert json.loads(body)["choices"][0]["text"] == "hello"
    assert f"content-length: {len(body)}".encode() in head
    engine.failure, engine.fail_after = RuntimeError("secret"), 1
    _, body = await exchange(server_url, post("1.0", json.dumps({**COMPLETION, "stream": True})))
    assert body.endswith(b"\n\n")
    assert b"internal_error" in body.split(b"data: ")[-1]


async def test_hanging_up_on_a_stream_to_http_1_0(server_url: str, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    url = httpx.URL(server_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(post("1.0", json.dumps({**COMPLETION, "stream": True})).encode())
    await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(5):
        while not engine.cancelled:
            await asyncio.sleep(0.01)


async def test_an_application_below_a_prefix(engine: FakeEngine) -> None:
    """So Serve mounts it where `route_prefix` is not /."""
    front = FastAPI()
    front.mount("/app", build_api(engine, ApiOptions(api_keys=("key",))))
    key = {"Authorization": "Bearer key"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://localhost/app") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post("/v1/completions/", json=COMPLETION, headers=key)).status_code == 200
        streamed = await client.post("/v1/completions", json={**COMPLETION, "stream": True}, headers=key)
        assert streamed.text.endswith("data: [DONE]\n\n")
    requests = engine.metrics.snapshot(SchedulerStats()).requests
    assert requests == {("/v1/models", 401): 1, ("/v1/completions", 200): 2}


async def test_requests_are_counted_by_the_routes_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path in ("/v1/models", "/v1/models/", "/v1/models/fake", "/v1/models/a", "/v1/models/b/c", "/v1/x", "/v1/y/"):
        await client.get(path)
    await client.get("/health")
    await client.head("/v1/models")
    await client.post("/v1/completions", json=COMPLETION)
    await client.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"})
    requests = engine.metrics.snapshot(SchedulerStats()).requests
    assert requests == {
        ("/v1/models", 200): 3,
        ("/v1/models/{model}", 200): 1,
        ("/v1/models/{model}", 404): 2,
        ("other", 404): 2,
        ("/v1/completions", 200): 1,
        ("/v1/completions", 415): 1,
    }


async def test_durations_do_not_mix_generations_with_the_rest(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for _ in range(3):
        await client.get("/v1/models")
        await client.post("/v1/completions", json={"prompt": ""})
    await client.post("/v1/completions", json=COMPLETION)
    text = (await client.get("/metrics")).text
    counts = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in text.splitlines() if "seconds_count" in line}
    label = 'max_ray_request_duration_seconds_count{model_name="fake",replica="r0",route="%s",status="%s"}'
    assert counts[label % ("/v1/completions", "2xx")] == "1.0"
    assert counts[label % ("/v1/completions", "4xx")] == "3.0"
    assert counts[label % ("/v1/models", "2xx")] == "3.0"

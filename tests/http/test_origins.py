"""Who may talk to a server without keys: names of the host, web pages, kinds of body; and CORS for pages that may."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import websockets

from max_ray.config import ServeConfig
from max_ray.errors import ConfigError
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

COMPLETION = '{"prompt": "ab"}'
PATHS = ("/v1/models", "/metrics", "/health", "/version", "/nowhere")
JSON_TYPE = {"Content-Type": "application/json"}


@asynccontextmanager
async def serving(engine: FakeEngine, **options: Any) -> Any:
    transport = httpx.ASGITransport(build_api(engine, ApiOptions(**options)))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:8000", "127.8.9.10:1", "localhost", "LocalHost:8000", "localhost.", "localhost.:80"),
        *("[::1]", "[::1]:8000", "ip6-localhost"),
    ],
)
async def test_loopback_names_are_served(engine: FakeEngine, host: str) -> None:
    async with serving(engine, allowed_hosts=()) as client:
        for path in PATHS[:4]:
            assert (await client.get(path, headers={"Host": host})).status_code == 200
        posted = await client.post("/v1/completions", content=COMPLETION, headers={"Host": host, **JSON_TYPE})
        assert posted.status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:8000@evil"),
        *("evil@localhost", "localhost evil", "localhost,evil.example", "0.0.0.0", "[::]", "10.0.0.1", "", ":8000"),
        *("2130706433", "127.1", "0x7f000001", "localhost/", "[::1", "localhost:evil", "localhost..", "evil"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"allowed_hosts": ()}])
async def test_foreign_names_are_refused(engine: FakeEngine, host: str, options: dict[str, Any]) -> None:
    async with serving(engine, **options) as client:
        for path in PATHS:
            error = error_of(await client.get(path, headers={"Host": host}), 403)
            assert error["code"] == "host_not_allowed"
            assert "--allowed-hosts" in error["message"]
        posted = await client.post("/v1/completions", content=COMPLETION, headers={"Host": host, **JSON_TYPE})
        assert posted.status_code == 403
    assert not engine.contexts


async def test_two_hosts_are_refused_and_none_is_a_probe(server_url: str) -> None:
    url = httpx.URL(server_url)

    async def status(head: str) -> bytes:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"GET /health HTTP/{head}\r\nConnection: close\r\n\r\n".encode())
        reply = await reader.read()
        writer.close()
        return reply.split(b" ", 2)[1]

    assert await status("1.1\r\nHost: localhost\r\nHost: evil.example") == b"403"
    assert await status("1.1\r\nHost: localhost\r\nHost: localhost") == b"403"
    assert await status("1.0") == b"200"


async def test_hosts_that_are_allowed(engine: FakeEngine) -> None:
    async with serving(engine, allowed_hosts=("box.lan", "*.x.org", "[fd00::1]")) as client:
        for host, status in (
            *(("box.lan:8000", 200), ("BOX.lan.", 200), ("a.x.org", 200), ("a.b.x.org", 200), ("[fd00::1]:8000", 200)),
            *(("x.org", 403), ("evilx.org", 403), ("my.box.lan", 403), ("localhost", 200)),
        ):
            assert (await client.get("/health", headers={"Host": host})).status_code == status, host
    async with serving(engine, allowed_hosts=("*",)) as client:
        assert (await client.get("/health", headers={"Host": "anything"})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Origin": "file://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
async def test_pages_of_other_sites_are_refused(engine: FakeEngine, headers: dict[str, str]) -> None:
    async with serving(engine) as client:
        for path in PATHS:
            assert error_of(await client.get(path, headers=headers), 403)["code"] == "origin_not_allowed"
        reply = await client.post("/v1/completions", content=COMPLETION, headers={**headers, **JSON_TYPE})
        assert error_of(reply, 403)["code"] == "origin_not_allowed"
        preflight = {**headers, "Access-Control-Request-Method": "POST"}
        reply = await client.options("/v1/completions", headers=preflight)
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
    assert not engine.contexts


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://127.0.0.1:8000"}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}],
)
async def test_programs_and_own_pages_are_served(engine: FakeEngine, headers: dict[str, str]) -> None:
    async with serving(engine) as client:
        reply = await client.post("/v1/completions", content=COMPLETION, headers={**headers, **JSON_TYPE})
        assert reply.status_code == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *(("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("application/vnd.api+json", 200)),
        *(("text/plain", 415), ("text/plain;charset=UTF-8", 415), ("application/x-www-form-urlencoded", 415)),
        *(("multipart/form-data; boundary=x", 415), ("text/plain; application/json", 415), ("", 415)),
        *(("application/jsonx", 415), ("application/json, text/plain", 415), ("text/json", 415)),
        (None, 200),
    ],
)
async def test_bodies_say_that_they_are_json(engine: FakeEngine, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    async with serving(engine) as client:
        for route, body in (("/v1/completions", COMPLETION), ("/v1/completions/", COMPLETION)):
            reply = await client.post(route, content=body, headers=headers)
            assert reply.status_code == status
        if status == 415:
            error = error_of(reply, 415)
            assert error["code"] == "unsupported_media_type"
            assert "`Content-Type: application/json`" in error["message"]
            assert not engine.contexts


async def test_a_browser_must_say_it(engine: FakeEngine) -> None:
    """`fetch` with a Blob as its body sends no type, and asks nobody first."""
    async with serving(engine) as client:
        for headers in ({"Origin": "http://127.0.0.1:8000"}, {"Sec-Fetch-Site": "same-origin"}):
            assert (await client.post("/v1/completions", content=COMPLETION, headers=headers)).status_code == 415


async def test_an_allowed_origin_may_ask_and_read(engine: FakeEngine) -> None:
    origin = "https://chat.example.org"
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    preflight = {
        **headers,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        "Access-Control-Request-Private-Network": "true",
    }
    for keys in ((), ("key",)):
        async with serving(engine, allowed_origins=(origin,), api_keys=keys) as client:
            reply = await client.options("/v1/completions", headers=preflight)
            assert reply.status_code == 200
            assert reply.headers["access-control-allow-origin"] == origin
            assert "POST" in reply.headers["access-control-allow-methods"]
            assert "authorization" in reply.headers["access-control-allow-headers"]
            assert reply.headers["access-control-allow-private-network"] == "true"
            sent = {**headers, **JSON_TYPE, "Authorization": "Bearer key"}
            reply = await client.post("/v1/completions", content='{"prompt": "ab", "stream": true}', headers=sent)
            assert "[DONE]" in reply.text
            assert reply.headers["access-control-allow-origin"] == origin
            reply = await client.post("/v1/completions", content="{}", headers=sent)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (400, origin)
            other = {**preflight, "Origin": "https://evil.example"}
            assert error_of(await client.options("/v1/completions", headers=other), 403)
    async with serving(engine, allowed_origins=("*",)) as client:
        reply = await client.get("/v1/models", headers={"Origin": "https://any.example"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


async def test_keys_make_names_and_origins_free(engine: FakeEngine) -> None:
    headers = {"Host": "api.example.org", "Origin": "http://x", "Content-Type": "text/plain"}
    async with serving(engine, api_keys=("key",)) as client:
        assert error_of(await client.post("/v1/completions", content=COMPLETION, headers=headers), 401)
        headers["Authorization"] = "Bearer key"
        reply = await client.post("/v1/completions", content=COMPLETION, headers=headers)
        assert reply.status_code == 200
        assert "access-control-allow-origin" not in reply.headers
    async with serving(engine, api_keys=("key",), allowed_hosts=("api.example.org",)) as client:
        assert (await client.get("/health", headers={"Host": "api.example.org"})).status_code == 200
        assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 403


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {}])
async def test_there_is_no_web_socket(server_url: str, headers: dict[str, str]) -> None:
    url = server_url.replace("http:", "ws:")
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        async with websockets.connect(f"{url}/v1/completions", additional_headers=headers):
            pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("allowed_hosts", "http://x.org"), ("allowed_hosts", "x.org:80"), ("allowed_hosts", "a.*.org")),
        *(("allowed_origins", "x.org"), ("allowed_origins", "https://x.org/"), ("allowed_origins", "https://")),
    ],
)
def test_wrong_names_are_refused_at_the_start(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}"):
        ServeConfig(**{name: value})


def test_names_are_read_as_lists_in_lower_case() -> None:
    config = ServeConfig(allowed_hosts="Box.lan, *.x.org", allowed_origins="https://Chat.example.org:8443,null")
    assert config.allowed_hosts == ("box.lan", "*.x.org")
    assert config.allowed_origins == ("https://chat.example.org:8443", "null")

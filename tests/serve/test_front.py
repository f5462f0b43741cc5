"""The front on a real Ray Serve, through HAProxy's port and straight to the replica's."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.applications import deployed, replica_processes
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray]

LONG = {"model": "tiny", "prompt": "a long one", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
DOORS = ["haproxy", "replica"]
ODD_HEADERS = [
    {},
    {"x-request-disconnect-disabled": "?1"},
    *({"x-request-timeout-seconds": value} for value in ("-1", "0", "nan", "1e9", "abc")),
]


@pytest.fixture(scope="module")
def ports(served: Served) -> dict[str, int]:
    """The TCP port of HAProxy and that of the replica."""
    (replica,) = replica_processes(served.app_name)
    listening = {c.laddr.port for c in replica.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    (own,) = [port for port in listening if 30_000 <= port <= 31_000]
    return {"haproxy": served.port, "replica": own}


async def numbers(served: Served) -> tuple[dict[str, int], float]:
    """Requests to /v1/completions by status, and KV blocks in use."""
    async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=30) as client:
        text = (await client.get("/metrics")).text
    counts = re.findall(r'requests_total\{[^}]*route="/v1/completions",status="(\d+)"\} (\d+)', text)
    used = re.search(r"max_ray_kv_blocks_used\{[^}]*\} (\S+)", text)
    assert used is not None
    return {status: int(count) for status, count in counts}, float(used[1])


async def settled(served: Served, before: dict[str, int]) -> dict[str, int]:
    """What was counted since, once all blocks are free; at most 5 s later."""
    async with asyncio.timeout(5):
        while True:
            counts, used = await numbers(served)
            fresh = {status: count - before.get(status, 0) for status, count in counts.items()}
            fresh = {status: count for status, count in fresh.items() if count}
            if not used and fresh:
                return fresh
            await asyncio.sleep(0.05)


def request(served: Served, body: dict[str, Any], version: str = "1.1", **headers: str) -> bytes:
    data = json.dumps(body)
    lines = [f"POST /v1/completions HTTP/{version}", "Host: 127.0.0.1", f"Content-Length: {len(data)}"]
    lines += ["Content-Type: application/json", f"Authorization: {served.headers['Authorization']}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n" + data).encode()


@pytest.mark.parametrize("door", DOORS)
async def test_hang_ups_are_499_whatever_the_headers_say(served: Served, ports: dict[str, int], door: str) -> None:
    before, _ = await numbers(served)
    for headers in ODD_HEADERS:
        for streamed in (True, False):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports[door])
            writer.write(request(served, {**LONG, "stream": streamed}, **headers))
            if streamed:
                await reader.readuntil(b"data: ")
            else:
                while not (await numbers(served))[1]:
                    await asyncio.sleep(0.005)
            writer.close()
            await writer.wait_closed()
            assert await settled(served, before) == {"499": 1}, (headers, streamed)
            before, _ = await numbers(served)


@pytest.mark.parametrize("door", DOORS)
async def test_half_closing_frees_the_blocks(served: Served, ports: dict[str, int], door: str) -> None:
    before, _ = await numbers(served)
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[door])
    writer.write(request(served, {**LONG, "stream": True}))
    await reader.readuntil(b"data: ")
    writer.write_eof()
    assert await settled(served, before) == {"499": 1}
    writer.close()


@pytest.mark.parametrize("door", DOORS)
async def test_time_outs_are_408_and_error_objects(served: Served, ports: dict[str, int], door: str) -> None:
    before, _ = await numbers(served)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[door]}", headers=served.headers) as client:
        for seconds in ("0.001", "0.05"):
            reply = await client.post("/v1/completions", json=LONG, headers={"x-request-timeout-seconds": seconds})
            assert reply.status_code == 408
            assert reply.headers["content-type"] == "application/json"
            assert reply.json()["error"]["code"] == "request_timeout"
    assert await settled(served, before) == {"408": 2}


@pytest.mark.parametrize("door", DOORS)
async def test_http_1_0_head_and_slashes(served: Served, ports: dict[str, int], door: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[door])
    writer.write(request(served, {**LONG, "max_tokens": 3, "stream": True}, "1.0"))
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[door]}", headers=served.headers) as client:
        for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics", "/version"):
            reply = await client.head(path)
            assert (reply.status_code, reply.content) == (200, b"")
        assert (await client.get("/v1/models/")).json()["data"][0]["id"] == "tiny"
        assert (await client.post("/v1/completions/", json={**LONG, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("door", DOORS)
async def test_what_serve_answers_by_itself(served: Served, ports: dict[str, int], door: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[door]}") as client:
        for path in ("/-/routes", "/-/routes/"):
            reply = await client.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "route_not_found")
        assert (await client.get("/-/healthz")).text == "success"
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            reply = await client.get("/-/healthz", headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_denied")


async def test_without_keys_loopback_is_guarded(ray_cluster: Any, tiny_llama: Path, serve_port: int) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    async with (
        deployed(tiny_llama, serve_port, "open", api_keys=()) as served,
        httpx.AsyncClient(base_url=served.url, timeout=30) as client,
    ):
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"localhost.evil.example:{serve_port}"},
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            for path in ("/v1/models", "/metrics", "/health"):
                assert (await client.get(path, headers=headers)).status_code == 403
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 403
        text = {"Content-Type": "text/plain"}
        assert (await client.post("/v1/completions", content=json.dumps(body), headers=text)).status_code == 415
        reply = await client.get("/nowhere")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "route_not_found")

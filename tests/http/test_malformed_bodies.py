"""Bodies with mistakes in them on every route, in this process: refused in the route's dialect, and never a 500."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx

from tests.http.fake_engine import FakeEngine
from tests.http.malformed import Generator

NUM_REQUESTS = 1500


def is_error_object(content: Any, path: str) -> bool:
    """Whether it is the error object of the dialect of this path."""
    if path.startswith("/api/"):
        return isinstance(content, dict) and list(content) == ["error"] and bool(content["error"])
    if path.startswith("/v1/messages"):
        return list(content) == ["type", "error"] and set(content["error"]) == {"type", "message"}
    return list(content) == ["error"] and set(content["error"]) == {"message", "type", "param", "code"}


async def test_malformed_bodies(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.model_name = "tiny"
    generator = Generator(11, {})
    statuses: Counter[int] = Counter()
    accepted: set[str] = set()
    for _ in range(NUM_REQUESTS):
        head, _, body = generator._wrong_body().data.partition(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        reply = await client.post(path, content=body, headers={"Content-Type": "application/json"})
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (path, body[:300], reply.text)
        if reply.status_code >= 400:
            assert is_error_object(reply.json(), path), (path, body[:300], reply.text)
        else:
            accepted.add(path)
            if reply.headers["content-type"] == "application/json":
                json.loads(reply.content)
    assert set(statuses) <= {200, 400, 404}
    assert statuses[200] > 100
    assert statuses[400] > 500
    assert accepted >= {"/v1/messages", "/v1/responses", "/api/chat", "/api/generate", "/tokenize", "/detokenize"}

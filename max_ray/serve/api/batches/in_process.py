"""Calls the routes of an ASGI application in this process: what a line of a batch goes through."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from max_ray.serve.api.http_errors import internal_error

logger = logging.getLogger(__name__)
_HEADERS = [(b"content-type", b"application/json"), (b"host", b"localhost")]


@dataclass(frozen=True)
class Reply:
    """What a route answered.

    Args:
        status: The HTTP status.
        headers: Of the answer, names in lower case.
        body: The JSON object.
    """

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]


async def post(app: ASGIApp, path: str, body: Mapping[str, Any]) -> Reply:
    """The answer to a POST request. Cancelling the call ends the work.

    Args:
        app: The application.
        path: The route.
        body: Becomes the JSON body.
    """
    call = _Call(json.dumps(body).encode())
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": _HEADERS},
        **{"client": ("127.0.0.1", 0), "server": ("localhost", 80)},
    }
    try:
        await app(scope, call.receive, call.send)
    except Exception:  # its error answer has been sent: an HTTP server only logs what comes behind it
        logger.exception("A request failed.")
        if not call.pieces:
            return Reply(500, {}, internal_error())
    return Reply(call.status, call.headers, json.loads(b"".join(call.pieces)))


class _Call:
    """The server's side of one call."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """The body, and then nothing: this client does not hang up."""
        if self._body is None:
            await asyncio.get_running_loop().create_future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]
            }
        else:
            self.pieces.append(message.get("body", b""))

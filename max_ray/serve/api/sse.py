"""Server-sent events, and noticing that the client has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from max_ray.serve.api.scope import CLIENT_CLOSED, SEND_KEY, SERVER_SEND_KEY, STATUS_KEY

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


def encode_event(chunk: str) -> bytes:
    """The `data:` event of a JSON text."""
    return f"data: {chunk}\n\n".encode()


class EventStream(Response):
    """Writes each piece of `body` as it comes. A client that hangs up ends it; `close` is called in every case."""

    media_type = "text/event-stream"

    def __init__(
        self, body: AsyncGenerator[bytes, None], close: Callable[[], None], media_type: str | None = None
    ) -> None:
        super().__init__(headers=HEADERS, media_type=media_type or self.media_type)
        del self.headers["content-length"]
        self._body = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            send_piece = scope.get(SEND_KEY, send)
            if scope.get("http_version") == "1.0":
                send_piece = until_close(scope, send_piece)
            await until_disconnect(receive, self._write(send, send_piece))
        except (ClientGoneError, OSError):
            scope[STATUS_KEY] = CLIENT_CLOSED
        finally:
            self._close()

    async def _write(self, send: Send, send_piece: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._body) as pieces:
            async for piece in pieces:
                await send_piece({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def until_close(scope: Scope, send: Send) -> Send:
    """`send` for the pieces of a response to an HTTP/1.0 client, which ends with the connection: it knows no chunks.

    uvicorn's httptools protocol sends every response of unknown length in chunks, so its state is set to what a
    response of known length has. Its h11 protocol does right by itself.
    """
    cycle = getattr(scope.get(SERVER_SEND_KEY), "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return send
    cycle.chunked_encoding = False

    async def send_piece(message: Message) -> None:
        cycle.expected_content_length = len(message["body"])
        await send(message)

    return send_piece


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises ClientGoneError then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""An answer over HTTP, streamed or whole: the same for every dialect."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Scope

from max_ray.errors import MaxRayError
from max_ray.serve.api.error_shapes import error_shape
from max_ray.serve.api.http_errors import describe_and_log, internal_error
from max_ray.serve.api.objects.errors import ErrorObject
from max_ray.serve.api.scope import CLIENT_CLOSED, STATUS_KEY
from max_ray.serve.api.sse import ClientGoneError, EventStream, until_disconnect

logger = logging.getLogger(__name__)


class AdmittedAnswer(Protocol):
    """A request that has been admitted. One of `events` and `whole` is taken, and `close` is called in every case."""

    @property
    def media_type(self) -> str:
        """Of the stream."""

    def events(self) -> AsyncGenerator[bytes]:
        """The pieces of the stream. Raises WorkerGroupError."""

    @property
    def server_timing(self) -> str:
        """The phases that are over, for the header `Server-Timing`."""

    async def whole(self) -> Mapping[str, Any]:
        """The answer object. Raises WorkerGroupError."""

    def failure(self, content: Mapping[str, Any]) -> bytes | None:
        """The last piece of a stream that fails, where it is not the dialect's error object.

        Args:
            content: OpenAI's error object.
        """

    def close(self) -> None:
        """Cancels what still runs."""


async def respond(request: Request, answer: AdmittedAnswer, *, is_streamed: bool) -> Response:
    """The response of an answer.

    Args:
        request: Whose client may hang up.
        answer: Is closed in every case.
        is_streamed: Whether it comes in pieces.
    """
    if is_streamed:
        stream = EventStream(_events(answer, request.scope), answer.close, answer.media_type)
        stream.headers["server-timing"] = answer.server_timing
        return stream
    try:
        content = await until_disconnect(request.receive, answer.whole())
        return JSONResponse(content, headers={"Server-Timing": answer.server_timing})
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        answer.close()


async def _events(answer: AdmittedAnswer, scope: Scope) -> AsyncGenerator[bytes, None]:
    """The stream's pieces. An error after the headers becomes an event, for the status has gone out already."""
    try:
        async for piece in answer.events():
            yield piece
    except MaxRayError as error:
        yield _failed(answer, scope, type(error).http_status, describe_and_log(error))
    except Exception:
        logger.exception("A stream failed.")
        yield _failed(answer, scope, 500, internal_error())


def _failed(answer: AdmittedAnswer, scope: Scope, status: int, content: ErrorObject) -> bytes:
    scope[STATUS_KEY] = status
    own = answer.failure(content)
    if own is not None:
        return own
    shape = error_shape(scope)
    return shape.event(shape.body(content, status))

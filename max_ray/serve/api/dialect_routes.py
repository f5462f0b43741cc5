"""A dialect's request answered over HTTP, streamed or whole."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from time import perf_counter
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from max_ray.errors import MaxRayError
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.dialect import DialectAnswer, DialectRequest, open_dialect
from max_ray.serve.api.error_shapes import error_shape
from max_ray.serve.api.http_errors import describe_and_log, internal_error
from max_ray.serve.api.scope import CLIENT_CLOSED, STATUS_KEY
from max_ray.serve.api.sse import ClientGoneError, EventStream, until_disconnect

logger = logging.getLogger(__name__)


async def answer_dialect(context: ApiContext, request: Request, kind: type[DialectRequest]) -> Response:
    """The response to a request of a dialect.

    Args:
        context: Of the application.
        request: With a JSON body.
        kind: The model of the body.
    """
    arrival = perf_counter()
    try:
        async with context.parsed(request, kind, is_chat=True) as parsed:
            answer, is_streamed = await open_dialect(context.engine, parsed, arrival), parsed.is_streamed
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    return await respond(request, answer, is_streamed=is_streamed)


async def respond(request: Request, answer: DialectAnswer, *, is_streamed: bool) -> Response:
    """The response of an answer that has been admitted.

    Args:
        request: Whose client may hang up.
        answer: Is closed in every case.
        is_streamed: Whether it comes in pieces.
    """
    if is_streamed:
        return EventStream(_events(answer, request.scope), answer.close, answer.form.media_type)
    try:
        return JSONResponse(await until_disconnect(request.receive, answer.whole()))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        answer.close()


async def _events(answer: DialectAnswer, scope: Scope) -> AsyncGenerator[bytes, None]:
    """The stream's pieces. An error after the headers becomes the dialect's error event."""
    try:
        async for piece in answer.events():
            yield piece
    except MaxRayError as error:
        yield _failed(answer, scope, type(error).http_status, describe_and_log(error))
    except Exception:
        logger.exception("A stream failed.")
        yield _failed(answer, scope, 500, internal_error())


def _failed(answer: DialectAnswer, scope: Scope, status: int, content: dict[str, Any]) -> bytes:
    scope[STATUS_KEY] = status
    own = answer.form.failure(content)
    if own is not None:
        return own
    shape = error_shape(scope)
    return shape.event(shape.body(content, status))

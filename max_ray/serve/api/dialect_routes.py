"""A dialect's request answered over HTTP, streamed or whole."""

from __future__ import annotations

import logging
from time import perf_counter

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.dialect import DialectRequest, open_dialect
from max_ray.serve.api.respond import respond
from max_ray.serve.api.scope import CLIENT_CLOSED

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

"""Errors as HTTP answers, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, or in their dialect's."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from max_ray.errors import InputError, MaxRayError, ModelNotServedError, PromptTooLongError, QueueFullError, nearest
from max_ray.serve.api.error_shapes import error_shape
from max_ray.serve.api.neutral_fields import ROUTES_INSTEAD
from max_ray.serve.api.objects.errors import ErrorObject
from max_ray.serve.api.route_table import allowed_methods
from max_ray.serve.api.scope import route_path

logger = logging.getLogger(__name__)

_CODES = {
    404: "route_not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ErrorResponse(JSONResponse):
    """OpenAI's error object, sent in the shape of the dialect that the request's path belongs to.

    ASCII JSON: a message may quote what the client sent, lone surrogates included.
    """

    def render(self, content: Any) -> bytes:
        self._content = content
        return json.dumps(content).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = json.dumps(error_shape(scope).body(self._content, self.status_code)).encode()
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> ErrorObject:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_error(error: MaxRayError) -> ErrorObject:
    """The error object of one of ours; what a client cannot act on is not shown in detail."""
    if type(error).http_status == 500:
        return internal_error()
    param = error.param if isinstance(error, InputError) else None
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
    if type(error).http_status == 404:
        code = "model_not_found" if isinstance(error, ModelNotServedError) else "not_found"
    return error_body(str(error), kind=type(error).error_type, param=param, code=code)


def internal_error() -> ErrorObject:
    return error_body("The server failed to answer this request; its log says why.", kind="internal_error")


def describe_and_log(error: MaxRayError) -> ErrorObject:
    """The error object; faults of the server go to the log with their trace."""
    if type(error).http_status == 500:
        logger.error("A request failed.", exc_info=error)
    return describe_error(error)


def add_error_handlers(api: FastAPI, routes: Iterable[str]) -> None:
    """`routes`: the paths to suggest for an unknown one."""

    @api.exception_handler(MaxRayError)
    async def on_max_ray_error(request: Request, error: MaxRayError) -> Response:
        headers = None
        if isinstance(error, QueueFullError):
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ErrorResponse(describe_and_log(error), status_code=type(error).http_status, headers=headers)

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return http_error(request, error, routes)

    @api.exception_handler(Exception)
    async def on_any_error(request: Request, error: Exception) -> Response:
        return ErrorResponse(internal_error(), status_code=500)


def http_error(request: Request, error: HTTPException, routes: Iterable[str]) -> ErrorResponse:
    """The answer to a request that is at fault as a request of HTTP.

    Args:
        request: The request.
        error: What is wrong with it.
        routes: Paths to suggest for an unknown one.
    """
    message = _http_message(request, error, routes)
    body = error_body(message, kind="invalid_request_error", code=_CODES.get(error.status_code))
    headers = error.headers
    methods = allowed_methods(route_path(request.scope)) if error.status_code == 405 else []
    if methods:  # the framework names those of one route, and a path may have several
        headers = {"Allow": ", ".join(methods)}
    return ErrorResponse(body, status_code=error.status_code, headers=headers)


def _http_message(request: Request, error: HTTPException, routes: Iterable[str]) -> str:
    path = request.url.path
    if error.status_code == 404:
        hint = ROUTES_INSTEAD.get(path.rstrip("/") or "/")
        return f"There is no route {request.method} {path[:256]}.{f' {hint}' if hint else nearest(path, routes)}"
    if error.status_code == 405:
        return f"The route {path} does not take {request.method}."
    return str(error.detail)

"""The error objects of dialects other than OpenAI's, by the path of a request.

Whatever refuses a request (a route, a guard, a time-out) makes OpenAI's error object; it takes the dialect's shape when
it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from max_ray.serve.api.objects.errors import AnthropicErrorObject, ErrorObject, OllamaErrorObject
from max_ray.serve.api.scope import route_path

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True)
class ErrorShape:
    """How a dialect tells of errors.

    Args:
        body: Makes the dialect's error object of OpenAI's and of the status.
        event: Makes the piece of a stream that has begun of the dialect's error object.
        media_type: Of its streams.
    """

    body: Callable[[ErrorObject, int], Mapping[str, Any]]
    event: Callable[[Mapping[str, Any]], bytes]
    media_type: bytes = b"text/event-stream"


def _openai_body(content: ErrorObject, status: int) -> ErrorObject:
    return content


def _anthropic_body(content: ErrorObject, status: int) -> AnthropicErrorObject:
    default = "api_error" if status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(status, default)
    return {"type": "error", "error": {"type": kind, "message": content["error"]["message"]}}


def _ollama_body(content: ErrorObject, status: int) -> OllamaErrorObject:
    return {"error": content["error"]["message"]}


def _line(body: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(body)}\n".encode()


def _openai_event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def _named_event(body: Mapping[str, Any]) -> bytes:
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


OPENAI = ErrorShape(_openai_body, _openai_event)
ANTHROPIC = ErrorShape(_anthropic_body, _named_event)
OLLAMA = ErrorShape(_ollama_body, _line, b"application/x-ndjson")
_BY_BEGINNING = {"/v1/messages": ANTHROPIC, "/api": OLLAMA}


def error_shape(scope: Scope) -> ErrorShape:
    """The shape of the dialect that a request speaks, going by its path."""
    return error_shape_of(route_path(scope))


def error_shape_of(path: str) -> ErrorShape:
    """The same of a path without a prefix."""
    for beginning, shape in _BY_BEGINNING.items():
        if path == beginning or path.startswith(f"{beginning}/"):
            return shape
    return OPENAI

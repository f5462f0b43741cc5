"""API keys: `Authorization: Bearer KEY` or `x-api-key: KEY` on every route that `route_table` does not call open."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from max_ray.serve.api.http_errors import ErrorResponse, error_body
from max_ray.serve.api.route_table import is_open
from max_ray.serve.api.scope import route_path


class KeyAuth:
    """ASGI middleware. Keys are compared in constant time, and all of them, so that timing tells nothing."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        assert keys, "no keys: do not install the middleware"
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(route_path(scope)) or self._allows(Headers(scope=scope)):
            await self._app(scope, receive, send)
        else:
            await _refusal()(scope, receive, send)

    def _allows(self, headers: Headers) -> bool:
        """`x-api-key` is where Anthropic's clients send their key."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bearer = given if scheme.lower() == "bearer" else ""
        keys = [text.strip().encode("latin-1") for text in (bearer, headers.get("x-api-key", ""))]
        matches = [hmac.compare_digest(key, known) for key in keys for known in self._keys]
        return any(matches)


def _refusal() -> ErrorResponse:
    message = "This server wants an API key: send the header `Authorization: Bearer KEY` or `x-api-key: KEY`."
    body = error_body(message, kind="authentication_error", code="invalid_api_key")
    return ErrorResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})

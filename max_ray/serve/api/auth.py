"""API keys: `Authorization: Bearer KEY` or `x-api-key: KEY` on every route that `route_table` does not call open."""

from __future__ import annotations

import math

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from max_ray.serve.api.access.caller import CALLER, Caller
from max_ray.serve.api.access.key_ring import KeyRing
from max_ray.serve.api.http_errors import ErrorResponse, error_body
from max_ray.serve.api.route_table import is_open
from max_ray.serve.api.scope import route_path


class KeyAuth:
    """ASGI middleware. Leaves the caller in `CALLER`, and counts the requests of POST against the key's limits."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(route_path(scope)):
            await self._app(scope, receive, send)
            return
        await self._ring.refresh()
        caller = self._caller(Headers(scope=scope))
        if caller is None:
            await _refusal()(scope, receive, send)
            return
        token = CALLER.set(caller)
        try:
            if scope["method"] == "POST":
                await self._counted(caller, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            CALLER.reset(token)

    async def _counted(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        usage = caller.usage
        refusal = usage.refusal()
        if refusal is not None:
            await _over_limit(caller, *refusal)(scope, receive, send)
            return
        usage.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            usage.num_open -= 1

    def _caller(self, headers: Headers) -> Caller | None:
        """`x-api-key` is where Anthropic's clients send their key."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bearer = given if scheme.lower() == "bearer" else ""
        found = [self._ring.find(text.strip().encode("latin-1")) for text in (bearer, headers.get("x-api-key", ""))]
        return found[0] or found[1]


def _refusal() -> ErrorResponse:
    message = "This server wants an API key: send the header `Authorization: Bearer KEY` or `x-api-key: KEY`."
    body = error_body(message, kind="authentication_error", code="invalid_api_key")
    return ErrorResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})


def _over_limit(caller: Caller, limit: str, seconds: float) -> ErrorResponse:
    wait_s = max(1, math.ceil(seconds))
    message = f"The API key {caller.name!r} has reached its limit of {limit}. Try again in {wait_s} s."
    body = error_body(message, kind="rate_limit_error", code="rate_limit_exceeded")
    return ErrorResponse(body, status_code=429, headers={"Retry-After": str(wait_s)})

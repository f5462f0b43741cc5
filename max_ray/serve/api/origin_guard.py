"""Who may talk to the server: the name it is addressed by, the web page that asks, the kind of body.

Without API keys loopback is all that protects the server, and a browser on the same machine is inside. A page of
another site must not get through it: neither by DNS rebinding (its own name, led to 127.0.0.1: a foreign Host) nor by
requests that browsers send without asking first (a foreign Origin, a body that is not JSON).
With keys nothing of this is needed, for a page has none. Origins that are allowed are told so (CORS).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from max_ray.config.models import is_loopback
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.http_errors import ErrorResponse, error_body
from max_ray.serve.api.scope import route_path

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{0,5})?")
_JSON = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE | re.ASCII)
_WITH_BODY = ("POST", "PUT", "PATCH")
_HEADERS = (b"host", b"origin", b"sec-fetch-site", b"content-type", b"access-control-request-method")
_RESERVED_FOR_TESTS = ("test",)

Headers = Mapping[bytes, list[str]]


class OriginGuard:
    """ASGI middleware for HTTP and WebSocket. Refuses with 403, and with 415 for a body that is not JSON."""

    def __init__(self, app: ASGIApp, options: ApiOptions) -> None:
        self._app = app
        self._has_keys = options.has_keys
        any_host = ("*",) if self._has_keys else _RESERVED_FOR_TESTS
        self._hosts = any_host if options.allowed_hosts is None else options.allowed_hosts
        self._origins = options.allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> ErrorResponse | None:
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if name in _HEADERS:
                headers.setdefault(name, []).append(value.decode("latin-1"))
        if "*" not in self._hosts and not self._knows_host(scope, headers):
            return _foreign_host(headers)
        if not self._may_ask(scope, headers):
            return _foreign_origin(headers)
        if not self._has_keys and scope.get("method") in _WITH_BODY:
            return None if _is_upload(scope, headers) else _check_content_type(headers)
        return None

    def _knows_host(self, scope: Scope, headers: Headers) -> bool:
        """No Host at all comes from no browser: HTTP/1.0 probes of this machine are let in."""
        hosts = headers.get(b"host", [])
        if not hosts:
            client = scope.get("client")
            return client is None or is_loopback(client[0])
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        return name is not None and (is_loopback(name) or _is_named(name, self._hosts))

    def _may_ask(self, scope: Scope, headers: Headers) -> bool:
        origins = headers.get(b"origin", [])
        if all(self._is_allowed(origin) for origin in origins):
            return bool(origins) or self._has_keys or headers.get(b"sec-fetch-site") != ["cross-site"]
        if self._has_keys:  # the browser keeps the answer from the page; only what it asks first is answered here
            return not (scope.get("method") == "OPTIONS" and b"access-control-request-method" in headers)
        return all(_is_own(origin, headers) for origin in origins)

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins


def cors_settings(origins: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of starlette's CORSMiddleware."""
    return {
        "allow_origins": origins,
        "allow_methods": ("*",),
        "allow_headers": ("*",),
        "allow_private_network": True,
        "expose_headers": ("X-Request-ID", "Retry-After"),
    }


def host_name(host: str) -> str | None:
    """The name in a Host header, lower-case, without port, brackets and final dot; None where it is none."""
    match = _HOST.fullmatch(host)
    return match[1].strip("[]").removesuffix(".").lower() if match else None


def _is_named(name: str, hosts: Iterable[str]) -> bool:
    return any(name == host.strip("[]") or (host.startswith("*.") and name.endswith(host[1:])) for host in hosts)


def _is_own(origin: str, headers: Headers) -> bool:
    """True for a page that this very address served."""
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and [authority.lower()] == [host.lower() for host in headers.get(b"host", [])]


def _is_upload(scope: Scope, headers: Headers) -> bool:
    """Whether this is for the route that takes a form, from a program or from a page that names its origin."""
    may_ask = b"origin" in headers or b"sec-fetch-site" not in headers
    return may_ask and route_path(scope) == "/v1/files"


def _check_content_type(headers: Headers) -> ErrorResponse | None:
    """A body without a type is taken from programs and not from browsers, which can be made to send one unasked."""
    kinds = headers.get(b"content-type", [])
    is_browser = b"origin" in headers or b"sec-fetch-site" in headers
    if all(_JSON.fullmatch(kind.strip()) for kind in kinds) and (kinds or not is_browser):
        return None
    given = f"not {_quoted(kinds)}" if kinds else "and none was given"
    message = f"The body must be JSON and say so, {given}: send the header `Content-Type: application/json`."
    body = error_body(message, kind="invalid_request_error", code="unsupported_media_type")
    return ErrorResponse(body, status_code=415)


def _foreign_host(headers: Headers) -> ErrorResponse:
    message = (
        f"This server does not go by the name {_quoted(headers.get(b'host', []))}: address it by a loopback name such "
        "as 127.0.0.1, or have it started with --allowed-hosts."
    )
    return ErrorResponse(error_body(message, kind="permission_denied", code="host_not_allowed"), status_code=403)


def _foreign_origin(headers: Headers) -> ErrorResponse:
    origins = headers.get(b"origin")
    page = f"of the origin {_quoted(origins)}" if origins else "of another site"
    message = f"Web pages {page} may not use this server: have it started with --allowed-origins to let them."
    return ErrorResponse(error_body(message, kind="permission_denied", code="origin_not_allowed"), status_code=403)


def _quoted(values: list[str]) -> str:
    return " and ".join(repr(value[:200]) for value in values[:2]) or "''"

"""The outermost layer of a replica's own HTTP server, in front of Ray Serve's part in it.

Serve obeys headers of clients (a time-out, not to watch for hang-ups), answers in plain text where it refuses, and
watches the connection by reading the whole body into memory. The application does all of that itself, better: so the
headers are kept from Serve, it is told not to watch, and its refusals become OpenAI's error object.

Serve looks for this by the name in `REPLICA_DOOR`. Without HAProxy (a Serve that runs already) it is not used: then
the application still counts right, and a time-out is Serve's own 408.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from max_ray.config.models import is_loopback
from max_ray.serve.api.deadline import TIMEOUT_HEADER
from max_ray.serve.api.http_errors import ErrorResponse, error_body
from max_ray.serve.api.origin_guard import host_name
from max_ray.serve.api.scope import SERVER_SEND_KEY, TIMEOUT_KEY

REPLICA_DOOR = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "max_ray.serve.replica_door.middlewares"}
"""The variable of a replica's environment that makes Serve call `middlewares`."""

_OF_BROWSERS = frozenset({b"origin", b"sec-fetch-site"})
_DO_NOT_WATCH = (b"x-request-disconnect-disabled", b"?1")
_OBEYED = frozenset({TIMEOUT_HEADER, _DO_NOT_WATCH[0]})
_DECODED = frozenset(
    {
        *(b"x-request-id", b"x-session-id", b"traceparent", b"tracestate"),
        *(b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"),
    }
)
"""Serve reads these as UTF-8, and answers 500 to what is not."""
_KINDS = {404: ("invalid_request_error", "route_not_found"), 503: ("replica_unavailable", None)}


def middlewares() -> list[Middleware]:
    """What Serve puts around a replica's HTTP server."""
    return [Middleware(ReplicaDoor)]


class ReplicaDoor:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _own_refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        _keep_headers(scope)
        scope[SERVER_SEND_KEY] = send
        await self._app(scope, receive, _ErrorObjects(scope, receive, send))


def _own_refusal(scope: Scope) -> ErrorResponse | None:
    """Of what Serve answers before the application: its list of applications is for no client, its health for probes.

    Probes name the server by its address, if at all. Web pages learn nothing: neither as another site nor by a name.
    """
    path = scope["path"]
    if "/-/routes" in path:
        body = error_body("There is no such route.", kind="invalid_request_error", code="route_not_found")
        return ErrorResponse(body, status_code=404)
    if "/-/healthz" not in path:
        return None
    for name, value in scope["headers"]:
        if name in _OF_BROWSERS or (name == b"host" and not _is_address(value.decode("latin-1"))):
            body = error_body("This is for health probes only.", kind="permission_denied", code="host_not_allowed")
            return ErrorResponse(body, status_code=403)
    return None


def _is_address(host: str) -> bool:
    name = host_name(host) or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return is_loopback(name)
    return True


def _keep_headers(scope: Scope) -> None:
    kept = []
    for header in scope["headers"]:
        name, value = header
        if name == TIMEOUT_HEADER:
            scope[TIMEOUT_KEY] = value
        if name not in _OBEYED and (name not in _DECODED or value.isascii()):
            kept.append(header)
    scope["headers"] = [*kept, _DO_NOT_WATCH]


class _ErrorObjects:
    """A `send` that makes error objects of refusals in plain text. It adds no coroutine to the pieces of a stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send: Callable[[Message], Awaitable[None]] = send
        self._start: Message | None = None

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start" and _is_plain_refusal(message):
            self._start = message
            return _nothing()
        if self._start is not None:
            return self._refuse(self._start, message.get("body", b""))
        return self._send(message)

    async def _refuse(self, start: Message, text: bytes) -> None:
        self._start = None
        status = start["status"]
        kind, code = _KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
        response = ErrorResponse(error_body(text.decode(errors="replace"), kind=kind, code=code), status_code=status)
        known = {name for name, _ in response.raw_headers}
        response.raw_headers += [(name, value) for name, value in start["headers"] if name.lower() not in known]
        await response(self._scope, self._receive, self._send)


def _is_plain_refusal(message: Message) -> bool:
    return message["status"] >= 400 and any(
        name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in message["headers"]
    )


async def _nothing() -> None:
    pass

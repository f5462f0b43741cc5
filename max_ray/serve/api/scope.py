"""What the layers of the HTTP side leave for each other in the ASGI scope, and the route a scope is for."""

from __future__ import annotations

from starlette.types import Scope

STATUS_KEY = "max_ray.status"
"""The status to count where it differs from the one that was sent, or none was."""
SEND_KEY = "max_ray.send"
"""The `send` that the application was called with. Once a response has begun, what is in between only passes its pieces
on, a coroutine each."""
SERVER_SEND_KEY = "max_ray.server_send"
"""The HTTP server's own `send`, where something stands between it and the application."""
TIMEOUT_KEY = "max_ray.timeout"
"""The client's `x-request-timeout-seconds`, taken out of the headers."""

DEADLINE_KEY = "max_ray.deadline"
"""The request's `Deadline`, which the body may bring nearer."""
FORWARDED_KEY = "max_ray.forwarded"
"""Set where a replica answers behind a front: the replica counts the request."""

CLIENT_CLOSED = 499
"""The status of a request whose client hung up, as nginx counts it. No client receives it."""
REQUEST_TIMEOUT = 408


def route_path(scope: Scope) -> str:
    """The path without the prefix that the application is mounted at, and without a slash at its end."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root.rstrip("/") + "/")):
        path = path[len(root.rstrip("/")) :]
    return path.removesuffix("/") or "/"


def drop_trailing_slash(scope: Scope) -> None:
    """`/v1/completions/` is the route itself: a redirect would go to whatever host the client named.

    A prefix without a slash is the application's root.
    """
    path: str = scope["path"]
    if path and path == scope.get("root_path"):
        scope["path"] = path + "/"
    if path.endswith("/") and route_path(scope) != "/":
        scope["path"] = path[:-1]

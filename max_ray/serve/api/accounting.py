"""Counts requests: by route and status, and how long they took. The one place that decides about a request's status."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from max_ray.serve.api.access.caller import ROUTE
from max_ray.serve.api.route_table import counted_label
from max_ray.serve.api.scope import CLIENT_CLOSED, FORWARDED_KEY, STATUS_KEY, drop_trailing_slash, route_path


class Counts(Protocol):
    """Where requests are counted."""

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request: the template of its route, its status, how long it took."""


class Counted(Protocol):
    """What has such counts, once requests come."""

    @property
    def metrics(self) -> Counts: ...


class RequestCounter:
    """ASGI middleware, the outermost. Counts requests to the routes that `route_table` says.

    The status is what a layer below left in the scope, else what was sent, else 499: a server in front (Ray Serve's
    proxy) cancels a request whose client has gone. 500 is left for what raised before it answered.
    """

    def __init__(self, app: ASGIApp, engine: Counted) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        drop_trailing_slash(scope)
        label = counted_label(route_path(scope))
        if label is not None:
            await self._counted(label, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _counted(self, label: str, scope: Scope, receive: Receive, send: Send) -> None:
        begin = perf_counter()
        status = 500
        is_complete = False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_complete = not message.get("more_body", False)
            await send(message)

        token = ROUTE.set(label)
        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            if not is_complete:
                scope.setdefault(STATUS_KEY, CLIENT_CLOSED)
            raise
        finally:
            ROUTE.reset(token)
            if FORWARDED_KEY not in scope:
                seconds = perf_counter() - begin
                self._engine.metrics.count_request(label, scope.get(STATUS_KEY, status), seconds)

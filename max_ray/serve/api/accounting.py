"""Counts requests: by route and status, and how long they took. The one place that decides about a request's status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from max_ray.serve.api.engine import Engine
from max_ray.serve.api.metrics import Metrics
from max_ray.serve.api.scope import CLIENT_CLOSED, STATUS_KEY, drop_trailing_slash, route_path

_MODEL_ROUTE = "/v1/models/{model}"


class RequestCounter:
    """ASGI middleware, the outermost. Counts requests to /v1.

    The status is what a layer below left in the scope, else what was sent, else 499: a server in front (Ray Serve's
    proxy) cancels a request whose client has gone. 500 is left for what raised before it answered.
    """

    def __init__(self, app: ASGIApp, engine: Engine, routes: Iterable[str]) -> None:
        self._app = app
        self._engine = engine
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        drop_trailing_slash(scope)
        path = route_path(scope)
        if path.startswith("/v1/"):
            await self._counted(path, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _counted(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
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

        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            if not is_complete:
                scope.setdefault(STATUS_KEY, CLIENT_CLOSED)
            raise
        finally:
            metrics: Metrics = self._engine.metrics
            metrics.count_request(self._label(path), scope.get(STATUS_KEY, status), perf_counter() - begin)

    def _label(self, path: str) -> str:
        """The route's template: as many labels as routes, whatever clients ask for."""
        if path in self._routes:
            return path
        return _MODEL_ROUTE if path.startswith("/v1/models/") else "other"

"""The HTTP server of a model's replica behind a front: on this event loop, on a port of its own."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

_KEEP_ALIVE_S = 75
"""Longer than the front keeps an idle connection, so that the front closes it."""
_FORCED_END_S = 2.0


class ReplicaServer:
    """Made by `start`; ended by `close`.

    Args:
        app: What answers.
        listener: A bound socket.

    Attributes:
        num_open: Requests under way.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self.num_open = 0
        self._app = app
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        config = uvicorn.Config(
            self._counted,
            interface="asgi3",
            proxy_headers=False,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))

    @classmethod
    async def start(cls, app: ASGIApp, host: str) -> ReplicaServer:
        """A server on a free port of an address of this machine. Raises OSError."""
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        server = cls(app, listener)
        while not server._server.started and not server._task.done():
            await asyncio.sleep(0.01)
        return server

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_open -= 1

    async def close(self, within_s: float) -> None:
        """Takes no more connections, and waits for the requests that are under way.

        Args:
            within_s: Those that take longer are cut off.
        """
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=within_s)
        self._server.force_exit = True
        await asyncio.wait([self._task], timeout=_FORCED_END_S)

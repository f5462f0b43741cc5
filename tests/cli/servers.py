"""The real routes over a fake engine, on a thread of their own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine


class Server:
    """A server with its thread.

    Attributes:
        url: Its address.
        loop: The event loop of its thread.
    """

    def __init__(self, engine: FakeEngine, options: ApiOptions | None, **settings: Any) -> None:
        config = uvicorn.Config(
            build_api(engine, options), host="127.0.0.1", port=0, log_level="warning", lifespan="off", **settings
        )
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"{'https' if settings else 'http'}://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._server.serve())
        self.loop.close()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def serving(engine: FakeEngine, options: ApiOptions | None = None, **settings: Any) -> Iterator[Server]:
    """settings: uvicorn's, of a certificate."""
    server = Server(engine, options, **settings)
    try:
        yield server
    finally:
        server.stop()

"""What Ray forwards to the terminal while an application starts.

A model that cannot be loaded is one sentence of ours, and Serve's controller writes fifty lines of traceback around it.
They are held back until it is known how the start ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

_HANDLER = "ray_print_logs"
_CONTROLLER = "ServeController"
_ray: Any = ray


class StartLog:
    """From its making on, nothing of Serve's controller is printed. Does nothing where Ray forwards no lines here."""

    def __init__(self) -> None:
        self._dispatcher: Any = _ray._private.ray_logging.global_worker_stdstream_dispatcher
        self._print: Callable[[Any], None] | None = dict(self._dispatcher.handlers).get(_HANDLER)
        self._held: list[Any] = []
        self._is_silent = False
        self._replace(self._hold)

    def release(self) -> None:
        """Prints what was held back, and from now on everything as it comes; nothing where it was silenced."""
        if self._is_silent:
            return
        self._replace(self._print)
        while self._print is not None and self._held:
            self._print(self._held.pop(0))

    def silence(self) -> None:
        """Drops what was held back, and from now on everything."""
        self._is_silent = True
        self._replace(self._drop)
        self._held.clear()

    def _replace(self, handler: Callable[[Any], None] | None) -> None:
        if handler is None or self._print is None:
            return
        self._dispatcher.remove_handler(_HANDLER)
        self._dispatcher.add_handler(_HANDLER, handler)

    def _hold(self, batch: Any) -> None:
        """Called by Ray's thread with some lines of one process."""
        assert self._print is not None, "only then it is a handler"
        if _CONTROLLER in (batch.get("actor_name") or ""):
            self._held.append(batch)
        else:
            self._print(batch)

    def _drop(self, batch: Any) -> None:
        """A handler that prints nothing."""

"""Failure: what ended a group for those who use it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from max_ray.errors import MaxRayError

ResultT = TypeVar("ResultT")


class Failure:
    """What ended a group for those who use it, until it is rebuilt; and a way out for tasks that wait for it."""

    def __init__(self) -> None:
        self._error: MaxRayError | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    def set(self, error: MaxRayError) -> None:
        self._error = error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._error = None

    async def guard(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of `work`; raises the error instead as soon as there is one, and cancels `work`."""
        task = asyncio.ensure_future(work)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            if self._error is None:
                await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
            if self._error is not None:
                raise self._error
            return task.result()
        finally:
            self._waiters.discard(waiter)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

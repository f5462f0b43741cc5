"""Responses that are made behind the request that asked for them: on the replica that took it, until done or unwanted.

The store hears every second which ones are being made, and says which ones are not wanted any more: they were cancelled
or deleted, perhaps on another replica. What a replica was making when it died is told by its silence.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.serve.api.dialect import DialectAnswer
from max_ray.serve.api.http_errors import describe_and_log, internal_error
from max_ray.serve.api.responses.format import ResponseFormat
from max_ray.serve.api.responses.store import ResponseStore

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
DEAD_AFTER_S = 30.0
"""A response of which the store has not heard for so long has lost its replica."""


class BackgroundResponses:
    """Those of one replica.

    Args:
        store: Where they are kept.
    """

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None

    def start(self, answer: DialectAnswer, form: ResponseFormat) -> None:
        """Goes on with an answer that has been admitted and stored."""
        task = asyncio.create_task(self._made(answer, form))
        self._tasks[form.id] = task

        def forget(_: object) -> None:  # also of a task that was cancelled before its first step
            self._tasks.pop(form.id, None)
            answer.close()

        task.add_done_callback(forget)
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    def stop(self, response_id: str) -> None:
        """Ends a response, if it is made here."""
        task = self._tasks.get(response_id)
        if task is not None:
            task.cancel()

    async def _made(self, answer: DialectAnswer, form: ResponseFormat) -> None:
        try:
            response = await self._outcome(answer, form)
            await self._store.finish(form.id, json.dumps(response).encode(), json.dumps(response["output"]).encode())
        except WorkerGroupError as error:
            logger.warning("the response %s could not be stored: %s", form.id, error)

    async def _outcome(self, answer: DialectAnswer, form: ResponseFormat) -> Mapping[str, Any]:
        try:
            return await answer.whole()
        except MaxRayError as error:
            return form.failed(describe_and_log(error))
        except Exception:
            logger.exception("A background response failed.")
            return form.failed(internal_error())

    async def _keep(self) -> None:
        while self._tasks:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                unwanted = await self._store.heartbeat(list(self._tasks))
            except WorkerGroupError as error:
                logger.warning("the store of responses was not told what is being made: %s", error)
                continue
            for response_id in unwanted:
                self.stop(response_id)

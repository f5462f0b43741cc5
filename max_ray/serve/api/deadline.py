"""A client's own limit: the header `x-request-timeout-seconds`, which Ray Serve has, and the field `timeout`.

The work of a request that takes longer is cancelled, also while it waits; one that could not even start in time is
refused at once (`scheduler/queue_room.py`). A whole answer is a 408 then; a stream ends with an error event.
Serve reads the same header where `max_ray.serve.replica_door` does not keep it away, and would answer in plain text.
"""

from __future__ import annotations

import asyncio
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from max_ray.serve.api.access.caller import DEADLINE
from max_ray.serve.api.error_shapes import ErrorShape, error_shape
from max_ray.serve.api.http_errors import ErrorResponse, error_body
from max_ray.serve.api.scope import DEADLINE_KEY, REQUEST_TIMEOUT, STATUS_KEY, TIMEOUT_KEY

TIMEOUT_HEADER = b"x-request-timeout-seconds"
_LONGEST_S = 10.0**6
_SERVE_IS_EARLIER_S = 0.05
"""Serve starts its clock before the request is here: when it cancels, this one may have so much left."""


class Deadline:
    """When a request ends at the latest.

    Args:
        seconds: What the header allows, from now on; None: no limit.

    Attributes:
        timeout: The limit, to be entered.
        told: What set the limit, for the error.
    """

    def __init__(self, seconds: float | None) -> None:
        self._start = asyncio.get_running_loop().time()
        self.timeout = asyncio.timeout(seconds)
        self.told = f"{seconds or 0:g} s that its {TIMEOUT_HEADER.decode()} allows"

    def limit(self, seconds: float) -> None:
        """Brings the end nearer, to so many seconds after the request came.

        Args:
            seconds: What the field `timeout` allows.
        """
        when, end = self.timeout.when(), self._start + seconds
        if when is None or end < when:
            self.timeout.reschedule(end)
            DEADLINE.set(end)
            self.told = f"{seconds:g} s that its field 'timeout' allows"


class RequestDeadline:
    """ASGI middleware. Values that are no number above 0 set no limit, as in Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] != "POST" and requested_timeout(scope) is None):
            await self._app(scope, receive, send)
        else:
            await self._limited(scope, receive, send)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send, error_shape(scope))
        deadline = scope[DEADLINE_KEY] = Deadline(requested_timeout(scope))
        token = DEADLINE.set(deadline.timeout.when())
        try:
            async with deadline.timeout as limit:
                await self._app(scope, receive, reply.send)
        except TimeoutError:
            if not limit.expired():
                raise
            await reply.end(deadline.told, scope, receive)
        except asyncio.CancelledError:
            when = limit.when()
            if when is not None and asyncio.get_running_loop().time() > when - _SERVE_IS_EARLIER_S:
                scope[STATUS_KEY] = REQUEST_TIMEOUT
            raise
        finally:
            DEADLINE.reset(token)


class _Reply:
    """What of a response has been sent, and how to end it early."""

    def __init__(self, send: Send, shape: ErrorShape) -> None:
        self._send = send
        self._shape = shape
        self._started = False
        self._is_stream = False
        self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._is_stream = any(value.startswith(self._shape.media_type) for _, value in message["headers"])
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def end(self, told: str, scope: Scope, receive: Receive) -> None:
        if self._complete:
            return
        scope[STATUS_KEY] = REQUEST_TIMEOUT
        message = f"The request was not done within the {told}."
        body = error_body(message, kind="timeout", code="request_timeout")
        if not self._started:
            await ErrorResponse(body, status_code=REQUEST_TIMEOUT)(scope, receive, self._send)
        elif self._is_stream:
            event = self._shape.event(self._shape.body(body, REQUEST_TIMEOUT))
            await self._send({"type": "http.response.body", "body": event, "more_body": False})


def requested_timeout(scope: Scope) -> float | None:
    """The seconds that the client allows; None: no limit."""
    text: bytes | None = scope.get(TIMEOUT_KEY)
    if text is None:
        text = next((value for name, value in reversed(scope["headers"]) if name == TIMEOUT_HEADER), None)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < _LONGEST_S and not math.isnan(seconds) else None

"""Passes requests on to replicas and their answers back, as raw bytes, piece by piece.

A request is tried again, on another replica where there is one, until a replica has begun to answer. A short body is
kept for that. A long one is let go as soon as it has been passed on, so that it takes memory once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any

import aiohttp
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send
from yarl import URL

from max_ray.errors import MaxRayError
from max_ray.log import get_logger
from max_ray.serve.api.body_reader import BodyReader
from max_ray.serve.api.deadline import TIMEOUT_HEADER, requested_timeout
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.error_shapes import error_shape
from max_ray.serve.api.front.body_model import named_model
from max_ray.serve.api.front.replica_table import Replica, ReplicaTable
from max_ray.serve.api.front.served_model import ModelTable, ServedModel
from max_ray.serve.api.http_errors import ErrorResponse, describe_and_log, error_body, http_error
from max_ray.serve.api.json_body import SHORT_BODY
from max_ray.serve.api.route_table import known_paths
from max_ray.serve.api.scope import (
    CLIENT_CLOSED,
    FORWARDED_KEY,
    REQUEST_TIMEOUT,
    SEND_KEY,
    STATUS_KEY,
    route_path,
)
from max_ray.serve.api.sse import ClientGoneError, until_close, until_disconnect

_LOG = get_logger(__name__)
_MAX_ATTEMPTS = 4
_PIECE_BYTES = 64 * 1024
_CONNECT_WITHIN_S = 5.0
_IDLE_CONNECTION_S = 30.0
"""Shorter than a replica keeps one, so that it is never the replica that closes a connection in use."""
_OF_THE_CONNECTION = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"content-length", b"expect", b"date", b"server"),
    }
)
_CHECKED_HERE = frozenset({b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest", TIMEOUT_HEADER})
_UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_BROKEN = (aiohttp.ClientError, ConnectionError)


class UnreachableError(MaxRayError):
    """No replica of the model answered."""

    http_status = 502
    error_type = "replica_unavailable"


class Forwarder:
    """ASGI application for the routes that a model answers.

    Args:
        models: All of the application.
        replicas: Where they run.
        options: Settings of the front.
        internal_key: API key for requests without one, which are the front's own; "" for none.
    """

    def __init__(self, models: ModelTable, replicas: ReplicaTable, options: ApiOptions, internal_key: str = "") -> None:
        self._models = models
        self._replicas = replicas
        self._internal_key = internal_key
        self._bodies = BodyReader(timeout_s=options.body_timeout_s)
        has_images = any(model.takes_images for model in models)
        self._limit = options.max_body_bytes_with_images if has_images else options.max_body_bytes
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            refusal = await self._forwarded(request, send)
        except (ClientDisconnect, ClientGoneError):
            scope[STATUS_KEY] = CLIENT_CLOSED
            return
        except HTTPException as error:
            refusal = http_error(request, error, known_paths())
        except MaxRayError as error:
            refusal = ErrorResponse(describe_and_log(error), status_code=type(error).http_status)
        if refusal is not None:
            await refusal(scope, receive, send)

    async def close(self) -> None:
        """Ends the connections to replicas."""
        if self._session is not None:
            await self._session.close()

    async def _forwarded(self, request: Request, send: Send) -> ErrorResponse | None:
        """The refusal of a request that no replica has begun to answer."""
        async with AsyncExitStack() as stack:
            body, model = b"", None
            if request.method == "POST":
                body = await stack.enter_async_context(self._bodies.raw(request, self._limit))
                model = self._models.find(await named_model(body, _members(request.scope)))
            else:
                model = self._models.find(request.query_params.get("model"))
            call = _Call(self, request, send, model, _Body(body, stack))
            del body
            return await until_disconnect(request.receive, call.run())

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to replicas, of the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_WITHIN_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._session

    async def replica_for(self, model: ServedModel, tried: Collection[str], *, may_wake: bool) -> Replica | None:
        """Where the next attempt goes.

        Args:
            model: The model of the request.
            tried: URLs that the request has been sent to.
            may_wake: Whether a replica is started for a model without one.

        Returns:
            The replica; None where no other is left to try.

        Raises:
            WorkerGroupError: None came up in time.
        """
        found = self._replicas.choose(model.name, tried)
        if found is None and may_wake:
            found = await self._replicas.woken(model)
        return found

    def suspect(self, replica: Replica) -> None:
        """Passes over a replica for a while."""
        self._replicas.suspect(replica)

    def headers(self, scope: Scope) -> list[tuple[str, str]]:
        """What a replica gets of a request's headers; without those that the front has acted on."""
        own = [("Authorization", f"Bearer {self._internal_key}")] if self._internal_key else []
        left_out = _OF_THE_CONNECTION | _CHECKED_HERE
        kept = [(name, value) for name, value in scope["headers"] if name not in left_out and _is_utf8(value)]
        if any(name in (b"authorization", b"x-api-key") for name, _ in kept):
            own = []
        return [(name.decode("latin-1"), value.decode()) for name, value in kept] + own


class _Body:
    """The bytes of a request, until they are not needed any longer."""

    def __init__(self, content: bytes, stack: AsyncExitStack) -> None:
        self.size = len(content)
        self._content: bytes | None = content
        self._stack = stack

    @property
    def is_there(self) -> bool:
        """Whether the request can be sent."""
        return self._content is not None

    @property
    def data(self) -> bytes | AsyncIterator[memoryview] | None:
        """For one attempt."""
        assert self._content is not None, "let go"
        return (self._content or None) if self.size <= SHORT_BODY else self._pieces()

    async def _pieces(self) -> AsyncIterator[memoryview]:
        assert self._content is not None, "let go"
        view = memoryview(self._content)
        for begin in range(0, len(view), _PIECE_BYTES):
            yield view[begin : begin + _PIECE_BYTES]
        self._content = None
        del view
        await self._stack.aclose()


class _Call:
    """One request on its way."""

    def __init__(self, forwarder: Forwarder, request: Request, send: Send, model: ServedModel, body: _Body) -> None:
        self._forwarder = forwarder
        self._request = request
        self._send = send
        self._model = model
        self._body = body
        self._headers = forwarder.headers(request.scope)
        if request.method == "POST":
            self._headers.append(("Content-Length", str(body.size)))
        self._seconds = requested_timeout(request.scope)
        self._begin = monotonic()

    async def run(self) -> ErrorResponse | None:
        """Sends the request until a replica answers. The refusal, where none did."""
        tried: list[str] = []
        for _ in range(_MAX_ATTEMPTS):
            try:
                async with asyncio.timeout(self._seconds_left):
                    may_wake = self._request.method == "POST" or route_path(self._request.scope) != "/v1/server"
                    replica = await self._forwarder.replica_for(self._model, tried, may_wake=may_wake)
            except TimeoutError:
                return self._too_late()
            if replica is None:
                return _no_replica(self._model)
            with replica.used():
                if await self._answered_by(replica):
                    return None
            tried.append(replica.url)
            if not self._body.is_there:
                break
        raise UnreachableError(
            f"The replica of the model {self._model.name!r} broke off without an answer. Try again in a few seconds."
        )

    @property
    def _seconds_left(self) -> float | None:
        return None if self._seconds is None else self._seconds - (monotonic() - self._begin)

    def _too_late(self) -> ErrorResponse:
        self._request.scope[STATUS_KEY] = REQUEST_TIMEOUT
        message = f"The request was not done within the {self._seconds:g} s that its {TIMEOUT_HEADER.decode()} allows."
        body = error_body(message, kind="timeout", code="request_timeout")
        return ErrorResponse(body, status_code=REQUEST_TIMEOUT)

    async def _answered_by(self, replica: Replica) -> bool:
        """False where the replica was not reached, or ended before it answered."""
        try:
            response = await self._sent(replica)
        except _UNREACHED:
            self._forwarder.suspect(replica)
            return False
        except _BROKEN as error:
            _LOG.warning("a replica of %s broke off: %s", self._model.name, error)
            return False
        try:
            if response.status >= 500 and response.content_type == "text/plain":  # the HTTP server's own
                raise UnreachableError(f"The replica of the model {self._model.name!r} failed; its log says why.")
            self._request.scope[FORWARDED_KEY] = True
            await self._passed_back(response)
        finally:
            response.close()  # of an answer that was read to its end this gives the connection back
        return True

    async def _sent(self, replica: Replica) -> aiohttp.ClientResponse:
        scope = self._request.scope
        headers = self._headers
        left = self._seconds_left
        if left is not None:
            headers = [*headers, (TIMEOUT_HEADER.decode(), f"{max(left, 0.001):.3f}")]
        url = URL(replica.url + _target(scope), encoded=True)
        return await self._forwarder.session.request(
            self._request.method, url, headers=headers, data=self._body.data, allow_redirects=False
        )

    async def _passed_back(self, response: aiohttp.ClientResponse) -> None:
        scope = self._request.scope
        send = scope.get(SEND_KEY, self._send)
        headers = [(name.lower(), value) for name, value in response.raw_headers]
        length = [pair for pair in headers if pair[0] == b"content-length"]
        kept = [pair for pair in headers if pair[0] not in _OF_THE_CONNECTION] + length
        await self._send({"type": "http.response.start", "status": response.status, "headers": kept})
        if not length and scope.get("http_version") == "1.0":
            send = until_close(scope, send)
        read: Callable[[], Any] = response.content.readany
        try:
            while piece := await read():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except _BROKEN as error:
            _LOG.warning("a replica of %s broke off within an answer: %s", self._model.name, error)
            piece = self._last_event(response)
            if piece is None:
                raise ClientGoneError from error  # the connection is all that can tell
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _last_event(self, response: aiohttp.ClientResponse) -> bytes | None:
        """What ends a stream whose replica is gone; None for an answer that is no stream."""
        shape = error_shape(self._request.scope)
        if response.content_type.encode() != shape.media_type:
            return None
        message = "The replica ended before the answer was complete. Send the request again."
        return shape.event(shape.body(error_body(message, kind="replica_unavailable"), 502))


def _members(scope: Scope) -> tuple[str, ...]:
    """Names of the member of a body that names the model: litellm and older clients of Ollama's say `name`."""
    return ("model", "name") if route_path(scope).startswith("/api/") else ("model",)


def _target(scope: Scope) -> str:
    """Path and query, without the prefix that the application is mounted at."""
    query: bytes = scope.get("query_string", b"")
    return route_path(scope) + ("?" + query.decode("latin-1") if query else "")


def _no_replica(model: ServedModel) -> ErrorResponse:
    message = f"The model {model.name!r} has no replica now: its next request starts one."
    return ErrorResponse(error_body(message, kind="replica_unavailable"), status_code=503)


def _is_utf8(value: bytes) -> bool:
    if value.isascii():
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Reads request bodies and parses them, so that no client's body holds up or fills up the others' server.

A body of up to SHORT_BODY bytes is read and parsed at once. Longer ones pass a gate:

    read     while `budget` bytes of bodies are in memory, only the oldest one goes on; the rest stays in the sockets
    parsed   one at a time, in a thread of their own
    used     NUM_USED of them are tokenized at a time; then their memory is free again

A client that sends too slowly gets 408: it has `timeout_s` seconds, and one more for each _SLOWEST bytes that it sent.
While others wait for memory that it takes, it has _PATIENCE_S instead.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from time import monotonic

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from max_ray.errors import MaxRayError, quoted
from max_ray.serve.api.json_body import SHORT_BODY
from max_ray.serve.api.openai import RequestT, parse_request

NUM_USED = 2
_SLOWEST = 64 * 1024
_PATIENCE_S = 1.0
_BLOCK_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024  # what an event loop reads from a socket at most
_LARGE_BODY = 256 * 1024
_CLOSE = {"Connection": "close"}


class BodyReader:
    """Of one application. budget: bytes of long bodies in memory, besides the oldest one's."""

    def __init__(self, *, timeout_s: float, budget: int = 2**20) -> None:
        self._timeout_s = timeout_s
        self._gate = _Gate(budget)
        self._uses = asyncio.Semaphore(NUM_USED)
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="request-parser")

    @asynccontextmanager
    async def parsed(
        self, request: Request, kind: type[RequestT], limit: int, max_length: int
    ) -> AsyncIterator[RequestT]:
        """The request in a body of at most `limit` bytes. A long one counts as in memory until the block is left.

        max_length: of the model; what cannot fit it is not kept. Raises InputError; HTTPException 408, 413 and 415;
        ClientDisconnect.
        """
        announced = announced_bytes(request, limit)
        upload = Upload(request.receive, limit, self._timeout_s)
        while announced <= SHORT_BODY and not upload.is_complete and upload.size <= SHORT_BODY:
            await upload.read_piece()
        if upload.is_complete and upload.size <= SHORT_BODY:
            yield parse_request(kind, upload.taken())
            return
        stop_reading_ahead(request.receive)
        async with self._gate.entered(upload), self._read(upload):
            loop = asyncio.get_running_loop()
            outcome = await loop.run_in_executor(self._parser, _parse, kind, upload, max_length)
            if isinstance(outcome, MaxRayError):
                raise outcome
            yield outcome

    @asynccontextmanager
    async def raw(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """The bytes of a body of at most `limit` bytes. A long one counts as in memory until the block is left.

        Raises HTTPException 408, 413 and 415; ClientDisconnect.
        """
        announced = announced_bytes(request, limit)
        upload = Upload(request.receive, limit, self._timeout_s)
        while announced <= SHORT_BODY and not upload.is_complete and upload.size <= SHORT_BODY:
            await upload.read_piece()
        if upload.is_complete and upload.size <= SHORT_BODY:
            yield upload.taken()
            return
        stop_reading_ahead(request.receive)
        async with self._gate.entered(upload), self._read(upload):
            yield upload.taken()

    @asynccontextmanager
    async def _read(self, upload: Upload) -> AsyncIterator[None]:
        while not upload.is_complete:
            async with self._gate.turn(upload):
                await upload.read_piece()
        async with self._uses:
            yield


class Upload:
    """A body as it arrives. is_complete: all of it is there. size: bytes so far."""

    def __init__(self, receive: Receive, limit: int, timeout_s: float) -> None:
        self.size = 0
        self.is_complete = False
        self._receive = receive
        self._limit = limit
        self._blocks: list[bytearray] = []
        self._seconds_left = timeout_s
        self._patience = _PATIENCE_S
        self._timeout: asyncio.Timeout | None = None  # while a piece is awaited
        self._asked_at = 0.0

    async def read_piece(self) -> int:
        """How many bytes came. Raises ClientDisconnect; HTTPException 408 and 413."""
        self._asked_at = monotonic()
        try:
            async with asyncio.timeout(self._seconds_left) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time. Send it again.", headers=_CLOSE) from None
        finally:
            self._timeout = None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        waited = monotonic() - self._asked_at
        self._seconds_left += len(piece) / _SLOWEST - waited
        self._patience = min(_PATIENCE_S, self._patience + len(piece) / _SLOWEST - waited)
        self._take(piece, not message.get("more_body", False))
        return len(piece)

    def _take(self, piece: bytes, is_last: bool) -> None:
        self.size += len(piece)
        self.is_complete = is_last
        if self.size > self._limit:
            raise _too_large(self._limit)
        if self._blocks and len(self._blocks[-1]) < _BLOCK_BYTES:
            self._blocks[-1] += piece
        else:
            self._blocks.append(bytearray(piece))

    def taken(self) -> bytes:
        """The whole body, which is not kept."""
        whole = b"".join(self._blocks)
        self._blocks.clear()
        if self.size > _LARGE_BODY:
            _return_free_memory()  # the blocks: what the body becomes comes from elsewhere
        return whole

    @property
    def is_slow(self) -> bool:
        """Whether its client lets us wait, by now longer than others should wait for it."""
        return self._timeout is not None and monotonic() - self._asked_at > self._patience

    def give_up(self) -> None:
        """Ends the wait for the next piece with a 408."""
        if self._timeout is not None:
            self._timeout.reschedule(0)
            self._timeout = None  # it cannot be changed again


class _Gate:
    """Who may read on: everyone while there is room, else the upload that came first, as long as it is not slow."""

    def __init__(self, budget: int) -> None:
        self._room = budget
        self._sizes: dict[Upload, int] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def entered(self, upload: Upload) -> AsyncIterator[None]:
        self._sizes[upload] = 0
        self.take(upload, upload.size)
        try:
            yield
        finally:
            self._room += self._sizes.pop(upload)
            self._wake_all()

    def take(self, upload: Upload, num_bytes: int) -> None:
        self._sizes[upload] += num_bytes
        self._room -= num_bytes

    @asynccontextmanager
    async def turn(self, upload: Upload) -> AsyncIterator[None]:
        """Waits until `upload` may read a piece. Its room is taken before it is read: many may read at once."""
        await self._wait_for_room(upload)
        before = upload.size
        self.take(upload, _PIECE_BYTES)
        try:
            yield
        finally:
            self.take(upload, upload.size - before - _PIECE_BYTES)
            if self._room > 0:
                self._wake_all()

    async def _wait_for_room(self, upload: Upload) -> None:
        while self._room <= 0 and next(iter(self._sizes)) is not upload:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await asyncio.wait((waiter,), timeout=_PATIENCE_S)
            self._pass_over_slow()

    def _pass_over_slow(self) -> None:
        """Those in front for whose clients the others wait: they go behind, or, where they keep much, are given up."""
        for upload in list(self._sizes):
            if not upload.is_slow:
                break
            if upload.size > SHORT_BODY:
                upload.give_up()
            else:
                self._sizes[upload] = self._sizes.pop(upload)
            self._wake_all()

    def _wake_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


def _parse(kind: type[RequestT], upload: Upload, max_length: int) -> RequestT | MaxRayError:
    """In the parser's thread. An error is given back without its frames, which hold the body and what it became."""
    size = upload.size
    try:
        request = parse_request(kind, upload.taken())  # no name keeps the body
        request.refuse_hopeless(max_length)
        return request
    except MaxRayError as error:
        error.__context__ = None
        return error.with_traceback(None)
    finally:
        if size > _LARGE_BODY:
            _return_free_memory()


def _return_free_memory() -> None:
    """Gives the C allocator's free pages back to the system, where it can: it keeps tens of MiB of what was large."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def announced_bytes(request: Request, limit: int) -> int:
    """What Content-Length says, 0 without it. Raises HTTPException 413 and 415."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(
            415, f"A body with Content-Encoding {quoted(encoding)} is not taken: send it uncompressed.", headers=_CLOSE
        )
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    if num_bytes > limit or len(announced) >= 20:
        raise _too_large(limit)
    return num_bytes


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit} bytes. Split the request.", headers=_CLOSE)


def stop_reading_ahead(receive: Receive) -> None:
    """Serve reads a body into a queue without bounds as fast as it comes, for the sake of the disconnect behind it.
    With room for one message it waits for us, and the rest stays in the socket."""
    queue = getattr(receive, "queue", None)
    if isinstance(queue, asyncio.Queue) and queue.maxsize == 0:
        queue._maxsize = 1  # type: ignore[attr-defined]  # no public way after its construction

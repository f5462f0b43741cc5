"""The replica's end: a listener for the members of one group, and a connection for each that has proved itself.

The listener exists only while members connect. It is in a folder that only this user can enter, or on the one address
that the members reach, never on all addresses. A peer that has not proved itself is disconnected after 5 seconds, when
it sends a byte too many, and when more than 256 of them are waiting (the oldest goes).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from max_ray.errors import TransportError
from max_ray.log import get_logger
from max_ray.transport.address import Endpoint, TlsFiles, address_towards, bound_socket, tune
from max_ray.transport.frames import FrameReader, FrameWriter, MessageType
from max_ray.transport.handshake import TIMEOUT_S, Credentials, Member, ReplicaHandshake

_LOG = get_logger(__name__)
MAX_WAITING = 256

OnMessage = Callable[["ReplicaConnection", int, bytes], None]
"""Called with (connection, type, payload). May raise TransportError, which closes the connection."""


class Admission:
    """Who may connect, and what becomes of those who do.

    Args:
        credentials: Of this epoch.
        expected: The members that may connect, each of them once.
        accepts: Types that they may send.
        on_message: See OnMessage.
        on_closed: Called with a member's connection, and why it was closed where this side knows.
    """

    def __init__(
        self,
        credentials: Credentials,
        expected: Collection[Member],
        accepts: Collection[MessageType],
        on_message: OnMessage,
        on_closed: Callable[[ReplicaConnection, TransportError | None], None],
    ) -> None:
        self.credentials = credentials
        self.accepts = accepts
        self.on_message = on_message
        self.on_closed = on_closed
        self.connections: dict[Member, ReplicaConnection] = {}
        self.all_connected = asyncio.Event()
        self.waiting: dict[ReplicaConnection, None] = {}
        self._expected = frozenset(expected)
        self._is_over = False

    @property
    def missing(self) -> list[Member]:
        """Members that have not connected."""
        return [member for member in self._expected if member not in self.connections]

    def new_connection(self) -> ReplicaConnection:
        """For a peer that has just connected."""
        return ReplicaConnection(self)

    def note_waiting(self, connection: ReplicaConnection) -> None:
        """A peer that has to prove itself."""
        if self._is_over:
            connection.close()
            return
        self.waiting[connection] = None
        if len(self.waiting) > MAX_WAITING:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.close()

    def note_proved(self, connection: ReplicaConnection, member: Member) -> None:
        """A peer that has proved itself. Raises TransportError when the member is connected already."""
        if member in self.connections or self._is_over:
            raise TransportError(f"{member} connected twice.")
        self.connections[member] = connection
        if not self.missing:
            self.all_connected.set()

    def end(self) -> None:
        """No peer is admitted any more; peers that wait are disconnected."""
        self._is_over = True
        for connection in list(self.waiting):
            connection.close()


class ReplicaConnection(asyncio.Protocol):
    """One peer: first it has to prove itself, then it is a member's connection."""

    def __init__(self, admission: Admission) -> None:
        self.member: Member | None = None
        self._admission = admission
        self._handshake = ReplicaHandshake(admission.credentials, admission.missing)
        self._reader: FrameReader | None = None
        self._writer: FrameWriter | None = None
        self._transport: Any = None
        self._error: TransportError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        fileno = transport.get_extra_info("socket").fileno()
        self._sock = socket.socket(fileno=os.dup(fileno))  # our own: event loops do not show theirs once it is closed
        tune(self._sock)
        self._timer = asyncio.get_running_loop().call_later(TIMEOUT_S, self._give_up)
        self._admission.note_waiting(self)
        if not self.is_closing:
            self._transport.write(self._handshake.nonce)

    def data_received(self, data: bytes) -> None:
        try:
            if self._reader is None:
                self._prove(data)
                return
            for kind, payload in self._reader.feed(data):
                self._admission.on_message(self, kind, payload)
        except TransportError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_waiting()
        if self._sock is not None:
            self._sock.close()
        if self.member is not None:
            self._admission.on_closed(self, self._error)

    @property
    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())

    def send(self, kind: MessageType, payload: bytes) -> None:
        """Sends a frame; not to a member that has closed, for which uvloop raises: its actor's call tells why."""
        assert self._writer is not None, "a frame for a peer that has not proved itself"
        if not self.is_closing:
            self._transport.write(self._writer.frame(kind, payload))

    def close(self) -> None:
        """At once: a caller that blocks the event loop next must not wait for it. Idempotent."""
        if self._sock is not None:
            with contextlib.suppress(OSError):  # closed already: the member was first, or is dead
                self._sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()

    def _prove(self, data: bytes) -> None:
        found = self._handshake.feed(data)
        if found is None:
            return
        member, keys, proof = found
        self._admission.note_proved(self, member)
        self._forget_waiting()
        self.member = member
        self._reader = FrameReader(keys.to_replica, self._admission.accepts)
        self._writer = FrameWriter(keys.to_member)
        self._transport.write(proof)

    def _give_up(self) -> None:
        self._fail(TransportError(f"A peer did not prove itself within {TIMEOUT_S:.0f} s."))

    def _fail(self, error: TransportError) -> None:
        _LOG.warning("%s is disconnected: %s", self.member or "a peer", error)
        self._error = self._error or error
        self.close()

    def _forget_waiting(self) -> None:
        self._admission.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()


@asynccontextmanager
async def listening(
    admission: Admission,
    *,
    peer_address: str | None = None,
    port_range: tuple[int, int] | None = None,
    tls: TlsFiles | None = None,
) -> AsyncIterator[Endpoint]:
    """Where members may connect meanwhile; the connections that were made stay afterwards.

    Args:
        admission: Who may connect.
        peer_address: Address of the members' node; None when it is this one.
        port_range: TCP ports to choose from; None for any free one.
        tls: Makes TCP connections TLS.
    """
    if peer_address is None:
        opened = _unix(admission)
    else:
        opened = _tcp(admission, address_towards(peer_address), port_range, tls)
    try:
        async with opened as endpoint:
            yield endpoint
    finally:
        admission.end()


@asynccontextmanager
async def _unix(admission: Admission) -> AsyncIterator[Endpoint]:
    folder = tempfile.mkdtemp(prefix="max_ray-")  # of mode 0700
    path = os.path.join(folder, "socket")
    server = await asyncio.get_running_loop().create_unix_server(admission.new_connection, path)
    try:
        yield Endpoint(path, "", 0, admission.credentials)
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _tcp(
    admission: Admission, host: str, port_range: tuple[int, int] | None, tls: TlsFiles | None
) -> AsyncIterator[Endpoint]:
    sock = bound_socket(host, port_range)
    secure: dict[str, Any] = {}
    if tls is not None:
        secure = {"ssl": tls.server_context(), "ssl_handshake_timeout": TIMEOUT_S}
    server = await asyncio.get_running_loop().create_server(admission.new_connection, sock=sock, **secure)
    try:
        yield Endpoint(None, host, sock.getsockname()[1], admission.credentials, tls is not None)
    finally:
        server.close()

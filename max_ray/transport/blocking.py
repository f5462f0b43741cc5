"""MemberConnection: the end of a worker or of the KV manager, for one thread.

Reads never wait unless they are told to: a look at the socket between two steps costs a microsecond.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Collection

from max_ray.errors import TransportError
from max_ray.transport.address import Endpoint, TlsFiles, tune
from max_ray.transport.codec import decode_number, encode_number
from max_ray.transport.frames import READ_BYTES, FrameReader, FrameWriter, MessageType
from max_ray.transport.handshake import NONCE_BYTES, PROOF_BYTES, TIMEOUT_S, Member, MemberHandshake, SessionKeys

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class MemberConnection:
    """Frames to and from the replica. Made by `connect`.

    Args:
        sock: Connected, and through with the handshake.
        keys: Of the session.
        accepts: Types that the replica may send.
    """

    def __init__(self, sock: socket.socket, keys: SessionKeys, accepts: Collection[MessageType]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(keys.to_member, accepts)
        self._writer = FrameWriter(keys.to_replica)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self.is_closed = False

    @classmethod
    def connect(
        cls, endpoint: Endpoint, member: Member, accepts: Collection[MessageType], tls: TlsFiles | None = None
    ) -> MemberConnection:
        """Connects to the replica and proves who this is. Raises TransportError when that fails, or takes 5 s."""
        try:
            sock = _connected(endpoint, tls)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"{_name(member)} cannot reach its replica at {endpoint.place}: {error}. On several nodes, open "
                "worker_port_range between them."
            ) from error
        try:
            keys = _handshake(sock, MemberHandshake(endpoint.credentials, member))
            return cls(sock, keys, accepts)
        except OSError as error:
            sock.close()
            raise TransportError(f"{_name(member)}: the handshake at {endpoint.place} failed: {error}") from error
        except TransportError:
            sock.close()
            raise

    def send(self, kind: MessageType, payload: bytes) -> None:
        """Sends a frame, and waits while the socket is full. Nothing is raised for a replica that has closed."""
        data = memoryview(self._writer.frame(kind, payload))
        while data and not self.is_closed:
            try:
                data = data[self._sock.send(data) :]
            except _WOULD_BLOCK:
                self._writable.poll(1000)
            except OSError:
                self.is_closed = True

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, bytes]]:
        """(type, payload) of what has arrived, waiting for something until the timeout; pings are answered here.

        Raises TransportError, and closes, when the replica breaks the protocol.
        """
        if self.is_closed or not (self._has_pending() or self._readable.poll(timeout_s * 1000)):
            return []
        data = self._read()
        if not data:
            return []
        try:
            messages = self._reader.feed(data)
        except TransportError:
            self.close()
            raise
        if any(kind == MessageType.PING for kind, _ in messages):
            messages = self._without_pings(messages)
        return messages

    def close(self) -> None:
        """Closes; idempotent."""
        self.is_closed = True
        self._sock.close()

    def _has_pending(self) -> bool:
        """Decrypted bytes that the socket itself does not show."""
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    def _read(self) -> bytes:
        try:
            data = self._sock.recv(READ_BYTES)
        except _WOULD_BLOCK:
            return b""
        except OSError:
            data = b""
        self.is_closed = not data
        return data

    def _without_pings(self, messages: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        for kind, payload in messages:
            if kind == MessageType.PING:
                self.send(MessageType.PONG, encode_number(decode_number(payload)))
        return [message for message in messages if message[0] != MessageType.PING]


def _connected(endpoint: Endpoint, tls: TlsFiles | None) -> socket.socket:
    """Raises OSError."""
    if endpoint.path is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(endpoint.path)
        except OSError:
            sock.close()
            raise
        return sock
    if endpoint.uses_tls and tls is None:
        raise ValueError("the replica's Ray uses TLS (RAY_USE_TLS), and this node's does not")
    sock = socket.create_connection((endpoint.host, endpoint.port), TIMEOUT_S)
    tune(sock)
    if not endpoint.uses_tls or tls is None:
        return sock
    try:
        return tls.client_context().wrap_socket(sock)
    except OSError:
        sock.close()
        raise


def _handshake(sock: socket.socket, handshake: MemberHandshake) -> SessionKeys:
    deadline = time.monotonic() + TIMEOUT_S
    sock.sendall(handshake.answer(_exactly(sock, NONCE_BYTES, deadline)))
    return handshake.finish(_exactly(sock, PROOF_BYTES, deadline))


def _exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        more = sock.recv(num_bytes - len(data))
        if not more:
            raise TransportError("The replica closed the connection during the handshake.")
        data += more
    return data


def _name(member: Member) -> str:
    return "The KV manager" if member.role == "kv_manager" else f"Worker {member.rank}"

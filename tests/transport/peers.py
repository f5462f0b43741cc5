"""Both ends of a connection in one process: a listener on this event loop, members on threads."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from max_ray.errors import TransportError
from max_ray.transport.address import Endpoint
from max_ray.transport.frames import FROM_WORKER, MessageType
from max_ray.transport.handshake import WORKER, Credentials, Member
from max_ray.transport.listener import Admission, ReplicaConnection, listening

RANKS = (Member(WORKER, 0), Member(WORKER, 1))


@dataclass
class Replica:
    """What the replica's side has seen."""

    admission: Admission = field(init=False)
    messages: list[tuple[Member | None, int, bytes]] = field(default_factory=list)
    closed: list[tuple[Member | None, TransportError | None]] = field(default_factory=list)

    def on_message(self, connection: ReplicaConnection, kind: int, payload: bytes) -> None:
        self.messages.append((connection.member, kind, payload))

    def on_closed(self, connection: ReplicaConnection, error: TransportError | None) -> None:
        self.closed.append((connection.member, error))


@asynccontextmanager
async def replica(
    members: Collection[Member] = RANKS, accepts: Collection[MessageType] = FROM_WORKER, **network: Any
) -> AsyncIterator[tuple[Replica, Endpoint]]:
    seen = Replica()
    seen.admission = Admission(Credentials.new("group", 5), members, accepts, seen.on_message, seen.on_closed)
    async with listening(seen.admission, **network) as endpoint:
        try:
            yield seen, endpoint
        finally:
            for connection in seen.admission.connections.values():
                connection.close()


def raw_socket(endpoint: Endpoint) -> socket.socket:
    """Connected, blocking, and silent so far."""
    if endpoint.path is not None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(endpoint.path)
        return sock
    return socket.create_connection((endpoint.host, endpoint.port))


async def is_closed_within(sock: socket.socket, timeout_s: float) -> bool:
    """Whether the other side closes in time; what it sends before is read."""
    sock.settimeout(timeout_s)

    def read_to_the_end() -> bool:
        try:
            while sock.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    return await asyncio.to_thread(read_to_the_end)

"""Where a replica listens: a Unix socket on its own node, TCP for members on other nodes."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field

from max_ray.errors import TransportError
from max_ray.transport.handshake import Credentials

_KEEPALIVE_S = 30
_LOST_AFTER_MS = 60_000


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of this node, as Ray's own TLS has them."""

    certificate: str
    key: str
    ca_certificate: str

    def server_context(self) -> ssl.SSLContext:
        """For the side that listens; the peer must show a certificate of the same authority."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca_certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        return self._loaded(context)

    def client_context(self) -> ssl.SSLContext:
        """For the side that connects. Nodes are named by address, so the authority is checked and no host name."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca_certificate)
        context.check_hostname = False
        return self._loaded(context)

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True)
class Endpoint:
    """What a member needs to connect; Ray hands it over.

    Args:
        path: The Unix socket; None for TCP.
        host: Address of the replica's node, as the member reaches it; "" for a Unix socket.
        port: TCP port; 0 for a Unix socket.
        credentials: Of this epoch.
        uses_tls: Whether the TCP connection is TLS.
    """

    path: str | None
    host: str
    port: int
    credentials: Credentials = field(repr=False)
    uses_tls: bool = False

    @property
    def place(self) -> str:
        """For messages."""
        return self.path or f"{self.host}:{self.port}"


def address_towards(peer: str) -> str:
    """This machine's own address on the way to `peer`, by the routing table; nothing is sent. Raises TransportError."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(f"This machine has no route to {peer}: {error}.") from error


def bound_socket(host: str, port_range: tuple[int, int] | None) -> socket.socket:
    """A TCP socket on `host`, on the first free port of the range; on any free port without a range.

    Raises TransportError when no port is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first, last = port_range or (0, 0)
    for port in range(first, last + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(128)
        except OSError:
            sock.close()
            continue
        return sock
    ports = f"{first} to {last} (worker_port_range)" if port_range else "any"
    raise TransportError(f"No TCP port is free on {host}: {ports}.")


def tune(sock: socket.socket) -> None:
    """No delay for small frames; a peer whose machine has gone is found out within a minute and a half."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_AFTER_MS)

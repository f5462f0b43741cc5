"""The processes of a server on this machine, found from the TCP port of its API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from max_ray.errors import ConfigError

KINDS = {
    "worker": "ray::ModelWorker",
    "kv_manager": "ray::KVManagerActor",
    "registry": "ray::RegistryActor",
    "stream_journal": "ray::StreamJournalActor",
    "replica": "ray::ServeReplica:",
    "haproxy": "",
}
"""Kind: how the titles of its processes begin. HAProxy is what listens on the API's port."""


@dataclass(frozen=True)
class ServerProcesses:
    """A server's processes.

    Args:
        port: TCP port of its API.
        raylet: Process id of its raylet, below which Ray's actors are.
    """

    port: int
    raylet: int

    @classmethod
    def find(cls, port: int) -> ServerProcesses:
        """Raises ConfigError when no server of this machine, or none of Ray's, listens on the port."""
        for process in _listeners(port):
            for parent in process.parents():
                if parent.name() == "raylet":
                    return cls(port, parent.pid)
        raise ConfigError(
            f"No Ray server of this user listens on port {port} of this machine: chaos needs a local one."
        )

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind, oldest first."""
        if kind == "haproxy":
            return sorted(_listeners(self.port), key=lambda process: process.pid)
        try:
            below = psutil.Process(self.raylet).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        title = KINDS[kind]
        return sorted((p for p in below if _title(p).startswith(title)), key=lambda process: process.pid)


ProcessesOfKind = Callable[[str], list[psutil.Process]]


def _listeners(port: int) -> list[psutil.Process]:
    pids = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
    }
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def _title(process: psutil.Process) -> str:
    """ "" for a process that has ended."""
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""

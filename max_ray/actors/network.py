"""Which node a process is on, and how members of a group reach a replica from another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from max_ray import settings
from max_ray.transport.address import TlsFiles

_util: Any = ray.util  # Ray leaves some of its functions without types


@dataclass(frozen=True)
class NodeAddress:
    """A Ray node.

    Args:
        node_id: Ray's id of it, in hex.
        ip: The address that Ray knows it by.
    """

    node_id: str
    ip: str


def this_node() -> NodeAddress:
    """The node of this process, which is connected to Ray."""
    return NodeAddress(ray.get_runtime_context().get_node_id(), _util.get_node_ip_address())


def tls_files() -> TlsFiles | None:
    """The files of Ray's own TLS, where RAY_USE_TLS is on. Raises ConfigError when one is not named."""
    paths = settings.ray_tls_paths()
    return None if paths is None else TlsFiles(*paths)

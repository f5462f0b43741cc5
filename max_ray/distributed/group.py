"""TPGroup: the tensor-parallel group as an argument: rank, size, device, and the transport between the ranks.

The transport (NCCL between GPUs, gloo between CPUs) is made directly rather than through PyTorch's process-wide default
group, so nothing global is set: a process may hold several groups, and a test may run two ranks as two threads.

Listening sockets: the key-value store of a `tcp://host:port` rendezvous listens on `host` alone, and gloo on the
address from which this machine reaches `host`: a group on 127.0.0.1 is reachable from this machine only. `file://`
uses loopback.
"""

from __future__ import annotations

import atexit
import socket
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from max_ray.distributed.nccl import check_nccl
from max_ray.errors import ConfigError, WorkerGroupError

DEFAULT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class TPGroup:
    """One rank's view of its group. `process_group`: the transport (a torch.distributed backend), None for one rank.
    `control_group`: another one for words of control, so that between GPUs they do not share a communicator with the
    collectives of captured graphs; None: there is one for both.

    A group with size > 1 and no transport describes a cut only: layers can be built and loaded with it, not run.
    """

    rank: int
    size: int
    device: torch.device
    process_group: Any = None
    control_group: Any = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> TPGroup:
        """The group of one rank, which needs no transport."""
        return cls(rank=0, size=1, device=torch.device(device))

    def destroy(self) -> None:
        """Closes the transport; the group must not be used afterwards. Collectives under way fail with NCCL; gloo waits
        for them, at most their timeout.

        Done by itself when the process exits normally: gloo's threads free tensors, for which they take the
        interpreter's lock, and a thread that wants it once the interpreter is being taken down aborts the process.
        """
        self.abort()
        object.__setattr__(self, "process_group", None)
        object.__setattr__(self, "control_group", None)

    def abort(self) -> None:
        """Ends the collectives under way, as far as `destroy` does; from any thread."""
        for group in (self.process_group, self.control_group):
            if group is not None:
                group.abort()


def init_tp_group(
    rank: int,
    size: int,
    init_method: str,
    device: torch.device,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> TPGroup:
    """Joins the group; blocks until all `size` ranks have come, at most `timeout_s`, also the limit of a collective.

    init_method: `tcp://host:port`, where rank 0 listens, `host` an address of its machine that all ranks reach (not a
    name that means loopback there); or `file:///path`, new to this group, for ranks on one machine.
    Raises WorkerGroupError when the ranks do not meet, ConfigError for another kind of init_method.
    """
    if size == 1:
        return TPGroup(rank=rank, size=1, device=device)
    timeout = timedelta(seconds=timeout_s)
    try:
        store, address = _rendezvous(rank, size, init_method, timeout)
        transport = _transport(PrefixStore("tp", store), rank, size, device, address, timeout)
        _meet(transport, device)
        control = None
        if device.type == "cuda":
            control = _transport(PrefixStore("control", store), rank, size, device, address, timeout)
            _meet(control, device)
    except (RuntimeError, OSError) as error:
        raise WorkerGroupError(
            f"Rank {rank} could not join its tensor-parallel group of {size} at {init_method} within {timeout_s:g} s: "
            f"{error}"
        ) from error
    group = TPGroup(rank, size, device, transport, control)
    atexit.register(_destroy_at_exit, weakref.ref(group))
    return group


def _destroy_at_exit(reference: weakref.ref[TPGroup]) -> None:
    group = reference()
    if group is not None:
        group.destroy()


def _rendezvous(rank: int, size: int, init_method: str, timeout: timedelta) -> tuple[Store, str]:
    """The store in which the ranks find each other, and this machine's address towards them."""
    url = urlparse(init_method)
    if url.scheme == "file":
        store = FileStore(url.path, size)
        store.set_timeout(timeout)
        return store, "127.0.0.1"
    if url.scheme != "tcp" or url.hostname is None or url.port is None:
        raise ConfigError(f"init_method must look like tcp://host:port or file:///path, not {init_method!r}.")
    listener = _listen(url.hostname, url.port, backlog=2 * size) if rank == 0 else None
    return (
        TCPStore(
            url.hostname,
            url.port,
            size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        ),
        _local_address(url.hostname, url.port),
    )


def _listen(host: str, port: int, backlog: int) -> int:
    """A listening socket on `host` only (the store by itself would listen on all interfaces); the store closes it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener.detach()


def _local_address(host: str, port: int) -> str:
    """The address of this machine from which it reaches `host`. A datagram socket connects without sending."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _transport(store: Store, rank: int, size: int, device: torch.device, address: str, timeout: timedelta) -> Any:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        check_nccl()
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _meet(transport: Any, device: torch.device) -> None:
    """One collective, so that a rank that cannot be reached shows now and not in the first request."""
    one = torch.ones(1, device=device)
    transport.allreduce([one]).wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

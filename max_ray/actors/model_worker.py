"""ModelWorker: one rank of a worker group: one shard of the weights, the KV tensors, the sampler.

It holds nothing that a context cannot rebuild. Runs come on a connection to the replica, which the worker opens in
`serve` and stays in. Control calls (locate, renew, adopt, describe) come through a concurrency group of their own, so
they are served in the middle of a run.
"""

from __future__ import annotations

import os
import socket
import threading

import ray

from max_ray.actors.lease import LOOK_S, Lease, watch
from max_ray.actors.messages import Membership, MemberStatus
from max_ray.actors.network import NodeAddress, this_node, tls_files
from max_ray.actors.placement import remove_group_placement
from max_ray.actors.scheduling_delay import SchedulingDelay
from max_ray.errors import StaleLeaseError, WorkerGroupError
from max_ray.interfaces import Runner, RunRequest
from max_ray.log import get_logger, setup_logging
from max_ray.transport.address import Endpoint
from max_ray.transport.worker_connection import WorkerConnection

_LOG = get_logger(__name__)


class ModelWorker:
    """The plain class; `spawn.spawn_worker` makes a Ray actor of it.

    `_stop_through`: runs with this id and older ones end at their next step boundary.
    `_idle` is set while no run is in progress.
    """

    def __init__(self, membership: Membership) -> None:
        assert membership.rank is not None, "a worker has a rank"
        self._membership = membership
        self._rank = membership.rank
        spec = membership.spec
        setup_logging(rank=self._rank, world_size=spec.size)
        self._runner: Runner | None = None
        self._durations: dict[str, float] = {}
        self._healthy = True
        self._stop_through = 0
        self._delay = SchedulingDelay()
        self._computing_thread = threading.get_native_id()
        self._idle = threading.Event()
        self._idle.set()
        self._lease = Lease(membership.epoch, membership.owner_id, spec.lease_grace_s, spec.start_timeout_s)
        watch(self._lease, lambda: remove_group_placement(membership.placement_group_id), what=membership.name)

    def reserve_address(self) -> str:
        """A free loopback address for the group's rendezvous; all ranks of a group are on one node."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def setup(self, init_method: str | None) -> int:
        """Joins the group, loads this rank's shard; gives its number of KV blocks. Minutes for a large model."""
        import torch

        from max_ray.distributed.group import init_tp_group
        from max_ray.pipelines.factory import build_runner, plan_device

        spec = self._membership.spec
        plan = spec.plan
        torch.set_num_threads(plan.num_threads)  # Ray sets OMP_NUM_THREADS=1 for small actors
        group = init_tp_group(self._rank, spec.size, init_method or "", plan_device(plan), spec.collective_timeout_s)
        self._runner = build_runner(plan, group, self._durations)
        return self._runner.num_blocks

    def serve(self, endpoint: Endpoint, epoch: int) -> None:
        """Connects to the replica and takes its runs until it closes. Raises StaleLeaseError when the lease passes on,
        TransportError when the replica cannot be reached or breaks the protocol."""
        self._lease.check(epoch)
        self._computing_thread = threading.get_native_id()
        connection = WorkerConnection.connect(endpoint, self._rank, self._stop, tls_files())
        try:
            while not connection.is_closed:
                self._lease.check(epoch)
                request = connection.next_run(LOOK_S)
                if request is not None:
                    self._run(request, epoch, connection)
        except Exception as error:
            connection.send_error(error)
            raise
        finally:
            connection.close()

    @ray.method(concurrency_group="control")
    def locate(self, epoch: int) -> NodeAddress:
        """The node of this worker. Raises StaleLeaseError for an older owner, whose `serve` would wait behind the
        present one's."""
        self._lease.check(epoch)
        return this_node()

    @ray.method(concurrency_group="control")
    def renew(self, owner_id: str) -> None:
        """Raises StaleLeaseError for another than the present owner."""
        self._lease.renew(owner_id)

    @ray.method(concurrency_group="control")
    def adopt(self, epoch: int, owner_id: str) -> None:
        """A new owner: ends the old one's run and waits for its end.

        Raises WorkerGroupError when the run does not end within the collective timeout, or within half of the grace
        period, for which other members may have to wait.
        """
        spec = self._membership.spec
        self._lease.pass_to(epoch, owner_id)
        if not self._idle.wait(min(spec.collective_timeout_s, spec.lease_grace_s / 2)):
            raise WorkerGroupError(f"The run of the former owner of {self._membership.name} does not end.")
        self._stop_through = 0

    @ray.method(concurrency_group="control")
    def scheduling_delay(self) -> float:
        """Seconds for which this rank's computation has waited for a processor. Asked in the middle of long steps."""
        return self._delay.read(self._computing_thread)

    @ray.method(concurrency_group="control")
    def startup_phases(self) -> dict[str, float]:
        """Seconds of each phase of `setup`."""
        return dict(self._durations)

    @ray.method(concurrency_group="control")
    def describe(self) -> MemberStatus:
        lease = self._lease
        healthy = self._healthy and self._runner is not None
        num_blocks = 0 if self._runner is None else self._runner.num_blocks
        return MemberStatus(
            self._membership, lease.epoch, lease.owner_id, healthy, lease.age_s, os.getpid(), num_blocks
        )

    @property
    def _loaded(self) -> Runner:
        assert self._runner is not None, "a worker was used before setup() ended"
        return self._runner

    def _stop(self, run_id: int) -> None:
        self._stop_through = max(self._stop_through, run_id)

    def _run(self, request: RunRequest, epoch: int, connection: WorkerConnection) -> None:
        """Runs that arrive meanwhile wait, interrupts do not. A replica that has gone reads no more steps."""

        def should_stop() -> bool:
            connection.look()
            return connection.is_closed or self._should_stop(request.run_id, epoch)

        self._idle.clear()
        try:
            self._lease.check(epoch)
            for output in self._loaded.run(request, should_stop, connection):
                if self._rank == 0:
                    connection.send_step(request.run_id, output)
        except StaleLeaseError:
            raise
        except BaseException:
            self._healthy = False  # the ranks may be at different steps now: this group needs new workers
            raise
        finally:
            self._idle.set()

    def _should_stop(self, run_id: int, epoch: int) -> bool:
        return run_id <= self._stop_through or self._lease.epoch != epoch or self._lease.is_expired

"""MemberConnections: what a replica's connections to workers and to the KV manager have in common.

The replica listens, and asks the members by a Ray call to connect. Each member then sits in that call for as long as
its connection is open, so the end of the call tells of its death or of its error.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Coroutine, Mapping
from typing import Any

from max_ray.actors.messages import ActorHandle, GroupInfo
from max_ray.actors.network import NodeAddress, this_node, tls_files
from max_ray.actors.ray_errors import answer, outcome
from max_ray.errors import MaxRayError, TransportError, WorkerGroupError
from max_ray.transport.codec import decode_error, encode_number
from max_ray.transport.frames import MessageType
from max_ray.transport.handshake import Credentials, Member
from max_ray.transport.listener import Admission, ReplicaConnection, listening

TICK_S = 1.0
"""How often connections and clocks are looked at."""
IDLE_TICKS = 10
"""A connection that has been idle for so many ticks is pinged at each of the next ones."""
SILENT_PINGS = 30
"""A member that answers none of so many pings, nor any for as long as a step may take, counts as unreachable.

Ticks, not seconds: when this process gets no time, none pass.
"""
_TELL_S = 5.0
"""How long an actor's call may take to tell why its connection was closed."""


class MemberConnections(ABC):
    """Open connections to some members of a group, on one event loop. Subclasses say what the messages mean.

    After a member's failure `error` is set: WorkerGroupError, or StaleLeaseError when the lease has passed on.
    """

    def __init__(self, info: GroupInfo) -> None:
        self.error: MaxRayError | None = None
        self._info = info
        self._admission: Admission | None = None
        self._watch: asyncio.Task[None] | None = None
        self._connections: list[ReplicaConnection] = []  # by rank
        self._idle_ticks: dict[ReplicaConnection, int] = {}

    @property
    def is_open(self) -> bool:
        return self.error is None

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether members may be too busy to answer a ping."""

    async def open(self, members: Mapping[Member, ActorHandle], accepts: Collection[MessageType]) -> None:
        """Asks the members to connect, and waits until all have.

        Args:
            members: Each member's actor, by rank.
            accepts: Types of messages that they may send.

        Raises WorkerGroupError or StaleLeaseError, and closes what was opened.
        """
        places = await asyncio.gather(*[answer(actor.locate.remote(self._info.epoch)) for actor in members.values()])
        credentials = Credentials.new(self._info.group_id, self._info.epoch)
        admission = Admission(credentials, list(members), accepts, self._on_message, self._on_closed)
        self._admission = admission
        peer = _address_from_here(places)
        ports = self._info.spec.worker_port_range
        try:
            async with listening(admission, peer_address=peer, port_range=ports, tls=tls_files()) as endpoint:
                calls = [actor.serve.remote(endpoint, self._info.epoch) for actor in members.values()]
                self._watch = asyncio.create_task(self._watch_over([_started(outcome(call)) for call in calls]))
                await _until_connected(admission.all_connected, self._watch)
        except BaseException:
            self.close()
            raise
        if self.error is not None:
            self.close()
            raise self.error
        self._connections = [admission.connections[member] for member in members]

    def close(self, error: MaxRayError | None = None) -> None:
        """Closes; the members' calls end, and what waits for them raises `error`. Idempotent."""
        self.fail(error or WorkerGroupError("The connection to the worker group was closed."))
        if self._admission is not None:
            for connection in self._admission.connections.values():
                connection.close()

    def fail(self, error: MaxRayError) -> None:
        """The first error is what everything raises from then on."""
        if self.error is None:
            self.error = error
            self.on_failure()

    def send(self, kind: MessageType, payload: bytes, num_members: int | None = None) -> None:
        """To all members, or to the first few of them by rank; not to those that have closed."""
        for connection in self._connections[:num_members]:
            connection.send(kind, payload)

    @abstractmethod
    def on_message(self, kind: int, payload: bytes) -> None:
        """A message that is no error and no pong. Raises TransportError for one that does not fit."""

    @abstractmethod
    def on_failure(self) -> None:
        """`error` has just been set: what waits must be woken."""

    @abstractmethod
    def check_clock(self) -> None:
        """At each tick; may call `fail`."""

    def _on_message(self, connection: ReplicaConnection, kind: int, payload: bytes) -> None:
        self._idle_ticks[connection] = 0
        if kind == MessageType.ERROR:
            self.fail(decode_error(payload))
        elif kind != MessageType.PONG:
            self.on_message(kind, payload)

    def _on_closed(self, connection: ReplicaConnection, error: TransportError | None) -> None:
        """Why it was closed is told by this side, by the member's actor call, or not at all in time."""
        self._idle_ticks.pop(connection, None)
        if error is not None:
            self.fail(error)
        elif self.is_open:
            lost = WorkerGroupError(f"The connection to {connection.member} was lost.")
            asyncio.get_running_loop().call_later(_TELL_S, self.fail, lost)

    async def _watch_over(self, serving: Collection[asyncio.Future[None]]) -> None:
        """Until a member's call ends, for whatever reason, or the connections have failed."""
        done: set[asyncio.Future[None]] = set()
        while not done:
            done, _ = await asyncio.wait(serving, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if not done and self.is_open:
                self.check_clock()
                self._ping_idle()
        errors = [error for call in done if isinstance(error := call.exception(), MaxRayError)]
        self.fail(errors[0] if errors else WorkerGroupError("A member of the group closed its connection."))

    def _ping_idle(self) -> None:
        longest_step_s = self._info.spec.collective_timeout_s + 10  # a run without a reader may still be in one
        most_pings = max(SILENT_PINGS, round(longest_step_s / TICK_S))
        for number, connection in enumerate(self._connections):
            ticks = 0 if self.is_busy else self._idle_ticks.get(connection, 0) + 1
            self._idle_ticks[connection] = ticks
            if ticks > IDLE_TICKS + most_pings:
                self.close(WorkerGroupError(f"{connection.member} answers no ping on its connection."))
                return
            if ticks > IDLE_TICKS:
                connection.send(MessageType.PING, encode_number(number))


def _address_from_here(places: list[NodeAddress]) -> str | None:
    """The address of the members' node, which is one node; None when it is this one."""
    if len({place.node_id for place in places}) > 1:
        raise WorkerGroupError("The members of a worker group are on several nodes.")
    return None if places[0].node_id == this_node().node_id else places[0].ip


def _started(call: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
    """A task whose error need not be asked for: the first of several calls to end says why."""
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


async def _until_connected(connected: asyncio.Event, watch: asyncio.Future[None]) -> None:
    """Until all have connected, or a member's call has ended."""
    waiting = asyncio.create_task(connected.wait())
    either: list[asyncio.Future[Any]] = [waiting, watch]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

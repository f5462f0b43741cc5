"""MemberClient: a replica's use of some members of its group, over a connection that is opened when it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from max_ray.actors.failure import Failure
from max_ray.actors.member_connections import MemberConnections
from max_ray.actors.messages import GroupInfo
from max_ray.errors import MaxRayError

ConnectionT = TypeVar("ConnectionT", bound=MemberConnections)


class MemberClient(ABC, Generic[ConnectionT]):
    """Holds the connection, and what ended the group.

    Args:
        info: The leased group.
    """

    def __init__(self, info: GroupInfo) -> None:
        self._info = info
        self._connection: ConnectionT | None = None
        self._failure = Failure()

    def adopt(self, info: GroupInfo) -> None:
        """Goes on with a rebuilt group, whose cache is empty."""
        self.close()
        self._failure.clear()
        self._info = info

    def fail(self, error: MaxRayError) -> None:
        """The group was found dead, silent or taken: what waits for it, and each call until `adopt`, raises `error`."""
        self._failure.set(error)
        if self._connection is not None:
            self._connection.close(error)

    def close(self) -> None:
        """Closes the connection; the next call opens one again. Idempotent."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @abstractmethod
    async def _connect(self) -> ConnectionT:
        """A new connection. Raises WorkerGroupError, or StaleLeaseError when the lease has passed on."""

    async def _connected(self) -> ConnectionT:
        """The open connection. Raises as `_connect`, and what `fail` was given."""
        connection = self._connection
        if connection is None or not connection.is_open:
            connection = await self._failure.guard(self._reconnect())
        return connection

    async def _reconnect(self) -> ConnectionT:
        self.close()
        self._connection = await self._connect()
        return self._connection

"""The journal of resumable streams as a named actor of the application. It is started by the first such stream."""

from __future__ import annotations

from max_ray.log import setup_logging
from max_ray.serve.api.streams.journal import KeptStream, LocalStreamJournal, Order, StreamNews, StreamStart
from max_ray.serve.application_actor import ActorClient, ApplicationActor


def actor_name(app: str) -> str:
    """The name of an application's journal."""
    return f"{app}:streams"


class StreamJournalActor(ApplicationActor, LocalStreamJournal):
    """The plain class; `ActorStreamJournal` makes a Ray actor of it.

    Args:
        app: The application whose replicas use it.
    """

    def __init__(self, app: str) -> None:
        setup_logging()
        LocalStreamJournal.__init__(self)
        ApplicationActor.__init__(self, app)


class ActorStreamJournal(ActorClient):
    """A replica's way to the journal of its application: a StreamJournal. Raises WorkerGroupError where it does not
    answer.

    Args:
        app: The application.
    """

    def __init__(self, app: str) -> None:
        super().__init__(actor_name(app), "The journal of streams", StreamJournalActor, app)

    async def register(self, replica: str, start: StreamStart) -> None:
        await self._call("register", replica, start)

    async def update(self, replica: str, news: list[StreamNews]) -> dict[str, Order]:
        orders: dict[str, Order] = await self._call("update", replica, news)
        return orders

    async def owner_of(self, stream_id: str) -> str | None:
        owner: str | None = await self._call("owner_of", stream_id)
        return owner

    async def claim(self, replica: str, stream_id: str) -> KeptStream | None:
        kept: KeptStream | None = await self._call("claim", replica, stream_id)
        return kept

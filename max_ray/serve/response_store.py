"""The store of responses as a named actor, so that every replica of an application finds what another one stored.

Where an application may have several replicas, it has the records of their last requests too. It is started by the
first thing that is stored.
"""

from __future__ import annotations

from max_ray.log import setup_logging
from max_ray.serve.api.request_log import LocalSharedRecords, RequestRecord
from max_ray.serve.api.responses.store import LocalResponseStore, StoredResponse
from max_ray.serve.application_actor import ActorClient, ApplicationActor


def actor_name(app: str) -> str:
    """The name of an application's store."""
    return f"{app}:responses"


class ResponseStoreActor(ApplicationActor, LocalResponseStore):
    """The plain class; `ActorResponseStore` makes a Ray actor of it.

    Args:
        app: The application whose replicas use it.
    """

    def __init__(self, app: str) -> None:
        setup_logging()
        LocalResponseStore.__init__(self)
        ApplicationActor.__init__(self, app)
        self._requests = LocalSharedRecords()

    async def put_records(self, records: list[tuple[str, RequestRecord]]) -> None:
        """See SharedRecords."""
        await self._requests.put_records(records)

    async def find_record(self, answer_id: str) -> RequestRecord | None:
        """See SharedRecords."""
        return await self._requests.find_record(answer_id)


class ActorResponseStore(ActorClient):
    """A replica's way to the store of its application. Raises WorkerGroupError where it does not answer.

    Args:
        app: The application.
    """

    def __init__(self, app: str) -> None:
        super().__init__(actor_name(app), "The store of responses", ResponseStoreActor, app)

    async def put(
        self,
        response_id: str,
        response: bytes,
        items: bytes,
        output: bytes,
        parent: str | None,
        is_done: bool,
        owner: str = "",
    ) -> None:
        await self._ask("put", response_id, response, items, output, parent, is_done, owner)

    async def finish(self, response_id: str, response: bytes, output: bytes) -> bool:
        return bool(await self._ask("finish", response_id, response, output))

    async def find(self, response_id: str) -> StoredResponse | None:
        found: StoredResponse | None = await self._ask("find", response_id)
        return found

    async def history(self, response_id: str) -> list[bytes] | None:
        lists: list[bytes] | None = await self._ask("history", response_id)
        return lists

    async def delete(self, response_id: str) -> bool:
        return bool(await self._ask("delete", response_id))

    async def heartbeat(self, response_ids: list[str]) -> list[str]:
        return list(await self._ask("heartbeat", response_ids))

    async def put_records(self, records: list[tuple[str, RequestRecord]]) -> None:
        await self._ask("put_records", records)

    async def find_record(self, answer_id: str) -> RequestRecord | None:
        found: RequestRecord | None = await self._ask("find_record", answer_id)
        return found

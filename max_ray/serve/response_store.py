"""The store of responses as a named actor, so that every replica of an application finds what another one stored.

Where an application may have several replicas, it has the records of their last requests too. It is started by the
first thing that is stored. It is detached, so it ends itself: when the registry has known no
worker group of its application for a minute.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, ActorHandle, RegistryStatus
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.errors import WorkerGroupError
from max_ray.log import get_logger, setup_logging
from max_ray.serve.api.request_log import LocalSharedRecords, RequestRecord
from max_ray.serve.api.responses.store import LocalResponseStore, StoredResponse

_LOG = get_logger(__name__)
LOOK_EVERY_S = 5.0
UNNEEDED_LOOKS = 12
"""So many times in a row there is no group: then the application has ended."""
ANSWER_WITHIN_S = 30.0
_remote: Any = ray.remote


def actor_name(app: str) -> str:
    """The name of an application's store."""
    return f"{app}:responses"


class ResponseStoreActor(LocalResponseStore):
    """The plain class; `ActorResponseStore` makes a Ray actor of it.

    Args:
        app: The application whose replicas use it.
    """

    def __init__(self, app: str) -> None:
        setup_logging()
        super().__init__()
        self._requests = LocalSharedRecords()
        self._app = app
        self._watch: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """To be called once, before anything else."""
        self._watch = self._watch or asyncio.create_task(self._end_with_application())

    async def put_records(self, records: list[tuple[str, RequestRecord]]) -> None:
        """See SharedRecords."""
        await self._requests.put_records(records)

    async def find_record(self, answer_id: str) -> RequestRecord | None:
        """See SharedRecords."""
        return await self._requests.find_record(answer_id)

    async def _end_with_application(self) -> None:
        num_unneeded = 0
        while num_unneeded < UNNEEDED_LOOKS:
            await asyncio.sleep(LOOK_EVERY_S)
            num_unneeded = 0 if await self._is_needed() else num_unneeded + 1
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _is_needed(self) -> bool:
        try:
            registry: Any = await asyncio.to_thread(ray.get_actor, REGISTRY_NAME, NAMESPACE)
            status: RegistryStatus = await registry.status.remote()
        except (ValueError, RayError):  # there is none, or it is being restarted
            return False
        return any(group.app == self._app for group in status.groups)


class ActorResponseStore:
    """A replica's way to the store of its application. Raises WorkerGroupError where it does not answer.

    Args:
        app: The application.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self._handle: ActorHandle | None = None

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

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """The answer. An actor that has died is replaced by a new, empty one."""
        for is_last in (False, True):
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    if self._handle is None:
                        self._handle = await self._started()
                    return await getattr(self._handle, method).remote(*arguments)
            except TimeoutError:
                raise WorkerGroupError("The store of responses does not answer. Try again.") from None
            except RayActorError as error:
                self._handle = None
                if is_last:
                    raise WorkerGroupError("The store of responses has died. Try again.") from error
                _LOG.warning("the store of responses has died (%s): a new one is started", type(error).__name__)
        raise AssertionError("the second try returns or raises")

    async def _started(self) -> ActorHandle:
        options = {
            "name": actor_name(self._app),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "runtime_env": {"env_vars": ORDINARY_PRIORITY},
            "max_concurrency": 1000,
        }
        handle: ActorHandle = await asyncio.to_thread(
            lambda: _remote(ResponseStoreActor).options(**options).remote(self._app)
        )
        await handle.begin.remote()
        return handle

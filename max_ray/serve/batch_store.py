"""Files and batches in a named actor with a folder, so that every replica of an application finds them.

The folder is on the node that the actor runs on; with several nodes it must be one that all of them see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from max_ray.log import setup_logging
from max_ray.serve.api.batches.state import LineKey
from max_ray.serve.api.batches.store import Claims, LocalBatchStore
from max_ray.serve.api.files.directory import FileDirectory
from max_ray.serve.api.objects.files import BatchObject, FileObject
from max_ray.serve.application_actor import ActorClient, ApplicationActor


def actor_name(app: str) -> str:
    """The name of an application's store."""
    return f"{app}:batches"


class BatchStoreActor(ApplicationActor, LocalBatchStore):
    """The plain class; `ActorBatchStore` makes a Ray actor of it.

    Args:
        app: The application whose replicas use it.
        folder: The folder of the files.
        max_bytes: Of all files together.
    """

    def __init__(self, app: str, folder: str, max_bytes: int) -> None:
        setup_logging()
        LocalBatchStore.__init__(self, FileDirectory(Path(folder), max_bytes=max_bytes))
        ApplicationActor.__init__(self, app)
        self._opening: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Takes up what lies in the folder. Calls wait until that is done."""
        await super().begin()
        self._opening = self._opening or asyncio.create_task(self.open())
        await asyncio.shield(self._opening)


class ActorBatchStore(ActorClient):
    """A replica's way to the store of its application. Raises WorkerGroupError where it does not answer.

    Args:
        app: The application.
        folder: The folder of the files.
        max_bytes: Of all files together.
    """

    def __init__(self, app: str, folder: str, max_bytes: int) -> None:
        super().__init__(actor_name(app), "The store of files", BatchStoreActor, app, folder, max_bytes)

    async def begin_upload(self, filename: str) -> str:
        return str(await self._call("begin_upload", filename))

    async def append_upload(self, file_id: str, data: bytes) -> None:
        await self._call("append_upload", file_id, data)

    async def complete_upload(self, file_id: str, purpose: str, expires_after_s: int | None) -> FileObject:
        file: FileObject = await self._call("complete_upload", file_id, purpose, expires_after_s)
        return file

    async def abort_upload(self, file_id: str) -> None:
        await self._call("abort_upload", file_id)

    async def files(self) -> list[FileObject]:
        return list(await self._call("files"))

    async def find_file(self, file_id: str) -> FileObject:
        file: FileObject = await self._call("find_file", file_id)
        return file

    async def read_file(self, file_id: str, offset: int, size: int) -> bytes:
        return bytes(await self._call("read_file", file_id, offset, size))

    async def delete_file(self, file_id: str) -> None:
        await self._call("delete_file", file_id)

    async def create_batch(
        self, endpoint: str, input_file_id: str, metadata: dict[str, str] | None, output_expires_after_s: int | None
    ) -> BatchObject:
        arguments = (endpoint, input_file_id, metadata, output_expires_after_s)
        batch: BatchObject = await self._call("create_batch", *arguments)
        return batch

    async def batches(self) -> list[BatchObject]:
        return list(await self._call("batches"))

    async def find_batch(self, batch_id: str) -> BatchObject:
        batch: BatchObject = await self._call("find_batch", batch_id)
        return batch

    async def cancel_batch(self, batch_id: str) -> BatchObject:
        batch: BatchObject = await self._call("cancel_batch", batch_id)
        return batch

    async def claim(self, runner: str, most: int, running: Sequence[LineKey]) -> Claims:
        claims: Claims = await self._call("claim", runner, most, list(running))
        return claims

    async def finish(self, runner: str, key: LineKey, is_success: bool, result: bytes) -> bool:
        return bool(await self._call("finish", runner, key, is_success, result))

    async def give_back(self, runner: str) -> None:
        await self._call("give_back", runner)

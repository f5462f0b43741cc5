"""Files and batches of an application: the contract, and a store over a folder.

A server keeps them in an actor that every replica reaches (`max_ray.serve.batch_store`), which has the same class
inside. Replicas run the lines: each asks for lines and says at the same time which ones it is running.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from max_ray.errors import InputError, quoted
from max_ray.serve.api.batches.lines import LineRequest, index_lines, parse_line
from max_ray.serve.api.batches.state import BatchRecord, LineKey, OpenBatch, save
from max_ray.serve.api.files.directory import FileDirectory, FileMissingError, new_id, read_all
from max_ray.serve.api.objects.files import BatchObject, BatchStatus, FileObject

logger = logging.getLogger(__name__)
WINDOW_S = 24 * 3600
_ENDS: tuple[BatchStatus, ...] = ("failed", "expired", "cancelled", "completed")
MAX_BATCHES = 10_000
"""Batches that are kept; of ended ones the oldest go first."""
MAX_OPEN = 100
"""Batches that have not ended."""
RESUME_AFTER_S = 3.0


class BatchMissingError(InputError):
    """No such batch is kept."""

    http_status = 404


@dataclass(frozen=True)
class ClaimedLine:
    """A line to run.

    Args:
        batch_id: Its batch.
        number: Of the line, from 0.
        endpoint: The route.
        text: The line.
    """

    batch_id: str
    number: int
    endpoint: str
    text: bytes

    @property
    def key(self) -> LineKey:
        """Names the line."""
        return self.batch_id, self.number

    @cached_property
    def request(self) -> LineRequest:
        """The request in it. The file was checked before."""
        return parse_line(self.text, self.endpoint)


@dataclass(frozen=True)
class Claims:
    """lines: to run. unwanted: lines that the runner should end."""

    lines: list[ClaimedLine]
    unwanted: list[LineKey]


class BatchStore(Protocol):
    """Keeps files and batches. Every method may raise WorkerGroupError where the store is elsewhere and is silent."""

    async def begin_upload(self, filename: str) -> str:
        """Begins a file and gives its id. Raises StorageFullError."""

    async def append_upload(self, file_id: str, data: bytes) -> None:
        """Adds a piece. Raises StorageFullError, FileMissingError."""

    async def complete_upload(self, file_id: str, purpose: str, expires_after_s: int | None) -> FileObject:
        """The object of a complete file. Raises FileMissingError."""

    async def abort_upload(self, file_id: str) -> None:
        """Forgets an upload. Unknown ids are fine."""

    async def files(self) -> list[FileObject]:
        """The objects of all files, the oldest first."""

    async def find_file(self, file_id: str) -> FileObject:
        """A file's object. Raises FileMissingError."""

    async def read_file(self, file_id: str, offset: int, size: int) -> bytes:
        """A piece of a file. Raises FileMissingError."""

    async def delete_file(self, file_id: str) -> None:
        """Removes a file. Raises FileMissingError, and InputError for one that a batch is reading."""

    async def create_batch(
        self, endpoint: str, input_file_id: str, metadata: dict[str, str] | None, output_expires_after_s: int | None
    ) -> BatchObject:
        """Begins a batch: its object. Raises FileMissingError, StorageFullError, InputError."""

    async def batches(self) -> list[BatchObject]:
        """The objects of all batches, the newest first."""

    async def find_batch(self, batch_id: str) -> BatchObject:
        """A batch's object. Raises BatchMissingError."""

    async def cancel_batch(self, batch_id: str) -> BatchObject:
        """Ends a batch; results so far stay. Raises BatchMissingError, and InputError for one that has ended."""

    async def claim(self, runner: str, most: int, running: Sequence[LineKey]) -> Claims:
        """Lines for a runner.

        Args:
            runner: Names the runner.
            most: How many it takes.
            running: What it is running; a line of which nothing is heard for 30 s is given to another.
        """

    async def finish(self, runner: str, key: LineKey, is_success: bool, result: bytes) -> bool:
        """Keeps a line's result. Returns False where it is not wanted any more."""

    async def give_back(self, runner: str) -> None:
        """A runner ends: its lines are given to others."""


class LocalBatchStore:
    """The store in this process. Call `open` once before anything else.

    Args:
        files: The folder.
    """

    def __init__(self, files: FileDirectory) -> None:
        self._files = files
        self._records: dict[str, BatchRecord] = {}  # the oldest first
        self._open: dict[str, OpenBatch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Takes up what lies in the folder."""
        records = [BatchRecord(**content) for _, content in read_all(self._files.folder, "batch_*.json")]
        for record in sorted(records, key=lambda one: one.times["created_at"]):
            self._records[record.id] = record
            if record.status == "finalizing":
                self._publish(record)
            elif not record.has_ended:
                self._start(record, self._files.clock() + RESUME_AFTER_S)

    async def close(self) -> None:
        """Ends tasks and closes files. What is in progress is taken up by the next store."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for batch in self._open.values():
            batch.close()
        self._open.clear()
        self._files.close()

    async def begin_upload(self, filename: str) -> str:
        self._tidy()
        return self._files.begin(filename)

    async def append_upload(self, file_id: str, data: bytes) -> None:
        self._files.append(file_id, data)

    async def complete_upload(self, file_id: str, purpose: str, expires_after_s: int | None) -> FileObject:
        return self._files.complete(file_id, purpose, expires_after_s).public()

    async def abort_upload(self, file_id: str) -> None:
        self._files.abort(file_id)

    async def files(self) -> list[FileObject]:
        self._tidy()
        return [file.public() for file in self._files.files()]

    async def find_file(self, file_id: str) -> FileObject:
        self._tidy()
        return self._files.find(file_id).public()

    async def read_file(self, file_id: str, offset: int, size: int) -> bytes:
        return self._files.read(file_id, offset, size)

    async def delete_file(self, file_id: str) -> None:
        self._files.find(file_id)
        if file_id in self._in_use():
            raise InputError("A batch is reading this file: cancel the batch first.", param="file_id")
        self._files.delete(file_id)

    async def create_batch(
        self, endpoint: str, input_file_id: str, metadata: dict[str, str] | None, output_expires_after_s: int | None
    ) -> BatchObject:
        self._tidy()
        file = self._file_of_batch(input_file_id)
        if sum(not record.has_ended for record in self._records.values()) >= MAX_OPEN:
            raise InputError(f"{MAX_OPEN} batches are in progress: wait for one to end, or cancel one.")
        now = int(self._files.clock())
        record = BatchRecord(
            id=new_id("batch_"),
            endpoint=endpoint,
            input_file_id=file,
            status="validating",
            metadata=metadata,
            times={"created_at": now, "expires_at": now + WINDOW_S},
            output_id=new_id("file-"),
            error_id=new_id("file-"),
            output_expires_after_s=output_expires_after_s,
        )
        save(record, self._files.folder)
        self._records[record.id] = record
        self._start(record, 0.0)
        return record.public()

    async def batches(self) -> list[BatchObject]:
        self._tidy()
        return [record.public() for record in reversed(self._records.values())]

    async def find_batch(self, batch_id: str) -> BatchObject:
        self._tidy()
        return self._record(batch_id).public()

    async def cancel_batch(self, batch_id: str) -> BatchObject:
        record = self._record(batch_id)
        if record.has_ended:
            raise InputError(f"This batch cannot be cancelled: its status is {record.status!r}.", param="batch_id")
        self._note(record, "cancelling")
        self._end(record, "cancelled")
        return record.public()

    async def claim(self, runner: str, most: int, running: Sequence[LineKey]) -> Claims:
        self._tidy()
        unwanted = [key for key in running if key[0] not in self._open]
        for batch_id, _ in Counter(batch_id for batch_id, _ in running).items():
            if batch_id in self._open:
                numbers = [number for other, number in running if other == batch_id]
                unwanted += [(batch_id, number) for number in self._open[batch_id].hear(runner, numbers)]
        lines: list[ClaimedLine] = []
        for batch_id, batch in self._open.items():
            claimed = batch.claim(runner, most - len(lines))
            lines += [ClaimedLine(batch_id, number, batch.record.endpoint, text) for number, text in claimed]
        return Claims(lines, unwanted)

    async def finish(self, runner: str, key: LineKey, is_success: bool, result: bytes) -> bool:
        batch = self._open.get(key[0])
        if batch is None:
            return False
        record = batch.record
        if not self._files.has_room(len(result)):
            self._fail(record, "storage_full", "There is no room for more results: delete files, and send the rest.")
            return False
        try:
            is_new = batch.finish(key[1], is_success, result)
        except OSError as error:
            logger.error("a result of %s was not written: %s", record.id, error)
            self._fail(record, "storage_failed", "A result could not be written to files_dir.")
            return False
        if batch.is_done:
            self._end(record, "completed")
        return is_new

    async def give_back(self, runner: str) -> None:
        for batch in self._open.values():
            batch.give_back(runner)

    def _start(self, record: BatchRecord, resumes_at: float) -> None:
        task = asyncio.create_task(self._opened(record, resumes_at))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _opened(self, record: BatchRecord, resumes_at: float) -> None:
        """Reads the input file; then the batch is in progress, or has failed."""
        try:
            index = await asyncio.to_thread(index_lines, self._files.path(record.input_file_id), record.endpoint)
        except (FileMissingError, OSError) as error:
            logger.error("the input of %s cannot be read: %s", record.id, error)
            return self._fail(record, "input_missing", "The input file is not there any more.")
        if record.has_ended:  # cancelled, or expired
            return
        if index.problems:
            record.errors = index.problems
            return self._end(record, "failed")
        batch = self._open[record.id] = OpenBatch(record, self._files, index, resumes_at)
        if record.status == "validating":
            self._note(record, "in_progress")
        if batch.is_done:
            self._end(record, "completed")

    def _fail(self, record: BatchRecord, code: str, message: str) -> None:
        record.errors = [{"code": code, "message": message, "param": None, "line": None}]
        self._end(record, "failed")

    def _end(self, record: BatchRecord, status: BatchStatus) -> None:
        """Ends a batch: its results become files."""
        batch = self._open.pop(record.id, None)
        if batch is not None:
            if status == "expired":
                batch.expire_lines()
            batch.close()
        record.times["finalizing_at"] = int(self._files.clock())
        record.times[f"{status}_at"] = record.times["finalizing_at"]
        self._note(record, "finalizing")
        self._publish(record)

    def _publish(self, record: BatchRecord) -> None:
        """The second half of `_end`, which can be repeated after a death in the middle."""
        folder = self._files.folder
        status = next(name for name in _ENDS if f"{name}_at" in record.times)
        for kind, file_id in (("output", record.output_id), ("errors", record.error_id)):
            path = folder / f"{record.id}.{kind}"
            if path.exists() and not path.stat().st_size:
                path.unlink()
            if path.exists() or (folder / f"{file_id}.data").exists():
                name = f"{record.id}_{'output' if kind == 'output' else 'error'}.jsonl"
                self._files.adopt(path, file_id, name, "batch_output", record.output_expires_after_s)
                setattr(record, "output_file_id" if kind == "output" else "error_file_id", file_id)
        record.status = status
        save(record, folder)

    def _note(self, record: BatchRecord, status: BatchStatus) -> None:
        record.status = status
        record.times.setdefault(f"{status}_at", int(self._files.clock()))
        save(record, self._files.folder)

    def _tidy(self) -> None:
        """Ends what has expired, and forgets the oldest of too many."""
        now = self._files.clock()
        for record in list(self._records.values()):
            if not record.has_ended and record.times["expires_at"] <= now:
                self._end(record, "expired")
        self._files.purge(self._in_use())
        ended = [record.id for record in self._records.values() if record.has_ended]
        for batch_id in ended[: max(0, len(self._records) - MAX_BATCHES)]:
            (self._files.folder / f"{batch_id}.json").unlink(missing_ok=True)
            del self._records[batch_id]

    def _in_use(self) -> set[str]:
        return {record.input_file_id for record in self._records.values() if not record.has_ended}

    def _record(self, batch_id: str) -> BatchRecord:
        if batch_id not in self._records:
            raise BatchMissingError(f"There is no batch {quoted(batch_id)}.", param="batch_id")
        return self._records[batch_id]

    def _file_of_batch(self, file_id: str) -> str:
        try:
            file = self._files.find(file_id)
        except FileMissingError as error:
            raise InputError(str(error), param="input_file_id") from None
        if file.purpose != "batch":
            raise InputError(
                f"The file's purpose is {file.purpose!r}: upload one of the purpose 'batch'.", param="input_file_id"
            )
        return file.id

"""One batch: its object, which of its lines wait, run or are done, and its results on disk.

    batch_ID.json          the object, written anew at each change of its status
    batch_ID.output        results so far; becomes the output file
    batch_ID.errors        the same of requests that failed

Results are appended before a line counts as done, and read again by the process that opens the batch after a death: a
line that has a result is not run again.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from max_ray.serve.api.batches.lines import LineIndex, error_line
from max_ray.serve.api.files.directory import FileDirectory, write_json
from max_ray.serve.api.objects.files import BatchCounts, BatchObject, BatchProblem, BatchStatus

DEAD_AFTER_S = 30.0
"""A runner of which nothing was heard for so long has died: others run its lines."""


def _no_lines() -> BatchCounts:
    return {"total": 0, "completed": 0, "failed": 0}


ENDED = ("completed", "failed", "expired", "cancelled")
LineKey = tuple[str, int]
"""A batch's id and the number of one of its lines, from 0."""


@dataclass
class BatchRecord:
    """What is kept of a batch, besides its results.

    Args:
        id: Its id, `batch_...`.
        endpoint: The route of its lines.
        input_file_id: Its input file.
        status: As of OpenAI's batch object.
        metadata: The client's labels.
        times: Unix times by OpenAI's names: `created_at`, `expires_at`, `in_progress_at` and so on.
        output_id: The id that its output file will have.
        error_id: The same of its error file.
        output_expires_after_s: Seconds until these two are removed; None: they stay.
        errors: What is wrong with the input file.
        counts: Lines: `total`, `completed`, `failed`.
        output_file_id: Once the file is there.
        error_file_id: Once the file is there.
    """

    id: str
    endpoint: str
    input_file_id: str
    status: BatchStatus
    metadata: dict[str, str] | None
    times: dict[str, int]
    output_id: str
    error_id: str
    output_expires_after_s: int | None = None
    errors: list[BatchProblem] = field(default_factory=list)
    counts: BatchCounts = field(default_factory=_no_lines)
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.status in ENDED

    def public(self) -> BatchObject:
        """OpenAI's batch object."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.times["created_at"],
            "expires_at": self.times["expires_at"],
            "in_progress_at": self.times.get("in_progress_at"),
            "finalizing_at": self.times.get("finalizing_at"),
            "completed_at": self.times.get("completed_at"),
            "failed_at": self.times.get("failed_at"),
            "expired_at": self.times.get("expired_at"),
            "cancelling_at": self.times.get("cancelling_at"),
            "cancelled_at": self.times.get("cancelled_at"),
            "request_counts": self.counts.copy(),
            "metadata": self.metadata,
        }


class OpenBatch:
    """The lines of a batch that is in progress.

    Args:
        record: Its record; the counts are kept up to date.
        files: The folder.
        index: Its lines.
        resumes_at: When lines may be given out: after a death, runners that go on with theirs say so first.
    """

    def __init__(self, record: BatchRecord, files: FileDirectory, index: LineIndex, resumes_at: float) -> None:
        self.record = record
        self._files = files
        self._offsets: array[int] = index.offsets
        self._custom_ids = index.custom_ids
        self._resumes_at = resumes_at
        self._waiting = OrderedDict.fromkeys(range(len(index.offsets)))
        self._claims: dict[int, tuple[str, float]] = {}
        self._input = files.path(record.input_file_id).open("rb")
        numbers = {custom_id: number for number, custom_id in enumerate(index.custom_ids)}
        done = [self._take_up(path, numbers) for path in (self.output_path, self.error_path)]
        record.counts = {"total": len(numbers), "completed": done[0], "failed": done[1]}
        self._results = [_append_only(path) for path in (self.output_path, self.error_path)]

    @property
    def output_path(self) -> Path:
        """Of the results."""
        return self._files.folder / f"{self.record.id}.output"

    @property
    def error_path(self) -> Path:
        """Of the requests that failed."""
        return self._files.folder / f"{self.record.id}.errors"

    @property
    def is_done(self) -> bool:
        """Whether every line has a result."""
        return not self._waiting and not self._claims

    def hear(self, runner: str, numbers: Iterable[int]) -> list[int]:
        """A runner says which lines it runs. Returns those that it should end: they are done, or run elsewhere."""
        unwanted = []
        for number in numbers:
            if number in self._waiting:
                del self._waiting[number]
            elif self._claims.get(number, ("", 0.0))[0] != runner:
                unwanted.append(number)
                continue
            self._claims[number] = (runner, self._files.clock())
        return unwanted

    def claim(self, runner: str, most: int) -> list[tuple[int, bytes]]:
        """At most so many lines, which are the runner's from now on: (number, line)."""
        now = self._files.clock()
        for number in [n for n, (_, heard_at) in self._claims.items() if heard_at + DEAD_AFTER_S <= now]:
            del self._claims[number]
            self._waiting[number] = None
            self._waiting.move_to_end(number, last=False)
        lines: list[tuple[int, bytes]] = []
        while self._waiting and len(lines) < most and now >= self._resumes_at:
            number, _ = self._waiting.popitem(last=False)
            self._claims[number] = (runner, now)
            self._input.seek(self._offsets[number])
            lines.append((number, self._input.readline()))
        return lines

    def give_back(self, runner: str) -> None:
        """A runner ends: others run its lines."""
        for number in [n for n, (owner, _) in self._claims.items() if owner == runner]:
            del self._claims[number]
            self._waiting[number] = None
            self._waiting.move_to_end(number, last=False)

    def finish(self, number: int, is_success: bool, result: bytes) -> bool:
        """Keeps the result of a line. Returns False where the line has one already. Raises OSError."""
        if number not in self._claims and number not in self._waiting:
            return False
        self._claims.pop(number, None)
        self._waiting.pop(number, None)
        self._write(is_success, result)
        self.record.counts["completed" if is_success else "failed"] += 1
        return True

    def expire_lines(self) -> None:
        """Notes an error for each line that has no result. Raises OSError."""
        for number in sorted([*self._waiting, *self._claims]):
            message = "This request could not be run before the batch expired."
            self._write(False, error_line(self._custom_ids[number], "batch_expired", message))
            self.record.counts["failed"] += 1
        self._waiting.clear()
        self._claims.clear()

    def close(self) -> None:
        """Closes the files."""
        self._input.close()
        for file in self._results:
            os.fsync(file.fileno())
            file.close()
        self._files.extra_bytes -= sum(path.stat().st_size for path in (self.output_path, self.error_path))

    def _write(self, is_success: bool, result: bytes) -> None:
        self._results[0 if is_success else 1].write(result)
        self._files.extra_bytes += len(result)

    def _take_up(self, path: Path, numbers: dict[str, int]) -> int:
        """Counts results that are there already; the last one may be torn, and is cut off."""
        if not path.exists():
            return 0
        num_done, size = 0, 0
        with path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                num_done += 1
                self._waiting.pop(numbers[json.loads(line)["custom_id"]], None)
            file.truncate(size)
        self._files.extra_bytes += size
        return num_done


def save(record: BatchRecord, folder: Path) -> None:
    """Writes a record."""
    write_json(folder / f"{record.id}.json", asdict(record))


def _append_only(path: Path) -> Any:
    """Unbuffered: what is written stays when the process dies."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)

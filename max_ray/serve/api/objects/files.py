"""Answers of the routes of files and batches."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class FileObject(TypedDict):
    """A file."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None
    object: Literal["file"]
    status: Literal["processed"]


class DeletedFile(TypedDict):
    """A file that is no more."""

    id: str
    object: Literal["file"]
    deleted: bool


class BatchProblem(TypedDict):
    """What is wrong with a line of a batch's input, or with all of it."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchProblems(TypedDict):
    """What is wrong with a batch's input."""

    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(TypedDict):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class BatchObject(TypedDict):
    """A batch, with its progress."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None

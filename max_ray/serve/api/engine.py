"""What the HTTP routes need of the thing that generates. The Serve deployment provides one; tests use a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationOutput,
    PipelineTask,
    RequestID,
    TextContext,
    TextGenerationOutput,
)
from max_ray.scheduler import LoopActivity
from max_ray.serve.api.metrics import Metrics, MetricsSnapshot
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.request_log import RequestLog
from max_ray.tokenization.tokenizer import TextTokenizer


class ModelView(Protocol):
    """What can be told of a served model without asking anything that generates."""

    @property
    def task(self) -> PipelineTask: ...

    @property
    def embedding_size(self) -> int | None:
        """Numbers in a vector of the embeddings task; None for another."""

    @property
    def model_name(self) -> str:
        """The name that /v1/models lists."""

    @property
    def model_aliases(self) -> tuple[str, ...]:
        """Other names that requests may give."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def parsers(self) -> ModelParsers:
        """How answers of chats are read."""


class Engine(ModelView, Protocol):
    """One replica's loop with its tokenizer. `submit` is for the task of text generation, `embed` for embeddings."""

    @property
    def metrics(self) -> Metrics:
        """This replica's counters; the routes write to them."""

    @property
    def requests(self) -> RequestLog:
        """The last requests of this replica; the routes write to it."""

    @property
    def num_waiting(self) -> int:
        """Requests in this replica's queue."""

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        """Admits a request at the call and gives its outputs; the last one `is_done`.

        Raises QueueFullError or InsufficientBlocksError at the call. Iterating raises WorkerGroupError when the
        workers are gone for good.
        """

    def embed(self, contexts: Sequence[EmbeddingsContext]) -> Awaitable[list[EmbeddingsGenerationOutput]]:
        """Admits texts at the call and gives their vectors in order; cancelling the wait ends the job.

        Raises QueueFullError at the call. Awaiting raises WorkerGroupError when the workers are gone for good.
        """

    def cancel(self, request_id: RequestID) -> None:
        """Ends a request at the next step boundary and frees its blocks. Unknown or finished ids are fine."""

    async def healthy(self) -> bool:
        """True while the workers answer."""

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        """The numbers of every replica, this one's, which is the first, being of now."""

    @property
    def activity(self) -> LoopActivity:
        """What this replica's loop is doing at this moment."""


@dataclass(frozen=True, slots=True)
class FilesOptions:
    """Settings of files and batches.

    Args:
        folder: Where files are kept.
        max_bytes: Of all files together.
        concurrency: Lines of batches that a replica runs at a time.
    """

    folder: str
    max_bytes: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """Settings of the front.

    api_keys: when there are any, every route but /health wants `Authorization: Bearer KEY`.
    otlp_traces_endpoint: collector that gets a trace of each request; None: there are no traces.
    api_keys_file: file with more of them, by their hashes; None: there is none.
    allowed_hosts: names besides loopback's that the header Host may give ("*": any, "*.x.org": below x.org). None: any
    with keys; without keys only `test`, the name that RFC 6761 keeps free for tests.
    allowed_origins: origins whose web pages may use the API ("*": all), lower-case.
    max_body_bytes: a longer request body is a 413. max_body_bytes_with_images: the same for chats of a model that sees
    images, which may come as data: URLs.
    shares_records: whether requests of other replicas can be asked about.
    body_timeout_s: a client that takes longer to send its body gets a 408; large bodies have more time.
    files: None: the server keeps no files and runs no batches.
    resume_grace_s: seconds that a resumable stream outlives its connection; 0: no stream can be resumed.
    """

    api_keys: tuple[str, ...] = ()
    api_keys_file: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    max_body_bytes_with_images: int = 48 * 1024 * 1024
    body_timeout_s: float = 30.0
    shares_records: bool = False
    resume_grace_s: float = 15.0

    @property
    def has_keys(self) -> bool:
        """Whether clients need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    files: FilesOptions | None = None
    otlp_traces_endpoint: str | None = None

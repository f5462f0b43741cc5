"""ReplicaEngine: what one ingress replica runs: tokenizer, pipeline, generation loop, and the lease of its group.

Implements the Engine that the HTTP routes need. The group's lease is renewed on a thread of its own; what is found out
there goes to the loop, the only one that brings workers back. A task exchanges metrics with the sibling replicas by way
of the registry.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace

from max_ray.actors.leased_group import LeasedGroup
from max_ray.actors.messages import GroupSpec
from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationOutput,
    KVCacheClient,
    PipelineTask,
    RequestID,
    TextContext,
    TextGenerationOutput,
)
from max_ray.log import get_logger
from max_ray.pipelines.embeddings import EmbeddingsPipeline
from max_ray.pipelines.factory import build_tokenizer
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.planning.plan import PipelinePlan
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.scheduler import EmbeddingsLoop, GenerationLoop, LoopActivity, SchedulerLimits
from max_ray.serve.api.metrics import TEXT_ROUTES, GroupView, Metrics, MetricsSnapshot
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.request_log import RequestLog, SharedRecords
from max_ray.serve.api.structured_output_fields import start_checker
from max_ray.serve.ray_metrics import RayMetrics
from max_ray.tokenization.tokenizer import TextTokenizer

_LOG = get_logger(__name__)
_EXCHANGE_EVERY_S = 1.0
_SILENT_FOR_S = 10.0
"""A member that has not answered for so long makes the replica unhealthy; it may only be slow."""


@dataclass(frozen=True)
class ReplicaIdentity:
    """rank: Serve's rank of the replica, which a successor inherits. owner_id: this very process."""

    rank: int
    owner_id: str


@dataclass(frozen=True)
class QueueLimits:
    """What may wait in a replica.

    Args:
        max_requests: Requests, beyond those for which the batch has room.
        max_tokens: Prompt tokens; None: no limit.
    """

    max_requests: int
    max_tokens: int | None = None


class ReplicaEngine:
    """Made by `start`; ended by `close`.

    Attributes:
        address: URL of the replica's own HTTP server, where a front finds it by its metrics; "" without.
    """

    def __init__(self, tokenizer: TextTokenizer, group: LeasedGroup, limits: SchedulerLimits, owner_id: str) -> None:
        plan = group.info.spec.plan
        self._group = group
        self._owner_id = owner_id
        self._tokenizer = tokenizer
        self._parsers = parsers_of(tokenizer, plan)
        self._metrics = Metrics(plan.config.served_model_name, owner_id, () if plan.is_pooled else TEXT_ROUTES)
        self._requests = RequestLog(owner_id)
        self._plan = plan
        self._loop: GenerationLoop | EmbeddingsLoop
        if plan.is_pooled:
            pipeline = EmbeddingsPipeline(group.executor, limits.max_batch_size, limits.max_batch_input_tokens)
            self._loop = EmbeddingsLoop(pipeline, limits, self._recover)
        else:
            self._loop = GenerationLoop(TextGenerationPipeline(group.executor), group.kv_cache, limits, self._recover)
        self.address = ""
        self._is_superseded = False
        self._siblings: dict[str, bytes] = {}
        self._tasks = [asyncio.create_task(self._loop.run()), asyncio.create_task(self._exchange_metrics())]
        group.keep(self._on_failure)

    @classmethod
    async def start(cls, spec: GroupSpec, queue: QueueLimits, identity: ReplicaIdentity) -> ReplicaEngine:
        """Leases a group and makes the tokenizer meanwhile. Raises what loading raises."""
        PIPELINE_REGISTRY.register_packed(spec.plan.custom_code)
        acquiring = asyncio.create_task(LeasedGroup.acquire(spec, identity.rank, identity.owner_id))
        tokenizer = await asyncio.to_thread(_ready_tokenizer, spec.plan)
        group = await acquiring
        return cls(tokenizer, group, _limits(spec, queue), identity.owner_id)

    @property
    def model_name(self) -> str:
        return self._metrics.model_name

    @property
    def model_aliases(self) -> tuple[str, ...]:
        return self._plan.config.served_model_aliases

    @property
    def parsers(self) -> ModelParsers:
        return self._parsers

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    @property
    def requests(self) -> RequestLog:
        return self._requests

    @property
    def num_waiting(self) -> int:
        return self._loop.stats.queued

    @property
    def task(self) -> PipelineTask:
        return self._plan.task

    @property
    def embedding_size(self) -> int | None:
        return self._plan.embedding_size

    @property
    def group(self) -> LeasedGroup:
        return self._group

    @property
    def is_superseded(self) -> bool:
        """True once another replica has this one's group: Serve should replace this replica."""
        return self._is_superseded

    def share_records(self, records: SharedRecords) -> None:
        """Tells other replicas of the requests that ended here, once a second."""
        self._tasks.append(asyncio.create_task(self._share_records(records)))

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        """Admits a request. Raises QueueFullError, InsufficientBlocksError at the call."""
        assert isinstance(self._loop, GenerationLoop), "text is generated by a model of that task"
        return self._loop.submit(context)

    def embed(self, contexts: Sequence[EmbeddingsContext]) -> Awaitable[list[EmbeddingsGenerationOutput]]:
        """Admits texts to embed. Raises QueueFullError at the call."""
        assert isinstance(self._loop, EmbeddingsLoop), "texts are embedded by a model of that task"
        return self._loop.submit(contexts)

    def cancel(self, request_id: RequestID) -> None:
        assert isinstance(self._loop, GenerationLoop), "an embeddings job is ended by cancelling its future"
        self._loop.cancel(request_id)

    async def healthy(self) -> bool:
        """True while every member of the group answers and the loop is well. Answered from the last renewals."""
        return self._group.silence_s < _SILENT_FOR_S and self._loop.healthy and not self._is_superseded

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        """The siblings' numbers as of their last renewal, this replica's as of now."""
        others = [pickle.loads(data) for owner, data in sorted(self._siblings.items()) if owner != self._owner_id]
        return [self._snapshot(), *others]

    @property
    def activity(self) -> LoopActivity:
        return self._loop.activity

    def end_streams(self) -> None:
        """Every open request ends with an error, and no other is taken."""
        self._loop.stop()

    async def close(self) -> None:
        """Ends the streams and the group."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._group.release()
        except MaxRayError as error:
            _LOG.warning("the group was not released: %s", error)

    def _snapshot(self) -> MetricsSnapshot:
        info, plan = self._group.info, self._plan
        group = GroupView(info.group_id, info.epoch, len(info.workers), plan.device)
        return replace(self._metrics.snapshot(self._loop.stats, info.phases, group), address=self.address)

    async def _recover(self) -> KVCacheClient:
        """The loop's way back after a WorkerGroupError."""
        try:
            return await self._group.rebuild()
        except StaleLeaseError as error:
            self._note_superseded(error)
            raise

    def _on_failure(self, error: MaxRayError) -> None:
        """The lease's keeper found a member dead or silent, or the group owned by another replica."""
        if isinstance(error, WorkerGroupError):
            _LOG.warning("a member of the worker group does not answer: %s", error)
            self._loop.report_failure(error)
        else:
            self._note_superseded(error)

    def _note_superseded(self, error: MaxRayError) -> None:
        _LOG.warning("%s", error)
        self._is_superseded = True
        self._group.let_go()

    async def _exchange_metrics(self) -> None:
        """Nothing but metrics depends on it, so a registry that does not answer is merely noted."""
        silent, ray_metrics = False, RayMetrics()
        while not self._is_superseded:
            await asyncio.sleep(_EXCHANGE_EVERY_S)
            snapshot = self._snapshot()
            ray_metrics.publish(snapshot)
            try:
                self._siblings = await self._group.renew(pickle.dumps(snapshot))
                silent = False
            except (WorkerGroupError, StaleLeaseError) as error:
                if not silent:
                    _LOG.warning("metrics were not exchanged: %s", error)
                silent = True

    async def _share_records(self, records: SharedRecords) -> None:
        while True:
            await asyncio.sleep(_EXCHANGE_EVERY_S)
            try:
                await self._requests.share(records)
            except WorkerGroupError as error:
                _LOG.warning("other replicas were not told of requests that have ended: %s", error)


def _ready_tokenizer(plan: PipelinePlan) -> TextTokenizer:
    """The tokenizer, with what the first chat would otherwise wait for."""
    tokenizer = build_tokenizer(plan)
    if plan.task is PipelineTask.TEXT_GENERATION:
        tokenizer.describe_chat_template()
        start_checker()
    return tokenizer


def parsers_of(tokenizer: TextTokenizer, plan: PipelinePlan) -> ModelParsers:
    """How answers of the model are read."""
    if plan.task is not PipelineTask.TEXT_GENERATION:
        return ModelParsers()
    config = plan.config
    return ModelParsers.of(tokenizer, config.tool_call_parser, config.reasoning_parser, plan.architecture)


def _limits(spec: GroupSpec, queue: QueueLimits) -> SchedulerLimits:
    plan = spec.plan
    return SchedulerLimits(
        max_batch_size=plan.max_batch_size,
        max_batch_input_tokens=plan.config.max_batch_input_tokens,
        max_queued_requests=queue.max_requests,
        max_queued_tokens=queue.max_tokens,
        max_num_steps=plan.config.max_num_steps,
        enable_chunked_prefill=plan.config.enable_chunked_prefill,
        enable_prefix_caching=plan.config.enable_prefix_caching,
    )

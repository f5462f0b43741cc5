"""Ingress: the Serve deployment: HTTP routes, tokenizer, scheduling loop; one worker group leased.

Thin: the routes are `max_ray.serve.api.routes`, the rest is ReplicaEngine. Behind HAProxy clients talk to the
replica's own HTTP server; Python handles call `generate` or `answer`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from max_ray import settings
from max_ray.actors.messages import GroupSpec
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.log import setup_logging
from max_ray.planning.plan import PipelinePlan
from max_ray.serve.api.answer import generate, open_answer
from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.embeddings import EmbeddingsRequest, embed
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.objects.openai import EmbeddingList
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest
from max_ray.serve.api.routes import build_api, build_line_api
from max_ray.serve.api.streams.stream_table import StreamTable
from max_ray.serve.batch_store import ActorBatchStore
from max_ray.serve.cluster_env import SERVE_LOGGING
from max_ray.serve.drain import end_streams_in_time
from max_ray.serve.replica_door import REPLICA_DOOR
from max_ray.serve.replica_engine import QueueLimits, ReplicaEngine, ReplicaIdentity
from max_ray.serve.response_store import ActorResponseStore
from max_ray.serve.stream_journal import ActorStreamJournal
from max_ray.serve.tracing_setup import new_tracer

if TYPE_CHECKING:
    from fastapi import FastAPI


class Replica:
    """One replica. `options` are for HTTP; a holder of a Python handle is inside already."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: GroupSpec, queue: QueueLimits, options: ApiOptions
    ) -> None:
        setup_logging(settings.log_level())
        self._options = options
        context: Any = serve.get_replica_context()
        owner_id = ray.get_runtime_context().get_actor_id() or context.replica_tag
        identity = ReplicaIdentity(rank=context.rank.rank, owner_id=owner_id)
        self._details = model_details(spec.plan)
        self._responses = ActorResponseStore(context.app_name)
        self._journal = ActorStreamJournal(context.app_name)
        self._owner_id = owner_id
        self.engine = await ReplicaEngine.start(replace(spec, app=self._group_app(context)), queue, identity)
        self._draining = asyncio.create_task(end_streams_in_time(self.engine.end_streams, context.app_name))
        if options.shares_records:
            self.engine.share_records(self._responses)
        self._batches = self._batch_runner(context.app_name, owner_id)
        self._tracer = new_tracer(options.otlp_traces_endpoint, owner_id)
        gc.collect()
        gc.freeze()  # what a start makes stays: collections that look through it held all streams up for 17 ms

    def _group_app(self, context: Any) -> str:
        """The name under which the worker group is known, of Serve's context of the replica."""
        return str(context.app_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        records = self._responses if self._options.shares_records else None
        streams = StreamTable(self.engine, self._journal, self._owner_id, self._options.resume_grace_s)
        return build_api(
            self.engine, self._options, self._responses, self._details, self._batches, records, self._tracer, streams
        )

    def _batch_runner(self, app: str, owner_id: str) -> BatchRunner | None:
        """Runs lines of batches from now on; None where no files are kept."""
        files = self._options.files
        if files is None:
            return None
        store = ActorBatchStore(app, files.folder, files.max_bytes)
        lines = build_line_api(self.engine, self._options, self._responses)
        runner = BatchRunner(owner_id, lines, store, lambda: self.engine.num_waiting, files.concurrency)
        runner.start()
        return runner

    async def generate(self, request: CompletionRequest | ChatCompletionRequest) -> AsyncIterator[dict[str, Any]]:
        """For Python handles, called with `.options(stream=True)`: OpenAI's chunk objects when `request.stream`, else
        the one answer object. Raises InputError, QueueFullError, InsufficientBlocksError, WorkerGroupError."""
        async for item in generate(self.engine, request):
            yield item

    async def answer(self, request: CompletionRequest | ChatCompletionRequest) -> dict[str, Any]:
        """For Python handles: the whole answer to the same request. Raises the same."""
        opened = await open_answer(self.engine, request)
        try:
            return await opened.whole()
        finally:
            opened.close()

    async def embed(self, request: EmbeddingsRequest) -> EmbeddingList:
        """For Python handles: the answer object of /v1/embeddings. Raises InputError, QueueFullError,
        WorkerGroupError."""
        return await embed(self.engine, request)

    async def check_health(self) -> None:
        """Serve replaces a replica whose health check fails, and its contexts go with it: so dead workers are not a
        reason (they come back; /health says 503 meanwhile), but a group that another replica owns is."""
        if self.engine.is_superseded:
            raise RuntimeError("This replica's worker group has passed to another replica.")

    async def __del__(self) -> None:
        if hasattr(self, "_batches") and self._batches is not None:
            await self._batches.close()
        if hasattr(self, "engine"):
            self._draining.cancel()
            await self.engine.close()
        if hasattr(self, "_tracer") and self._tracer is not None:
            await self._tracer.close()


def model_details(plan: PipelinePlan) -> ModelDetails:
    """What is told of the model's weights."""
    return ModelDetails(
        family=str(plan.huggingface_config.get("model_type") or ""),
        format=plan.weights_format.value,
        encoding=plan.encoding.value,
        size_bytes=plan.memory.weights * plan.memory.num_ranks,
        is_on_gpu=plan.device != "cpu",
    )


Ingress = serve.deployment(
    name="Ingress",
    ray_actor_options={"num_cpus": 0.01, "runtime_env": {"env_vars": ORDINARY_PRIORITY | REPLICA_DOOR}},
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    logging_config=SERVE_LOGGING,
)(serve.ingress()(Replica))

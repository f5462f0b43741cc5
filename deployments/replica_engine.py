"""ReplicaEngine: what one ingress replica runs: tokenizer, pipeline, generation loop, and the lease of its group.

Implements the Engine that the HTTP routes need. Two tasks: the loop, and the keeper, which renews the lease every
second, exchanges metrics with the sibling replicas on the same occasion, and repairs the group while it is idle.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from deployments.metrics import LoopNumbers, Metrics, MetricsSnapshot
from max_ray.actors.leased_group import LeasedGroup
from max_ray.actors.messages import GroupSpec
from max_ray.custom_code import install_packed
from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import KVLedger, RequestID, TextContext, TextGenerationOutput
from max_ray.log import get_logger
from max_ray.pipelines.factory import build_tokenizer
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from max_ray.tokenizer import TextTokenizer

_LOG = get_logger(__name__)
RENEW_EVERY_S = 1.0
_SILENT_FOR_S = 10.0


@dataclass(frozen=True)
class ReplicaIdentity:
    """rank: Serve's rank of the replica, which a successor inherits. owner_id: this very process."""

    rank: int
    owner_id: str


class ReplicaEngine:
    """Made by `start`; ended by `close`."""

    def __init__(self, tokenizer: TextTokenizer, group: LeasedGroup, limits: SchedulerLimits, owner_id: str) -> None:
        plan = group.info.spec.plan
        self._group = group
        self._owner_id = owner_id
        self._tokenizer = tokenizer
        self._metrics = Metrics(plan.config.served_model_name, owner_id)
        self._pipeline = TextGenerationPipeline(group.executor)
        self._loop = GenerationLoop(self._pipeline, group.ledger, limits, self._recover)
        self._answered_at = time.monotonic()
        self._members_answer = True
        self._is_superseded = False
        self._siblings: dict[str, bytes] = {}
        self._tasks = [asyncio.create_task(self._loop.run()), asyncio.create_task(self._keep_lease())]

    @classmethod
    async def start(cls, spec: GroupSpec, max_queued_requests: int, identity: ReplicaIdentity) -> ReplicaEngine:
        """Leases a group and makes the tokenizer meanwhile. Raises what loading raises."""
        install_packed(spec.plan.custom_code)
        acquiring = asyncio.create_task(LeasedGroup.acquire(spec, identity.rank, identity.owner_id))
        tokenizer = await asyncio.to_thread(build_tokenizer, spec.plan)
        group = await acquiring
        return cls(tokenizer, group, _limits(spec, max_queued_requests), identity.owner_id)

    @property
    def model_name(self) -> str:
        return self._metrics.model_name

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    @property
    def group(self) -> LeasedGroup:
        return self._group

    @property
    def is_superseded(self) -> bool:
        """True once another replica has this one's group: Serve should replace this replica."""
        return self._is_superseded

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        """Admits a request. Raises QueueFullError, InsufficientBlocksError at the call."""
        return self._loop.submit(context)

    def cancel(self, request_id: RequestID) -> None:
        self._loop.cancel(request_id)

    async def healthy(self) -> bool:
        """True while every member of the group answers and the loop is well. Answered from the last renewal."""
        silent = time.monotonic() - self._answered_at > _SILENT_FOR_S
        return self._members_answer and not silent and self._loop.healthy and not self._is_superseded

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        """The siblings' numbers as of their last renewal, this replica's as of now."""
        others = [pickle.loads(data) for owner, data in sorted(self._siblings.items()) if owner != self._owner_id]
        return [self._snapshot(), *others]

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
        stats = self._loop.stats
        return self._metrics.snapshot(
            LoopNumbers(
                queued=stats.queued,
                running=stats.running,
                kv_blocks_used=stats.kv_used_blocks,
                kv_blocks_total=stats.kv_total_blocks,
                prefix_hit_tokens=stats.prefix_hit_tokens,
                steps=stats.steps,
                runs=stats.runs,
                preemptions=stats.preemptions,
            ),
            self._group.info.phases,
        )

    async def _recover(self) -> KVLedger:
        """The loop's way back after a WorkerGroupError."""
        ledger = await self._group.rebuild()
        self._note_answer()
        return ledger

    async def _keep_lease(self) -> None:
        while not self._is_superseded:
            await asyncio.sleep(RENEW_EVERY_S)
            if not self._group.is_repairing:
                await self._renew_once()

    async def _renew_once(self) -> None:
        epoch = self._group.info.epoch
        try:
            self._siblings = await self._group.renew(pickle.dumps(self._snapshot()))
            self._note_answer()
        except StaleLeaseError as error:
            # a rebuild on the loop's behalf may have raised the epoch while the renewal was under way
            self._is_superseded = self._group.info.epoch == epoch and not self._group.is_repairing
            _LOG.warning("%s", error)
        except WorkerGroupError as error:
            if not self._group.is_repairing:
                self._members_answer = False
                _LOG.warning("a member of the worker group does not answer: %s", error)
                await self._repair_if_idle()

    def _note_answer(self) -> None:
        self._answered_at = time.monotonic()
        self._members_answer = True

    async def _repair_if_idle(self) -> None:
        """A busy loop meets the failure itself and recovers; an idle one would not know until the next request."""
        if self._loop.stats.running:
            return
        try:
            await self._recover()
        except MaxRayError as error:
            _LOG.error("the worker group did not come back, trying again: %s", error)


def _limits(spec: GroupSpec, max_queued_requests: int) -> SchedulerLimits:
    plan = spec.plan
    return SchedulerLimits(
        max_batch_size=plan.max_batch_size,
        max_batch_input_tokens=plan.config.max_batch_input_tokens,
        max_queued_requests=max_queued_requests,
        max_num_steps=plan.config.max_num_steps,
        enable_chunked_prefill=plan.config.enable_chunked_prefill,
        enable_prefix_caching=plan.config.enable_prefix_caching,
    )

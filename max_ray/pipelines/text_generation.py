"""TextGenerationPipeline: runs batches of contexts and updates them. It keeps nothing about a request.

Library users and serving replicas use the same class. They differ in the executor (in this process, or a group of
worker actors) and in who owns the blocks. With a `kv_manager`, the pipeline claims and allocates blocks that the caller
did not; without one (serving), the scheduling loop gets them from the KV manager actor.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import numpy as np

from max_ray.interfaces import (
    BlockingExecutor,
    Executor,
    GenerationStatus,
    LogProbabilities,
    Pipeline,
    RequestID,
    RunExtension,
    RunRequest,
    RunRow,
    StepOutput,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
)
from max_ray.kv_cache import PagedKVCacheManager

_TextInputs = TextGenerationInputs[TextContext]
Outputs = dict[RequestID, TextGenerationOutput]


class TextGenerationPipeline(Pipeline[_TextInputs, TextGenerationOutput]):
    """Runs text-generation batches through an executor.

    Args:
        executor: Runs one batch at a time.
        kv_manager: Block manager of this process; None if blocks come from a KV manager actor.
    """

    def __init__(self, executor: Executor, kv_manager: PagedKVCacheManager | None = None) -> None:
        self.executor = executor
        self.kv_managers = [] if kv_manager is None else [kv_manager]
        self._run_ids = itertools.count(1)
        self._current: _RunInProgress | None = None

    @property
    def kv_manager(self) -> PagedKVCacheManager:
        """The block manager of this process. A serving replica has none."""
        if not self.kv_managers:
            raise AttributeError("this pipeline gets its KV blocks from a KV manager actor and has no manager itself")
        return self.kv_managers[0]

    def execute(self, inputs: _TextInputs) -> Outputs:
        """Runs one batch for up to `inputs.num_steps` tokens a request; blocking.

        Args:
            inputs: The batch. The executor must be a BlockingExecutor.

        Returns:
            An entry for every request; without tokens if only a chunk of its prompt has run.

        Raises:
            InsufficientBlocksError: Blocks are missing and cannot be allocated.
            WorkerGroupError: A worker died.
        """
        assert isinstance(self.executor, BlockingExecutor), "runs of worker actors are streamed: see `stream`"
        contexts = _active(inputs)
        outputs = {c.request_id: TextGenerationOutput(request_id=c.request_id) for c in inputs.flat_batch}
        if contexts:
            self._allocate(contexts, inputs.num_steps)
            request = self._request(contexts, inputs.num_steps)
            for step in self.executor.execute(request):
                for request_id, output in _apply(contexts, request, step).items():
                    outputs[request_id].merge(output)
            for manager in self.kv_managers:
                manager.step(contexts)
        for context in inputs.flat_batch:
            outputs[context.request_id].final_status = context.status
            outputs[context.request_id].num_cached_tokens = context.cached_prefix_length
        return outputs

    async def stream(self, inputs: _TextInputs) -> AsyncIterator[Outputs]:
        """Runs one batch without blocking the event loop. Its contexts must have blocks for the whole run.

        Yields:
            Outputs of each step; without an entry for requests that gained nothing.

        Raises:
            WorkerGroupError: A worker died.
        """
        contexts = _active(inputs)
        request = self._request(contexts, inputs.num_steps)
        self._current = _RunInProgress(contexts, request)
        async for step in self.executor.stream(request):
            yield _apply(contexts, request, step)

    def interrupt(self) -> None:
        """Ends the run in progress at its next step boundary."""
        if self._current is not None:
            self.executor.interrupt(self._current.request.run_id)

    @property
    def can_extend(self) -> bool:
        """Whether the executor can hand more steps to a run in progress."""
        return self.executor.can_extend

    def extend(self, num_steps: int) -> None:
        """Extends the run in progress. A run that has ended stays ended.

        Args:
            num_steps: Steps of the whole run, and tokens that it may give each request. The contexts must have blocks
                for them.
        """
        assert self._current is not None, "no run to extend"
        self.executor.extend(self._current.extended(num_steps))

    def release(self, request_id: RequestID) -> None:
        """Gives back the blocks of a request. Idempotent; ignores unknown ids."""
        for manager in self.kv_managers:
            manager.release(request_id)

    def _allocate(self, contexts: list[TextContext], num_steps: int) -> None:
        for manager in self.kv_managers:
            for context in contexts:
                if not manager.contains(context.request_id):
                    manager.claim(context.request_id)
                manager.alloc(context, num_steps=num_steps)

    def _request(self, contexts: list[TextContext], num_steps: int) -> RunRequest:
        rows = [RunRow.from_context(context, num_steps) for context in contexts]
        return RunRequest(next(self._run_ids), rows, num_steps)


class _RunInProgress:
    """What is needed to extend a run.

    Attributes:
        request: The run, as it began.
    """

    def __init__(self, contexts: list[TextContext], request: RunRequest) -> None:
        self.request = request
        self._contexts = contexts
        self._sent = [row.block_table for row in request.rows]  # block tables that the workers know
        self._num_extensions = 0

    def extended(self, num_steps: int) -> RunExtension:
        """The next extension, to `num_steps` steps in all."""
        self._num_extensions += 1
        max_new = [
            min(num_steps, context.tokens.generated_length - row.generated_length + context.remaining_new_tokens)
            for context, row in zip(self._contexts, self.request.rows, strict=True)
        ]
        grown = {
            i: context.block_table
            for i, context in enumerate(self._contexts)
            if len(context.block_table) > len(self._sent[i])
        }
        for i, table in grown.items():
            self._sent[i] = table
        return RunExtension(
            self.request.run_id, self._num_extensions, num_steps, np.array(max_new, dtype=np.int64), grown
        )


def _active(inputs: _TextInputs) -> list[TextContext]:
    return [context for context in inputs.flat_batch if not context.is_done]


def _apply(contexts: list[TextContext], request: RunRequest, step: StepOutput) -> Outputs:
    """Updates the contexts with the tokens of one step.

    A context that was cancelled meanwhile stays as it is, and so does one that gained nothing, unless a chunk of its
    prompt has run. Tokens behind the end of a request are dropped, with their log probabilities.
    """
    outputs: Outputs = {}
    reports_prompt = step.prompt_log_probabilities is not None
    tokens, indptr = step.tokens.tolist(), step.indptr.tolist()
    assert len(indptr) == len(contexts) + 1, "a step of another batch"
    for index, context in enumerate(contexts):
        if context.status is not GenerationStatus.ACTIVE:
            continue
        if step.errors is not None and index in step.errors:
            outputs[context.request_id] = _failed(context, step.errors[index])
            continue
        echo = _echoed(context, request.rows[index], index, step) if reports_prompt else None
        new = tokens[indptr[index] : indptr[index + 1]]
        if len(new) == 1:
            context.update(new[0])
        elif new:
            new = new[: context.extend(new)]
        elif step.step == 0 and context.prompt_in_chunks:
            context.advance()
        if not new and echo is None:
            continue
        entries = None if step.log_probabilities is None else step.log_probabilities.get(index)
        outputs[context.request_id] = TextGenerationOutput(
            request_id=context.request_id,
            tokens=new,
            final_status=context.status,
            log_probabilities=None if entries is None else entries[: len(new)],
            prompt_log_probabilities=echo,
            num_cached_tokens=context.cached_prefix_length,
        )
    return outputs


def _failed(context: TextContext, error: str) -> TextGenerationOutput:
    context.status = GenerationStatus.FAILED
    return TextGenerationOutput(
        request_id=context.request_id,
        final_status=context.status,
        num_cached_tokens=context.cached_prefix_length,
        error=error,
    )


def _echoed(context: TextContext, row: RunRow, index: int, step: StepOutput) -> list[LogProbabilities | None] | None:
    """Prompt log probabilities that are new: a request that was preempted computes some of them again."""
    if not row.echo or step.prompt_log_probabilities is None:
        return None
    first = 0 if row.processed_length == 0 else row.processed_length + 1
    entries = step.prompt_log_probabilities[index][: max(0, context.tokens.prompt_length - first)]
    new = entries[max(0, context.echoed_length - first) :]
    context.echoed_length = max(context.echoed_length, first + len(entries))
    return new

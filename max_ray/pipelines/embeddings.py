"""EmbeddingsPipeline: computes one vector for each tokenized text. No KV cache, no padding, one step a batch.

Library users and serving replicas use the same class with different executors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from max_ray.interfaces import (
    BlockingExecutor,
    EmbeddingsContext,
    EmbeddingsGenerationInputs,
    EmbeddingsGenerationOutput,
    Executor,
    Pipeline,
    RequestID,
    RunRequest,
    RunRow,
    SamplingParams,
    StepOutput,
)

_Inputs = EmbeddingsGenerationInputs[EmbeddingsContext]
Outputs = dict[RequestID, EmbeddingsGenerationOutput]
_NO_BLOCKS = np.empty(0, dtype=np.int32)
_NO_SAMPLING = SamplingParams(temperature=0.0, seed=0)


class EmbeddingsPipeline(Pipeline[_Inputs, EmbeddingsGenerationOutput]):
    """Embeds batches through an executor.

    Args:
        executor: Runs one step at a time.
        max_batch_size: Texts of a step, at most.
        max_batch_input_tokens: Tokens of a step, at most; a longer text runs alone.
    """

    def __init__(self, executor: Executor, max_batch_size: int, max_batch_input_tokens: int) -> None:
        self.executor = executor
        self.max_batch_size = max_batch_size
        self.max_batch_input_tokens = max_batch_input_tokens
        self._run_ids = itertools.count(1)

    def execute(self, inputs: _Inputs) -> Outputs:
        """Embeds every text of the batch, in as many steps as the limits require; blocking.

        Args:
            inputs: The batch. The executor must be a BlockingExecutor.

        Returns:
            A vector for every text, in the order of the batch.

        Raises:
            WorkerGroupError: A worker died.
        """
        assert isinstance(self.executor, BlockingExecutor), "runs of worker actors are streamed: see `embed`"
        outputs: Outputs = {}
        for contexts in self.steps_of(inputs.flat_batch):
            for step in self.executor.execute(self._request(contexts)):
                outputs |= _outputs(contexts, step)
        return {context.request_id: outputs[context.request_id] for context in inputs.flat_batch}

    async def embed(self, contexts: Sequence[EmbeddingsContext]) -> Outputs:
        """Runs one step without blocking the event loop.

        Args:
            contexts: Texts, within the limits.

        Returns:
            A vector for every text.

        Raises:
            WorkerGroupError: A worker died.
        """
        outputs: Outputs = {}
        async for step in self.executor.stream(self._request(contexts)):
            outputs |= _outputs(contexts, step)
        return outputs

    def release(self, request_id: RequestID) -> None:
        """Does nothing: no state is kept for a request."""

    def steps_of(self, contexts: Sequence[EmbeddingsContext]) -> Iterator[list[EmbeddingsContext]]:
        """Splits texts into steps within the limits; texts of similar length share a step."""
        step: list[EmbeddingsContext] = []
        num_tokens = 0
        for context in sorted(contexts, key=lambda c: len(c.tokens)):
            is_full = len(step) == self.max_batch_size or num_tokens + len(context.tokens) > self.max_batch_input_tokens
            if step and is_full:
                yield step
                step, num_tokens = [], 0
            step.append(context)
            num_tokens += len(context.tokens)
        if step:
            yield step

    def _request(self, contexts: Sequence[EmbeddingsContext]) -> RunRequest:
        return RunRequest(next(self._run_ids), [_row(context) for context in contexts], num_steps=1)


def _row(context: EmbeddingsContext) -> RunRow:
    """A row that samples nothing; `echo` requests the hidden states of all its tokens instead of the last one's."""
    return RunRow(
        request_id=context.request_id.value,
        active_tokens=context.tokens,
        processed_length=0,
        block_table=_NO_BLOCKS,
        max_new_tokens=0,
        sampling_params=_NO_SAMPLING,
        stop_ids=frozenset(),
        generated_length=0,
        prompt_length=len(context.tokens),
        echo=True,
    )


def _outputs(contexts: Sequence[EmbeddingsContext], step: StepOutput) -> Outputs:
    assert step.embeddings is not None, "the executor runs another task than embeddings"
    rows = zip(contexts, step.embeddings, strict=True)
    return {context.request_id: EmbeddingsGenerationOutput(vector) for context, vector in rows}

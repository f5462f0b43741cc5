"""EmbeddingsPipeline: tokenized texts in, one vector a text out. No KV cache, no padding, one step a batch.

The pipeline of a library user and of a serving replica is the same object; they differ in the executor it holds.
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

    max_batch_size: most texts of a step. max_batch_input_tokens: most tokens of a step; a longer text runs alone.
    """

    def __init__(self, executor: Executor, max_batch_size: int, max_batch_input_tokens: int) -> None:
        self.executor = executor
        self.max_batch_size = max_batch_size
        self.max_batch_input_tokens = max_batch_input_tokens
        self._run_ids = itertools.count(1)

    def execute(self, inputs: _Inputs) -> Outputs:
        """Embeds every text of the batch, in as many steps as the limits ask for; blocking. Raises WorkerGroupError
        when a worker dies. The executor must be one that can block."""
        assert isinstance(self.executor, BlockingExecutor), "runs of worker actors are streamed: see `embed`"
        outputs: Outputs = {}
        for contexts in self.steps_of(inputs.flat_batch):
            for step in self.executor.execute(self._request(contexts)):
                outputs |= _outputs(contexts, step)
        return {context.request_id: outputs[context.request_id] for context in inputs.flat_batch}

    async def embed(self, contexts: Sequence[EmbeddingsContext]) -> Outputs:
        """One step with these texts, which must keep within the limits; does not block the event loop."""
        outputs: Outputs = {}
        async for step in self.executor.stream(self._request(contexts)):
            outputs |= _outputs(contexts, step)
        return outputs

    def release(self, request_id: RequestID) -> None:
        """Nothing is held for a request."""

    def steps_of(self, contexts: Sequence[EmbeddingsContext]) -> Iterator[list[EmbeddingsContext]]:
        """The texts cut into steps within the limits, those of like length together."""
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
    """A row that samples nothing; `echo` asks for what the network makes of all its tokens, not of the last."""
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

"""EmbeddingsRunner: one rank of the embeddings task. A run is one step: forward, pool, done; nothing is kept.

Rows are put in the order of their lengths first, so that rows of equal length lie side by side and attend together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import numpy.typing as npt
import torch

from max_ray.distributed.group import TPGroup
from max_ray.engine.pooling_head import SentenceHead
from max_ray.engine.score_head import ScoreHead
from max_ray.interfaces import Extensions, RunRequest, RunRow, StepOutput
from max_ray.modeling import PipelineModel


class EmbeddingsRunner:
    """A Runner around a model whose `execute` gives the hidden states of all tokens. A score is a vector of one."""

    num_blocks = 0

    def __init__(self, model: PipelineModel, head: SentenceHead | ScoreHead, tp: TPGroup) -> None:
        self._model = model
        self._head = head
        self._tp = tp
        self.forward_calls = 0

    def run(
        self,
        request: RunRequest,
        should_stop: Callable[[], bool] = lambda: False,
        extensions: Extensions | None = None,
    ) -> Generator[StepOutput]:
        """One step; rank 0's has the vectors. (`should_stop` and `extensions` are for runs that have a second one.)"""
        assert request.num_steps == 1, "a text is embedded in one step"
        with torch.inference_mode():
            vectors = self._embed(request.rows)
        self.forward_calls += 1
        no_tokens, indptr = np.empty(0, dtype=np.int64), np.zeros(len(request.rows) + 1, dtype=np.int64)
        yield StepOutput(step=0, tokens=no_tokens, indptr=indptr, last=True, embeddings=vectors)

    def _embed(self, rows: list[RunRow]) -> npt.NDArray[np.float32] | None:
        """float32 [B, D], rows as given; None on all ranks but the first."""
        lengths = np.array([len(row.active_tokens) for row in rows])
        order = np.argsort(lengths, kind="stable")
        inputs = self._model.prepare_initial_token_inputs([rows[i] for i in order])
        hidden = self._model.execute(inputs).hidden_states
        assert hidden is not None, f"{type(self._model).__name__} gives no hidden states"
        if self._tp.rank != 0:
            return None
        vectors = self._head(hidden, inputs.qo_indptr.long()).cpu().numpy()
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

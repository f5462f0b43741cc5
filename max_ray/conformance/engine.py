"""Runs a PipelineModel over a paged cache by hand: no scheduler, no sampler; logits of every token.
Imports no transformers, so that a spawned rank starts quickly.

Block tables are scattered on purpose (rows take blocks alternately, from the back): nothing may rely on their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from max_ray.engine.kv_storage import KVStorage, RunTables
from max_ray.interfaces import RunRow, SamplingParams
from max_ray.modeling import PipelineModel


class Engine:
    """One rank. `logits_of` gives the logits of all tokens of several sequences that run side by side."""

    def __init__(self, model: PipelineModel, num_rows: int = 5, max_tokens: int = 128) -> None:
        self.model = model
        config = model.pipeline_config
        params = model.get_kv_params(config, model.huggingface_config, model.encoding, model.tp.size)
        blocks_a_row = -(-max_tokens // params.page_size)
        self._storage = KVStorage.allocate(params, num_rows * blocks_a_row, model.device)
        scattered = np.arange(num_rows * blocks_a_row, dtype=np.int32)[::-1].reshape(blocks_a_row, num_rows)
        self._tables = list(scattered.T.copy())

    def logits_of(
        self, sequences: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], cached: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """Logits [tokens that ran, V] of each sequence.

        chunks[i]: how many tokens of sequence i run in each step; a row sits out where that is 0, and when it has no
        chunk left.
        cached[i]: tokens of sequence i whose keys and values are in its blocks already (see `share_prefix`).
        """
        done = list(cached) or [0] * len(sequences)
        pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
        for step in range(max(map(len, chunks))):
            taking = [i for i in range(len(sequences)) if step < len(chunks[i]) and chunks[i][step]]
            rows = [self._row(i, sequences[i], done[i], chunks[i][step]) for i in taking]
            logits = torch.split_with_sizes(self._forward(rows), [len(row.active_tokens) for row in rows])
            for i, piece in zip(taking, logits, strict=True):
                pieces[i].append(piece)
                done[i] += chunks[i][step]
        return [torch.cat(piece) for piece in pieces]

    def share_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Sequence `target` gets the blocks that hold the first `num_tokens` (whole blocks) of sequence `source`."""
        num_blocks, rest = divmod(num_tokens, self._storage.page_size)
        assert rest == 0, f"{num_tokens} tokens are no whole blocks of {self._storage.page_size}"
        self._tables[target][:num_blocks] = self._tables[source][:num_blocks]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The prompt in one step, then one token a step through `prepare_next_token_inputs`."""
        row = self._row(0, prompt, 0, len(prompt))
        tables = RunTables([row], self._storage, self.model.device)
        inputs = self.model.prepare_initial_token_inputs([row], tables.first_step([row]))
        tokens: list[int] = []
        while True:
            token = self.model.execute(inputs).logits[-1].argmax()
            tokens.append(int(token))
            if len(tokens) == num_tokens:
                return tokens
            inputs.kv_cache_inputs = tables.next_step()
            inputs = self.model.prepare_next_token_inputs(token.view(1), inputs)

    def _row(self, index: int, sequence: Sequence[int], start: int, count: int) -> RunRow:
        return RunRow(
            request_id=str(index),
            active_tokens=np.array(sequence[start : start + count], dtype=np.int64),
            processed_length=start,
            block_table=self._tables[index],
            max_new_tokens=1,
            sampling_params=SamplingParams(),
            stop_ids=frozenset(),
            generated_length=0,
            prompt_length=len(sequence),
            log_probabilities=0,
            echo=True,
        )

    def _forward(self, rows: list[RunRow]) -> torch.Tensor:
        tables = RunTables(rows, self._storage, self.model.device)
        inputs = self.model.prepare_initial_token_inputs(rows, tables.first_step(rows))
        return self.model.execute(inputs).logits.clone()


def random_tokens(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """One random sequence of each length."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]

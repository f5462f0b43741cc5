"""ModelRunner: runs a RunRequest on one rank, step by step: forward, sample, tell the other ranks, go on.

The same code runs in this process and in a worker actor. Rank 0 samples; its tokens and the word "go on" travel to
the other ranks in one small broadcast a step, so all ranks stop at the same step boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from max_ray.distributed.collectives import broadcast
from max_ray.distributed.group import TPGroup
from max_ray.interfaces import LogProbabilities, ModelInputs, PipelineModel, RunRequest, RunRow, StepOutput
from max_ray.pipelines.kv_storage import KVStorage, RunTables
from max_ray.pipelines.sampler import Sampler, prompt_logprobs

TokenArray = npt.NDArray[np.int64]


class ModelRunner:
    """One rank's model, cache and sampler. Not thread-safe: one run at a time.

    `forward_calls` counts forward passes since the start; block tables are kept only so that the KV ledger can be
    checked against them or rebuilt from them.
    """

    def __init__(self, model: PipelineModel, storage: KVStorage, tp: TPGroup, vocab_size: int) -> None:
        self._model = model
        self._storage = storage
        self._tp = tp
        self._vocab_size = vocab_size
        self.num_blocks = storage.keys[0].shape[0]
        self._block_tables: dict[str, npt.NDArray[np.int32]] = {}
        self.forward_calls = 0

    def run(self, request: RunRequest, should_stop: Callable[[], bool] = lambda: False) -> Generator[StepOutput]:
        """Yields one StepOutput a step. `should_stop` is asked at each step boundary, on rank 0 only."""
        self.release(request.released)
        for row in request.rows:
            self._block_tables[row.request_id] = row.block_table
        with torch.inference_mode():
            run = _Run(self._model, self._storage, self._tp, self._vocab_size, request)
        while True:
            # inference_mode is entered anew for each step: a generator must not leave it switched on for its caller
            with torch.inference_mode():
                self.forward_calls += 1
                output = run.step(should_stop)
            yield output
            if output.last:
                return

    def release(self, request_ids: list[str]) -> None:
        """Forgets the block tables of requests that ended."""
        for request_id in request_ids:
            self._block_tables.pop(request_id, None)

    def block_tables(self) -> dict[str, npt.NDArray[np.int32]]:
        """Block table of every request that ran here and was not released."""
        return dict(self._block_tables)


class _Run:
    """State of one run; `alive` are the positions in the present batch of the rows that go on."""

    def __init__(
        self, model: PipelineModel, storage: KVStorage, tp: TPGroup, vocab_size: int, request: RunRequest
    ) -> None:
        self._model = model
        self._tp = tp
        self._rows = request.rows
        self._num_steps = request.num_steps
        self._step = 0
        self._tables = RunTables(request.rows, storage, tp.device)
        self._sampler = Sampler(request.rows, vocab_size, tp.device) if tp.rank == 0 else None
        kv_cache_inputs = self._tables.first_step(request.rows)
        self._inputs: ModelInputs = model.prepare_initial_token_inputs(request.rows, kv_cache_inputs)

    def step(self, should_stop: Callable[[], bool]) -> StepOutput:
        logits = self._model.execute(self._inputs).logits
        output = StepOutput(step=self._step, tokens=np.full(len(self._rows), -1, dtype=np.int64), last=True)
        if self._step == 0:
            logits = self._report_prompt(logits, output)
            self._tables_keep_sampling_rows()
        tokens, go_on = self._sample(logits, output, should_stop)
        output.tokens[self._tables.rows] = tokens
        sampled = zip(self._tables.rows.tolist(), tokens.tolist(), strict=True)
        alive = [p for p, (row, token) in enumerate(sampled) if self._goes_on(row, token)]
        self._step += 1
        output.last = not (go_on and alive and self._step < self._num_steps)
        if not output.last:
            self._prepare_next(tokens, alive)
        return output

    def _report_prompt(self, logits: torch.Tensor, output: StepOutput) -> torch.Tensor:
        """Takes the echo rows' prompt log probabilities off; leaves one row of logits a sampling row."""
        counts = [row.num_logits for row in self._rows]
        if not any(row.echo for row in self._rows):
            return logits
        pieces = torch.split_with_sizes(logits, counts)
        if self._tp.rank == 0:
            output.prompt_log_probabilities = {
                i: _prompt_entries(row, pieces[i]) for i, row in enumerate(self._rows) if row.echo
            }
        return torch.cat(
            [piece[-1:] for piece, row in zip(pieces, self._rows, strict=True) if row.samples] or [logits[:0]]
        )

    def _tables_keep_sampling_rows(self) -> None:
        self._tables.keep([i for i, row in enumerate(self._rows) if row.samples])

    def _sample(
        self, logits: torch.Tensor, output: StepOutput, should_stop: Callable[[], bool]
    ) -> tuple[TokenArray, bool]:
        num_rows = len(self._tables.rows)
        message = torch.empty(num_rows + 1, dtype=torch.int64, device=self._tp.device)
        if self._sampler is not None:
            if num_rows:
                sampled = self._sampler.sample(logits, self._tables.rows.tolist())
                message[:num_rows] = sampled.tokens
                output.log_probabilities = sampled.log_probabilities
            message[num_rows] = 0 if should_stop() else 1
        message = broadcast(message, self._tp, src=0)
        host: TokenArray = message.cpu().numpy()
        return host[:num_rows], bool(host[num_rows])

    def _goes_on(self, row_index: int, token: int) -> bool:
        row = self._rows[row_index]
        generated = row.generated_length + self._step + 1
        ended = token in row.stop_ids and generated > row.sampling_params.min_new_tokens
        return not ended and self._step + 1 < row.max_new_tokens

    def _prepare_next(self, tokens: TokenArray, alive: list[int]) -> None:
        self._tables.keep(alive)
        kv_cache_inputs = self._tables.next_step()
        next_tokens = torch.from_numpy(tokens[alive]).to(self._tp.device, non_blocking=True)
        previous = replace(self._inputs, kv_cache_inputs=kv_cache_inputs)
        self._inputs = self._model.prepare_next_token_inputs(next_tokens, previous)


def _prompt_entries(row: RunRow, logits: torch.Tensor) -> list[LogProbabilities | None]:
    """Entries for the tokens that the active ones of `row` predict: logits [n, V] of its n active tokens."""
    targets = row.active_tokens[1:].tolist() + ([row.echo_next] if row.echo_next >= 0 else [])
    entries: list[LogProbabilities | None] = [None] if row.processed_length == 0 else []
    assert row.log_probabilities is not None, "echo asks for log probabilities"
    entries += prompt_logprobs(logits[: len(targets)], targets, row.log_probabilities)
    return entries

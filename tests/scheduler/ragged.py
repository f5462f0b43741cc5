"""An executor without a model that gives each row of a run several tokens a step, or none.

As in `fakes`, the cache holds the token that was written into each slot, and the next token is derived from what is
read back through the block table, so blocks that are wrong, or too few, give another token or an assertion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from max_ray.errors import WorkerGroupError
from max_ray.interfaces import LogProbabilities, RunExtension, RunRequest, RunRow, StepOutput
from tests.scheduler.fakes import next_token

Widths = Callable[[str, int], int]
"""(request id, step of the run) -> tokens that the row would like to take."""


@dataclass
class RowInRun:
    """One row. tokens: those known to the executor; the first `num_written` of them are in the cache."""

    row: RunRow
    tokens: list[int]
    num_written: int
    block_table: list[int]
    max_new_tokens: int
    gained: list[int] = field(default_factory=list)
    has_ended: bool = False

    @property
    def num_left(self) -> int:
        return 0 if self.has_ended else self.max_new_tokens - len(self.gained)


@dataclass
class RaggedExecutor:
    """Attributes:
    can_extend: As an Executor has it.
    fail_at: The step, counted over all runs, at which the workers die, once.
    runs: For each run, the tokens that each of its rows gained in each step.
    """

    page_size: int
    widths: Widths
    can_extend: bool = True
    fail_at: int | None = None
    slots: dict[int, int] = field(default_factory=dict)
    runs: list[list[dict[str, int]]] = field(default_factory=list)
    num_extensions: int = 0
    _rows: list[RowInRun] = field(default_factory=list)
    _num_steps: int = 0
    _interrupted: int = 0

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        self._num_steps = request.num_steps
        self._rows = [self._start(row) for row in request.rows]
        self.runs.append([])
        last, step = False, 0
        while not last:
            await asyncio.sleep(0)
            new = [self._advance(row, step) for row in self._rows]
            if sum(map(len, self.runs)) == self.fail_at:
                self.fail_at = None
                self.slots.clear()
                raise WorkerGroupError("rank 1 died")
            self.runs[-1].append({row.row.request_id: len(n) for row, n in zip(self._rows, new, strict=True)})
            can_continue = step + 1 < self._num_steps and any(row.num_left > 0 for row in self._rows)
            last = not can_continue or self._interrupted >= request.run_id
            yield self._output(step, new, last)
            step += 1

    def interrupt(self, run_id: int) -> None:
        self._interrupted = run_id

    def extend(self, extension: RunExtension) -> None:
        self.num_extensions += 1
        self._num_steps = extension.num_steps
        for index, row in enumerate(self._rows):
            row.max_new_tokens = int(extension.max_new_tokens[index])
            row.block_table = extension.block_tables.get(index, np.array(row.block_table)).tolist()

    def _start(self, row: RunRow) -> RowInRun:
        table = row.block_table.tolist()
        past = [self.slots[self._slot(table, position)] for position in range(row.processed_length)]
        return RowInRun(row, past + row.active_tokens.tolist(), row.processed_length, table, row.max_new_tokens)

    def _slot(self, table: list[int], position: int) -> int:
        assert position < len(table) * self.page_size, "the run went beyond the blocks of the request"
        return table[position // self.page_size] * self.page_size + position % self.page_size

    def _advance(self, row: RowInRun, step: int) -> list[int]:
        """Runs the tokens that are not in the cache, and as many new ones as the row takes, but for the last."""
        if row.num_left <= 0 and step > 0:
            return []
        self._write(row)
        new: list[int] = []
        for _ in range(min(row.num_left, self.widths(row.row.request_id, step))):
            self._write(row)
            new.append(next_token([self.slots[self._slot(row.block_table, i)] for i in range(len(row.tokens))]))
            row.tokens.append(new[-1])
        row.gained += new
        row.has_ended = row.has_ended or any(token in row.row.stop_ids for token in new)
        return new

    def _write(self, row: RowInRun) -> None:
        for position in range(row.num_written, len(row.tokens)):
            self.slots[self._slot(row.block_table, position)] = row.tokens[position]
        row.num_written = len(row.tokens)

    def _output(self, step: int, new: list[list[int]], last: bool) -> StepOutput:
        entries = {
            index: [LogProbabilities(token, -float(token), []) for token in tokens]
            for index, tokens in enumerate(new)
            if tokens and self._rows[index].row.log_probabilities is not None
        }
        indptr = np.cumsum([0, *map(len, new)])
        tokens = np.array([token for tokens in new for token in tokens], dtype=np.int64)
        return StepOutput(step, tokens, indptr, last, log_probabilities=entries or None)

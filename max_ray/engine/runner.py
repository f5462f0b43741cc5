"""ModelRunner: runs a RunRequest on one rank, step by step: forward, sample, tell the other ranks, go on.

The same code runs in this process and in a worker actor. Rank 0 samples; its tokens and one word travel to the other
ranks in one small broadcast a step, so all ranks stop at the same step boundary. The word is 0 for "stop", else one
more than the number of the run's extensions that rank 0 has got: every rank then applies those that are new.

A step is *launched* (all its work is handed to the device, sampled tokens being the next step's inputs there) and later
*collected* (its tokens are read on the host). On a CPU one follows the other. On a GPU step k + 1 is launched before
step k is collected, so that the device never waits for the host:

    launch 0, launch 1, collect 0, launch 2, collect 1, ...

What the host learns from step k then counts from step k + 2 on. A row that ended at k is computed once more, within the
room that its request has, and its token is dropped. One rank alone launches nothing more once it is told to stop;
several learn of it together when they collect the step, and end with the one after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from max_ray.distributed.collectives import broadcast
from max_ray.distributed.group import TPGroup
from max_ray.distributed.step_deadline import StepDeadline
from max_ray.driver import Download, upload
from max_ray.engine.forced_tokens import is_outdone, with_forced_tokens
from max_ray.engine.graphs import DecodeGraphs
from max_ray.engine.kv_storage import KVStorage, RunTables
from max_ray.engine.sampling.sampler import NO_TOKEN, Sampled, Sampler, needs_host, prompt_logprobs
from max_ray.interfaces import Extensions, LogProbabilities, ModelInputs, RunRequest, RunRow, StepOutput
from max_ray.modeling import PipelineModel

if TYPE_CHECKING:
    from max_ray.structured_output import GrammarCompiler

TokenArray = npt.NDArray[np.int64]


class ModelRunner:
    """One rank's model, cache and sampler. Not thread-safe: one run at a time.

    graphs: replays decode steps that fit it; None: every step is launched kernel by kernel. lookahead: steps launched
    before an earlier one is collected; the same on all ranks. By default 1 on a GPU and 0 on a CPU; 0 in runs with a
    row whose next token depends on the host. grammars: of structured output; on rank 0 only.
    `forward_calls` counts forward passes since the start. Nothing of a request is kept between two runs.
    """

    def __init__(
        self,
        model: PipelineModel,
        storage: KVStorage,
        tp: TPGroup,
        vocab_size: int,
        graphs: DecodeGraphs | None = None,
        lookahead: int | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._model = model
        self._storage = storage
        self._tp = tp
        self._vocab_size = vocab_size
        self._graphs = graphs
        self._lookahead = int(tp.device.type == "cuda") if lookahead is None else lookahead
        self._grammars = grammars
        self._deadline: AbstractContextManager[None] = nullcontext()
        if tp.size > 1 and tp.device.type == "cuda":
            self._deadline = StepDeadline(tp)
        self.num_blocks = storage.num_blocks
        self.forward_calls = 0

    @property
    def storage(self) -> KVStorage:
        """The cache's tensors; for measurements."""
        return self._storage

    def run(
        self,
        request: RunRequest,
        should_stop: Callable[[], bool] = lambda: False,
        extensions: Extensions | None = None,
    ) -> Generator[StepOutput]:
        """Yields one StepOutput a step. `should_stop` is asked at each step boundary, on rank 0 only."""
        forced: Mapping[int, list[int]] = {}
        if self._grammars is not None and self._tp.size == 1:
            rows, forced = with_forced_tokens(request.rows, self._grammars)
            request = replace(request, rows=rows)
        with torch.inference_mode():
            sampler = self._sampler(request.rows) if self._tp.rank == 0 else None
            tables = RunTables(request.rows, self._storage, self._tp.device)
            run = _Run(
                self._model, self._tp, request, tables, sampler, self._graphs, extensions, forced, self._deadline
            )
        lookahead = 0 if any(map(needs_host, request.rows)) else self._lookahead
        while True:
            # inference_mode is entered anew for each step: a generator must not leave it switched on for its caller
            before = run.num_launched
            with torch.inference_mode():
                output = run.step(should_stop, lookahead)
            self.forward_calls += run.num_launched - before
            yield output
            if output.last:
                return

    def _sampler(self, rows: list[RunRow]) -> Sampler:
        return Sampler(rows, self._vocab_size, self._tp.device, grammars=self._grammars)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way. rows: which rows of the run were in it and sampled, int64. message: their tokens, and last
    the word (see the file header). sampled: on rank 0, where log probabilities wait."""

    step: int
    rows: TokenArray
    message: Download
    sampled: Sampled | None
    prompt_log_probabilities: dict[int, list[LogProbabilities | None]] | None


class _Run:
    """State of one run. Rows leave `tables` when a step is launched without them.

    num_launched: steps so far, also the number of the next one. `_ended`: bool [rows], known to have ended.
    `_least_new`: steps that no row's limit ends. forced: tokens by row that are given with the first step's.
    deadline: around each wait for the device.
    """

    def __init__(
        self,
        model: PipelineModel,
        tp: TPGroup,
        request: RunRequest,
        tables: RunTables,
        sampler: Sampler | None,
        graphs: DecodeGraphs | None,
        extensions: Extensions | None,
        forced: Mapping[int, list[int]],
        deadline: AbstractContextManager[None],
    ) -> None:
        self.num_launched = 0
        self._deadline = deadline
        self._forced = forced
        self._num_forced = np.array([len(forced.get(i, ())) for i in range(len(request.rows))], dtype=np.int64)
        self._run_id = request.run_id
        self._extensions = extensions
        self._num_extended = 0
        self._model = model
        self._tp = tp
        self._rows = request.rows
        self._num_steps = request.num_steps
        self._tables = tables
        self._sampler = sampler
        self._graphs = graphs
        self._in_flight: deque[_Launched] = deque()
        self._go_on = True
        self._ended = np.zeros(len(request.rows), dtype=bool)
        self._some_ended = False
        self._max_new = np.array([row.max_new_tokens for row in request.rows], dtype=np.int64)
        self._least_new = min((row.max_new_tokens for row in request.rows if row.samples), default=0)
        self._inputs: ModelInputs | None = None
        self._tokens = torch.empty(0, dtype=torch.int64, device=tp.device)

    def step(self, should_stop: Callable[[], bool], lookahead: int) -> StepOutput:
        """The next step's output, with up to `lookahead` more steps under way."""
        while len(self._in_flight) <= lookahead and self._may_launch():
            self._launch(should_stop)
        return self._collect(self._in_flight.popleft())

    def _may_launch(self) -> bool:
        if self.num_launched == 0:
            return True
        if not self._go_on or self.num_launched >= self._num_steps:
            return False
        alive = self._alive()
        return len(self._tables.rows if alive is None else alive) > 0

    def _alive(self) -> TokenArray | None:
        """Positions in the present batch of the rows that take the next step, as far as is known; None: all."""
        if not self._some_ended and self.num_launched < self._least_new:
            return None
        rows = self._tables.rows
        return np.flatnonzero(~self._ended[rows] & (self.num_launched < self._max_new[rows]))

    def _launch(self, should_stop: Callable[[], bool]) -> None:
        entries = None
        if self.num_launched == 0:
            logits, entries = self._first_step()
        else:
            logits = self._following_step()
        message, sampled = self._sample(logits, should_stop)
        self._tokens = message[:-1]
        self._in_flight.append(_Launched(self.num_launched, self._tables.rows, Download(message), sampled, entries))
        self.num_launched += 1

    def _first_step(self) -> tuple[torch.Tensor, dict[int, list[LogProbabilities | None]] | None]:
        """(logits of the rows that sample, entries of the echo rows' prompts)."""
        rows, entries = self._rows, None
        if self._graphs is not None and self._graphs.fits(self._tables) and all(map(_is_decode, rows)):
            tokens = upload(np.concatenate([row.active_tokens for row in rows]), self._tp.device)
            return self._graphs.decode(tokens, self._tables), None
        kv_cache_inputs = self._tables.first_step(rows)
        self._inputs = self._model.prepare_initial_token_inputs(rows, kv_cache_inputs)
        logits = self._model.execute(self._inputs).logits
        if any(row.echo for row in rows):
            logits, entries = self._report_prompt(logits)
        self._tables.keep([i for i, row in enumerate(rows) if row.samples])
        return logits, entries

    def _following_step(self) -> torch.Tensor:
        """Logits of the rows that go on, from the tokens that the step before has sampled."""
        alive = self._alive()
        tokens = self._tokens
        if alive is not None and len(alive) < len(tokens):
            tokens = tokens.index_select(0, upload(alive, self._tp.device))
            self._tables.keep(alive.tolist())
        if self._inputs is None or (self._graphs is not None and self._graphs.fits(self._tables)):
            assert self._graphs is not None, "the first step of a run without graphs has left its inputs"
            return self._graphs.decode(tokens, self._tables)
        previous = replace(self._inputs, kv_cache_inputs=self._tables.next_step())
        self._inputs = self._model.prepare_next_token_inputs(tokens, previous)
        return self._model.execute(self._inputs).logits

    def _report_prompt(
        self, logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, list[LogProbabilities | None]] | None]:
        """Takes the echo rows' prompt log probabilities off; leaves one row of logits a sampling row."""
        entries = None
        pieces = torch.split_with_sizes(logits, [row.num_logits for row in self._rows])
        if self._tp.rank == 0:
            entries = {i: _prompt_entries(row, pieces[i]) for i, row in enumerate(self._rows) if row.echo}
        last = [piece[-1:] for piece, row in zip(pieces, self._rows, strict=True) if row.samples]
        return torch.cat(last or [logits[:0]]), entries

    def _sample(self, logits: torch.Tensor, should_stop: Callable[[], bool]) -> tuple[torch.Tensor, Sampled | None]:
        """(int64 [n + 1]: tokens of the batch and the word, the same on all ranks; on rank 0, what was sampled)."""
        num_rows, sampled = len(self._tables.rows), None
        message = torch.empty(num_rows + 1, dtype=torch.int64, device=self._tp.device)
        if self._sampler is not None:
            if num_rows:
                sampled = self._sampler.sample(logits, self._tables.rows.tolist())
                message[:num_rows] = sampled.tokens
            go_on = not should_stop()
            message[num_rows:].fill_(1 + self._num_announced() if go_on else 0)
            self._go_on = self._go_on and (go_on or self._tp.size > 1)
        return broadcast(message, self._tp, src=0), sampled

    def _num_announced(self) -> int:
        """Extensions that have come; asked after `should_stop`, which looks for messages."""
        return 0 if self._extensions is None else self._extensions.num_arrived(self._run_id)

    def _collect(self, launched: _Launched) -> StepOutput:
        with self._deadline:
            host: TokenArray = launched.message.wait().numpy()
        word = int(host[-1])
        self._go_on = self._go_on and word > 0
        while self._num_extended < word - 1:
            self._extend()
        rows, tokens = launched.rows, host[:-1]
        if self._some_ended:  # a row that ended while the step was under way does not count
            counted = ~self._ended[rows]
            rows, tokens = rows[counted], tokens[counted]
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if self._ends(row, token, launched.step):
                self._ended[row] = self._some_ended = True
        errors = None
        if self._sampler is not None and self._sampler.needs_host:
            errors = self._sampler.accept(rows.tolist(), tokens.tolist())
            gained = tokens != NO_TOKEN
            rows, tokens = rows[gained], tokens[gained]
            num_forced = self._sampler.num_forced(rows.tolist()) if self._tp.size == 1 else 0
            self._go_on = self._go_on and not is_outdone(num_forced, len(rows))
        indptr = _one_token_indptr(rows, len(self._rows))
        if self._forced and launched.step == 0:
            tokens, indptr = _with_forced(self._forced, rows, tokens, len(self._rows))
        output = StepOutput(launched.step, tokens, indptr, last=False, errors=errors)
        output.prompt_log_probabilities = launched.prompt_log_probabilities
        if launched.sampled is not None:
            output.log_probabilities = _of_rows(launched.sampled.log_probabilities, rows)
        while self._in_flight and self._ended[self._in_flight[0].rows].all():
            self._in_flight.popleft()
        output.last = not self._in_flight and not self._may_launch()
        return output

    def _extend(self) -> None:
        """Applies the next extension; all ranks do so when they collect the step that announces it."""
        assert self._extensions is not None, "an extension was announced to a rank that cannot get it"
        self._num_extended += 1
        extension = self._extensions.get(self._run_id, self._num_extended)
        self._num_steps = extension.num_steps
        self._max_new = extension.max_new_tokens - self._num_forced
        self._least_new = int(min(self._max_new[[row.samples for row in self._rows]], default=0))
        self._tables.grow(extension.block_tables)

    def _ends(self, row_index: int, token: int, step: int) -> bool:
        """Whether a row ends with this token, or without one (that it has no tokens left to sample is known before)."""
        row = self._rows[row_index]
        if token == NO_TOKEN:
            return True
        return token in row.stop_ids and row.generated_length + step + 1 > row.sampling_params.min_new_tokens


def _is_decode(row: RunRow) -> bool:
    """Whether a row's first step is like its following ones: one token, one row of logits."""
    return len(row.active_tokens) == 1 and row.samples and not row.echo and not row.images


def _one_token_indptr(rows: TokenArray, num_rows: int) -> TokenArray:
    """`StepOutput.indptr`, int64 [num_rows + 1], of a step that gave one token to each of `rows` (ascending)."""
    if len(rows) == num_rows:
        return np.arange(num_rows + 1, dtype=np.int64)
    indptr = np.zeros(num_rows + 1, dtype=np.int64)
    indptr[rows + 1] = 1
    return np.cumsum(indptr, dtype=np.int64)


def _with_forced(
    forced: Mapping[int, list[int]], rows: TokenArray, tokens: TokenArray, num_rows: int
) -> tuple[TokenArray, TokenArray]:
    """(`StepOutput.tokens`, `StepOutput.indptr`) where rows got their forced tokens before the sampled one."""
    sampled = dict(zip(rows.tolist(), tokens.tolist(), strict=True))
    gained = [[*forced.get(row, []), sampled[row]] if row in sampled else [] for row in range(num_rows)]
    indptr = np.cumsum([0, *map(len, gained)], dtype=np.int64)
    return np.array([token for new in gained for token in new], dtype=np.int64), indptr


def _of_rows(entries: dict[int, LogProbabilities] | None, rows: TokenArray) -> dict[int, list[LogProbabilities]] | None:
    """Entries of the one token of each of `rows`."""
    if entries is None:
        return None
    wanted = set(rows.tolist())
    return {row: [entry] for row, entry in entries.items() if row in wanted}


def _prompt_entries(row: RunRow, logits: torch.Tensor) -> list[LogProbabilities | None]:
    """Entries for the tokens that the active ones of `row` predict: logits [n, V] of its n active tokens."""
    targets = row.active_tokens[1:].tolist() + ([row.echo_next] if row.echo_next >= 0 else [])
    entries: list[LogProbabilities | None] = [None] if row.processed_length == 0 else []
    assert row.log_probabilities is not None, "echo asks for log probabilities"
    entries += prompt_logprobs(logits[: len(targets)], targets, row.log_probabilities)
    return entries

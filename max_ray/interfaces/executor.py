"""The run: one message to the workers, many steps, one output a step.

A pipeline turns contexts into a RunRequest and hands it to its executor (in this process, or a worker group). The
first step of a run is ragged: whole prompts, chunks of prompts and single decode tokens side by side. Rows that sample
continue until the run's `num_steps` are done, the row is done, or the run is interrupted at a step boundary. A row may
gain several tokens in a step, or none, and at most `max_new_tokens` in the run. Everything a worker needs is in the
message: workers keep nothing that a context cannot rebuild.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from max_ray.interfaces.context import LogProbabilities, TextContext
from max_ray.interfaces.image import PromptImage, images_within, position_offset
from max_ray.interfaces.request import SamplingParams


@dataclass(slots=True)
class RunRow:
    """One request's part of a run.

    Attributes:
        request_id: Identity of the request, as a string.
        active_tokens: int64 [n >= 1], what the first step runs; their positions start at `processed_length`.
        processed_length: Tokens that have keys and values.
        block_table: int32, covers processed_length + n + max_new_tokens - 1 tokens.
        max_new_tokens: Tokens that the row may gain in this run; 0 for a prompt chunk that is not the last.
        sampling_params: How tokens are sampled.
        stop_ids: Tokens that end the row.
        generated_length: Tokens generated before this run; numbers the random draws (0 for the first one).
        prompt_length: Tokens of the prompt.
        history: int64, prompt and generated tokens before this run; only if the sampling parameters need it.
        log_probabilities: Alternatives to report for each sampled token; None to report nothing.
        echo: Whether to report log probabilities of the active prompt tokens too.
        echo_next: The token that follows the last active one in the prompt, so that chunks join up; -1 at its end.
        images: Images of which a part is among the active tokens.
        position_offset: Position minus index of the first active token, due to images before it (see PromptImage).
    """

    request_id: str
    active_tokens: npt.NDArray[np.int64]
    processed_length: int
    block_table: npt.NDArray[np.int32]
    max_new_tokens: int
    sampling_params: SamplingParams
    stop_ids: frozenset[int]
    generated_length: int
    prompt_length: int
    history: npt.NDArray[np.int64] | None = None
    log_probabilities: int | None = None
    echo: bool = False
    echo_next: int = -1
    images: tuple[PromptImage, ...] = ()
    position_offset: int = 0

    @property
    def samples(self) -> bool:
        return self.max_new_tokens > 0

    @property
    def num_logits(self) -> int:
        """Of how many trailing active tokens logits are wanted in the first step."""
        return len(self.active_tokens) if self.echo else int(self.samples)

    @property
    def next_position_offset(self) -> int:
        """Position minus index of the token after the active ones."""
        if not self.images:
            return self.position_offset
        end = self.processed_length + len(self.active_tokens)
        return self.position_offset + position_offset(self.images, end)

    @classmethod
    def from_context(cls, context: TextContext, num_steps: int) -> RunRow:
        """The row that runs `context`'s active tokens and then up to `num_steps - 1` more."""
        params = context.sampling_params
        samples = not context.prompt_in_chunks
        echo = context.wants_prompt_log_probabilities
        return cls(
            request_id=context.request_id.value,
            active_tokens=context.active_tokens.copy(),
            processed_length=context.processed_length,
            block_table=context.block_table,
            max_new_tokens=min(num_steps, context.remaining_new_tokens) if samples else 0,
            sampling_params=params,
            stop_ids=context.stop_ids,
            generated_length=context.tokens.generated_length,
            prompt_length=context.tokens.prompt_length,
            history=context.tokens.all.copy() if params.needs_history else None,
            log_probabilities=context.log_probabilities,
            echo=echo,
            echo_next=int(context.tokens.all[context.active_end]) if echo and not samples else -1,
            images=context.images and images_within(context.images, context.processed_length, context.active_end),
            position_offset=position_offset(context.images, context.processed_length) if context.images else 0,
        )


@dataclass(slots=True)
class RunRequest:
    """One run.

    Attributes:
        run_id: Number of the run; grows.
        rows: Requests that take part.
        num_steps: Steps, at most.
    """

    run_id: int
    rows: list[RunRow]
    num_steps: int


@dataclass(slots=True)
class RunExtension:
    """More steps for the rows of a run in progress, so that it need not end while nothing changes.

    A run that has ended stays ended: its last StepOutput has said so. A row that has used up its tokens before may
    stay out until the run ends.

    Attributes:
        run_id: The run.
        number: 1, 2, .. within the run.
        num_steps: Steps of the whole run, from now on.
        max_new_tokens: int64 [rows], tokens that each row may gain in the whole run.
        block_tables: Row -> int32, block tables that have grown.
    """

    run_id: int
    number: int
    num_steps: int
    max_new_tokens: npt.NDArray[np.int64]
    block_tables: dict[int, npt.NDArray[np.int32]]


class Extensions(Protocol):
    """Where a rank finds the extensions of the run that it is in."""

    def num_arrived(self, run_id: int) -> int:
        """How many there are by now; does not wait."""

    def get(self, run_id: int, number: int) -> RunExtension:
        """Extension `number`, which another rank has got already; waits for it."""


@dataclass(slots=True)
class StepOutput:
    """Result of one step, ragged: row i is RunRequest.rows[i] and gained tokens[indptr[i]:indptr[i + 1]].

    A row that gained nothing ran a prompt chunk, has ended, or was not part of the step. After the step, every token
    of a row but the last one has keys and values.

    Attributes:
        step: Number of the step in its run, from 0.
        tokens: int64 [n], new tokens, row after row.
        indptr: int64 [rows + 1], where the tokens of each row start; indptr[rows] = n.
        last: No further step of this run follows (it is done, or was interrupted).
        log_probabilities: Row -> one entry a new token, for rows that asked.
        prompt_log_probabilities: Row -> one entry an active prompt token (None for the first token of a prompt);
            first step only.
        embeddings: float32 [rows, D], one vector a row; embeddings task only.
        errors: Row -> why it ended, without a token in this step.
    """

    step: int
    tokens: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.int64]
    last: bool
    log_probabilities: dict[int, list[LogProbabilities]] | None = None
    prompt_log_probabilities: dict[int, list[LogProbabilities | None]] | None = None
    embeddings: npt.NDArray[np.float32] | None = None
    errors: dict[int, str] | None = None


class Executor(Protocol):
    """Where runs are run. At most one run at a time is in progress; a second one waits for it."""

    def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        """Runs and yields without blocking the event loop. Raises WorkerGroupError when a worker dies."""

    def interrupt(self, run_id: int) -> None:
        """Ends the run at the next step boundary. Returns at once; a run that is over or unknown is fine."""

    @property
    def can_extend(self) -> bool:
        """Whether `extend` reaches the workers as they are now."""

    def extend(self, extension: RunExtension) -> None:
        """Hands more steps to a run that `stream` runs. Returns at once; a run that is over is fine."""


@runtime_checkable
class BlockingExecutor(Executor, Protocol):
    """An executor in this process, for callers without an event loop."""

    def execute(self, request: RunRequest) -> Iterator[StepOutput]:
        """Runs and yields, blocking."""


class Runner(Protocol):
    """What runs a RunRequest on one rank, whatever the task. Not thread-safe: one run at a time."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of this rank; 0 where the task keeps no keys and values."""

    @property
    def forward_calls(self) -> int:
        """Forward passes since the start."""

    def run(
        self,
        request: RunRequest,
        should_stop: Callable[[], bool] = lambda: False,
        extensions: Extensions | None = None,
    ) -> Generator[StepOutput]:
        """Yields one StepOutput a step. `should_stop` is asked at each step boundary, on rank 0 only."""

"""The two-method contract of every pipeline, and the inputs and outputs of text generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from max_ray.errors import StructuredOutputError
from max_ray.interfaces.context import LogProbabilities
from max_ray.interfaces.request import RequestID
from max_ray.interfaces.task import GenerationStatus


class PipelineInputs:
    """Base of what `Pipeline.execute` takes."""


@runtime_checkable
class PipelineOutput(Protocol):
    """What `Pipeline.execute` gives for one request."""

    @property
    def is_done(self) -> bool: ...


InputsT = TypeVar("InputsT", bound=PipelineInputs)
OutputT = TypeVar("OutputT", bound=PipelineOutput)
ContextT = TypeVar("ContextT")

PipelineOutputsDict = dict[RequestID, OutputT]


class Pipeline(ABC, Generic[InputsT, OutputT]):
    """A stateless orchestrator: state comes in with the inputs, and stays with them."""

    @abstractmethod
    def execute(self, inputs: InputsT) -> dict[RequestID, OutputT]:
        """Runs one batch and updates its contexts in place. Blocking."""

    @abstractmethod
    def release(self, request_id: RequestID) -> None:
        """Gives back everything held for a request. Idempotent; unknown ids are fine."""


PipelinesFactory = Callable[[], Pipeline[Any, Any]]


@dataclass
class TextGenerationInputs(PipelineInputs, Generic[ContextT]):
    """A batch to run.

    Attributes:
        batches: One entry for each data-parallel replica, of which there is one; a dict of request id to context, or
            a list of contexts (MAX's later shape).
        num_steps: Steps of the run, and tokens that it may give a request, at most.

    Raises:
        ValueError: `num_steps` is less than 1.
    """

    batches: list[dict[RequestID, ContextT]] | list[list[ContextT]]
    num_steps: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}.")

    @property
    def flat_batch(self) -> list[ContextT]:
        return [c for b in self.batches for c in (b.values() if isinstance(b, dict) else b)]

    @property
    def batch(self) -> dict[RequestID, ContextT]:
        return {c.request_id: c for c in self.flat_batch}  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return any(self.batches)


@dataclass(kw_only=True, slots=True)
class TextGenerationOutput:
    """Tokens that one request gained in a run or a step.

    Attributes:
        request_id: Identity of the request.
        tokens: New tokens; empty while its prompt is computed in chunks.
        final_status: Whether the request is active, or how it ended.
        log_probabilities: One entry for each of `tokens`, if asked for.
        prompt_log_probabilities: For `echo`, one entry for each prompt token of this chunk; None for the very first
            token, which nothing precedes.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        error: Why the request ended with the status FAILED.
    """

    request_id: RequestID
    tokens: list[int] = field(default_factory=list)
    final_status: GenerationStatus = GenerationStatus.ACTIVE
    log_probabilities: list[LogProbabilities] | None = None
    prompt_log_probabilities: list[LogProbabilities | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.final_status is not GenerationStatus.ACTIVE

    @property
    def failure(self) -> StructuredOutputError | None:
        """`error` as the exception that the request ends with."""
        return None if self.error is None else StructuredOutputError(self.error)

    def merge(self, later: TextGenerationOutput) -> None:
        """Appends what a later step gave."""
        self.tokens += later.tokens
        self.final_status = later.final_status
        self.error = self.error or later.error
        if later.log_probabilities is not None:
            self.log_probabilities = (self.log_probabilities or []) + later.log_probabilities
        if later.prompt_log_probabilities is not None:
            self.prompt_log_probabilities = (self.prompt_log_probabilities or []) + later.prompt_log_probabilities

"""What a pipeline is for."""

from __future__ import annotations

from enum import Enum


class PipelineTask(str, Enum):
    """The task of an architecture; the same name may be registered once per task."""

    TEXT_GENERATION = "text_generation"
    EMBEDDINGS_GENERATION = "embeddings_generation"
    SCORE = "score"


class GenerationStatus(str, Enum):
    """Where a request stands. Everything but ACTIVE is final."""

    ACTIVE = "active"
    END_OF_SEQUENCE = "end_of_sequence"
    MAXIMUM_LENGTH = "maximum_length"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_done(self) -> bool:
        return self is not GenerationStatus.ACTIVE

"""Words of the embeddings task: what is asked, a text on its way, and the vector that comes of it.

A text is one row of tokens and is computed in one step: nothing of it is kept for a following one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from max_ray.interfaces.pipeline import PipelineInputs
from max_ray.interfaces.request import Request, RequestID

ContextT = TypeVar("ContextT")


@dataclass(frozen=True)
class EmbeddingsGenerationRequest(Request):
    """One text (or its token ids, taken as they are, without special tokens added) to be made a vector.

    truncate: whether what exceeds the model's length is cut off; without it such an input is refused.
    """

    model_name: str = ""
    input: str | Sequence[int] = ""
    truncate: bool = False


@dataclass(frozen=True, eq=False)
class EmbeddingsContext:
    """A tokenized request. tokens: int64 [n >= 1]."""

    request_id: RequestID
    tokens: npt.NDArray[np.int64]
    model_name: str = ""


@dataclass
class EmbeddingsGenerationInputs(PipelineInputs, Generic[ContextT]):
    """Texts to embed. `batches`: one entry a data-parallel replica (here always one), as in TextGenerationInputs."""

    batches: list[dict[RequestID, ContextT]]

    @property
    def flat_batch(self) -> list[ContextT]:
        return [context for batch in self.batches for context in batch.values()]


@dataclass(frozen=True, eq=False)
class EmbeddingsGenerationOutput:
    """embeddings: float32 [D], pooled and, where the model's files say so, normalized to length 1."""

    embeddings: npt.NDArray[np.float32]

    @property
    def is_done(self) -> bool:
        return True

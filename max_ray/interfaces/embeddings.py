"""Types of the embeddings task: the request, the tokenized text, and its vector.

A text is one row of tokens and is computed in one step; no state is kept for another step.
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
    """One text to embed.

    Attributes:
        model_name: The model that the request names.
        input: The text, or its token ids, to which no special tokens are added.
        truncate: Whether tokens beyond the model's length are cut off. If not, such an input is refused.
    """

    model_name: str = ""
    input: str | Sequence[int] = ""
    truncate: bool = False


@dataclass(frozen=True)
class ScoreRequest(Request):
    """A query and a document, to be scored together.

    Attributes:
        model_name: The model that the request names.
        query: The first text.
        document: The second text.
        max_tokens: Tokens of the pair beyond which it is cut; None: a pair that is too long is refused.
        instruction: What a document must do to match, for models that are told; None: their default.
    """

    model_name: str = ""
    query: str = ""
    document: str = ""
    max_tokens: int | None = None
    instruction: str | None = None


@dataclass(frozen=True, eq=False)
class EmbeddingsContext:
    """A tokenized request.

    Attributes:
        request_id: Identity of the request.
        tokens: int64 [n >= 1].
        model_name: The model that the request names.
    """

    request_id: RequestID
    tokens: npt.NDArray[np.int64]
    model_name: str = ""


@dataclass
class EmbeddingsGenerationInputs(PipelineInputs, Generic[ContextT]):
    """Texts to embed.

    Attributes:
        batches: One entry for each data-parallel replica, of which there is one.
    """

    batches: list[dict[RequestID, ContextT]]

    @property
    def flat_batch(self) -> list[ContextT]:
        return [context for batch in self.batches for context in batch.values()]


@dataclass(frozen=True, eq=False)
class EmbeddingsGenerationOutput:
    """The vector of one text.

    Attributes:
        embeddings: float32 [D], pooled and, if the model's files say so, normalized to length 1.
    """

    embeddings: npt.NDArray[np.float32]

    @property
    def is_done(self) -> bool:
        return True

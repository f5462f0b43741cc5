"""`POST /v1/embeddings`: the request, its way through the engine, and the answer, for HTTP and for a Python handle."""

from __future__ import annotations

import base64
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from deployments.answer import check_model, check_task
from deployments.engine import Engine
from deployments.openai import StrictModel, is_prompt_list
from max_ray.embeddings_tokenizer import EmbeddingsTokenizer
from max_ray.errors import InputError
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationOutput,
    EmbeddingsGenerationRequest,
    PipelineTask,
    RequestID,
)

MAX_INPUTS = 2048
"""Texts of one request, as of the OpenAI API."""

Vector = npt.NDArray[np.float32]


class EmbeddingsRequest(StrictModel):
    """The body. `truncate` is ours: what exceeds the model's length is cut off instead of refused."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    truncate: bool = False

    @field_validator("input", mode="plain")
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        if not isinstance(value, str) and not (isinstance(value, list) and value and is_prompt_list(value)):
            raise ValueError(
                "must be a text, a list of texts, a list of token ids or a list of such lists; none of them empty"
            )
        return value

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one an entry."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else list(self.input)


async def embed(engine: Engine, request: EmbeddingsRequest, arrival: float | None = None) -> dict[str, Any]:
    """The answer object. `arrival`: perf_counter() when the request came, for the metrics. Cancelling it ends the job.

    Raises InputError (ModelNotServedError, InputTooLongError), QueueFullError, WorkerGroupError.
    """
    arrival = perf_counter() if arrival is None else arrival
    check_model(engine, request.model)
    check_task(engine, PipelineTask.EMBEDDINGS_GENERATION)
    check_dimensions(request.dimensions, engine.embedding_size)
    contexts = await _contexts(engine, request)
    num_tokens = sum(len(context.tokens) for context in contexts)
    work = engine.embed(contexts)
    engine.metrics.prompt_tokens += num_tokens
    outputs: list[EmbeddingsGenerationOutput] = await work
    return _answer(engine.model_name, request, [output.embeddings for output in outputs], num_tokens)


def check_dimensions(dimensions: int | None, embedding_size: int | None) -> None:
    """Raises InputError for more numbers than the model's vectors have."""
    if dimensions is not None and embedding_size is not None and not 1 <= dimensions <= embedding_size:
        raise InputError(
            f"dimensions={dimensions} is not possible: this model's vectors have {embedding_size} numbers. "
            f"Give a number from 1 to {embedding_size}, or leave it out.",
            param="dimensions",
        )


def shortened(vector: Vector, dimensions: int | None) -> Vector:
    """The first `dimensions` numbers, scaled to length 1 again (as of models trained for it: Kusupati et al. 2022,
    Matryoshka); None: the vector as it is."""
    if dimensions is None:
        return vector
    head = vector[:dimensions]
    return head / max(float(np.linalg.norm(head)), 1e-12)


async def _contexts(engine: Engine, request: EmbeddingsRequest) -> list[EmbeddingsContext]:
    """Tokenizes and checks everything. Raises InputError, which says which of several inputs is at fault."""
    tokenizer = engine.tokenizer
    assert isinstance(tokenizer, EmbeddingsTokenizer), f"{type(tokenizer).__name__} makes no contexts of this task"
    inputs = request.inputs
    if len(inputs) > MAX_INPUTS:
        raise InputError(
            f"{len(inputs)} inputs are more than {MAX_INPUTS} in one request. Send several requests.", param="input"
        )
    contexts = []
    for index, text in enumerate(inputs):
        try:
            one = EmbeddingsGenerationRequest(RequestID(), engine.model_name, text, request.truncate)
            contexts.append(await tokenizer.new_context(one))
        except InputError as error:
            if len(inputs) > 1:
                error.args = (f"input[{index}]: {error}",)
            raise
    return contexts


def _answer(model: str, request: EmbeddingsRequest, vectors: list[Vector], num_tokens: int) -> dict[str, Any]:
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encoded(shortened(vector, request.dimensions), request.encoding_format),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Vector, encoding_format: str) -> list[float] | str:
    """base64: of the little-endian float32 numbers."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers

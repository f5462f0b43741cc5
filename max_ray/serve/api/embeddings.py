"""`POST /v1/embeddings`: the request, its way through the engine, and the answer, for HTTP and for a Python handle."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from max_ray.errors import InputError, InputTooLongError
from max_ray.interfaces import EmbeddingsContext, EmbeddingsGenerationRequest, PipelineTask, RequestID
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.answer import check_model, check_task
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.neutral_fields import EMBEDDINGS, EMBEDDINGS_INSTEAD
from max_ray.serve.api.objects.openai import EmbeddingList, EmbeddingObject, InputUsage
from max_ray.serve.api.openai import LabelledRequest, PromptField, checked_prompt, least_tokens, prompts_of
from max_ray.serve.api.request_fields import Neutral
from max_ray.tokenization.embeddings_tokenizer import EmbeddingsTokenizer
from max_ray.tokenization.tokenizer import INLINE_CHARACTERS

MAX_INPUTS = 2048
"""Texts of one request, as of the OpenAI API."""

_INLINE_NUMBERS = 16_384  # of an answer: some milliseconds of writing

Vector = npt.NDArray[np.float32]


class EmbeddingsRequest(LabelledRequest):
    """The body. `truncate` is ours: what exceeds the model's length is cut off instead of refused."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = EMBEDDINGS
    INSTEAD: ClassVar[Mapping[str, str]] = EMBEDDINGS_INSTEAD

    input: PromptField
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    truncate: bool = False

    @field_validator("input", mode="plain")
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        return checked_prompt(value)

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one an entry."""
        return prompts_of(self.input)

    def refuse_hopeless(self, max_length: int) -> None:
        longest = max(map(least_tokens, self.inputs))
        if longest > max_length and not self.truncate:
            raise InputTooLongError(longest, max_length, at_least=True)


@dataclass(frozen=True)
class EmbeddingsJob:
    """Checked and tokenized texts, and how their vectors are wanted. Take one of `answer` and `json`.

    labels: what the client wrote on its request (`LabelledRequest`).
    """

    engine: Engine
    contexts: list[EmbeddingsContext]
    encoding_format: str
    dimensions: int | None
    labels: Mapping[str, Any]

    async def answer(self) -> EmbeddingList:
        """The answer object. Cancelling it ends the job. Raises QueueFullError, WorkerGroupError."""
        vectors = await self._vectors()
        data = [self._entry(index, vector) for index, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": self.engine.model_name, "usage": self._usage}

    async def json(self) -> bytes:
        """The same as JSON. Millions of numbers are written in a thread."""
        vectors = await self._vectors()
        is_short = sum(map(len, vectors)) <= _INLINE_NUMBERS
        return self._written(vectors) if is_short else await asyncio.to_thread(self._written, vectors)

    async def _vectors(self) -> list[Vector]:
        work = self.engine.embed(self.contexts)
        self.engine.metrics.prompt_tokens += self._num_tokens
        return [shortened(output.embeddings, self.dimensions) for output in await work]

    def _written(self, vectors: list[Vector]) -> bytes:
        """A vector at a time: the encoder holds the interpreter's lock as long as it runs."""
        data = ",".join(_compact(self._entry(index, vector)) for index, vector in enumerate(vectors))
        end = f'],"model":{_compact(self.engine.model_name)},"usage":{_compact(self._usage)}}}'
        return f'{{"object":"list","data":[{data}{end}'.encode()

    def _entry(self, index: int, vector: Vector) -> EmbeddingObject:
        return {"object": "embedding", "index": index, "embedding": _encoded(vector, self.encoding_format)}

    @property
    def _num_tokens(self) -> int:
        return sum(len(context.tokens) for context in self.contexts)

    @property
    def _usage(self) -> InputUsage:
        return {"prompt_tokens": self._num_tokens, "total_tokens": self._num_tokens}


async def open_job(engine: Engine, request: EmbeddingsRequest) -> EmbeddingsJob:
    """Checks and tokenizes. Raises InputError (ModelNotServedError, InputTooLongError)."""
    check_model(engine, request.model)
    check_task(engine, PipelineTask.EMBEDDINGS_GENERATION)
    check_dimensions(request.dimensions, engine.embedding_size)
    contexts = await _contexts(engine, request)
    CALLER.get().usage.add_tokens(sum(len(context.tokens) for context in contexts))
    return EmbeddingsJob(engine, contexts, request.encoding_format, request.dimensions, request.labels)


async def embed(engine: Engine, request: EmbeddingsRequest) -> EmbeddingList:
    """The answer object. Cancelling it ends the job.

    Raises InputError (ModelNotServedError, InputTooLongError), QueueFullError, WorkerGroupError.
    """
    return await (await open_job(engine, request)).answer()


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
    num_characters = 0
    for index, text in enumerate(inputs):
        num_characters += len(text)
        if num_characters > INLINE_CHARACTERS:  # each may be short, and all together take seconds
            num_characters = 0
            await asyncio.sleep(0)
        try:
            one = EmbeddingsGenerationRequest(RequestID(), engine.model_name, text, request.truncate)
            contexts.append(await tokenizer.new_context(one))
        except InputError as error:
            if len(inputs) > 1:
                error.args = (f"input[{index}]: {error}",)
            raise
    return contexts


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _encoded(vector: Vector, encoding_format: str) -> list[float] | str:
    """base64: of the little-endian float32 numbers."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers

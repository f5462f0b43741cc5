"""`/v1/score` and `/v1/rerank`: requests, their way through the engine, and the answers, as vLLM and Jina have them.

A cross-encoder or reranker reads the two texts together. Of an embedding model the score is the cosine of the two
vectors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from max_ray.errors import InputError
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationRequest,
    PipelineTask,
    RequestID,
    ScoreRequest,
)
from max_ray.serve.api.answer import check_model, check_task
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.neutral_fields import SCORES
from max_ray.serve.api.objects.openai import InputUsage, RankedDocument, RerankResult, ScoreList, ScoreObject
from max_ray.serve.api.openai import LabelledRequest
from max_ray.serve.api.request_fields import Neutral, StrictModel
from max_ray.serve.api.scope import CLIENT_CLOSED
from max_ray.serve.api.sse import ClientGoneError, until_disconnect
from max_ray.tokenization.embeddings_tokenizer import EmbeddingsTokenizer
from max_ray.tokenization.pair_tokenizer import PairTokenizer
from max_ray.tokenization.tokenizer import INLINE_CHARACTERS

MAX_PAIRS = 2048
RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")
SCORE_PATHS = ("/v1/score", "/score")


class PairFields(LabelledRequest):
    """What both requests have."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = SCORES

    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    instruction: str | None = None

    def refuse_hopeless(self, max_length: int) -> None:
        """Texts may be cut: their length is checked where they are tokenized."""


class ScoreBody(PairFields):
    """The body of `/v1/score`: one text against one or many, or two lists of equal length."""

    text_1: str | list[str]
    text_2: str | list[str]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Raises InputError for lists of other lengths."""
        first, second = _as_list(self.text_1, "text_1"), _as_list(self.text_2, "text_2")
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InputError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give one text_1, or as many as text_2 has.",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


class Document(StrictModel):
    """A document as an object."""

    text: str


class RerankBody(PairFields):
    """The body of `/v1/rerank`. top_n: 0 for all."""

    query: str
    documents: list[str | Document] = Field(json_schema_extra={"minItems": 1, "maxItems": MAX_PAIRS})
    top_n: int = Field(default=0, ge=0)
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """The documents. Raises InputError where there are none, or too many."""
        texts = [document if isinstance(document, str) else document.text for document in self.documents]
        return _as_list(texts, "documents")


def _as_list(texts: str | list[str], name: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not 1 <= len(texts) <= MAX_PAIRS:
        raise InputError(f"{name} must have from 1 to {MAX_PAIRS} texts, not {len(texts)}.", param=name)
    return texts


@dataclass(frozen=True)
class Scores:
    """Scores of pairs, in order, and how many tokens they took."""

    values: list[float]
    num_tokens: int

    @property
    def usage(self) -> InputUsage:
        """OpenAI's object."""
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}


async def scores_of(
    engine: Engine, pairs: Sequence[tuple[str, str]], request: PairFields, names: tuple[str, str]
) -> Scores:
    """The scores of pairs. Cancelling it ends the work.

    Args:
        engine: What computes.
        pairs: Query and document of each.
        request: Says how long texts are cut.
        names: What the request calls the two texts.

    Raises:
        InputError: A text is at fault, or the model is for another task. Also QueueFullError, WorkerGroupError.
    """
    check_model(engine, request.model)
    if engine.task is PipelineTask.EMBEDDINGS_GENERATION:
        return await _cosines(engine, pairs, request, names)
    check_task(engine, PipelineTask.SCORE)
    tokenizer = engine.tokenizer
    assert isinstance(tokenizer, PairTokenizer), f"{type(tokenizer).__name__} makes no contexts of this task"
    limit = _limit(request, tokenizer.max_length)
    contexts = []
    breaks = _Breaks()
    for index, (query, document) in enumerate(pairs):
        await breaks.after(len(query) + len(document))
        one = ScoreRequest(RequestID(), engine.model_name, query, document, limit, request.instruction)
        try:
            contexts.append(await tokenizer.new_context(one))
        except InputError as error:
            raise _placed(error, f"{names[1]}[{index}]") from None
    outputs = await _computed(engine, contexts)
    return Scores([float(vector[0]) for vector in outputs], sum(len(context.tokens) for context in contexts))


async def _cosines(
    engine: Engine, pairs: Sequence[tuple[str, str]], request: PairFields, names: tuple[str, str]
) -> Scores:
    """Of an embedding model. A text that is in several pairs is computed once."""
    if request.instruction is not None:
        raise InputError("An embedding model takes no instruction. Leave it out.", param="instruction")
    tokenizer = engine.tokenizer
    assert isinstance(tokenizer, EmbeddingsTokenizer), f"{type(tokenizer).__name__} makes no contexts of this task"
    limit = _limit(request, tokenizer.max_length)
    if limit is not None and limit < tokenizer.max_length:
        raise InputError(
            f"An embedding model cuts texts at its own length: truncate_prompt_tokens can be -1 or "
            f"{tokenizer.max_length}.",
            param="truncate_prompt_tokens",
        )
    contexts: dict[str, EmbeddingsContext] = {}
    breaks = _Breaks()
    for index, pair in enumerate(pairs):
        for name, text in zip(names, pair, strict=True):
            if text in contexts:
                continue
            await breaks.after(len(text))
            one = EmbeddingsGenerationRequest(RequestID(), engine.model_name, text, limit is not None)
            try:
                contexts[text] = await tokenizer.new_context(one)
            except InputError as error:
                raise _placed(error, f"{name}[{index}]") from None
    outputs = await _computed(engine, list(contexts.values()))
    units = {
        text: vector / max(float(np.linalg.norm(vector)), 1e-12) for text, vector in zip(contexts, outputs, strict=True)
    }
    num_tokens = sum(len(context.tokens) for context in contexts.values())
    return Scores([float(units[first] @ units[second]) for first, second in pairs], num_tokens)


async def _computed(engine: Engine, contexts: Sequence[EmbeddingsContext]) -> list[Any]:
    work = engine.embed(contexts)
    engine.metrics.prompt_tokens += sum(len(context.tokens) for context in contexts)
    return [output.embeddings for output in await work]


class _Breaks:
    """Lets others run now and then: each text may be short, and all together take seconds."""

    def __init__(self) -> None:
        self._num_characters = 0

    async def after(self, num_characters: int) -> None:
        """Notes so many characters more."""
        self._num_characters += num_characters
        if self._num_characters > INLINE_CHARACTERS:
            self._num_characters = 0
            await asyncio.sleep(0)


def _limit(request: PairFields, max_length: int) -> int | None:
    """Tokens at which a pair is cut; None: it is refused where it is too long. Raises InputError."""
    limit = request.truncate_prompt_tokens
    if limit is not None and (limit == 0 or limit > max_length):
        raise InputError(
            f"truncate_prompt_tokens must be -1 or a number from 1 to {max_length}, not {limit}.",
            param="truncate_prompt_tokens",
        )
    return max_length if limit == -1 else limit


def _placed(error: InputError, place: str) -> InputError:
    """The error with the text's place in it, unless it is about another field."""
    if error.param in (None, "input", "prompt"):
        error.args = (f"{place}: {error}",)
        error.param = place
    return error


async def score(engine: Engine, body: ScoreBody) -> ScoreList:
    """The answer object of `/v1/score`. Raises what `scores_of` raises."""
    found = await scores_of(engine, body.pairs, body, ("text_1", "text_2"))
    data: list[ScoreObject] = [{"index": i, "object": "score", "score": value} for i, value in enumerate(found.values)]
    return {
        "id": f"score-{RequestID()}",
        "object": "list",
        "created": int(time.time()),
        "model": engine.model_name,
        "data": data,
        "usage": found.usage,
    }


async def rerank(engine: Engine, body: RerankBody) -> RerankResult:
    """The answer object of `/v1/rerank`: the best documents first. Raises what `scores_of` raises."""
    texts = body.texts
    found = await scores_of(engine, [(body.query, text) for text in texts], body, ("query", "documents"))
    order = sorted(range(len(texts)), key=lambda i: -found.values[i])[: body.top_n or None]
    results: list[RankedDocument] = [{"index": i, "relevance_score": found.values[i]} for i in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    return {"id": f"rerank-{RequestID()}", "model": engine.model_name, "usage": found.usage, "results": results}


def add_score_routes(api: FastAPI, context: ApiContext) -> None:
    """Adds the routes of scores to an application."""

    async def on_score(request: Request) -> Response:
        try:
            async with context.parsed(request, ScoreBody) as body:
                work = score(context.engine, body)
                return JSONResponse(await until_disconnect(request.receive, work))
        except (ClientDisconnect, ClientGoneError):
            return Response(status_code=CLIENT_CLOSED)

    async def on_rerank(request: Request) -> Response:
        try:
            async with context.parsed(request, RerankBody) as body:
                work = rerank(context.engine, body)
                return JSONResponse(await until_disconnect(request.receive, work))
        except (ClientDisconnect, ClientGoneError):
            return Response(status_code=CLIENT_CLOSED)

    for path in SCORE_PATHS:
        api.add_api_route(path, on_score, methods=["POST"])
    for path in RERANK_PATHS:
        api.add_api_route(path, on_rerank, methods=["POST"])

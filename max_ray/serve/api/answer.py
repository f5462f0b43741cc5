"""A typed request answered, streamed or whole: the one path behind HTTP and behind a Python handle."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from max_ray.errors import InputError, ModelNotServedError, nearest, quoted
from max_ray.interfaces import PipelineTask, RequestID
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.chat_preparation import fitted
from max_ray.serve.api.choice import ParsedDelta, TokenEntry
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.formats import AnswerFormat, ChatFormat, CompletionFormat, FormatOptions
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.infill import with_infill
from max_ray.serve.api.openai import RESUMABLE, ChatCompletionRequest, CompletionRequest, GenerationJob
from max_ray.serve.api.parsed_choice import ParsedChoice
from max_ray.serve.api.parsed_format import ParsedChatFormat
from max_ray.serve.api.prompt_logprobs import with_prompt_logprobs
from max_ray.serve.api.request_log import server_timing
from max_ray.serve.api.sse import DONE, encode_event
from max_ray.tokenization.token_bytes import token_text_of

Report = Callable[[dict[str, Any]], dict[str, Any]]
"""Adds to an answer object."""
_INLINE_ITEMS = 256  # messages, parts or prompts of one request: less than a millisecond


class Answer:
    """A request that has been admitted. Take one of `events`, `chunks` and `whole`, and always `close`.

    report: adds what a whole answer tells beside its choices.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, form: AnswerFormat, *, include_usage: bool, report: Report | None = None
    ) -> None:
        self._report = report
        self._generation = generation
        self._form = form
        self._include_usage = include_usage

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, those that belong together as one piece to write. Raises WorkerGroupError."""
        event = self._form.event
        async for deltas in self._generation.deltas():
            yield event(deltas[0]) if len(deltas) == 1 else b"".join(map(event, deltas))
        if self._include_usage:
            yield encode_event(self._form.usage_chunk(self._generation.usage))
        yield DONE

    async def numbered_events(self) -> AsyncGenerator[tuple[int, bytes]]:
        """Server-sent events one by one, each with the number of the choice that it is counted for; those behind the
        last choice's end are counted for the first choice. Raises WorkerGroupError."""
        event = self._form.event
        async for deltas in self._generation.deltas():
            for delta in deltas:
                for block in event(delta).split(b"\n\n")[:-1]:
                    yield delta.index, block + b"\n\n"
        if self._include_usage:
            yield 0, encode_event(self._form.usage_chunk(self._generation.usage))
        yield 0, DONE

    def failure(self, content: Mapping[str, Any]) -> bytes | None:
        """None: a stream that fails ends with the error object."""
        return None

    @property
    def server_timing(self) -> str:
        """See AdmittedAnswer."""
        return server_timing(self._generation)

    async def chunks(self) -> AsyncGenerator[str]:
        """The same as JSON texts. Raises WorkerGroupError."""
        async for deltas in self._generation.deltas():
            for chunk in (chunk for delta in deltas for chunk in self._form.chunks(delta)):
                yield chunk
        if self._include_usage:
            yield self._form.usage_chunk(self._generation.usage)

    async def whole(self) -> dict[str, Any]:
        """The answer object. Raises WorkerGroupError."""
        choices = [choice.empty_delta() for choice in self._generation.choices]
        texts: list[list[str]] = [[] for _ in choices]
        tokens: list[list[TokenEntry]] = [[] for _ in choices]
        async for deltas in self._generation.deltas():
            for delta in deltas:
                choice = choices[delta.index]
                texts[delta.index].append(delta.text)
                if delta.tokens is not None:
                    choice.tokens = tokens[delta.index]
                    choice.tokens += delta.tokens
                if delta.token_ids is not None:
                    choice.token_ids = (choice.token_ids or []) + delta.token_ids
                if isinstance(delta, ParsedDelta) and isinstance(choice, ParsedDelta):
                    choice.events += delta.events
                choice.finish_reason = delta.finish_reason
        for choice, pieces in zip(choices, texts, strict=True):
            choice.text = "".join(pieces)
        answer = self._form.answer(self._generation.best(choices), self._generation.usage)
        return answer if self._report is None else self._report(answer)

    def close(self) -> None:
        """Cancels what still runs."""
        self._generation.close()


async def open_answer(
    engine: Engine, request: CompletionRequest | ChatCompletionRequest, arrival: float | None = None
) -> Answer:
    """Checks, tokenizes and submits. `arrival`: perf_counter() when the request came, for the metrics.

    Raises InputError (ModelNotServedError, PromptTooLongError), QueueFullError, InsufficientBlocksError.
    """
    generation = await prepared_generation(engine, request, arrival)
    generation.start()
    return new_answer(engine, request, generation, new_answer_id(request), int(time.time()))


def new_answer_id(request: CompletionRequest | ChatCompletionRequest) -> str:
    """The id of the answer to a request."""
    prefix = "chatcmpl" if isinstance(request, ChatCompletionRequest) else "cmpl"
    return f"{prefix}-{request.request_id or RequestID()}"


def new_answer(
    engine: Engine,
    request: CompletionRequest | ChatCompletionRequest,
    generation: Generation,
    answer_id: str,
    created: int,
) -> Answer:
    """The answer of a generation that has been started.

    Args:
        engine: Serves the model.
        request: What was asked.
        generation: Of the request.
        answer_id: Id of the answer.
        created: Unix time of the answer.
    """
    generation.name_answer(answer_id)
    form = _format_of(request, generation)(
        answer_id,
        created,
        engine.model_name,
        token_text_of(engine.tokenizer),
        _format_options(request, generation),
    )
    report = None if request.prompt_logprobs is None else _report_of(engine, request, generation)
    return Answer(generation, form, include_usage=request.include_usage, report=report)


def _report_of(engine: Engine, request: CompletionRequest | ChatCompletionRequest, generation: Generation) -> Report:
    """What adds the log probabilities of the prompt to a whole answer."""
    return partial(
        with_prompt_logprobs,
        choices=generation.choices,
        tokens=token_text_of(engine.tokenizer),
        num_top=request.prompt_logprobs or 0,
        is_chat=isinstance(request, ChatCompletionRequest),
    )


async def prepared_generation(
    engine: Engine, request: CompletionRequest | ChatCompletionRequest, arrival: float | None = None
) -> Generation:
    """The generation of a request, checked and tokenized: what an answer of any dialect is made of.

    Raises InputError (ModelNotServedError, PromptTooLongError).
    """
    return (await prepared(engine, request, arrival))[1]


async def prepared(
    engine: Engine, request: CompletionRequest | ChatCompletionRequest, arrival: float | None = None
) -> tuple[GenerationJob, Generation]:
    """The same with the checked request. Raises the same."""
    check_model(engine, request.model)
    check_task(engine, PipelineTask.TEXT_GENERATION)
    job = await with_infill(await _job(engine, request), engine)
    return job, await Generation.prepare(engine, job, arrival)


def _format_options(request: CompletionRequest | ChatCompletionRequest, generation: Generation) -> FormatOptions:
    return FormatOptions(
        includes_usage=request.include_usage,
        usage=(lambda: generation.usage) if request.continuous_usage else None,
        timings=(lambda: generation.timings) if request.timings_per_token else None,
        prompt_ids=generation.prompt_ids if request.return_token_ids else None,
        names_tokens_by_id=request.return_tokens_as_token_ids,
        prefix=request.echoed if isinstance(request, ChatCompletionRequest) else "",
    )


def _format_of(request: CompletionRequest | ChatCompletionRequest, generation: Generation) -> type[AnswerFormat]:
    if isinstance(request, CompletionRequest):
        return CompletionFormat
    return ParsedChatFormat if isinstance(generation.choices[0], ParsedChoice) else ChatFormat


async def _job(engine: Engine, request: CompletionRequest | ChatCompletionRequest) -> GenerationJob:
    """Raises InputError for what contradicts itself or cannot fit. What has many parts is taken apart in a thread."""

    def checked() -> GenerationJob:
        request.refuse_hopeless(engine.tokenizer.max_length)
        return fitted(request.job(), engine)

    return checked() if request.num_items <= _INLINE_ITEMS else await asyncio.to_thread(checked)


async def generate(engine: Engine, request: CompletionRequest | ChatCompletionRequest) -> AsyncIterator[dict[str, Any]]:
    """For Python handles: the chunk objects when `request.stream`, else the one answer object. Errors are raised."""
    if request.timeout is not None:
        raise InputError("timeout is a field of HTTP requests: cancel the handle's response instead.", param="timeout")
    if request.is_resumable:
        raise InputError("A handle's stream cannot be resumed: leave resumable out.", param=RESUMABLE)
    answer = await open_answer(engine, request)
    try:
        if not request.stream:
            yield await answer.whole()
            return
        async for chunk in answer.chunks():
            yield json.loads(chunk)
    finally:
        answer.close()


def check_model(engine: Engine, model: str | None) -> None:
    """Raises ModelNotServedError for any name but the served one and its aliases, ForbiddenError where the key may not
    use it."""
    if model is not None and model != engine.model_name and model not in engine.model_aliases:
        hint = nearest(model, [engine.model_name, *engine.model_aliases])
        raise ModelNotServedError(
            f"The model {quoted(model)} is not served here.{hint} This server serves {engine.model_name!r}.",
            param="model",
        )
    CALLER.get().check_model(engine.model_name)


def check_task(engine: Engine, task: PipelineTask) -> None:
    """Raises InputError where the served model is for another task, with the route that is its own."""
    if engine.task is task:
        return
    if engine.task is PipelineTask.SCORE:
        raise InputError(
            f"The model {engine.model_name!r} scores pairs of texts: use /v1/score or /v1/rerank.", param="model"
        )
    if task is PipelineTask.SCORE:
        raise InputError(
            f"The model {engine.model_name!r} generates text and scores no pairs: use /v1/chat/completions or "
            f"/v1/completions, or serve it with --task score where its family can do that.",
            param="model",
        )
    if engine.task is PipelineTask.EMBEDDINGS_GENERATION:
        raise InputError(
            f"The model {engine.model_name!r} makes embeddings and generates no text: use /v1/embeddings.",
            param="model",
        )
    raise InputError(
        f"The model {engine.model_name!r} generates text and is not served for embeddings: use /v1/chat/completions or "
        f"/v1/completions, or serve it with --task embeddings_generation where its family can do that.",
        param="model",
    )

"""A resumable request as bytes, and a generation made of them again at another replica."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from time import perf_counter

from max_ray.errors import InputError
from max_ray.interfaces import GenerationStatus, RequestID, TextContext, TextGenerationOutput
from max_ray.interfaces.trace import RequestTrace
from max_ray.serve.api.choice import Choice, PromptEcho
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.openai import RESUMABLE, ChatCompletionRequest, CompletionRequest, GenerationJob
from max_ray.serve.api.parsed_choice import made_choice
from max_ray.serve.api.streams.choice_log import ChoiceLog, single_tokens, token_bytes

TextRequest = CompletionRequest | ChatCompletionRequest
Notes = Callable[[int, TextGenerationOutput], None]
"""Takes what the engine gave: number of the choice, output."""
_YIELD_EVERY = 64
"""Tokens of a replay in one turn of the event loop."""
_CONTEXT_BYTES = 4096


@dataclass(frozen=True)
class Snapshot:
    """What a replica needs to make a stream again.

    Args:
        answer_id: Id of the answer, and of the stream.
        created: When it began, in seconds of Unix time.
        request: The request, without its prompt.
        job: The same, checked and fitted to the model.
        contexts: Of the choices, before the first token: prompt tokens and sampling parameters with their seeds.
        echo: What is given back of the prompts.
    """

    answer_id: str
    created: int
    request: TextRequest
    job: GenerationJob
    contexts: list[TextContext]
    echo: list[PromptEcho | None]

    @classmethod
    def of(
        cls, request: TextRequest, job: GenerationJob, generation: Generation, answer_id: str, created: int
    ) -> Snapshot:
        """Of a request whose generation has not begun."""
        contexts = [choice.context for choice in generation.choices]
        echo = [choice.echo for choice in generation.choices]
        return cls(answer_id, created, _short(request), replace(job, prompts=(), messages=()), contexts, echo)

    @property
    def num_bytes(self) -> int:
        """Most bytes of memory that its tokens take in a journal."""
        return sum(
            _CONTEXT_BYTES
            + context.remaining_new_tokens * token_bytes(context.log_probabilities)
            + _echo_bytes(context)
            for context in self.contexts
        )

    def pack(self) -> bytes:
        """As bytes."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def unpack(data: bytes) -> Snapshot:
        """What `pack`, in a replica of this application, made."""
        snapshot = pickle.loads(data)
        assert isinstance(snapshot, Snapshot)
        return snapshot


class ResumedGeneration(Generation):
    """A generation that begins with tokens of another one. Those are not counted again.

    Args:
        engine: Goes on with it.
        snapshot: Of the request.
        logs: Of the choices, so far.
        is_ended: Whether nothing is left to generate.
    """

    def __init__(self, engine: Engine, snapshot: Snapshot, logs: list[ChoiceLog], *, is_ended: bool) -> None:
        self._num_replayed = [len(log.tokens) for log in logs]
        choices = [_choice(engine, snapshot, index, log, is_ended=is_ended) for index, log in enumerate(logs)]
        super().__init__(engine, choices, snapshot.job, perf_counter())
        for choice in choices:
            choice.context.deadline = None

    def start(self) -> None:
        """Submits the choices that have not ended, or none. Raises QueueFullError, InsufficientBlocksError,
        InputError."""
        pending = [choice for choice in self.choices if not choice.context.is_done]
        try:
            for num_left, choice in zip(reversed(range(len(pending))), pending, strict=True):
                choice.context.num_siblings = num_left
                choice.stream = self._engine.submit(choice.context)
        except BaseException:
            self.close()
            raise
        self._is_started = True

    def _observe(self, choice: Choice, output: TextGenerationOutput) -> None:
        if choice.num_tokens >= self._num_replayed[choice.index]:
            super()._observe(choice, output)


def tapped(stream: AsyncIterator[TextGenerationOutput], index: int, note: Notes) -> AsyncIterator[TextGenerationOutput]:
    """A stream's outputs, one token each, and noted.

    Args:
        stream: Of the engine.
        index: Number of the choice.
        note: Is called with each output first.
    """

    async def outputs() -> AsyncIterator[TextGenerationOutput]:
        async for output in stream:
            note(index, output)
            for single in single_tokens(output):
                yield single

    return outputs()


async def replayed(
    outputs: Iterable[TextGenerationOutput], rest: AsyncIterator[TextGenerationOutput] | None
) -> AsyncIterator[TextGenerationOutput]:
    """Outputs of a log, and then those of the engine.

    Args:
        outputs: Of the log.
        rest: Of the engine; None: nothing follows.
    """
    for number, output in enumerate(outputs, start=1):
        if not number % _YIELD_EVERY:
            await asyncio.sleep(0)
        yield output
    if rest is not None:
        async for output in rest:
            yield output


def check_resumable(request: TextRequest, *, has_deadline: bool) -> None:
    """Raises InputError where the request asks for what ends a stream by the clock."""
    if request.text_options.time_limit_s is not None:
        raise InputError(
            "A resumable stream has the same text wherever it goes on, and t_max_predict_ms ends a text by the clock. "
            "Leave one of them out.",
            param=RESUMABLE,
        )
    if has_deadline:
        raise InputError(
            "A resumable stream outlives its connection, and a time-out ends it. Leave one of them out.",
            param=RESUMABLE,
        )


def _choice(engine: Engine, snapshot: Snapshot, index: int, log: ChoiceLog, *, is_ended: bool) -> Choice:
    context, job = snapshot.contexts[index], snapshot.job
    if job.chat is not None:  # before the context has tokens: it looks at the prompt's end
        choice = made_choice(index, context, engine.tokenizer, engine.parsers, job)
    else:
        choice = Choice(index, context, engine.tokenizer, job, snapshot.echo[index])
    _advance(context, log)
    if is_ended and not context.is_done:  # a stop string or a parser ended it
        context.status = GenerationStatus.CANCELLED
    return choice


def _advance(context: TextContext, log: ChoiceLog) -> None:
    """The context as it was when the log's last token came, with nothing in the KV cache."""
    context.request_id, context.trace = RequestID(), RequestTrace()
    context.extend(log.tokens)
    if log.tokens:
        context.echoed_length = context.tokens.prompt_length
    else:
        log.prompt_entries = []  # they come again
    if log.status is not GenerationStatus.ACTIVE:
        context.status = log.status
    context.reset()


def _short(request: TextRequest) -> TextRequest:
    if isinstance(request, CompletionRequest):
        return request.model_copy(update={"prompt": ""})
    return request.model_copy(update={"messages": request.messages[-1:] if request.echo else [], "tools": None})


def _echo_bytes(context: TextContext) -> int:
    if not context.log_probabilities_echo:
        return 0
    return context.tokens.prompt_length * token_bytes(context.log_probabilities)

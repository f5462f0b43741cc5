"""The contract of a dialect: an HTTP API in another server's words over the same generation.

A dialect has a model of its requests that translates itself to OpenAI's chat or completion request, and a formatter
that tells the answer. Everything between the two is shared, so whatever a chat request honours, each dialect does.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from max_ray.errors import InputError
from max_ray.serve.api.answer import prepared_generation
from max_ray.serve.api.choice import ChoiceDelta
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest, validated
from max_ray.serve.api.request_fields import ApiRequest
from max_ray.serve.api.request_log import server_timing

KEEP_ALIVE_S = 10.0
"""While a prompt is processed, a stream shows so often that it is alive."""
_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True)
class Places:
    """What OpenAI's names in an error are called in a dialect.

    Args:
        messages: Where each message of the chat came from: `system`, `messages[0]`.
        names: The dialect's names of fields that it calls otherwise, by OpenAI's.
    """

    messages: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """An InputError that is raised in the block gets the dialect's names."""
        try:
            yield
        except InputError as error:
            self._rename(error)
            raise

    def _rename(self, error: InputError) -> None:
        message = _MESSAGE.sub(self._message, str(error))
        if error.param is not None:
            param = _MESSAGE.sub(self._message, error.param)
            name = re.split(r"[.\[]", param, maxsplit=1)[0]
            if param == error.param and name in self.names:
                param = self.names[name] + param[len(name) :]
                message = message.replace(f"'{name}", f"'{self.names[name]}")
            error.param = param
        error.args = (message,)

    def _message(self, match: re.Match[str]) -> str:
        number = int(match[1])
        return self.messages[number] if number < len(self.messages) else match[0]


@dataclass(frozen=True)
class Translated:
    """A request in OpenAI's words, and how to speak of it in the dialect's."""

    request: CompletionRequest | ChatCompletionRequest
    places: Places


class DialectRequest(ApiRequest, ABC):
    """The body of a route that generates."""

    @property
    @abstractmethod
    def is_streamed(self) -> bool:
        """Whether the answer comes in pieces."""

    @abstractmethod
    def translate(self) -> Translated:
        """The request in OpenAI's words. Raises InputError, in the dialect's words, for what cannot be said in them."""

    @abstractmethod
    def formatter(self, engine: Engine, generation: Generation) -> DialectFormat:
        """What tells the answer to this request, for a generation that has been admitted."""

    @cached_property
    def translated(self) -> Translated:
        """`translate`, once. A long body is translated in the thread that parses it."""
        return self.translate()

    def refuse_hopeless(self, max_length: int) -> None:
        with self.translated.places.applied():
            self.translated.request.refuse_hopeless(max_length)


class DialectFormat(ABC):
    """Tells the answer to one request, of one choice: either as pieces of a stream, or whole."""

    media_type = "text/event-stream"

    @property
    def answer_id(self) -> str | None:
        """The id of the answer; None where the dialect has none."""
        return None

    @abstractmethod
    def begin(self) -> bytes:
        """The first piece, before there is any token; may be empty."""

    @abstractmethod
    def delta(self, delta: ChoiceDelta) -> bytes:
        """The piece for what the choice gained; may be empty."""

    @abstractmethod
    def end(self) -> bytes:
        """The last piece, after the last delta."""

    @abstractmethod
    def whole(self) -> Mapping[str, Any]:
        """The answer object. Called after `delta` has seen all deltas."""

    def failure(self, content: Mapping[str, Any]) -> bytes | None:
        """The last piece of a stream that fails, where it is not the dialect's error object.

        Args:
            content: OpenAI's error object.
        """
        return None

    def keep_alive(self) -> bytes:
        """A piece that says nothing; empty where the dialect has none."""
        return b""


class DialectAnswer:
    """A request that has been admitted. Take one of `events` and `whole`, and always `close`.

    Args:
        generation: Of one choice, started.
        form: Tells the answer.

    Attributes:
        before_end: Awaited when the answer is complete, before its end is told.
    """

    def __init__(self, generation: Generation, form: DialectFormat) -> None:
        self.form = form
        self.before_end: Callable[[], Awaitable[None]] | None = None
        self._generation = generation

    @property
    def media_type(self) -> str:
        """Of the stream."""
        return self.form.media_type

    @property
    def server_timing(self) -> str:
        """See AdmittedAnswer."""
        return server_timing(self._generation)

    def failure(self, content: Mapping[str, Any]) -> bytes | None:
        """See DialectFormat."""
        return self.form.failure(content)

    async def events(self) -> AsyncGenerator[bytes]:
        """The pieces of a stream. Raises WorkerGroupError."""
        begin = self.form.begin()
        if begin:
            yield begin
        async for deltas in self._deltas_or_silence():
            piece = b"".join(map(self.form.delta, deltas)) if deltas else self.form.keep_alive()
            if piece:
                yield piece
        if self.before_end is not None:
            await self.before_end()
        yield self.form.end()

    async def whole(self) -> Mapping[str, Any]:
        """The answer object. Raises WorkerGroupError."""
        async for deltas in self._generation.deltas():
            for delta in deltas:
                self.form.delta(delta)
        if self.before_end is not None:
            await self.before_end()
        return self.form.whole()

    def close(self) -> None:
        """Cancels what still runs."""
        self._generation.close()

    async def _deltas_or_silence(self) -> AsyncIterator[list[ChoiceDelta]]:
        """The deltas; an empty list now and then until the first one comes."""
        deltas = self._generation.deltas()
        first: asyncio.Future[list[ChoiceDelta]] = asyncio.ensure_future(anext(deltas, []))
        try:
            while not (await asyncio.wait((first,), timeout=KEEP_ALIVE_S))[0]:
                yield []
            yield first.result()
        finally:
            first.cancel()
        async for later in deltas:
            yield later


async def open_dialect(engine: Engine, request: DialectRequest, arrival: float | None = None) -> DialectAnswer:
    """Translates, checks, tokenizes and submits.

    Args:
        engine: What generates.
        request: Checked by its model.
        arrival: perf_counter() when the request came, for the metrics.

    Raises:
        InputError: With the dialect's names. Also ModelNotServedError, PromptTooLongError.
        QueueFullError, InsufficientBlocksError: There is no room.
    """
    return await open_translated(engine, request.translated, request.formatter, arrival)


async def open_translated(
    engine: Engine,
    translated: Translated,
    formatter: Callable[[Engine, Generation], DialectFormat],
    arrival: float | None = None,
) -> DialectAnswer:
    """`open_dialect` for a request that has been translated.

    Args:
        engine: What generates.
        translated: The request.
        formatter: Makes what tells the answer.
        arrival: perf_counter() when the request came, for the metrics.
    """
    with translated.places.applied():
        generation = await prepared_generation(engine, translated.request, arrival)
        generation.start()
    form = formatter(engine, generation)
    if form.answer_id is not None:
        generation.name_answer(form.answer_id)
    return DialectAnswer(generation, form)


def translated(
    kind: type[CompletionRequest] | type[ChatCompletionRequest], fields: Mapping[str, Any], places: Places
) -> Translated:
    """A checked request of OpenAI's kind, of a dialect's fields.

    Args:
        kind: Chat or completion.
        fields: By OpenAI's names; None where not given.
        places: The dialect's names.

    Raises:
        InputError: In the dialect's words.
    """
    with places.applied():
        return Translated(validated(kind, {k: v for k, v in fields.items() if v is not None}), places)

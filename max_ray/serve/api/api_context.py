"""What the routes of every dialect share: the engine, the settings of the front, and the reader of bodies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request

from max_ray.serve.api.body_reader import BodyReader
from max_ray.serve.api.engine import ApiOptions, Engine
from max_ray.serve.api.openai import RequestT
from max_ray.serve.api.responses.store import ResponseStore
from max_ray.serve.api.streams.stream_table import StreamTable


@dataclass(frozen=True)
class ModelDetails:
    """What is told of the served model besides what the engine knows.

    Args:
        family: As config.json names it: `llama`.
        format: Of the weights' files: `gguf`, `safetensors`.
        encoding: Of the weights in memory: `bfloat16`, `q4_k`.
        size_bytes: Of the weights in memory, of all ranks.
        is_on_gpu: Whether they are in a GPU's memory.
    """

    family: str = ""
    format: str = ""
    encoding: str = ""
    size_bytes: int = 0
    is_on_gpu: bool = False


@dataclass(frozen=True)
class ApiContext:
    """Of one application.

    Args:
        engine: What generates. It may come alive later, and is not touched before a request.
        options: Settings of the front.
        bodies: Reads and parses every body.
        responses: Keeps the responses of the Responses API.
        details: Of the served model.
        streams: Resumable streams; None: there are none here.
    """

    engine: Engine
    options: ApiOptions
    bodies: BodyReader
    responses: ResponseStore
    details: ModelDetails = ModelDetails()
    streams: StreamTable | None = None

    @asynccontextmanager
    async def parsed(self, request: Request, kind: type[RequestT], *, is_chat: bool = False) -> AsyncIterator[RequestT]:
        """The typed request of a body. A long body counts as in memory until the block is left.

        Args:
            request: Whose body is read.
            kind: The model of the body.
            is_chat: Whether the body may hold images, and so be longer, where the model sees them.

        Raises:
            InputError: The body is at fault.
            HTTPException: 408, 413 or 415.
            ClientDisconnect: The client hung up.
        """
        limit = self.options.max_body_bytes
        if is_chat and self.engine.tokenizer.takes_images:
            limit = max(limit, self.options.max_body_bytes_with_images)
        async with self.bodies.parsed(request, kind, limit, self.engine.tokenizer.max_length) as parsed:
            yield parsed

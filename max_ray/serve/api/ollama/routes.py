"""The routes of Ollama's API."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, ConfigDict, Field
from starlette.requests import ClientDisconnect

from max_ray import __version__
from max_ray.errors import InputError
from max_ray.interfaces import PipelineTask
from max_ray.serve.api.answer import check_model, check_task
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.dialect import open_dialect
from max_ray.serve.api.embeddings import EmbeddingsRequest, open_job
from max_ray.serve.api.extension_fields import ShortText
from max_ray.serve.api.objects.ollama import (
    OllamaEmbeddings,
    OllamaModelList,
    OllamaRunningModel,
    OllamaRunningModelList,
    OllamaShownModel,
)
from max_ray.serve.api.objects.server import Version
from max_ray.serve.api.ollama.format import MEDIA_TYPE, loaded, timestamp
from max_ray.serve.api.ollama.model_objects import listed_model, shown_model
from max_ray.serve.api.ollama.options import Options, model_name
from max_ray.serve.api.ollama.requests import KeepAlive, OllamaChatRequest, OllamaGenerateRequest, OllamaRequest
from max_ray.serve.api.openai import validated
from max_ray.serve.api.request_fields import ApiRequest, Neutral, only
from max_ray.serve.api.respond import respond
from max_ray.serve.api.scope import CLIENT_CLOSED
from max_ray.serve.api.sse import ClientGoneError, until_disconnect

FAR_AWAY = "9999-12-31T23:59:59Z"
"""When a model is unloaded that never is."""
ModelName = Annotated[ShortText, BeforeValidator(lambda name: model_name(name) if isinstance(name, str) else name)]


def _named_by(field: str) -> dict[str, Any]:
    """The JSON schema of objects with this text."""
    return {"required": [field], "properties": {field: {"type": "string"}}}


class ShowRequest(ApiRequest):
    """`POST /api/show`. `name` is the older name of `model`; litellm uses it."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_named_by("model"), _named_by("name")]})
    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"verbose": only(False)}

    model: ModelName | None = None
    name: ModelName | None = None

    @property
    def wanted(self) -> str:
        """The model's name.

        Raises:
            InputError: There is none, or there are two.
        """
        names = {self.model, self.name} - {None}
        if not names:
            raise InputError("The field 'model' is required.", param="model")
        if len(names) > 1:
            raise InputError("'name' is the older name of 'model', and they differ: give 'model'.", param="name")
        return str(names.pop())

    def refuse_hopeless(self, max_length: int) -> None:
        """A name fits always."""


class OllamaEmbedRequest(ApiRequest):
    """`POST /api/embed`. Texts that are too long are cut off unless `truncate` is false."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"options": only({})}
    INSTEAD: ClassVar[Mapping[str, str]] = {"prompt": "Use 'input'."}

    model: ModelName
    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = Field(default=None, ge=1)
    keep_alive: KeepAlive | None = None

    def refuse_hopeless(self, max_length: int) -> None:
        """Of a text that is cut off any length is as good; others are checked when they are tokenized."""
        if not self.truncate:
            self.openai().refuse_hopeless(max_length)

    def openai(self) -> EmbeddingsRequest:
        """The request of `/v1/embeddings`. Raises InputError for an empty list."""
        fields = {"model": self.model, "input": self.input, "truncate": self.truncate, "dimensions": self.dimensions}
        return validated(EmbeddingsRequest, {name: value for name, value in fields.items() if value is not None})


def add_ollama_routes(api: FastAPI, context: ApiContext) -> None:
    """Adds the routes below `/api` to an application."""
    engine, started = context.engine, timestamp()
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @api.post("/api/chat")
    async def chat(request: Request) -> Response:
        return await _generated(context, request, OllamaChatRequest)

    @api.post("/api/generate")
    async def generate(request: Request) -> Response:
        return await _generated(context, request, OllamaGenerateRequest)

    @api.post("/api/embed")
    async def embed(request: Request) -> Response:
        return await _embedded(context, request)

    @api.post("/api/show")
    async def show(request: Request) -> Response:
        try:
            async with context.parsed(request, ShowRequest) as parsed:
                check_model(engine, parsed.wanted)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        answer: OllamaShownModel = {**shown_model(engine, context.details), "modified_at": started}
        return JSONResponse(answer)

    @get("/api/tags")
    async def tags() -> Response:
        models: OllamaModelList = {"models": [{**listed_model(engine, context.details), "modified_at": started}]}
        return JSONResponse(models)

    @get("/api/ps")
    async def running() -> Response:
        size = context.details.size_bytes
        loaded: OllamaRunningModel = {
            **listed_model(engine, context.details),
            "modified_at": started,
            "expires_at": FAR_AWAY,
            "size_vram": size if context.details.is_on_gpu else 0,
            "context_length": engine.tokenizer.max_length,
        }
        models: OllamaRunningModelList = {"models": [loaded]}
        return JSONResponse(models)

    @get("/api/version")
    async def version() -> Response:
        answer: Version = {"version": __version__}
        return JSONResponse(answer)


async def _generated(context: ApiContext, request: Request, kind: type[OllamaRequest]) -> Response:
    arrival = perf_counter()
    engine = context.engine
    try:
        async with context.parsed(request, kind, is_chat=True) as parsed:
            (parsed.options or Options()).check(engine.tokenizer.max_length)
            is_streamed = parsed.is_streamed
            if parsed.only_loads:
                check_model(engine, parsed.model)
                check_task(engine, PipelineTask.TEXT_GENERATION)
                answer = loaded(engine.model_name, kind is OllamaChatRequest)
                return JSONResponse(answer, media_type=MEDIA_TYPE if is_streamed else None)
            opened = await open_dialect(engine, parsed, arrival)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    return await respond(request, opened, is_streamed=is_streamed)


async def _embedded(context: ApiContext, request: Request) -> Response:
    arrival = perf_counter()
    try:
        async with context.parsed(request, OllamaEmbedRequest) as parsed:
            job = await open_job(context.engine, parsed.openai())
        answer = await until_disconnect(request.receive, job.answer())
    except (ClientDisconnect, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED)
    vectors: OllamaEmbeddings = {
        "model": answer["model"],
        "embeddings": [entry["embedding"] for entry in answer["data"] if isinstance(entry["embedding"], list)],
        "total_duration": round((perf_counter() - arrival) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": answer["usage"]["prompt_tokens"],
    }
    return JSONResponse(vectors)

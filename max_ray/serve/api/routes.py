"""The HTTP API over one engine: a FastAPI application without Ray, so that it runs and is tested anywhere.

Bodies become typed requests here and errors become OpenAI's error object; all else is behind `open_answer`.
Everything that can be refused is refused before the first byte of a stream.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator
from functools import partial
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from max_ray import __version__
from max_ray.errors import MaxRayError
from max_ray.interfaces import PipelineTask
from max_ray.serve.api.accounting import RequestCounter
from max_ray.serve.api.answer import Answer, check_model, open_answer
from max_ray.serve.api.auth import BearerAuth
from max_ray.serve.api.body_reader import BodyReader
from max_ray.serve.api.deadline import RequestDeadline
from max_ray.serve.api.embeddings import EmbeddingsJob, EmbeddingsRequest, open_job
from max_ray.serve.api.engine import ApiOptions, Engine
from max_ray.serve.api.http_errors import (
    ErrorResponse,
    add_error_handlers,
    describe_and_log,
    error_body,
    internal_error,
)
from max_ray.serve.api.metrics import render_metrics
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest
from max_ray.serve.api.origin_guard import OriginGuard, cors_settings
from max_ray.serve.api.scope import CLIENT_CLOSED, SEND_KEY, SERVER_SEND_KEY, STATUS_KEY
from max_ray.serve.api.sse import DONE, ClientGoneError, EventStream, encode_event, until_disconnect

logger = logging.getLogger(__name__)

_ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/health", "/metrics", "/version")


def build_api(engine: Engine, options: ApiOptions | None = None) -> FastAPI:
    """The application with all routes. `engine` may come alive later: it is not touched before a request."""
    options = options or ApiOptions()
    no_pages: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    api = _Api(title="max_ray", version=__version__, redirect_slashes=False, **no_pages)
    _add_readings(api, engine)
    _add_tasks(api, engine, options)
    add_error_handlers(api, _ROUTES)
    if options.api_keys:
        api.add_middleware(BearerAuth, keys=options.api_keys)
    api.add_middleware(RequestDeadline)
    if options.allowed_origins:
        api.add_middleware(CORSMiddleware, **cors_settings(options.allowed_origins))
    api.add_middleware(OriginGuard, options=options)
    api.add_middleware(RequestCounter, engine=engine, routes=_ROUTES)
    return api


class _Api(FastAPI):
    """Leaves the `send` that it is called with where streams find it, past what is in between."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[SEND_KEY] = send
            scope.setdefault(SERVER_SEND_KEY, send)
        await super().__call__(scope, receive, send)


def _add_readings(api: FastAPI, engine: Engine) -> None:
    """The routes of GET and HEAD. Of an answer to HEAD the HTTP server sends the headers only."""
    created = int(time.time())
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(engine, created)]})

    @get("/v1/models/{model:path}")
    async def show_model(model: str) -> Response:
        check_model(engine, model)
        return JSONResponse(_model_object(engine, created))

    @get("/health")
    async def health() -> Response:
        if await engine.healthy():
            return JSONResponse({"status": "ok"})
        message = "The model workers do not answer; they are being replaced. Try again in a few seconds."
        return ErrorResponse(error_body(message, kind="workers_unavailable"), status_code=503)

    @get("/metrics")
    async def metrics() -> Response:
        text = render_metrics(await engine.metrics_snapshots())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _add_tasks(api: FastAPI, engine: Engine, options: ApiOptions) -> None:
    """The routes of POST."""
    bodies = BodyReader(timeout_s=options.body_timeout_s)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(engine, request, CompletionRequest, bodies, options)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(engine, request, ChatCompletionRequest, bodies, options)

    @api.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await _embeddings(engine, request, bodies, options)


async def _answer(
    engine: Engine,
    request: Request,
    kind: type[CompletionRequest] | type[ChatCompletionRequest],
    bodies: BodyReader,
    options: ApiOptions,
) -> Response:
    try:
        answer, is_streamed = await _opened(engine, request, kind, bodies, options)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    if is_streamed:
        return EventStream(_events(answer, request.scope), answer.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, answer.whole()))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        answer.close()


async def _opened(
    engine: Engine,
    request: Request,
    kind: type[CompletionRequest] | type[ChatCompletionRequest],
    bodies: BodyReader,
    options: ApiOptions,
) -> tuple[Answer, bool]:
    """The answer, and whether it is streamed. Nothing of the body is kept."""
    arrival = perf_counter()
    limit, max_length = _body_limit(engine, kind, options), engine.tokenizer.max_length
    async with bodies.parsed(request, kind, limit, max_length) as parsed:
        return await open_answer(engine, parsed, arrival), parsed.stream


async def _embeddings(engine: Engine, request: Request, bodies: BodyReader, options: ApiOptions) -> Response:
    try:
        async with bodies.parsed(
            request, EmbeddingsRequest, options.max_body_bytes, engine.tokenizer.max_length
        ) as parsed:
            job = await open_job(engine, parsed)
        return await until_disconnect(request.receive, _vectors(job))
    except (ClientDisconnect, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED)


async def _vectors(job: EmbeddingsJob) -> Response:
    return Response(await job.json(), media_type="application/json")


async def _events(answer: Answer, scope: Scope) -> AsyncGenerator[bytes, None]:
    """The stream's pieces. An error after the headers becomes an event, for the status has gone out already."""
    try:
        async for piece in answer.events():
            yield piece
    except MaxRayError as error:
        scope[STATUS_KEY] = type(error).http_status
        yield encode_event(json.dumps(describe_and_log(error)))
    except Exception:
        logger.exception("A stream failed.")
        scope[STATUS_KEY] = 500
        yield encode_event(json.dumps(internal_error()))
    else:
        yield DONE


def _body_limit(
    engine: Engine, kind: type[CompletionRequest] | type[ChatCompletionRequest], options: ApiOptions
) -> int:
    if kind is ChatCompletionRequest and engine.tokenizer.takes_images:
        return max(options.max_body_bytes, options.max_body_bytes_with_images)
    return options.max_body_bytes


def _model_object(engine: Engine, created: int) -> dict[str, Any]:
    is_chat = engine.task is PipelineTask.TEXT_GENERATION
    return {
        "id": engine.model_name,
        "object": "model",
        "created": created,
        "owned_by": "max_ray",
        "max_model_len": engine.tokenizer.max_length,
        "task": engine.task.value,
        **({"chat_template": engine.tokenizer.describe_chat_template()} if is_chat else {}),
    }

"""The HTTP API over one engine: a FastAPI application without Ray, so that it runs and is tested anywhere.

Bodies become typed requests here and errors become OpenAI's error object; all else is behind `open_answer`.
Everything that can be refused is refused before the first byte of a stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from max_ray import __version__
from max_ray.errors import InputError, NotFoundError, quoted
from max_ray.serve.api.access.caller import CALLER, DEADLINE
from max_ray.serve.api.access.key_ring import KeyRing
from max_ray.serve.api.accounting import RequestCounter
from max_ray.serve.api.answer import check_model, open_answer
from max_ray.serve.api.anthropic.requests import CountTokensRequest, MessagesRequest
from max_ray.serve.api.anthropic.routes import add_anthropic_routes
from max_ray.serve.api.api_context import ApiContext, ModelDetails
from max_ray.serve.api.auth import KeyAuth
from max_ray.serve.api.batches.routes import BatchRequest, add_batch_routes
from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.body_reader import BodyReader
from max_ray.serve.api.deadline import RequestDeadline
from max_ray.serve.api.embeddings import EmbeddingsJob, EmbeddingsRequest, open_job
from max_ray.serve.api.engine import ApiOptions, Engine
from max_ray.serve.api.files.routes import add_file_routes
from max_ray.serve.api.http_errors import (
    ErrorResponse,
    add_error_handlers,
    error_body,
)
from max_ray.serve.api.metrics_page import MetricsPage
from max_ray.serve.api.model_object import model_object
from max_ray.serve.api.objects.openai import ModelList
from max_ray.serve.api.objects.server import Health, RequestObject, Version
from max_ray.serve.api.ollama.requests import OllamaChatRequest, OllamaGenerateRequest
from max_ray.serve.api.ollama.routes import OllamaEmbedRequest, ShowRequest, add_ollama_routes
from max_ray.serve.api.openai import RESUMABLE, ChatCompletionRequest, CompletionRequest
from max_ray.serve.api.openapi import add_documentation
from max_ray.serve.api.origin_guard import OriginGuard, cors_settings
from max_ray.serve.api.page.routes import add_page
from max_ray.serve.api.request_fields import ApiRequest
from max_ray.serve.api.request_log import SharedRecords
from max_ray.serve.api.respond import AdmittedAnswer, respond
from max_ray.serve.api.responses.requests import ResponsesRequest
from max_ray.serve.api.responses.routes import add_response_routes
from max_ray.serve.api.responses.store import LocalResponseStore, ResponseStore
from max_ray.serve.api.route_table import known_paths
from max_ray.serve.api.scope import CLIENT_CLOSED, DEADLINE_KEY, SEND_KEY, SERVER_SEND_KEY
from max_ray.serve.api.score import RERANK_PATHS, SCORE_PATHS, RerankBody, ScoreBody, add_score_routes
from max_ray.serve.api.server_view import server_object
from max_ray.serve.api.sse import ClientGoneError, until_disconnect
from max_ray.serve.api.streams.journal import LocalStreamJournal
from max_ray.serve.api.streams.routes import add_stream_routes
from max_ray.serve.api.streams.stream_table import StreamTable
from max_ray.serve.api.token_routes import DetokenizeRequest, TokenizeRequest, add_token_routes

if TYPE_CHECKING:
    from max_ray.serve.api.tracing import RequestTracer

logger = logging.getLogger(__name__)

_MANY_REPLICAS = 8  # a page of so many is rendered in about a millisecond

BODIES: dict[str, type[ApiRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    **dict.fromkeys(SCORE_PATHS, ScoreBody),
    **dict.fromkeys(RERANK_PATHS, RerankBody),
    "/v1/responses": ResponsesRequest,
    "/v1/batches": BatchRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/api/chat": OllamaChatRequest,
    "/api/generate": OllamaGenerateRequest,
    "/api/embed": OllamaEmbedRequest,
    "/api/show": ShowRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
"""The model of the JSON body, by route."""


def build_api(
    engine: Engine,
    options: ApiOptions | None = None,
    responses: ResponseStore | None = None,
    details: ModelDetails | None = None,
    batches: BatchRunner | None = None,
    records: SharedRecords | None = None,
    tracer: RequestTracer | None = None,
    streams: StreamTable | None = None,
) -> FastAPI:
    """The application with all routes.

    Args:
        engine: What generates. It may come alive later: it is not touched before a request.
        options: Settings of the front.
        responses: Keeps the responses of the Responses API; None keeps them in this process.
        details: What is told of the served model.
        batches: Runs batches, started by the caller; None: the server keeps no files.
        records: What other replicas know of their requests; None: there are no others.
        tracer: Traces requests; None: they are not traced.
        streams: Resumable streams; None keeps their journal in this process.
    """
    options = options or ApiOptions()
    no_pages: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    api = _Api(title="max_ray", version=__version__, redirect_slashes=False, **no_pages)
    bodies = BodyReader(timeout_s=options.body_timeout_s)
    store = LocalResponseStore() if responses is None else responses
    streams = streams or StreamTable(engine, LocalStreamJournal(), "local", options.resume_grace_s)
    context = ApiContext(engine, options, bodies, store, details or ModelDetails(), streams)
    _add_tasks(api, context)  # first: routes are tried in order
    _add_readings(api, context, records)
    add_page(api)
    add_stream_routes(api, streams)
    add_response_routes(api, context)
    add_anthropic_routes(api, context)
    add_ollama_routes(api, context)
    add_token_routes(api, context)
    add_score_routes(api, context)
    add_file_routes(api, batches.store if batches else None, options.body_timeout_s)
    add_batch_routes(api, context, batches)
    add_documentation(api, BODIES, lambda: engine.model_name, needs_key=options.has_keys)
    add_error_handlers(api, known_paths())
    if options.has_keys:
        path = None if options.api_keys_file is None else Path(options.api_keys_file)
        api.add_middleware(KeyAuth, ring=KeyRing(options.api_keys, path))
    api.add_middleware(RequestDeadline)
    if options.allowed_origins:
        api.add_middleware(CORSMiddleware, **cors_settings(options.allowed_origins))
    api.add_middleware(OriginGuard, options=options)
    if tracer is not None:
        api.add_middleware(tracer.wrap)
    api.add_middleware(RequestCounter, engine=engine)
    return api


def build_line_api(
    engine: Engine, options: ApiOptions | None = None, responses: ResponseStore | None = None
) -> FastAPI:
    """The application that lines of batches are sent to: the same routes, with no guard and no counter around them.

    Args:
        engine: What generates.
        options: Settings of the front.
        responses: Keeps the responses of the Responses API; None keeps them in this process.
    """
    options = options or ApiOptions()
    api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    store = LocalResponseStore() if responses is None else responses
    context = ApiContext(engine, options, BodyReader(timeout_s=options.body_timeout_s), store)
    _add_tasks(api, context)
    add_response_routes(api, context)
    add_error_handlers(api, known_paths())
    return api


class _Api(FastAPI):
    """Leaves the `send` that it is called with where streams find it, past what is in between."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[SEND_KEY] = send
            scope.setdefault(SERVER_SEND_KEY, send)
        await super().__call__(scope, receive, send)


def _add_readings(api: FastAPI, context: ApiContext, records: SharedRecords | None) -> None:
    """The routes of GET and HEAD. Of an answer to HEAD the HTTP server sends the headers only."""
    engine, created, started = context.engine, int(time.time()), time.monotonic()
    page = MetricsPage()
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/v1/models")
    async def list_models() -> Response:
        may_use = CALLER.get().may_use(engine.model_name)
        models: ModelList = {"object": "list", "data": [model_object(engine, created)] if may_use else []}
        return JSONResponse(models)

    @get("/v1/models/{model:path}")
    async def show_model(model: str) -> Response:
        check_model(engine, model)
        return JSONResponse(model_object(engine, created))

    @get("/health")
    @api.api_route("/ping", methods=["GET", "HEAD", "POST"])
    async def health() -> Response:
        if await engine.healthy():
            ok: Health = {"status": "ok"}
            return JSONResponse(ok)
        message = "The model workers do not answer; they are being replaced. Try again in a few seconds."
        return ErrorResponse(error_body(message, kind="workers_unavailable"), status_code=503)

    @get("/metrics")
    async def metrics() -> Response:
        snapshots = await engine.metrics_snapshots()
        many = len(snapshots) > _MANY_REPLICAS
        content = await asyncio.to_thread(page.render, snapshots) if many else page.render(snapshots)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @get("/v1/requests/{answer_id}")
    async def show_request(answer_id: str) -> Response:
        return JSONResponse(await _request_record(engine, records, answer_id))

    @get("/v1/server")
    async def server(model: str | None = None) -> Response:
        check_model(engine, model)
        return JSONResponse(await server_object(context, started))

    @get("/version")
    async def version() -> Response:
        answer: Version = {"version": __version__}
        return JSONResponse(answer)


async def _request_record(engine: Engine, records: SharedRecords | None, answer_id: str) -> RequestObject:
    """Raises NotFoundError for a request that is not known, or is another key's."""
    record = engine.requests.find(answer_id)
    if record is None and records is not None:
        record = await records.find_record(answer_id)
    if record is None or not CALLER.get().may_read(record.owner):
        raise NotFoundError(
            f"There is no request {quoted(answer_id)}: the last ones are kept, by the id of the answer.",
            param="id",
        )
    return record.content


def _add_tasks(api: FastAPI, context: ApiContext) -> None:
    """The routes of POST."""

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(context, request, CompletionRequest)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(context, request, ChatCompletionRequest)

    @api.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await _embeddings(context, request)


async def _answer(
    context: ApiContext, request: Request, kind: type[CompletionRequest] | type[ChatCompletionRequest]
) -> Response:
    try:
        answer, is_streamed = await _opened(context, request, kind)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    return await respond(request, answer, is_streamed=is_streamed)


async def _opened(
    context: ApiContext, request: Request, kind: type[CompletionRequest] | type[ChatCompletionRequest]
) -> tuple[AdmittedAnswer, bool]:
    """The answer, and whether it is streamed. Nothing of the body is kept."""
    arrival = perf_counter()
    async with context.parsed(request, kind, is_chat=kind is ChatCompletionRequest) as parsed:
        if parsed.timeout is not None:
            request.scope[DEADLINE_KEY].limit(parsed.timeout)
        if parsed.is_resumable and parsed.stream:
            return await _resumable(context, parsed, arrival), True
        return await open_answer(context.engine, parsed, arrival), parsed.stream


async def _resumable(
    context: ApiContext, parsed: CompletionRequest | ChatCompletionRequest, arrival: float
) -> AdmittedAnswer:
    if context.streams is None:
        raise InputError("No stream can be resumed here: leave resumable out.", param=RESUMABLE)
    return await context.streams.open(parsed, arrival, has_deadline=DEADLINE.get() is not None)


async def _embeddings(context: ApiContext, request: Request) -> Response:
    try:
        async with context.parsed(request, EmbeddingsRequest) as parsed:
            job = await open_job(context.engine, parsed)
        return await until_disconnect(request.receive, _vectors(job))
    except (ClientDisconnect, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED)


async def _vectors(job: EmbeddingsJob) -> Response:
    return Response(await job.json(), media_type="application/json")

"""The front's HTTP API: what it answers itself, without waking a model, and what it passes on."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from max_ray import __version__
from max_ray.errors import NotFoundError, quoted
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.access.key_ring import KeyRing
from max_ray.serve.api.accounting import RequestCounter
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.auth import KeyAuth
from max_ray.serve.api.batches.routes import add_batch_routes
from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.body_reader import BodyReader
from max_ray.serve.api.deadline import RequestDeadline
from max_ray.serve.api.engine import ApiOptions, Engine
from max_ray.serve.api.files.routes import add_file_routes
from max_ray.serve.api.front.forwarder import Forwarder
from max_ray.serve.api.front.served_model import ServedModel
from max_ray.serve.api.front.state import FrontState
from max_ray.serve.api.http_errors import ErrorResponse, add_error_handlers, error_body
from max_ray.serve.api.ollama.format import timestamp
from max_ray.serve.api.ollama.routes import FAR_AWAY, ShowRequest
from max_ray.serve.api.openapi import add_documentation
from max_ray.serve.api.origin_guard import OriginGuard, cors_settings
from max_ray.serve.api.page.routes import add_page
from max_ray.serve.api.request_log import SharedRecords
from max_ray.serve.api.responses.routes import add_response_routes
from max_ray.serve.api.responses.store import LocalResponseStore, ResponseStore
from max_ray.serve.api.route_table import known_paths
from max_ray.serve.api.routes import BODIES
from max_ray.serve.api.scope import CLIENT_CLOSED, SEND_KEY, SERVER_SEND_KEY, route_path

_ANSWERED_HERE = frozenset({"/v1/batches", "/v1/files", "/api/show", "/ping"})
FORWARDED = frozenset(BODIES) - _ANSWERED_HERE
"""Routes of POST that a model answers."""


class FrontApp:
    """The application.

    Args:
        state: Models and replicas.
        forwarder: Passes requests on.
        options: Settings of the front.
        responses: Where the models' replicas keep responses; None: in this process, for tests without such.
        batches: Runs batches, started by the caller; None: the server keeps no files.
        records: What the replicas know of their requests.
    """

    def __init__(
        self,
        state: FrontState,
        forwarder: Forwarder,
        options: ApiOptions | None = None,
        responses: ResponseStore | None = None,
        batches: BatchRunner | None = None,
        records: SharedRecords | None = None,
    ) -> None:
        options = options or ApiOptions()
        self._forwarder = forwarder
        self._own = _own_api(state, options, LocalResponseStore() if responses is None else responses, batches, records)
        self._guarded = _guarded(self._dispatched, state, options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._own(scope, receive, send)
            return
        scope[SEND_KEY] = send
        scope.setdefault(SERVER_SEND_KEY, send)
        await self._guarded(scope, receive, send)

    async def _dispatched(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._forwarder if _is_forwarded(scope) else self._own
        await app(scope, receive, send)


def _is_forwarded(scope: Scope) -> bool:
    path = route_path(scope)
    if scope["method"] == "POST":
        return path in FORWARDED
    if path.startswith("/v1/streams/"):
        return scope["method"] in ("GET", "DELETE")
    if scope["method"] not in ("GET", "HEAD"):
        return False
    return path == "/tokenizer_info" or (path == "/v1/server" and b"model=" in scope.get("query_string", b""))


def _guarded(app: ASGIApp, state: FrontState, options: ApiOptions) -> ASGIApp:
    """As `build_api` has it for one model: who counts, who may ask."""
    if options.has_keys:
        path = None if options.api_keys_file is None else Path(options.api_keys_file)
        app = KeyAuth(app, ring=KeyRing(options.api_keys, path))
    if options.allowed_origins:
        app = CORSMiddleware(app, **cors_settings(options.allowed_origins))
    return RequestCounter(OriginGuard(app, options), engine=state)


def _own_api(
    state: FrontState,
    options: ApiOptions,
    responses: ResponseStore,
    batches: BatchRunner | None,
    records: SharedRecords | None,
) -> FastAPI:
    no_pages: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    api = FastAPI(title="max_ray", version=__version__, redirect_slashes=False, **no_pages)
    lengths = cast("Engine", state)  # the routes that are used here ask it for the longest sequence alone
    context = ApiContext(lengths, options, BodyReader(timeout_s=options.body_timeout_s), responses)
    _add_model_routes(api, state)
    _add_readings(api, state, records)
    _add_ollama_lists(api, state, context)
    add_page(api)
    add_response_routes(api, context)
    add_file_routes(api, batches.store if batches else None, options.body_timeout_s)
    add_batch_routes(api, context, batches)
    add_documentation(api, BODIES, lambda: next(iter(state.models)).name, needs_key=options.has_keys)
    add_error_handlers(api, known_paths())
    api.add_middleware(RequestDeadline)
    return api


def _add_model_routes(api: FastAPI, state: FrontState) -> None:
    created = int(time.time())
    get = partial(api.api_route, methods=["GET", "HEAD"])

    def described(model: ServedModel) -> dict[str, Any]:
        return {**model.entry, "created": created, "state": state.state_of(model)}

    @get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [described(model) for model in state.models.allowed]})

    @get("/v1/models/{model:path}")
    async def show_model(model: str) -> Response:
        return JSONResponse(described(state.models.find(model)))


def _add_readings(api: FastAPI, state: FrontState, records: SharedRecords | None) -> None:
    started = time.monotonic()
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/health")
    @api.api_route("/ping", methods=["GET", "HEAD", "POST"])
    async def health() -> Response:
        missing = state.missing()
        if not missing:
            return JSONResponse({"status": "ok"})
        message = f"No replica of {', '.join(map(repr, missing))} answers; try again in a few seconds."
        return ErrorResponse(error_body(message, kind="workers_unavailable"), status_code=503)

    @get("/metrics")
    async def metrics() -> Response:
        content = await asyncio.to_thread(state.render)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @get("/v1/server")
    async def server() -> Response:
        models = [state.view(model) for model in state.models.allowed]
        times = {"time": time.time(), "uptime_s": time.monotonic() - started}
        return JSONResponse({"object": "server", "version": __version__, **times, "models": models})

    @get("/v1/requests/{answer_id}")
    async def show_request(answer_id: str) -> Response:
        record = None if records is None else await records.find_record(answer_id)
        if record is None or not CALLER.get().may_read(record.owner):
            message = f"There is no request {quoted(answer_id)}: the last ones are kept, by the id of the answer."
            raise NotFoundError(message, param="id")
        return JSONResponse(record.content)

    @get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _add_ollama_lists(api: FastAPI, state: FrontState, context: ApiContext) -> None:
    started = timestamp()
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @get("/api/tags")
    async def tags() -> Response:
        return JSONResponse({"models": [{**one.listed, "modified_at": started} for one in state.models.allowed]})

    @get("/api/ps")
    async def running() -> Response:
        found = [model for model in state.models.allowed if state.replicas.replicas(model.name)]
        return JSONResponse({"models": [_running(model) for model in found]})

    @api.post("/api/show")
    async def show(request: Request) -> Response:
        try:
            async with context.parsed(request, ShowRequest) as parsed:
                model = state.models.find(parsed.wanted)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse({"modified_at": started, **model.shown})

    @get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _running(model: ServedModel) -> dict[str, Any]:
    """A model that has replicas. One that may have none is given the time that it has from now on."""
    expires = FAR_AWAY
    if not model.min_replicas:
        expires = (datetime.now(UTC) + timedelta(seconds=model.idle_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        **model.listed,
        "expires_at": expires,
        "size_vram": model.vram_bytes,
        "context_length": model.max_length,
    }

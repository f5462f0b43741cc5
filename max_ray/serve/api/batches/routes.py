"""The routes below `/v1/batches`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.files.routes import LONGEST_S, SHORTEST_S, checked_query, page_of, required
from max_ray.serve.api.request_fields import ApiRequest, StrictModel
from max_ray.serve.api.scope import CLIENT_CLOSED

MAX_LISTED = 100
MAX_METADATA = 16
_Key = Annotated[str, Field(min_length=1, max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class ExpiresAfter(StrictModel):
    """When the files of results are removed: so many seconds after they are made."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_S, le=LONGEST_S)


class BatchRequest(ApiRequest):
    """The body of `POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=100)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[_Key, _Value] | None = Field(default=None, max_length=MAX_METADATA)
    output_expires_after: ExpiresAfter | None = None

    def refuse_hopeless(self, max_length: int) -> None:
        """Nothing here is for the model."""


def add_batch_routes(api: FastAPI, context: ApiContext, runner: BatchRunner | None) -> None:
    """Adds the routes below `/v1/batches` to an application.

    Args:
        api: The application.
        context: Reads the bodies.
        runner: With the store of batches; None: every route says that the server keeps none.
    """
    store = runner.store if runner else None
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @api.post("/v1/batches")
    async def create(request: Request) -> Response:
        batches = required(store)
        try:
            async with context.parsed(request, BatchRequest) as parsed:
                expires = parsed.output_expires_after
                batch = await batches.create_batch(
                    parsed.endpoint, parsed.input_file_id, parsed.metadata, expires.seconds if expires else None
                )
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        if runner is not None:
            runner.wake()
        return JSONResponse(batch)

    @get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        query = checked_query(request, ("after", "limit"))
        return JSONResponse(page_of(await required(store).batches(), query, 20, MAX_LISTED))

    @get("/v1/batches/{batch_id}")
    async def show(batch_id: str) -> Response:
        return JSONResponse(await required(store).find_batch(batch_id))

    @api.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        return JSONResponse(await required(store).cancel_batch(batch_id))

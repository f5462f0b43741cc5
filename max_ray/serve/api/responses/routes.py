"""The routes of the Responses API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from max_ray.errors import InputError, PromptTooLongError, WorkerGroupError, quoted
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.dialect import DialectAnswer, open_translated
from max_ray.serve.api.json_body import SHORT_BODY
from max_ray.serve.api.objects.page import Page
from max_ray.serve.api.objects.responses import DeletedResponse
from max_ray.serve.api.respond import respond
from max_ray.serve.api.responses.background import DEAD_AFTER_S, BackgroundResponses
from max_ray.serve.api.responses.format import ResponseFormat
from max_ray.serve.api.responses.items import stored_items
from max_ray.serve.api.responses.requests import ITEMS, ResponsesRequest
from max_ray.serve.api.responses.store import ResponseStore, StoredResponse
from max_ray.serve.api.scope import CLIENT_CLOSED

logger = logging.getLogger(__name__)
MAX_LISTED = 100
_INLINE_ITEMS = 256
"""Items that are worked on at once, on the event loop."""


class ResponseNotFoundError(InputError):
    """No such response is kept."""

    http_status = 404


def add_response_routes(api: FastAPI, context: ApiContext) -> None:
    """Adds the routes below `/v1/responses` to an application."""
    store = context.responses
    background = BackgroundResponses(store)
    get = partial(api.api_route, methods=["GET", "HEAD"])

    @api.post("/v1/responses")
    async def create(request: Request) -> Response:
        return await _created(context, background, request)

    @get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request) -> Response:
        _check_query(request)
        return _json((await _found(store, response_id)).response)

    @api.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        await _found(store, response_id)
        if not await store.delete(response_id):
            raise _not_found(response_id)
        background.stop(response_id)
        answer: DeletedResponse = {"id": response_id, "object": "response", "deleted": True}
        return JSONResponse(answer)

    @api.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        response = await _cancelled(store, response_id)
        background.stop(response_id)
        return _json(response)

    @get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        found = await _found(store, response_id)
        return JSONResponse(_listed(json.loads(found.items), dict(request.query_params)))


async def _created(context: ApiContext, background: BackgroundResponses, request: Request) -> Response:
    arrival = perf_counter()
    try:
        async with context.parsed(request, ResponsesRequest, is_chat=True) as parsed:
            parsed.check()
            answer = await _opened(context, parsed, arrival)
            items = await _encoded_items(parsed)
            previous, is_streamed = parsed.previous_response_id, parsed.stream
            is_stored, is_background = parsed.store, parsed.background
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    form = answer.form
    assert isinstance(form, ResponseFormat), "the request's own formatter"
    if is_background:
        response = form.response("in_progress")
        try:
            owner = CALLER.get().name
            await context.responses.put(form.id, json.dumps(response).encode(), items, b"[]", previous, False, owner)
        except BaseException:
            answer.close()
            raise
        background.start(answer, form)
        return JSONResponse(response)
    if is_stored:
        answer.before_end = partial(_store, context.responses, form, items, previous)
    return await respond(request, answer, is_streamed=is_streamed)


async def _encoded_items(request: ResponsesRequest) -> bytes:
    """The input items as they are stored. Many or long ones are written in a thread."""

    def encoded() -> bytes:
        return json.dumps(stored_items(request.input)).encode()

    if not request.store:
        return b"[]"
    is_short = len(request.input) <= (SHORT_BODY if isinstance(request.input, str) else _INLINE_ITEMS)
    return encoded() if is_short else await asyncio.to_thread(encoded)


async def _opened(context: ApiContext, request: ResponsesRequest, arrival: float) -> DialectAnswer:
    """The answer, admitted. With `truncation` as few messages as possible are left out at the beginning."""
    history = await _history(context.responses, request.previous_response_id)
    attempt = partial(_attempt, context, request, arrival, history)
    try:
        return await attempt(0)
    except PromptTooLongError as error:
        if request.truncation == "disabled":
            raise
        too_long = error
    fewest, most = 1, request.num_messages(history) - 1
    best: int | None = None
    while fewest <= most:
        middle = (fewest + most) // 2
        try:
            (await attempt(middle)).close()
            best, most = middle, middle - 1
        except PromptTooLongError as error:
            too_long, fewest = error, middle + 1
    if best is None:
        raise too_long
    return await attempt(best)


async def _attempt(
    context: ApiContext, request: ResponsesRequest, arrival: float, history: Sequence[Any], num_dropped: int
) -> DialectAnswer:
    if not history and not num_dropped:
        translated = request.translated
    elif len(history) <= _INLINE_ITEMS:
        translated = request.continuing(history, num_dropped)
    else:
        translated = await asyncio.to_thread(request.continuing, history, num_dropped)
    return await open_translated(context.engine, translated, request.formatter, arrival)


async def _history(store: ResponseStore, response_id: str | None) -> list[Any]:
    """The items of previous responses. Raises ResponseNotFoundError, and InputError for one that is being made."""
    if response_id is None:
        return []
    await _found(store, response_id, "previous_response_id")
    lists = await store.history(response_id)
    if lists is None:
        raise InputError(
            f"The response {quoted(response_id)} is not complete yet: wait for it.", param="previous_response_id"
        )

    def decoded() -> list[Any]:
        return [item for items in lists for item in ITEMS.validate_python(json.loads(items))]

    return decoded() if sum(map(len, lists)) <= SHORT_BODY else await asyncio.to_thread(decoded)


async def _store(store: ResponseStore, form: ResponseFormat, items: bytes, previous: str | None) -> None:
    """Keeps a complete response. One that cannot be kept says so, and is given all the same."""
    response = form.whole()
    output = json.dumps(response["output"]).encode()
    try:
        await store.put(form.id, json.dumps(response).encode(), items, output, previous, True, CALLER.get().name)
    except WorkerGroupError as error:
        logger.warning("a response was not stored: %s", error)
        form.echoed["store"] = False


async def _found(store: ResponseStore, response_id: str, param: str = "response_id") -> StoredResponse:
    """A stored response of this key; of a replica that has died it has failed. Raises ResponseNotFoundError."""
    found = await store.find(response_id)
    if found is None or not CALLER.get().may_read(found.owner):
        raise _not_found(response_id, param)
    if not found.is_done and found.silence_s > DEAD_AFTER_S:
        message = "The replica that made this response has ended. Send the request again."
        await _ended(store, response_id, found, "failed", {"code": "server_error", "message": message})
        found = await store.find(response_id)
        if found is None:
            raise _not_found(response_id, param)
    return found


async def _cancelled(store: ResponseStore, response_id: str) -> bytes:
    """The response object of a cancelled response. Raises InputError for what is no background response."""
    found = await _found(store, response_id)
    if not json.loads(found.response)["background"]:
        raise InputError("Only background responses can be cancelled: this one is complete.", param="response_id")
    if not found.is_done:
        await _ended(store, response_id, found, "cancelled", None)
        found = await _found(store, response_id)
    return found.response


async def _ended(
    store: ResponseStore, response_id: str, found: StoredResponse, status: str, error: dict[str, str] | None
) -> None:
    response = {**json.loads(found.response), "status": status, "error": error}
    await store.finish(response_id, json.dumps(response).encode(), b"[]")


def _check_query(request: Request) -> None:
    """Raises InputError for a stored response that is asked for in another way than as it is."""
    for name, value in request.query_params.items():
        if (name, value) != ("stream", "false"):
            raise InputError(
                f"The parameter {quoted(name)} is not supported here: a stored response comes whole. Leave it out.",
                param=quoted(name)[1:-1],
            )


def _listed(items: list[dict[str, Any]], query: dict[str, str]) -> Page[dict[str, Any]]:
    """A page of items. Raises InputError for parameters that are not known or out of range."""
    unknown = query.keys() - {"after", "limit", "order", "include"}
    if unknown or query.get("include"):
        name = min(unknown or {"include"})
        raise InputError(
            f"Unknown parameter {quoted(name)}: there are after, limit and order.", param=quoted(name)[1:-1]
        )
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_LISTED:
        raise InputError(f"limit must be a number from 1 to {MAX_LISTED}.", param="limit")
    if order not in ("asc", "desc"):
        raise InputError("order must be 'asc' or 'desc'.", param="order")
    ordered = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in ordered]
    if "after" in query and query["after"] not in ids:
        raise InputError(f"There is no item {quoted(query['after'])}.", param="after")
    begin = ids.index(query["after"]) + 1 if "after" in query else 0
    page = ordered[begin : begin + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(ordered),
    }


def _not_found(response_id: str, param: str = "response_id") -> ResponseNotFoundError:
    return ResponseNotFoundError(
        f"There is no response {quoted(response_id)}: it was not stored, was deleted, or is too old.", param=param
    )


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")

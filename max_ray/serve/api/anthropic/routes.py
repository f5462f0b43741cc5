"""The routes of Anthropic's API. The header `anthropic-version` may have any value, and so may `anthropic-beta`: what a
beta adds is fields, and each field is honoured or refused."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from max_ray.errors import PromptTooLongError
from max_ray.serve.api.answer import prepared_generation
from max_ray.serve.api.anthropic.requests import CountTokensRequest, MessagesRequest
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.dialect import DialectRequest
from max_ray.serve.api.dialect_routes import answer_dialect
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.objects.anthropic import TokenCount
from max_ray.serve.api.scope import CLIENT_CLOSED


def add_anthropic_routes(api: FastAPI, context: ApiContext) -> None:
    """Adds `/v1/messages` and `/v1/messages/count_tokens` to an application."""

    @api.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await answer_dialect(context, request, MessagesRequest)

    @api.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        try:
            async with context.parsed(request, CountTokensRequest, is_chat=True) as parsed:
                count: TokenCount = {"input_tokens": await _num_tokens(context.engine, parsed)}
                return JSONResponse(count)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)


async def _num_tokens(engine: Engine, request: DialectRequest) -> int:
    """Tokens of the prompt, also of one that is too long where all of it was counted. Raises InputError."""
    translated = request.translated
    with translated.places.applied():
        try:
            generation = await prepared_generation(engine, translated.request)
        except PromptTooLongError as error:
            if error.at_least:
                raise
            return error.num_tokens
    return generation.usage.prompt_tokens

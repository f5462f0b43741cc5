"""vLLM's routes about the tokenizer: `/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from max_ray.errors import InputError
from max_ray.serve.api.answer import check_model, prepared_generation
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.chat_messages import MAX_MESSAGES, Message
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.extension_fields import ShortText
from max_ray.serve.api.objects.openai import DetokenizedPrompt, TokenizedPrompt
from max_ray.serve.api.openai import TOKEN_CHARACTERS, ChatCompletionRequest, refuse_at_least, validated
from max_ray.serve.api.request_fields import ApiRequest, Neutral, foreign
from max_ray.serve.api.scope import CLIENT_CLOSED
from max_ray.tokenization.inspection import describe_tokenizer, prompt_ids, text_of_ids

MAX_IDS = 1_000_000
"""Token ids of one /detokenize."""


_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "documents")


class TokenizeRequest(ApiRequest):
    """`POST /tokenize`, with a `prompt` or with `messages`.

    add_special_tokens: of a prompt; true by default. return_token_strs: the tokens' own spellings, too. The other
    fields are of messages, and mean what they mean in a chat request.
    """

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"chat_template": foreign(), "mm_processor_kwargs": foreign({})}
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "content": "Use 'prompt'.",
        "text": "Use 'prompt'.",
        "input": "Use 'prompt'.",
    }

    model: ShortText | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    return_token_strs: bool = False

    def refuse_hopeless(self, max_length: int) -> None:
        """A prompt may have any length; a chat must fit, for its template is rendered."""
        num_characters = sum(message.num_characters for message in self.messages or ())
        refuse_at_least(num_characters // TOKEN_CHARACTERS, max_length, "messages")

    def check(self) -> None:
        """Raises InputError where fields contradict each other."""
        if (self.prompt is None) == (self.messages is None):
            raise InputError("Give a prompt or messages, and not both.", param="prompt")
        given = [name for name in _OF_CHATS if getattr(self, name) is not None]
        if self.messages is None and given:
            raise InputError(f"{given[0]} has a meaning only with messages.", param=given[0])
        if self.messages is not None and self.add_special_tokens:
            raise InputError(
                "add_special_tokens is for a prompt: of a chat the template writes them.", param="add_special_tokens"
            )


class DetokenizeRequest(ApiRequest):
    """`POST /detokenize`. The text shows special tokens."""

    model: ShortText | None = None
    tokens: list[int] = Field(max_length=MAX_IDS, fail_fast=True)

    def refuse_hopeless(self, max_length: int) -> None:
        """Any number of tokens is as good."""


def add_token_routes(api: FastAPI, context: ApiContext) -> None:
    """Adds the three routes to an application."""
    engine = context.engine

    @api.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        try:
            async with context.parsed(request, TokenizeRequest) as parsed:
                return JSONResponse(await _tokenized(engine, parsed))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)

    @api.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        try:
            async with context.parsed(request, DetokenizeRequest) as parsed:
                check_model(engine, parsed.model)
                text = await text_of_ids(engine.tokenizer, parsed.tokens)
                answer: DetokenizedPrompt = {"prompt": text}
                return JSONResponse(answer)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)

    @partial(api.api_route, methods=["GET", "HEAD"])("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(describe_tokenizer(engine.tokenizer))


async def _tokenized(engine: Engine, request: TokenizeRequest) -> TokenizedPrompt:
    check_model(engine, request.model)
    request.check()
    tokenizer = engine.tokenizer
    if request.messages is None:
        add = request.add_special_tokens is not False
        ids = (await prompt_ids(tokenizer, request.prompt or "", add_special_tokens=add)).tolist()
    else:
        ids = await _chat_ids(engine, request)
    return {
        "count": len(ids),
        "max_model_len": tokenizer.max_length,
        "tokens": ids,
        "token_strs": [tokenizer.token_piece(i) for i in ids] if request.return_token_strs else None,
    }


async def _chat_ids(engine: Engine, request: TokenizeRequest) -> list[int]:
    fields = {name: getattr(request, name) for name in ("model", "messages", *_OF_CHATS)}
    chat = validated(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})
    generation = await prepared_generation(engine, chat)
    ids: list[int] = generation.choices[0].context.tokens.prompt.tolist()
    return ids

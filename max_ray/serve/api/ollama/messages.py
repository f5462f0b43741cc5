"""Messages of Ollama's chats, and the chat messages that they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from max_ray.errors import InputError
from max_ray.serve.api.request_fields import Neutral, StrictModel, only

MAX_IMAGES = 128
_KINDS = {"iVBOR": "png", "/9j/": "jpeg", "UklGR": "webp"}
"""How the base64 text of an image file begins."""


class CalledFunction(StrictModel):
    """A function and its arguments."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "index": Neutral(lambda given, _: type(given) is int, "a number", schema={"type": ["integer", "null"]}),
        "description": only(""),
    }

    name: str
    arguments: dict[str, Any]


class OllamaCall(StrictModel):
    """A call that the assistant made."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"type": only("function")}

    function: CalledFunction
    id: str | None = None


class OllamaMessage(StrictModel):
    """One message. images: base64 of PNG, JPEG or WebP files."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def message(self, place: str) -> dict[str, Any]:
        """The chat message, without ids of calls. Raises InputError for images that are none. place: in the request."""
        fields: dict[str, Any] = {"role": self.role, "content": content_of(self.content, self.images, place)}
        return fields | ({"reasoning_content": self.thinking} if self.thinking else {})


def content_of(text: str, images: Sequence[str] | None, place: str) -> Any:
    """Text, or text and images as content parts.

    Args:
        text: Of the message.
        images: Base64 texts.
        place: Of the message in the request, for errors.

    Raises:
        InputError: An image is of none of the known kinds.
    """
    if not images:
        return text
    parts: list[dict[str, Any]] = [] if not text else [{"type": "text", "text": text}]
    for number, image in enumerate(images):
        kind = next((kind for beginning, kind in _KINDS.items() if image.startswith(beginning)), None)
        if kind is None:
            where = f"{place}images[{number}]"
            raise InputError(f"{where} is no PNG, JPEG or WebP file in base64.", param=where)
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}})
    return parts


def chat_of(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """The chat. Ollama's calls need no ids: a result belongs to the first open call of its name.

    Args:
        messages: In order.

    Raises:
        InputError: A result belongs to no call, or an image is of no known kind.
    """
    chat: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        one = message.message(f"messages[{number}].")
        if message.tool_calls:
            ids = [call.id or f"call_{number}_{position}" for position, call in enumerate(message.tool_calls)]
            open_calls = [(i, call.function.name) for i, call in zip(ids, message.tool_calls, strict=True)]
            one["tool_calls"] = [_call(i, call) for i, call in zip(ids, message.tool_calls, strict=True)]
        if message.role == "tool":
            one["tool_call_id"] = _answered(message, open_calls, number)
        chat.append(one)
    return chat


def _call(call_id: str, call: OllamaCall) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _answered(message: OllamaMessage, open_calls: list[tuple[str, str]], number: int) -> str:
    """The id of the call that a result belongs to, which is open no more."""
    for call in open_calls:
        is_meant = message.tool_name in (None, call[1]) and message.tool_call_id in (None, call[0])
        if is_meant:
            open_calls.remove(call)
            return call[0]
    raise InputError(
        f"messages[{number}] is a tool's result, and no call before it waits for one.", param=f"messages[{number}]"
    )

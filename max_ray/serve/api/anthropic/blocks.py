"""Content blocks of Anthropic's messages, and what they are in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from max_ray.serve.api.chat_messages import MAX_PARTS
from max_ray.serve.api.neutral_fields import CACHE_CONTROL
from max_ray.serve.api.request_fields import FieldProblem, Neutral, StrictModel, only, raise_problems

_BLOCK: dict[str, Neutral] = {"cache_control": CACHE_CONTROL, "citations": only([])}
_CALL: dict[str, Neutral] = {"cache_control": CACHE_CONTROL, "caller": only({"type": "direct"})}


def _string_or_list(value: Any) -> str:
    return "<string>" if isinstance(value, str) else "<list>"


class TextBlock(StrictModel):
    """Text."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = _BLOCK

    type: Literal["text"]
    text: str

    def part(self) -> dict[str, Any]:
        """The content part of a chat message."""
        return {"type": "text", "text": self.text}


class Base64Source(StrictModel):
    """The bytes of an image."""

    type: Literal["base64"]
    media_type: str
    data: str

    @property
    def url(self) -> str:
        """As a `data:` URL."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(StrictModel):
    """Where an image is."""

    type: Literal["url"]
    url: str


def _source_tag(source: Any) -> str:
    return "<url>" if isinstance(source, dict) and source.get("type") == "url" else "<base64>"


class ImageBlock(StrictModel):
    """An image."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = _BLOCK

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")], Discriminator(_source_tag)
    ]

    def part(self) -> dict[str, Any]:
        """The content part of a chat message."""
        return {"type": "image_url", "image_url": {"url": self.source.url}}


class ToolUseBlock(StrictModel):
    """A call that the assistant made."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = _CALL

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> dict[str, Any]:
        """The entry of `tool_calls`."""
        function = {"name": self.name, "arguments": json.dumps(self.input, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}


class ThinkingBlock(StrictModel):
    """What the assistant thought. This server's signatures are empty, and none is checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


def _refuse_block(block: Any) -> Any:
    """Every other block. Its other fields are not looked at."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind is None:
        raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is required.")])
    shown = ascii(kind[:40]) if isinstance(kind, str) else f"a {type(kind).__name__}"
    sentence = f"blocks are 'text', 'image', 'tool_use', 'tool_result' and 'thinking', not {shown}."
    raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is not valid: {sentence}")])


_TAGS = {kind: f"<{kind}>" for kind in ("text", "image", "tool_use", "tool_result", "thinking")}


def _block_tag(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return _TAGS.get(kind, "<unknown>") if isinstance(kind, str) else "<unknown>"


class ToolReferenceBlock(StrictModel):
    """A tool that a search of the client's found: from here on it is offered, though it has `defer_loading`."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"cache_control": CACHE_CONTROL}

    type: Literal["tool_reference"]
    tool_name: str

    def part(self) -> dict[str, Any]:
        """The content part of a chat message: what the model reads of the search's result."""
        return {"type": "text", "text": f"Found the tool {self.tool_name}."}


def _result_tag(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"<{kind}>" if kind in ("text", "image", "tool_reference") else "<unknown>"


_Refused = Annotated[Any, PlainValidator(_refuse_block), Tag("<unknown>")]
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolReferenceBlock, Tag("<tool_reference>")]
    | _Refused,
    Discriminator(_result_tag),
]


class ToolResultBlock(StrictModel):
    """What a tool gave. Of a call that failed the text begins with `Error: `, for chat templates know no flag."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = _BLOCK

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("<string>")]
            | Annotated[list[ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
            Discriminator(_string_or_list),
        ]
        | None
    ) = None
    is_error: bool = False

    @property
    def found_tools(self) -> set[str]:
        """Names of the tools that it refers to."""
        blocks = self.content if isinstance(self.content, list) else []
        return {block.tool_name for block in blocks if isinstance(block, ToolReferenceBlock)}

    def message(self) -> dict[str, Any]:
        """The message of the role `tool`."""
        content: Any = self.content or ""
        if isinstance(content, list):
            content = [block.part() for block in content]
            if all(part["type"] == "text" for part in content):
                content = "\n".join(part["text"] for part in content)
        if self.is_error:
            content = (
                f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error:"}, *content]
            )
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | _Refused,
    Discriminator(_block_tag),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(_string_or_list),
]
System = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(_string_or_list),
]

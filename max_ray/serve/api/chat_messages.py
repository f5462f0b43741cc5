"""The messages of a chat: what clients send, and what this server's own answers become when they are sent back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from max_ray.serve.api.neutral_fields import MESSAGE, PART
from max_ray.serve.api.request_fields import FieldProblem, Neutral, StrictModel, raise_problems

MAX_MESSAGES = 16_384
MAX_PARTS = 4096
"""Of one message."""


def text_or_list(value: Any) -> str:
    """The tag of the one branch or the other of a union of a text and a list."""
    return "<text>" if isinstance(value, str) else "<list>"


class TextPart(StrictModel):
    NEUTRAL: ClassVar[Mapping[str, Neutral]] = PART

    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    """`detail`: an image is always seen as well as the model can, so "low" is not to be had."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(StrictModel):
    """An image; what its URL may be is the tokenizer's matter (`max_ray.images`)."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = PART

    type: Literal["image_url"]
    image_url: ImageUrl


def _refuse_part(part: Any) -> Any:
    """Every other part. Its other fields are not looked at."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is required.")])
    hint = " (send single frames of a video as images)" if kind in ("video", "video_url") else ""
    shown = ascii(kind[:40]) if isinstance(kind, str) else f"a {type(kind).__name__}"
    sentence = f"content parts are 'text' and 'image_url', not {shown}{hint}."
    raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is not valid: {sentence}")])


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"text": "<part>", "image_url": "<image>"}.get(kind if isinstance(kind, str) else "", "<unknown>")


ContentPart = Annotated[
    Annotated[TextPart, Tag("<part>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[Any, PlainValidator(_refuse_part), Tag("<unknown>")],
    Discriminator(_part_tag),
]


class Message(StrictModel):
    """One message. Of the assistant it may have no content; the other fields of an answer's message pass empty."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    name: str | None = None

    @property
    def num_characters(self) -> int:
        """Of its text."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @classmethod
    def _completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        if "content" in given:
            return given
        if given.get("role") == "assistant":
            return {**given, "content": ""}
        required = "is required: a text or a list of parts"
        raise_problems([FieldProblem("content", lambda place: f"The field '{place}' {required}.")])
        return given

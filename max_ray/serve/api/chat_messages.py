"""The messages of a chat: what clients send, and what this server's own answers become when they are sent back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from max_ray.serve.api.neutral_fields import CALLED_FUNCTION, MESSAGE, PART, TOOL_CALL
from max_ray.serve.api.request_fields import FieldProblem, Neutral, StrictModel, raise_problems

MAX_CALLS = 128
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


class CalledFunction(StrictModel):
    """A function's name and the arguments as JSON text; where a limit cut the answer off, not all of it."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = CALLED_FUNCTION

    name: str
    arguments: str = "{}"


class ToolCall(StrictModel):
    """A call that the assistant made."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = TOOL_CALL

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """One message. Of the assistant it may have no content; the other fields of an answer's message pass empty.

    tool_calls, reasoning_content: of the assistant. tool_call_id: of a tool's result.
    """

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def num_characters(self) -> int:
        """Of its text."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @classmethod
    def _completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        role = given.get("role")
        if not given.keys() <= {"role", "content", "name"}:
            given = _with_own_fields(given, role)
        if role == "tool" and "tool_call_id" not in given:
            required = "is required in a tool's message: the id of the call"
            raise_problems([FieldProblem("tool_call_id", lambda place: f"The field '{place}' {required}.")])
        if "content" in given:
            return given
        if role == "assistant":
            return {**given, "content": ""}
        required = "is required: a text or a list of parts"
        raise_problems([FieldProblem("content", lambda place: f"The field '{place}' {required}.")])
        return given

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        given = self.model_dump(exclude_none=True)
        thought = given.pop("reasoning", None)
        if thought is not None:
            given.setdefault("reasoning_content", thought)
        return given


_ROLE_OF = {
    "tool_calls": "assistant",
    "tool_call_id": "tool",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
}


def _with_own_fields(given: dict[str, Any], role: Any) -> dict[str, Any]:
    """A message without empty fields. `raise_problems` where it has one of another role."""
    kept = {name: value for name, value in given.items() if name not in _ROLE_OF or value not in ("", [])}
    wrong = [name for name in kept if _ROLE_OF.get(name, role) != role]
    raise_problems([FieldProblem(name, partial(_wrong_role, role=_ROLE_OF[name])) for name in wrong])
    return kept


def _wrong_role(place: str, role: str) -> str:
    return f"The field '{place}' is for messages of the role '{role}' only. Leave it out."


def named_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the function's name in each result of a tool: some templates write it.

    Args:
        messages: As chat templates read them.
    """
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and message["tool_call_id"] in names:
            message["name"] = names[message["tool_call_id"]]
    return messages

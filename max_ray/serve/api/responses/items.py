"""Items of a response's input, and the chat messages that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from max_ray.interfaces import RequestID
from max_ray.serve.api.chat_messages import MAX_PARTS
from max_ray.serve.api.request_fields import FieldProblem, Neutral, StrictModel, only, raise_problems

Status = Literal["in_progress", "completed", "incomplete"]
_PART: dict[str, Neutral] = {"prompt_cache_breakpoint": only()}


def string_or_list(value: Any) -> str:
    """The tag of a union of a text and a list."""
    return "<string>" if isinstance(value, str) else "<list>"


class InputText(StrictModel):
    """Text of an input message, or of one that the assistant wrote."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        **_PART,
        "annotations": only([]),
        "logprobs": Neutral(
            lambda given, _: isinstance(given, list), "what the server gave", schema={"type": ["array", "null"]}
        ),
        "parsed": Neutral(lambda *_: True, "anything", schema={}),
    }

    type: Literal["input_text", "output_text", "text"]
    text: str

    def part(self) -> dict[str, Any]:
        """The content part of a chat message."""
        return {"type": "text", "text": self.text}


class InputImage(StrictModel):
    """An image."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {**_PART, "file_id": only()}

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "high"] | None = None

    def part(self) -> dict[str, Any]:
        """The content part of a chat message."""
        return {"type": "image_url", "image_url": {"url": self.image_url}}


def _refuse(known: str) -> PlainValidator:
    """A validator that refuses every other kind. The other fields are not looked at."""

    def refuse(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind is None:
            raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is required.")])
        shown = ascii(kind[:40]) if isinstance(kind, str) else f"a {type(kind).__name__}"
        sentence = f"it is {known}, not {shown}."
        raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is not valid: {sentence}")])

    return PlainValidator(refuse)


_TEXTS = {"input_text": "<text>", "output_text": "<text>", "text": "<text>", "input_image": "<image>"}


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return _TEXTS.get(kind, "<unknown>") if isinstance(kind, str) else "<unknown>"


Part = Annotated[
    Annotated[InputText, Tag("<text>")]
    | Annotated[InputImage, Tag("<image>")]
    | Annotated[Any, _refuse("'input_text', 'output_text' or 'input_image'"), Tag("<unknown>")],
    Discriminator(_part_tag),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(string_or_list),
]


def _parts(content: str | list[Any]) -> Any:
    return content if isinstance(content, str) else [part.part() for part in content]


class MessageItem(StrictModel):
    """A message, also one that the server gave."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"phase": only("final_answer")}

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status | None = None

    def message(self) -> dict[str, Any]:
        """The chat message."""
        return {"role": self.role, "content": _parts(self.content)}


class FunctionCall(StrictModel):
    """A call that the assistant made."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "async": only(False),
        "caller": only({"type": "direct"}),
        "namespace": only(),
        "parsed_arguments": Neutral(lambda *_: True, "anything", schema={}),
    }

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None

    def message(self) -> dict[str, Any]:
        """The chat message, of one call."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "type": "function", "function": function}]}


class FunctionCallOutput(StrictModel):
    """What a function gave."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"caller": only({"type": "direct"})}

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status | None = None

    def message(self) -> dict[str, Any]:
        """The chat message of the role `tool`."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _parts(self.output)}


class ReasoningText(StrictModel):
    """A piece of reasoning or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(StrictModel):
    """What the assistant thought before its next item."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"encrypted_content": only("")}

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    status: Status | None = None

    def message(self) -> dict[str, Any]:
        """A chat message of thoughts alone, to be joined with what follows."""
        return {"role": "assistant", "reasoning_content": "".join(piece.text for piece in self.content or ())}


_ITEMS = {
    "message": "<message>",
    "function_call": "<call>",
    "function_call_output": "<output>",
    "reasoning": "<reasoning>",
}


def _item_tag(item: Any) -> str:
    if not isinstance(item, dict):
        return _ITEMS.get(getattr(item, "type", ""), "<unknown>")
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    return _ITEMS.get(kind, "<unknown>") if isinstance(kind, str) else "<unknown>"


_KNOWN = "'message', 'function_call', 'function_call_output' or 'reasoning'"
Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<call>")]
    | Annotated[FunctionCallOutput, Tag("<output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[Any, _refuse(_KNOWN), Tag("<unknown>")],
    Discriminator(_item_tag),
]
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def chat_of(items: Sequence[Any], place: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The chat messages of items, and where each came from.

    Args:
        items: Checked. Neighbouring items of the assistant are one message.
        place: What the items are called in errors: `input`.
    """
    chat: list[dict[str, Any]] = []
    places: list[str] = []
    for number, item in enumerate(items):
        message = item.message()
        if chat and _continues(chat[-1], message):
            _join(chat[-1], message)
        else:
            chat.append(message)
            places.append(f"{place}[{number}]")
    return [_without_empty(message) for message in chat], places


def _continues(last: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Whether a message belongs to the same turn of the assistant: thoughts, then words, then calls."""
    if last["role"] != "assistant" or message["role"] != "assistant" or "reasoning_content" in message:
        return False
    return "tool_calls" in message or ("content" not in last and "tool_calls" not in last)


def _join(last: dict[str, Any], message: dict[str, Any]) -> None:
    calls = last.get("tool_calls", [])
    calls += message.get("tool_calls", [])
    last.update(message)
    if calls:
        last["tool_calls"] = calls


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "reasoning_content" or value}


def stored_items(items: str | Sequence[Any]) -> list[dict[str, Any]]:
    """Input items as the server lists them, each with an id."""
    if isinstance(items, str):
        text = {"type": "input_text", "text": items}
        return [{"id": f"msg_{RequestID()}", "type": "message", "role": "user", "content": [text]}]
    return [_stored(item) for item in items]


def _stored(item: Any) -> dict[str, Any]:
    fields = item.model_dump(exclude_none=True)
    if item.type == "message" and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        fields["content"] = [{"type": kind, "text": item.content}]
    return {"id": f"{_PREFIXES[item.type]}_{RequestID()}", **fields}

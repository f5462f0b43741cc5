"""Answers of Anthropic's routes."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class AnsweredText(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None


class AnsweredThinking(TypedDict):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class AnsweredToolUse(TypedDict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageUsage(TypedDict):
    """Token counts of a message."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(TypedDict):
    """The answer of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnsweredBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """The answer of `/v1/messages/count_tokens`."""

    input_tokens: int

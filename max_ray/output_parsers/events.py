"""What an output parser reports: content, reasoning and tool calls, in the order in which the model wrote them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """A piece of the answer.

    Args:
        text: The next characters of the content.
    """

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning.

    Args:
        text: The next characters of the reasoning.
    """

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins. Its arguments follow.

    Args:
        index: Number of the call in this answer, from 0.
        id: Identifier that a tool's result refers to.
        name: Name of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of a tool call's arguments.

    Args:
        index: Number of the call in this answer.
        text: The next characters of a JSON text. The joined pieces are the arguments.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A tool call is over.

    Args:
        index: Number of the call in this answer.
    """

    index: int


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


def join_events(events: list[Event]) -> list[Event]:
    """Joins neighbouring pieces of the same kind.

    Args:
        events: Events in order.

    Returns:
        The same events with as few pieces as possible.
    """
    joined: list[Event] = []
    pieces: list[str] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ToolCallStart | ToolCallEnd):
            _close(joined, pieces)
            joined.append(event)
            continue
        if pieces and not _belongs(last, event):
            _close(joined, pieces)
        if not pieces:
            joined.append(event)
        pieces.append(event.text)
    _close(joined, pieces)
    return joined


def _belongs(last: Event | None, event: ContentDelta | ReasoningDelta | ToolCallArguments) -> bool:
    if isinstance(last, ToolCallArguments) and isinstance(event, ToolCallArguments):
        return last.index == event.index
    return type(last) is type(event)


def _close(joined: list[Event], pieces: list[str]) -> None:
    if len(pieces) > 1:
        last, text = joined[-1], "".join(pieces)
        if isinstance(last, ToolCallArguments):
            joined[-1] = ToolCallArguments(last.index, text)
        else:
            joined[-1] = ContentDelta(text) if isinstance(last, ContentDelta) else ReasoningDelta(text)
    pieces.clear()

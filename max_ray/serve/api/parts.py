"""An answer in parts (reasoning, text, tool calls), as the dialects other than OpenAI's chat tell it.

Parts come one after another. Each is begun, continued and ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from max_ray.output_parsers import ContentDelta, ReasoningDelta, ToolCallArguments, ToolCallStart
from max_ray.serve.api.choice import ChoiceDelta, ParsedDelta

PartKind = Literal["reasoning", "text", "tool_call"]


@dataclass(slots=True)
class Part:
    """One part of an answer.

    Args:
        kind: What it is.
        text: Its text so far; of a tool call the JSON text of its arguments.
        call_id: Of a tool call.
        name: The function that a tool call names.
    """

    kind: PartKind
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class PartEvent:
    """What happened to a part.

    Args:
        action: `start` of an empty part, `delta` of its text, or `stop`.
        index: Of the part in the answer.
        part: The part, as far as it is known.
        text: What a `delta` adds.
    """

    action: Literal["start", "delta", "stop"]
    index: int
    part: Part
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: PartKind
    text: str
    call_id: str = ""
    name: str = ""
    call_index: int | None = None


class PartTracker:
    """Sorts what one choice gains into parts. `parts` are those so far; one is open at a time."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._is_open = False
        self._call_index: int | None = None

    def take(self, delta: ChoiceDelta) -> list[PartEvent]:
        """What a delta does to the parts."""
        events: list[PartEvent] = []
        for piece in _pieces(delta):
            if not self._continues(piece):
                events += self.close()
                events.append(self._begin(piece))
            if piece.text:
                self.parts[-1].text += piece.text
                events.append(PartEvent("delta", len(self.parts) - 1, self.parts[-1], piece.text))
        return events

    def close(self) -> list[PartEvent]:
        """Ends the open part, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        return [PartEvent("stop", len(self.parts) - 1, self.parts[-1])]

    def _continues(self, piece: _Piece) -> bool:
        return self._is_open and self.parts[-1].kind == piece.kind and self._call_index == piece.call_index

    def _begin(self, piece: _Piece) -> PartEvent:
        self.parts.append(Part(piece.kind, "", piece.call_id, piece.name))
        self._is_open, self._call_index = True, piece.call_index
        return PartEvent("start", len(self.parts) - 1, replace(self.parts[-1]))


def _pieces(delta: ChoiceDelta) -> Iterator[_Piece]:
    if delta.text:
        yield _Piece("text", delta.text)
    for event in delta.events if isinstance(delta, ParsedDelta) else ():
        if isinstance(event, ContentDelta):
            yield _Piece("text", event.text)
        elif isinstance(event, ReasoningDelta):
            yield _Piece("reasoning", event.text)
        elif isinstance(event, ToolCallStart):
            yield _Piece("tool_call", "", event.id, event.name, event.index)
        elif isinstance(event, ToolCallArguments):
            yield _Piece("tool_call", event.text, call_index=event.index)

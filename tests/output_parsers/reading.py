"""Feeds texts to parsers and tells what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from max_ray.output_parsers import (
    ContentDelta,
    Event,
    OutputParser,
    ParserInput,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    create_parser,
    join_events,
)
from tests.output_parsers.recordings import TOOLS, Recording


@dataclass
class Reading:
    """What events mean.

    Args:
        content: All content.
        thought: All reasoning.
        names: Names of the calls.
        ids: Identifiers of the calls.
        arguments: JSON texts of the calls.
        num_ended: Calls that ended.
    """

    content: str = ""
    thought: str = ""
    names: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    num_ended: int = 0

    @property
    def calls(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(text)) for name, text in zip(self.names, self.arguments, strict=True)]

    @property
    def text(self) -> str:
        return "".join([self.thought, self.content, *self.names, *self.arguments])


def parser_of(recording: Recording) -> OutputParser:
    given = ParserInput(
        tools=TOOLS if recording.tools else {},
        prompt_end=recording.prompt_end,
        continued=recording.continued,
        make_id=lambda name, index: f"{name}-{index}",
    )
    parser = create_parser(recording.tools, recording.reasoning, given)
    assert parser is not None
    return parser


def events_of(parser: OutputParser, pieces: Iterable[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.push(piece)]
    return join_events(events + parser.flush())


def read(events: Iterable[Event]) -> Reading:
    """Checks the order of the events, too."""
    reading = Reading()
    for event in events:
        match event:
            case ContentDelta(text):
                reading.content += text
            case ReasoningDelta(text):
                reading.thought += text
            case ToolCallStart(index, call_id, name):
                assert index == len(reading.names) == reading.num_ended
                reading.names.append(name)
                reading.ids.append(call_id)
                reading.arguments.append("")
            case ToolCallArguments(index, text):
                assert index == len(reading.names) - 1 == reading.num_ended
                reading.arguments[index] += text
            case ToolCallEnd(index):
                assert index == reading.num_ended
                reading.num_ended += 1
    assert reading.num_ended == len(reading.names)
    return reading

"""From generated text to content, reasoning and tool calls.

`create_parser` makes the parser of one choice, `detect` finds the names of a model's parsers.
"""

from max_ray.output_parsers.base import OutputParser, ParserInput
from max_ray.output_parsers.detect import detect
from max_ray.output_parsers.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    join_events,
)
from max_ray.output_parsers.registry import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    create_parser,
    reasoning_parser_name,
    tool_parser_name,
)

__all__ = [
    "AUTO",
    "NONE",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "ContentDelta",
    "Event",
    "OutputParser",
    "ParserInput",
    "ReasoningDelta",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "create_parser",
    "detect",
    "join_events",
    "reasoning_parser_name",
    "tool_parser_name",
]

"""Collects the events of one answer and trims the white space around markers."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

from max_ray.output_parsers.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    join_events,
)

MakeId = Callable[[str, int], str]
_MAX_HELD_SPACE = 256
_ALPHANUMERIC = string.ascii_letters + string.digits


def openai_id() -> str:
    """A fresh identifier as the OpenAI API writes it."""
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """A fresh identifier for Mistral's templates, which take nine letters and digits only."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class TrimmedText:
    """Passes text on, without white space at the end until it is clear that text follows.

    Of a run of more than 256 white characters all is passed on, so that little is held.

    Args:
        sink: Called with pieces of the text.
    """

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._space = ""
        self._skips = False
        self._is_long = False

    def write(self, text: str) -> None:
        """Appends text."""
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        self._is_long = (self._is_long and not body) or len(self._space) > _MAX_HELD_SPACE
        if self._is_long:
            body, self._space = text, ""
        if body:
            self._sink(body)

    def trim(self) -> None:
        """A marker stands here: white space before it and after it is left out."""
        self._space, self._skips, self._is_long = "", True, False

    def flush(self) -> None:
        """The text ends here: held white space is passed on."""
        if self._space:
            self._sink(self._space)
        self._space = ""


class EventWriter:
    """The events of one answer.

    Args:
        make_id: Gives the identifier of a call that the model has not named, from name and index.
    """

    def __init__(self, make_id: MakeId) -> None:
        self.num_calls = 0
        self._make_id = make_id
        self._events: list[Event] = []
        self._content = TrimmedText(lambda text: self._events.append(ContentDelta(text)))
        self._reasoning = TrimmedText(lambda text: self._events.append(ReasoningDelta(text)))
        self._is_open = False

    def content(self, text: str) -> None:
        """Appends to the content."""
        self._content.write(text)

    def reasoning(self, text: str) -> None:
        """Appends to the reasoning."""
        self._reasoning.write(text)

    def trim_content(self) -> None:
        """Leaves out the white space of the content around this place."""
        self._content.trim()

    def trim_reasoning(self) -> None:
        """Leaves out the white space of the reasoning around this place."""
        self._reasoning.trim()

    def start_call(self, name: str, call_id: str | None = None) -> None:
        """Begins a tool call.

        Args:
            name: Name of the function.
            call_id: Identifier that the model gave; None makes one.
        """
        self.end_call()
        self._content.trim()
        self._events.append(ToolCallStart(self.num_calls, call_id or self._make_id(name, self.num_calls), name))
        self.num_calls += 1
        self._is_open = True

    def arguments(self, text: str) -> None:
        """Appends to the arguments of the call that was begun last."""
        if text:
            self._events.append(ToolCallArguments(self.num_calls - 1, text))

    def end_call(self) -> None:
        """Ends the call that is open, if one is."""
        if self._is_open:
            self._events.append(ToolCallEnd(self.num_calls - 1))
        self._is_open = False

    def flush(self) -> None:
        """The output ends here."""
        self.end_call()
        self.settle()

    def settle(self) -> None:
        """Passes on held white space."""
        self._reasoning.flush()
        self._content.flush()

    def taken(self) -> list[Event]:
        """The events since the last call, joined."""
        events, self._events = self._events, []
        return join_events(events) if len(events) > 1 else events

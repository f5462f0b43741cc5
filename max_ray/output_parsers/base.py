"""The contract of output parsers, and the base of those that are written as generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from max_ray.output_parsers.events import ContentDelta, Event
from max_ray.output_parsers.reader import Steps, TextReader
from max_ray.output_parsers.writer import EventWriter, MakeId, openai_id


@dataclass(frozen=True)
class ParserInput:
    """What a parser knows of its request.

    Args:
        tools: JSON schema of the parameters of each function, by name. Empty where no tool may be called.
        prompt_end: The end of the prompt, special tokens shown. A template may open the reasoning there.
        continued: The text of the assistant's last message where the answer continues it.
        make_id: Gives the identifier of a call, from its name and index; None for the format's own kind.
    """

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompt_end: str = ""
    continued: str = ""
    make_id: MakeId | None = None


class OutputParser(ABC):
    """Takes the text of one choice as it is generated and reports content, reasoning and tool calls.

    An instance serves one choice. The text holds the special tokens whose names are in `markers`, and no other special
    tokens. Events do not depend on how the text is cut into pieces, once neighbouring pieces are joined. No text raises
    an error: what does not follow the format is content. Only markers, and white space beside them, are left out.

    Attributes:
        markers: Texts with a meaning in the format. In some vocabularies they are special tokens.
    """

    markers: frozenset[str] = frozenset()

    @abstractmethod
    def push(self, text: str) -> list[Event]:
        """Takes the next piece of text.

        Args:
            text: The piece; may be empty.

        Returns:
            What has become certain.
        """

    @abstractmethod
    def flush(self) -> list[Event]:
        """Takes the end of the text. Called once, after the last `push`.

        Returns:
            All that was undecided.
        """


class GeneratorParser(OutputParser):
    """A parser that reads its text in `_run`.

    Args:
        given: What is known of the request.
    """

    def __init__(self, given: ParserInput | None = None) -> None:
        self._given = given or ParserInput()
        self._reader = TextReader()
        self._writer = EventWriter(self._given.make_id or self._new_id)
        self._steps = self._run()
        next(self._steps, None)

    @property
    def num_kept(self) -> int:
        """Characters in memory."""
        return self._reader.num_kept

    def push(self, text: str) -> list[Event]:
        if text:
            self._reader.feed(text)
            next(self._steps, None)
        return self._writer.taken()

    def flush(self) -> list[Event]:
        self._reader.is_ended = True
        next(self._steps, None)
        self._writer.flush()
        return self._writer.taken()

    def _new_id(self, name: str, index: int) -> str:
        """The identifier of a call that the model has not named."""
        return openai_id()

    @abstractmethod
    def _run(self) -> Steps[None]:
        """Reads the whole text, and returns at its end only."""


class ChainedParser(OutputParser):
    """A reasoning parser, and a tool parser that reads its content.

    Args:
        reasoning: Takes the text.
        tools: Takes what is content of it.
    """

    def __init__(self, reasoning: OutputParser, tools: OutputParser) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.markers = reasoning.markers | tools.markers

    def push(self, text: str) -> list[Event]:
        return self._pass(self._reasoning.push(text))

    def flush(self) -> list[Event]:
        return self._pass(self._reasoning.flush()) + self._tools.flush()

    def _pass(self, events: list[Event]) -> list[Event]:
        passed: list[Event] = []
        for event in events:
            passed += self._tools.push(event.text) if isinstance(event, ContentDelta) else [event]
        return passed

"""A choice whose text goes through an output parser."""

from __future__ import annotations

from max_ray.interfaces import TextContext, TextGenerationOutput
from max_ray.output_parsers import (
    ContentDelta,
    Event,
    OutputParser,
    ParserInput,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
    create_parser,
)
from max_ray.serve.api.choice import Choice, ChoiceDelta, ParsedDelta
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.openai import GenerationJob
from max_ray.serve.api.tool_fields import ChatOutput
from max_ray.tokenization.tokenizer import TextTokenizer

_PROMPT_END = 64
_CONTINUED_PROMPT_END = 8192
"""Tokens of a prompt in which a parser looks for what the prompt has begun."""


class ParsedChoice(Choice):
    """A choice with events instead of text.

    Args:
        index: Number of the choice.
        context: Of the choice.
        tokenizer: Of the model.
        job: The request.
        chat: How the answer is read.
        parser: Reads the text.
    """

    def __init__(
        self,
        index: int,
        context: TextContext,
        tokenizer: TextTokenizer,
        job: GenerationJob,
        chat: ChatOutput,
        parser: OutputParser,
    ) -> None:
        names = tokenizer.special_names
        shown = frozenset(names[marker] for marker in parser.markers if marker in names)
        super().__init__(index, context, tokenizer, job, shown=shown)
        self._parser = parser
        self._chat = chat
        self._has_calls = False

    def empty_delta(self) -> ParsedDelta:
        return ParsedDelta(self.index, "")

    def feed(self, output: TextGenerationOutput) -> ChoiceDelta | None:
        delta = super().feed(output)
        if delta is None:
            return None
        events = self._parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events = events + self._parser.flush()
        kept = self._kept(events)
        if self.finish_reason == "stop" and self._has_calls:
            self.finish_reason = "tool_calls"
        if not (kept or delta.tokens or delta.token_ids or self.finish_reason):
            return None
        return ParsedDelta(self.index, "", delta.tokens, self.finish_reason, delta.token_ids, kept)

    def _kept(self, events: list[Event]) -> list[Event]:
        """The events that the request wants. Where it wants one call only, the answer ends with that."""
        if not self._chat.includes_reasoning:
            events = [event for event in events if not isinstance(event, ReasoningDelta)]
        for place, event in enumerate(events):
            self._has_calls = self._has_calls or isinstance(event, ToolCallStart)
            if isinstance(event, ToolCallEnd) and not self._chat.is_parallel:
                self.finish_reason = "stop"
                return events[: place + 1]
        return events


def made_choice(
    index: int, context: TextContext, tokenizer: TextTokenizer, parsers: ModelParsers, job: GenerationJob
) -> Choice:
    """The choice of a chat request: with a parser where there is anything to tell from content.

    Args:
        index: Number of the choice.
        context: Of the choice.
        tokenizer: Of the model.
        parsers: Of the model.
        job: The request.
    """
    chat = job.chat
    assert chat is not None, "a request without messages"
    tools = chat.parser if chat.tools else None
    reasoning = parsers.reasoning if chat.separates_reasoning and not _is_one_grammar(context) else None
    if tools is None and reasoning is None:
        return Choice(index, context, tokenizer, job)
    prompt_end = end_of_prompt(context, tokenizer, chat) if reasoning else ""
    given = ParserInput(tools=chat.tools, prompt_end=prompt_end, continued=chat.continued)
    parser = create_parser(tools, reasoning, given)
    assert parser is not None
    return ParsedChoice(index, context, tokenizer, job, chat, parser)


def end_of_prompt(context: TextContext, tokenizer: TextTokenizer, chat: ChatOutput) -> str:
    """The end of a prompt, special tokens shown: where a template may have begun the reasoning.

    Args:
        context: Of the choice.
        tokenizer: Of the model.
        chat: How the answer is read.
    """
    end = context.tokens.prompt[-(_CONTINUED_PROMPT_END if chat.continued else _PROMPT_END) :]
    return tokenizer.decode_ids(end.tolist())


def _is_one_grammar(context: TextContext) -> bool:
    """Whether a grammar makes the whole answer, so that there is no reasoning before it."""
    grammar = context.sampling_params.structured_output
    return grammar is not None and grammar.kind not in ("structural_tag", "reasoning")


def joined_texts(events: list[Event]) -> tuple[str, str]:
    """Content and reasoning of a whole answer.

    Args:
        events: Of the answer.
    """
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    return content, "".join(event.text for event in events if isinstance(event, ReasoningDelta))

"""Reasoning parsers: what stands between two markers at the beginning of an answer is reasoning, the rest content."""

from __future__ import annotations

from typing import ClassVar, Literal

from max_ray.output_parsers.base import GeneratorParser, ParserInput
from max_ray.output_parsers.reader import Steps, Words


class ReasoningParser(GeneratorParser):
    """Reads one stretch of reasoning and then content.

    The reasoning begins with the output, behind white space, or the prompt has begun it. Markers later in the answer
    are content.

    Attributes:
        openers: Texts that begin the reasoning.
        closers: Texts that end it.
    """

    openers: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()

    def _run(self) -> Steps[None]:
        if self._is_begun_by_prompt() or (yield from self._take_opener()):
            yield from self._reason()
        yield from self._reader.until(Words(()), self._writer.content)

    def _reason(self) -> Steps[None]:
        self._writer.trim_reasoning()
        if (yield from self._reader.until(Words(self.closers), self._writer.reasoning)) is not None:
            self._writer.trim_reasoning()
            self._writer.trim_content()

    def _is_begun_by_prompt(self) -> bool:
        return self.place_of(self._given) == "inside"

    @classmethod
    def place_of(cls, given: ParserInput) -> Literal["before", "inside", "behind"]:
        """Where the answer begins: before any reasoning, inside of one that the prompt has begun, or behind it.

        Args:
            given: What is known of the request.
        """
        if given.continued:
            begun, ended = (max(map(given.continued.rfind, words)) for words in (cls.openers, cls.closers))
            return "inside" if begun > ended else "behind"
        end = given.prompt_end.rstrip()
        return "inside" if end.endswith(cls.openers) else "behind" if end.endswith(cls.closers) else "before"

    def _take_opener(self) -> Steps[bool]:
        place = self._reader.hold()
        yield from self._reader.skip_space()
        is_taken = False
        for opener in self.openers:
            is_taken = is_taken or (yield from self._reader.take_if(opener))
        if not is_taken:
            self._reader.rewind(place)
        self._reader.release(place)
        return is_taken


class ThinkParser(ReasoningParser):
    """`<think>...</think>`: DeepSeek R1 and V3.1, Qwen 3, QwQ, GLM 4.5, Kimi K2, SmolLM 3, first Magistral."""

    openers = ("<think>", "\u25c1think\u25b7")
    closers = ("</think>", "\u25c1/think\u25b7")
    markers = frozenset([*openers, *closers])


class MistralReasoningParser(ReasoningParser):
    """Magistral and later: `[THINK]...[/THINK]`."""

    openers = ("[THINK]", "<think>")
    closers = ("[/THINK]", "</think>")
    markers = frozenset([*openers, *closers])


class GraniteReasoningParser(ReasoningParser):
    """Granite 3.2 with headings in words; Granite 3.3 with `<think>` and `<response>` tags."""

    openers = ("Here is my thought process:", "Here's my thought process:", "<think>")
    closers = ("Here is my response:", "Here's my response:", "</think>")
    markers = frozenset(["<think>", "</think>", "<response>", "</response>"])

    def _run(self) -> Steps[None]:
        if not (self._is_begun_by_prompt() or (yield from self._take_opener())):
            yield from self._reader.until(Words(()), self._writer.content)
            return
        yield from self._reason()
        yield from self._reader.skip_space()
        is_tagged = yield from self._reader.take_if("<response>")
        ends = Words(("</response>",) if is_tagged else ())
        while (yield from self._reader.until(ends, self._writer.content)) is not None:
            self._writer.trim_content()

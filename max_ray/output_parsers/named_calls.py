"""Formats that write the name between control tokens and the arguments as JSON: Mistral, DeepSeek, Kimi K2."""

from __future__ import annotations

import re
from abc import abstractmethod

from max_ray.output_parsers.json_calls import FENCE, JSON_FENCE, JsonCallParser
from max_ray.output_parsers.reader import Steps, Words
from max_ray.output_parsers.tool_parser import ToolParser
from max_ray.output_parsers.writer import mistral_id

_KIMI_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?", re.DOTALL)


class MistralParser(JsonCallParser):
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": ...}]` up to its tokenizer's version 7.

    Later: `[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]id` between name and arguments in some versions.
    """

    openers = ("[TOOL_CALLS]",)
    markers = frozenset(["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"])

    def _new_id(self, name: str, index: int) -> str:
        return mistral_id()

    def _body(self, marker: str) -> Steps[None]:
        yield from self._reader.skip_space()
        if (yield from self._reader.peek()) in ("[", "{"):
            yield from self._json_calls()
        else:
            yield from self._named_call()

    def _named_call(self) -> Steps[None]:
        reader = self._reader
        name = yield from self._name()
        yield from reader.skip_space()
        call_id = (yield from self._name()) if (yield from reader.take_if("[CALL_ID]")) else None
        yield from reader.take_if("[ARGS]")
        yield from reader.skip_space()
        if self._is_name(name) and (yield from reader.peek()) == "{":
            self._start(name, call_id)
            yield from reader.json_value(self._writer.arguments)


class SectionParser(ToolParser):
    """Calls between control tokens, in a section between control tokens."""

    SECTION: str
    SECTION_END: str
    CALL: str

    def _body(self, marker: str) -> Steps[None]:
        reader = self._reader
        if marker == self.SECTION:
            yield from reader.skip_space()
            if not (yield from reader.take_if(self.CALL)):
                return
        while (yield from self._attempt(self._call())):
            yield from reader.skip_space()
            if not (yield from reader.take_if(self.CALL)):
                yield from reader.take_if(self.SECTION_END)
                return

    @abstractmethod
    def _call(self) -> Steps[None]:
        """Reads one call, behind its opening token."""


class DeepSeekParser(SectionParser):
    """DeepSeek V3, R1 and V3.1. Between the tokens of a call stands one of

    function<\uff5ctool\u2581sep\uff5c>name, a line break, and the arguments in a fence of kind `json`    (V3, R1)
    name<\uff5ctool\u2581sep\uff5c>arguments                                                               (V3.1)
    """

    SECTION, SECTION_END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
    CALL, CALL_END = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
    SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
    openers = (SECTION, CALL)
    markers = frozenset([SECTION, SECTION_END, CALL, CALL_END, SEPARATOR])
    _AFTER_NAME = Words([SEPARATOR, CALL_END])

    def _call(self) -> Steps[None]:
        reader = self._reader
        before, word = yield from reader.text_until(self._AFTER_NAME)
        if word != self.SEPARATOR:
            return
        name, is_fenced = before.strip(), False
        yield from reader.skip_space()
        if (yield from reader.peek()) != "{":
            name = yield from self._name()
            yield from reader.skip_space()
            is_fenced = (yield from reader.take_if(JSON_FENCE)) or (yield from reader.take_if(FENCE))
            yield from reader.skip_space()
        if not self._is_name(name) or (yield from reader.peek()) != "{":
            return
        self._start(name)
        yield from reader.json_value(self._writer.arguments)
        yield from reader.skip_space()
        if is_fenced and (yield from reader.take_if(FENCE)):
            yield from reader.skip_space()
        yield from reader.take_if(self.CALL_END)


class KimiK2Parser(SectionParser):
    """Kimi K2: `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section.

    What stands before the arguments is the call's identifier.
    """

    SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
    ARGUMENTS = "<|tool_call_argument_begin|>"
    openers = (SECTION, CALL)
    markers = frozenset([SECTION, SECTION_END, CALL, CALL_END, ARGUMENTS])
    _AFTER_NAME = Words([ARGUMENTS, CALL_END])

    def _new_id(self, name: str, index: int) -> str:
        return f"functions.{name}:{index}"

    def _call(self) -> Steps[None]:
        reader = self._reader
        before, word = yield from reader.text_until(self._AFTER_NAME)
        call_id = before.strip()
        found = _KIMI_ID.fullmatch(call_id)
        yield from reader.skip_space()
        if word != self.ARGUMENTS or found is None or not self._is_name(found[1]):
            return
        if (yield from reader.peek()) != "{":
            return
        self._start(found[1], call_id if call_id.startswith("functions.") else None)
        yield from reader.json_value(self._writer.arguments)
        yield from reader.skip_space()
        yield from reader.take_if(self.CALL_END)

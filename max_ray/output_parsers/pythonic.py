"""Formats that write calls as Python: Llama 4 and Gemma 3, and FunctionGemma's own notation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from max_ray.output_parsers.json_calls import FENCE, JSON_FENCE, JsonCallParser
from max_ray.output_parsers.python_values import LiteralError, python_arguments
from max_ray.output_parsers.reader import Steps, Words
from max_ray.output_parsers.tool_parser import ToolParser

_PLAIN = re.compile(r"[^'\"()\[\]{}]+")
_STRING_PART = {quote: Words([quote, "\\"]) for quote in "'\""}
_MAX_DEPTH = 64


class PythonicParser(JsonCallParser):
    """Llama 4: the answer is a list of calls, `[f(a=1), g(b="x")]`, or calls as JSON.

    `<|python_start|>` and `<|python_end|>` may stand around it. Arguments go out when a call is complete.
    """

    START, END = "<|python_start|>", "<|python_end|>"
    openers: ClassVar[tuple[str, ...]] = (START,)
    closers: ClassVar[Mapping[str, str]] = {START: END}
    markers = frozenset([START, END])
    checks_names = True

    def _begin(self) -> Steps[None]:
        yield from self._attempt(self._body(""))

    def _body(self, marker: str) -> Steps[None]:
        if not (yield from self._attempt(self._python_calls())):
            yield from self._json_calls()
        if self._writer.num_calls and marker in self.closers:
            yield from self._reader.skip_space()
            yield from self._reader.take_if(self.closers[marker])

    def _python_calls(self) -> Steps[None]:
        reader = self._reader
        yield from reader.skip_space()
        is_list = yield from reader.take_if("[")
        while True:
            yield from reader.skip_space()
            if not (yield from self._attempt(self._python_call())):
                return
            yield from reader.skip_space()
            if not is_list or not (yield from reader.take_if(",")):
                break
        if is_list:
            yield from reader.take_if("]")

    def _python_call(self) -> Steps[None]:
        name = yield from self._name()
        if not self._is_name(name) or not (yield from self._reader.take_if("(")):
            return
        pieces: list[str] = []
        if not (yield from self._inside_parentheses(pieces)):
            return
        try:
            arguments = python_arguments("".join(pieces))
        except LiteralError:
            return
        self._start(name)
        self._writer.arguments(json.dumps(arguments, ensure_ascii=False))

    def _inside_parentheses(self, pieces: list[str]) -> Steps[bool]:
        """Reads up to the parenthesis that closes. False where the text ends before."""
        reader, depth = self._reader, 1
        while True:
            character = yield from reader.peek()
            if not character:
                return False
            if character in _STRING_PART:
                yield from self._python_string(character, pieces)
            elif character in "([{" and depth < _MAX_DEPTH:
                depth += 1
                pieces.append(reader.take(1))
            elif character in ")]}":
                depth -= 1
                if depth == 0:
                    reader.take(1)
                    return True
                pieces.append(reader.take(1))
            elif not (yield from reader.run(_PLAIN, pieces.append)):
                return False

    def _python_string(self, quote: str, pieces: list[str]) -> Steps[None]:
        """Reads a string of one or three quotes."""
        reader = self._reader
        pieces.append(reader.take(1))
        if (yield from reader.take_if(quote)):
            if not (yield from reader.take_if(quote)):
                pieces.append(quote)
                return
            pieces.append(quote * 2)
            yield from self._string_rest(quote, 3, pieces)
            return
        yield from self._string_rest(quote, 1, pieces)

    def _string_rest(self, quote: str, num_quotes: int, pieces: list[str]) -> Steps[None]:
        reader, seen = self._reader, 0
        while seen < num_quotes:
            before, word = yield from reader.text_until(_STRING_PART[quote])
            pieces.append(before)
            if word is None:
                return
            pieces.append(word)
            seen = (0 if before else seen) + 1 if word == quote else 0
            if word == "\\" and (yield from reader.peek()):
                pieces.append(reader.take(1))


class GemmaParser(PythonicParser):
    """Gemma 3, which has no markers: `[f(a=1)]`, a fence of kind `tool_code`, or JSON, plain or in a fence."""

    CODE_FENCE = "```tool_code"
    openers = (CODE_FENCE, JSON_FENCE)
    closers: ClassVar[Mapping[str, str]] = {CODE_FENCE: FENCE, JSON_FENCE: FENCE}
    markers = frozenset()

    def _python_calls(self) -> Steps[None]:
        reader = self._reader
        yield from reader.skip_space()
        is_printed = yield from reader.take_if("print(")
        yield from super()._python_calls()
        if is_printed:
            yield from reader.take_if(")")


class FunctionGemmaParser(ToolParser):
    """FunctionGemma: `<start_function_call>call:name{key:<escape>text<escape>,other:1}<end_function_call>`."""

    START, END, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
    openers = (START,)
    markers = frozenset([START, END, ESCAPE])
    _ENDS = Words([END, ESCAPE])
    _STRING_END = Words([ESCAPE])

    def _body(self, marker: str) -> Steps[None]:
        reader = self._reader
        yield from reader.skip_space()
        if not (yield from reader.take_if("call:")):
            return
        name = yield from self._name()
        if not self._is_name(name) or (yield from reader.peek()) != "{":
            return
        source = yield from self._source()
        arguments = None if source is None else _members(source)
        if arguments is not None:
            self._start(name)
            self._writer.arguments(json.dumps(arguments, ensure_ascii=False))

    def _source(self) -> Steps[str | None]:
        """The object, with its texts as JSON strings. None where the text ends before."""
        pieces: list[str] = []
        while True:
            before, word = yield from self._reader.text_until(self._ENDS)
            pieces.append(before)
            if word == self.END:
                return "".join(pieces)
            if word is None:
                return None
            text, _ = yield from self._reader.text_until(self._STRING_END)
            pieces.append(json.dumps(text, ensure_ascii=False))


_KEY = re.compile(r'("(?:[^"\\]|\\.)*")|([{,]\s*)([^\W\d]\w*)(\s*:)')


def _members(source: str) -> dict[str, Any] | None:
    """The object whose keys stand without quotes; None where it is none."""
    quoted = _KEY.sub(lambda found: found[1] or f'{found[2]}"{found[3]}"{found[4]}', source.strip())
    try:
        value = json.loads(quoted)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

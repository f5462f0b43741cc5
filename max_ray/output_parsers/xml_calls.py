"""Formats that write each argument between tags: Qwen3-Coder and GLM 4.5. They become JSON by the tool's schema."""

from __future__ import annotations

import json
import re

from max_ray.output_parsers.reader import Sink, Steps, Words
from max_ray.output_parsers.schema_types import as_json, is_text
from max_ray.output_parsers.tool_parser import ToolParser

_NAME = re.compile(r"[^\s<>]+")


class ToolTagParser(ToolParser):
    """Writes arguments one by one as a JSON object. Those that are texts by their schema go out as they arrive."""

    def _argument(self, name: str, key: str, number: int, end: Words, line_break: str) -> Steps[bool]:
        """Reads a value up to its closing tag.

        Args:
            name: The function.
            key: The parameter.
            number: How many arguments came before.
            end: The closing tag.
            line_break: What the format writes before the closing tag and is no part of the value.

        Returns:
            False where the text ends inside.
        """
        schema = self._property(name, key)
        self._writer.arguments(("{" if number == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        if is_text(schema):
            return (yield from self._text_argument(end, line_break))
        value, word = yield from self._reader.text_until(end)
        self._writer.arguments(as_json(value.removesuffix(line_break), schema))
        return word is not None

    def _text_argument(self, end: Words, line_break: str) -> Steps[bool]:
        value = _JsonText(self._writer.arguments, line_break)
        word = yield from self._reader.until(end, value.write)
        if word is None:
            value.write("")
            return False
        value.close()
        return True

    def _close(self, num_arguments: int) -> None:
        self._writer.arguments("}" if num_arguments else "{}")


class _JsonText:
    """Writes a text as a JSON string, piece by piece. `held`: a line break at the end, until text follows."""

    def __init__(self, sink: Sink, held: str) -> None:
        self._sink = sink
        self._suffix = held
        self._held = ""
        sink('"')

    def write(self, text: str) -> None:
        text = self._held + text
        self._held = self._suffix if self._suffix and text.endswith(self._suffix) else ""
        self._sink(json.dumps(text[: len(text) - len(self._held)], ensure_ascii=False)[1:-1])

    def close(self) -> None:
        self._sink('"')


class Qwen3CoderParser(ToolTagParser):
    """Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    Line breaks stand between the tags, and one before and after each value.
    """

    openers = ("<tool_call>", "<function=")
    markers = frozenset(["<tool_call>", "</tool_call>"])
    _TAG_END = Words([">"])
    _VALUE_END = Words(["</parameter>"])

    def _body(self, marker: str) -> Steps[None]:
        reader = self._reader
        if marker == "<tool_call>":
            yield from reader.skip_space()
            if not (yield from reader.take_if("<function=")):
                return
        while (yield from self._attempt(self._function())):
            yield from reader.skip_space()
            if not (yield from reader.take_if("<function=")):
                break
        if self._writer.num_calls:
            yield from reader.take_if("</tool_call>")

    def _function(self) -> Steps[None]:
        reader = self._reader
        pieces: list[str] = []
        yield from reader.run(_NAME, pieces.append)
        name, number = "".join(pieces), 0
        if not self._is_name(name) or not (yield from reader.take_if(">")):
            return
        self._start(name)
        while True:
            yield from reader.skip_space()
            if not (yield from reader.take_if("<parameter=")):
                break
            key, _ = yield from reader.text_until(self._TAG_END)
            yield from reader.take_if("\n")
            if not (yield from self._argument(name, key, number, self._VALUE_END, "\n")):
                return
            number += 1
        if (yield from reader.take_if("</function>")):
            self._close(number)


class Glm45Parser(ToolTagParser):
    """GLM 4.5 to 4.7: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`.

    Line breaks may stand between the tags.
    """

    openers = ("<tool_call>",)
    markers = frozenset(
        ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    )
    _KEY_END = Words(["</arg_key>"])
    _VALUE_END = Words(["</arg_value>"])

    def _body(self, marker: str) -> Steps[None]:
        reader = self._reader
        pieces: list[str] = []
        yield from reader.skip_space()
        yield from reader.run(_NAME, pieces.append)
        yield from reader.skip_space()
        name, number = "".join(pieces), 0
        has_key = yield from reader.take_if("<arg_key>")
        is_over = not has_key and (yield from reader.take_if("</tool_call>"))
        if not self._is_name(name) or not (has_key or is_over):
            return
        self._start(name)
        while has_key:
            if not (yield from self._pair(name, number)):
                return
            number += 1
            yield from reader.skip_space()
            has_key = yield from reader.take_if("<arg_key>")
        if is_over or (yield from reader.take_if("</tool_call>")):
            self._close(number)

    def _pair(self, name: str, number: int) -> Steps[bool]:
        reader = self._reader
        key, _ = yield from reader.text_until(self._KEY_END)
        yield from reader.skip_space()
        yield from reader.take_if("<arg_value>")
        return (yield from self._argument(name, key.strip(), number, self._VALUE_END, ""))

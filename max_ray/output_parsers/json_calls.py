"""Formats whose calls are JSON objects with a name and arguments: Hermes, Granite, Phi-4, Llama 3, and plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

from max_ray.output_parsers.reader import Sink, Steps
from max_ray.output_parsers.tool_parser import ToolParser

_ARGUMENTS = ("arguments", "parameters")
JSON_FENCE, FENCE = "```json", "```"


def decoded_string(raw: str) -> str | None:
    """The text of a JSON string, or None where its escapes are wrong.

    Args:
        raw: The string with its quotes.
    """
    try:
        return str(json.loads(raw, strict=False))
    except ValueError:
        return None


class JsonCallParser(ToolParser):
    """Reads calls such as `{"name": "f", "arguments": {"a": 1}}`. The arguments are passed on as they arrive.

    Attributes:
        closers: The marker that ends the calls behind an opening marker, where the format has one.
    """

    closers: ClassVar[Mapping[str, str]] = {}

    def _body(self, marker: str) -> Steps[None]:
        if (yield from self._json_calls()) and marker in self.closers:
            yield from self._reader.skip_space()
            yield from self._reader.take_if(self.closers[marker])

    def _json_calls(self) -> Steps[bool]:
        """One call or several, in a list or side by side. False where none begins."""
        reader, before = self._reader, self._writer.num_calls
        yield from reader.skip_space()
        is_list = yield from reader.take_if("[")
        while True:
            yield from reader.skip_space()
            if (yield from reader.peek()) != "{" or not (yield from self._attempt(self._json_call())):
                break
            yield from reader.skip_space()
            if not (yield from reader.take_if(",")):
                yield from reader.take_if(";")
        if is_list and self._writer.num_calls > before:
            yield from reader.take_if("]")
        return self._writer.num_calls > before

    def _json_call(self, is_inner: bool = False) -> Steps[None]:
        """One object. Of its members `name` and `arguments` count, in either order.

        Args:
            is_inner: The object is the member `function` of another.
        """
        reader, before = self._reader, self._writer.num_calls
        name: str | None = None
        arguments: list[str] | None = None
        reader.take(1)
        while (key := (yield from self._key())) is not None:
            if key == "name" and name is None and (yield from reader.peek()) == '"':
                name = yield from self._string()
                if not self._is_name(name):
                    return
            elif key in _ARGUMENTS and arguments is None:
                arguments = []
                if name is not None:
                    self._start(name)
                yield from self._arguments(arguments.append if name is None else self._writer.arguments)
            elif key == "function" and not is_inner and (yield from reader.peek()) == "{":
                yield from self._json_call(is_inner=True)
            elif not (yield from reader.json_value(_ignore)):
                return
        is_whole = yield from reader.take_if("}")
        if name is not None and is_whole and self._writer.num_calls == before:
            self._start(name)
            self._writer.arguments("".join(arguments or ["{}"]))

    def _key(self) -> Steps[str | None]:
        """The next member's key, with the colon behind it. None at the end of the object, or of what is JSON."""
        reader = self._reader
        while True:
            yield from reader.skip_space()
            character = yield from reader.peek()
            if character != ",":
                break
            reader.take(1)
        if character != '"':
            return None
        key = yield from self._string()
        yield from reader.skip_space()
        if key is None or not (yield from reader.take_if(":")):
            return None
        yield from reader.skip_space()
        return key

    def _string(self) -> Steps[str | None]:
        raw: list[str] = []
        is_whole = yield from self._reader.string(raw.append)
        return decoded_string("".join(raw)) if is_whole else None

    def _arguments(self, sink: Sink) -> Steps[None]:
        """Passes on an object as it is. A string that holds an object is unpacked; null is an empty object."""
        character = yield from self._reader.peek()
        if character not in ('"', "n"):
            yield from self._reader.json_value(sink)
            return
        pieces: list[str] = []
        yield from self._reader.json_value(pieces.append)
        raw = "".join(pieces)
        inner = decoded_string(raw) if character == '"' else {"null": "{}"}.get(raw)
        sink(inner if inner is not None and inner.lstrip().startswith("{") else raw)


def _ignore(text: str) -> None:
    """A sink for what does not count."""


class HermesParser(JsonCallParser):
    """Hermes 2 Pro, Qwen 2.5, Qwen 3, Granite 4, SmolLM 3: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

    openers = ("<tool_call>",)
    closers: ClassVar[Mapping[str, str]] = {"<tool_call>": "</tool_call>"}
    markers = frozenset(["<tool_call>", "</tool_call>"])


class GraniteParser(JsonCallParser):
    """Granite 3: `<|tool_call|>[{"name": ..., "arguments": ...}]`, or `<tool_call>` before the list.

    Granite 20B function calling: `<function_call> {"name": ..., "arguments": ...}`.
    """

    openers = ("<|tool_call|>", "<tool_call>", "<function_call>")
    closers: ClassVar[Mapping[str, str]] = {"<tool_call>": "</tool_call>"}
    markers = frozenset([*openers, "</tool_call>"])


class Phi4MiniParser(JsonCallParser):
    """Phi-4-mini: `functools[{"name": ..., "arguments": ...}]`, or the list between `<|tool_call|>` tokens."""

    openers = ("functools", "<|tool_call|>")
    closers: ClassVar[Mapping[str, str]] = {"<|tool_call|>": "<|/tool_call|>"}
    markers = frozenset(["<|tool_call|>", "<|/tool_call|>"])


class Llama3JsonParser(JsonCallParser):
    """Llama 3.1 to 3.3: the answer is a call, `{"name": ..., "parameters": ...}`; several are separated by `;`.

    `<|python_tag|>` may stand before the first.
    """

    openers: ClassVar[tuple[str, ...]] = ("<|python_tag|>",)
    markers = frozenset(["<|python_tag|>"])
    checks_names = True

    def _begin(self) -> Steps[None]:
        yield from self._attempt(self._body(""))


class JsonParser(Llama3JsonParser):
    """Any model that was told to answer with JSON: an object or a list of objects with a name and arguments.

    It is the whole answer, or stands in a fence of kind `json`, or between `<tool_call>` tags.
    """

    openers = (JSON_FENCE, "<tool_call>")
    closers: ClassVar[Mapping[str, str]] = {JSON_FENCE: FENCE, "<tool_call>": "</tool_call>"}
    markers = frozenset(["<tool_call>", "</tool_call>"])

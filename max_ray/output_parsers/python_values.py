"""Reads Python literals and keyword arguments. Nothing is compiled or run."""

from __future__ import annotations

import math
import re
from typing import Any

_MAX_DEPTH = 64
_MAX_DIGITS = 4000
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<triple>\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}(?:[^\\]|\\.)*?'{3})
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<number>[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<word>[^\W\d]\w*)
      | (?P<sign>[\[\]{}(),:=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "0": "\0", "\n": ""}
_ESCAPED |= {"\\": "\\", "'": "'", '"': '"'}


class LiteralError(ValueError):
    """The text is no Python literal."""


def python_value(source: str) -> Any:
    """The value of a literal: text, number, constant, list, tuple (as a list) or dictionary.

    Args:
        source: Python source.

    Raises:
        LiteralError: The source is anything else.
    """
    tokens = _Tokens(source)
    value = tokens.value(0)
    tokens.end()
    return value


def python_arguments(source: str) -> dict[str, Any]:
    """The keyword arguments of a call.

    Args:
        source: What stands between the parentheses.

    Raises:
        LiteralError: The source is anything else, or has arguments without a name.
    """
    tokens = _Tokens(source)
    arguments: dict[str, Any] = {}
    while not tokens.is_at_end:
        name = tokens.word()
        arguments[name] = tokens.after("=")
        if not tokens.skip(","):
            break
    tokens.end()
    return arguments


class _Tokens:
    """The tokens of a source, read one after the other."""

    def __init__(self, source: str) -> None:
        self._source = source.rstrip()
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._source)

    def end(self) -> None:
        if not self.is_at_end:
            raise LiteralError("more text than one value")

    def value(self, depth: int) -> Any:
        kind, text = self._next()
        if kind == "triple":
            return _unescaped(text[3:-3])
        if kind == "string":
            return _unescaped(text[1:-1])
        if kind == "number":
            return _number(text)
        if kind == "word" and text in _WORDS:
            return _WORDS[text]
        if depth < _MAX_DEPTH and text in ("[", "("):
            return self._items("]" if text == "[" else ")", depth)
        if depth < _MAX_DEPTH and text == "{":
            return self._members(depth)
        raise LiteralError(text)

    def word(self) -> str:
        kind, text = self._next()
        if kind != "word":
            raise LiteralError(text)
        return text

    def after(self, sign: str) -> Any:
        """The value behind a sign."""
        if not self.skip(sign):
            raise LiteralError(f"no {sign!r}")
        return self.value(0)

    def skip(self, sign: str) -> bool:
        found = _TOKEN.match(self._source, self._at)
        if found is None or found["sign"] != sign:
            return False
        self._at = found.end()
        return True

    def _items(self, closer: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self.skip(closer):
            items.append(self.value(depth + 1))
            if not self.skip(","):
                self._expect(closer)
                break
        return items

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self.skip("}"):
            key = self.value(depth + 1)
            self._expect(":")
            members[key if isinstance(key, str) else str(key)] = self.value(depth + 1)
            if not self.skip(","):
                self._expect("}")
                break
        return members

    def _expect(self, sign: str) -> None:
        if not self.skip(sign):
            raise LiteralError(f"no {sign!r}")

    def _next(self) -> tuple[str, str]:
        found = _TOKEN.match(self._source, self._at)
        if found is None or found.lastgroup is None:
            raise LiteralError("no token")
        self._at = found.end()
        return found.lastgroup, found[found.lastgroup]


def _number(text: str) -> int | float:
    if len(text) > _MAX_DIGITS:
        raise LiteralError("too many digits")
    try:
        value = int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
    except ValueError as error:
        raise LiteralError(text) from error
    if not math.isfinite(value):
        raise LiteralError(text)
    return value


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_escape, text) if "\\" in text else text


def _escape(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code is None:
        return _ESCAPED.get(found[4], found[0])
    number = int(code, 16)
    is_character = number < 0x110000 and not 0xD800 <= number < 0xE000
    return chr(number) if is_character else found[0]

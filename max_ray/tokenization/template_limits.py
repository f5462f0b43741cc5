"""How much a chat template may make: its time, its texts, and the operations that make large ones out of small ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from time import thread_time
from typing import Any

from jinja2 import TemplateError

_CHECK_EVERY = 32
MAX_WIDTH = 100_000  # numbers that make texts longer: widths, line lengths, indents
_MAX_BITS = 100_000
LONG_NUMBER = re.compile(r"\d{6}")
_GIVEN_WIDTH = re.compile(r"%[-+ #0]*\*|%[^a-zA-Z%]*\.\*|\{[^{}]*\{")  # `%*d`, `%.*f`, `{:{}}`: widths among the values
_WIDTH_METHODS = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs"])
WIDTH_FILTERS = frozenset(["batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"])
TEXT_FILTERS = frozenset(
    [
        *("capitalize", "e", "escape", "forceescape", "lower", "pprint", "string", "striptags", "title", "trim"),
        *("upper", "urlencode", "urlize", "wordcount", "xmlattr", "format", "join", "replace"),
    ]
)


class TemplateLimitError(TemplateError):
    """A template that makes too long a text."""


class TemplateTimeError(TemplateLimitError):
    """A template that runs too long."""


class Budget:
    """What one rendering may still take. seconds: of this thread's processor time. characters: of one text."""

    def __init__(self, seconds: float, characters: int) -> None:
        self._seconds, self._end = seconds, thread_time() + seconds
        self.characters = characters
        self._buffered = 0
        self._ticks = 0

    def tick(self) -> None:
        """One more loop or call. Raises TemplateTimeError."""
        self._ticks += 1
        if self._ticks % _CHECK_EVERY == 0 and thread_time() > self._end:
            raise TemplateTimeError(f"it runs for more than {self._seconds:g} s")

    def check(self, size: int) -> None:
        """Raises TemplateLimitError for a text or a list of that size."""
        if size > self.characters:
            raise TemplateLimitError(f"it makes a text of more than {self.characters} characters")

    def buffer(self, size: int) -> None:
        """So many more characters inside macros and blocks. Raises TemplateLimitError."""
        self._buffered += size
        self.check(self._buffered)

    def weigh(self, *values: Any) -> int:
        """Characters in the values, about; those inside of lists and mappings too. Raises TemplateLimitError."""
        total, stack = 0, list(values)
        while stack:
            value = stack.pop()
            total += len(value) if isinstance(value, str) else 4
            if isinstance(value, Mapping):
                stack += [*value, *value.values()]
            elif isinstance(value, (list, tuple)):
                stack += value
            if total + len(stack) > self.characters:
                self.check(total + len(stack))
        return total


def _check_widths(numbers: Iterable[Any]) -> None:
    if _is_wide(numbers):
        raise TemplateLimitError(f"it asks for a width of more than {MAX_WIDTH} characters")


def check_product(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """`*` and `**`."""
    if isinstance(left, int) and isinstance(right, int):
        is_power = operator == "**"
        bits = left.bit_length() * max(0, right) if is_power else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS and not (is_power and abs(left) < 2):
            raise TemplateLimitError("it computes too large a number")
        return
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(other, int):
            budget.check(len(one) * max(0, other))


def check_format(budget: Budget, form: Any, values: tuple[Any, ...]) -> None:
    """Places of a format times what goes into them, so too large rather than too small."""
    if isinstance(form, str):
        if LONG_NUMBER.search(form) or (_GIVEN_WIDTH.search(form) and _is_wide(values)):
            raise TemplateLimitError("it formats to too large a width")
        budget.check(len(form) + (form.count("%") + form.count("{")) * budget.weigh(*values))


def _is_wide(values: Iterable[Any]) -> bool:
    return any(_is_wide(v) if isinstance(v, tuple) else isinstance(v, int) and abs(v) > MAX_WIDTH for v in values)


def _check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.check(len(text) + text.count(old) * len(new))


def check_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """A method of a string; its arguments again."""
    if name in _WIDTH_METHODS:
        _check_widths([*args, *kwargs.values()])
    elif name == "replace" and len(args) > 1:
        _check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        items = list(args[0])
        budget.check(len(text) * len(items) + budget.weigh(items))
        return (items,)
    elif name == "translate":
        raise TemplateLimitError("it calls translate(), which has no bound")
    return args


def check_filter(budget: Budget, name: str, value: Any, options: list[Any]) -> None:
    """A filter that gives a text, or pads a list."""
    if name in WIDTH_FILTERS:
        _check_widths(options)
    size = budget.weigh(value) if name not in ("batch", "slice") else 0
    texts = [option for option in options if isinstance(option, str)]
    if name == "format":
        check_format(budget, value, tuple(options))
    elif name == "replace" and len(texts) > 1:
        _check_replace(budget, str(value), texts[0], texts[1])
    elif name == "join" and texts:
        budget.check(size + len(value) * len(texts[0]))
    elif name in ("indent", "wordwrap") and isinstance(value, str):
        width = max([len(text) for text in texts] + [n for n in options if isinstance(n, int)] + [0])
        budget.check(size + (value.count("\n") + 1) * width if name == "indent" else size * max(1, *map(len, texts), 1))

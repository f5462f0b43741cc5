"""Text that arrives in pieces, read by generators.

A parser is written as a generator that reads one thing after the other. Where the text ends before a decision is
possible, the generator yields and goes on when more text has come. No decision depends on where the pieces end, so any
split of a text gives the same result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

MAX_UNDECIDED = 65536
"""Characters read before it is clear what they are. A longer beginning of a tool call is content."""
_MAX_DEPTH = 256
_STRING_STOP = re.compile(r'["\\]')
_SPACE = re.compile(r"\s*")
_SCALAR = re.compile(r"[0-9A-Za-z+\-.]+")
_BETWEEN = re.compile(r"[\s,:0-9A-Za-z+\-.]+")
_CLOSER = {"{": "}", "[": "]"}


class UndecidedError(Exception):
    """More than MAX_UNDECIDED characters were read without a decision."""


class Words:
    """Markers to look for in a text.

    Args:
        words: The markers. None may begin another.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys(words))
        assert not any(a != b and b.startswith(a) for a in self.words for b in self.words), "one word begins another"
        self.pattern = re.compile("|".join(map(re.escape, self.words)) or "(?!)")
        firsts = "".join(re.escape(word[0]) for word in self.words)
        self._firsts = re.compile(f"[{firsts}]") if firsts else None
        self._longest = max(map(len, self.words), default=1)

    def partial(self, text: str, place: int) -> int:
        """Length of the longest end of `text` that begins a word.

        Args:
            text: The text.
            place: Where the end may begin at the earliest.
        """
        start = max(place, len(text) - self._longest + 1)
        while self._firsts is not None and (found := self._firsts.search(text, start)) is not None:
            tail = text[found.start() :]
            if any(word.startswith(tail) for word in self.words):
                return len(tail)
            start = found.end()
        return 0


class TextReader:
    """The text so far and the place in it.

    `is_ended` is set when no more text will come. Positions are counted from the beginning of the whole text.
    """

    def __init__(self) -> None:
        self.is_ended = False
        self._text = ""
        self._base = 0
        self._at = 0
        self._holds: list[int] = []

    @property
    def place(self) -> int:
        """Position of the next character."""
        return self._base + self._at

    @property
    def num_kept(self) -> int:
        """Characters in memory."""
        return len(self._text)

    def feed(self, text: str) -> None:
        """Appends a piece of text."""
        start = min([self._at, *(hold - self._base for hold in self._holds)])
        self._text = self._text[start:] + text
        self._base += start
        self._at -= start

    def hold(self) -> int:
        """Keeps the text from here on, so that `rewind` can come back. Returns the place."""
        self._holds.append(self.place)
        return self.place

    def release(self, place: int) -> None:
        """Ends one `hold`, where `decide` has not ended all."""
        if place in self._holds:
            self._holds.remove(place)

    def decide(self) -> None:
        """Ends all holds: it is clear now what the text is."""
        self._holds.clear()

    def rewind(self, place: int) -> None:
        """Goes back to a place that is held."""
        self._at = place - self._base

    def take(self, num_characters: int) -> str:
        """The next characters, which must have arrived. Raises UndecidedError where a hold is too long."""
        text = self._text[self._at : self._at + num_characters]
        self._at += len(text)
        if self._holds and self.place - self._holds[0] > MAX_UNDECIDED:
            raise UndecidedError
        return text

    def peek(self) -> Steps[str]:
        """The next character, without taking it; empty at the end."""
        while self._at == len(self._text) and not self.is_ended:
            yield
        return self._text[self._at : self._at + 1]

    def skip_space(self) -> Steps[None]:
        """Takes white space."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self.take(found.end() - self._at)
            if self._at < len(self._text) or self.is_ended:
                return
            yield

    def take_if(self, word: str) -> Steps[bool]:
        """Takes `word` if the text goes on with it."""
        while True:
            ahead = self._text[self._at : self._at + len(word)]
            if ahead == word:
                self.take(len(word))
                return True
            if self.is_ended or not word.startswith(ahead):
                return False
            yield

    def until(self, words: Words, sink: Sink) -> Steps[str | None]:
        """Passes on the text before the first of `words` as it arrives, and takes the word.

        Args:
            words: What to look for.
            sink: Called with pieces of the text before.

        Returns:
            The word, or None at the end of the text.
        """
        while True:
            found = words.pattern.search(self._text, self._at)
            if found is not None:
                self._pass(found.start(), sink)
                return self.take(len(found[0]))
            self._pass(len(self._text) - (0 if self.is_ended else words.partial(self._text, self._at)), sink)
            if self.is_ended:
                return None
            yield

    def text_until(self, words: Words) -> Steps[tuple[str, str | None]]:
        """The text before the first of `words`, and the word. Only for short texts: they are kept."""
        pieces: list[str] = []
        word = yield from self.until(words, pieces.append)
        return "".join(pieces), word

    def string(self, sink: Sink) -> Steps[bool]:
        """Passes on a JSON string, with its quotes, as it arrives. The next character is its first quote.

        Returns:
            False where the text ends inside.
        """
        sink(self.take(1))
        while True:
            found = _STRING_STOP.search(self._text, self._at)
            self._pass(len(self._text) if found is None else found.start(), sink)
            if found is not None and found[0] == '"':
                sink(self.take(1))
                return True
            if found is not None and len(self._text) - self._at >= 2:
                sink(self.take(2))
            elif self.is_ended:
                self._pass(len(self._text), sink)
                return False
            else:
                yield

    def json_value(self, sink: Sink) -> Steps[bool]:
        """Passes on one JSON value as it arrives. Brackets and strings are checked, the rest is not.

        Returns:
            False where the text ends inside, or goes on with what is no JSON. That is not taken.
        """
        closers: list[str] = []
        while True:
            character = yield from self.peek()
            if character == '"':
                if not (yield from self.string(sink)):
                    return False
            elif character in _CLOSER and len(closers) < _MAX_DEPTH:
                closers.append(_CLOSER[character])
                sink(self.take(1))
            elif closers and character == closers[-1]:
                closers.pop()
                sink(self.take(1))
            elif not (yield from self.run(_BETWEEN if closers else _SCALAR, sink)):
                return False
            if not closers:
                return True

    def run(self, kind: re.Pattern[str], sink: Sink) -> Steps[bool]:
        """Passes on a run of characters.

        Args:
            kind: Matches characters one by one (`[a-z]+`).
            sink: Called with pieces of the run.

        Returns:
            False where the text goes on with another character.
        """
        is_any = False
        while True:
            found = kind.match(self._text, self._at)
            if found is not None:
                is_any = True
                self._pass(found.end(), sink)
            if self._at < len(self._text) or self.is_ended:
                return is_any
            yield

    def _pass(self, end: int, sink: Sink) -> None:
        if end > self._at:
            sink(self.take(end - self._at))

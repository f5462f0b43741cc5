"""From a stream of token ids to a stream of text, and where a stop string ends it. One of each per choice.

A detokenizer begins behind a prompt (`prime`): a decoder treats the first token of a text in a special way (it drops
its space), and a prompt may end inside a character. It tells where each token's text begins, too (`locate`).
Every token costs the same, the thousandth as the first.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are not (yet) a character
_TRIM_LENGTH = 4
# So many tokens without one clean end are not text (a character has at most four): no use waiting for it.
_GIVE_UP_LENGTH = 64


class Detokenizer(Protocol):
    """Text from tokens, as soon as it is certain. Use either `push` and `flush`, or `locate` and `flush_located`.

    num_unsettled: replacement characters that stand now for bytes whose character is not complete.
    """

    @property
    def num_unsettled(self) -> int: ...

    def prime(self, token_ids: Sequence[int]) -> None:
        """Takes the last tokens of what comes before. Their text is not given out, but for a character that they
        begin and do not complete."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; often empty inside a multi-byte character."""

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""

    def locate(self, token_id: int) -> tuple[str, list[int]]:
        """`push` of one token, and the places of the tokens (in order, the earliest not yet told first) whose place
        became certain: how many characters come before the one in which the token's text begins."""

    def flush_located(self) -> tuple[str, list[int]]:
        """`flush`, and the places of the remaining tokens."""


class ByteDetokenizer:
    """For tokenizers that glue texts byte by byte: nothing is decoded but bytes, and most tokens are a look-up.

    whole: the text of a token that is whole characters; None for others, empty for one that leaves nothing.
    bytes_of: what a token adds to the text.
    """

    def __init__(self, whole: Callable[[int], str | None], bytes_of: Callable[[int], bytes]) -> None:
        self._whole = whole
        self._bytes_of = bytes_of
        self._pending = b""  # the beginning of a character
        self._count = 0

    @property
    def num_unsettled(self) -> int:
        return 1 if self._pending else 0

    def prime(self, token_ids: Sequence[int]) -> None:
        self.push(token_ids)
        self._count = 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token) for token in token_ids])

    def flush(self) -> str:
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text

    def locate(self, token_id: int) -> tuple[str, list[int]]:
        start = self._count + self._breaks_character(token_id)
        text = self._push(token_id)
        self._count += len(text)
        return text, [start]

    def flush_located(self) -> tuple[str, list[int]]:
        return self.flush(), []

    def _push(self, token: int) -> str:
        if not self._pending:
            text = self._whole(token)
            if text is not None:
                return text
        content = self._pending + self._bytes_of(token)
        text, length = codecs.utf_8_decode(content, "replace", False)
        self._pending = content[length:]
        return text

    def _breaks_character(self, token: int) -> bool:
        """The token's first byte does not continue the character that waits."""
        first = self._bytes_of(token)[:1] if self._pending else b""
        return bool(first) and len((self._pending + first).decode(errors="replace")) > 1


class IncrementalDetokenizer:
    """For all other tokenizers.

    decode: text of a list of ids (special tokens left out or not, as the caller wants them).
    is_hidden: tells the tokens that leave nothing in the text of `decode`.

    A window of the last tokens is decoded at each push; never the whole text:

        window text:  [0, emitted) given out    [emitted, settled) given out now    the rest may still change

    Text is unsettled only while it ends in replacement characters: a character whose bytes come in several tokens
    (some decoders then show every byte of a run of bytes so, whole characters before it included). The window is
    cut at a *clean* token border (no replacement character before it), and keeps at least one token of context,
    because decoders treat the first token of a text in a special way. Text once given out stays: where a decoder
    takes it back, as of a run of bytes that goes on, the run is decoded from its last clean border on.
    """

    def __init__(self, decode: Callable[[list[int]], str], is_hidden: Callable[[int], bool] | None = None) -> None:
        self._decode = decode
        self._is_hidden = is_hidden
        self._window: list[int] = []
        self._text = ""  # of the window
        self._emitted = 0
        self._is_settled = True
        self._count = 0  # characters given out in all
        # The group: the tokens since the last clean border before the newest token.
        self._border = 0  # tokens of the window before it
        self._before = ""  # the window's text before it
        self._group_start = 0  # characters given out before it
        self._unplaced: list[int] = []  # of each token without a place: how many tokens of the group stand before it

    @property
    def num_unsettled(self) -> int:
        return len(self._text) - self._emitted

    def prime(self, token_ids: Sequence[int]) -> None:
        text = self._decode(list(token_ids)) if token_ids else ""
        if REPLACEMENT in text:
            self.push(token_ids)
            self._group_start -= self._count
            self._count = 0
        else:
            self._window, self._text, self._emitted = list(token_ids), text, len(text)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token) for token in token_ids])

    def flush(self) -> str:
        text = self._give(len(self._text))
        self._window, self._text, self._before = [], "", ""
        self._emitted = self._border = 0
        self._is_settled = True
        return text

    def locate(self, token_id: int) -> tuple[str, list[int]]:
        self._begin_group()
        self._unplaced.append(len(self._window) - self._border)
        text = self._push(token_id)
        return text, self._places() if self._is_settled else []

    def flush_located(self) -> tuple[str, list[int]]:
        places = self._places()
        return self.flush(), places

    def _push(self, token: int) -> str:
        if self._is_hidden is not None and self._is_hidden(token):
            return ""
        self._begin_group()
        self._window.append(token)
        self._text = self._decode(self._window)
        if not self._text.startswith(self._before):
            self._leave_out_what_was_before()
        self._is_settled = not self._text.endswith(REPLACEMENT)
        if len(self._window) - self._border >= _GIVE_UP_LENGTH:
            self._is_settled = True
        return self._give(len(self._text if self._is_settled else self._text.rstrip(REPLACEMENT)))

    def _give(self, end: int) -> str:
        """The window's text up to `end`, without what was given out already."""
        new = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        self._count += len(new)
        return new

    def _begin_group(self) -> None:
        """Once all text is settled, the next token begins a group, and a long window is cut."""
        if not self._is_settled or self._border == len(self._window):
            return
        if len(self._window) >= _TRIM_LENGTH:
            self._trim()
        self._border, self._before, self._group_start = len(self._window), self._text, self._count

    def _trim(self) -> None:
        """Keeps the last group: a decoder drops a space at the beginning, so one that is nothing else is no context."""
        is_long = len(self._window) >= _GIVE_UP_LENGTH
        kept = self._window[self._border or -1 :] if self._border or is_long else self._window
        text = self._decode(kept)
        if text or is_long:
            self._window, self._text, self._emitted = kept, text, len(text)

    def _leave_out_what_was_before(self) -> None:
        del self._window[: self._border]
        self._text = self._decode(self._window)
        self._emitted -= len(self._before)
        self._border, self._before = 0, ""

    def _places(self) -> list[int]:
        """Of the group's tokens. One begins where the text of those before it ends, as far as that text has stayed."""
        group = self._text[len(self._before) :]
        places = []
        for num_before in self._unplaced:
            window = self._window[: self._border + num_before]
            earlier = self._decode(window)[len(self._before) :] if num_before else ""
            places.append(self._group_start + _common_length(earlier, group))
        self._unplaced = []
        return places


def _common_length(one: str, other: str) -> int:
    """Of the beginning that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Search:
    """Looks for some strings in a text, and for the beginning of one at its end."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string would stop at once"
        self._strings = tuple(strings)
        self._first_characters = frozenset(s[0] for s in strings)
        self._longest_partial = max((len(s) for s in strings), default=1) - 1

    def __bool__(self) -> bool:
        return bool(self._strings)

    def matches(self, text: str) -> list[tuple[int, int, str]]:
        """(end, start, string) of the first occurrence of each."""
        places = [(text.find(s), s) for s in self._strings]
        return [(start + len(s), start, s) for start, s in places if start >= 0]

    def partial_length(self, text: str) -> int:
        """Length of the longest end of the text that begins some string."""
        length = len(text)
        for start in range(max(0, length - self._longest_partial), length):
            if text[start] not in self._first_characters:
                continue
            tail = text[start:]
            if any(s.startswith(tail) for s in self._strings):
                return length - start
        return 0


class StopStringMatcher:
    """Finds the first stop string to be completed, reading character by character, so the result does not depend on
    how the text was cut into tokens. Of several that end at the same character the longest counts.

    Text that may be the beginning of a stop string is held back; the stop string itself is given out with
    `includes_stop` alone.
    """

    def __init__(self, stop: Sequence[str], *, includes_stop: bool = False) -> None:
        self._search = _Search(stop)
        self._includes_stop = includes_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string; `matched` is set when one was completed."""
        assert self.matched is None, "text after the stop string"
        if not self._search:
            return text
        self._held += text
        found = self._search.matches(self._held)
        if not found:
            return self._release(len(self._held) - self._search.partial_length(self._held))
        _, start, self.matched = min(found)
        before, self._held = self._held[:start], ""
        return self._with_stop(before)

    def push_special(self, name: str) -> str:
        """A special token stands here, which is not in the text."""
        return ""

    def flush(self) -> str:
        """The held text, when the end has come and no stop string was completed."""
        return self._release(len(self._held))

    def _with_stop(self, before: str) -> str:
        return before + (self.matched or "") if self._includes_stop else before

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class SpecialStopStringMatcher(StopStringMatcher):
    """The same with stop strings that hold names of special tokens. These are looked for in the text with special
    tokens shown, the others in the text without them; what is given out is without them.

    stop: the others.
    special_stop: those with a special token's name in them.
    """

    def __init__(self, stop: Sequence[str], special_stop: Sequence[str], *, includes_stop: bool = False) -> None:
        super().__init__(stop, includes_stop=includes_stop)
        self._special_search = _Search(special_stop)
        self._visible: list[bool] = []  # of each held character: it is no special token's

    def push(self, text: str) -> str:
        return self._take(text, True)

    def push_special(self, name: str) -> str:
        return self._take(name, False)

    def _take(self, piece: str, is_visible: bool) -> str:
        assert self.matched is None, "text after the stop string"
        self._held += piece
        self._visible += [is_visible] * len(piece)
        places = [place for place, visible in enumerate(self._visible) if visible]
        text = "".join([self._held[place] for place in places])
        found = [(places[end - 1] + 1, places[start], s) for end, start, s in self._search.matches(text)]
        found += self._special_search.matches(self._held)
        if found:
            _, start, self.matched = min(found)
            before = self._release(start)
            self._held, self._visible = "", []
            return self._with_stop(before)
        partial = self._search.partial_length(text)
        held_from = len(self._held) - self._special_search.partial_length(self._held)
        return self._release(min(held_from, places[-partial]) if partial else held_from)

    def _release(self, length: int) -> str:
        pairs = zip(self._held[:length], self._visible[:length], strict=True)
        self._held, self._visible = self._held[length:], self._visible[length:]
        return "".join([character for character, visible in pairs if visible])

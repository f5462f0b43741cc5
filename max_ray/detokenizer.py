"""From a stream of token ids to a stream of text, and where a stop string ends it. One of each per choice.

Both cost the same for the thousandth token as for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are not (yet) a character
_TRIM_LENGTH = 16
# So many tokens without one clean end are not text (a character has at most four): no use waiting for it.
_GIVE_UP_LENGTH = 64


class IncrementalDetokenizer:
    """Emits the text of tokens as soon as it is settled.

    decode: text of a list of ids (special tokens left out or not, as the caller wants them).
    whole: the text of a token that is the same wherever it stands, None for one whose text depends on its neighbours.
    Most tokens of a byte-level vocabulary are whole characters: they cost a look-up and no decoding.

    A window of the last tokens is decoded at each push; never the whole text:

        window text:  [0, emitted) given out    [emitted, settled) given out now    the rest may still change

    Text is unsettled only while it ends in replacement characters: a character whose bytes come in several tokens
    (some decoders then show every byte of a run of bytes so, whole characters before it included). The window is
    cut at a *clean* token border (no replacement character before it), and keeps at least one token of context,
    because decoders treat the first token of a text in a special way.
    """

    def __init__(self, decode: Callable[[list[int]], str], whole: Callable[[int], str | None] | None = None) -> None:
        self._decode = decode
        self._whole = whole
        self._window: list[int] = []
        self._emitted = 0
        self._clean = 0  # the last clean border inside the window, before the newest clean end

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; often empty inside a multi-byte character."""
        return "".join([self._push(token) for token in token_ids])

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        text = self._decode(self._window)[self._emitted :] if self._window else ""
        self._window, self._emitted, self._clean = [], 0, 0
        return text

    def _push(self, token: int) -> str:
        if self._whole is not None and self._clean == len(self._window):
            text = self._whole(token)
            if text is not None:
                self._window = [token]
                self._emitted, self._clean = len(text), 1
                return text
        self._window.append(token)
        text = self._decode(self._window)
        clean = not text.endswith(REPLACEMENT)
        settled = len(text.rstrip(REPLACEMENT))
        new = text[self._emitted : settled]
        self._emitted = max(self._emitted, settled)
        if clean:
            self._trim()
        elif len(self._window) - self._clean >= _GIVE_UP_LENGTH:
            return new + self.flush()
        return new

    def _trim(self) -> None:
        """Cuts the window at the previous clean border once it is long, and remembers this one."""
        if len(self._window) >= _TRIM_LENGTH and self._clean:
            del self._window[: self._clean]
            self._emitted = len(self._decode(self._window))
        self._clean = len(self._window)


class StopStringMatcher:
    """Finds the first stop string to be completed, reading character by character, so the result does not depend on
    how the text was cut into tokens. Of several that end at the same character the longest counts.

    Text that may be the beginning of a stop string is held back; the stop string itself is never given out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string would stop at once"
        self._stop = tuple(stop)
        self._first_characters = frozenset(s[0] for s in stop)
        self._longest_partial = max((len(s) for s in stop), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string; `matched` is set when one was completed."""
        assert self.matched is None, "text after the stop string"
        if not self._stop:
            return text
        self._held += text
        found = self._first_match()
        if found is None:
            return self._release(len(self._held) - self._partial_length())
        start, self.matched = found
        before, self._held = self._held[:start], ""
        return before

    def flush(self) -> str:
        """The held text, when the end has come and no stop string was completed."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _first_match(self) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, the longest of those."""
        places = [(self._held.find(s), s) for s in self._stop]
        matches = [(start + len(s), start, s) for start, s in places if start >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _partial_length(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        length = len(self._held)
        for start in range(max(0, length - self._longest_partial), length):
            if self._held[start] not in self._first_characters:
                continue
            tail = self._held[start:]
            if any(s.startswith(tail) for s in self._stop):
                return length - start
        return 0

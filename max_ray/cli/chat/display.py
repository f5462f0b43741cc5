"""Display: how an answer and its speed are written to the terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TextIO

from max_ray import settings
from max_ray.cli.chat.client import Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal may take as an order; a line feed and a tab are none."""


class Display:
    """Writes to `stream`; reasoning and notes are dimmed on a terminal, unless NO_COLOR is set.

    On a terminal, control characters of an answer are left out: a model's text must not steer it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._is_styled = self.is_terminal and settings.variable("NO_COLOR") is None

    def note(self, text: str) -> None:
        """A line about the chat."""
        self._write(f"{self._styled(text)}\n")

    def answer(self, pieces: Iterable[Piece], so_far: list[str]) -> str:
        """Writes an answer as it comes, then a line with its speed.

        Args:
            pieces: Of the answer.
            so_far: Gets the text of each piece, so that it is there when the answer is cut short.

        Returns:
            The line with the speed.
        """
        speed = Speed()
        is_reasoning = False
        for piece in pieces:
            speed.count(piece)
            if piece.reasoning:
                self._write(self._styled(self._safe(piece.reasoning)))
                is_reasoning = True
            if piece.content:
                self._write("\n\n" if is_reasoning else "")
                is_reasoning = False
                so_far.append(piece.content)
                self._write(self._safe(piece.content))
        self._write("\n")
        return speed.line()

    def _safe(self, text: str) -> str:
        return _CONTROL.sub("", text) if self.is_terminal else text

    def _styled(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._is_styled else text

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Speed:
    """Times of one answer, from the making on."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._first: float | None = None
        self._last = self._asked
        self._num_pieces = 0
        self._num_tokens: int | None = None
        self._finish_reason: str | None = None

    def count(self, piece: Piece) -> None:
        """Takes a piece that has just come."""
        self._num_tokens = self._num_tokens if piece.num_tokens is None else piece.num_tokens
        self._finish_reason = piece.finish_reason or self._finish_reason
        if not piece.content and not piece.reasoning:
            return
        self._last = time.monotonic()
        self._first = self._last if self._first is None else self._first
        self._num_pieces += 1

    def line(self) -> str:
        """Tokens, tokens a second after the first one, and the time to the first; pieces where no usage came."""
        if self._first is None:
            return "[no text]"
        count, unit = (self._num_pieces, "pieces") if self._num_tokens is None else (self._num_tokens, "tokens")
        parts = [f"{count} {unit}"]
        if count > 1 and self._last > self._first:
            parts.append(f"{(count - 1) / (self._last - self._first):.1f} {unit}/s")
        parts.append(f"first token {self._first - self._asked:.2f} s")
        if self._finish_reason == "length":
            parts.append("cut off at max_tokens or the model's length")
        return f"[{', '.join(parts)}]"

"""A progress bar on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TextIO

_WIDTH = 30
_MIN_GAP_S = 0.1


class Progress:
    """Counts ended requests and redraws at most ten times a second. `close` leaves the line empty."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._begin = self._last = perf_counter()
        self._done = 0
        self._failed = 0

    def advance(self, *, failed: bool) -> None:
        self._done += 1
        self._failed += failed
        now = perf_counter()
        if self._shown and (now - self._last >= _MIN_GAP_S or self._done == self._total):
            self._last = now
            self._stream.write("\r" + self._line(now - self._begin))
            self._stream.flush()

    def close(self) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, seconds: float) -> str:
        filled = _WIDTH * self._done // max(1, self._total)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {self._done}/{self._total}{failed}, {seconds:.0f} s"

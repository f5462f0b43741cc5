"""How far loading is: a bar on a terminal, otherwise a log line every few seconds; nothing for loads that are quick."""

from __future__ import annotations

import sys
import time

from max_ray.log import get_logger

_LOG = get_logger(__name__)
_FIRST_AFTER_S = 1.0
_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.1
_BAR_WIDTH = 30
_MIB = 1024**2


class LoadProgress:
    """Counts bytes read of `total`; says so on stderr now and then."""

    def __init__(self, total: int, *, is_terminal: bool | None = None) -> None:
        self._total = max(1, total)
        self._done = 0
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._started = time.monotonic()
        self._next = self._started + _FIRST_AFTER_S
        self._said = False

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._said = True
        self._next = now + (_BAR_EVERY_S if self._is_terminal else _LINE_EVERY_S)
        if self._is_terminal:
            print(f"\r{self._bar()}", end="", file=sys.stderr, flush=True)
        else:
            _LOG.info("%s", self._figures())

    def end(self) -> None:
        """Ends the line of a bar."""
        if self._said and self._is_terminal:
            print(f"\r{self._bar()}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _bar(self) -> str:
        filled = min(_BAR_WIDTH, _BAR_WIDTH * self._done // self._total)
        return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._figures()}  "

    def _figures(self) -> str:
        speed = self._done / max(1e-6, self.seconds)
        left = max(0, self._total - self._done) / max(1.0, speed)
        return (
            f"loading weights: {self._done / _MIB:.0f} of {self._total / _MIB:.0f} MiB, "
            f"{speed / _MIB:.0f} MiB/s, {left:.0f} s left"
        )

"""How far loading is: a bar on a terminal, otherwise a log line every few seconds; nothing for loads that are quick."""

from __future__ import annotations

import sys
import time
from typing import Any

from max_ray.log import get_logger

_LOG = get_logger(__name__)
_FIRST_AFTER_S = 1.0
_LINE_EVERY_S = 5.0
_MIB = 1024**2


class LoadProgress:
    """Counts bytes that were read.

    Args:
        total: Bytes to read.
        is_terminal: Whether to draw a bar on stderr; None: if that is a terminal.
    """

    def __init__(self, total: int, *, is_terminal: bool | None = None) -> None:
        self._total = max(1, total)
        self._done = 0
        self._started = time.monotonic()
        self._next = self._started + _FIRST_AFTER_S
        is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._bar = _bar(self._total) if is_terminal else None

    def add(self, count: int) -> None:
        """`count` more bytes were read."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_EVERY_S
            _LOG.info("%s", self._figures())

    def end(self) -> None:
        """Ends the line of a bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since loading began."""
        return time.monotonic() - self._started

    def _figures(self) -> str:
        speed = self._done / max(1e-6, self.seconds)
        left = max(0, self._total - self._done) / max(1.0, speed)
        return (
            f"loading weights: {self._done / _MIB:.0f} of {self._total / _MIB:.0f} MiB, "
            f"{speed / _MIB:.0f} MiB/s, {left:.0f} s left"
        )


def _bar(total: int) -> Any:
    from tqdm import tqdm  # costs nothing where no bar is drawn

    return tqdm(desc="loading weights", total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=_FIRST_AFTER_S)

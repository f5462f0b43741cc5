"""What Ray forwards to the terminal while an application starts.

A model that cannot be loaded is one sentence of ours, and Serve's controller writes fifty lines of traceback around it.
Ray prints the lines of its processes to `sys.stdout` and `sys.stderr`, each behind the name of its process. Those of
the controller are held back until it is known how the start ends.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO, cast

FORWARDED = re.compile(r"(\x1b\[\d+m)?\((\S+ )?(pid=|raylet|autoscaler)")
"""How a line that Ray forwards begins."""
_OF_CONTROLLER = re.compile(r"(\x1b\[\d+m)?\(ServeController ")


class StartLog:
    """From its making on, nothing of Serve's controller is printed."""

    def __init__(self) -> None:
        self._streams = sys.stdout, sys.stderr
        self._held: list[tuple[TextIO, str]] = []
        self._is_silent = False
        sys.stdout, sys.stderr = (cast(TextIO, Lines(stream, self._take)) for stream in self._streams)

    def release(self) -> None:
        """Prints what was held back, and from now on everything as it comes; nothing where it was silenced."""
        if self._is_silent:
            return
        sys.stdout, sys.stderr = self._streams
        while self._held:
            stream, line = self._held.pop(0)
            stream.write(line)

    def silence(self) -> None:
        """Drops what was held back, and from now on everything that Ray forwards."""
        self._is_silent = True
        self._held.clear()

    def _take(self, stream: TextIO, line: str) -> None:
        """Called by any thread."""
        if self._is_silent and FORWARDED.match(line):
            return
        if _OF_CONTROLLER.match(line):
            self._held.append((stream, line))
        else:
            stream.write(line)


class Lines:
    """A text stream that hands over whole lines; each thread writes lines of its own."""

    def __init__(self, stream: TextIO, take: Callable[[TextIO, str], None]) -> None:
        self._stream = stream
        self._take = take
        self._begun = threading.local()

    def write(self, text: str) -> int:
        *lines, self._begun.line = (getattr(self._begun, "line", "") + text).split("\n")
        for line in lines:
            self._take(self._stream, line + "\n")
        return len(text)

    def flush(self) -> None:
        """Writes a line that was begun, too: who flushes wants it to be seen."""
        line, self._begun.line = getattr(self._begun, "line", ""), ""
        self._take(self._stream, line)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

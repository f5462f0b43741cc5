"""The terminal of `max-ray serve`: our few lines, and the warnings and errors of our own code. All else is in a file.

Ray, Serve and their processes write dozens of lines at a start and at an end, some of which sound like trouble and are
none. They write them to Python's streams and to the file descriptors below; both lead to the file here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from max_ray import settings
from max_ray.serve.start_log import FORWARDED, Lines

_KEPT_FILES = 20
_OWN_PROBLEM = re.compile(r"\b(WARNING|ERROR|CRITICAL) (max_ray|architectures|deployments)\b")
_OWN_LOG = re.compile(r"\bINFO (?:max_ray|architectures|deployments)[\w.]*(?: \[rank \d+/\d+\])?: (.*)")
_CLEAR = "\r\x1b[K"


@contextmanager
def server_terminal() -> Iterator[None]:
    """Until the end of the block, what is not ours goes to a file, which the first line names.

    Ctrl-C raises KeyboardInterrupt also where SIGINT was ignored, as shells do it with jobs in the background.
    With MAX_RAY_LOG_LEVEL, or where no file can be written, everything stays on the terminal.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = None if settings.variable(settings.LOG_LEVEL) else _new_file(settings.cache_dir() / "logs")
    if file is None:
        yield
        return
    with file, _Redirection(file):
        print(f"The log is in {file.name} (all of it on the terminal: MAX_RAY_LOG_LEVEL=INFO).", flush=True)
        yield


def _new_file(folder: Path) -> TextIO | None:
    """A log file that its owner alone can read; older ones are removed but for some."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("serve-*.log"), key=lambda path: path.stat().st_mtime)
        for path in old[: len(old) - _KEPT_FILES + 1]:
            path.unlink(missing_ok=True)
        file = folder / f"serve-{os.getpid()}.log"
        file.unlink(missing_ok=True)
        file.touch(0o600, exist_ok=False)
        return file.open("a", buffering=1)
    except OSError:
        return None


class _Redirection:
    """Leads the standard streams and their descriptors to a file while it is entered; picked lines to the terminal."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.RLock()
        self._is_starting = True
        self._has_transient = False

    def __enter__(self) -> None:
        self._streams = sys.stdout, sys.stderr
        for stream in self._streams:
            stream.flush()
        self._saved = os.dup(1), os.dup(2)
        self._out, self._err = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in self._saved)
        for fd in (1, 2):
            os.dup2(self._file.fileno(), fd)
        sys.stdout = cast(TextIO, Lines(self._out, self._take_output))
        sys.stderr = cast(TextIO, Lines(self._err, self._take_problem))

    def __exit__(self, *_: object) -> None:
        self._clear()
        sys.stdout, sys.stderr = self._streams
        for fd, saved in enumerate(self._saved, start=1):
            os.dup2(saved, fd)
            os.close(saved)
        self._out.close()
        self._err.close()

    def _take_output(self, stream: TextIO, line: str) -> None:
        self._take(stream, line, is_ours=not FORWARDED.match(line))

    def _take_problem(self, stream: TextIO, line: str) -> None:
        self._take(stream, line, is_ours=line.startswith("max-ray: "))

    def _take(self, stream: TextIO, line: str, is_ours: bool) -> None:
        with self._lock:
            if not is_ours:
                self._file.write(line)
            if is_ours or _OWN_PROBLEM.search(line):
                self._clear()
                stream.write(line)
                self._is_starting = self._is_starting and not line.startswith("Serving ")
            elif self._is_starting and self._out.isatty() and (found := _OWN_LOG.search(line)):
                width = shutil.get_terminal_size().columns - 3
                self._out.write(f"{_CLEAR}  {found[1][:width]}")
                self._out.flush()
                self._has_transient = True

    def _clear(self) -> None:
        if self._has_transient:
            self._out.write(_CLEAR)
            self._out.flush()
        self._has_transient = False

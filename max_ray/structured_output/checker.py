"""GrammarChecker: whether a client's grammar can be enforced, asked of a process that may be killed over it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from max_ray.errors import InputError, MaxRayError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output.grammar_text import MAX_TEXT_BYTES

WALL_SECONDS = 20.0
MAX_REMEMBERED = 1024
_PACKAGES = str(Path(__file__).parents[2])  # where this package was found; the process may have another path
_CODE = (
    f"import sys; sys.path.insert(0, {_PACKAGES!r}); from max_ray.structured_output.check_process import main; main()"
)
_COMMAND = [sys.executable, "-c", _CODE]
_TOO_MUCH = "The grammar is too complex: it cannot be compiled within the limits of time and memory."


class GrammarChecker:
    """Checks grammars one after the other, and remembers what it found. Thread-safe; not for an event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._found: OrderedDict[bytes, str | None] = OrderedDict()

    def knows(self, spec: GrammarSpec) -> bool:
        """Whether `check` answers at once."""
        return spec.digest in self._found

    def check(self, spec: GrammarSpec, param: str | None = None) -> None:
        """Compiles a grammar on trial; blocking. The first one starts the process.

        Args:
            spec: The grammar of a request.
            param: The request's field, for the error.

        Raises:
            InputError: It cannot be enforced; the message names the part.
        """
        if len(spec.text) > MAX_TEXT_BYTES:
            raise InputError(f"The grammar has {len(spec.text)} characters, more than {MAX_TEXT_BYTES}.", param=param)
        if not self.knows(spec):
            with self._lock:
                if not self.knows(spec):
                    self._remember(spec, self._ask(spec))
        problem = self._found[spec.digest]
        if problem is not None:
            raise InputError(problem, param=param)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _remember(self, spec: GrammarSpec, problem: str | None) -> None:
        self._found[spec.digest] = problem
        if len(self._found) > MAX_REMEMBERED:
            self._found.popitem(last=False)

    def _ask(self, spec: GrammarSpec) -> str | None:
        process = self._running()
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            answer = _exchange(process, spec)
        finally:
            timer.cancel()
        if not answer:
            self._end()
            return _TOO_MUCH
        problem: str | None = json.loads(answer)
        return problem

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            pipe, none = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=none, text=True)
            if not _exchange(self._process, GrammarSpec("regex", "a")):
                raise MaxRayError("The process that checks grammars does not start.")
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with process:  # closes the pipes and waits
            pass


def _exchange(process: subprocess.Popen[str], spec: GrammarSpec) -> str:
    """The process's answer; empty where it has ended."""
    assert process.stdin is not None, "a pipe was asked for"
    assert process.stdout is not None, "a pipe was asked for"
    try:
        process.stdin.write(json.dumps([spec.kind, spec.text, spec.whitespace]) + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""

"""One process of a step: it ends at the step's limit, and starts again behind a case that killed it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from max_ray.benchmark.case_log import FAILED, FILE, FINISHED, PASSED, SKIPPED, STARTED, STEP, read_log

LOG_NAME, RESULTS_NAME = "log.txt", "results.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What came of one process of a step. finished: it came to its end. unfinished: a case that it was in."""

    step: str
    seconds: float
    exit_code: int
    finished: bool
    timed_out: bool
    passed: int
    failed: int
    skipped: int

    @property
    def is_good(self) -> bool:
        return self.finished and not self.failed and self.passed > 0


class Supervisor:
    """Runs commands of one visit. folder: for the results and the log. environment: of every command."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.results = folder / RESULTS_NAME
        self._log_path = folder / LOG_NAME
        self._environment = environment
        self._print_lock = threading.Lock()

    def run(self, step: str, arguments: Sequence[str], limit_s: float) -> Outcome:
        """Runs Python with `arguments` until it finishes, makes no more progress, or the limit is over."""
        start, exit_code, timed_out = time.monotonic(), 0, False
        while True:
            before = self._num_lines(step)
            left = limit_s - (time.monotonic() - start)
            exit_code, timed_out = self._run_once(step, arguments, left)
            is_over = timed_out or self._is_finished(step) or self._num_lines(step) == before
            if is_over or time.monotonic() - start >= limit_s:
                return self._outcome(step, time.monotonic() - start, exit_code, timed_out)

    def say(self, text: str) -> None:
        """Prints a line, and writes it to the log."""
        with self._print_lock, self._log_path.open("a", encoding="utf-8") as log:
            self._write(text + "\n", log)

    def _run_once(self, step: str, arguments: Sequence[str], limit_s: float) -> tuple[int, bool]:
        """(exit code, whether the limit ended it)."""
        variables = {**self._environment, FILE: str(self.results), STEP: step}
        process = subprocess.Popen(
            ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-u", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self._copy_output, args=(process,), daemon=True)
        reader.start()
        timed_out = False
        try:
            process.wait(max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_group(process)
        reader.join(5.0)
        return process.returncode, timed_out

    def _copy_output(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self._log_path.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                with self._print_lock:
                    self._write(line, log)

    @staticmethod
    def _write(text: str, log: TextIO) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        log.write(text)
        log.flush()

    def _records(self, step: str) -> list[dict[str, object]]:
        return [record for record in read_log(self.results) if record["step"] == step]

    def _num_lines(self, step: str) -> int:
        return len(self._records(step))

    def _is_finished(self, step: str) -> bool:
        return any(record["state"] == FINISHED for record in self._records(step))

    def _outcome(self, step: str, seconds: float, exit_code: int, timed_out: bool) -> Outcome:
        states = {str(record["case"]): record["state"] for record in self._records(step) if record["case"]}
        counts = {state: list(states.values()).count(state) for state in (PASSED, FAILED, SKIPPED, STARTED)}
        failed = counts[FAILED] + counts[STARTED]
        finished = self._is_finished(step)
        return Outcome(step, seconds, exit_code, finished, timed_out, counts[PASSED], failed, counts[SKIPPED])


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends the process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

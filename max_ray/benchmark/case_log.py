"""Results as they come: one JSON object a line, written to the disk before the next case begins. No torch here.

    {"step": "probe", "case": "linear qkv 1", "state": "started"}
    {"step": "probe", "case": "linear qkv 1", "state": "passed", "seconds": 1.2, ...}

A process that dies in a case leaves that case started. Started again, it takes the case for failed and goes on behind
it. Environment: CASE_LOG names the file (without it, nothing is written), CASE_STEP the step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from max_ray.log import get_logger
from max_ray.settings import variable

FILE, STEP = "CASE_LOG", "CASE_STEP"
STARTED, PASSED, FAILED, SKIPPED, FINISHED = "started", "passed", "failed", "skipped", "finished"
DEVICE_LOST = 99  # exit code of a process whose device answers no more

_CASE_LIMIT_S = 45.0  # a case that hangs ends its process
_LOG = get_logger(__name__)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a line that a dying process has cut is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


class CaseLog:
    """The results of one step.

    Args:
        step: Name of the step.
        path: File to append to; None to keep results in memory only.
        check_device: Raises RuntimeError when the device is lost; called after a case that failed.
    """

    def __init__(self, step: str, path: Path | None, check_device: Callable[[], None] = lambda: None) -> None:
        self.step = step
        self.failed: list[str] = []
        self._path = path
        self._check_device = check_device
        self._states: dict[str, str] = {}
        self._resume()

    @classmethod
    def from_environment(cls, step: str, check_device: Callable[[], None] = lambda: None) -> CaseLog:
        """The log that the environment names. step: default for CASE_STEP."""
        path = variable(FILE)
        return cls(variable(STEP) or step, Path(path) if path else None, check_device)

    def is_done(self, case: str) -> bool:
        """Whether an earlier process of this step has the case's result."""
        return self._states.get(case, STARTED) != STARTED

    def run(self, case: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Runs one case. Returns its result, or None when it failed or was done before.

        Args:
            case: Name, unique in its step.
            function: Returns the result, which goes to the log; `"agrees": False` in it makes the case failed.
        """
        if self.is_done(case):
            return None
        self.start(case)
        start = time.perf_counter()
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 (any failure of a case is a result)
            _LOG.exception("%s: %s failed", self.step, case)
            self.end(case, FAILED, error=f"{type(error).__name__}: {error}"[:2000])
            self._leave_a_lost_device()
            return None
        state = PASSED if result.get("agrees", True) else FAILED
        self._finish_case(case, state, result | {"wall_s": time.perf_counter() - start})
        return result

    def start(self, case: str) -> None:
        """Writes that the case begins, and starts its clock."""
        if self._path is not None:
            faulthandler.dump_traceback_later(_CASE_LIMIT_S, exit=True)
        self._write(case, STARTED, {})

    def end(self, case: str, state: str, **values: Any) -> None:
        """Writes the case's result."""
        self._finish_case(case, state, values)

    def _finish_case(self, case: str, state: str, values: dict[str, Any]) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write(case, state, values)

    def finish(self) -> None:
        """Writes that the step's process came to its end."""
        self._write("", FINISHED, {"num_failed": len(self.failed)})

    def _write(self, case: str, state: str, values: dict[str, Any]) -> None:
        self._states[case] = state
        if state == FAILED:
            self.failed.append(case)
        if self._path is None:
            return
        text = json.dumps({**values, "step": self.step, "case": case, "state": state}, default=str) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _leave_a_lost_device(self) -> None:
        try:
            self._check_device()
        except RuntimeError as error:
            _LOG.error("%s: the device is lost, the process ends: %s", self.step, error)
            sys.exit(DEVICE_LOST)

    def _resume(self) -> None:
        """Takes over an earlier process's results; a case that it did not end has failed."""
        if self._path is None:
            return
        own = [record for record in read_log(self._path) if record["step"] == self.step and record["case"]]
        for record in own:
            self._states[record["case"]] = record["state"]
        self.failed = [case for case, state in self._states.items() if state == FAILED]
        for case in [case for case, state in self._states.items() if state == STARTED]:
            self._write(case, FAILED, {"error": "the process ended, or hung, in this case"})

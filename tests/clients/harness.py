"""Runs the calls of one client inside that client's environment. Standard library only.

    URL=http://127.0.0.1:8000 MODEL=name venv/bin/python -m tests.clients.harness openai_python results.jsonl

A call is a test method of a `ClientCalls` with the decorator `call`. Each gives one JSON line: client, call, judged_by,
outcome ("works" or "fails") and why. `ONLY` in the environment keeps the calls whose names contain it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

URL = os.environ.get("URL", "http://127.0.0.1:8000")
OPENAI_URL = f"{URL}/v1"
MODEL = os.environ.get("MODEL", "")
TIMEOUT_S = 300  # of one call
CITIES = ("Paris", "Rome", "Oslo")
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city", "parameters": WEATHER_SCHEMA},
}
WEATHER_QUESTION = "What is the weather in Paris?"


def call(name: str, judged_by: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Names a call in the table and says what of its answer is checked."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        method.__dict__.update(call=name, judged_by=judged_by)
        return method

    return mark


class ClientCalls(unittest.IsolatedAsyncioTestCase):
    """The calls of one client.

    Attributes:
        client: the name in the table.
    """

    client = ""

    def setUp(self) -> None:
        signal.signal(signal.SIGALRM, self._expire)
        signal.alarm(TIMEOUT_S)
        self.addCleanup(signal.alarm, 0)

    def _expire(self, *_: Any) -> None:
        raise TimeoutError(f"no result after {TIMEOUT_S} s")

    def check_text(self, text: Any) -> None:
        """A text that is not empty."""
        self.assertIsInstance(text, str)
        self.assertTrue(text.strip(), "the text is empty")

    def check_weather(self, name: str, arguments: Any, is_open: bool = False) -> None:
        """A call of the weather tool whose arguments fit its schema.

        Args:
            name: the name of the called function.
            arguments: an object, or its JSON text.
            is_open: the client's schema does not forbid additional properties.
        """
        self.assertEqual(name, "get_weather")
        found = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
        self.assertTrue(is_open or list(found) == ["city"], f"additional properties: {list(found)}")
        self.assertIn(found["city"], CITIES)

    def check_call_or_text(self, text: Any, calls: list[tuple[str, Any]]) -> None:
        """What a model may answer when the choice is its own: a text, or calls of known tools with JSON objects."""
        if not calls:
            self.check_text(text)
        for name, arguments in calls:
            self.assertEqual(name, "get_weather")
            self.assertIsInstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)


class _Recorder(unittest.TextTestResult):
    """Writes a line for each call as it ends."""

    path: Path

    def _write(self, test: Any, outcome: str, why: str = "") -> None:
        method = getattr(test, test._testMethodName)
        line = {
            "client": test.client,
            "call": method.call,
            "judged_by": method.judged_by,
            "outcome": outcome,
            "why": why,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._write(test, "works")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._write(test, "fails", f"{type(err[1]).__name__}: {err[1]}")

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._write(test, "fails", str(err[1]))


def methods_of(case: type[ClientCalls]) -> Iterator[ClientCalls]:
    """The calls in the order of the file."""
    found = {name: method for name, method in vars(case).items() if hasattr(method, "call")}
    for name, method in found.items():
        if os.environ.get("ONLY", "") in method.__dict__["call"]:
            yield case(name)


def main(module_name: str, results: str) -> int:
    """Runs a module of `tests.clients.calls`; returns the number of calls that failed."""
    module = importlib.import_module(f"tests.clients.calls.{module_name}")
    cases = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, ClientCalls)]
    _Recorder.path = Path(results)
    suite = unittest.TestSuite(test for case in cases if case is not ClientCalls for test in methods_of(case))
    outcome = unittest.TextTestRunner(resultclass=_Recorder, verbosity=2).run(suite)
    return len(outcome.failures) + len(outcome.errors)


if __name__ == "__main__":
    # By its import name: the calls' base class must be the one that they import, not __main__'s.
    from tests.clients import harness

    sys.exit(min(harness.main(sys.argv[1], sys.argv[2]), 100))

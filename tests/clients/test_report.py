"""The table of clients, and the lines that it is made of: of a client that is written here."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments, harness, report
from tests.clients.__main__ import run_client

CALLS = Path(environments.HERE) / "calls"


class Sample(harness.ClientCalls):
    __test__ = False  # not for pytest
    client = "sample"

    @harness.call("good", "a sum")
    def test_good(self) -> None:
        self.assertEqual(1 + 1, 2)

    @harness.call("wrong | twice", "a text")
    async def test_wrong(self) -> None:
        self.check_text("  ")

    @harness.call("broken", "a number")
    def test_broken(self) -> None:
        int("x")

    @harness.call("slow", "it ends")
    async def test_slow(self) -> None:
        self._expire()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    module = types.ModuleType("tests.clients.calls.sample")
    module.__dict__["Sample"] = Sample
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "results.jsonl"
    assert harness.main("sample", str(path)) == 3
    return report.read_results(path)


def test_each_call_is_one_line_in_the_order_of_the_file(results: list[dict[str, Any]]) -> None:
    assert [line["call"] for line in results] == ["good", "wrong | twice", "broken", "slow"]
    assert [line["outcome"] for line in results] == ["works", "fails", "fails", "fails"]
    assert "the text is empty" in results[1]["why"]
    assert results[2]["why"].startswith("ValueError: invalid literal")
    assert results[3]["why"] == f"TimeoutError: no result after {harness.TIMEOUT_S} s"


def test_the_page(results: list[dict[str, Any]]) -> None:
    results[2]["why"] = "a_b\n| c <d> " + "x" * 1000
    page = report.render(results, ["sample==1.0"])
    assert "**4 calls of 1 clients: 1 work, 3 fail.**" in page
    assert "| sample | good | a sum | works |" in page
    assert "| sample | wrong \\| twice | a text | **fails**:" in page
    (row,) = [line for line in page.splitlines() if "| broken |" in line]
    assert "a\\_b \\| c &lt;d> xxx" in row
    assert len(row) < 400
    assert "`sample==1.0`" in page


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("other", {"city": "Paris"}),
        ("get_weather", {"city": "Berlin"}),
        ("get_weather", {"city": "Paris", "unit": "C"}),
        ("get_weather", '{"city": "Par'),
        ("get_weather", "{}"),
    ],
)
def test_a_wrong_call_is_no_call(name: str, arguments: Any) -> None:
    with pytest.raises((AssertionError, ValueError)):
        Sample("test_good").check_weather(name, arguments)
    Sample("test_good").check_weather("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "calls"), [("", []), (None, []), ("a", [("other", "{}")]), ("a", [("get_weather", "[]")])]
)
def test_neither_a_text_nor_a_call(text: Any, calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        Sample("test_good").check_call_or_text(text, calls)


def test_a_client_that_ends_before_its_first_call_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.clients.server.model_name", lambda url: "fake")
    program = tmp_path / "broken" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    run_client("broken", "http://127.0.0.1:1", tmp_path)
    (line,) = report.read_results(tmp_path / "broken.jsonl")
    assert (line["client"], line["outcome"], line["why"]) == ("broken", "fails", "exit code 3")


def test_each_client_has_calls_and_pinned_requirements() -> None:
    names = environments.client_names()
    assert {path.stem for path in CALLS.glob("*.py")} - {"__init__"} == set(names) - {environments.JAVASCRIPT}
    for name in names:
        for version in environments.versions(name):
            assert "==" in version or "@" in version, version
    packages = json.loads((environments.HERE / "js" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert all(version[0].isdigit() for version in packages.values())

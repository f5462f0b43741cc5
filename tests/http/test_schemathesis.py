"""schemathesis reads `/openapi.json` and tries every operation: what the document allows works, what it does not is
refused, and each answer is as it says. With API keys, and with all the checks that are on by default.

    python -m pytest -m slow -s tests/http/test_schemathesis.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http.described_server import KEY, Described, described_server
from tests.http.schemathesis_hooks import RULES_FILE, is_rule
from tests.source_tree import ROOT

_SETTINGS = f"""hooks = "tests.http.schemathesis_hooks"
[cache]
enabled = false
[headers]
Authorization = "Bearer {KEY}"
[parameters]
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Described]:
    with described_server(tmp_path) as server:
        yield server


def run(server: Described, folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of schemathesis. Its settings are its defaults."""
    values = "".join(f'"path.{name}" = {json.dumps(value)}\n' for name, value in server.ids.items())
    (folder / "schemathesis.toml").write_text(_SETTINGS + values, encoding="utf-8")
    program = [sys.executable, "-m", "schemathesis.cli"]
    chosen = ["--config-file", str(folder / "schemathesis.toml"), "run", f"{server.url}/openapi.json"]
    fixed = ["--seed", "1", "--continue-on-failure", "--no-color", "--generation-database", "none"]
    ended = subprocess.run(
        [*program, *chosen, *fixed, *arguments],
        cwd=folder,  # it keeps what it found below the working directory
        env={**os.environ, "PYTHONPATH": str(ROOT), RULES_FILE: str(folder / "rules")},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_what_counts_as_a_rule() -> None:
    assert is_rule(400, "top_logprobs has a meaning only with logprobs=true.")
    assert not is_rule(422, "top_logprobs has a meaning only with logprobs=true.")
    assert not is_rule(400, "Unknown field 'a'.")
    assert not is_rule(400, "The field 'a.b' is not valid: Input should be a valid integer.")
    assert not is_rule(400, "The field 'a' is required.")


def test_examples_work(server: Described, tmp_path: Path) -> None:
    """Every example of the document, and one body for each operation."""
    status, output = run(server, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "1")
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_document_is_true(server: Described, tmp_path: Path) -> None:
    """The examples, values at the borders of every schema (coverage), and random ones (fuzzing)."""
    status, output = run(server, tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", "20")
    rules = Counter((tmp_path / "rules").read_text(encoding="utf-8").splitlines())
    print(output[-5000:], *(f"{count} times {rule}" for rule, count in rules.most_common()), sep="\n")
    assert status == 0, output

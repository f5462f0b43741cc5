"""Runs the interpreted_*.py files: Triton decides when it is imported, so they need a process of their own.

python -m pytest tests/kernels/gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.timeout(600)  # one test here is a whole run
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def run_interpreted(markers: str) -> None:
    command = [sys.executable, "-m", "pytest", *map(str, FILES), "-q", "--no-header", "--tb=short", "-m", markers]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]


def test_triton_kernels_equal_their_reference() -> None:
    run_interpreted("not slow")


@pytest.mark.slow
def test_triton_kernels_equal_their_reference_at_more_borders() -> None:
    run_interpreted("slow")

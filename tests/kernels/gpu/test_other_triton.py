"""The compile tests once more with the Triton that torch 2.11 brings: what the newest compiles well may spill there.

The wheel goes to build/triton-3.6.0, without touching the environment. python -m pytest -m slow tests/kernels/gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

VERSION = "3.6.0"
ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / f"triton-{VERSION}"
FILES = sorted(Path(__file__).parent.glob("test_compile*.py"))


def install() -> None:
    """Raises CalledProcessError without a package registry."""
    if not (FOLDER / "triton" / "__init__.py").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        subprocess.run([*command, f"triton=={VERSION}"], check=True, capture_output=True, text=True)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_with_the_triton_of_torch_2_11() -> None:
    try:
        install()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"triton {VERSION} could not be installed: {error.stderr[-300:]}")
    assert python("-c", "import triton; print(triton.__version__)").stdout.strip() == VERSION
    result = python(
        "-m", "pytest", *map(str, FILES), "-m", "not slow", "-q", "-s", "--no-header", "-p", "no:cacheprovider"
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

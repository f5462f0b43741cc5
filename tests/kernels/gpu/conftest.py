"""Files named interpreted_*.py run in Triton's interpreter, in a process of their own: see test_interpreter.py."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _faithful_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.kernels.gpu.interpreter import correct_bfloat16

        correct_bfloat16(monkeypatch)

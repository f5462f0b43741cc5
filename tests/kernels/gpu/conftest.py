"""Files named interpreted_*.py run in Triton's interpreter, in a process of their own: see test_interpreter.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_as_the_hardware_does() -> Iterator[None]:
    """Triton 3.9's interpreter cuts float32 off to bfloat16, where GPUs round to the nearest even."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray[Any, Any], source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.from_numpy(data.view(np.float32).copy()).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert

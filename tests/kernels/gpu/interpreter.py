"""What Triton 3.9's interpreter gets wrong about bfloat16, put right for the tests: it stands for the hardware here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def correct_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Rounds float32 to the nearest even bfloat16 (it cuts), and multiplies matrices of values (it takes the bits for
    integers)."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: np.ndarray[Any, Any], source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.from_numpy(data.view(np.float32).copy()).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    patch.setattr(interpreter, "_convert_float", rounded)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)

"""What the interpreters of Triton 3.6 and 3.9 get wrong about bfloat16, corrected for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def correct_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Rounds float32 to the nearest even bfloat16 (it cuts), widens subnormal numbers, and calculates with values,
    also in products of matrices (it takes the bits for integers)."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    binary = interpreter.InterpreterBuilder.binary_op

    def converted(data: np.ndarray[Any, Any], source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.from_numpy(data.view(np.float32).copy()).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def binary_of_values(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply, np.divide):
            return binary(self, a, b, operation)
        wide = binary(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), operation)
        return self.cast_impl(wide, tl.bfloat16)

    def bfloat16_constant(self: Any, value: float) -> Any:
        return self.cast_impl(self.get_fp32(value), tl.bfloat16)

    if not hasattr(interpreter.InterpreterBuilder, "get_bf16"):  # Triton 3.6
        patch.setattr(interpreter.InterpreterBuilder, "get_bf16", bfloat16_constant, raising=False)
    patch.setattr(interpreter, "_convert_float", converted)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)
    patch.setattr(interpreter.InterpreterBuilder, "binary_op", binary_of_values)

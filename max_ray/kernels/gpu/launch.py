"""How kernels are launched: block sizes, warps, and the device on which a launch lands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton


def padded(size: int, least: int = 1) -> int:
    """The smallest power of two that holds `size`, at least `least`: Triton's blocks have no other lengths."""
    return max(least, int(triton.next_power_of_2(size)))


def warps_for(block_elements: int) -> int:
    """1 to 16 warps so that a thread has about 8 elements: one 16-byte access of bfloat16."""
    return min(16, max(1, padded(block_elements) // 256))


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on that of its arguments: this makes them the same."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last axis is contiguous, as the kernels ask for, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; of the interpreter 8: enough for tests to see several splits."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

"""The device of these tests: a GPU, or in a rehearsal (GPU_REHEARSAL=1, TRITON_INTERPRET=1) the CPU, where the Triton
kernels run in their interpreter, a captured step runs again, and questions to the device are noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from max_ray.engine.graphs import Capture, CudaCapture, Replay

REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)


def capture() -> Capture:
    """What captures decode steps here."""
    return Replay if REHEARSAL else CudaCapture(DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host waits for the device but by an event. A CPU cannot tell: nothing is checked there."""
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_device() -> None:
    """Raises RuntimeError where an earlier kernel has broken the device's context."""
    if not REHEARSAL:
        torch.cuda.synchronize(DEVICE)

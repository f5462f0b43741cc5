"""What a process holds in memory, to set against the plan. Linux; None elsewhere."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def held_bytes(device: torch.device) -> int | None:
    """On a GPU what torch's allocator has given out; otherwise the written part of the unique set size.

    The unique set size has pages of files too, libraries above all: tens of MiB of torch that come and go with other
    processes that map the same file. Weights and caches are written by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def return_freed_memory() -> None:
    """Gives pages that the C library keeps after loading back to the system, where it is one that does (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
